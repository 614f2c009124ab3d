from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from lowering import eager
from rewrites import (
    assert_close,
    assert_refuses,
    assert_rewrites,
    assert_same_interface,
    parse,
    random_feed,
    run,
)

from passes.smooth_linear import SmoothLinear
from qcompile.graph import io
from qcompile.plan.candidates import Candidate
from qcompile.plan.make import find_candidates
from qcompile.run.probe import probe
from qcompile.solve.smoothing import LinearGroup, Smoothing, linear_groups
from qcompile.step import Outcome, run_pass

S = np.array([2, 4], np.float32)
HEAD = "g (float[N,2] x) => (float[N,2] y)"
W = "float[2,2] w = {1, 2, 3, 4}"
SW = "float[2,2] sw = {2, 4, 12, 16}"


def step(tensor: str, *nodes: str, scale: Any = S, **more: Any) -> SmoothLinear:
    """Without a place: a Mul."""
    return SmoothLinear({tensor: Smoothing(tensor, nodes, np.asarray(scale, np.float32), **more)})


def groups_of(model: ir.Model, *nodes: str) -> list[LinearGroup]:
    found, refused = linear_groups(model, probe(model, random_feed(model)), nodes)
    assert refused == {}
    return found


def placed(text: str | ir.Model, *nodes: str, scale: Any = S) -> SmoothLinear:
    """Every group of the products, with the place that the solver finds."""
    model = parse(text) if isinstance(text, str) else text
    return SmoothLinear(
        {
            g.tensor: Smoothing(g.tensor, g.nodes, np.asarray(scale, np.float32), place=g.place)
            for g in groups_of(model, *nodes)
        }
    )


def applied(smoothing: SmoothLinear, model: ir.Model) -> tuple[ir.Model, Outcome]:
    """A changed copy that is valid and computes the same, once and for all."""
    made = model.clone()
    outcome = run_pass(smoothing, made)
    assert io.check(made) is None
    assert_same_interface(model, made)
    feed = random_feed(model)
    assert_close(run(made, feed), run(model, feed))
    text = ir.to_onnx_text(made)
    assert run_pass(smoothing, made).changed == []
    assert ir.to_onnx_text(made) == text
    return made, outcome


def weighted(text: str, **weights: tuple[int, ...]) -> ir.Model:
    """The graph with random weights of these shapes."""
    model = parse(text)
    for i, (name, shape) in enumerate(weights.items()):
        values = np.random.default_rng(i).normal(size=shape).astype(np.float32)
        value = ir.Value(
            name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape), const_value=ir.tensor(values, name=name),
        )  # fmt: skip
        for used in [v for node in model.graph for v in node.inputs if v and v.name == name]:
            ir.convenience.replace_all_uses_with(used, value)
        model.graph.register_initializer(value)
    return model


def test_a_mul() -> None:
    outcome = assert_rewrites(
        step("x", "p"),
        before=f"{HEAD} <{W}> {{ [p] y = MatMul(x, w) }}",
        after=f"{HEAD} <float[2] c = {{0.5, 0.25}}, {SW}> {{ t = Mul(x, c) y = MatMul(t, sw) }}",
    )
    assert outcome.changed == ["p"]
    assert outcome.rescaled == set()


def test_one_mul_for_a_group_whose_weight_stays_shared() -> None:
    model = parse(f"{HEAD} <{W}> {{ [p] a = MatMul(x, w) [q] b = MatMul(x, w) y = Add(a, b) }}")
    made, _ = applied(step("x", "q", "p"), model)
    assert [node.op_type for node in made.graph] == ["Mul", "MatMul", "MatMul", "Add"]
    assert made.graph[1].inputs[1] is made.graph[2].inputs[1]


def test_a_weight_that_others_read_is_copied() -> None:
    assert_rewrites(
        step("x", "p"),
        before=f"{HEAD} <{W}> {{ [p] a = MatMul(x, w) b = MatMul(a, w) y = Add(x, b) }}",
        after=f"{HEAD} <float[2] c = {{0.5, 0.25}}, {SW}, {W}> {{ t = Mul(x, c) a = MatMul(t, sw) b = MatMul(a, w) y = Add(x, b) }}",
    )


