from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from block_weights import inputs, moment, weights
from hypothesis import given
from hypothesis import strategies as st

from qcompile.algo.balance import EXPONENTS, balance, scales
from qcompile.algo.blocks import error, row_errors
from qcompile.algo.choose import Factors, solve_blocks
from qcompile.algo.drift import Drift
from qcompile.algo.gptq import gptq, prepare
from qcompile.algo.rtn import rtn
from qcompile.errors import ModelError

SCHEME: dict[str, Any] = {"bits": 4, "block": 16, "symmetric": False}


def uneven(seed: int, rows: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Weights whose columns differ in size, and inputs whose sizes differ otherwise."""
    rng = np.random.default_rng(7)
    size, power = np.exp(rng.normal(0, 1.0, 48)), np.exp(rng.normal(0, 1.0, 48))
    return weights(3, 40, 48) * size.astype(np.float32), inputs(seed, rows, 48, rank=44) * power


def slow(W: np.ndarray, H: np.ndarray, judge: np.ndarray, scale: np.ndarray) -> float:
    """The error of the product on inputs of the second moment `judge`, everything in the scaled domain."""
    turned = H / np.outer(scale, scale)
    off = W * scale - gptq(W * scale, prepare(turned), **SCHEME).dequantize()
    return float(row_errors(off.astype(np.float64), judge / np.outer(scale, scale)).sum())


def test_uneven_columns_lose_less() -> None:
    (W, x), (_, other) = uneven(0), uneven(1)
    H, judge = moment(x), moment(other)
    found, ratio = balance([W], prepare(H), judge, **SCHEME)
    assert found is not None
    assert ratio < 0.85
    true = slow(W, H, judge, found) / slow(W, H, judge, np.ones(48, np.float32))
    assert true == pytest.approx(ratio, abs=0.05)
    # and clearly less than rounding to nearest leaves
    plain = row_errors((W - rtn(W, **SCHEME).dequantize()).astype(np.float64), judge).sum()
    assert slow(W, H, judge, found) < 0.5 * plain


def test_the_best_of_those_that_are_tried_is_taken() -> None:
    (W, x), (_, other) = uneven(0), uneven(1)
    H, judge = moment(x), moment(other)
    factor = prepare(H)
    tried = [scales([W], factor, pair) for pair in EXPONENTS]
    found, _ = balance([W], factor, judge, **SCHEME)
    errors = [slow(W, H, judge, scale) for scale in tried]
    np.testing.assert_array_equal(found, tried[int(np.argmin(errors))])


def test_scales_as_in_the_docstring() -> None:
    """With the full exponents, the product of the two sums is the least that there is."""
    W, x = uneven(0)
    factor = prepare(moment(x))
    w, left = np.sqrt(np.square(W).mean(axis=0)), factor.left.astype(np.float64)

    def product(scale: np.ndarray) -> float:
        return float((np.square(w * scale)).sum() * (left / np.square(scale)).sum())

    s = scales([W], factor, (0.25, 0.5)).astype(np.float64)
    assert np.log(s).mean() == pytest.approx(0, abs=1e-6)
    rng = np.random.default_rng(0)
    assert all(product(s) <= product(s * np.exp(rng.normal(0, 0.1, 48))) for _ in range(20))


def test_several_weights_share_a_scale() -> None:
    W, x = uneven(0)
    factor = prepare(moment(x))
    np.testing.assert_allclose(
        scales([W[:25], W[25:]], factor, (0.2, 0.4)), scales([W], factor, (0.2, 0.4)), rtol=1e-5
    )


def test_what_does_not_help_on_other_data_is_none() -> None:
    (W, x), judge = uneven(0), np.eye(48)
    judge[:24] = 0  # data that judges knows nothing of half of the inputs
    found, ratio = balance([np.sign(W).astype(np.float32)], prepare(moment(x)), judge, **SCHEME)
    assert (found, ratio) == (None, 1.0)  # signs are exact without a scale
    assert balance([W], prepare(moment(x)), np.zeros((48, 48)), **SCHEME) == (None, 1.0)
    assert balance([W[:0]], prepare(moment(x)), np.eye(48), **SCHEME) == (None, 1.0)


def test_columns_and_inputs_of_zeros() -> None:
    W, x = uneven(0)
    W[:, 3], x[:, 5] = 0, 0
    found = scales([W], prepare(moment(x)), (0.2, 0.45))
    assert np.all(np.isfinite(found))
    assert found.min() >= 1 / 64
    assert found.max() <= 64
    np.testing.assert_array_equal(scales([W * 0], prepare(np.eye(48)), (0.2, 0.45)), 1)


def test_refusals() -> None:
    W, x = uneven(0)
    factor = prepare(moment(x))
    with pytest.raises(ValueError, match="do not share 48 inputs"):
        balance([W[:, :40]], factor, np.eye(48), **SCHEME)
    with pytest.raises(ValueError, match="in their order"):
        balance([W], prepare(moment(x), order=True), np.eye(48), **SCHEME)
    with pytest.raises(ValueError, match="do not share"):
        balance([], factor, np.eye(48), **SCHEME)
    W[0, 0] = np.nan
    with pytest.raises(ModelError, match="row 0, column 0 is nan"):
        balance([W], factor, np.eye(48), **SCHEME)


@given(st.integers(0, 1000), st.booleans())
def test_a_scaled_factor_is_that_of_scaled_inputs(seed: int, order: bool) -> None:
    rng = np.random.default_rng(seed)
    x = inputs(seed, 80, 12, rank=12)
    scale = np.exp(rng.normal(0, 1, 12)).astype(np.float32)
    damped = moment(x)
    damped += 0.01 * np.diag(damped).mean() * np.eye(12)
    made = prepare(damped, order=order, damp=1e-12).scaled(scale)
    true = damped / np.outer(scale, scale)
    turned = true[np.ix_(made.order, made.order)]
    root = np.linalg.cholesky(turned[::-1, ::-1])[::-1, ::-1]
    np.testing.assert_allclose(made.share, root / np.diag(root), rtol=1e-3, atol=1e-4)
    left = np.square(np.diag(root))
    np.testing.assert_allclose(made.left, left / left.mean(), rtol=1e-3)


# ---- codes for scaled weights (choose.solve_blocks)


def test_codes_for_a_scale_are_judged_on_inputs_as_they_are() -> None:
    (W, x), (_, other) = uneven(0), uneven(1)
    H, judge = moment(x), moment(other)
    scale, _ = balance([W], prepare(H), judge, **SCHEME)
    assert scale is not None
    made, tally = solve_blocks(W, **SCHEME, H=H, held_out_H=judge, scale=scale)
    off = (W - made.dequantize() / scale).astype(np.float64)
    assert tally.error == pytest.approx(row_errors(off, judge).sum() / len(W), rel=1e-4)
    assert tally.rtn == pytest.approx(error(W, rtn(W, **SCHEME), judge))
    _, bare = solve_blocks(W, **SCHEME, H=H, held_out_H=judge)
    assert tally.error < 0.9 * bare.error
    assert bare.rtn == tally.rtn


def test_a_scale_with_drift() -> None:
    (W, x), (_, other) = uneven(0), uneven(1)
    rng = np.random.default_rng(0)

    def drift(wanted: np.ndarray) -> Drift:
        given_ = wanted + 0.2 * rng.normal(size=wanted.shape) * wanted.std(axis=0)
        off = wanted - given_
        return Drift(moment(given_), off.T @ given_ / len(off), off.T @ off / len(off))

    pair = drift(x), drift(other)
    factors = Factors(pair[0].H)
    scale, _ = balance([W], factors.get(order=False), pair[1].H, **SCHEME)
    made, tally = solve_blocks(W, **SCHEME, H=factors, drift=pair, scale=scale)
    _, bare = solve_blocks(W, **SCHEME, H=factors, drift=pair)
    assert tally.algorithm in {"gptq", "search"}
    assert tally.rtn == bare.rtn
    assert tally.error < bare.error
    assert made.shape == W.shape


def test_rounding_to_nearest_for_a_scale_is_that_of_the_scaled_weights() -> None:
    W, x = uneven(0)
    scale = np.linspace(0.5, 2, 48).astype(np.float32)
    made, tally = solve_blocks(W, **SCHEME, H=moment(x), algorithm="rtn", scale=scale)
    np.testing.assert_array_equal(made.codes, rtn(W * scale, **SCHEME).codes)
    assert tally.algorithm == "rtn"
    assert [name for name, _ in tally.tried] == ["rtn"]
