"""Scales of channels: the closed form, and less rounding noise on made-up layers than without."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.algo.equalization import (
    Carrier,
    Reader,
    best_scale,
    high_bias,
    predicted_error,
)


def layer(seed: int, channels: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    spread = 10 ** rng.uniform(-1.5, 0, channels)
    return np.abs(rng.normal(size=(512, channels))) * spread, rng.normal(size=(8, channels))


def carrier(x: np.ndarray, w: np.ndarray, *, dense: bool) -> Carrier:
    reader = Reader((w**2).sum(axis=0), np.abs(w) if dense else None)
    return Carrier(x.max(axis=0), (x**2).mean(axis=0), (reader,))


def true_noise(x: np.ndarray, w: np.ndarray, s: np.ndarray) -> float:
    """Rounding of both, simulated."""
    step = (x / s).max() / 255
    rows = np.abs(w * s).max(axis=1, keepdims=True) / 127
    y = (np.rint(x / s / step) * step) @ (np.rint(w * s / rows) * rows).T
    return float(((y - x @ w.T) ** 2).sum() / ((x @ w.T) ** 2).sum())


@pytest.mark.parametrize("seed", range(5))
def test_less_noise_on_other_samples(seed: int) -> None:
    x, w = layer(seed)
    made = carrier(x[:256], w, dense=True)
    s = best_scale([made])
    assert s is not None
    assert predicted_error([made], s) < predicted_error([made], np.ones(16))
    assert true_noise(x[256:], w, s) < true_noise(x[256:], w, np.ones(16))


def test_depthwise_readers_get_one_range() -> None:
    x, w = layer(0)
    s = best_scale([carrier(x, w, dense=False)])
    assert s is not None
    reach = x.max(axis=0) / s
    np.testing.assert_allclose(reach, reach[0])


@given(st.integers(0, 1000), st.floats(0.5, 6.0))
def test_a_clip_is_not_reached_by_what_was_seen(seed: int, top: float) -> None:
    x, w = layer(seed)
    x = np.minimum(x, 1.0) * top
    s = best_scale([carrier(x, w, dense=False)], limit=6.0)
    if s is not None:
        assert s.max() <= 1 + 1e-9
        assert (x.max(axis=0) / s <= 6.0 + 1e-9).all()


def test_alike_channels_are_left() -> None:
    x = np.abs(np.random.default_rng(0).normal(size=(512, 16)))
    assert best_scale([Carrier(np.ones(16), (x**2).mean(axis=0), (Reader(np.ones(16)),))]) is None


# ---- high biases


def test_the_least_value_less_a_margin_is_absorbed() -> None:
    shift = high_bias(np.array([0.0, 10.0, 0.5]), np.array([2.0, 12.0, 2.5]))
    assert shift is not None
    np.testing.assert_allclose(shift, [0, 9.8, 0.3])


def test_nothing_is_absorbed_where_the_range_stays_as_wide() -> None:
    assert high_bias(np.array([0.0, 9.0]), np.array([10.0, 10.0])) is None
    assert high_bias(np.zeros(2), np.ones(2)) is None


def test_channels_near_an_upper_bound_keep_their_bias() -> None:
    low, high = np.array([5.0, 4.0]), np.array([6.0, 5.0])
    assert high_bias(low, high, limit=6.0) is None
    shift = high_bias(low, high, limit=7.0)
    assert shift is not None
    np.testing.assert_allclose(shift, [4.9, 3.9])
