"""The first phase: what every graph is before it is planned, with the function it had."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from lowering import constant
from onnx import TensorProto, helper, numpy_helper
from rewrites import assert_close, assert_same_interface, parse, random_feed, run

from qcompile.errors import ModelError
from qcompile.graph import io
from qcompile.graph.edit import graphs
from qcompile.prepare import OPSET, PASSES, prepare, prepare_for
from qcompile.run.session import Session

PAD = "pads = [1, 1, 1, 1]"


def prepared(model: ir.Model) -> ir.Model:
    """Valid, of the same face and function."""
    before = model.clone()
    after, outcomes = prepare(model.clone())
    assert set(outcomes) == {step.name for step in PASSES}
    assert io.check(after) is None
    assert_same_interface(before, after)
    for seed in range(2):
        feed = random_feed(before, seed)
        assert_close(run(after, feed), run(before, feed))
    return after


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_all_of_it_at_once() -> None:
    """Constants, Identity, BatchNormalization, an affine function and names."""
    model = parse(
        f"g (float[1,4,8,8] x) => (float[1,4,8,8] y) <{constant('k', 4, 4, 3, 3)}, float[4] one = {{1, 2, 3, 4}}, float[4] two = {{4, 3, 2, 1}}> "
        f"{{ c = Constant<value = float {{2.0}}>() t = Identity(k) a = Conv<{PAD}>(x, t) n = BatchNormalization(a, one, two, two, one) "
        "i = Identity(n) m = Mul(i, c) r = Relu(m) u = Neg(x) y = Identity(r) }"
    )
    after = prepared(model)
    assert ops(after) == ["Conv", "Relu"]
    assert all(node.name for node in after.graph)


def test_it_changes_nothing_the_second_time() -> None:
    model = parse(
        f"g (float[1,4,8,8] x) => (float[1,4,4,4] y) <{constant('k', 4, 4, 3, 3)}> "
        f"{{ c = Constant<value = float {{2.0}}>() a = Conv<{PAD}>(x, k) m = Mul(a, c) y = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(m) }}"
    )
    once = prepared(model)
    text = ir.to_onnx_text(once)
    twice, outcomes = prepare(once)
    assert ir.to_onnx_text(twice) == text
    assert all(outcome.changed == [] for outcome in outcomes.values())


def test_functions_are_inlined() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
        g (float[5,4] x) => (float[5,4] y) <float[4,4] v = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}> { h = local.Lin(x, v) y = local.Lin(h, v) }
        <domain: "local", opset_import: ["" : 17]> Lin (a, b) => (c) { m = MatMul(a, b) c = Relu(m) }"""
    after = prepared(ir.from_proto(onnx.parser.parse_model(text)))
    assert ops(after) == ["MatMul", "Relu", "MatMul", "Relu"]
    assert not after.functions
    assert len({node.name for node in after.graph}) == 4


def test_functions_of_another_opset_are_refused() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
        g (float[5,4] x) => (float[5,4] y) { y = local.R(x) }
        <domain: "local", opset_import: ["" : 11]> R (a) => (c) { c = Relu(a) }"""
    with pytest.raises(ModelError, match="the functions of the model cannot be expanded: "):
        prepare(ir.from_proto(onnx.parser.parse_model(text)))


def test_every_kind_of_constant_becomes_an_initializer() -> None:
    model = parse(
        "g (float[2] x, int64[2] i) => (float[2] y, int64[2] j) { a = Constant<value_float = 2.0>() b = Constant<value_floats = [1.0, 3.0]>() "
        "c = Constant<value_int = 5>() d = Constant<value_ints = [1, 2]>() e = Constant<value = float[1] {0.5}>() "
        "t = Mul(x, a) u = Add(t, b) y = Div(u, e) k = Add(i, c) j = Mul(k, d) }"
    )
    after = prepared(model)
    assert "Constant" not in ops(after)


def test_constants_of_bodies() -> None:
    model = parse(
        "g (float[2] x, bool p) => (float[2] y) { y = If <then_branch = one () => (float[2] t) { c = Constant<value_float = 2.0>() t = Mul(x, c) }, "
        "else_branch = two () => (float[2] e) { e = Identity(x) }> (p) }"
    )
    after = prepared(model)
    assert not any(node.op_type == "Constant" for graph in graphs(after) for node in graph)


@pytest.mark.parametrize(
    ("given", "after"), [(9, OPSET), (10, OPSET), (OPSET, OPSET), (13, 13), (21, 21)]
)
def test_old_opsets_are_raised(given: int, after: int) -> None:
    """8-bit MaxPool came with 12. What ran with the old opset runs the same."""
    model = parse(
        f"g (float[1,4,8,8] x) => (float[1,4,6,6] y) <{constant('k', 4, 4, 3, 3)}> {{ a = Conv(x, k) y = Relu(a) }}",
        opset=given,
    )
    before = model.clone()
    made, _ = prepare(model)
    assert made.opset_imports[""] == after
    feed = random_feed(before)
    assert_close(run(made, feed), run(before, feed))


def test_a_model_that_cannot_be_raised_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(model: object, opset: int) -> Any:
        raise ModelError("the converter fails.")

    monkeypatch.setattr(io, "convert_opset", refuse)
    with caplog.at_level("INFO", logger="qcompile.prepare"):
        made, _ = prepare(parse("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=9))
    assert made.opset_imports[""] == 9
    assert (
        "the converter fails. Nodes without an 8-bit form at that opset stay float." in caplog.text
    )


def test_a_large_model_is_not_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter works on protobuf, which stops at 2 GiB."""
    monkeypatch.setattr(io, "EXTERNAL_BYTES", 4)
    made, _ = prepare(
        parse(
            f"g (float[2,4] x) => (float[2,4] y) <{constant('w', 4, 4)}> {{ y = MatMul(x, w) }}",
            opset=9,
        )
    )
    assert made.opset_imports[""] == 9


