"""Codes of 4 and 2 bits in the bytes of an ONNX tensor: the first code in the lowest bits.

Source: onnx.proto, TensorProto.raw_data ("two 4-bit elements are packed into one byte, the first in
the four least significant bits"; likewise four of 2 bits). Unused bits of the last byte are 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from qcompile.quant.scheme import QType


def pack(codes: npt.NDArray[Any], qtype: QType) -> npt.NDArray[np.uint8]:
    """Return the bytes of `codes` in memory order: shape (ceil(size * bits / 8),), a new array.

    Raises:
        ValueError: the type has more than 4 bits, or the codes are not of its type and range.
    """
    per_byte = _per_byte(qtype)
    if codes.dtype != qtype.dtype:
        raise ValueError(f"codes of {qtype} are {qtype.dtype}, not {codes.dtype}")
    if codes.size and not qtype.qmin <= int(codes.min()) <= int(codes.max()) <= qtype.qmax:
        raise ValueError(f"a code lies outside {qtype.qmin}..{qtype.qmax} of {qtype}")
    flat = codes.reshape(-1).view(np.uint8)  # a negative code keeps its two's complement bits
    data = np.zeros(-(-flat.size // per_byte), np.uint8)
    for place in range(per_byte):
        part = flat[place::per_byte] & np.uint8((1 << qtype.bits) - 1)
        data[: part.size] |= part << np.uint8(place * qtype.bits)
    return data


def unpack(data: npt.NDArray[np.uint8], qtype: QType, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return the codes that `pack` turned into `data`: of `shape`, the code type, a new array.

    Raises:
        ValueError: the type has more than 4 bits, or `data` is not as long as `shape` needs.
    """
    per_byte = _per_byte(qtype)
    size = math.prod(shape)
    if data.dtype != np.uint8 or data.shape != (-(-size // per_byte),):
        raise ValueError(
            f"{shape} codes of {qtype} need {-(-size // per_byte)} bytes of uint8, "
            f"not {data.dtype} of shape {data.shape}"
        )
    flat = np.empty(size, np.uint8)
    for place in range(per_byte):
        part = flat[place::per_byte]
        # Up to the top of the byte, then down again as the code type: int8 fills with the sign.
        part[...] = data[: part.size] << np.uint8(8 - (place + 1) * qtype.bits)
    codes = flat.view(qtype.dtype)
    codes >>= 8 - qtype.bits
    return codes.reshape(shape)


def _per_byte(qtype: QType) -> int:
    if qtype.bits > 4:
        raise ValueError(f"{qtype} is not packed: only types of 4 and 2 bits are")
    return 8 // qtype.bits
