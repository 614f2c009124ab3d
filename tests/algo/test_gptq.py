from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from block_weights import any_scheme, any_weights, inputs, moment, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.algo.blocks import Blocked, check_weights, error
from qcompile.algo.gptq import gptq, prepare
from qcompile.algo.rtn import rtn, search
from qcompile.errors import DataError, ModelError


def step(part: np.ndarray, bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point of a block's whole range."""
    low, high = min(part.min(), 0.0), max(part.max(), 0.0)
    if symmetric:
        return -(high if high > -low else low) / 2 ** (bits - 1), 2 ** (bits - 1)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


def slow_gptq(
    W: np.ndarray, H: np.ndarray, bits: int, block: int, symmetric: bool, *, order: bool, damp: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Optimal brain quantization in a fixed order, row by row: the inverse is updated at each step.

    Returns codes and the values that they stand for.
    """
    n, k = W.shape
    size = block or k
    turns = np.argsort(-np.diag(H), kind="stable") if order else np.arange(k)
    inverse = np.linalg.inv(H + damp * np.diag(H).mean() * np.eye(k))
    codes, made = np.zeros((n, k), int), np.zeros((n, k))
    for i in range(n):
        w, left, steps = W[i].astype(np.float64), inverse.copy(), {}
        if order:
            for g in range(-(-k // size)):
                steps[g] = step(w[g * size : (g + 1) * size], bits, symmetric)
        for j in turns:
            g = j // size
            if g not in steps:
                steps[g] = step(w[g * size : (g + 1) * size], bits, symmetric)
            scale, zero = steps[g]
            codes[i, j] = min(max(round(w[j] / scale) + zero, 0), 2**bits - 1)
            made[i, j] = (codes[i, j] - zero) * scale
            # OBQ: what is left is moved along the inverse's column, and j is eliminated from it
            if left[j, j] > 0:
                w -= (w[j] - made[i, j]) / left[j, j] * left[:, j]
            left -= np.outer(left[:, j], left[j, :]) / left[j, j]
            left[j, :] = left[:, j] = 0
            left[j, j] = 1
    return codes, made


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize(("k", "block"), [(1, 4), (8, 0), (8, 4), (13, 4), (20, 64), (24, 8)])
def test_equals_optimal_brain_quantization(
    k: int, block: int, order: bool, symmetric: bool, seed: int
) -> None:
    W, H = weights(seed, 4, k), moment(inputs(seed, 60, k))
    codes, made = slow_gptq(W, H, 3, block, symmetric, order=order)
    b = gptq(W, prepare(H, order=order), bits=3, block=block, symmetric=symmetric, search=False)
    np.testing.assert_array_equal(b.codes, codes)
    np.testing.assert_allclose(b.dequantize(), made, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("block", [0, 16, 32, 160])
def test_beats_nearest_on_other_data(block: int, order: bool, symmetric: bool) -> None:
    """A factor read along the wrong axis gives what rounding to nearest gives, as in several ports."""
    k = 200
    W, H, other = weights(0, 48, k), moment(inputs(0, 2000, k)), moment(inputs(1, 2000, k))
    scheme: dict[str, Any] = {"bits": 4, "block": block, "symmetric": symmetric}
    plain = rtn(W, **scheme)
    made = gptq(W, prepare(H, order=order), search=False, **scheme)
    assert error(W, made, other) < 0.7 * error(W, plain, other)
    assert np.mean(made.codes != plain.codes) > 0.2
    searched = gptq(W, prepare(H, order=order), **scheme)
    assert error(W, searched, other) < (1.1 if order else 1) * error(W, made, other)
    assert error(W, searched, other) < 0.7 * error(W, search(W, power=np.diag(H), **scheme), other)


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("block", [0, 8, 100])
def test_lazy_updates_change_nothing(
    block: int, order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, factor = weights(0, 6, 150), prepare(moment(inputs(0, 300, 150)), order=order)
    wanted = gptq(W, factor, bits=3, block=block, symmetric=True)
    monkeypatch.setattr("qcompile.algo.gptq._LAZY", 7)
    found = gptq(W, factor, bits=3, block=block, symmetric=True)
    # sums in another order: float32 may turn a tie
    assert np.mean(found.codes != wanted.codes) < 0.01
    assert error(W, found, np.eye(150)) == pytest.approx(error(W, wanted, np.eye(150)), rel=0.02)


@pytest.mark.parametrize("order", [True, False])
def test_one_factor_serves_several_weights(order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    W, factor = weights(0, 9, 40), prepare(moment(inputs(0, 90, 40)), order=order)
    scheme: dict[str, Any] = {"bits": 4, "block": 16, "symmetric": True}
    whole = gptq(W, factor, **scheme)
    parts = [gptq(W[i : i + 3], factor, **scheme) for i in (0, 3, 6)]
    np.testing.assert_array_equal(whole.codes, np.concatenate([p.codes for p in parts]))
    monkeypatch.setattr("qcompile.algo.gptq._ROWS", 2 * 40)
    np.testing.assert_array_equal(whole.codes, gptq(W, factor, **scheme).codes)


@pytest.mark.parametrize("order", [True, False])
def test_units_do_not_matter(order: bool) -> None:
    W, H = weights(0, 5, 24), moment(inputs(0, 90, 24))
    scheme: dict[str, Any] = {"bits": 3, "block": 8, "symmetric": False}
    wanted = gptq(W, prepare(H, order=order), **scheme)
    found = gptq(W * np.float32(2.0**-50), prepare(H * 2.0**-400, order=order), **scheme)
    np.testing.assert_array_equal(found.codes, wanted.codes)
    np.testing.assert_array_equal(found.scale, wanted.scale * np.float32(2.0**-50))


@pytest.mark.parametrize("order", [True, False])
def test_a_dead_input_is_rounded_to_nearest(order: bool) -> None:
    """It is not set to 0, and moves no other weight."""
    W, x = weights(0, 5, 24), inputs(0, 90, 24)
    x[:, [3, 17]] = 0
    factor = prepare(moment(x), order=order)
    made = gptq(W, factor, bits=4, block=8, symmetric=True, search=False)
    own = made.dequantize()
    scale = np.repeat(made.scale, 8, axis=1)
    wanted = np.clip(np.rint(W / scale) + 8, 0, 15)
    np.testing.assert_array_equal(made.codes[:, [3, 17]], wanted[:, [3, 17]])
    assert np.any(made.codes != wanted)
    other = W.copy()
    other[:, [3, 17]] *= 0.5  # still no extreme of its block
    moved = gptq(other, factor, bits=4, block=8, symmetric=True, search=False).dequantize()
    alive = np.delete(np.arange(24), [3, 17])
    same = np.all(
        made.scale == gptq(other, factor, bits=4, block=8, symmetric=True, search=False).scale,
        axis=1,
    )
    assert same.any()
    np.testing.assert_array_equal(own[same][:, alive], moved[same][:, alive])


@pytest.mark.parametrize("order", [True, False])
def test_without_power_it_rounds_to_nearest(order: bool) -> None:
    W = weights(0, 5, 24)
    scheme: dict[str, Any] = {"bits": 4, "block": 8, "symmetric": False}
    made = gptq(W, prepare(np.zeros((24, 24)), order=order), search=False, **scheme)
    np.testing.assert_array_equal(made.codes, rtn(W, **scheme).codes)


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("order", [True, False])
def test_singular_moments_are_damped(rank: int, order: bool) -> None:
    x = np.random.default_rng(0).normal(size=(rank, 32))
    W, factor = weights(0, 16, 32), prepare(moment(x), order=order)
    assert factor.damp == 0.01
    made = gptq(W, factor, bits=4, block=16, symmetric=True)
    plain = rtn(W, bits=4, block=16, symmetric=True)
    assert error(W, made, moment(x)) < 0.2 * error(W, plain, moment(x))


def test_damping_grows_where_needed() -> None:
    H = moment(inputs(0, 90, 32))
    H -= 0.05 * np.diag(H).mean() * np.eye(32)
    assert np.linalg.eigvalsh(H).min() < -0.01 * np.diag(H).mean()
    factor = prepare(H)
    assert factor.damp == pytest.approx(0.1)
    assert np.isfinite(factor.share).all()


@settings(max_examples=60)
@given(any_weights(), any_scheme(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_any_weights_any_scheme(
    W: np.ndarray, scheme: dict[str, Any], order: bool, searched: bool, seed: int
) -> None:
    """Codes are valid, and with inputs that do not correlate each weight is next to its code."""
    k = W.shape[1]
    made = gptq(W, prepare(np.eye(k), order=order), search=False, **scheme)
    off = np.abs(check_weights(W).astype(np.float64) - made.dequantize())
    plain = np.abs(check_weights(W).astype(np.float64) - rtn(W, **scheme).dequantize())
    largest = np.abs(W.astype(np.float64)).max(axis=1, keepdims=True)
    assert np.all(off <= plain * 1.001 + largest * 1e-5)
    x = inputs(seed, 20, k)
    found = gptq(W, prepare(moment(x), order=order), search=searched, **scheme)
    assert np.isfinite(found.dequantize()).all()


def test_half_scales_are_those_used() -> None:
    """Codes are chosen for the stored scales: a wide H shows any other."""
    W, H = weights(0, 16, 64) * np.float32(1e-3), moment(inputs(0, 300, 64))
    made = gptq(W, prepare(H), bits=8, block=16, symmetric=True, scales="bfloat16")
    later = Blocked(
        gptq(W, prepare(H), bits=8, block=16, symmetric=True).codes, made.scale, made.zero, 8, 16
    )
    assert error(W, made, H) < 0.5 * error(W, later, H)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty_weights(shape: tuple[int, int]) -> None:
    made = gptq(np.zeros(shape), prepare(np.eye(shape[1])), bits=4, block=4, symmetric=True)
    assert made.shape == shape


def test_refusals() -> None:
    W, factor = weights(0, 2, 8), prepare(np.eye(8))
    with pytest.raises(ValueError, match="not square"):
        prepare(np.ones((2, 3)))
    with pytest.raises(ValueError, match="damp is 0"):
        prepare(np.eye(2), damp=0)
    with pytest.raises(DataError, match="NaN or infinities"):
        prepare(np.full((2, 2), np.nan))
    with pytest.raises(DataError, match="not symmetric"):
        prepare(np.array([[1, 0.5], [0, 1]]))
    for wrong in (np.array([[1, 2], [2, 1.0]]), -np.eye(2)):
        with pytest.raises(DataError, match="positive diagonal"):
            prepare(wrong)
    signs = np.sign(np.random.default_rng(0).normal(size=(200, 200)))
    signs = np.triu(signs, 1) + np.triu(signs, 1).T + np.eye(200)
    with pytest.raises(DataError, match="not positive semidefinite"):
        prepare(signs)
    with pytest.raises(ValueError, match="read 7 inputs, the factor has 8"):
        gptq(W[:, :7], factor, bits=4, block=8, symmetric=True)
    with pytest.raises(ValueError, match="bits"):
        gptq(W, factor, bits=9, block=8, symmetric=True)
    with pytest.raises(ModelError, match="nan"):
        gptq(np.full((1, 8), np.nan), factor, bits=4, block=8, symmetric=True)
