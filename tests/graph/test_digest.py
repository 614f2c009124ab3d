"""The digest of a model: of what it computes, and of nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import conv_net, from_text, made_model, save, set_weight
from onnx import helper, numpy_helper

from qcompile.graph import io
from qcompile.graph.digest import digest

FLOAT = onnx.TensorProto.FLOAT


def of(model: Any) -> str:
    return digest(io.load(model))


def info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, FLOAT, ["N", 4])


def net() -> onnx.ModelProto:
    return conv_net(convs=1, channels=4, norm=True)


def branched(inner: str = "Relu", weight: float = 1.0) -> onnx.ModelProto:
    """An If whose first body is the operator `inner` behind a sum with its own weight."""
    tensor = numpy_helper.from_array(np.full(4, weight, np.float32), "own")
    nodes = [
        helper.make_node("Add", ["x", "own"], ["s"]),
        helper.make_node(inner, ["s"], ["t"]),
    ]
    then = helper.make_graph(nodes, "then", [], [info("t")], [tensor])
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["e"])], "else", [], [info("e")])
    choice = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    condition = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    return made_model(helper.make_graph([choice], "g", [info("x"), condition], [info("y")]))


def functional(
    *, op: str = "LeakyRelu", alpha: float = 0.1, opset: int = 17, name: str = "f"
) -> onnx.ModelProto:
    """A call of a function, whose attribute has a default."""
    node = helper.make_node(op, ["a"], ["b"])
    node.attribute.add(name="alpha", ref_attr_name="k", type=onnx.AttributeProto.FLOAT)
    function = helper.make_function(
        "mine", name, ["a"], ["b"], [node], [helper.make_opsetid("", opset)],
        attribute_protos=[helper.make_attribute("k", alpha)],
    )  # fmt: skip
    call = helper.make_node(name, ["x"], ["y"], domain="mine")
    return helper.make_model(
        helper.make_graph([call], "g", [info("x")], [info("y")]), functions=[function], ir_version=8,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)],
    )  # fmt: skip


# ---- the same model


def test_it_is_a_hash() -> None:
    assert len(of(net())) == 64
    assert set(of(net())) <= set("0123456789abcdef")
    assert of(net()) == of(net())


def test_saved_elsewhere_inside_and_outside(tmp_path: Path) -> None:
    wanted = of(net())
    (tmp_path / "deep").mkdir()
    assert of(save(net(), tmp_path / "a.onnx")) == wanted
    assert of(save(net(), tmp_path / "deep" / "b.onnx", data="b.data")) == wanted
    assert of(str(tmp_path / "a.onnx")) == of(io.load(tmp_path / "deep" / "b.onnx")) == wanted
    io.save(io.load(tmp_path / "deep" / "b.onnx"), tmp_path / "c.onnx")
    assert of(tmp_path / "c.onnx") == wanted


def test_another_process_finds_the_same(tmp_path: Path) -> None:
    save(functional(), tmp_path / "m.onnx")
    code = (
        "import sys; from qcompile.graph import digest, io\n"
        "print(digest.digest(io.load(sys.argv[1])))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "m.onnx")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == of(functional())


def test_what_is_not_computed_does_not_count() -> None:
    model = net()
    model.producer_name, model.producer_version, model.doc_string = "someone", "9", "about"
    model.model_version, model.graph.name, model.graph.doc_string = 7, "other", "about"
    entry = model.metadata_props.add()
    entry.key, entry.value = "author", "me"
    for item in (model.graph.node[0], model.graph.input[0], model.graph.initializer[0]):
        item.doc_string = "about"
    assert of(model) == of(net())


def test_how_numbers_are_stored_does_not_count() -> None:
    model = net()
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight).ravel()
        weight.ClearField("raw_data")
        weight.float_data.extend(values.tolist())
    assert of(model) == of(net())
    weights = list(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(reversed(weights))
    assert of(model) == of(net())


def test_a_digest_changes_nothing() -> None:
    model = io.load(branched())
    before = io.to_bytes(model)
    assert digest(model) == digest(model)
    assert io.to_bytes(model) == before
    assert digest(model.clone()) == digest(model)


# ---- another model


def set_input(model: onnx.ModelProto, name: str) -> None:
    model.graph.node[0].input[0] = model.graph.input[0].name = name


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = new if name == old else name


def set_shape(model: onnx.ModelProto, name: str) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = name


CHANGES: dict[str, Callable[[onnx.ModelProto], Any]] = {
    "weight": lambda m: set_weight(m, "w0", 0.25),
    "last bias": lambda m: set_weight(m, "beta", np.nextafter(np.float32(0), np.float32(1))),
    "attribute": lambda m: m.graph.node[0].attribute[0].ints.__setitem__(0, 0),
    "new attribute": lambda m: m.graph.node[0].attribute.append(
        helper.make_attribute("strides", [1, 1])
    ),
    "text": lambda m: m.graph.node[0].attribute.append(helper.make_attribute("auto_pad", "NOTSET")),
    "operator": lambda m: setattr(m.graph.node[2], "op_type", "Sigmoid"),
    "domain": lambda m: setattr(m.graph.node[2], "domain", "com.microsoft"),
    "name of an input": lambda m: set_input(m, "z"),
    "name within": lambda m: rename(m, "c0", "c9"),
    "opset": lambda m: setattr(m.opset_import[0], "version", 16),
    "another opset": lambda m: m.opset_import.append(helper.make_opsetid("more", 1)),
    "shape": lambda m: set_shape(m, "B"),
    "type": lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 11),
    "an output more": lambda m: m.graph.output.append(
        helper.make_tensor_value_info("g", FLOAT, None)
    ),
    "order of inputs": lambda m: m.graph.node[1].input.reverse(),
    "an input less": lambda m: m.graph.node[0].input.pop(),
    "no input": lambda m: m.graph.node[0].input.__setitem__(2, ""),
    "a node more": lambda m: m.graph.node.append(helper.make_node("Relu", ["y"], ["unused"])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_computed_counts(change: str) -> None:
    model = net()
    CHANGES[change](model)
    assert of(model) != of(net())


def test_all_changes_differ() -> None:
    found = set()
    for change in CHANGES.values():
        model = net()
        change(model)
        found.add(of(model))
    assert len(found) == len(CHANGES)


def test_the_body_of_an_if() -> None:
    models = branched(), branched("Sigmoid"), branched(weight=2), branched(weight=-1)
    assert len({of(model) for model in models}) == 4
    assert of(branched()) == of(branched())


def test_bodies_change_places() -> None:
    model = branched()
    first, second = model.graph.node[0].attribute
    first.name, second.name = second.name, first.name
    assert of(model) != of(branched())


@pytest.mark.parametrize(
    "more", [{"op": "Elu"}, {"name": "g"}, {"alpha": 0.3}, {"opset": 16}], ids=str
)
def test_functions(more: dict[str, Any]) -> None:
    assert of(functional()) == of(functional())
    assert of(functional(**more)) != of(functional())


def test_constants_of_every_kind() -> None:
    """Numbers, texts, lists and tensors in attributes, and 0 apart from -0."""
    values = [
        {"value_float": 0.0}, {"value_float": -0.0}, {"value_int": 0}, {"value_floats": [0.0]}, {"value_ints": [0]},
        {"value_string": "a"}, {"value_strings": ["a"]}, {"value_strings": ["a", ""]}, {"value_string": "é"},
        *({"value": numpy_helper.from_array(np.array(v, t), "v")} for v, t in (
            (0, "f4"), (-0.0, "f4"), ([0], "f4"), ([[0]], "f4"), (0, "f8"), (0, "i8"), ([], "f4"), (["a"], "O"),
            (["b"], "O"), (["a", ""], "O"), (np.nan, "f4"),
        )),
    ]  # fmt: skip
    found = set()
    for value in values:
        model = from_text("g (float[N] x) => (float[N] y) { y = Relu(x) }")
        model.graph.node.append(helper.make_node("Constant", [], ["k"], **value))
        assert of(model) == of(onnx.ModelProto.FromString(model.SerializeToString()))
        found.add(of(model))
    assert len(found) == len(values)


@pytest.mark.parametrize("kind", ["BFLOAT16", "FLOAT16", "INT4", "UINT8", "BOOL", "FLOAT8E4M3FN"])
def test_weights_of_every_kind(kind: str, tmp_path: Path) -> None:
    found = set()
    for values in ([0, 1, 0], [0, 1, 1]):
        model = from_text("g (float[N] x) => (float[N] y) { y = Relu(x) }")
        number = getattr(onnx.TensorProto, kind)
        model.graph.initializer.append(helper.make_tensor("w", number, [3], values))
        assert of(save(model, tmp_path / "m.onnx")) == of(model)
        found.add(of(model))
    assert len(found) == 2
