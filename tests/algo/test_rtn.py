from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from block_weights import any_scheme, any_weights, block_errors, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.algo.blocks import Blocked, check_weights
from qcompile.algo.rtn import FACTORS, rtn, search
from qcompile.errors import DataError, ModelError

SCHEME: dict[str, Any] = {"bits": 4, "block": 8, "symmetric": True}


def slow_rtn(W: np.ndarray, bits: int, block: int, symmetric: bool) -> tuple[np.ndarray, ...]:
    """One block after the other, one weight after the other, by the formula, in float64."""
    n, k = W.shape
    size, top, middle = block or k, 2**bits - 1, 2 ** (bits - 1)
    count = math.ceil(k / size)
    codes, scale, zero = np.zeros((n, k), int), np.ones((n, count)), np.zeros((n, count), int)
    for i in range(n):
        for g in range(count):
            part = [float(w) for w in W[i, g * size : (g + 1) * size]]
            low, high = min(*part, 0.0), max(*part, 0.0)
            if symmetric:
                scale[i, g] = -(high if high > -low else low) / middle or 1
                zero[i, g] = middle
            else:
                scale[i, g] = (high - low) / top or 1
                zero[i, g] = round(-low / scale[i, g])
            for j, w in enumerate(part):
                code = round(w / scale[i, g]) + zero[i, g]
                codes[i, g * size + j] = min(max(code, 0), top)
    return codes, scale, zero


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [0, 1, 5, 8, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "zeros", "positive", "constant", "spike"])
def test_equals_the_slow_version(kind: str, bits: int, block: int, symmetric: bool) -> None:
    W = weights(5, 3, 21, kind)
    b = rtn(W, bits=bits, block=block, symmetric=symmetric)
    codes, scale, zero = slow_rtn(W, bits, block, symmetric)
    np.testing.assert_allclose(b.scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(b.zero, zero)
    np.testing.assert_array_equal(b.codes, codes)


def worst(W: np.ndarray, b: Blocked) -> float:
    """The largest error, in scales of its block."""
    size = b.block or W.shape[1]
    scale = np.repeat(np.abs(b.scale.astype(np.float64)), size, axis=1)[:, : W.shape[1]]
    return float((np.abs(check_weights(W).astype(np.float64) - b.dequantize()) / scale).max())


@settings(max_examples=100)
@given(any_weights(), any_scheme())
def test_errors_are_bounded(W: np.ndarray, scheme: dict[str, Any]) -> None:
    """Half a scale; one more half if symmetric, as the other end may lack a code. Wide scales change nothing."""
    b = rtn(W, **{**scheme, "scales": "float32"})
    assert worst(W, b) <= (1 if scheme["symmetric"] else 0.5) * 1.001
    if not scheme["symmetric"]:
        assert np.all(b.dequantize()[W == 0] == 0)


@settings(max_examples=60)
@given(any_weights(), any_scheme(), st.booleans())
def test_search_is_no_worse_for_any_block(
    W: np.ndarray, scheme: dict[str, Any], weigh: bool
) -> None:
    power = np.arange(W.shape[1]) % 3 + 0.1 if weigh else None
    W = check_weights(W)
    plain, found = rtn(W, **scheme), search(W, power=power, **scheme)
    before, after = block_errors(W, plain, power), block_errors(W, found, power)
    assert np.all(after <= before * (1 + 1e-3) + 1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_finds_the_best_trial(symmetric: bool) -> None:
    W, power = weights(3, 2, 8), np.array([1, 9, 1, 1, 0, 4, 1, 1.0])
    found = search(W, bits=3, block=8, symmetric=symmetric, power=power)
    first = rtn(W, bits=3, block=8, symmetric=symmetric)
    for i, row in enumerate(W):
        errors = []
        for factor in FACTORS:
            for turn in (1, -1) if symmetric else (0, 1, -1):
                scale = first.scale[i, 0] * np.float32(factor * (turn if symmetric else 1))
                zero = int(np.clip(int(first.zero[i, 0]) + (0 if symmetric else turn), 0, 7))
                made = (np.clip(np.rint(row / scale) + zero, 0, 7) - zero) * scale
                errors.append(float((power * (row - made) ** 2).sum()))
        own = float((power * (row - found.dequantize()[i]) ** 2).sum())
        assert own == pytest.approx(min(errors), rel=1e-4)


def test_dead_inputs_have_no_say() -> None:
    """Of two weights that no step suits at once, the one counts whose input lives."""
    W = np.array([[1, 0.31, 0.31, 0.31]], np.float32)
    scheme: dict[str, Any] = {"bits": 2, "block": 0, "symmetric": True}
    alive = search(W, power=np.array([0, 1, 1, 1.0]), **scheme).dequantize()
    np.testing.assert_allclose(alive[0, 1:], 0.31, atol=0.03)
    assert np.all(
        np.abs(search(W, power=np.array([1, 0, 0, 0.0]), **scheme).dequantize()[0, 0] - 1) < 0.01
    )


def test_rows_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    W = weights(0, 37, 20)
    wanted = search(W, bits=4, block=8, symmetric=False)
    monkeypatch.setattr("qcompile.algo.columns.columns.__defaults__", (50,))
    found = search(W, bits=4, block=8, symmetric=False)
    np.testing.assert_array_equal(found.codes, wanted.codes)
    np.testing.assert_array_equal(found.scale, wanted.scale)


def test_weights_stay_as_they_are() -> None:
    W = weights(0, 4, 16)
    before = W.copy()
    rtn(W, **SCHEME)
    search(W, **SCHEME)
    np.testing.assert_array_equal(W, before)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_empty_weights(shape: tuple[int, int]) -> None:
    W = np.zeros(shape, np.float32)
    assert rtn(W, **SCHEME).shape == shape
    assert search(W, power=np.ones(shape[1]), **SCHEME).shape == shape


def test_refusals() -> None:
    W = weights(0, 2, 8)
    with pytest.raises(ValueError, match="not all above 0"):
        search(W, factors=(1, 0), **SCHEME)
    with pytest.raises(ValueError, match="16 bits"):
        rtn(W, bits=16, block=8, symmetric=True)
    with pytest.raises(DataError, match="mean square"):
        search(W, power=-np.ones(8), **SCHEME)
    W[0, 0] = np.inf
    for solve in (rtn, search):
        with pytest.raises(ModelError, match="row 0, column 0 is inf"):
            solve(W, **SCHEME)
