"""Each range method against a slow one on the raw values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from qcompile.calib import stats as stats_module
from qcompile.calib.fold import fold
from qcompile.calib.least_error import Grid
from qcompile.calib.ranges import (
    AUTO,
    HISTOGRAM_METHODS,
    METHODS,
    PERCENT,
    kl,
    mean,
    method,
    minmax,
    moving_average,
    mse,
    needs_histogram,
    percentile,
)
from qcompile.calib.stats import TensorStats
from qcompile.errors import RecipeError
from qcompile.step import Need

Array = NDArray[Any]
F32 = np.float32
GRIDS = [Grid(levels, symmetric) for levels in (16, 256, 65536) for symmetric in (False, True)]
FEW = Grid(16)


def stats(*samples: Array, histogram: bool = True) -> TensorStats:
    made = TensorStats()
    for values in samples:
        one = fold([values], Need("x", histogram=histogram), 1, counted=1 << 30)
        assert one is not None
        made.add(one)
    return made


def normal(count: int = 4000, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=count).astype(F32)


def long_tails(count: int = 50_000, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_t(3, count).astype(F32)


SHAPES = {
    "normal": normal(),
    "one-sided": np.abs(normal(seed=1)),
    "negative": -np.abs(normal(seed=2)),
    "shifted": normal(seed=3) + F32(5),
    "an outlier": np.append(normal(seed=4), F32(60)),
    "outliers on both sides": np.concatenate([normal(seed=5), F32([-80, 40])]),
    "long tails": long_tails(5000, 6),
    "a far outlier": np.append(normal(50_000), F32(1000)),
    "HardSwish": 3 * normal(seed=12) * np.clip(3 * normal(seed=12) + 3, 0, 6) / F32(6),
    "two values": np.tile(F32([-1, 3]), 500),
    "skewed": np.append(F32([-300] * 5), np.abs(normal(seed=7))),
    "constant": np.full(500, 2.5, F32),
    "negative constant": np.full(500, -0.1, F32),
    "zeros": np.zeros(500, F32),
    "negative zeros": np.append(np.full(500, -0.0, F32), np.abs(normal(seed=8))),
    "denormal": np.full(500, 1e-42, F32),
    "denormals": normal(seed=9) * F32(1e-40),
    "huge": normal(seed=10) * F32(1e30),
    "one value": F32([-7]),
}


def check_within(values: Array, found: tuple[float, float]) -> None:
    low, high = found
    assert np.isfinite([low, high]).all()
    assert low <= high
    slack = 1e-9 * max(abs(low), abs(high))
    assert min(float(values.min()), 0) - slack <= low
    assert high <= max(float(values.max()), 0) + slack


# ---- all methods


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_range_lies_within_the_extremes(name: str, shape: str) -> None:
    values = SHAPES[shape]
    made, samples = stats(values), stats(*np.array_split(values, 3))
    for grid in GRIDS:
        check_within(values, METHODS[name](made, grid))
        check_within(values, METHODS[name](samples, grid))
    assert METHODS[name](made) == METHODS[name](made, Grid(256, symmetric=False))


@pytest.mark.parametrize("name", METHODS)
def test_nothing_seen(name: str) -> None:
    assert METHODS[name](TensorStats()) == (0.0, 0.0)
    assert METHODS[name](stats(np.zeros((0, 3), F32))) == (0.0, 0.0)


@pytest.mark.parametrize("name", METHODS)
def test_zeros_and_constants(name: str) -> None:
    assert METHODS[name](stats(np.zeros(5000, F32))) == (0.0, 0.0)
    for value in (2.5, -0.1, 1e30, 1e-42):
        low, high = METHODS[name](stats(np.full(5000, value, F32)))
        end = high if value > 0 else low
        assert end == pytest.approx(float(F32(value)), rel=1e-6)


@given(
    values=npst.arrays(F32, st.integers(1, 60), elements=st.floats(-1e6, 1e6, width=32)),
    name=st.sampled_from(sorted(METHODS)),
    grid=st.sampled_from(GRIDS),
)
def test_any_values(values: Array, name: str, grid: Grid) -> None:
    check_within(values, METHODS[name](stats(values), grid))


def test_which_need_a_histogram() -> None:
    """Those that do not are right without one."""
    samples = [normal(20_000, seed) for seed in range(10)] + [F32([1000])]
    bare, full = stats(*samples, histogram=False), stats(*samples)
    for name in METHODS:
        assert (METHODS[name](bare) == METHODS[name](full)) == (name not in HISTOGRAM_METHODS)
        assert METHODS[name](bare) == minmax(bare) or name not in HISTOGRAM_METHODS
        assert needs_histogram(name) == (name in HISTOGRAM_METHODS)
    assert needs_histogram("auto")
    assert needs_histogram("percentile:99.9")
    assert set(AUTO) <= set(METHODS)


# ---- names


def test_methods_by_name() -> None:
    for name in METHODS:
        assert method(name) is METHODS[name]
    made = stats(normal(50_000))
    for text, percent in [("99.9", 99.9), ("50", 50), ("100", 100), ("9.9e1", 99)]:
        assert method(f"percentile:{text}")(made, FEW) == percentile(made, FEW, percent)
    assert method("percentile")(made, FEW) == percentile(made, FEW, PERCENT)
    assert method("percentile:100")(made, FEW) == pytest.approx(minmax(made))


KNOWN = "not one of auto, minmax, mean, moving-average, percentile, mse, kl, percentile:99.9 or the like."


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("minmx", " Did you mean 'minmax'?"),
        ("percentil:99", " Did you mean 'percentile'?"),
        ("mse:3", " Did you mean 'mse'?"),
        ("entropy", ""),
        ("", ""),
        (":99", ""),
    ],
)
def test_wrong_names(name: str, more: str) -> None:
    with pytest.raises(RecipeError) as caught:
        method(name)
    assert str(caught.value) == f"ranges is {name!r}, {KNOWN}{more}"


@pytest.mark.parametrize("text", ["49.9", "100.1", "-99", "nan", "inf", "x", "99,9", "99:9"])
def test_wrong_percentages(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        method(f"percentile:{text}")
    assert str(caught.value) == (
        f"ranges is 'percentile:{text}': give a percentage from 50 to 100, as percentile:99.99."
    )


# ---- minmax, mean, moving-average


def test_minmax() -> None:
    assert minmax(stats(F32([1, 2]), F32([-3, 0.5]))) == (-3, 2)


@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 12))
def test_averages_against_loops(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [
        (rng.normal(size=4096) * rng.lognormal() + rng.normal()).astype(F32) for _ in range(count)
    ]
    lows, highs = ([float(end(v)) for v in samples] for end in (np.min, np.max))
    made = stats(*samples, histogram=False)
    assert mean(made) == pytest.approx((sum(lows) / count, sum(highs) / count))
    for constant in (0.01, 0.5):
        low, high = lows[0], highs[0]
        for a, b in zip(lows[1:], highs[1:], strict=True):
            low = (1 - constant) * low + constant * a
            high = (1 - constant) * high + constant * b
        assert moving_average(made, FEW, constant) == pytest.approx((low, high))


@pytest.mark.parametrize("name", ["mean", "moving-average"])
def test_averages_of_small_tensors_are_their_whole_range(name: str) -> None:
    """4096 values a sample decide, whatever the single samples have."""
    average = METHODS[name]
    assert average(stats(F32([0, 1]), F32([0.2, 0.4]))) == (0, 1)
    large, small = np.linspace(0, 1, 8190, dtype=F32), F32([0.5])
    assert average(stats(large, small)) == (0, 1)
    assert average(stats(np.linspace(0, 1, 8191, dtype=F32), small)) != (0, 1)


def test_averages_of_very_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean is of all; the moving average of the last ones, which are all that weighs."""
    monkeypatch.setattr(stats_module, "KEPT", 20)
    monkeypatch.setattr(stats_module, "RECENT", 10)
    tops = [float(1 + n % 7) for n in range(25)]
    made = stats(*(np.linspace(0, top, 4096, dtype=F32) for top in tops), histogram=False)
    assert mean(made) == pytest.approx((0, sum(tops) / 25))
    average = tops[15]
    for top in tops[16:]:
        average += 0.5 * (top - average)
    assert moving_average(made, FEW, 0.5) == pytest.approx((0, average))


