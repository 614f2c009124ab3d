from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from block_weights import inputs, moment, weights

from qcompile.algo.awq import ALPHAS, find_scale, scales
from qcompile.algo.rtn import rtn
from qcompile.errors import DataError, ModelError

SCHEME: dict[str, Any] = {"bits": 3, "block": 16, "symmetric": True}


def tower(seed: int, rows: int = 400) -> np.ndarray:
    """Inputs of which a few are far larger than the rest."""
    x = inputs(seed, rows, 48, rank=40)
    x[:, [5, 23]] *= 20
    return x


def slow_error(W: np.ndarray, scale: np.ndarray, x: np.ndarray) -> float:
    """The mean squared error of the product of real inputs."""
    made = rtn(W * scale, **SCHEME).dequantize()
    off = x @ W.T.astype(np.float64) - (x / scale) @ made.T
    return float(np.square(off).sum(axis=1).mean()) / len(W)


def test_scales_are_powers_of_the_magnitude() -> None:
    made = scales(np.array([1, 4, 16.0]), 0.5)
    np.testing.assert_allclose(made, [0.5, 1, 2], rtol=1e-6)
    np.testing.assert_array_equal(scales(np.array([1, 0, 16.0]), 0), 1)
    assert np.all(scales(np.array([1, 0, 16.0]), 1) > 0)
    np.testing.assert_array_equal(scales(np.zeros(3), 1), 1)
    assert scales(np.zeros(0), 1).shape == (0,)


def test_errors_are_those_of_the_product() -> None:
    W, x, other = weights(0, 20, 48), tower(0), tower(1)
    found = find_scale([W], moment(x), moment(other), **SCHEME)
    assert found.before == pytest.approx(slow_error(W, np.ones(48), other), rel=1e-5)
    assert found.after == pytest.approx(slow_error(W, found.scale, other), rel=1e-4)
    errors = [slow_error(W, scales(np.sqrt(np.square(x).mean(axis=0)), a), x) for a in ALPHAS]
    assert found.alpha == ALPHAS[int(np.argmin(errors))]


def test_large_inputs_get_finer_weights() -> None:
    W = weights(0, 20, 48)
    found = find_scale([W], moment(tower(0)), moment(tower(1)), **SCHEME)
    assert found.after < 0.6 * found.before
    assert found.scale[[5, 23]].min() > 2 * np.median(found.scale)
    assert np.log(found.scale).mean() == pytest.approx(0, abs=1e-5)


def test_one_scale_serves_all_weights() -> None:
    """It is that of the sum of errors, not of the first weight's."""
    x, other = moment(tower(0)), moment(tower(1))
    small, large = weights(0, 20, 48), 50 * weights(1, 8, 48, "positive")
    both = find_scale([small, large], x, other, **SCHEME)
    alone = [find_scale([w], x, other, **SCHEME) for w in (small, large)]
    assert both.before == pytest.approx(sum(f.before for f in alone))
    assert both.alpha == alone[1].alpha != alone[0].alpha


def test_what_does_not_help_on_other_data_is_dropped() -> None:
    W, x = weights(0, 20, 48), tower(0)
    other = np.random.default_rng(0).normal(size=(400, 48))
    other[:, [5, 23]] *= 1e-3
    assert find_scale([W], moment(x), moment(x), **SCHEME).alpha > 0
    found = find_scale([W], moment(x), moment(other), **SCHEME)
    np.testing.assert_array_equal(found.scale, 1)
    assert found.alpha == 0
    assert found.after == found.before


def test_a_magnitude_may_be_given() -> None:
    W, H = weights(0, 20, 48), moment(tower(0))
    made = find_scale([W], H, H, magnitude=np.ones(48), **SCHEME)
    assert made.alpha == 0
    with pytest.raises(ValueError, match=r"magnitude is \(3,\)"):
        find_scale([W], H, H, magnitude=np.ones(3), **SCHEME)


def test_clipping_lowers_the_error_without_scales() -> None:
    W, H = weights(0, 20, 48), moment(tower(0))
    plain, clipped = (find_scale([W], H, H, clip=c, **SCHEME) for c in (False, True))
    assert clipped.before < plain.before
    assert clipped.after <= clipped.before


@pytest.mark.parametrize("kind", ["huge", "denormal", "zeros", "mixed"])
def test_odd_weights(kind: str) -> None:
    H = moment(tower(0))
    found = find_scale([weights(0, 4, 48, kind)], H, H, **SCHEME)
    assert found.after <= found.before < np.inf


def test_inputs_that_are_always_zero() -> None:
    found = find_scale([weights(0, 4, 8)], np.zeros((8, 8)), np.zeros((8, 8)), **SCHEME)
    assert (found.alpha, found.before, found.after) == (0, 0, 0)


def test_refusals() -> None:
    W = weights(0, 2, 8)
    for weight, H, held in (([], 8, 8), ([W, W[:, :7]], 8, 8), ([W], 7, 7), ([W], 8, 7)):
        with pytest.raises(ValueError, match="do not share an input"):
            find_scale(weight, np.eye(H), np.eye(held), **SCHEME)
    with pytest.raises(DataError, match="NaN"):
        find_scale([W], np.eye(8), np.full((8, 8), np.nan), **SCHEME)
    with pytest.raises(ModelError, match="nan"):
        find_scale([W * np.nan], np.eye(8), np.eye(8), **SCHEME)
