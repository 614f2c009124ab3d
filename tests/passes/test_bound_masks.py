"""Masks before a Softmax: what takes their place, and what must stay."""

from __future__ import annotations

import numpy as np
import pytest
from rewrites import assert_close, assert_refuses, assert_rewrites, parse, random_feed, run

from passes.bound_masks import BoundMasks
from qcompile.calib.stats import TensorStats
from qcompile.graph import io
from qcompile.run.probe import probe
from qcompile.step import run_pass

HEAD = "g (float[2,1,3,4] x, bool[2,1,1,4] open) => (float[2,1,3,4] y)"
ZERO = "float zero = {0}"
TAIL = "s = Add(x, m) y = Softmax(s)"
REACH = np.log(4096) + 25 * np.log(2)
X = TensorStats(count=9, low=-2.0, high=2.0)  # with its margin -4..4
FLOOR, NUMBER = -4 - REACH, -4 - REACH - 4 - 1


def step(text: str, **stats: TensorStats) -> BoundMasks:
    model = parse(text)
    return BoundMasks(probe(model, random_feed(model)), {"x": X, **stats})


def where(big: str, tail: str = TAIL) -> str:
    return f"{HEAD} <{ZERO}, float big = {{{big}}}> {{ m = Where(open, zero, big) {tail} }}"


def rows(*flags: int) -> dict[str, np.ndarray]:
    """Flags of the first sample; the second one is masked as a whole."""
    return {"open": np.array([flags, (0, 0, 0, 0)], bool).reshape(2, 1, 1, 4)}


@pytest.mark.parametrize("big", ["-1e9", "-3.4028235e38"])
def test_what_swallows_scores_gets_a_clip(big: str) -> None:
    """The second sample is masked as a whole: its rows are even before and after."""
    before = where(big)
    after = (
        f"{HEAD} <{ZERO}, float big = {{{NUMBER}}}, float low = {{{FLOOR}}}> "
        "{ m = Where(open, zero, big) t = Add(x, m) s = Clip(t, low) y = Softmax(s) }"
    )
    outcome = assert_rewrites(
        step(before), before=before, after=after, feed=rows(1, 0, 1, 0), atol=1e-6
    )
    assert outcome.rescaled == {"m", "s"}


def test_what_keeps_scores_gets_none() -> None:
    """-1e4 leaves the differences of a row that is masked as a whole."""
    before = where("-1e4")
    after = f"{HEAD} <{ZERO}, float big = {{{NUMBER}}}> {{ m = Where(open, zero, big) {TAIL} }}"
    assert_rewrites(
        step(before), before=before, after=after, feed=rows(0, 1, 1, 0), rtol=3e-3, atol=1e-3
    )


def test_masked_entries_weigh_nothing_at_the_ends_of_the_range() -> None:
    model = parse(where("-1e9"))
    feed = rows(1, 0, 1, 1)
    feed["x"] = np.full((2, 1, 3, 4), -2, np.float32)
    feed["x"][..., 1] = 2
    wanted = run(model, feed)[0]
    run_pass(step(where("-1e9")), model)
    made = run(model, feed)[0]
    np.testing.assert_allclose(made[1], 0.25)
    assert made[0, ..., 1].max() * 4096 < 2**-25
    np.testing.assert_array_equal(made[..., (0, 2, 3)], wanted[..., (0, 2, 3)])


def test_a_product_of_flags_and_moves_behind_it() -> None:
    head = "g (float[2,1,3,4] x, int64[2,4] open) => (float[2,1,3,4] y)"
    axes = "float one = {1}, int64[2] axes = {1, 2}"
    body = "{ f = Cast<to = 1>(open) o = Sub(one, f) p = Mul(o, big) m = Unsqueeze(p, axes)"
    before = f"{head} <{axes}, float big = {{-1e9}}> {body} s = Add(m, x) y = Softmax(s) }}"
    after = (
        f"{head} <{axes}, float big = {{{NUMBER}}}, float low = {{{FLOOR}}}> {body} "
        "t = Add(m, x) s = Clip(t, low) y = Softmax(s) }"
    )
    flags = TensorStats(count=9, low=0.0, high=1.0)
    assert_rewrites(step(before, o=flags), before=before, after=after, atol=1e-6)
    reason = "'o' may be other than 0 and 1"
    assert_refuses(step(before, o=TensorStats(count=9, low=-1.0, high=1.0)), before, reason)
    assert_refuses(step(before), before, "the range of 'o' beside the mask is not known")


