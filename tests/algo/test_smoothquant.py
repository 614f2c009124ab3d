from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qcompile.algo.smoothquant import (
    ALPHAS,
    Found,
    Sample,
    dynamic_error,
    outliers,
    row_budget,
    scales,
    search,
)
from qcompile.quant.scheme import Scheme

Array = NDArray[Any]
INT8 = Scheme.parse("int8.axis1.sym")
INT7 = Scheme.parse("int8.axis1.sym.7bit")


def activations(seed: int, *, rows: int = 40, k: int = 32, far: dict[int, float] | None = None) -> Array:  # fmt: skip
    """Normal rows, some channels many times as large."""
    x = np.random.default_rng([1, seed]).normal(size=(rows, k))
    for channel, factor in (far or {}).items():
        x[:, channel] *= factor
    return x.astype(np.float32)


def weights(seed: int = 0, *, k: int = 32, n: int = 24) -> Array:
    return np.random.default_rng([2, seed]).normal(size=(k, n)).astype(np.float32)


def slow_error(
    xs: list[Array], w: Array, s: Array | None, keep: tuple[int, ...], levels: int
) -> float:
    """Sample by sample, row by row, as the operators are defined."""
    s = np.ones(len(w), np.float32) if s is None else s
    scaled = w * s[:, None]
    scaled[list(keep)] = 0
    step = np.abs(scaled).max(axis=0) / levels
    step[step == 0] = 1
    rounded = np.rint(scaled / step) * step
    ratios = []
    for x in xs:
        z = x / s
        z[:, list(keep)] = 0
        low, high = min(z.min(), 0), max(z.max(), 0)
        unit = (high - low) / 255 or 1
        zero = round(-low / unit)
        codes = np.clip(np.rint(z / unit) + zero, 0, 255)
        made = (codes - zero) * unit @ rounded + x[:, list(keep)] @ w[list(keep)]
        wanted = x.astype(np.float64) @ w
        power = (wanted**2).sum(axis=1)
        ratios += list(((made - wanted) ** 2).sum(axis=1) / (power + 0.1 * power.mean()))
    return float(np.mean(ratios))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000), scaled=st.booleans(), narrow=st.booleans(),
    keep=st.sets(st.integers(0, 31), max_size=4), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
)  # fmt: skip
def test_the_error_is_that_of_the_operators(
    seed: int, scaled: bool, narrow: bool, keep: set[int], sizes: list[int]
) -> None:
    xs = [activations(seed + i, rows=n, far={3: 30.0}) * (i + 1) for i, n in enumerate(sizes)]
    w = weights(seed)
    s = np.random.default_rng(seed).uniform(0.1, 10, 32).astype(np.float32) if scaled else None
    kept = tuple(sorted(keep))
    ours = dynamic_error([Sample.of(x) for x in xs], w, INT7 if narrow else INT8, s, kept)
    # a code on a tie may round either way
    levels = 63 if narrow else 127
    assert ours == pytest.approx(slow_error(xs, w, s, kept, levels), rel=0.02)


def test_a_sample_of_zeros_has_no_error() -> None:
    zeros = Sample.of(np.zeros((3, 32), np.float32))
    assert dynamic_error([zeros], weights(), INT8) == 0


def test_a_sample_keeps_the_bounds_of_the_rows_that_it_drops() -> None:
    x = activations(0, rows=1000)
    x[500, 7] = 99
    sample = Sample.of(x, 16)
    assert len(sample.rows) <= 16
    assert any((row == x[500]).all() for row in sample.rows)  # the largest row
    np.testing.assert_array_equal(sample.low, x.min(axis=0))
    np.testing.assert_array_equal(sample.high, x.max(axis=0))
    assert all((x == row).all(axis=1).any() for row in sample.rows)


def test_a_sample_is_a_copy() -> None:
    x = activations(0)
    sample = Sample.of(x)
    x[:] = 0
    assert np.abs(sample.rows).min() > 0


def test_bounds_include_zero() -> None:
    sample = Sample.of(np.array([[1, -2], [3, -4]], np.float32))
    assert sample.low.tolist() == [0, -4]
    assert sample.high.tolist() == [3, 0]


@given(
    seed=st.integers(0, 1000), alpha=st.floats(0, 1), dead=st.sets(st.integers(0, 9), max_size=9)
)
def test_scales_have_geometric_mean_1(seed: int, alpha: float, dead: set[int]) -> None:
    rng = np.random.default_rng(seed)
    peak, reach = rng.uniform(0.01, 100, 10), rng.uniform(0.01, 100, 10)
    peak[list(dead)] = 0
    s = scales(peak, reach, alpha)
    assert s.dtype == np.float32
    assert np.isfinite(s).all() and (s > 0).all()
    assert np.exp(np.log(s.astype(np.float64)).mean()) == pytest.approx(1, rel=1e-4)
    if not dead:
        wanted = peak**alpha / reach ** (1 - alpha)
        np.testing.assert_allclose(s / s[0], wanted / wanted[0], rtol=1e-4)