@pytest.mark.parametrize(
    ("attributes", "weight"),
    [("", "2, 4, 12, 16"), ("<transB = 1>", "2, 8, 6, 16"), ("<alpha = 0.5>", "2, 4, 12, 16")],
)
def test_a_gemm(attributes: str, weight: str) -> None:
    b = "float[2] b = {5, 6}"
    assert_rewrites(
        step("x", "p"),
        before=f"{HEAD} <{W}, {b}> {{ [p] y = Gemm{attributes}(x, w, b) }}",
        after=f"{HEAD} <float[2] c = {{0.5, 0.25}}, float[2,2] sw = {{{weight}}}, {b}> {{ t = Mul(x, c) y = Gemm{attributes}(t, sw, b) }}",
    )


V = "float[2,2] v = {2, 4, 6, 8}"
FOLDED_V = "float[2,2] fv = {1, 1, 3, 2}"
C = "float[2] c = {2, 8}"
FOLDED_C = "float[2] fc = {1, 2}"


@pytest.mark.parametrize(
    ("constants", "before", "folded", "after", "rescaled"),
    [
        (f"{C}, float[2] b = {{4, 8}}", "[n] t = LayerNormalization(x, c, b)",
         f"{FOLDED_C}, float[2] fb = {{2, 2}}", "t = LayerNormalization(x, fc, fb)", {"t"}),
        (C, "[n] t = LayerNormalization(x, c)", FOLDED_C, "t = LayerNormalization(x, fc)", {"t"}),
        (C, "[n] t = Mul(x, c)", FOLDED_C, "t = Mul(x, fc)", {"t"}),
        (f"{C}, float[1,2] b = {{4, 8}}", "[m] u = Mul(c, x) [n] t = Add(b, u)",
         f"{FOLDED_C}, float[1,2] fb = {{2, 2}}", "u = Mul(fc, x) t = Add(fb, u)", {"t", "u"}),
        (V, "[n] t = MatMul(x, v)", FOLDED_V, "t = MatMul(x, fv)", {"t"}),
        (f"{V}, {C}", "[m] u = MatMul(x, v) [n] t = Add(u, c)",
         f"{FOLDED_V}, {FOLDED_C}", "u = MatMul(x, fv) t = Add(u, fc)", {"t", "u"}),
        (f"{V}, {C}", "[n] t = Gemm(x, v, c)", f"{FOLDED_V}, {FOLDED_C}", "t = Gemm(x, fv, fc)", {"t"}),
        (V, "[n] t = Gemm<transB = 1>(x, v)", "float[2,2] fv = {1, 2, 1.5, 2}", "t = Gemm<transB = 1>(x, fv)", {"t"}),
        (V, "[n] u = MatMul(x, v) [r] t = Relu(u)", FOLDED_V, "u = MatMul(x, fv) t = Relu(u)", {"t", "u"}),
        (V, "g = Sigmoid(x) [n] u = MatMul(x, v) [r] t = Mul(g, u)",
         FOLDED_V, "g = Sigmoid(x) u = MatMul(x, fv) t = Mul(g, u)", {"t", "u"}),
    ],
)  # fmt: skip
def test_folds(constants: str, before: str, folded: str, after: str, rescaled: set[str]) -> None:
    text = f"{HEAD} <{W}, {constants}> {{ {before} [p] y = MatMul(t, w) }}"
    outcome = assert_rewrites(
        placed(text, "p"), text, f"{HEAD} <{SW}, {folded}> {{ {after} y = MatMul(t, sw) }}"
    )
    assert outcome.rescaled == rescaled


def test_readers_of_the_shape_do_not_matter() -> None:
    text = f"{HEAD} <{W}, {C}> {{ [n] t = Mul(x, c) s = Shape(t) [p] u = MatMul(t, w) y = Reshape(u, s) }}"
    made, _ = applied(placed(text, "p"), parse(text))
    assert [node.op_type for node in made.graph] == ["Mul", "Shape", "MatMul", "Reshape"]


ATTENTION = """g (float[1,5,6] x) => (float[1,5,6] y) <int64[4] split = {0, 0, 2, 3}, int64[3] join = {0, 0, 6}> {
    [v] v0 = MatMul(x, wv) [vb] v1 = Add(v0, b) v2 = Reshape(v1, split) v3 = Transpose<perm = [0, 2, 1, 3]>(v2)
    q0 = Reshape(x, split) q = Transpose<perm = [0, 2, 1, 3]>(q0) k = Transpose<perm = [0, 2, 3, 1]>(q0)
    l = MatMul(q, k) a = Softmax(l) o = MatMul(a, v3) o1 = Transpose<perm = [0, 2, 1, 3]>(o) o2 = Reshape(o1, join)
    [p] y = MatMul(o2, w) }"""


