"""What fuzzing found, each made small: defects that are mended, and must stay so."""

from __future__ import annotations

import tokenize
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from fuzz_graphs import Drawn
from fuzz_grower import Sample
from fuzz_judge import judge
from networks import from_text
from onnx import TensorProto, helper

from qcompile import compile_model
from qcompile.algo.equalization import Carrier, Reader, best_scale
from qcompile.algo.rounding import sequential
from qcompile.calib import store
from qcompile.calib.data import DataOptions, open_data
from qcompile.calib.feeds import InputSpec
from qcompile.errors import DataError, ModelError
from qcompile.graph import io
from qcompile.recipe import Recipe

EYE = np.eye(64, dtype=np.float32)
QUICK = Recipe(threads=1, bench_seconds=0.01)


def drawn(text: str, *shape: int, kind: str = "normal", **weights: np.ndarray) -> Drawn:
    return Drawn(from_text(text, **weights), (Sample("x", shape, kind),), extreme=False)


def test_nodes_that_only_pass_codes_on() -> None:
    """Where borders cost nothing a plan may have nodes of no arithmetic alone: their ranges have a method, too."""
    text = "g (float[N,2,16] x) => (float[N,2,16] y) <float c = {-0.5}> { y = Add(c, x) }"
    found = judge(drawn(text, 1, 2, 16), "auto")
    assert found.kind in ("compiled", "unchanged"), found


def test_an_output_that_later_parts_read() -> None:
    """Weights of few bits, solved part after part: what passes between parts was an output of the model."""
    text = """g (float[N,64] x) => (float[N,64] y, float[N,64] a) {
        h = MatMul(x, u) a = Add(x, h) k = MatMul(a, v) y = Add(a, k) }"""
    found = judge(drawn(text, 2, 64, u=EYE, v=EYE * 2), "int4")
    assert found.kind == "compiled", found


def test_second_moments_that_rounding_made_indefinite() -> None:
    H = np.array([[[1.0, 1.0 + 1e-3], [1.0 + 1e-3, 1.0]]])
    codes = sequential(np.array([[[0.4, 0.6]]]), 1.0, H, -8, 7)
    assert np.abs(codes).max() <= 8


def test_weights_of_zeros_have_no_reach() -> None:
    zero = Reader(np.zeros(4), np.zeros((3, 4)))
    peak = np.array([1.0, 2.0, 0.1, 3.0])
    with np.errstate(all="raise"):
        best_scale([Carrier(peak, peak**2, (zero,))])


def test_a_bound_of_zero_keeps_all_scales() -> None:
    """Behind Clip(x, 0, 0) nothing can be scaled."""
    peak = np.array([1.0, 2.0, 0.1, 3.0])
    with np.errstate(all="raise"):
        best_scale([Carrier(peak, peak**2, (Reader(peak, None),))], limit=0.0)


def test_functions_of_another_opset() -> None:
    model = from_text("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    model.graph.node[0].op_type, model.graph.node[0].domain = "F", "mine"
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    nodes = [helper.make_node("Relu", ["a"], ["b"])]
    model.functions.append(helper.make_function("mine", "F", ["a"], ["b"], nodes, opsets))
    model.opset_import.append(opsets[1])
    with pytest.raises(
        ModelError, match=r"function 'mine\.F' is for opset 18 of domain '' and the"
    ):
        compile_model(model, recipe=QUICK)


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT8E5M2, TensorProto.INT64])
def test_numbers_in_the_field_of_another_type(kind: int) -> None:
    model = from_text("g (float[N,2] x) => (float[N,2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    model.graph.initializer[0].data_type = kind
    with pytest.raises(
        ModelError, match=r"tensor 'w' of shape \[2\] takes 2 numbers, and 0 are there"
    ):
        io.load(model)


def test_a_node_without_outputs() -> None:
    model = from_text("g (float[N,2] x) => (float[N,2] y) { y = Relu(x) z = Neg(x) }")
    del model.graph.node[1].output[:]
    with pytest.raises(ModelError, match=r"node '' \(Neg\) has no outputs"):
        io.load(model)


def test_a_model_of_constants_alone() -> None:
    """No value is probed: ORT takes an empty list of outputs for all of them."""
    model = from_text("g (float[N,2] x) => (float[2] w) <float[2] w = {1, 2}> { }")
    try:
        result = compile_model(model, recipe=QUICK)
    except ModelError:
        return
    assert result.exit_code == 4


def test_the_header_of_an_array_that_is_no_literal(tmp_path: Path) -> None:
    path = tmp_path / "d.npy"
    np.save(path, np.ones((4, 2), np.float32))
    content = bytearray(path.read_bytes())
    content[content.index(b"}")] = ord("(")
    path.write_bytes(content)
    with pytest.raises(tokenize.TokenError):
        np.load(path)
    spec = InputSpec("x", np.dtype(np.float32), ("N", 2), required=True)
    with pytest.raises(DataError, match="is no array file that can be read"):
        list(open_data(path, [spec], DataOptions()))
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", bytes(content))
    with pytest.raises(DataError, match="is no array file that can be read"):
        list(open_data(tmp_path / "d.npz", [spec], DataOptions()))


def test_a_sentence_is_short(tmp_path: Path) -> None:
    """Errors of libraries quote names and messages, however long."""
    header = b"1 " * 4500
    with zipfile.ZipFile(tmp_path / "s.stats", "w") as archive:
        archive.writestr("statistics.json", b'{"format": 1}')
        archive.writestr(
            "lows.npy", b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header
        )
    with pytest.raises(DataError) as caught:
        store.load(tmp_path / "s.stats")
    assert len(str(caught.value)) < 800
    model = from_text("g (float[N,2] x) => (float[N,2] y) { y = Relu(x) }")
    attribute = model.graph.node[0].attribute.add(name="a", s=b"n" * 60_000)
    attribute.type = onnx.AttributeProto.SPARSE_TENSOR  # which `onnx_ir` does not read
    with pytest.raises(ModelError) as wrong:
        io.load(model)
    assert len(str(wrong.value)) < 800
