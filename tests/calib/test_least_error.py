"""Least squared error with prefix sums against a loop over ranges and bins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qcompile.calib import least_error
from qcompile.calib.histogram import UNIT, Bins, Histogram
from qcompile.calib.least_error import FACTORS, Grid, errors, search

Array = NDArray[Any]
F32 = np.float32
GRIDS = [Grid(levels, symmetric) for levels in (16, 256, 65536) for symmetric in (False, True)]
grids = st.sampled_from(GRIDS)
seeds = st.integers(0, 1 << 30)


def binned(values: Array) -> Bins:
    made = Histogram()
    made.count(np.asarray(values, F32))
    return made.bins().clipped(float(values.min()), float(values.max()))


def draw(seed: int, count: int = 60) -> Array:
    """Long tails, sometimes of one side, shifted or with zeros and an outlier; of any scale."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(2, count) + rng.choice([0.0, 0, 4])
    if rng.random() < 0.3:
        values = np.abs(values) * rng.choice([-1.0, 1])
    if rng.random() < 0.3:
        values[: count // 4] = 0
    if rng.random() < 0.3:
        values[-1] *= 100
    return (values * 10.0 ** rng.integers(-30, 30)).astype(F32)


def step_of(low: float, high: float, grid: Grid) -> float:
    if grid.symmetric:
        return max(-low, high) / (grid.levels // 2 - 1)
    return (high - low) / (grid.levels - 1)


def error(bins: Bins, low: float, high: float, grid: Grid) -> float:
    """Of rounding to zero below half a step, of saturation beyond the ends, and of rounding between."""
    step = step_of(low, high, grid)
    if step <= 0:
        return np.inf
    total = 0.0
    for value, count in zip(bins.middle.tolist(), bins.counts.tolist(), strict=True):
        if abs(value) < step / 2:
            total += count * value**2
        elif value > high:
            total += count * (value - high) ** 2
        elif value < low:
            total += count * (value - low) ** 2
        else:
            total += count * step**2 / 12
    return total


def pairs(low: float, high: float, grid: Grid, factors: Array) -> list[tuple[float, float]]:
    if grid.symmetric:
        return [(-max(-low, high) * f, max(-low, high) * f) for f in factors]
    return [
        (low * f, high * g)
        for f in (factors if low < 0 else [1.0])
        for g in (factors if high > 0 else [1.0])
    ]


def ends(values: Array) -> tuple[float, float]:
    return min(float(values.min()), 0.0), max(float(values.max()), 0.0)


def check_errors(bins: Bins, tried: list[tuple[float, float]], grid: Grid) -> None:
    lows, highs = np.array(tried).T
    wanted = [error(bins, low, high, grid) for low, high in tried]
    largest = float((bins.counts * bins.middle**2).sum())  # what squares are taken from
    np.testing.assert_allclose(
        errors(bins, lows, highs, grid), wanted, rtol=1e-9, atol=1e-12 * largest
    )


@given(seed=seeds, levels=st.sampled_from([4, 16, 256, 65536]))
def test_errors_of_symmetric_ranges(seed: int, levels: int) -> None:
    bins, (low, high) = binned(draw(seed)), ends(draw(seed))
    grid = Grid(levels, symmetric=True)
    check_errors(bins, pairs(low, high, grid, np.geomspace(1, 1 / 128, 9)), grid)


@given(
    seed=seeds,
    levels=st.sampled_from([4, 16, 256, 65536]),
    share=st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.97, 1.0]),
)
def test_errors_of_ranges_that_end_on_codes(seed: int, levels: int, share: float) -> None:
    """As codes are: whole steps from zero, at times none at one end."""
    bins, (low, high) = binned(draw(seed)), ends(draw(seed))
    below = round(share * (levels - 1))
    steps = (high - low) / (levels - 1) * np.geomspace(1.37, 1 / 150, 9)
    tried = [(-below * step, (levels - 1 - below) * step) for step in steps.tolist()]
    check_errors(bins, tried, Grid(levels))


@pytest.mark.parametrize("high", [0.0, 0.125])
def test_what_is_saturated_is_not_rounded_as_well(high: float) -> None:
    """Beyond an end that is nearer to zero than half a step, a value is wrong once: it becomes zero."""
    bins, grid = binned(F32([-12, -12, 0.25])), Grid(16)
    found = errors(bins, np.array([-12.0]), np.array([high]), grid)[0] / UNIT
    step = (12 + high) / 15
    assert found == pytest.approx(2 * step**2 / 12 + 0.25**2, rel=0.02)


