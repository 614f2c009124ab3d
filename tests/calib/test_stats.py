"""Statistics of one tensor: extremes, histogram, channel means, whatever the sizes of the samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from qcompile.calib.stats import BINS, TensorStats, bin_values, count_bins

Array = NDArray[Any]
F32 = np.float32
TINY = float(np.finfo(F32).tiny)  # the smallest normal number
DENORMAL = 2.0**-133  # width of the bins below it
HUGE = float(np.finfo(F32).max)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
arrays = npst.arrays(F32, npst.array_shapes(max_dims=4, max_side=5), elements=finite)


def stats(*samples: Array, histogram: bool = True, channels: bool = False) -> TensorStats:
    made = TensorStats()
    for values in samples:
        assert made.add(values, histogram=histogram, channels=channels)
    return made


# ---- histogram


@given(first=arrays, second=arrays)
def test_histograms_add_up(first: Array, second: Array) -> None:
    together = np.concatenate([first.ravel(), second.ravel()])
    np.testing.assert_array_equal(count_bins(first) + count_bins(second), count_bins(together))
    np.testing.assert_array_equal(stats(first, second).counts, stats(together).counts)


@given(values=arrays)
def test_each_bin_is_narrow_and_holds_its_values(values: Array) -> None:
    """A centre is within half of 1/128 of every value that it stands for, or within a bin of denormals."""
    centres, counts = bin_values(count_bins(values))
    assert (np.diff(centres) >= 0).all()
    assert (counts > 0).all()
    assert counts.sum() == values.size
    ordered = np.sort(values.ravel()).astype(np.float64)
    off = np.abs(np.repeat(centres, counts.astype(int)) - ordered)
    assert (off <= np.maximum(np.abs(ordered) / 256 * 1.001, DENORMAL)).all()


def test_a_histogram_is_sorted_by_value() -> None:
    values = np.array([3, -3, 0.5, -0.5, 0, 3, 1e-30, -1e30], F32)
    centres, counts = bin_values(count_bins(values))
    assert counts.tolist() == [1, 1, 1, 1, 1, 1, 2]
    np.testing.assert_allclose(centres, [-1e30, -3, -0.5, 0, 1e-30, 0.5, 3], rtol=1 / 256)


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zeros_are_zero_exactly(value: float) -> None:
    centres, counts = bin_values(count_bins(np.full(7, value, F32)))
    assert centres.tolist() == [0.0]
    assert counts.tolist() == [7.0]


@pytest.mark.parametrize("value", [1e-45, -1e-45, TINY, -TINY, 3e-39, HUGE, -HUGE])
def test_the_ends_of_the_numbers(value: float) -> None:
    centres, _ = bin_values(count_bins(np.array([value], F32)))
    assert abs(centres[0] - float(F32(value))) <= max(abs(value) / 256 * 1.001, DENORMAL)
    assert np.isfinite(centres).all()


def test_infinities_have_bins_of_their_own() -> None:
    centres, counts = bin_values(count_bins(np.array([np.inf, -np.inf, HUGE, np.inf, 1], F32)))
    assert (centres[0], centres[-1]) == (-np.inf, np.inf)
    assert counts.tolist() == [1, 1, 1, 2]


def test_large_tensors_are_sampled_evenly() -> None:
    """Whatever the dimensions: each column of a table is seen, and about as often."""
    for width in (2, 3, 7, 14, 33, 85):
        rows = 400_000 // width
        table = np.broadcast_to(np.arange(1, width + 1, dtype=F32), (rows, width))
        centres, counts = bin_values(count_bins(np.ascontiguousarray(table)))
        assert len(centres) == width
        assert counts.max() <= counts.min() + 1
        assert 40_000 < counts.sum() <= 1 << 16


def test_extremes_of_large_tensors_are_exact() -> None:
    values = np.zeros(300_000, F32)
    values[[123_456, 234_567]] = 7, -9
    made = stats(values)
    assert (made.low, made.high) == (-9, 7)


def test_half_precision_is_counted_as_float32() -> None:
    values = np.array([0.5, -60000, 6e-8], np.float16)
    np.testing.assert_array_equal(count_bins(values), count_bins(values.astype(F32)))


# ---- extremes, NaN, infinities


@given(samples=st.lists(arrays, min_size=1, max_size=4))
def test_extremes_by_sample(samples: list[Array]) -> None:
    made = stats(*samples)
    assert made.lows == [float(v.min()) for v in samples]
    assert made.highs == [float(v.max()) for v in samples]
    assert (made.low, made.high) == (min(made.lows), max(made.highs))
    assert made.count == sum(v.size for v in samples)
    assert made.span == max(made.high, 0) - min(made.low, 0)


def test_nothing_seen() -> None:
    made = stats()
    assert (made.count, made.low, made.high, made.span, made.bounded) == (0, 0.0, 0.0, 0.0, True)
    assert stats(np.zeros((0, 4), F32)) == made


@pytest.mark.parametrize("at", [0, 3, 5])
def test_nan_is_refused_and_not_counted(at: int) -> None:
    made = stats(np.ones(4, F32))
    before = made.counts
    bad = np.arange(6, dtype=F32)
    bad[at] = np.nan
    assert not made.add(bad, histogram=True, channels=False)
    assert (made.count, made.lows, made.highs) == (4, [1.0], [1.0])
    assert made.counts is before


@pytest.mark.parametrize(
    ("value", "bounded"),
    [(np.inf, False), (-np.inf, False), (-HUGE, False), (-1e9, False), (65504, True), (-1e6, True)],
)
def test_masks_are_out_of_bounds(value: float, bounded: bool) -> None:
    assert stats(np.array([1, value], F32)).bounded is bounded


# ---- channels


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 4, 5, 6), (2, 4, 2, 3, 2)])
def test_mean_of_channels(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    samples = [rng.normal(3, 1, shape).astype(F32) for _ in range(3)]
    made = stats(*samples, histogram=False, channels=True)
    axes = tuple(a for a in range(len(shape)) if a != 1)
    wanted = np.mean([v.mean(axis=axes, dtype=np.float64) for v in samples], axis=0)
    np.testing.assert_allclose(made.mean(), wanted, rtol=1e-6)
    assert made.mean().dtype == np.float64
    assert made.counts is None


def test_samples_of_other_sizes_count_by_their_size() -> None:
    small, large = np.full((1, 2, 1, 1), 4, F32), np.full((1, 2, 3, 1), 8, F32)
    np.testing.assert_allclose(stats(small, large, channels=True).mean(), [7, 7])


def test_tensors_of_one_dimension_have_no_channels() -> None:
    assert stats(np.ones(3, F32), channels=True).sums is None


def test_sums_in_half_precision_do_not_overflow() -> None:
    values = np.full((1, 2, 300, 10), 100, np.float16)
    np.testing.assert_allclose(stats(values, channels=True).mean(), [100, 100])


def test_many_pixels_do_not_lose_precision() -> None:
    """0.1 added in float32 one by one would be off by percents."""
    values = np.full((1, 1, 1000, 1000), 0.1, F32)
    np.testing.assert_allclose(
        stats(values, channels=True, histogram=False).mean(), [F32(0.1)], rtol=1e-6
    )


# ---- size


def test_the_size_does_not_depend_on_the_data() -> None:
    made = stats(np.random.default_rng(0).normal(size=(4, 8, 16, 16)).astype(F32), channels=True)
    assert made.counts is not None
    assert made.counts.shape == (BINS,)
    assert made.sums is not None
    assert made.sums.shape == (8,)
