"""Kullback-Leibler divergence with prefix sums against the distributions themselves, built bin by bin."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qcompile.calib.divergence import BINS, TINY, all_divergences, best_threshold, linear
from qcompile.calib.histogram import UNIT, Histogram

Array = NDArray[Any]
F32 = np.float32


def distributions(counts: list[float], end: int, levels: int) -> tuple[list[float], list[float]]:
    """P: what is saturated added to the last bin. Q: in each code's bins the filled ones share evenly."""
    kept = sum(counts[:end])
    p = counts[:end]
    p[-1] += sum(counts[end:])
    q = [TINY * kept] * end
    for code in range(levels):
        inside = range(end * code // levels, end * (code + 1) // levels)
        filled = [b for b in inside if counts[b] > 0]
        for b in filled:
            q[b] = sum(counts[b] for b in inside) / len(filled)
    return [n / sum(p) for n in p], [n / kept if kept else 0.0 for n in q]


def divergence(counts: list[float], end: int, levels: int) -> float:
    if not sum(counts[:end]):
        return math.inf
    p, q = distributions(counts, end, levels)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def check(numbers: Array, levels: int) -> None:
    counts = [float(n) for n in numbers]
    wanted = [divergence(counts, end, levels) for end in range(levels, len(counts) + 1)]
    found = all_divergences(np.array(counts), levels)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    best = best_threshold(np.array(counts), levels)
    assert levels <= best <= len(counts)
    first = levels + int(np.argmin(wanted))
    assert best == first or math.isclose(
        wanted[best - levels], wanted[first - levels], rel_tol=1e-9, abs_tol=1e-12
    )


kinds = st.sampled_from(["dense", "sparse", "few", "decay", "large", "parts"])


def draw(kind: str, bins: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    if kind == "dense":
        return rng.integers(1, 50, bins)
    if kind == "sparse":  # most bins are empty
        return rng.integers(1, 50, bins) * (rng.random(bins) < 0.2)
    if kind == "few":
        counts = np.zeros(bins, int)
        counts[rng.integers(0, bins, 3)] = rng.integers(1, 1000, 3)
        return counts
    if kind == "decay":
        return np.round(10_000 * np.exp(-np.arange(bins) / bins * rng.uniform(1, 20))).astype(int)
    if kind == "large":
        return rng.integers(0, 1 << 40, bins)
    return rng.exponential(1, bins)


@given(kind=kinds, bins=st.integers(8, 64), levels=st.integers(1, 16), seed=st.integers(0, 1 << 30))
def test_against_the_distributions(kind: str, bins: int, levels: int, seed: int) -> None:
    check(draw(kind, bins, seed), min(levels, bins))


@given(
    counts=st.lists(st.integers(0, 3), min_size=6, max_size=24).filter(any),
    levels=st.integers(1, 6),
)
def test_against_the_distributions_with_holes(counts: list[int], levels: int) -> None:
    check(np.array(counts), levels)


def test_all_thresholds_of_full_size() -> None:
    """2048 bins and the 128 codes of one side; of the slow way every 40th threshold."""
    counts = draw("decay", BINS, 0) * (np.random.default_rng(1).random(BINS) < 0.9)
    plain = [float(n) for n in counts]
    found = all_divergences(counts.astype(np.float64), 128)
    ends = [*range(128, BINS, 40), BINS]
    wanted = [divergence(plain, end, 128) for end in ends]
    np.testing.assert_allclose(found[np.array(ends) - 128], wanted, rtol=1e-9, atol=1e-12)
    best = best_threshold(counts.astype(np.float64), 128)
    assert math.isclose(divergence(plain, best, 128), found.min(), rel_tol=1e-9)
    assert found.min() <= min(wanted) + 1e-12


def test_nothing_is_lost_of_a_step_function() -> None:
    """Bins that are even within each code: the whole range is free."""
    counts = np.repeat([5.0, 3, 8, 1], 4)
    assert all_divergences(counts, 4)[-1] == pytest.approx(0, abs=1e-12)
    assert best_threshold(counts, 4) == 16


def test_the_first_of_equals() -> None:
    """A single bin, kept by all thresholds, costs nothing with any of them."""
    assert best_threshold(np.array([0, 7.0, 0, 0, 0, 0]), 3) == 3
    assert best_threshold(np.array([0, 0, 0, 0, 0, 7.0]), 3) == 6


def test_thresholds_that_keep_nothing_are_infinite() -> None:
    found = all_divergences(np.array([0, 0, 0, 0, 2.0, 3]), 2)
    assert np.isinf(found).tolist() == [True] * 3 + [False] * 2
    assert np.isinf(all_divergences(np.zeros(8), 2)).all()


@given(kind=kinds, seed=st.integers(0, 1 << 30), factor=st.sampled_from([0.5, 3.0, 1e6]))
def test_only_shares_matter(kind: str, seed: int, factor: float) -> None:
    counts = draw(kind, 40, seed).astype(np.float64)
    scaled = all_divergences(counts * factor, 8)
    np.testing.assert_allclose(scaled, all_divergences(counts, 8), rtol=1e-9, atol=1e-11)


# ---- equal bins


def counted(values: Array) -> Histogram:
    made = Histogram()
    made.count(np.asarray(values, F32))
    return made


def spread(histogram: Histogram, top: float, bins: int) -> list[float]:
    """What each bin of the histogram, spread evenly, leaves in each equal bin; beyond `top` in the last."""
    counts = [0.0] * bins
    filled = histogram.bins()
    for low, high, count in zip(filled.low, filled.high, filled.counts, strict=True):
        first, last = min(abs(low), abs(high)), max(abs(low), abs(high))
        if not last:
            continue  # zeros
        for b in range(bins):
            begin, end = top * b / bins, top * (b + 1) / bins if b < bins - 1 else math.inf
            counts[b] += count * max(min(last, end) - max(first, begin), 0.0) / (last - first)
    counts[0] = counts[1]
    return counts


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1 << 30),
    exponent=st.integers(-37, 30),
    offset=st.sampled_from([0.0, 3.0, -3.0]),
    bins=st.sampled_from([8, 64]),
)
def test_equal_bins(seed: int, exponent: int, offset: float, bins: int) -> None:
    draws = np.random.default_rng(seed).normal(offset, 1, 60)
    draws[:5] = 0
    values = (draws * 10.0**exponent).astype(F32)
    top = float(np.abs(values).max())
    histogram = counted(values)
    found = linear(histogram, top, bins)
    np.testing.assert_allclose(found, spread(histogram, top, bins), rtol=1e-9, atol=1e-6)


