"""Graphs cut into parts: together they compute what the whole does, and little passes between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from networks import from_text
from numpy.typing import NDArray
from workbench import weight

from qcompile.fewbits.cut import Part, cut, part_model
from qcompile.graph import io
from qcompile.prepare import prepare
from qcompile.run.probe import Fact, probe
from qcompile.run.session import Options, Session

Array = NDArray[Any]


def residual(blocks: int = 3, width: int = 32) -> ir.Model:
    """Blocks of two products around a residual sum; the inner width is four times the outer."""
    text, weights, x = "", {}, "x"
    for i in range(blocks):
        weights[f"u{i}"] = weight(width, 4 * width, seed=2 * i)
        weights[f"d{i}"] = weight(4 * width, width, seed=2 * i + 1)
        text += f"[up{i}] a{i} = MatMul({x}, u{i}) r{i} = Relu(a{i}) [down{i}] b{i} = MatMul(r{i}, d{i}) x{i} = Add({x}, b{i}) "
        x = f"x{i}"
    model = io.load(
        from_text(
            f"g (float[N,{width}] x) => (float[N,{width}] y) {{ {text} y = Tanh({x}) }}", **weights
        )
    )
    return prepare(model)[0]


def parts_of(model: ir.Model, x: Array) -> tuple[list[Part], dict[str, Fact]]:
    facts = dict(probe(model, {"x": x}))
    linears = [node for node in model.graph if node.op_type == "MatMul"]
    return cut(model, linears, facts), facts


X = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)


def test_cut_where_only_the_residual_passes() -> None:
    model = residual()
    parts, _ = parts_of(model, X)
    nodes = list(model.graph)
    inside = [[n.name for n in nodes[p.first : p.last] if n.op_type == "MatMul"] for p in parts]
    assert inside == [["up0", "down0"], ["up1", "down1"], ["up2", "down2"]]
    assert [p.makes for p in parts] == [("x0",), ("x1",), ()]
    assert [p.reads for p in parts] == [(), ("x0",), ("x1",)]


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_parts_together_are_the_whole(blocks: int) -> None:
    model = residual(blocks)
    parts, facts = parts_of(model, X)
    state: dict[str, Array] = {"x": X}
    for part in parts:
        makes = part.makes or (f"b{blocks - 1}",)
        session = Session(part_model(model, part, makes, facts), Options("all"))
        state.update(zip(makes, session.run(state), strict=True))
    whole = Session(model, Options("all")).run({"x": X})[0]
    y = np.tanh(state[f"b{blocks - 1}"] + state.get(f"x{blocks - 2}", X))
    np.testing.assert_allclose(y, whole, rtol=1e-5, atol=1e-6)


def test_a_part_reads_only_its_own_weights_and_takes_other_lengths() -> None:
    model = residual()
    parts, facts = parts_of(model, X)
    small = part_model(model, parts[1], parts[1].makes, facts)
    assert set(small.graph.initializers) == {"u1", "d1"}
    assert [v.name for v in small.graph.inputs] == ["x0"]
    longer = np.zeros((9, 32), np.float32)
    assert Session(small, Options("all")).run({"x0": longer})[0].shape == (9, 32)


def test_nothing_to_cut() -> None:
    model = residual()
    assert cut(model, [], {}) == []


def test_the_model_is_not_changed() -> None:
    model = residual()
    before = Session(model, Options("all")).run({"x": X})[0]
    parts, facts = parts_of(model, X)
    for part in parts:
        part_model(model, part, part.makes or ("b2",), facts)
    np.testing.assert_array_equal(Session(model, Options("all")).run({"x": X})[0], before)
