from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from block_weights import any_scheme, any_weights, block_errors, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.algo.blocks import check_weights, error
from qcompile.algo.kquant import kquant
from qcompile.algo.rtn import rtn, search
from qcompile.errors import DataError, ModelError


@settings(max_examples=60)
@given(any_weights(), any_scheme(), st.booleans())
def test_no_block_is_worse_than_nearest(W: np.ndarray, scheme: dict[str, Any], weigh: bool) -> None:
    power = np.arange(W.shape[1]) % 3 + 0.1 if weigh else None
    W = check_weights(W)
    before = block_errors(W, rtn(W, **scheme), power)
    after = block_errors(W, kquant(W, power=power, **scheme), power)
    assert np.all(after <= before * (1 + 1e-3) + 1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_scale_is_that_of_least_squares(bits: int, symmetric: bool) -> None:
    """No other scale is better for the codes and the zero point that it has."""
    W, power = weights(1, 6, 32), np.random.default_rng(0).uniform(0.1, 3, 32)
    b = kquant(W, bits=bits, block=16, symmetric=symmetric, power=power)
    errors = block_errors(W, b, power)
    for factor in (0.99, 1.01):
        moved = type(b)(b.codes, b.scale * np.float32(factor), b.zero, bits, 16)
        assert np.all(block_errors(W, moved, power) > errors)


@pytest.mark.parametrize("symmetric", [True, False])
def test_beats_nearest_and_clipping(symmetric: bool) -> None:
    W = weights(2, 64, 256)
    scheme: dict[str, Any] = {"bits": 4, "block": 32, "symmetric": symmetric}
    plain, clipped, found = (error(W, f(W, **scheme)) for f in (rtn, search, kquant))
    assert found < clipped < 0.97 * plain


def test_exact_weights_stay_exact() -> None:
    """Multiples of a step are found though no value reaches the end of the range."""
    codes = np.random.default_rng(0).integers(0, 13, (8, 32))
    codes[:, :2] = 0, 12
    W = ((codes - 5) * 0.125).astype(np.float32)
    b = kquant(W, bits=4, block=32, symmetric=False)
    plain = rtn(W, bits=4, block=32, symmetric=False)
    assert error(W, b) < 0.5 * error(W, plain)


def test_power_decides() -> None:
    W, power = weights(3, 32, 64), np.ones(64)
    power[::8] = 100
    with_power = kquant(W, bits=3, block=32, symmetric=True, power=power)
    without = kquant(W, bits=3, block=32, symmetric=True)
    assert error(W, with_power, power) < 0.8 * error(W, without, power)
    assert error(W, without) < error(W, with_power)


def test_weights_stay_as_they_are() -> None:
    W = weights(0, 4, 16)
    before = W.copy()
    kquant(W, bits=4, block=8, symmetric=False)
    np.testing.assert_array_equal(W, before)


def test_refusals() -> None:
    W = weights(0, 2, 8)
    with pytest.raises(ValueError, match="bits"):
        kquant(W, bits=1, block=8, symmetric=True)
    with pytest.raises(DataError, match="mean square"):
        kquant(W, bits=4, block=8, symmetric=True, power=np.full(8, np.nan))
    with pytest.raises(ModelError, match="nan"):
        kquant(np.full((1, 2), np.nan), bits=4, block=8, symmetric=True)