def test_equal_bins_against_the_values() -> None:
    values = np.random.default_rng(0).normal(size=50_000).astype(F32)
    magnitudes = np.abs(values.astype(np.float64))
    top = float(magnitudes.max())
    found = linear(counted(values), top) / UNIT
    wanted = np.histogram(magnitudes, BINS, (0, top))[0]
    assert found[1:].sum() == pytest.approx(wanted[1:].sum(), rel=1e-3)
    np.testing.assert_allclose(  # but for the values of a bin of the histogram
        np.cumsum(found[1:]), np.cumsum(wanted[1:]), atol=0.01 * values.size
    )


def test_zeros_count_as_much_as_the_second_bin() -> None:
    values = np.append(np.zeros(10_000), np.linspace(0.1, 4, 40))
    found = linear(counted(values), 4.0, 4)
    assert found[0] == found[1]
    assert found.sum() < 60 * UNIT


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_neither_zero_is_a_magnitude(zero: float) -> None:
    values = np.linspace(-1, 1, 1001)
    plain = linear(counted(values), 1.0, 64)
    np.testing.assert_array_equal(linear(counted(np.append(values, [zero] * 99)), 1.0, 64), plain)


def test_what_has_no_magnitude() -> None:
    assert not linear(counted(np.zeros(9)), 1.0, 8).any()
    assert not linear(Histogram(), 1.0, 8).any()
