"""Histograms: bins are narrow, add up exactly, and tell quantiles wherever the range ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from qcompile.calib.histogram import UNIT, Bins, Histogram, Window

Array = NDArray[Any]
Draw = Callable[[np.random.Generator, int], Array]
F32 = np.float32
TINY = float(np.finfo(F32).tiny)  # the smallest normal number
DENORMAL = 2.0**-133  # width of the bins below it
HUGE = float(np.finfo(F32).max)
WIDTH = 1 / 128  # of a bin, relative to the values in it
SHARES = (0.99, 0.999, 0.9999, 0.01, 0.001, 0.0001)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
arrays = npst.arrays(F32, st.integers(0, 40), elements=finite)

DRAWS: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "Laplace": lambda rng, n: rng.laplace(size=n),
    "lognormal": lambda rng, n: rng.lognormal(size=n),
    "Student-t": lambda rng, n: rng.standard_t(3, size=n),
    "bimodal": lambda rng, n: rng.normal(size=n) + rng.choice([-8.0, 20.0], size=n),
    "constant": lambda rng, n: np.full(n, 2.7),
    "one outlier": lambda rng, n: np.append(rng.normal(size=n - 1), 300.0),
}


def counted(*samples: Array, weight: int = UNIT) -> Histogram:
    made = Histogram()
    for values in samples:
        made.count(np.asarray(values, F32), weight)
    return made


def same(first: Histogram, second: Histogram) -> None:
    assert first.zeros == second.zeros
    assert first.total == second.total
    one, other = first.bins(), second.bins()
    np.testing.assert_array_equal(one.low, other.low)
    np.testing.assert_array_equal(one.high, other.high)
    np.testing.assert_array_equal(one.counts, other.counts)


# ---- counting


@given(first=arrays, second=arrays)
def test_histograms_add_up(first: Array, second: Array) -> None:
    made = counted(first)
    made.add(counted(second))
    same(made, counted(np.concatenate([first, second])))
    same(made, counted(first, second))
    same(made, counted(second, first))
    assert made.total == UNIT * (first.size + second.size)


@given(values=arrays)
def test_adding_leaves_the_other_alone(values: Array) -> None:
    other, made = counted(values), Histogram()
    made.add(other)
    made.add(counted(F32([1, -2, 0, HUGE, 1e-40])))
    same(other, counted(values))


@given(values=arrays)
def test_each_bin_is_narrow_and_holds_its_values(values: Array) -> None:
    bins = counted(values).bins()
    assert (bins.counts > 0).all()
    assert bins.counts.sum() == UNIT * values.size
    assert (bins.low <= bins.high).all()
    assert (bins.high[:-1] < bins.low[1:]).all()  # sorted, and they do not overlap
    sizes = np.minimum(np.abs(bins.low), np.abs(bins.high))
    assert (bins.high - bins.low <= np.maximum(sizes * WIDTH, DENORMAL)).all()
    ordered = np.sort(values).astype(np.float64)
    which = np.repeat(np.arange(bins.counts.size), (bins.counts / UNIT).astype(int))
    rest = np.where(np.abs(ordered) < DENORMAL, 0.0, ordered)
    assert (bins.low[which] <= rest).all()
    assert (rest <= bins.high[which]).all()
    off = np.abs(bins.middle[which] - ordered)
    assert (off <= np.maximum(np.abs(ordered) * 0.004, DENORMAL)).all()


def test_a_histogram_is_sorted_by_value() -> None:
    bins = counted(F32([3, -3, 0.5, -0.5, 0, 3, 1e-30, -1e30])).bins()
    assert (bins.counts / UNIT).tolist() == [1, 1, 1, 1, 1, 1, 2]
    np.testing.assert_allclose(bins.middle, [-1e30, -3, -0.5, 0, 1e-30, 0.5, 3], rtol=0.004)


@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-45])
@pytest.mark.parametrize("more", [[], [1.0, 5.0], [-1.0, 5.0]])
def test_zeros_are_zero_exactly(value: float, more: list[float]) -> None:
    made = counted(F32([value] * 7 + more))
    assert made.zeros == 7 * UNIT
    bins = made.bins()
    at = bins.middle == 0
    assert bins.counts[at].tolist() == [7 * UNIT]
    assert bins.low[at] == bins.high[at] == 0


def test_negative_zeros_are_zeros() -> None:
    """HardSwish and products with 0 make them."""
    made = Histogram()
    made.count(F32([-0.0, 0, 1, -0.0, 2]))
    assert made.zeros == 3 * UNIT
    assert (made.bins().counts / UNIT).tolist() == [3, 1, 1]
    assert made.bins().quantile(0.5) == 0


@pytest.mark.parametrize("value", [1e-45, -1e-45, TINY, -TINY, 3e-39, HUGE, -HUGE])
def test_the_ends_of_the_numbers(value: float) -> None:
    bins = counted(F32([value])).bins()
    assert np.isfinite([bins.low, bins.high]).all()
    assert abs(bins.middle[0] - float(F32(value))) <= max(abs(value) * 0.004, DENORMAL)


@given(values=arrays, weight=st.integers(1, 10_000))
def test_a_weight_multiplies(values: Array, weight: int) -> None:
    made, once = counted(values, weight=weight), counted(values, weight=1)
    assert made.zeros == weight * once.zeros
    np.testing.assert_array_equal(made.bins().counts, weight * once.bins().counts)
    np.testing.assert_array_equal(made.bins().low, once.bins().low)


def test_no_values() -> None:
    made = counted(np.zeros(0, F32))
    assert made.total == 0
    bins = made.bins()
    assert (bins.low.size, bins.high.size, bins.counts.size) == (0, 0, 0)
    assert bins.quantile(0.5) == 0
    assert bins.above(0) == 0


pieces = st.tuples(st.integers(0, 60), st.lists(st.integers(0, 9), max_size=8))


@given(parts=st.lists(pieces, max_size=6))
def test_windows_grow_either_way(parts: list[tuple[int, list[int]]]) -> None:
    window, dense = Window(), np.zeros(80, np.int64)
    for start, numbers in parts:
        piece = np.array(numbers, np.int64)
        window.add(start, piece)
        dense[start : start + piece.size] += piece
    found = np.zeros(80, np.int64)
    found[window.start : window.start + window.counts.size] = window.counts
    np.testing.assert_array_equal(found, dense)


# ---- quantiles against sorting


def check(values: Array, made: Histogram, most: float = 0.005) -> None:
    """Quantiles are off by `most` of the range, which holds 0, and never by more than a bin."""
    low, high = float(values.min()), float(values.max())
    span = max(high, 0.0) - min(low, 0.0)
    bins = made.bins().clipped(low, high)
    for share in SHARES:
        want = float(np.quantile(values.astype(np.float64), share, method="inverted_cdf"))
        off = abs(bins.quantile(share) - want)
        assert off <= most * span + DENORMAL, share
        assert off <= WIDTH * abs(want) + DENORMAL, share


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e30, 1e-40, 1e-44])
@pytest.mark.parametrize("name", DRAWS)
def test_quantiles(name: str, scale: float) -> None:
    values = (DRAWS[name](np.random.default_rng(1), 30_000) * scale).astype(F32)
    for data in (values, -values):
        check(data, counted(data))


@pytest.mark.parametrize("name", DRAWS)
def test_quantiles_if_the_range_arrives_in_the_last_sample(name: str) -> None:
    rng = np.random.default_rng(2)
    samples = [(DRAWS[name](rng, 500) * 1e-3).astype(F32) for _ in range(40)]
    for last in (20, 500):
        data = [*samples, (DRAWS[name](rng, last) * 1e3).astype(F32)]
        made = Histogram()
        for values in data:
            made.add(counted(values))
        check(np.concatenate(data), made)


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(DRAWS)),
    seed=st.integers(0, 1 << 30),
    size=st.integers(5_000, 25_000),
    exponent=st.integers(-44, 30),
    offset=st.floats(-5, 5),
    last=st.booleans(),
)
def test_quantiles_of_any_data(
    name: str, seed: int, size: int, exponent: int, offset: float, last: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = ((DRAWS[name](rng, size) + offset) * 10.0**exponent).astype(F32)
    if last:  # a single sample of a hundred times the range
        values[-size // 50 :] *= F32(100)
    check(values, counted(*np.array_split(values, 7)))


def test_quantiles_of_one_value_of_many_in_a_bin() -> None:
    """All values of a bin may be at its start, and the range end where it does."""
    values = np.append(np.full(9_990, 1.0), np.full(10, 1.0079)).astype(F32)
    made = counted(values)
    check(values, made)
    check(-values, counted(-values))
    bins = made.bins().clipped(1.0, float(values[-1]))
    assert (bins.quantile(0.0), bins.quantile(1.0)) == (1.0, float(values[-1]))


@given(values=npst.arrays(F32, st.integers(1, 200), elements=finite), share=st.floats(0, 1))
def test_a_quantile_is_in_the_bin_of_the_exact_one(values: Array, share: float) -> None:
    low, high = float(values.min()), float(values.max())
    got = counted(values).bins().clipped(low, high).quantile(share)
    rank = share * values.size
    ordered = np.sort(values).astype(np.float64)
    near = [  # a rank may be rounded to either side of an integer
        ordered[min(max(int(np.ceil(rank + slack)) - 1, 0), values.size - 1)]
        for slack in (-1e-9, 1e-9)
    ]
    assert any(abs(got - want) <= 0.005 * abs(want) + DENORMAL for want in near)
    assert low <= got <= high


@given(values=npst.arrays(F32, st.integers(1, 50), elements=finite))
def test_quantiles_rise_from_end_to_end(values: Array) -> None:
    low, high = float(values.min()), float(values.max())
    bins = counted(values).bins().clipped(low, high)
    found = [bins.quantile(share) for share in np.linspace(0, 1, 21)]
    assert found == sorted(found)
    assert found[0] <= low + WIDTH * abs(low) + DENORMAL
    assert found[-1] == pytest.approx(high, rel=1e-12, abs=DENORMAL)


# ---- what is above


@given(values=npst.arrays(F32, st.integers(1, 50), elements=finite), value=finite)
def test_above_is_right_but_for_the_bin_it_cuts(values: Array, value: float) -> None:
    bins = counted(values).bins()
    wanted = UNIT * int((values > value).sum())
    reach = WIDTH * abs(value) + DENORMAL
    near = UNIT * int((np.abs(values.astype(np.float64) - value) <= reach).sum())
    assert abs(bins.above(value) - wanted) <= near
    assert bins.above(HUGE) <= UNIT * int((values > HUGE / 1.01).sum())
    assert bins.above(-np.inf) == bins.counts.sum()


def test_a_bin_is_cut_in_proportion() -> None:
    bins = Bins(np.array([-1.0, 0, 2]), np.array([-0.5, 0, 4]), np.array([4.0, 10, 8]))
    assert bins.above(2.5) == 6
    assert bins.above(0) == 8
    assert bins.above(-0.75) == 20
    assert bins.quantile(18 / 22) == pytest.approx(3)
    assert bins.clipped(-0.75, 3).low.tolist() == [-0.75, 0, 2]
    assert bins.clipped(-0.75, 3).high.tolist() == [-0.5, 0, 3]
