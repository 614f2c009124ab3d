from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from block_weights import any_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.algo.blocks import check_weights, groups, width
from qcompile.algo.columns import Writer, columns, powers, spread, steps, storable

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@settings(max_examples=80)
@given(any_weights(), st.sampled_from((None, 1, 3, 8, 64)), st.sampled_from((1, 50, 10**6)))
def test_columns_are_blocks(W: np.ndarray, block: int | None, most: int) -> None:
    W = check_weights(W)
    size, number = width(W.shape[1], block), groups(W.shape[1], block)
    seen = 0
    for part in columns(W, block, most):
        rows = W[part.rows]
        for r, g in itertools.product(range(len(rows)), range(number)):
            own = rows[r, g * size : (g + 1) * size]
            column, unit = part.values[:, r * number + g], part.unit[r * number + g]
            tiny = unit * np.float32(2.0**-126)  # what is so far below the largest may vanish
            np.testing.assert_allclose(column[: len(own)] * unit, own, rtol=0, atol=tiny)
            assert not column[len(own) :].any()
            assert np.abs(column).max() < 2
        seen += len(rows)
        assert len(rows) == 1 or rows.size <= most
    assert seen == len(W)


def test_powers_are_powers_below() -> None:
    extreme = np.array([0, 1, 1.5, 3, 2.0**-126, 1e-45, 3e38, 2.0**127], np.float32)
    made = powers(extreme)
    np.testing.assert_array_equal(made[:5], [1, 1, 1, 2, 2.0**-126])
    np.testing.assert_array_equal(np.frexp(made)[0], 0.5)
    assert np.all(made[6:] <= extreme[6:])
    assert np.all(extreme / made < 2)


@pytest.mark.parametrize("block", [None, 3, 8])
def test_writer_undoes_columns(block: int | None) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (5, 11)).astype(np.uint8)
    writer = Writer((5, 11), 4, block)
    for part in columns(codes.astype(np.float32), block, 30):
        number = part.values.shape[1]
        made = part.values * part.unit
        writer.put(part, made, np.ones(number, np.float32) / part.unit, np.full(number, 8.0))
    b = writer.result()
    np.testing.assert_array_equal(b.codes, codes)
    assert np.all(b.scale == 1)
    assert np.all(b.zero == 8)


def test_spread_repeats_by_row_and_fills_up_with_zeros() -> None:
    made = spread(np.arange(1, 6, dtype=np.float32), 2, 3)
    np.testing.assert_array_equal(made, [[1, 4, 1, 4], [2, 5, 2, 5], [3, 0, 3, 0]])


@settings(max_examples=100)
@given(
    st.floats(-(2.0**120), 2.0**120, width=32), st.integers(-120, 120),
    st.sampled_from(sorted(TYPES)), st.sampled_from((2, 4, 8)),
)  # fmt: skip
def test_scales_are_numbers_of_their_type(scale: float, power: int, kind: Any, bits: int) -> None:
    unit = np.float32(2.0**power)
    if abs(scale * float(unit)) > 2.0**120:
        scale, unit = 1.0, np.float32(1)
    made = storable(np.array([scale], np.float32), np.array(unit), bits, kind)
    with np.errstate(over="raise"):
        stored = (made * unit)[0]
    assert np.isfinite(stored)
    assert stored != 0
    assert stored == stored.astype(TYPES[kind]).astype(np.float32)
    wanted = scale * float(unit)
    if 1e-4 < abs(wanted) < 6e4:
        assert stored == pytest.approx(wanted, rel=2.0**-8)


def test_the_extreme_has_code_zero_if_symmetric() -> None:
    low, high = np.array([-8, -3, -8, 0, 0], np.float32), np.array([7, 8, 8, 0, 4], np.float32)
    scale, zero = steps(low, high, 4, symmetric=True)
    np.testing.assert_array_equal(scale, [1, -1, 1, 1, -0.5])
    assert np.all(zero == 8)


def test_zero_belongs_to_a_block() -> None:
    low, high = np.array([3, -30, -5, 0], np.float32), np.array([15, -15, 10, 0], np.float32)
    scale, zero = steps(low, high, 4, symmetric=False)
    np.testing.assert_array_equal(scale, [1, 2, 1, 1])
    np.testing.assert_array_equal(zero, [0, 15, 5, 0])


def test_other_types_of_scales_are_refused() -> None:
    wrong: Any = "float64"
    with pytest.raises(ValueError, match="'float64': expected one of float32, float16, bfloat16"):
        storable(np.ones(1, np.float32), 1.0, 4, wrong)
