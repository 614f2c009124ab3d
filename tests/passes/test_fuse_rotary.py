"""FuseRotary: rotary position embeddings as ORT's operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from lowering import constant
from rewrites import assert_close, assert_same_interface, parse, run

from passes.fuse_rotary import FuseRotary
from qcompile.graph import io
from qcompile.run.probe import probe
from qcompile.step import Outcome, run_pass

HALF = 4
SLICES = (
    "{0}h = Slice({0}, half, far, last) {0}n = Neg({0}h) {0}l = Slice({0}, none, half, last) "
    "{0}r = Concat<axis = -1>({0}n, {0}l)"
)
SPLIT = "{0}l, {0}h = Split<axis = -1>({0}, halves) {0}n = Neg({0}h) {0}r = Concat<axis = -1>({0}n, {0}l)"
ANGLES = (
    "p1 = Unsqueeze(p, two) p2 = Cast<to = 1>(p1) f = Mul(p2, speeds) t = Concat<axis = -1>(f, f) u = Unsqueeze(t, one) "
    "c = Cos(u) s = Sin(u)"
)
LATE = (
    "p1 = Unsqueeze(p, two) p2 = Cast<to = 1>(p1) f = Mul(p2, speeds) t = Concat<axis = -1>(f, f) "
    "c1 = Cos(t) s1 = Sin(t) c2 = Mul(c1, scale) s2 = Mul(s1, scale) c = Unsqueeze(c2, one) s = Unsqueeze(s2, one)"
)
NAMES = ("q", "k", "v", "w")


def text(
    angles: str = ANGLES, turn: str = SLICES, names: tuple[str, ...] = NAMES, batch: str = "B",
    add: str = "{0}a = Mul({0}, c) {0}b = Mul({0}r, s) {0}y = Add({0}a, {0}b)", more: str = "",
    forward: str = "{0} = Transpose<perm = [0, 2, 1, 3]>({0}0)",
) -> str:  # fmt: skip
    inputs = ", ".join(f"float[B,L,{2 + i},{2 * HALF}] {n}0" for i, n in enumerate(names))
    outputs = ", ".join(f"float[B,{2 + i},L,{2 * HALF}] {n}y" for i, n in enumerate(names))
    body = " ".join(f"{forward.format(n)} {turn.format(n)} {add.format(n)}" for n in names)
    return (
        f"g ({inputs}, int64[{batch},L] p) => ({outputs}) <{constant('speeds', HALF)}, int64[1] half = {{{HALF}}}, "
        f"int64[1] far = {{9223372036854775807}}, int64[1] none = {{0}}, int64[1] last = {{3}}, int64[1] one = {{1}}, int64[1] two = {{2}}, "
        f"int64[2] halves = {{{HALF}, {HALF}}}, float scale = {{1.3}}{more}> {{ {angles} {body} }}"
    )


def feed(
    batch: int = 2, length: int = 5, rows: int | None = None, count: int = 4
) -> dict[str, Any]:
    rng = np.random.default_rng(batch + length)
    made = {
        f"{n}0": rng.standard_normal((batch, length, 2 + i, 2 * HALF)).astype(np.float32)
        for i, n in enumerate(NAMES[:count])
    }
    places = rng.integers(0, 50, (batch if rows is None else rows, length))
    return {**made, "p": places.astype(np.int64)}


def fused(model: ir.Model, given: dict[str, Any] | None = None) -> Outcome:
    return run_pass(FuseRotary(probe(model, given or feed())), model)


@pytest.mark.parametrize("angles", [ANGLES, LATE], ids=["angles", "scaled"])
@pytest.mark.parametrize("turn", [SLICES, SPLIT], ids=["slices", "split"])
def test_embeddings(angles: str, turn: str) -> None:
    model = parse(text(angles, turn))
    before = model.clone()
    assert len(fused(model).changed) == 4
    assert io.check(model) is None
    assert_same_interface(before, model)
    ops = [node.op_type for node in model.graph]
    assert ops.count("RotaryEmbedding") == 4
    assert not {"Add", "Neg", "Split"} & set(ops)
    for given in (feed(), feed(1, 1), feed(3, 7)):
        for level in ("off", "all"):
            assert_close(run(model, given, level), run(before, given), rtol=1e-4, atol=1e-5)
    again = ir.to_onnx_text(model)
    assert fused(model).changed == []
    assert ir.to_onnx_text(model) == again


def test_one_row_of_positions_for_all() -> None:
    model = parse(text(batch="1"))
    before = model.clone()
    assert len(fused(model, feed(rows=1)).changed) == 4
    for given in (feed(rows=1), feed(3, 2, rows=1)):
        assert_close(run(model, given), run(before, given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "add", ["{0}a = Mul(c, {0}) {0}b = Mul({0}r, s) {0}y = Add({0}a, {0}b)", "{0}a = Mul({0}, c) {0}b = Mul(s, {0}r) {0}y = Add({0}b, {0}a)"]
)  # fmt: skip
def test_other_orders(add: str) -> None:
    model = parse(text(add=add))
    before = model.clone()
    assert len(fused(model).changed) == 4
    assert_close(run(model, feed()), run(before, feed()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "source",
    [
        text(ANGLES.replace("Concat<axis = -1>(f, f)", "Concat<axis = -1>(f, g)").replace("t =", "g = Neg(f) t =")),  # not twice
        text(ANGLES.replace("s = Sin(u)", "s = Cos(u)")),
        text(ANGLES.replace("s = Sin(u)", "v2 = Neg(u) s = Sin(v2)")),  # of other angles
        text(turn=SLICES.replace("Neg({0}h)", "Relu({0}h)")),
        text(turn=SLICES.replace("Concat<axis = -1>({0}n, {0}l)", "Concat<axis = -1>({0}l, {0}n)")),
        text(turn=SLICES.replace("Slice({0}, half, far, last)", "Slice({0}, half, far, last, minus)"), more=", int64[1] minus = {2}"),
        text(turn=SPLIT.replace("Neg({0}h)", "Neg({0}l)").replace("({0}n, {0}l)", "({0}n, {0}h)")),
        text(add="{0}a = Mul({0}, c) {0}b = Mul({0}r, s) {0}y = Sub({0}a, {0}b)"),
        text(add="{0}a = Mul({0}, s) {0}b = Mul({0}r, c) {0}y = Add({0}a, {0}b)"),  # the other way round
    ],
)  # fmt: skip
def test_what_is_no_embedding(source: str) -> None:
    model = parse(source)
    before = ir.to_onnx_text(model)
    outcome = fused(model)
    assert outcome.changed == []
    assert outcome.skipped == {}
    assert ir.to_onnx_text(model) == before


def test_too_few() -> None:
    model = parse(text(names=("q", "k")))
    outcome = fused(model, feed(count=2))
    assert outcome.changed == []
    assert set(outcome.skipped.values()) == {"too few embeddings of these angles to gain"}


@pytest.mark.parametrize("length", [1, 2, 5])
def test_heads_that_stand_behind(length: int) -> None:
    """(batch, length, heads, size), with angles for that: what one feed shows of sizes must not decide."""
    angles = ANGLES.replace("Unsqueeze(t, one)", "Unsqueeze(t, two)")
    model = parse(
        text(angles, forward="{0} = Relu({0}0)")
        .replace("[B,", "[B,")
        .replace("last = {3}", "last = {3}")
    )
    assert fused(model, feed(1, length)).changed == []
    model = parse(text(angles))
    assert fused(model, feed(1, 1)).changed == []


def test_a_feed_of_one_place_tells_too_little() -> None:
    assert fused(parse(text()), feed(1, 1)).changed == []