def test_through_an_attention() -> None:
    model = weighted(ATTENTION, wv=(6, 6), b=(6,), w=(6, 6))
    scale = [1, 2, 4, 8, 16, 32]
    made, outcome = applied(placed(model, "p", scale=scale), model)
    assert len(list(made.graph)) == len(list(model.graph))
    assert outcome.rescaled == {"v0", "v1", "v2", "v3", "o", "o1", "o2"}
    ours, theirs = (
        next(n for n in m.graph if n.name == "v").inputs[1].const_value.numpy() for m in (made, model)
    )  # fmt: skip
    np.testing.assert_allclose(ours * np.float32(scale), theirs, rtol=1e-6)


def test_a_new_reader_on_the_way_makes_it_a_mul() -> None:
    model = parse(
        f"{HEAD} <{W}, {V}> {{ [n] u = MatMul(x, v) r = Relu(u) [p] t = MatMul(r, w) y = Add(t, x) }}"
    )
    smoothing = placed(model, "p")
    assert smoothing.smoothings["r"].fold == "n"
    model.graph[3].replace_input_with(1, model.graph[0].outputs[0])
    made, outcome = applied(smoothing, model)
    assert [node.op_type for node in made.graph] == ["MatMul", "Relu", "Mul", "MatMul", "Add"]
    assert outcome.rescaled == set()


THREE = "g (float[1,N,2] x) => (float[1,N,2] y)"


def test_a_channel_beside_a_product_of_three_dimensions() -> None:
    outcome = assert_rewrites(
        step("x", "p", keep=(1,)),
        before=f"{THREE} <{W}, {C}> {{ [p] u = MatMul(x, w) y = Add(u, c) }}",
        after=f"""{THREE} <float[2] i = {{0.5, 0}}, int64[1] k = {{1}}, float[1,1,2] wk = {{3, 4}},
            float[2,2] sw = {{2, 4, 0, 0}}, {C}> {{
            g = Gather<axis = -1>(x, k) t = Mul(x, i) u = MatMul(t, sw) b = Add(u, c)
            s = MatMul(g, wk) y = Add(b, s) }}""",
    )
    assert outcome.rescaled == {"u"}


def test_a_channel_beside_a_product_of_two_dimensions() -> None:
    assert_rewrites(
        step("x", "p", keep=(1,)),
        before=f"{HEAD} <{W}> {{ [p] u = MatMul(x, w) y = Relu(u) }}",
        after=f"""{HEAD} <float[2] i = {{0.5, 0}}, int64[1] k = {{1}}, float[1,2] wk = {{3, 4}},
            float[2,2] sw = {{2, 4, 0, 0}}> {{
            g = Gather<axis = -1>(x, k) t = Mul(x, i) u = MatMul(t, sw) b = Gemm(g, wk, u) y = Relu(b) }}""",
    )


def test_the_alpha_of_a_gemm_is_in_its_side_path() -> None:
    model = parse(f"{HEAD} <{W}, {C}> {{ [p] y = Gemm<alpha = 0.5, transB = 1>(x, w, c) }}")
    applied(step("x", "p", keep=(0,)), model)


def test_side_paths_stay_float_and_products_keep_their_bias() -> None:
    text = """g (float[1,N,6] x) => (float[1,N,4] y) {
        [p] a = MatMul(x, w) [pb] a1 = Add(b, a) [q] c = MatMul(x, v) y = Mul(a1, c) }"""
    model = weighted(text, w=(6, 4), b=(4,), v=(6, 4))
    made, _ = applied(step("x", "p", "q", scale=[1, 2, 3, 4, 5, 6], keep=(2, 5)), model)
    found = find_candidates(made, eager(), probe(made, random_feed(made)))
    dynamic = {k for k, v in found.items() if isinstance(v, Candidate) and v.role == "dynamic"}
    assert dynamic == {"p", "q"}
    (bias,) = found["p"].absorbed
    assert bias.name == "pb"
    assert sum(node.op_type == "Gather" for node in made.graph) == 1  # one for the group