def test_a_range_of_no_width_is_infinitely_wrong() -> None:
    bins = binned(F32([-1, 0, 2]))
    assert errors(bins, np.zeros(2), np.array([0.0, 2]), Grid()).tolist()[0] == np.inf
    assert np.isfinite(errors(bins, np.zeros(1), np.ones(1), Grid())).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_steps(grid: Grid) -> None:
    low, high = np.array([-1.0, -4, 0]), np.array([3.0, 1, 5])
    wanted = [step_of(a, b, grid) for a, b in zip(low, high, strict=True)]
    np.testing.assert_allclose(grid.step(low, high), wanted)


def check_search(values: Array, grid: Grid, factors: Array) -> None:
    """The pair that one finds by trying one after the other."""
    bins, (low, high) = binned(values), ends(values)
    tried = pairs(low, high, grid, factors)
    wanted = np.array(
        [
            error(bins, *pair, grid)
            if grid.symmetric
            else errors(bins, np.array(pair[:1]), np.array(pair[1:]), grid)[0]
            for pair in tried
        ]
    )
    found = search(bins, low, high, grid)
    cut = [(max(a, low), min(b, high)) for a, b in tried]
    largest = float((bins.counts * bins.middle**2).sum())
    best = wanted <= wanted.min() * (1 + 1e-9) + 1e-12 * largest
    assert found in [pair for pair, is_best in zip(cut, best, strict=True) if is_best]


@settings(max_examples=60)
@given(seed=seeds, grid=grids)
def test_search_is_exhaustive(seed: int, grid: Grid) -> None:
    factors = np.geomspace(1, 1 / 128, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(least_error, "FACTORS", factors)
        check_search(draw(seed), grid, factors)


@pytest.mark.parametrize("grid", GRIDS)
def test_search_over_all_factors(grid: Grid) -> None:
    values = np.append(np.random.default_rng(3).normal(size=25), F32([-15, 60]))
    check_search(values.astype(F32), grid, FACTORS)


@given(seed=seeds, grid=grids)
def test_the_search_stays_within_the_range(seed: int, grid: Grid) -> None:
    values = draw(seed)
    low, high = ends(values)
    found = search(binned(values), low, high, grid)
    assert low <= found[0] <= 0 <= found[1] <= high
    assert found[0] < found[1]


# ---- whether it is right to expect this error


def real_error(values: Array, low: float, high: float, grid: Grid) -> float:
    """What codes leave, zero being one of them."""
    step = step_of(low, high, grid)
    below = grid.levels // 2 - 1 if grid.symmetric else np.rint(-low / step)
    above = below if grid.symmetric else grid.levels - 1 - below
    x = values.astype(np.float64)
    return float(np.square(np.clip(np.rint(x / step), -below, above) * step - x).sum())


@pytest.mark.parametrize("levels", [16, 256])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_expected_error_is_the_real_one(levels: int, symmetric: bool) -> None:
    """Of smooth data, whether the range saturates or not."""
    grid = Grid(levels, symmetric)
    values = np.random.default_rng(0).normal(size=40_000).astype(F32)
    bins = binned(values)
    for factor in (1.0, 0.6, 0.3):
        low, high = (-4.0 * factor, 4.0 * factor) if symmetric else (-3.0 * factor, 4.2 * factor)
        found = errors(bins, np.array([low]), np.array([high]), grid)[0] / UNIT
        assert found == pytest.approx(real_error(values, low, high, grid), rel=0.1)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_lone_outlier_is_cut_if_codes_are_few(grid: Grid) -> None:
    """One of a hundred thousand, at 100: least (100 - T)^2 + 1e5 (T / 255)^2 / 12."""
    values = np.append(np.random.default_rng(0).normal(size=100_000), 100).astype(F32)
    low, high = search(binned(values), *ends(values), grid)
    if grid.levels == 65536:
        assert high == 100
    else:
        assert high < 95
        assert high > 2
        assert low < -1


@pytest.mark.parametrize("symmetric", [False, True])
def test_fewer_codes_saturate_more(symmetric: bool) -> None:
    values = np.random.default_rng(0).laplace(size=50_000).astype(F32)
    found = [search(binned(values), *ends(values), Grid(n, symmetric)) for n in (4, 16, 64, 256)]
    widths = [high - low for low, high in found]
    assert widths == sorted(set(widths))
