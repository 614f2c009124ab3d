from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import assert_close, assert_refuses, parse, run

from passes.fold_shapes import FoldShapes
from qcompile.graph.edit import drop_unread
from qcompile.step import run_pass

PARTS = "int64 zero = {0}, int64 one = {1}, int64[1] axis = {0}"
TAKE_APART = """s = Shape(h) b = Gather(s, zero) t = Gather(s, one) b1 = Unsqueeze(b, axis) t1 = Unsqueeze(t, axis)
    r = Concat<axis = 0>(b1, t1, heads, size) [view] y = Reshape(h, r)"""
HEAD = "g (float[b,t,12] x) => (float[b,t,3,4] y)"


def ops(model: ir.Model) -> list[str]:
    drop_unread(model)
    return [node.op_type for node in model.graph]


def test_a_view_as_exporters_write_it() -> None:
    text = f"""{HEAD} <{PARTS}, int64[1] heads = {{3}}, int64[1] size = {{4}}> {{ h = Relu(x) {TAKE_APART} }}"""
    model = parse(text)
    assert "view" in run_pass(FoldShapes(), model).changed
    assert ops(model) == ["Relu", "Reshape"]
    assert list(model.graph[1].inputs[1].const_value.numpy()) == [0, 0, 3, 4]  # type: ignore[union-attr]
    for shape in ((2, 5, 12), (1, 1, 12), (0, 3, 12)):
        feed = {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
        assert_close(run(model, feed), run(parse(text), feed))


def test_sizes_of_inputs_that_are_given() -> None:
    text = """g (float[2,6] x) => (float[6,2] y) <int64[2] turn = {1, 0}>
        { s = Shape(x) r = Gather(s, turn) y = Reshape(x, r) }"""
    model = parse(text)
    run_pass(FoldShapes(), model)
    assert ops(model) == ["Reshape"]
    feed = {"x": np.arange(12, dtype=np.float32).reshape(2, 6)}
    assert_close(run(model, feed), run(parse(text), feed))


def test_bounds_of_a_slice() -> None:
    """Half of a head of known size, as rotary embeddings take it, though the tensor has been reshaped to what was computed."""
    text = f"""g (float[b,t,12] x) => (float[b,t,3,2] z)
        <{PARTS}, int64[1] heads = {{3}}, int64[1] size = {{4}}, int64 last = {{3}}, int64 two = {{2}}, int64[1] start = {{0}}, int64[1] ax = {{3}}> {{
        h = Relu(x) {TAKE_APART} q = Shape(y) d = Gather(q, last) half = Div(d, two) c = Cast<to = 7>(half) e = Unsqueeze(c, axis)
        z = Slice(y, start, e, ax) }}"""
    model = parse(text)
    run_pass(FoldShapes(), model)
    assert ops(model) == ["Relu", "Reshape", "Slice"]
    feed = {"x": np.arange(48, dtype=np.float32).reshape(2, 2, 12)}
    assert_close(run(model, feed), run(parse(text), feed))


def test_what_is_computed_twice_is_computed_once() -> None:
    """Two layers take apart tensors of one shape, which is not that of what they reshape."""
    layer = (
        "s{0} = Shape(x{0}) r{0} = Slice(s{0}, zero, two) w{0} = Concat<axis = 0>(r{0}, minus) "
        "z{0} = Reshape(k, w{0}) x{1} = Mul(x{0}, z{0})"
    )
    head = "g (float[b,t,4] x0, float[n] k, float[c,d,4] f) => (float[b,t,4] x2) <int64[1] zero = {0}, int64[1] two = {2}, int64[1] minus = {-1}>"
    text = f"{head} {{ {layer.format(0, 1)} {layer.format(1, 2)} }}"
    model = parse(text)
    outcome = run_pass(FoldShapes(), model)
    assert set(outcome.skipped.values()) == {"its shape is not known before it runs"}
    assert Counter(ops(model)) == {"Shape": 1, "Slice": 1, "Concat": 1, "Reshape": 2, "Mul": 2}
    rng = np.random.default_rng(0)
    feed = {"x0": np.ones((2, 1, 4)), "k": rng.normal(size=8), "f": rng.normal(size=(2, 3, 4))}
    feed = {name: value.astype(np.float32) for name, value in feed.items()}
    assert_close(run(model, feed), run(parse(text), feed))
    wider = text.replace("x1 = Mul(x0, z0)", "w = Mul(x0, z0) x1 = Mul(w, f)")  # of 3 in place of 1
    model = parse(wider)
    run_pass(FoldShapes(), model)
    assert Counter(ops(model))["Shape"] == 2
    feed["k"] = np.ones(6, np.float32)
    feed["x0"] = np.ones((2, 3, 4), np.float32)
    assert_close(run(model, feed), run(parse(wider), feed))


@pytest.mark.parametrize(
    "body",
    [
        "s = Shape(k) y = Reshape(x, s)",  # of another tensor
        "s = Shape(x) p = Gather(s, turn) y = Reshape(x, p)",  # at another place
        "s = Shape(x) y = Reshape<allowzero = 1>(x, s)",
        "y = Reshape(x, given)",
    ],
)
def test_refusals(body: str) -> None:
    head = (
        "g (float[a,b] x, float[c,d] k, int64[2] given) => (float[e,f] y) <int64[2] turn = {1, 0}>"
    )
    assert_refuses(FoldShapes(), f"{head} {{ {body} }}", "its shape is not known before it runs")


def test_what_the_graph_returns_stays_computed() -> None:
    text = "g (float[2,6] x) => (int64[2] s, float[2,6] y) { s = Shape(x) y = Reshape(x, s) }"
    model = parse(text)
    run_pass(FoldShapes(), model)
    assert ops(model) == ["Shape", "Reshape"]
    assert [value.name for value in model.graph.outputs] == ["s", "y"]


def test_branches_that_do_not_run_say_nothing() -> None:
    """A product in a branch needs t = 5; in the other one, t may be anything."""
    text = """g (float[2,t] x, float[5,3] w, bool c) => (float[a,b] y) {
        y = If(c) <then_branch = p () => (float[a,b] u) { u = MatMul(x, w) },
                   else_branch = q () => (float[a,b] v) { s = Shape(x) v = Reshape(x, s) }> }"""
    model = parse(text)
    run_pass(FoldShapes(), model)
    feed = {
        "x": np.ones((2, 7), np.float32),
        "w": np.ones((5, 3), np.float32),
        "c": np.array(False),
    }
    assert_close(run(model, feed), run(parse(text), feed))
