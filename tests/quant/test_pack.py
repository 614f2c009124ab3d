"""Packing, against its inverse and against what onnx itself writes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.quant.pack import pack, unpack
from qcompile.quant.scheme import INT2, INT4, INT8, UINT2, UINT4, QType

NARROW = [INT4, UINT4, INT2, UINT2]


@st.composite
def cases(draw: st.DrawFn) -> tuple[QType, npt.NDArray[Any]]:
    qtype = draw(st.sampled_from(NARROW))
    shape = draw(st.lists(st.integers(0, 5), max_size=3).map(tuple))
    size = math.prod(shape)
    codes = st.lists(st.integers(qtype.qmin, qtype.qmax), min_size=size, max_size=size)
    return qtype, np.array(draw(codes), qtype.dtype).reshape(shape)


@settings(database=None, deadline=None, derandomize=True)
@given(cases())
def test_unpack_is_the_inverse_of_pack(case: tuple[QType, npt.NDArray[Any]]) -> None:
    qtype, codes = case
    data = pack(codes, qtype)
    assert data.shape == (math.ceil(codes.size * qtype.bits / 8),)
    np.testing.assert_array_equal(unpack(data, qtype, codes.shape), codes, strict=True)


@settings(database=None, deadline=None, derandomize=True)
@given(cases())
def test_bytes_are_those_of_onnx(case: tuple[QType, npt.NDArray[Any]]) -> None:
    qtype, codes = case
    expected = onnx.numpy_helper.from_array(codes.astype(qtype.storage)).raw_data
    assert pack(codes, qtype).tobytes() == expected


def test_the_first_code_lies_lowest_and_the_end_is_padded_with_zeros() -> None:
    assert pack(np.array([1, -2, 7], np.int8), INT4).tolist() == [0xE1, 0x07]
    assert pack(np.array([1, 2, 3, 0, 3], np.uint8), UINT2).tolist() == [0b00_11_10_01, 0b11]


def test_codes_in_another_memory_order_are_packed_by_index() -> None:
    codes = np.arange(6, dtype=np.int8).reshape(2, 3)
    assert pack(codes.T, INT4).tolist() == pack(np.ascontiguousarray(codes.T), INT4).tolist()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="int8 is not packed"):
        pack(np.zeros(2, np.int8), INT8)
    with pytest.raises(ValueError, match="int8 is not packed"):
        unpack(np.zeros(2, np.uint8), INT8, (2,))
    with pytest.raises(ValueError, match=r"outside -8\.\.7"):
        pack(np.array([8], np.int8), INT4)
    with pytest.raises(ValueError, match="codes of uint4 are uint8, not int8"):
        pack(np.array([1], np.int8), UINT4)
    with pytest.raises(ValueError, match="need 2 bytes"):
        unpack(np.zeros(3, np.uint8), INT4, (3,))
    with pytest.raises(ValueError, match="uint8, not int8"):
        unpack(np.zeros(2, np.int8), INT4, (3,))
