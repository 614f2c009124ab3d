"""Folding a tensor against plain numpy: any rank, axis and float type, samples stacked, parts counted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qcompile.calib.fold import COUNTED, fold, fold_finite, stride
from qcompile.calib.histogram import UNIT, Histogram
from qcompile.calib.stats import TensorStats
from qcompile.step import Need

Array = NDArray[Any]
F32 = np.float32
BARE = Need("x")
ALL = Need("x", histogram=True, channels=True, gram=True)
HISTOGRAM = Need("x", histogram=True)
EVERY = 1 << 30
SHAPES = [(4, 3), (4, 3, 5), (4, 3, 5, 6), (4, 3, 2, 3, 2), (600, 3), (4, 1, 9), (4, 3, 700)]


def folded(
    values: Array, need: Need = ALL, axis: int = 1, samples: int = 1, counted: int = EVERY
) -> TensorStats:
    made = fold(np.split(values, samples) if samples > 1 else [values], need, axis, counted)
    assert made is not None
    return made


def normal(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(1, 3, shape).astype(F32)


def same_histograms(one: Histogram | None, values: Array) -> None:
    assert one is not None
    wanted = Histogram()
    wanted.count(values.astype(F32).ravel())
    assert one.zeros == wanted.zeros
    np.testing.assert_array_equal(one.bins().low, wanted.bins().low)
    np.testing.assert_array_equal(one.bins().counts, wanted.bins().counts)


# ---- against numpy


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_numpy(shape: tuple[int, ...], axis: int, dtype: type) -> None:
    values = normal(shape).astype(dtype)
    x = values.astype(F32).astype(np.float64)
    for samples in (1, 2, 4):
        made = folded(values, axis=axis, samples=samples)
        assert (made.count, made.low, made.high) == (x.size, x.min(), x.max())
        assert made.infinite == 0
        each = x.reshape(samples, -1)
        assert made.extremes.samples == samples
        assert made.extremes.lows.dtype == made.extremes.highs.dtype == F32
        np.testing.assert_array_equal(made.extremes.lows, each.min(axis=1))
        np.testing.assert_array_equal(made.extremes.highs, each.max(axis=1))
        assert made.extremes.low_sum == pytest.approx(each.min(axis=1).sum())
        assert made.extremes.high_sum == pytest.approx(each.max(axis=1).sum())
        same_histograms(made.histogram, values)
        rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
        found = made.channels
        assert found is not None
        assert (found.axis, found.count, found.square_count) == (axis, len(rows), len(rows))
        assert found.sums.dtype == found.squares.dtype == np.float64
        np.testing.assert_allclose(found.sums, rows.sum(axis=0), rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(found.squares, np.square(rows).sum(axis=0), rtol=1e-5)
        np.testing.assert_array_equal(found.lows, rows.min(axis=0))
        np.testing.assert_array_equal(found.highs, rows.max(axis=0))
        assert made.gram is not None and made.gram.dtype == np.float64
        np.testing.assert_allclose(made.gram, rows.T @ rows, rtol=1e-4, atol=1e-3)
        assert made.rows == len(rows)


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
def test_tensors_of_one_dimension_have_no_channels(shape: tuple[int, ...]) -> None:
    values = np.full(shape, 2.5, F32)
    made = folded(values)
    assert made.channels is made.gram is None
    assert (made.count, made.low, made.high) == (values.size, 2.5, 2.5)
    same_histograms(made.histogram, values)


def test_samples_of_one_value() -> None:
    made = folded(F32([3, -1, 2]), samples=3)
    assert made.extremes.lows.tolist() == made.extremes.highs.tolist() == [3, -1, 2]


@given(
    seed=st.integers(0, 1 << 30),
    samples=st.integers(1, 5),
    shape=st.sampled_from([(1, 3, 4), (3, 3, 4), (1, 3, 4, 5), (2, 70, 9), (2, 700, 3), (5, 8)]),
    axis=st.sampled_from([1, -1]),
)
def test_stacked_samples_are_those_one_by_one(
    seed: int, samples: int, shape: tuple[int, ...], axis: int
) -> None:
    values = normal((samples * shape[0], *shape[1:]), seed)
    values[np.abs(values) < 0.5] = 0
    for counted in (EVERY, 5):
        made, single = folded(values, ALL, axis, samples, counted), TensorStats()
        for part in np.split(values, samples):
            single.add(folded(part, ALL, axis, 1, counted))
        assert (made.count, made.low, made.high) == (single.count, single.low, single.high)
        np.testing.assert_array_equal(made.extremes.lows, single.extremes.lows)
        np.testing.assert_array_equal(made.extremes.highs, single.extremes.highs)
        assert made.histogram is not None and single.histogram is not None
        bins, others = made.histogram.bins(), single.histogram.bins()
        np.testing.assert_array_equal(bins.low, others.low)
        np.testing.assert_array_equal(bins.counts, others.counts)
        assert made.channels is not None and single.channels is not None
        pairs = [
            (made.channels.sums, single.channels.sums),
            (made.channels.squares, single.channels.squares),
            (made.gram, single.gram),
        ]
        for one, other in pairs:
            assert one is not None and other is not None
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12 * values.size * 100)


@pytest.mark.parametrize("histogram", [False, True])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("gram", [False, True])
def test_only_what_is_asked_for(histogram: bool, channels: bool, gram: bool) -> None:
    made = folded(normal((4, 3)), Need("x", histogram, channels, gram))
    assert (made.histogram is not None) == histogram
    assert (made.channels is not None) == (channels or gram)
    assert (made.gram is not None) == gram
    assert made.extremes.samples == 1


def test_values_that_are_not_contiguous() -> None:
    values = normal((6, 8)).T[::2]
    made = folded(values)
    same_histograms(made.histogram, values)
    assert made.channels is not None
    np.testing.assert_allclose(made.channels.sums, values.sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 3), (0,)])
def test_no_values(shape: tuple[int, ...]) -> None:
    made = folded(np.zeros(shape, F32))
    assert (made.count, made.low, made.high, made.extremes.samples) == (0, 0, 0, 0)
    assert made.histogram is made.channels is made.gram is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("wrong", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [np.nan, 1]])
@pytest.mark.parametrize("need", [BARE, ALL])
def test_nan_and_infinities_are_refused(wrong: list[float], dtype: type, need: Need) -> None:
    for at in (0, 7, 20):
        values = normal((6, 4)).astype(dtype)
        values.ravel()[at : at + len(wrong)] = wrong
        for samples in (1, 3):
            assert fold(np.split(values, samples), need, 1, EVERY) is None


@pytest.mark.parametrize("shape", [(1, 1, 1000, 500), (500_000, 1)])
def test_many_values_do_not_lose_precision(shape: tuple[int, ...]) -> None:
    """0.1 added in float32 one by one would be off by percents; as float16, 100 overflows."""
    made = folded(np.full(shape, 0.1, F32), Need("x", channels=True)).channels
    assert made is not None
    np.testing.assert_allclose(made.mean(), [F32(0.1)], rtol=1e-6)
    np.testing.assert_allclose(made.second_moment(), [0.01], rtol=1e-4)
    half = folded(np.full((2, 3000), 100, np.float16), Need("x", channels=True), axis=0).channels
    assert half is not None
    np.testing.assert_allclose(half.mean(), [100, 100])


def test_doubles_beyond_float32_are_infinite() -> None:
    values = np.array([[1, -1e300]])
    assert fold([values], ALL, 1, EVERY) is None
    assert fold_finite(values, ALL, EVERY).infinite == 1


# ---- infinities by design


@given(seed=st.integers(0, 1 << 30), share=st.floats(0, 1), counted=st.sampled_from([9, EVERY]))
def test_infinities_are_left_out(seed: int, share: float, counted: int) -> None:
    rng = np.random.default_rng(seed)
    values = normal((5, 7), seed)
    masked = rng.random(values.shape) < share
    values[masked] = rng.choice(F32([np.inf, -np.inf]), int(masked.sum()))
    made = fold_finite(values, ALL, counted)
    finite = values[~masked]
    assert made.infinite == masked.sum()
    assert made.bounded == (not masked.any())
    assert made.count == finite.size
    assert made.channels is made.gram is None
    if finite.size:
        assert (made.low, made.high) == (finite.min(), finite.max())
        if counted == EVERY:
            same_histograms(made.histogram, finite)
    else:
        assert (made.low, made.high, made.extremes.samples) == (0, 0, 0)


# ---- parts of large tensors


@given(size=st.integers(1, 20_000), most=st.integers(1, 5000))
def test_stride(size: int, most: int) -> None:
    found = stride(size, most)
    fits = (
        k for k in range(1, size + 2) if math.gcd(k, size) == 1 and len(range(0, size, k)) <= most
    )
    assert found == next(fits)


@pytest.mark.parametrize("width", [2, 3, 7, 14, 33, 64, 85, 512])
def test_no_column_is_left_out(width: int) -> None:
    """Each is seen, and about as often."""
    rows = 100_000 // width
    columns = ((np.arange(width, dtype=np.uint32) + 0x3F80) << 16).view(F32)  # a bin each
    values = np.broadcast_to(columns, (rows, width))
    made = folded(values, HISTOGRAM, counted=COUNTED).histogram
    assert made is not None
    counts = made.bins().counts
    assert len(counts) == width
    by_one = UNIT * (stride(values.size, COUNTED) + 1)  # but for the extremes, counted besides
    assert np.ptp(counts) <= by_one + UNIT


@settings(max_examples=60)
@given(size=st.integers(1, 60_000), samples=st.integers(1, 3), signed=st.booleans())
def test_counts_add_up_to_the_number_of_values(size: int, samples: int, signed: bool) -> None:
    values = normal((samples, size), size)
    made = folded(values if signed else np.abs(values), HISTOGRAM, 1, samples, COUNTED).histogram
    assert made is not None
    if size <= COUNTED:
        assert made.total == UNIT * values.size
    else:
        assert made.total == pytest.approx(UNIT * values.size, rel=0.005)


def test_extremes_of_large_tensors_are_exact() -> None:
    values = np.zeros(300_000, F32)
    values[[123_456, 234_567]] = 7, -9
    made = folded(values, HISTOGRAM, counted=COUNTED)
    assert (made.low, made.high) == (-9, 7)
    assert made.histogram is not None
    bins = made.histogram.bins()
    assert (bins.middle[0], bins.middle[-1]) == pytest.approx((-9, 7), rel=0.004)
    assert bins.counts[[0, -1]].tolist() == [UNIT, UNIT]


@pytest.mark.parametrize("name", ["normal", "Laplace", "lognormal", "Student-t"])
def test_quantiles_of_parts(name: str) -> None:
    """Of 40 samples about 3000 values each are counted, n in all: a share p is met within 5 standard
    deviations, 5 sqrt(p (1 - p) / n), and the value at it within a bin."""
    rng = np.random.default_rng(0)
    draws = {
        "normal": rng.normal, "Laplace": rng.laplace, "lognormal": rng.lognormal,
        "Student-t": lambda size: rng.standard_t(3, size),
    }  # fmt: skip
    samples = [draws[name](size=20_002).astype(F32) for _ in range(40)]
    made = TensorStats()
    for values in samples:
        made.add(folded(values, HISTOGRAM, counted=COUNTED))
    assert made.histogram is not None
    bins = made.histogram.bins().clipped(made.low, made.high)
    every = np.sort(np.concatenate(samples)).astype(np.float64)
    n = 40 * (20_002 // stride(20_002, COUNTED))
    for share in (0.99, 0.999, 0.9999, 0.01, 0.001, 0.0001):
        slack = 5 * math.sqrt(share * (1 - share) / n)
        low, high = np.quantile(every, [max(share - slack, 0.0), min(share + slack, 1.0)])
        got = bins.quantile(share)
        assert low - abs(low) / 128 <= got <= high + abs(high) / 128
