"""A block of weights in each column: the form that the algorithms for blocks work on.

So numpy's inner loops run over many blocks, which differ in scale, and not over the few weights of one. In each column
values are divided by a power of two, which is exact down to 2**-126 of the largest, so that their squares fit a float32
whatever the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompile.algo.blocks import Blocked, groups, width
from qcompile.quant.affine import SCALE_FLOOR

Array = npt.NDArray[Any]
ScaleType = Literal["float32", "float16", "bfloat16"]

CHUNK = 1 << 16  # weights that are worked on at once: 256 KiB of float32 a temporary
_SHORT = 256  # weights of a block, up to which it pays to turn them before they are reduced
_SPAN = (
    2.0**-100
)  # of the greatest weight beside it, the least that a scale may be: x / scale stays finite
_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_LEAST = {"float32": float(SCALE_FLOOR), "float16": 2.0**-24, "bfloat16": float(SCALE_FLOOR)}
_MOST = {"float32": np.inf, "float16": 65504.0, "bfloat16": np.inf}


def storable(scale: Array, unit: Array | float, bits: int, kind: ScaleType = "float32") -> Array:
    """Return `scale`, rounded so that `scale * unit` is a number of type `kind`, neither 0 nor too large.

    Args:
        scale: float32, of any sign; 0 counts as positive.
        unit: power of two that weights were divided by; broadcasts against `scale`.
        bits: the greatest difference of codes times the scale stays finite.
        kind: that scales are stored as.

    Raises:
        ValueError: no such type.
    """
    if kind not in get_args(ScaleType):
        raise ValueError(
            f"scales of type {kind!r}: expected one of {', '.join(get_args(ScaleType))}"
        )
    wide = np.asarray(scale, np.float64) * unit
    least = np.maximum(_LEAST[kind], _SPAN * np.asarray(unit, np.float64))
    most = min(_MOST[kind], 2.0**127 / (2**bits - 1))
    size = np.clip(np.abs(wide), np.minimum(least, most), most).astype(_TYPES[kind])
    made: Array = (np.copysign(size.astype(np.float64), wide) / unit).astype(np.float32)
    return made


def steps(
    low: Array, high: Array, bits: int, *, symmetric: bool, unit: Array | float = 1.0,
    kind: ScaleType = "float32",
) -> tuple[Array, Array]:  # fmt: skip
    """Return scale and zero point, float32 as `low`, of blocks that reach from `low` to `high`; 0 belongs to a block.

    Symmetric: scale = -extreme / 2**(bits - 1), extreme the bound of larger magnitude, so that it has code 0.
    Asymmetric: scale = (high - low) / (2**bits - 1), zero = rint(-low / scale). A block of zeros has scale 1.
    """
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if symmetric:
        middle = 1 << (bits - 1)
        scale = np.where(high > -low, high, low) / np.float32(-middle)
        scale = storable(np.where(scale == 0, 1 / np.asarray(unit), scale), unit, bits, kind)
        return scale, np.full_like(scale, middle)
    top = (1 << bits) - 1
    scale = (high - low) / np.float32(top)
    scale = storable(np.where(scale == 0, 1 / np.asarray(unit), scale), unit, bits, kind)
    return scale, np.clip(np.rint(-low / scale), 0, top).astype(np.float32)


def nearest(
    columns: Array, scale: Array, zero: Array, bits: int, out: Array | None = None
) -> Array:
    """Return the codes next to `columns`, float32 (B, M): saturate(rint(w / scale) + zero).

    Args:
        columns: float32 (B, M).
        scale: float32 (M,).
        zero: float32 (M,).
        bits: of a code.
        out: float32 (B, M) to write to.
    """
    codes = np.divide(columns, scale, out=out)
    np.rint(codes, out=codes)
    codes += zero
    np.maximum(codes, 0, out=codes)
    np.minimum(codes, np.float32((1 << bits) - 1), out=codes)
    return codes


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
    """Some rows of W with a block in each column, filled up with zeros.

    Attributes:
        rows: which of W.
        values: float32 (B, M) with M = rows * G, divided by `unit`: magnitudes below 2.
        unit: powers of two, float32 (M,).
        bounds: the least and the greatest of the values and 0, float32 (M,), where they are known.
    """

    rows: slice
    values: Array
    unit: Array
    bounds: tuple[Array, Array] | None = None

    def reach(self) -> tuple[Array, Array]:
        """The least and the greatest value of each block and 0, float32 (M,)."""
        return _reach(self.values) if self.bounds is None else self.bounds


def columns(W: Array, block: int | None, most: int = CHUNK) -> Iterator[Columns]:
    """Yield the rows of `W`, float32 (N, K), a few at a time: about `most` weights, one row at least."""
    count, depth = W.shape
    size, number = width(depth, block), groups(depth, block)
    step = max(most // (size * number), 1)
    for first in range(0, count, step):
        part = W[first : first + step]
        if size * number != depth:
            part = np.pad(part, ((0, 0), (0, size * number - depth)))
        # (n, G * B) -> (n, G, B) -> (B, n, G) -> (B, M), a view of rows that are contiguous
        values = part.reshape(-1, number, size).transpose(2, 0, 1).reshape(size, -1)
        low, high = _reach(values)
        unit = powers(np.maximum(high, -low))
        # to divide keeps the order of numbers, rounded or not: the bounds need not be found again
        yield Columns(slice(first, first + step), values / unit, unit, (low / unit, high / unit))


def _reach(values: Array) -> tuple[Array, Array]:
    """The least and the greatest value of each column and 0."""
    if values.flags.f_contiguous and len(values) <= _SHORT:  # one short loop a column
        values = np.ascontiguousarray(values)
    return values.min(axis=0, initial=0), values.max(axis=0, initial=0)


def powers(extreme: Array) -> Array:
    """The power of two at or below each magnitude, float32; 1 for 0, and never a denormal."""
    exponent = np.maximum(np.frexp(extreme)[1] - 1, -126)
    made: Array = np.where(extreme > 0, np.ldexp(np.float32(1), exponent), 1).astype(np.float32)
    return made


def spread(power: Array, count: int, block: int | None) -> Array:
    """E[x^2], (K,), as weights of columns of `count` rows, float32 (B, count * G); 0 where zeros fill up."""
    size, number = width(len(power), block), groups(len(power), block)
    whole = np.zeros(size * number, np.float32)
    whole[: len(power)] = power
    return np.tile(whole.reshape(number, size).T, (1, count))


class Writer:
    """Gathers what columns give into a `Blocked`."""

    def __init__(self, shape: tuple[int, int], bits: int, block: int | None) -> None:
        """`shape` is (N, K)."""
        self._bits, self._block, self._depth = bits, block or 0, shape[1]
        self._groups = groups(shape[1], block)
        self._codes = np.empty(shape, np.uint8)
        self._scale = np.empty((shape[0], self._groups), np.float32)
        self._zero = np.empty((shape[0], self._groups), np.uint8)

    def put(self, part: Columns, codes: Array, scale: Array, zero: Array) -> None:
        """Keep `codes` (B, M), and `scale`, in units, and `zero`, (M,)."""
        size = len(codes)
        # (B, M) -> (B, n, G) -> (n, G, B) -> (n, G * B)
        turned = codes.astype(np.uint8).reshape(size, -1, self._groups).transpose(1, 2, 0)
        self._codes[part.rows] = turned.reshape(-1, size * self._groups)[:, : self._depth]
        self._scale[part.rows] = (scale * part.unit).reshape(-1, self._groups)
        self._zero[part.rows] = zero.reshape(-1, self._groups)

    def result(self) -> Blocked:
        """What was kept."""
        return Blocked(self._codes, self._scale, self._zero, self._bits, self._block)
