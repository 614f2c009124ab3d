"""Scales of SmoothQuant, against the formula and against no scale on held-out rows."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.algo.smoothquant import product_error, search_scale, smoothing_scale
from qcompile.quant.scheme import Scheme

SCHEME = Scheme.parse("int8.axis1.sym")


def outliers(seed: int, rows: int = 64, depth: int = 32) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, depth)).astype(np.float32)
    x[:, :2] *= 60
    return x


def test_the_formula() -> None:
    peak, reach = np.array([8.0, 2.0, 1.0]), np.array([0.5, 0.25, 1.0])
    wanted = peak**0.5 / reach**0.5
    made = smoothing_scale(peak, reach, 0.5)
    np.testing.assert_allclose(made / made[0], wanted / wanted[0], rtol=1e-6)
    assert np.exp(np.log(made).mean()) == pytest.approx(1.0, rel=1e-5)


def test_outlier_channels_are_smoothed() -> None:
    weight = np.random.default_rng(9).normal(size=(32, 24)).astype(np.float32)
    found = search_scale([outliers(0), outliers(1)], [outliers(2)], [weight], SCHEME)
    assert found is not None
    assert found.after < 0.5 * found.before
    assert found.before == pytest.approx(product_error([outliers(2)], weight, None, SCHEME))


def test_what_gains_nothing_is_left() -> None:
    x = [np.random.default_rng(i).uniform(-1, 1, (64, 32)).astype(np.float32) for i in range(3)]
    weight = np.random.default_rng(9).uniform(-1, 1, (32, 24)).astype(np.float32)
    assert search_scale(x[:2], x[2:], [weight], SCHEME) is None
    assert search_scale([np.zeros((4, 32), np.float32)], x[2:], [weight], SCHEME) is None