def old_ir(version: int) -> ir.Model:
    """Initializers that are inputs too: until IR 4 they had to be."""
    w = np.arange(16, dtype=np.float32).reshape(4, 4)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 4]), ("w", [4, 4]))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])], [numpy_helper.from_array(w, "w")],
    )  # fmt: skip
    return ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=version)
    )


@pytest.mark.parametrize(("version", "inputs"), [(3, ["x"]), (4, ["x", "w"]), (8, ["x", "w"])])
def test_initializers_that_are_inputs(version: int, inputs: list[str]) -> None:
    """From IR 4 on that means that a caller may override them."""
    made, _ = prepare(old_ir(version))
    assert [value.name for value in made.graph.inputs] == inputs


def test_passes_have_names_of_their_own() -> None:
    assert len({step.name for step in PASSES}) == len(PASSES)
    for step in PASSES:
        assert step.name.title().replace("_", "") == type(step).__name__


def test_a_pass_whose_result_is_refused_is_left_out() -> None:
    """ORT takes a Range to a limit of shape [1] as long as the limit is no initializer."""
    model = parse(
        "g (float[N] x, int64[1] s) => (int64[K] r, float[N] y) "
        "<int64 zero = {0}, int64 one = {1}, int64[1] three = {3}> { "
        "d = Size(s) yes = Equal(d, one) n = If(yes) <then_branch = a () => (int64[1] t) { t = Identity(three) }, "
        "else_branch = b () => (int64[L] e) { e = Reshape(three, s) }> "
        "r = Range(zero, n, one) i = Identity(x) y = Relu(i) }"
    )
    feed = {"x": np.zeros(2, np.float32), "s": np.array([1])}
    wanted = Session(model).run(feed)
    with pytest.raises(ModelError, match="Range"):
        Session(prepare(model.clone())[0])
    made = prepare_for(feed, model, Session(model))
    assert_close(Session(made.model).run(feed), wanted)
    assert ops(made.model) == ["Size", "Equal", "If", "Range", "Relu"]
    assert made.facts["r"].shape == (3,)
    (note,) = made.notes
    assert note.startswith("Not done here: inline_if. With it, ONNX Runtime refuses the model: ")


def test_an_opset_that_the_converter_does_not_raise_well() -> None:
    """The Scan of opset 8 has an axis of batches; the converter leaves it as it is."""
    model = parse(
        "g (float[1,2] s, float[1,3,2] x) => (float[1,2] t, float[1,3,2] y) { t, y = Scan<num_scan_inputs = 1, "
        "body = b (float[2] a, float[2] v) => (float[2] w, float[2] z) { w = Add(a, v) z = Identity(w) }>(, s, x) }",
        opset=8,
    )
    feed = {"s": np.ones((1, 2), np.float32), "x": np.ones((1, 3, 2), np.float32)}
    made = prepare_for(feed, model, Session(model))
    assert made.model.opset_imports[""] == 8
    assert_close(Session(made.model).run(feed), Session(model).run(feed))
    assert [note[:27] for note in made.notes] == ["Not done here: raise_opset."]


def test_a_feed_that_does_not_run_is_no_fault_of_preparing() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match=r"cannot run the model: .*dimensions for input: x"):
        prepare_for({"x": np.zeros(3, np.float32)}, model, Session(model))


def test_a_model_that_is_refused_whatever_is_left_out() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x, x) }")
    other = Session(parse("g (float[N] x) => (float[N] y) { y = Relu(x) }"))
    with pytest.raises(ModelError, match="ONNX Runtime refuses the model"):
        prepare_for({"x": np.zeros(2, np.float32)}, model, other)