# ---- percentile


@pytest.mark.parametrize("percent", [90, 98, 99.8, 99.98])
@pytest.mark.parametrize("shape", ["normal", "one-sided", "negative", "shifted", "long tails"])
def test_percentile_is_the_exact_quantile(shape: str, percent: float) -> None:
    values = SHAPES[shape]
    tail = (1 - percent / 100) / 2
    ends = np.quantile(values.astype(np.float64), [tail, 1 - tail], method="inverted_cdf")
    made = stats(values)
    assert percentile(made, FEW, percent) == pytest.approx(tuple(ends), abs=0.005 * made.span)


def test_percentile_cuts_outliers_only_if_they_are_rare() -> None:
    usual = [normal(60_000, seed) for seed in range(8)]
    assert percentile(stats(*usual, F32([1000])))[1] < 10
    assert percentile(stats(*usual, np.full(100, 1000, F32)))[1] == 1000


# ---- mse


def squared_error(values: Array, found: tuple[float, float], grid: Grid) -> float:
    """What the codes of a range leave of the raw values; zero is one of them."""
    low, high = min(found[0], 0.0), max(found[1], 0.0)
    if grid.symmetric:
        below = above = grid.levels // 2 - 1
        step = max(-low, high) / above
    else:
        step = (high - low) / (grid.levels - 1)
        below = int(np.rint(-low / step))
        above = grid.levels - 1 - below
    x = values.astype(np.float64)
    return float(np.square(np.clip(np.rint(x / step), -below, above) * step - x).sum())