def test_scales_of_nothing_are_1() -> None:
    np.testing.assert_allclose(scales(np.zeros(3), np.zeros(3), 0.5), 1)


@pytest.mark.parametrize(
    ("far", "found"),
    [({}, ()), ({5: 3.9}, ()), ({5: 50.0}, (5,)), ({9: 80.0, 5: 50.0}, (5, 9)),
     (dict.fromkeys(range(10), 50.0), ())],
)  # fmt: skip
def test_outliers_tower_over_the_rest(far: dict[int, float], found: tuple[int, ...]) -> None:
    peak = np.ones(100)
    for channel, value in far.items():
        peak[channel] = value
    assert outliers(peak) == found


def test_of_few_channels_none_is_an_outlier() -> None:
    assert outliers(np.array([1.0, 100.0])) == ()
    assert outliers(np.array([1.0] * 9 + [100.0]), 0) == ()


def found(far: dict[int, float], *, most: int = 4, scheme: Scheme = INT8) -> Any:
    ours, theirs = ([Sample.of(activations(a + i, far=far)) for i in range(4)] for a in (0, 50))
    return search(ours, theirs, [weights(), weights(1)], scheme, most=most)


def test_channels_of_different_sizes_are_smoothed() -> None:
    far = {i: 1.15**i for i in range(32)}
    best = found(far)
    assert best.alpha in ALPHAS
    assert best.keep == ()
    assert best.after < 0.9 * best.before
    joined = np.concatenate([weights(), weights(1)], axis=1)
    theirs = [Sample.of(activations(50 + i, far=far)) for i in range(4)]
    assert best.before == pytest.approx(dynamic_error(theirs, joined, INT8))
    assert best.after == pytest.approx(dynamic_error(theirs, joined, INT8, best.scale))
    ours = [Sample.of(activations(i, far=far)) for i in range(4)]
    peak = np.max([np.maximum(-s.low, s.high) for s in ours], axis=0)
    reach = np.abs(joined).max(axis=1)
    tried = {a: dynamic_error(ours, joined, INT8, scales(peak, reach, a)) for a in ALPHAS}
    assert best.alpha == min(tried, key=tried.__getitem__)


def test_an_outlier_stays_float() -> None:
    best = found({7: 3000.0})
    assert best.keep == (7,)
    assert best.scale[7] == 1
    assert best.after < 0.9 * found({7: 3000.0}, most=0).after


@pytest.mark.parametrize(("share", "keep"), [(0.89, (7,)), (0.91, ())])
def test_channels_stay_float_only_for_another_tenth(
    monkeypatch: pytest.MonkeyPatch, share: float, keep: tuple[int, ...]
) -> None:
    plain = found({7: 30.0}, most=0)
    split = Found(plain.scale, None, (7,), plain.before, share * plain.after)
    monkeypatch.setattr("qcompile.algo.smoothquant._split", lambda *_: split)
    assert found({7: 30.0}).keep == keep


def test_equal_channels_are_left_alone() -> None:
    assert found({}) is None


def test_what_helps_on_the_samples_alone_is_refused() -> None:
    ours = [Sample.of(activations(0, far={i: 1.2**i for i in range(32)}))]
    theirs = [Sample.of(activations(1, far={i: 1.2 ** (31 - i) for i in range(32)}))]
    assert search(ours, ours, [weights()], INT8) is not None
    assert search(ours, theirs, [weights()], INT8) is None


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_inputs_without_a_scale(value: float) -> None:
    x = Sample.of(np.full((4, 32), value, np.float32))
    with np.errstate(all="ignore"):
        assert search([x], [x], [weights()], INT8) is None


def test_no_rows() -> None:
    none, some = Sample.of(np.zeros((0, 32), np.float32)), Sample.of(activations(0))
    for ours, theirs in (([], [some]), ([none], [some]), ([some], []), ([some], [none])):
        assert search(ours, theirs, [weights()], INT8) is None


def test_weights_of_zeros() -> None:
    x = Sample.of(activations(0, far={7: 100.0}))
    assert search([x], [x], [np.zeros((32, 8), np.float32)], INT8) is None


def test_wide_weights_are_measured_on_some_columns() -> None:
    far = {i: 1.15**i for i in range(32)}
    ours, theirs = ([Sample.of(activations(a, far=far))] for a in (0, 50))
    wide = weights(n=400)
    thin, whole = (search(ours, theirs, [wide], INT8, columns=c) for c in (100, 400))
    assert thin is not None and whole is not None
    assert thin.before == pytest.approx(whole.before, rel=0.3)
    assert thin.before != whole.before


@pytest.mark.parametrize(
    ("shape", "samples", "budget"),
    [((64, 64), 16, 256), ((1536, 384), 16, 14), ((1536, 8192), 16, 14), ((100_000, 384), 16, 8)],
)
def test_the_budget_of_rows(shape: tuple[int, int], samples: int, budget: int) -> None:
    assert row_budget([np.zeros(shape, np.int8)], samples, 256) == budget
