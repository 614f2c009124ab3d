"""One file, read by reference and written a tensor at a time: the bytes are those of protobuf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qcompile.errors import PassError
from qcompile.graph import io, wire


def proto(*tensors: onnx.TensorProto, **words: Any) -> onnx.ModelProto:
    nodes = [helper.make_node("Identity", [t.name], [f"{t.name}_out"]) for t in tensors]
    outputs = [helper.make_tensor_value_info(f"{t.name}_out", t.data_type, t.dims) for t in tensors]
    graph = helper.make_graph(nodes, "g", [], outputs, list(tensors), doc_string="about it")
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], **words)


def tensor(name: str, kind: type = np.float32, *shape: int, seed: int = 0) -> onnx.TensorProto:
    values: np.ndarray = np.random.default_rng(seed).standard_normal(shape or (40, 50)).astype(kind)
    return numpy_helper.from_array(values, name)


def mapped(path: Path, model: onnx.ModelProto) -> ir.Model:
    path.write_bytes(model.SerializeToString())
    return io.load(path, mapped=True)


def written(model: ir.Model, path: Path) -> bytes:
    with path.open("wb") as file:
        wire.write(model, file)
    return path.read_bytes()


@given(number=st.integers(0, 2**63))
def test_numbers(number: int) -> None:
    made = wire.varint(number)
    assert sum((byte & 0x7F) << 7 * place for place, byte in enumerate(made)) == number
    assert [byte > 0x7F for byte in made] == [True] * (len(made) - 1) + [False]


@pytest.mark.parametrize("name", ["m.onnx", "a b%20 ü#'\".onnx"])
def test_large_weights_refer_to_the_file(tmp_path: Path, name: str) -> None:
    given = proto(tensor("w"), tensor("v", np.float16, 50, 60), tensor("small", np.float32, 4))
    found = mapped(tmp_path / name, given)
    kinds = {key: type(value.const_value) for key, value in found.graph.initializers.items()}
    assert kinds["w"] is kinds["v"] is ir.ExternalTensor
    assert kinds["small"] is not ir.ExternalTensor
    for held in given.graph.initializer:
        value = found.graph.initializers[held.name].const_value
        assert value is not None
        np.testing.assert_array_equal(value.numpy(), numpy_helper.to_array(held))


def test_everything_else_is_kept(tmp_path: Path) -> None:
    given = proto(tensor("w"), producer_name="me", doc_string="x" * 9000, model_version=7)
    given.metadata_props.add(key="k", value="v" * 300)
    given.graph.initializer[0].doc_string = "a weight"
    (tmp_path / "m.onnx").write_bytes(given.SerializeToString())
    found = wire.read_mapped(tmp_path / "m.onnx")
    found.graph.initializer[0].ClearField("external_data")
    found.graph.initializer[0].ClearField("data_location")
    found.graph.initializer[0].raw_data = given.graph.initializer[0].raw_data
    assert found == given


@given(
    sizes=st.lists(st.sampled_from([1, 3, 1023, 1024, 1025, 5000, 40000]), min_size=1, max_size=5),
    kind=st.sampled_from([np.float32, np.float16, np.int64, np.uint8]),
)
def test_the_bytes_are_those_of_protobuf(
    tmp_path_factory: Any, sizes: list[int], kind: type
) -> None:
    folder = tmp_path_factory.mktemp("w")
    given = proto(*(tensor(f"t{i}", kind, size, seed=i) for i, size in enumerate(sizes)))
    for model in (io.load(given), mapped(folder / "m.onnx", given)):
        assert written(model, folder / "n.onnx") == io.to_bytes(model)


def test_lazy_and_packed_and_text_tensors(tmp_path: Path) -> None:
    model = io.load(proto(tensor("a"), tensor("b"), tensor("c"), tensor("d")))
    values = np.arange(2000, dtype=np.float32)
    packed = ir.PackedTensor(
        np.arange(5000, dtype=np.uint8), ir.DataType.INT4, shape=ir.Shape([10000])
    )
    made = {
        "a": ir.LazyTensor(lambda: ir.Tensor(values), ir.DataType.FLOAT, ir.Shape([2000])),
        "b": packed,
        "c": ir.StringTensor([b"word" * 2000], shape=ir.Shape([1])),
    }
    for name, held in made.items():
        model.graph.initializers[name].const_value = held
    want = io.to_bytes(model)
    assert written(model, tmp_path / "m.onnx") == want
    assert onnx.load_from_string(want).graph.initializer[0].dims == [2000]
    assert model.graph.initializers["a"].const_value is made["a"]


def test_external_data_of_a_body_comes_inside(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["p"])], "b", [], [helper.make_tensor_value_info("p", 1, [40, 50])],
        [tensor("w")],
    )  # fmt: skip
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", 1, [40, 50])],
    )  # fmt: skip
    ir.save(
        ir.from_proto(helper.make_model(graph, ir_version=10)),
        tmp_path / "m.onnx",
        external_data="w.bin",
    )
    model = io.load(tmp_path / "m.onnx")
    data = written(model, tmp_path / "n.onnx")
    held = onnx.load_from_string(data).graph.node[0].attribute[0].g.initializer[0]
    np.testing.assert_array_equal(numpy_helper.to_array(held), numpy_helper.to_array(tensor("w")))


def test_a_tensor_that_is_shorter_than_it_said(tmp_path: Path) -> None:
    model = io.load(proto(tensor("a")))
    short = ir.Tensor(np.ones(10, np.float32))
    model.graph.initializers["a"].const_value = ir.LazyTensor(
        lambda: short, ir.DataType.FLOAT, ir.Shape([2000])
    )
    with pytest.raises(PassError, match="'a' wrote 40 bytes and said 8000"):
        written(model, tmp_path / "m.onnx")


@pytest.mark.parametrize("cut", [1, 2, 10, 4000, 8000])
def test_a_truncated_file(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(proto(tensor("w")).SerializeToString()[:-cut])
    with pytest.raises(ValueError, match=r"ends beyond|does not end|wire type|no graph"):
        wire.read_mapped(path)


@pytest.mark.parametrize("data", [b"", b"\xff" * 20, b"\x0b", b"no model at all, only text"])
def test_what_is_no_message(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r".+"):
        wire.read_mapped(path)


def test_a_graph_in_pieces_is_left_to_protobuf(tmp_path: Path) -> None:
    path, given = tmp_path / "m.onnx", proto(tensor("w"))
    more = onnx.ModelProto()
    more.graph.initializer.append(tensor("more"))
    path.write_bytes(given.SerializeToString() + more.SerializeToString())
    with pytest.raises(ValueError, match="in pieces"):
        wire.read_mapped(path)
    assert set(io.load(path, mapped=True).graph.initializers) == {"w", "more"}
