"""The bytes that ONNX Runtime's weight-only operators read, and those of DequantizeLinear by blocks.

    w'[n, k] = (codes[n, k] - zero[n, g]) * scale[n, g],   g = k // block,   codes (N, K) from 0 to 2**bits - 1

* MatMulNBits:          B (N, G, block * bits / 8) uint8, scales (N, G), zero points (N, ceil(G * bits / 8)) uint8.
* GatherBlockQuantized: data (N, ceil(K * bits / 8)) uint8, scales and zero points as above. Where a row fills its
  blocks these are the bytes of B in another shape. Rows of ceil(K * bits / 8) bytes hold K rounded up to whole bytes,
  and that many columns come out.
* DequantizeLinear:     codes (K, N), scales and zero points (G, N), axis 0.

The first code stands in the lowest bits of its byte. Bits beyond K are 0; they meet inputs that ORT pads with 0.
Sources: ORT 1.32, ContribOperators.md, MatMulNBits and GatherBlockQuantized; ONNX, DequantizeLinear-21. Measured there:
B must have three axes; scales (N, G) and (N * G,) are both taken; blocks are powers of two from 16, of at most 256
for 2 bits (and for the fusion of DequantizeLinear); 3, 5, 6 and 7 bits are refused.

So codes of 3 bits are stored in 4, of 5 to 7 in 8. Symmetric ones move up to the middle of the wider range, which is
the operators' default zero point. Blocks of other sizes are divided into ones that are taken, with equal scales.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompile.quant.affine import SLAB
from qcompile.quant.scheme import QTYPES

if TYPE_CHECKING:
    import numpy.typing as npt

    from qcompile.quant.scheme import QType

BLOCKS = (16, 256)
"""The least and the greatest block that every operator here takes, for all bits."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a weight (N, K) of codes is stored; knows all shapes before there are codes.

    Attributes:
        rows: N.
        depth: K.
        bits: of a code, 2 to 8.
        block: codes of a row that share a scale; 0 for the whole row.
        symmetric: every zero point is 2**(bits - 1), so none is stored.

    Raises:
        ValueError: no operator takes such blocks or bits; the message is what `misfit` says.
    """

    rows: int
    depth: int
    bits: int
    block: int
    symmetric: bool

    def __post_init__(self) -> None:
        reason = misfit(self.bits, self.block)
        if reason is not None:
            raise ValueError(reason)

    @property
    def stored(self) -> int:
        """Bits that a stored code takes: 2, 4 or 8."""
        return next(bits for bits in (2, 4, 8) if bits >= self.bits)

    @property
    def size(self) -> int:
        """The block that the operator is told."""
        least, most = BLOCKS
        if self.block == 0:
            return min(max(least, 1 << max(self.depth - 1, 0).bit_length()), most)
        return min(self.block & -self.block, most)

    @property
    def groups(self) -> int:
        """G, the number of stored scales of a row."""
        return -(-self.depth // self.size)

    @property
    def lift(self) -> int:
        """What is added to a code, so that the zero point of symmetric ones is the default of the stored bits."""
        return (1 << (self.stored - 1)) - (1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def product_shape(self) -> tuple[int, int, int]:
        """The shape of B of MatMulNBits."""
        return self.rows, self.groups, self.size * self.stored // 8

    @property
    def table_shape(self) -> tuple[int, int]:
        """The shape of data of GatherBlockQuantized."""
        return self.rows, -(-self.depth * self.stored // 8)

    @property
    def zeros_shape(self) -> tuple[int, int]:
        """The shape of the packed zero points of both."""
        return self.rows, -(-self.groups * self.stored // 8)

    @property
    def portable_type(self) -> QType:
        """The type of the codes of DequantizeLinear: signed without zero points, or unsigned."""
        return QTYPES[f"{'' if self.symmetric else 'u'}int{self.stored}"]


def misfit(bits: int, block: int) -> str | None:
    """Why no operator takes these codes, or None."""
    if not 2 <= bits <= 8:
        return f"codes of {bits} bits: the kernels take 2 to 8"
    if block % BLOCKS[0]:
        return f"blocks of {block} weights: the kernels take multiples of {BLOCKS[0]}"
    return None


def product_codes(codes: npt.NDArray[np.uint8], layout: Layout) -> npt.NDArray[np.uint8]:
    """Return B of MatMulNBits, uint8 (N, G, size * bits / 8), a new array; `codes` is uint8 (N, K)."""
    wide = layout.groups * layout.size
    return pack_rows(codes, layout.stored, wide, layout.lift).reshape(layout.product_shape)


def table_codes(codes: npt.NDArray[np.uint8], layout: Layout) -> npt.NDArray[np.uint8]:
    """Return data of GatherBlockQuantized, uint8 (N, ceil(K * bits / 8)), a new array; `codes` is uint8 (N, K)."""
    return pack_rows(codes, layout.stored, layout.depth, layout.lift)


def packed_zeros(zero: npt.NDArray[np.uint8], layout: Layout) -> npt.NDArray[np.uint8]:
    """Return the zero points of both operators, uint8 (N, ceil(G * bits / 8)); `zero` has one a block, uint8."""
    return pack_rows(spread(zero, layout), layout.stored, layout.groups)


def spread(params: npt.NDArray[Any], layout: Layout) -> npt.NDArray[Any]:
    """Return scales or zero points (N, ceil(K / block)) as (N, G): those of a divided block are repeated."""
    if layout.size == layout.block:
        return params
    start = np.arange(layout.groups) * layout.size
    return params[:, start // layout.block if layout.block else np.zeros_like(start)]


def portable_codes(codes: npt.NDArray[np.uint8], layout: Layout) -> npt.NDArray[Any]:
    """Return the codes of DequantizeLinear, (K, N) of the carrier of `layout.portable_type`, contiguous, new."""
    made = np.array(codes.T, order="C")  # a copy even where the transpose is contiguous
    if not layout.symmetric:
        return made
    made -= np.uint8(1 << (layout.bits - 1))  # wraps around: two's complement
    return made.view(np.int8)


def pack_rows(
    codes: npt.NDArray[np.uint8], bits: int, wide: int | None = None, lift: int = 0
) -> npt.NDArray[np.uint8]:
    """Return each row packed into whole bytes, first code lowest: uint8 (R, ceil(wide * bits / 8)), a new array.

    Args:
        codes: uint8 (R, C), less than 2**bits after `lift` is added.
        bits: 2, 4 or 8.
        wide: columns, at least C; those beyond C are 0.
        lift: added to every code.
    """
    rows, columns = codes.shape
    per_byte = 8 // bits
    data = np.zeros((rows, -(-max(wide or 0, columns) // per_byte)), np.uint8)
    step = max(1, SLAB // max(columns, 1))
    for start in range(0, rows, step):  # temporaries of a slab only
        for place in range(per_byte):
            part = codes[start : start + step, place::per_byte]
            lifted = part + np.uint8(lift) if lift else part
            into = data[start : start + step, : part.shape[1]]
            if place:
                into |= lifted << np.uint8(place * bits)
            else:
                into[...] = lifted
    return data


def unpack_rows(data: npt.NDArray[np.uint8], bits: int, columns: int) -> npt.NDArray[np.uint8]:
    """Return the codes uint8 (R, columns) that `pack_rows` stored, a new array."""
    per_byte = 8 // bits
    codes = np.empty((len(data), columns), np.uint8)
    for place in range(per_byte):
        part = codes[:, place::per_byte]
        part[...] = (data[:, : part.shape[1]] >> np.uint8(place * bits)) & np.uint8((1 << bits) - 1)
    return codes