SMOOTH = [name for name in SHAPES if name not in ("zeros", "denormals", "two values")]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", SMOOTH)
def test_mse_is_not_worse_than_minmax(shape: str, grid: Grid) -> None:
    """But of few values, and where a bin is wider than a step (those below 2**-126)."""
    values = SHAPES[shape]
    made = stats(values)
    most = squared_error(values, minmax(made), grid)
    noise = 1e-12 * float(np.square(values, dtype=np.float64).sum())
    assert squared_error(values, mse(made, grid), grid) <= 1.02 * most + noise


@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 30), grid=st.sampled_from(GRIDS), tails=st.floats(3, 30))
def test_mse_is_not_worse_than_minmax_on_any_tails(seed: int, grid: Grid, tails: float) -> None:
    values = np.random.default_rng(seed).standard_t(tails, 20_000).astype(F32)
    made = stats(values)
    most = squared_error(values, minmax(made), grid)
    assert squared_error(values, mse(made, grid), grid) <= 1.02 * most


@pytest.mark.parametrize(
    "shape",
    ["normal", "one-sided", "negative", "an outlier", "outliers on both sides", "long tails"],
)
def test_mse_against_all_pairs_of_ends(shape: str) -> None:
    values = SHAPES[shape]
    factors = np.geomspace(1, 0.05, 20)
    lows = min(float(values.min()), 0.0) * factors if values.min() < 0 else [0.0]
    highs = max(float(values.max()), 0.0) * factors if values.max() > 0 else [0.0]
    best = min(squared_error(values, (a, b), FEW) for a in lows for b in highs)
    assert squared_error(values, mse(stats(values), FEW), FEW) <= 1.1 * best


def test_mse_cuts_an_outlier_but_not_what_counts() -> None:
    """Of a million values: (T - 1000)^2 + 1e6 (T / 255)^2 / 12 is least at T = 437."""
    spread = np.random.default_rng(0).normal(scale=5, size=50_000).astype(F32)
    low, high = mse(stats(*[spread] * 20, F32([1000])))
    assert high == pytest.approx(437, rel=0.1)
    assert -30 < low < -10
    assert mse(stats(np.linspace(-1, 1, 10_000, dtype=F32))) == pytest.approx((-1, 1), rel=0.1)


# ---- mse, kl


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["mse", "kl"])
def test_fewer_codes_saturate_more(name: str, symmetric: bool) -> None:
    made = stats(long_tails())
    found = [METHODS[name](made, Grid(n, symmetric)) for n in (16, 64, 256, 1024)]
    widths = np.array([high - low for low, high in found])
    assert (widths[1:] >= 0.99 * widths[:-1]).all()
    assert widths[0] < 0.6 * widths[-1]


# ---- kl


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_kl_cuts_long_tails(sign: int, symmetric: bool) -> None:
    for values in (sign * long_tails(), sign * np.abs(long_tails())):
        made = stats(values)
        low, high = kl(made, Grid(256, symmetric))
        assert high - low < 0.7 * made.span
        assert max(-low, high) > 2 * np.abs(values).mean()


def test_kl_cuts_a_lone_outlier() -> None:
    """Far away from all else, it holds no information worth 255 codes."""
    for end in (60, -60):
        low, high = kl(stats(np.append(normal(100_000), F32(end))))
        assert max(-low, high) < 30
        assert min(-low, high) > 2.5


def test_kl_keeps_what_is_spread_evenly() -> None:
    low, high = kl(stats(np.linspace(-1, 1, 50_000, dtype=F32)))
    assert (low, high) == pytest.approx((-1, 1), rel=0.05)
    assert kl(stats(np.linspace(0, 3, 50_000, dtype=F32))) == pytest.approx((0, 3), rel=0.05)


def test_kl_of_one_side() -> None:
    """All codes are for it, unless the grid is symmetric."""
    made = stats(np.append(np.abs(normal(50_000)), F32(100)))
    low, high = kl(made)
    assert 0 <= low < 0.01
    assert 2.5 < high < 50
    assert kl(made, Grid(512, symmetric=True)) == (low, high)


def test_kl_of_other_zeros() -> None:
    values = np.abs(long_tails())
    for zero in (0.0, -0.0):
        assert kl(stats(np.append(values, np.full(9, zero, F32)))) == kl(
            stats(np.append(values, np.zeros(9, F32)))
        )