def test_a_gemm_side_path_stays_float() -> None:
    model = weighted("g (float[N,6] x) => (float[N,4] y) { [p] y = MatMul(x, w) }", w=(6, 4))
    made, _ = applied(step("x", "p", scale=np.ones(6), keep=(2,)), model)
    found = find_candidates(made, eager(), probe(made, random_feed(made)))
    dynamic = {k for k, v in found.items() if isinstance(v, Candidate) and v.role == "dynamic"}
    assert dynamic == {"p"}


@pytest.mark.parametrize("first", [0, 1])
def test_sites_are_independent(first: int) -> None:
    """Any of them, in any order: here a side path is put behind the node that the other one folds into."""
    text = """g (float[1,N,6] x) => (float[1,N,6] y) {
        [p] a = MatMul(x, w) [pb] t = Add(a, b) [q] y = MatMul(t, v) }"""
    model = weighted(text, w=(6, 6), b=(6,), v=(6, 6))
    one = step("x", "p", scale=[1, 2, 3, 4, 5, 6], keep=(2,)).smoothings
    two = placed(model, "q", scale=[6, 5, 4, 3, 2, 1]).smoothings
    assert two["t"].fold == "pb"
    both = ({**one, **two}, {**two, **one})[first]
    made, outcome = applied(SmoothLinear(both), model)
    assert outcome.skipped == {}
    assert sum(node.op_type == "Mul" for node in made.graph) == (2, 1)[first]


@pytest.mark.parametrize(
    ("smoothing", "reason"),
    [
        (step("x", "q"), "it is not in the graph"),
        (step("x"), "it is not in the graph"),
        (step("x", "p", "q"), "it is not in the graph"),
        (step("z", "p"), "it does not read z"),
        (step("x", "r"), "it is no product"),
        (step("x", "p", scale=[1, 1, 1]), "its weight has 2 rows, the scale 3"),
        (step("x", "p", scale=[1, 0]), "its scale is not positive"),
        (step("x", "p", scale=[1, np.nan]), "its scale is not positive"),
        (step("x", "p", keep=(2,)), "there is no such channel to keep"),
        (step("x", "p", keep=(-1,)), "there is no such channel to keep"),
    ],
)
def test_refusals(smoothing: SmoothLinear, reason: str) -> None:
    text = f"{HEAD} <{W}> {{ [r] r = Relu(x) [p] u = MatMul(x, w) y = Add(u, r) }}"
    assert_refuses(smoothing, text, reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (float[N,2] x, float[2,2] w) => (float[N,2] y) { [p] y = MatMul(x, w) }", "no constant matrix"),
        (f"{HEAD} <float[1,2,2] w = {{1, 2, 3, 4}}> {{ [p] u = MatMul(x, w) y = Squeeze(u) }}", "no constant matrix"),
        (f"g (float[2,N] x) => (float[N,2] y) <{W}> {{ [p] y = Gemm<transA = 1>(x, w) }}", "transA is set"),
        ("g (float16[N,2] x) => (float16[N,2] y) <float16[2,2] w = {1, 2, 3, 4}> { [p] y = MatMul(x, w) }", "its weight is float16"),
    ],
)  # fmt: skip
def test_products_that_are_refused(text: str, reason: str) -> None:
    assert_refuses(step("x", "p"), text, reason)


def test_an_input_of_unknown_rank_has_no_side_path() -> None:
    text = f"g (float[N,2] x, int64[K] s) => (float[N,2] y) <{W}> {{ t = Reshape(x, s) [p] u = MatMul(t, w) y = Relu(u) }}"
    assert_refuses(step("t", "p", keep=(1,)), text, "how many dimensions t has is not known")
    known = run_pass(step("t", "p", keep=(1,), rank=2), parse(text))
    assert known.changed == ["p"]


def test_a_group_of_which_a_part_is_smoothed() -> None:
    model = parse(f"{HEAD} <{W}> {{ [p] a = MatMul(x, w) [q] b = MatMul(x, w) y = Add(a, b) }}")
    run_pass(step("x", "p"), model)
    both = step("x", "p", "q")
    assert run_pass(both, model).skipped == {"p": "some of them are smoothed already"}


def test_a_smoothing_that_keeps_channels_is_not_free() -> None:
    text = f"{HEAD} <{W}, {C}> {{ [n] t = Mul(x, c) [p] y = MatMul(t, w) }}"
    item = placed(text, "p").smoothings["t"]
    assert item.fold == "n"
    assert dataclasses.replace(item, keep=(0,)).fold == ""
