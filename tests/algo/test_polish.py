from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from block_weights import any_scheme, any_weights, inputs, moment, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.algo.blocks import Blocked, check_weights, error, row_errors
from qcompile.algo.gptq import gptq, prepare
from qcompile.algo.polish import polish
from qcompile.algo.rtn import rtn
from qcompile.errors import DataError, ModelError


def slow_sweep(W: np.ndarray, b: Blocked, H: np.ndarray, damp: float) -> np.ndarray:
    """Codes after one sweep: each is the best of all that it may be, others as they are."""
    firm = H + damp * np.diag(H).mean() * np.eye(len(H))
    codes, size = b.codes.astype(int), b.block or W.shape[1]
    for i in range(len(W)):
        scale, zero = (np.repeat(a[i].astype(float), size)[: W.shape[1]] for a in (b.scale, b.zero))
        for j in range(W.shape[1]):
            errors = []
            for code in range(2**b.bits):
                tried = codes[i].copy()
                tried[j] = code
                off = W[i] - (tried - zero) * scale
                errors.append(off @ firm @ off)
            codes[i, j] = int(np.argmin(errors))
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [0, 4, 6])
def test_a_sweep_makes_each_code_the_best(block: int, symmetric: bool) -> None:
    W, H = weights(0, 5, 22), moment(inputs(0, 90, 22))
    start = rtn(W, bits=3, block=block, symmetric=symmetric)
    made = polish(W, start, H, sweeps=1, refit=False)
    np.testing.assert_array_equal(made.codes, slow_sweep(W, start, H, 0.01))
    np.testing.assert_array_equal(made.scale, start.scale)


def test_deep_blocks_are_swept_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = weights(0, 6, 90), moment(inputs(0, 300, 90))
    start = rtn(W, bits=4, block=0, symmetric=True)
    wanted = polish(W, start, H)
    monkeypatch.setattr("qcompile.algo.polish._PIECE", 7)
    monkeypatch.setattr("qcompile.algo.polish._ROWS", 180)
    made = polish(W, start, H)
    np.testing.assert_array_equal(made.codes, wanted.codes)
    np.testing.assert_allclose(made.scale, wanted.scale, rtol=1e-4)


@settings(max_examples=60)
@given(any_weights(), any_scheme(), st.booleans(), st.integers(0, 99))
def test_no_row_gets_worse(W: np.ndarray, scheme: dict[str, Any], refit: bool, seed: int) -> None:
    H = moment(inputs(seed, 30, W.shape[1]))
    start = rtn(W, **scheme)
    made = polish(W, start, H, refit=refit, scales=scheme["scales"])
    wide = check_weights(W).astype(np.float64)
    before, after = (row_errors(wide - b.dequantize(), H / H.max()) for b in (start, made))
    assert np.all(after <= before)
    np.testing.assert_array_equal(made.zero, start.zero)


@pytest.mark.parametrize("symmetric", [True, False])
def test_improves_gptq_on_other_data(symmetric: bool) -> None:
    W, H, other = weights(0, 32, 96), moment(inputs(0, 3000, 96)), moment(inputs(1, 3000, 96))
    start = gptq(W, prepare(H), bits=3, block=32, symmetric=symmetric)
    codes = polish(W, start, H, refit=False)
    both = polish(W, start, H)
    assert error(W, both, other) < error(W, codes, other) < 0.95 * error(W, start, other)


def test_a_scale_becomes_that_of_least_squares() -> None:
    W, H = weights(0, 8, 16), moment(inputs(0, 90, 16))
    start = rtn(W, bits=8, block=0, symmetric=True)
    wrong = Blocked(start.codes, start.scale * np.float32(1.3), start.zero, 8, 0)
    made = polish(W, wrong, H, sweeps=8, damp=1e-9)
    for factor in (0.999, 1.001):
        moved = Blocked(made.codes, made.scale * np.float32(factor), made.zero, 8, 0)
        assert error(W, moved, H) > error(W, made, H)


@pytest.mark.parametrize("block", [0, 8])
def test_the_start_stays_as_it_is(block: int) -> None:
    W, H = weights(0, 8, 16), moment(inputs(0, 90, 16))
    start = rtn(W, bits=3, block=block, symmetric=True)
    copies = start.codes.copy(), start.scale.copy()
    made = polish(W, start, H)
    assert np.any(made.codes != copies[0])
    assert np.any(made.scale != copies[1])
    np.testing.assert_array_equal(start.codes, copies[0])
    np.testing.assert_array_equal(start.scale, copies[1])


def test_inputs_that_are_always_zero_move_nothing() -> None:
    W, start = weights(0, 8, 16), rtn(weights(0, 8, 16), bits=3, block=8, symmetric=True)
    made = polish(W, start, np.zeros((16, 16)))
    np.testing.assert_array_equal(made.codes, start.codes)
    np.testing.assert_array_equal(made.scale, start.scale)


def test_refusals() -> None:
    W = weights(0, 2, 8)
    start = rtn(W, bits=4, block=8, symmetric=True)
    with pytest.raises(ValueError, match="do not fit"):
        polish(W, start, np.eye(7))
    with pytest.raises(ValueError, match="do not fit"):
        polish(W[:1], start, np.eye(8))
    with pytest.raises(DataError, match="NaN"):
        polish(W, start, np.full((8, 8), np.nan))
    W[0, 0] = np.nan
    with pytest.raises(ModelError, match="nan"):
        polish(W, start, np.eye(8))
