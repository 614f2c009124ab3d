"""Codes of a cache: against a loop over elements, and what ranges promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile.quant.cache import (
    KINDS,
    CacheParams,
    Kind,
    Packing,
    choose_cache,
    decode,
    encode,
    turned,
)

FLOATS = st.floats(-100, 100, width=32)
VALUES = hnp.arrays(np.float32, (2, 3, 4), elements=FLOATS)


def fitted(x: np.ndarray[Any, Any], kind: Kind, *, centred: bool = False) -> CacheParams:
    return choose_cache(x.min(axis=1), x.max(axis=1), kind, centred=centred)


def slow_codes(x: np.ndarray[Any, Any], params: CacheParams) -> np.ndarray[Any, Any]:
    """One element after the other, in float32."""
    low, high = {"int8": (-128, 127), "uint8": (-128, 127), "int4": (-8, 7)}[params.kind]
    made = np.zeros(x.shape, np.int64)
    for index, value in np.ndenumerate(x):
        place = index[0], index[2]
        shifted = value if params.offset is None else value - params.offset[place]
        made[index] = min(max(round(float(shifted / params.scale[place])), low), high)
    return made


def slow_bytes(codes: np.ndarray[Any, Any], packing: Packing) -> np.ndarray[Any, Any]:
    width = codes.shape[-1]
    made = np.zeros((*codes.shape[:-1], width // 2), np.uint8)
    for index in np.ndindex(made.shape):
        *lead, d = index
        pair = (2 * d, 2 * d + 1) if packing is Packing.PAIRS else (d, d + width // 2)
        made[index] = (codes[*lead, pair[0]] + 8) + 16 * (codes[*lead, pair[1]] + 8)
    return made


@given(VALUES, st.sampled_from(KINDS), st.booleans(), st.sampled_from(Packing))
@settings(deadline=None)
def test_codes_are_those_of_the_loop(
    x: np.ndarray[Any, Any], kind: Kind, centred: bool, packing: Packing
) -> None:
    params = fitted(x, kind, centred=centred)
    wide = x * np.float32(1.5)  # some saturate
    wanted = slow_codes(wide, params)
    stored = encode(wide, params, packing)
    assert stored.dtype == params.dtype
    assert stored.shape[-1] == params.stored_width
    if kind == "int4":
        np.testing.assert_array_equal(stored, slow_bytes(wanted, packing))
    else:
        np.testing.assert_array_equal(stored.astype(np.int64) - params.zero, wanted)


@given(VALUES, st.sampled_from(KINDS), st.booleans(), st.sampled_from(Packing))
@settings(deadline=None)
def test_values_in_the_range_are_half_a_scale_off(
    x: np.ndarray[Any, Any], kind: Kind, centred: bool, packing: Packing
) -> None:
    params = fitted(x, kind, centred=centred)
    gap = np.abs(decode(encode(x, params, packing), params, packing).astype(np.float64) - x)
    peak = np.abs(x).max(axis=1)
    # an offset of whole scales moves the ends of the range by up to half a scale
    most = 1.0 if kind == "int4" and centred else 0.5
    assert np.all(gap.max(axis=1) <= params.scale * most + 1e-6 * peak + 1e-30)


@given(VALUES, st.sampled_from(KINDS))
@settings(deadline=None)
def test_decoded_values_have_the_same_codes_again(x: np.ndarray[Any, Any], kind: Kind) -> None:
    params = fitted(x, kind)
    codes = encode(x, params)
    np.testing.assert_array_equal(encode(decode(codes, params), params), codes)


@given(VALUES)
@settings(deadline=None)
def test_clipping_int4_never_adds_error(x: np.ndarray[Any, Any]) -> None:
    plain = fitted(x, "int4")
    clipped = choose_cache(x.min(axis=1), x.max(axis=1), "int4", seen=x)

    def error(params: CacheParams) -> np.ndarray[Any, Any]:
        gap = decode(encode(x, params), params).astype(np.float64) - x
        found: np.ndarray[Any, Any] = np.square(gap).sum(axis=1)
        return found

    assert np.all(error(clipped) <= error(plain) * (1 + 1e-5) + 1e-30)


def test_clipping_pays_where_one_value_stands_out() -> None:
    x = np.random.default_rng(0).normal(size=(1, 400, 2)).astype(np.float32)
    x[0, 0, 0] = 9
    clipped = choose_cache(x.min(axis=1), x.max(axis=1), "int4", seen=x)
    assert clipped.scale[0, 0] < 0.8 * fitted(x, "int4").scale[0, 0]


def test_an_offset_serves_a_channel_on_one_side_of_zero() -> None:
    x = np.random.default_rng(0).uniform(0, 6, (1, 50, 2)).astype(np.float32)
    centred = fitted(x, "int4", centred=True)
    assert centred.offset is not None
    assert np.all(centred.scale < fitted(x, "int4").scale / 2)
    np.testing.assert_allclose(decode(encode(x, centred), centred), x, atol=0.21)


@given(VALUES)
@settings(deadline=None)
def test_zero_is_exact_with_an_offset(x: np.ndarray[Any, Any]) -> None:
    params = fitted(x, "int4", centred=True)
    np.testing.assert_array_equal(decode(encode(0 * x, params), params), np.zeros_like(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_of_zeros_stays_zero(kind: Kind) -> None:
    x = np.zeros((1, 2, 2), np.float32)
    params = fitted(x, kind)
    assert np.all(params.scale == 1)
    np.testing.assert_array_equal(decode(encode(x, params), params), x)


@given(hnp.arrays(np.float32, (3, 4), elements=FLOATS), st.floats(0, 6.3), st.booleans())
@settings(deadline=None)
def test_turned_pairs_stay_within_their_length(
    x: np.ndarray[Any, Any], angle: float, interleaved: bool
) -> None:
    first, second = (x[:, 0::2], x[:, 1::2]) if interleaved else (x[:, :2], x[:, 2:])
    c, s = np.cos(angle), np.sin(angle)
    turn = np.stack(
        [first * c - second * s, first * s + second * c], axis=-1
    )  # (3, 2, first/second)
    made = turn.reshape(3, 4) if interleaved else np.moveaxis(turn, -1, 1).reshape(3, 4)
    assert np.all(np.abs(made) <= turned(x) * (1 + 1e-5) + 1e-5)


def test_an_odd_width_has_no_pairs() -> None:
    np.testing.assert_array_equal(turned(np.array([[-1, 2, -3]], np.float32)), [[1, 2, 3]])


@pytest.mark.parametrize(
    ("lo", "hi"), [(0.0, np.nan), (-np.inf, 0.0), (1.0, 0.0)], ids=["nan", "inf", "exchanged"]
)
def test_a_wrong_range_is_refused(lo: float, hi: float) -> None:
    with pytest.raises(ValueError, match="range of a cache"):
        choose_cache(np.full((1, 2), lo, np.float32), np.full((1, 2), hi, np.float32), "int8")
