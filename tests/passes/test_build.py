"""What holds of every model that `build` makes."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from lowering import assert_lowered, compiled, constant, op_types
from rewrites import parse, run

from passes.lower_integer import LowerInteger
from qcompile.graph import io
from qcompile.graph.edit import graphs

NET = f"""g (float[1,4,6,6] x, int64[2,3] i) => (float[1,4,6,6] y, float[2,3,6] z, float[1,4,1,1] p)
    <{constant("k", 4, 4, 3, 3)}, {constant("b", 4)}, {constant("e", 10, 16)}, {constant("w", 16, 6)}, {constant("v", 16, 6)}> {{
    s = Conv<pads = [1, 1, 1, 1]>(x, k, b) r = Relu(s) t = Conv<pads = [1, 1, 1, 1]>(r, k)
    u = Add(t, r) g = HardSigmoid(u) y = Mul(u, g) p = GlobalAveragePool(y)
    l = Gather(e, i) m = MatMul(l, w) n = MatMul(l, v) z = Add(m, n) }}"""
GIVEN = {"i": np.array([[3, 0, 1], [9, 9, 2]])}


def digest() -> str:
    """Of both forms, for a run in another process."""
    made = compiled(NET, given=GIVEN)
    whole = io.to_bytes(made.qdq) + io.to_bytes(made.fused)
    return hashlib.sha256(whole).hexdigest()


def test_the_same_bytes_twice() -> None:
    made = compiled(NET, given=GIVEN)
    for form, model in (("qdq", made.qdq), ("fused", made.fused)):
        assert io.to_bytes(made.rebuilt(form)) == io.to_bytes(model)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_same_bytes_in_another_process(seed: str) -> None:
    """Sets of strings and of objects are ordered differently there."""
    tests = Path(__file__).parents[1]
    code = f"import sys; sys.path[:0] = [{str(tests / 'passes')!r}, {str(tests)!r}]; import test_build; print(test_build.digest())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tests.parent,
        env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(tests.parent)},
    )  # fmt: skip
    assert done.stdout.strip() == digest()


def test_the_prepared_model_is_not_changed() -> None:
    made = compiled(NET, given=GIVEN)
    before = ir.to_onnx_text(made.prepared)
    made.rebuilt("qdq")
    made.rebuilt("fused")
    assert ir.to_onnx_text(made.prepared) == before


def test_all_of_it_at_once() -> None:
    made = compiled(NET, given=GIVEN)
    assert_lowered(made, fused=3.01, deployed=3.01)
    assert {"Relu": "absorbed"}.items() <= {e.op: e.form.value for e in made.plan.nodes}.items()


def test_the_plain_form_needs_no_other_domain() -> None:
    made = compiled(NET, given=GIVEN)
    assert {node.domain for node in made.qdq.graph} == {""}
    assert "com.microsoft" in made.fused.graph.opset_imports


def test_domains_are_declared_where_they_are_used() -> None:
    model = parse(
        f"g (float[5,8] x) => (float[5,6] y) <{constant('w', 8, 6)}> {{ y = MatMul(x, w) }}"
    )
    del model.graph.opset_imports["com.microsoft"]
    made = compiled(model)
    assert made.fused.opset_imports["com.microsoft"] == 1
    assert "com.microsoft" not in made.qdq.opset_imports
    assert run(made.fused, made.feeds[0])[0].shape == (5, 6)


def test_lowering_twice_changes_nothing() -> None:
    made = compiled(NET, given=GIVEN)
    before = ir.to_onnx_text(made.fused)
    assert LowerInteger(made.plan).apply(made.fused).changed == []
    assert ir.to_onnx_text(made.fused) == before


def test_no_float_weight_stays() -> None:
    made = compiled(NET, given=GIVEN)
    for model in (made.qdq, made.fused):
        for graph in graphs(model):
            for value in graph.initializers.values():
                assert (
                    value.dtype != ir.DataType.FLOAT
                    or value.const_value is None
                    or value.const_value.size <= 10
                )
    assert io.weight_bytes(made.fused) < io.weight_bytes(made.prepared) / 2


def test_nothing_that_nobody_reads_stays() -> None:
    made = compiled(NET, given=GIVEN)
    for model in (made.qdq, made.fused):
        for graph in graphs(model):
            assert all(value.uses() for value in graph.initializers.values())


def test_a_weight_that_float_nodes_read_as_well() -> None:
    text = f"""g (float[1,4,6,6] x) => (float[1,4,6,6] y, float[] n) <{constant("k", 4, 4, 1, 1)}> {{
        y = Conv(x, k) e = Exp(k) f = Mul(e, e) n = ReduceMax<keepdims = 0>(f) }}""".replace(
        "float[] n", "float n"
    )
    made = compiled(text)
    assert_lowered(made)


def test_two_convolutions_share_a_weight() -> None:
    text = f"""g (float[1,4,6,6] x, float[1,4,3,3] z) => (float[1,4,6,6] y, float[1,4,3,3] u) <{constant("k", 4, 4, 1, 1)}, {constant("b", 4)}> {{
        y = Conv(x, k, b) u = Conv(z, k, b) }}"""
    assert_lowered(compiled(text))


def test_a_weight_that_is_an_input_stays_float() -> None:
    text = """g (float[1,1,3,3] x, float[2,1,1,1] k = {1, 2}, float[2,2] w = {1, 2, 3, 4}) => (float[1,2,3,3] y, float[1,1,3,2] z)
        <float[3,2] v = {1, 2, 3, 4, 5, 6}> { y = Conv(x, k) t = MatMul(x, v) z = MatMul(t, w) }"""
    model = parse(text)
    made = compiled(model)
    assert made.forms()["Conv:y"] == "float"
    assert made.forms()["MatMul:z"] == "float"
    other = {**made.feeds[0], "k": np.full((2, 1, 1, 1), 9, np.float32)}
    np.testing.assert_allclose(run(made.fused, other)[0], run(model, other)[0], rtol=1e-5)


def test_an_input_and_an_output_of_the_graph_at_once() -> None:
    """A coded tensor may be a graph input; its name stays, and its float readers read it unrounded."""
    text = f"""g (float[1,4,6,6] x) => (float[1,4,6,6] y, float[1,4,6,6] z) <{constant("k", 4, 4, 1, 1)}> {{
        y = Conv(x, k) z = Erf(x) }}"""
    made = compiled(text)
    feed = made.feeds[0]
    assert np.array_equal(run(made.fused, feed)[1], run(made.prepared, feed)[1])


@pytest.mark.parametrize("opset", [13, 17, 21, 23])
def test_opsets(opset: int) -> None:
    text = f"""g (float[1,4,6,6] x) => (float[1,4,3,3] y, float[1,144] z) <{constant("k", 4, 4, 3, 3)}, {constant("b", 4)}> {{
        t = Conv<pads = [1, 1, 1, 1]>(x, k, b) r = Relu(t)
        y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r) f = Flatten(r) z = HardSigmoid(f) }}"""
    made = compiled(text, opset=opset)
    assert_lowered(made)
    assert made.fused.opset_imports[""] == opset


def test_a_model_of_opset_9() -> None:
    text = f"""g (float[1,4,6,6] x) => (float[1,4,6,6] y) <{constant("k", 4, 4, 3, 3)}> {{
        t = Conv<pads = [1, 1, 1, 1]>(x, k) y = Clip<min = 0.0, max = 6.0>(t) }}"""
    made = compiled(text, opset=9)
    assert_lowered(made)
    assert op_types(made.fused) == ["QuantizeLinear", "QLinearConv", "DequantizeLinear"]
