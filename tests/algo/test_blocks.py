from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from block_weights import any_scheme, any_weights, inputs, moment, slow_dequantize, weights
from hypothesis import given, settings

from qcompile.algo.blocks import Blocked, check_power, check_weights, error, groups, some, width
from qcompile.algo.rtn import rtn
from qcompile.errors import DataError, ModelError


def blocked(**changes: Any) -> Blocked:
    fields = {
        "codes": np.zeros((2, 5), np.uint8),
        "scale": np.ones((2, 2), np.float32),
        "zero": np.zeros((2, 2), np.uint8),
        "bits": 4,
        "block": 4,
    }
    return Blocked(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": np.zeros((2, 5), np.int8)}, "uint8 codes"),
        ({"scale": np.ones((2, 2))}, "not uint8, float64"),
        ({"zero": np.zeros((2, 2), np.int32)}, "and int32"),
        ({"bits": 1}, "1 bits: expected 2 to 8"),
        ({"bits": 9}, "9 bits"),
        ({"block": -1}, "block -1 is negative"),
        ({"codes": np.zeros(5, np.uint8)}, "two axes"),
        ({"scale": np.ones((2, 1), np.float32)}, "need scales and zero points (2, 2)"),
        ({"zero": np.zeros((1, 2), np.uint8)}, "not (2, 2) and (1, 2)"),
        ({"block": 0}, "blocks of a row"),
        ({"codes": np.full((2, 5), 16, np.uint8)}, "a code is 16, which 4 bits cannot hold"),
        ({"zero": np.full((2, 2), 16, np.uint8)}, "a zero point is 16"),
        ({"scale": np.zeros((2, 2), np.float32)}, "a scale is 0"),
        ({"scale": np.full((2, 2), np.nan, np.float32)}, "infinite or NaN"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    blocked()
    with pytest.raises(ValueError, match=re.escape(message)):
        blocked(**changes)


@settings(max_examples=60)
@given(any_weights(), any_scheme())
def test_dequantize_is_the_formula(W: np.ndarray, scheme: dict[str, Any]) -> None:
    b = rtn(W, **scheme)
    assert b.shape == W.shape
    np.testing.assert_array_equal(b.dequantize(), slow_dequantize(b))


@pytest.mark.parametrize(
    ("depth", "block", "expected"),
    [
        (5, 4, (4, 2)),
        (4, 4, (4, 1)),
        (3, 4, (3, 1)),
        (7, 0, (7, 1)),
        (7, None, (7, 1)),
        (0, 4, (1, 1)),
    ],
)
def test_width_and_groups(depth: int, block: int | None, expected: tuple[int, int]) -> None:
    assert (width(depth, block), groups(depth, block)) == expected


def test_error_is_that_of_the_output() -> None:
    W, x = weights(0, 3, 20), inputs(0, 50, 20)
    b = rtn(W, bits=3, block=8, symmetric=True)
    off = W - b.dequantize().astype(np.float64)
    wanted = np.square(x @ off.T).sum(axis=1).mean() / 3
    assert error(W, b, moment(x)) == pytest.approx(wanted)
    power = np.square(x).mean(axis=0)
    assert error(W, b, power) == pytest.approx(error(W, b, np.diag(power)))
    assert error(W, b) == pytest.approx(np.square(off).mean())


def test_error_of_other_shapes_is_refused() -> None:
    W = weights(0, 2, 5)
    with pytest.raises(ValueError, match="differ in shape"):
        error(W[:, :4], blocked())
    with pytest.raises(ValueError, match=r"H is \(4,\)"):
        error(W, blocked(), np.ones(4))


def test_weights_that_no_scale_fits_are_refused() -> None:
    W = weights(0, 3, 4)
    W[1, 2] = np.nan
    with pytest.raises(ModelError, match="row 1, column 2 is nan"):
        check_weights(W)
    with pytest.raises(ValueError, match="two axes"):
        check_weights(W[0])


def test_weights_are_copied_only_where_they_must() -> None:
    W = weights(0, 3, 4)
    assert check_weights(W) is W
    assert np.abs(check_weights(weights(0, 3, 4, "huge"))).max() == np.float32(2.0**126)


def test_power_is_made_relative() -> None:
    made = check_power(np.array([1e300, 3e300]), 2)
    assert made is not None
    np.testing.assert_allclose(made, [0.5, 1.5])
    assert check_power(np.zeros(3), 3) is None
    assert check_power(None, 3) is None
    for wrong in (np.array([1, -1.0]), np.array([1, np.nan]), np.array([1, np.inf])):
        with pytest.raises(DataError, match="calibrate again"):
            check_power(wrong, 2)
    with pytest.raises(ValueError, match=r"not \(3,\)"):
        check_power(np.ones(2), 3)


def test_some_rows() -> None:
    whole = rtn(weights(0, 8, 64), bits=4, block=16, symmetric=False)
    for which in (slice(2, 5), np.array([7, 0])):
        np.testing.assert_array_equal(whole.rows(which).dequantize(), whole.dequantize()[which])


def test_rows_spread_evenly() -> None:
    assert list(some(10, 4)) == [0, 3, 6, 9]
    assert list(some(3, 64)) == [0, 1, 2]
    assert list(some(1, 4)) == [0]
    for count in (2, 97, 1000):
        taken = some(count, 7)
        assert (taken[0], taken[-1], len(taken)) == (0, count - 1, min(count, 7))
