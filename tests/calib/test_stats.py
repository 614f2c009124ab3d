"""Statistics of one tensor: what is merged of shards is what the whole has, in any order of merging."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from qcompile.calib import stats as module
from qcompile.calib.fold import fold
from qcompile.calib.histogram import UNIT, Histogram
from qcompile.calib.stats import Channels, Extremes, TensorStats
from qcompile.step import Need

Array = NDArray[Any]
F32 = np.float32
ALL = Need("x", histogram=True, channels=True, gram=True)
ELEMENTS = st.floats(-1e3, 1e3, width=32)


def drawn(seed: int, rows: list[list[int]]) -> list[list[Array]]:
    """Samples of so many rows by shard: long tails, and zeros of either sign."""
    rng = np.random.default_rng(seed)

    def sample(count: int) -> Array:
        values = 10 * rng.standard_t(2, (count, 3))
        return np.where(rng.random(values.shape) < 0.2, values * 0, values).astype(F32)

    return [[sample(count) for count in part] for part in rows]


shards = st.builds(
    drawn, st.integers(0, 1 << 30),
    st.lists(st.lists(st.integers(0, 4), max_size=5), min_size=1, max_size=5),
)  # fmt: skip


def merged(parts: Sequence[TensorStats]) -> TensorStats:
    made = TensorStats()
    for part in parts:
        made.add(part)
    return made


def stats(*samples: Array, need: Need = ALL) -> TensorStats:
    parts = [fold([values], need, -1, counted=1 << 30) for values in samples]
    assert None not in parts
    return merged([part for part in parts if part is not None])


def close(one: Array, other: Array) -> None:
    """To the rounding of float64, in sums that may cancel."""
    largest = float(max(np.abs(one).max(), 1e6 * 25))
    np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12 * largest)


def same(one: TensorStats, other: TensorStats) -> None:
    assert (one.count, one.low, one.high) == (other.count, other.low, other.high)
    assert (one.infinite, one.rows) == (other.infinite, other.rows)
    assert one.extremes.samples == other.extremes.samples
    np.testing.assert_array_equal(one.extremes.lows, other.extremes.lows)
    np.testing.assert_array_equal(one.extremes.highs, other.extremes.highs)
    assert one.extremes.low_sum == pytest.approx(other.extremes.low_sum, rel=1e-12, abs=1e-8)
    assert one.extremes.high_sum == pytest.approx(other.extremes.high_sum, rel=1e-12, abs=1e-8)
    assert (one.histogram is None) == (other.histogram is None)
    if one.histogram is not None and other.histogram is not None:
        assert one.histogram.zeros == other.histogram.zeros
        mine, theirs = one.histogram.bins(), other.histogram.bins()
        np.testing.assert_array_equal(mine.low, theirs.low)
        np.testing.assert_array_equal(mine.counts, theirs.counts)
    assert (one.channels is None) == (other.channels is None)
    if one.channels is not None and other.channels is not None:
        a, b = one.channels, other.channels
        assert (a.axis, a.count, a.square_count) == (b.axis, b.count, b.square_count)
        np.testing.assert_array_equal(a.lows, b.lows)
        np.testing.assert_array_equal(a.highs, b.highs)
        close(a.sums, b.sums)
        close(a.squares, b.squares)
    assert (one.gram is None) == (other.gram is None)
    if one.gram is not None and other.gram is not None:
        close(one.gram, other.gram)


# ---- merging


@settings(max_examples=60)
@given(parts=shards)
def test_shards_merged_are_the_whole(parts: list[list[Array]]) -> None:
    whole = stats(*(values for part in parts for values in part))
    same(merged([stats(*part) for part in parts]), whole)


@settings(max_examples=60)
@given(parts=shards, at=st.integers(0, 4))
def test_the_order_of_merging_does_not_matter(parts: list[list[Array]], at: int) -> None:
    made = [stats(*part) for part in parts]
    left, right = merged(made[:at]), merged(made[at:])
    left.add(right)
    same(left, merged(made))


@settings(max_examples=60)
@given(parts=shards)
def test_merging_leaves_the_other_alone(parts: list[list[Array]]) -> None:
    made = [stats(*part) for part in parts]
    into = merged(made)
    into.add(stats(F32([[2000, -2000, 0]])))
    for part, values in zip(made, parts, strict=True):
        same(part, stats(*values))


def test_nothing_seen() -> None:
    made = TensorStats()
    assert (made.count, made.low, made.high, made.span, made.bounded) == (0, 0.0, 0.0, 0.0, True)
    made.add(TensorStats())
    made.add(stats(np.zeros((0, 4), F32)))
    same(made, TensorStats())
    made.add(stats(F32([[3, 4, 5]])))
    made.add(TensorStats())
    same(made, stats(F32([[3, 4, 5]])))
    assert (made.low, made.high, made.span) == (3, 5, 5)


def test_infinities_add_up() -> None:
    made = TensorStats(infinite=2)
    made.add(TensorStats(infinite=3))
    assert (made.infinite, made.bounded, made.count) == (5, False, 0)


@given(samples=st.lists(npst.arrays(F32, (2, 3), elements=ELEMENTS), min_size=1, max_size=6))
def test_extremes_by_sample(samples: list[Array]) -> None:
    made = stats(*samples)
    assert made.extremes.lows.tolist() == [float(v.min()) for v in samples]
    assert made.extremes.highs.tolist() == [float(v.max()) for v in samples]
    assert made.extremes.low_sum == pytest.approx(sum(float(v.min()) for v in samples))
    assert (made.low, made.high) == (np.min(samples), np.max(samples))
    assert made.span == max(made.high, 0) - min(made.low, 0)


def extremes(numbers: Sequence[int]) -> Extremes:
    lows = np.array(numbers, F32)
    return Extremes(lows.size, float(-lows.sum()), float(lows.sum()), -lows, lows)


@given(sizes=st.lists(st.integers(0, 9), max_size=12), at=st.integers(0, 12))
def test_of_many_samples_the_last_extremes_are_kept(sizes: list[int], at: int) -> None:
    ends = np.cumsum([0, *sizes]).tolist()
    parts = [range(a, b) for a, b in itertools.pairwise(ends)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "KEPT", 20)
        patch.setattr(module, "RECENT", 6)
        made, rest = Extremes(), Extremes()
        for part in parts[:at]:
            made.add(extremes(part))
        for part in parts[at:]:
            rest.add(extremes(part))
        made.add(rest)
    every = list(range(ends[-1]))
    kept = every if len(every) <= 20 else every[-6:]
    assert made.highs.tolist() == kept
    assert made.lows.tolist() == [-n for n in kept]
    assert (made.samples, made.high_sum, made.low_sum) == (len(every), sum(every), -sum(every))


# ---- channels


def test_channels_vanish_if_their_number_varies() -> None:
    narrow, wide = F32([[1, 2]]), F32([[1, 2, 3]])
    for samples in ([narrow, wide], [wide, narrow, narrow], [narrow, narrow, wide, narrow]):
        made = stats(*samples)
        assert made.channels is None
        assert made.gram is None
        assert made.count == sum(v.size for v in samples)
        assert merged([stats(samples[0]), stats(*samples[1:])]).channels is None


def test_channels_vanish_if_a_sample_has_none_or_others() -> None:
    assert stats(F32([[1, 2]]), F32([1, 2])).channels is None
    assert stats(F32([1, 2]), F32([[1, 2]])).channels is None
    made = stats(np.ones((1, 2, 2), F32))
    other = fold([np.ones((1, 2, 2), F32)], ALL, 1, 99)
    assert other is not None
    made.add(other)
    assert made.channels is None


def test_empty_samples_leave_channels() -> None:
    made = stats(np.zeros((0, 5), F32), F32([[1, 2]]), np.zeros((0, 2), F32), F32([[3, 4]]))
    assert made.channels is not None
    np.testing.assert_array_equal(made.channels.mean(), [2, 3])
    assert made.rows == 2


def test_samples_of_other_sizes_count_by_their_size() -> None:
    made = stats(np.full((1, 2), 4, F32), np.full((3, 2), 8, F32))
    assert made.channels is not None
    np.testing.assert_allclose(made.channels.mean(), [7, 7])
    np.testing.assert_allclose(made.channels.second_moment(), [52, 52])


def test_moments_over_all_channels() -> None:
    values = np.random.default_rng(0).normal(3, 2, (500, 6)).astype(F32) * F32([1, 2, 3, 1, 1, 9])
    made = stats(values)
    assert made.channels is not None
    assert made.mean == pytest.approx(values.mean(), rel=1e-5)
    assert made.deviation == pytest.approx(values.std(), rel=1e-5)
    np.testing.assert_array_equal(made.channels.peak(), np.abs(values).max(axis=0))
    assert stats(np.full((4, 2), 0.1, F32)).deviation == pytest.approx(0, abs=1e-4)


def test_no_channels_no_moments() -> None:
    made = stats(F32([[1, 2]]), need=Need("x"))
    assert made.mean is made.deviation is made.histogram is None
    assert made.share_of_zeros() is made.share_saturated() is made.share_of_outliers() is None
    none = Channels(1, 0, np.zeros(2), np.zeros(2, F32), np.zeros(2, F32), 0, np.zeros(2))
    assert none.mean().tolist() == none.second_moment().tolist() == [0, 0]


# ---- bounds and shares


@pytest.mark.parametrize(
    ("value", "bounded"),
    [(-np.finfo(F32).max, False), (-1e9, False), (1e9, False), (65504, True), (-1e6, True)],
)
def test_masks_are_out_of_bounds(value: float, bounded: bool) -> None:
    assert stats(F32([[1, value]]), need=Need("x")).bounded is bounded


@given(values=npst.arrays(F32, (5, 4), elements=ELEMENTS | st.just(0.0) | st.just(-0.0)))
def test_share_of_zeros(values: Array) -> None:
    tiny = np.abs(values) < 2.0**-133
    assert stats(values).share_of_zeros() == pytest.approx(tiny.mean())


@pytest.mark.parametrize(("low", "high"), [(0, 6), (-1, 1), (-0.5, 6), (-3, 0)])
def test_share_saturated(low: float, high: float) -> None:
    """As behind a Clip; at 0, as behind a Relu, nothing is."""
    rng = np.random.default_rng(0)
    samples = [np.clip(rng.normal(0, 4, (400, 5)), low, high).astype(F32) for _ in range(3)]
    every = np.stack(samples)
    wanted = sum((every == end).mean() for end in (low, high) if end)
    assert stats(*samples).share_saturated() == pytest.approx(wanted, abs=0.005)


def test_share_saturated_of_no_clip() -> None:
    values = np.random.default_rng(0).normal(size=(5000, 2)).astype(F32)
    assert stats(values).share_saturated() == pytest.approx(2 / values.size, abs=3e-4)
    assert stats(np.zeros((2, 2), F32)).share_saturated() == 0
    assert stats(np.full((2, 2), 3, F32)).share_saturated() == 1
    empty = TensorStats(histogram=Histogram())
    assert empty.share_saturated() is None
    assert empty.share_of_zeros() == 0


@pytest.mark.parametrize("deviations", [2.0, 6.0])
@pytest.mark.parametrize("offset", [0, 50])
def test_share_of_outliers(deviations: float, offset: float) -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(5000, 4)) + offset).astype(F32)
    values[:20] += F32(90)
    values[20:30] -= F32(200)
    away = np.abs(values - values.mean()) > deviations * values.std()
    found = stats(values).share_of_outliers(deviations)
    assert away.any()
    assert found == pytest.approx(away.mean(), rel=0.02)


def test_share_of_outliers_of_constants() -> None:
    assert stats(np.zeros((3, 2), F32)).share_of_outliers() is None
    assert stats(F32([[1, -1], [2, 0]])).share_of_outliers() == 0


def test_the_size_does_not_depend_on_the_number_of_samples() -> None:
    made, once = TensorStats(), stats(np.random.default_rng(0).normal(size=(64, 8)).astype(F32))
    for _ in range(50):
        made.add(once)
    assert made.histogram is not None and once.histogram is not None
    assert made.histogram.positive.counts.shape == once.histogram.positive.counts.shape
    assert made.histogram.total == 50 * 512 * UNIT