def test_a_constant_of_minus_infinity_whose_rows_are_open() -> None:
    head = "g (float[2,1,2,2] x) => (float[2,1,2,2] y)"
    before = f"{head} <float[2,2] m = {{0, -inf, 0.5, 0}}> {{ s = Add(x, m) y = Softmax(s) }}"
    number = NUMBER - 0.0
    after = (
        f"{head} <float[2,2] m = {{0, {number}, 0.5, 0}}, float low = {{{FLOOR}}}> "
        "{ t = Add(x, m) s = Clip(t, low) y = Softmax(s) }"
    )
    feed = {"x": np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 1, 2, 2)}
    assert_rewrites(step(before), before=before, after=after, feed=feed, atol=1e-6)
    closed = before.replace("0.5, 0}", "-inf, -inf}")
    assert_refuses(step(closed), closed, "a row that -inf masks as a whole is NaN")


def test_sums_that_share_a_mask_are_one() -> None:
    """The number must mask in both; each has a floor of its own."""
    head = "g (float[2,1,3,4] x, float[2,1,3,4] z, bool[2,1,1,4] open) => (float[2,1,3,4] y, float[2,1,3,4] w)"
    body = "m = Where(open, zero, big)"
    before = (
        f"{head} <{ZERO}, float big = {{-1e9}}> "
        f"{{ {body} s = Add(x, m) y = Softmax(s) r = Add(z, m) w = Softmax(r) }}"
    )
    low = -16 - REACH
    after = (
        f"{head} <{ZERO}, float big = {{{low - 16 - 1}}}, float a = {{{FLOOR}}}, float b = {{{low}}}> "
        f"{{ {body} t = Add(x, m) s = Clip(t, a) y = Softmax(s) u = Add(z, m) r = Clip(u, b) w = Softmax(r) }}"
    )
    wide = TensorStats(count=9, low=-8.0, high=8.0)
    assert_rewrites(
        step(before, z=wide), before=before, after=after, feed=rows(1, 1, 0, 0), atol=1e-6
    )


def test_a_branch_that_is_no_constant_widens_the_range() -> None:
    head = "g (float[2,1,3,4] x, float[2,1,1,4] b, bool[2,1,1,4] open) => (float[2,1,3,4] y)"
    before = f"{head} <float big = {{-1e9}}> {{ m = Where(open, b, big) {TAIL} }}"
    model = parse(before)
    bias = TensorStats(count=9, low=-3.0, high=1.0)
    outcome = run_pass(step(before, b=bias), model)
    assert outcome.skipped == {}
    (clip,) = [node for node in model.graph if node.op_type == "Clip"]
    assert float(clip.inputs[1].const_value.numpy()) == pytest.approx(FLOOR - 3)  # type: ignore[union-attr]
    feed = random_feed(parse(before), given={**rows(1, 0, 0, 1)})
    assert_close(run(model, feed), run(parse(before), feed), atol=1e-6)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (where("-inf"), "a row that -inf masks as a whole is NaN"),
        (where("-1e6"), "rows that are masked as a whole would change"),
        (where("-1e9", "s = Add(x, m) t = Relu(s) y = Add(t, s)"), "not only a Softmax reads the sum"),
        (where("-1e9", "s = Add(x, m) r = Softmax(s) n = Add(r, m) y = Softmax(n)"), "the range of 'r'"),
        (where("-1e9", "n = Neg(m) s = Add(x, m) r = Softmax(s) y = Add(r, n)"), "Neg  reads it"),
        (where("-1e9", "k = Add(m, m) s = Add(x, k) r = Add(x, m) p = Softmax(r) q = Softmax(s) y = Add(p, q)"),
         "two masks are added"),
        (where("-2e3"), "is too wide"),
    ],
)  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    wide = TensorStats(count=9, low=-500.0, high=500.0)
    found = step(text, x=wide) if reason == "is too wide" else step(text)
    assert_refuses(found, text, reason)


def test_what_reaches_no_sum_is_no_mask() -> None:
    text = where("-1e9", "s = Mul(x, m) y = Softmax(s)")
    assert_refuses(step(text), text, None)


def test_masks_of_other_names_stay() -> None:
    text = where("-1e9")
    found = step(text)
    other = BoundMasks(found.facts, found.stats, only={"another"})
    assert_refuses(other, text, None)


def test_needs_are_the_ranges_that_prove_it() -> None:
    text = where("-1e9")
    assert [need.tensor for need in step(text).needs(parse(text))] == ["x"]
    text = where("-1e9", "n = Neg(m) s = Add(x, m) r = Softmax(s) y = Add(r, n)")
    assert step(text).needs(parse(text)) == []


@pytest.mark.parametrize("seed", range(6))
def test_the_function_stays_whatever_is_masked(seed: int) -> None:
    rng = np.random.default_rng(seed)
    big = ["-1e9", "-3.4028235e38", "-1e9", "-1e10"][seed % 4]
    before = parse(where(big))
    after = before.clone()
    assert run_pass(step(where(big)), after).changed
    assert io.check(after) is None
    for _ in range(5):
        feed = {
            "x": rng.uniform(-2, 2, (2, 1, 3, 4)).astype(np.float32),
            "open": rng.random((2, 1, 1, 4)) < 0.5,
        }
        assert_close(run(after, feed), run(before, feed), rtol=1e-6, atol=1e-7)
