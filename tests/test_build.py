"""The last phase: which passes run, in which order, and what the two forms need."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
from lowering import assert_lowered, compiled, constant, op_types
from rewrites import parse, run

from qcompile import build
from qcompile.errors import ModelError
from qcompile.graph import io

PAD = "pads = [1, 1, 1, 1]"
NET = f"""g (float[1,4,8,8] x) => (float[1,4,8,8] y) <{constant("k", 4, 4, 3, 3)}, {constant("l", 4, 4, 3, 3)}> {{
    [one] a = Conv<{PAD}>(x, k) [act] r = Relu(a) [two] c = Conv<{PAD}>(r, l) [add] y = Add(c, x) }}"""


@pytest.mark.parametrize("opset", [12, 13, 17, 21])
def test_opsets(opset: int) -> None:
    """Per-axis DequantizeLinear came with 13: the portable form is raised to it, the fused one need not be."""
    made = compiled(NET, opset=opset)
    assert made.fused.opset_imports[""] == opset
    assert made.qdq.opset_imports[""] == max(opset, 13)
    assert_lowered(made)


def test_a_model_that_cannot_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(NET, opset=12)

    def refuse(model: object, opset: int) -> Any:
        raise ModelError("no converter.")

    monkeypatch.setattr(io, "convert_opset", refuse)
    assert op_types(made.rebuilt("fused")) == op_types(made.fused)
    with pytest.raises(ModelError, match="no converter"):
        made.rebuilt("qdq")


def test_only_what_is_needed_is_in_the_result() -> None:
    """No float weight that nobody reads, every name once, operators in an order that can run."""
    made = compiled(NET)
    for model in (made.qdq, made.fused):
        graph = model.graph
        assert all(value.uses() for value in graph.initializers.values())
        assert not {"k", "l"} & set(graph.initializers)
        seen = set(graph.inputs) | set(graph.initializers.values())
        for node in graph:
            assert {value for value in node.inputs if value is not None} <= seen
            seen |= set(node.outputs)


def test_the_fused_form_has_ort_s_operators_and_the_portable_one_none() -> None:
    made = compiled(NET)
    assert {node.domain for node in made.qdq.graph} == {""}
    assert "com.microsoft" in {node.domain for node in made.fused.graph}
    assert not {"QLinearConv", "QLinearAdd"} & set(op_types(made.qdq))
    assert op_types(made.fused).count("QLinearConv") == 2


def test_float_nodes_between_integer_ones_are_guarded() -> None:
    made = compiled(
        f"g (float[1,4,8,8] x) => (float[1,4,4,4] y) <{constant('k', 4, 4, 3, 3)}, {constant('l', 4, 4, 3, 3)}> "
        f"{{ [one] a = Conv<{PAD}>(x, k) [pool] p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a) [two] y = Conv<{PAD}>(p, l) }}",
        keep={"pool": "so"},
    )
    for model in (made.qdq, made.fused):
        ops = op_types(model)
        assert ops[ops.index("MaxPool") + 1] == "Max"
    assert_lowered(made)


def test_nothing_planned_is_nothing_changed() -> None:
    made = compiled(NET, keep=dict.fromkeys(["one", "act", "two", "add"], "so"), opset=12)
    for model in (made.qdq, made.fused):
        assert model.opset_imports[""] == 12
        assert op_types(model) == op_types(made.prepared)
        for got, want in zip(
            run(model, made.feeds[0]), run(made.prepared, made.feeds[0]), strict=True
        ):
            assert (got == want).all()


def test_one_info_line_a_pass(caplog: pytest.LogCaptureFixture) -> None:
    made = compiled(NET)
    caplog.clear()
    with caplog.at_level("INFO", logger="qcompile.step"):
        made.rebuilt("fused")
    names = [record.getMessage().split(":")[0] for record in caplog.records]
    assert names == [
        "lower_dynamic",
        "lower_attention",
        "fuse_rotary",
        "lower_recurrent",
        "lower_embedding",
        "insert_qdq",
        "lower_integer",
        "channels_last",
        "guard_float",
        "pad_channels",
    ]
    assert build.Solution({}, {}) == build.Solution({}, {})


def test_bodies_are_built_too() -> None:
    """A dynamic product inside a branch; the outside stays as it was."""
    model = parse(
        f"g (float[5,16] x, bool p) => (float[A,B] y) <{constant('w', 16, 8)}> {{ [if] y = If <"
        "then_branch = one () => (float[5,8] t) { [m] t = MatMul(x, w) }, "
        "else_branch = two () => (float[5,8] e) { [n] a = MatMul(x, w) e = Neg(a) }> (p) }"
    )
    made = compiled(model)
    for built in (made.qdq, made.fused):
        inner = [
            node.op_type for graph in built.graphs() if graph is not built.graph for node in graph
        ]
        assert "MatMul" not in inner
        assert isinstance(built.graph, ir.Graph)
