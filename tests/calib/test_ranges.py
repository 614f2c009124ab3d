"""Each range method against a slow one on the raw values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from qcompile.calib.ranges import HISTOGRAM_METHODS, METHODS, kl, mean, minmax, mse, percentile
from qcompile.calib.stats import TensorStats

Array = NDArray[Any]
F32 = np.float32
BIN = 1 / 128  # relative width of a bin of the histogram


def stats(*samples: Array) -> TensorStats:
    made = TensorStats()
    for values in samples:
        assert made.add(np.asarray(values, F32), histogram=True, channels=False)
    return made


def normal(count: int = 4000, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=count).astype(F32)


SHAPES = {
    "normal": normal(),
    "one-sided": np.abs(normal(seed=1)),
    "negative": -np.abs(normal(seed=2)),
    "shifted": normal(seed=3) + F32(5),
    "an outlier": np.append(normal(seed=4), F32(60)),
    "outliers on both sides": np.concatenate([normal(seed=5), F32([-80, 40])]),
    "long tails": (normal(seed=6) ** 3).astype(F32),
    "two values": np.tile(F32([-1, 3]), 500),
    "constant": np.full(500, 2.5, F32),
    "zeros": np.zeros(500, F32),
    "denormal": np.full(500, 1e-42, F32),
    "huge": normal(seed=7) * F32(1e30),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_range_lies_within_the_extremes(method: str, name: str) -> None:
    values = SHAPES[name]
    low, high = METHODS[method](stats(values))
    assert np.isfinite([low, high]).all()
    assert low <= high
    slack = 1e-6 * max(abs(low), abs(high))
    assert min(values.min(), 0) - slack <= low
    assert high <= max(values.max(), 0) + slack


@pytest.mark.parametrize("method", METHODS)
def test_nothing_seen(method: str) -> None:
    assert METHODS[method](TensorStats()) == (0.0, 0.0)
    assert METHODS[method](stats(np.zeros((0, 3), F32))) == (0.0, 0.0)


@given(
    values=npst.arrays(F32, st.integers(1, 300), elements=st.floats(-1e6, 1e6, width=32)),
    method=st.sampled_from(sorted(METHODS)),
)
def test_any_values(values: Array, method: str) -> None:
    low, high = METHODS[method](stats(values))
    slack = 1e-6 * float(np.abs(values).max()) + 1e-40
    assert min(values.min(), 0) - slack <= low <= high <= max(values.max(), 0) + slack


def test_which_need_a_histogram() -> None:
    """Those that do not are right without one."""
    samples = [normal(50_000)] * 20 + [F32([1000])]
    bare = TensorStats()
    for values in samples:
        bare.add(values, histogram=False, channels=False)
    for method in METHODS:
        same = METHODS[method](bare) == METHODS[method](stats(*samples))
        assert same == (method not in HISTOGRAM_METHODS)


# ---- minmax, mean


def test_minmax() -> None:
    assert minmax(stats(F32([1, 2]), F32([-3, 0.5]))) == (-3, 2)


def test_mean_of_the_extremes() -> None:
    samples = [np.append(normal(5000, seed), F32([-10 - seed, 20 + 2 * seed])) for seed in range(3)]
    assert mean(stats(*samples)) == (-11, 22)


def test_mean_of_small_tensors_is_their_whole_range() -> None:
    """4096 values a sample decide, whatever the single samples have."""
    gates = [F32([0, 1]), F32([0.2, 0.4])]
    assert mean(stats(*gates)) == (0, 1)
    large, small = np.linspace(0, 1, 8190, dtype=F32), F32([0.5])
    assert mean(stats(large, small)) == (0, 1)
    assert mean(stats(np.linspace(0, 1, 8191, dtype=F32), F32([0.5]))) != (0, 1)


# ---- percentile


@pytest.mark.parametrize("tail", [0.02, 0.1, 1e-5])
@pytest.mark.parametrize(
    "name", ["normal", "one-sided", "negative", "shifted", "an outlier", "long tails"]
)
def test_percentile_is_the_exact_quantile_within_a_bin(name: str, tail: float) -> None:
    values = SHAPES[name]
    ends = np.quantile(values, [tail / 2, 1 - tail / 2], method="inverted_cdf")
    for got, want in zip(percentile(stats(values), tail), ends, strict=True):
        assert got == pytest.approx(want, rel=BIN, abs=1e-3)


def test_percentile_cuts_outliers_only_if_they_are_rare() -> None:
    usual = [normal(60_000, seed) for seed in range(8)]
    assert percentile(stats(*usual, F32([1000])))[1] < 10
    assert percentile(stats(*usual, np.full(100, 1000, F32)))[1] == 1000


# ---- mse


def squared_error(values: Array, low: float, high: float, levels: int = 256) -> float:
    """Of rounding and saturation, on the raw values: the grid has a code at zero."""
    step = (high - low) / (levels - 1)
    if step <= 0:
        return float("inf")
    x = values.astype(np.float64)
    return float(np.square(np.round(np.clip(x, low, high) / step) * step - x).sum())


@pytest.mark.parametrize(
    "name",
    ["normal", "one-sided", "negative", "an outlier", "outliers on both sides", "long tails"],
)
def test_mse_against_all_pairs_of_ends(name: str) -> None:
    values = SHAPES[name]
    factors = np.geomspace(1, 0.05, 40)
    lows = min(float(values.min()), 0.0) * factors if values.min() < 0 else [0.0]
    highs = max(float(values.max()), 0.0) * factors if values.max() > 0 else [0.0]
    best = min(squared_error(values, low, high) for low in lows for high in highs)
    assert squared_error(values, *mse(stats(values))) <= 1.1 * best


def test_mse_cuts_an_outlier_but_not_what_counts() -> None:
    """Of a million values: (1000 - T)^2 + 1e6 (T / 255)^2 / 12 is least at T = 437."""
    low, high = mse(stats(*[normal(50_000)] * 20, F32([1000])))
    assert high == pytest.approx(437, rel=0.1)
    assert -6 < low < -1
    assert mse(stats(np.linspace(-1, 1, 10_000, dtype=F32))) == pytest.approx((-1, 1), rel=0.1)


@pytest.mark.parametrize("name", SHAPES)
def test_mse_is_not_worse_than_minmax(name: str) -> None:
    values = SHAPES[name]
    low, high = min(float(values.min()), 0), max(float(values.max()), 0)
    assert squared_error(values, *mse(stats(values))) <= 1.02 * squared_error(values, low, high)


# ---- kl


def test_kl_cuts_a_lone_outlier() -> None:
    """Far away from all else, it holds no information worth 255 codes."""
    for end in (60, -60):
        low, high = kl(stats(np.append(normal(100_000), F32(end))))
        assert max(-low, high) < 30
        assert min(-low, high) > 2.5


def test_kl_keeps_what_is_spread_evenly() -> None:
    low, high = kl(stats(np.linspace(-1, 1, 50_000, dtype=F32)))
    assert (low, high) == pytest.approx((-1, 1), rel=0.05)


def test_kl_of_one_side() -> None:
    low, high = kl(stats(np.append(np.abs(normal(50_000)), F32(100))))
    assert 0 <= low < 0.01
    assert 2.5 < high < 50
