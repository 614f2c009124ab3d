from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from block_weights import any_scheme, any_weights, block_errors, weights
from hypothesis import given, settings

from qcompile.algo.blocks import check_weights, error
from qcompile.algo.hqq import hqq, shrink
from qcompile.algo.rtn import rtn
from qcompile.errors import ModelError


@settings(max_examples=60)
@given(any_weights(), any_scheme())
def test_no_block_is_worse_than_nearest(W: np.ndarray, scheme: dict[str, Any]) -> None:
    W = check_weights(W)
    before, after = (block_errors(W, f(W, **scheme)) for f in (rtn, hqq))
    assert np.all(after <= before * (1 + 1e-3) + 1e-9)


@pytest.mark.parametrize("x", [-3.0, -0.4, -0.01, 0.0, 0.2, 0.3, 1.0, 7.0])
def test_shrink_is_the_formula(x: float) -> None:
    wanted = np.sign(x) * max(abs(x) - abs(x) ** -0.3 / 10, 0) if x else 0
    assert shrink(np.array([x], np.float32), 10, 0.7)[0] == pytest.approx(wanted, rel=1e-5)


def test_shrink_is_odd_and_takes_away() -> None:
    x = np.linspace(-4, 4, 401).astype(np.float32)
    made = shrink(x, 10, 0.7)
    np.testing.assert_array_equal(made, -shrink(-x, 10, 0.7))
    assert np.all(np.abs(made) <= np.abs(x))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_nearest(bits: int, symmetric: bool) -> None:
    W = weights(2, 64, 256)
    scheme: dict[str, Any] = {"bits": bits, "block": 64, "symmetric": symmetric}
    assert error(W, hqq(W, **scheme)) < 0.95 * error(W, rtn(W, **scheme))


def test_outliers_are_given_up() -> None:
    """One weight far out: the others get closer than its range lets them, in the mean of |e|^0.7."""
    W = weights(4, 32, 64)
    W[:, 0] = 9
    scheme: dict[str, Any] = {"bits": 3, "block": 64, "symmetric": False}
    far = {f: np.abs(W - f(W, **scheme).dequantize()) for f in (rtn, hqq)}
    assert (far[hqq][:, 1:] ** 0.7).mean() < (far[rtn][:, 1:] ** 0.7).mean()


def test_filled_up_blocks_are_as_alone() -> None:
    """The last, shorter block is not moved by the zeros that fill it up."""
    W = weights(5, 16, 20, "positive")
    scheme: dict[str, Any] = {"bits": 3, "symmetric": False}
    both, alone = hqq(W, block=16, **scheme), hqq(W[:, 16:].copy(), block=0, **scheme)
    np.testing.assert_array_equal(both.codes[:, 16:], alone.codes)
    np.testing.assert_allclose(both.scale[:, 1:], alone.scale, rtol=1e-5)


def test_refusals() -> None:
    W = weights(0, 2, 8)
    for p in (0.0, 1.0):
        with pytest.raises(ValueError, match="exponent p"):
            hqq(W, bits=4, block=8, symmetric=True, p=p)
    with pytest.raises(ValueError, match="bits"):
        hqq(W, bits=0, block=8, symmetric=True)
    with pytest.raises(ModelError, match="nan"):
        hqq(np.full((1, 2), np.nan), bits=4, block=8, symmetric=True)
