"""Weights as codes of a few bits with a scale and a zero point a block: what MatMulNBits reads.

    w'[n, k] = (codes[n, k] - zero[n, g]) * scale[n, g],     g = k // block

W is (N, K): rows are outputs, K is reduced. The last block of a row may be shorter. Codes and zero points are unsigned;
ONNX Runtime 1.32 has no fast kernel for float zero points.

Symmetric blocks have the zero point 2**(bits - 1), so that code 0 lies one step further out than the greatest code. As
ONNX Runtime's own quantizer (MLAS, `quantize_matmul_4bits`) and llama.cpp's q4_0 do, the value of largest magnitude
gets code 0, and the scale is negative where that value is positive. MatMulNBits takes negative scales (measured, 1.32).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.errors import DataError, ModelError
from qcompile.quant.affine import RANGE_LIMIT

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Blocked:
    """Weights as codes; the arrays are kept, not copied.

    Attributes:
        codes: uint8 (N, K), each at most 2**bits - 1.
        scale: float32 (N, G), finite and not 0; may be negative.
        zero: uint8 (N, G), at most 2**bits - 1.
        bits: 2 to 8.
        block: weights of a row that share a scale; 0 for the whole row.

    Raises:
        ValueError: another type or shape, a code or zero point that `bits` cannot hold, or a scale that is 0, infinite
            or NaN.
    """

    codes: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float32]
    zero: npt.NDArray[np.uint8]
    bits: int
    block: int

    def __post_init__(self) -> None:
        types = [self.codes.dtype, self.scale.dtype, self.zero.dtype]
        if types != [np.dtype(np.uint8), np.dtype(np.float32), np.dtype(np.uint8)]:
            raise ValueError(
                "blocks need uint8 codes, float32 scales and uint8 zero points, "
                f"not {types[0]}, {types[1]} and {types[2]}"
            )
        check_scheme(self.bits, self.block)
        if self.codes.ndim != 2:
            raise ValueError(f"codes have two axes, not the shape {self.codes.shape}")
        expected = (len(self.codes), groups(self.codes.shape[1], self.block))
        if self.scale.shape != expected or self.zero.shape != expected:
            raise ValueError(
                f"codes {self.codes.shape} in blocks of {self.block or 'a row'} need scales and zero points {expected}, "
                f"not {self.scale.shape} and {self.zero.shape}"
            )
        for name, held in (("code", self.codes), ("zero point", self.zero)):
            if int(held.max(initial=0)) >> self.bits:
                raise ValueError(f"a {name} is {held.max()}, which {self.bits} bits cannot hold")
        if not np.all(np.isfinite(self.scale) & (self.scale != 0)):
            raise ValueError("a scale is 0, infinite or NaN")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, which: slice | npt.NDArray[np.int64]) -> Blocked:
        """Return some rows: a slice, as views, or numbers."""
        return Blocked(
            self.codes[which], self.scale[which], self.zero[which], self.bits, self.block
        )

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Return w', float32 (N, K), a new array: the product is rounded once, as ONNX Runtime does."""
        size = width(self.codes.shape[1], self.block)
        along = np.s_[:, : self.codes.shape[1]]
        off = self.codes.astype(np.float32)  # differences of codes are exact in float32
        off -= np.repeat(self.zero, size, axis=1)[along]
        off *= np.repeat(self.scale, size, axis=1)[along]
        return off


def some(count: int, most: int) -> npt.NDArray[np.int64]:
    """Return numbers of rows, `most` of them at most, spread evenly over `count`, the first and the last one included."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))


def width(depth: int, block: int | None) -> int:
    """How many of `depth` consecutive weights share a scale, at least 1."""
    return max(min(block or depth, depth), 1)


def groups(depth: int, block: int | None) -> int:
    """How many scales a row of `depth` weights has; 1 where there are no weights at all."""
    return max(-(-depth // width(depth, block)), 1)


def check_scheme(bits: int, block: int | None) -> None:
    """Raises ValueError unless there are 2 to 8 bits and the block is none, 0 or positive."""
    if not 2 <= bits <= 8:
        raise ValueError(f"{bits} bits: expected 2 to 8")
    if block is not None and block < 0:
        raise ValueError(f"block {block} is negative: expected a number of weights, or 0 for a row")


def check_weights(W: Array) -> Array:
    """Return `W` as float32, (N, K), bounded by `RANGE_LIMIT`; not copied if it is so.

    Raises:
        ValueError: it has not two axes.
        ModelError: it holds NaN or infinities.
    """
    if W.ndim != 2:
        raise ValueError(f"weights have two axes (N, K), not the shape {W.shape}")
    W = np.asarray(W, np.float32)
    low, high = W.min(initial=0.0), W.max(initial=0.0)  # NaN passes through both
    if not (np.isfinite(low) and np.isfinite(high)):
        row, column = np.argwhere(~np.isfinite(W))[0]
        raise ModelError(
            f"the weight at row {row}, column {column} is {W[row, column]}: no scale fits it; repair the model."
        )
    return W if -low <= RANGE_LIMIT and high <= RANGE_LIMIT else W.clip(-RANGE_LIMIT, RANGE_LIMIT)


def check_power(power: Array | None, depth: int) -> Array | None:
    """Return E[x^2] as float32 (K,) of mean 1; None if there is none, or it is 0 everywhere.

    Raises:
        ValueError: another shape than (`depth`,).
        DataError: a number is negative, infinite or NaN.
    """
    if power is None:
        return None
    if power.shape != (depth,):
        raise ValueError(f"the power of the input is {power.shape}, not ({depth},)")
    wide = np.asarray(power, np.float64)
    if not np.all(np.isfinite(wide) & (wide >= 0)):
        raise DataError("a mean square of the input is negative, infinite or NaN: calibrate again.")
    most = wide.max(initial=0.0)
    if not most:
        return None
    wide = wide / most  # first: the mean of huge numbers overflows
    made: Array = (wide / wide.mean()).astype(np.float32)
    return made


def error(W: Array, blocked: Blocked, H: Array | None = None) -> float:
    """Return how far off the weights, or the outputs of the layer, are on average.

    Args:
        W: float (N, K).
        blocked: of the same shape.
        H: E[x x'], (K, K): the result is trace((W - W') H (W - W')') / N, the mean squared error of an output. Its
            diagonal alone, (K,), is cheaper and takes inputs to be uncorrelated. None: the mean of (w - w')^2.

    Raises:
        ValueError: shapes do not fit.
    """
    if W.shape != blocked.shape:
        raise ValueError(f"weights {W.shape} and codes {blocked.shape} differ in shape")
    # float64: errors that H nearly cancels are what GPTQ is about, and squares of 1e30 are no float32
    return deviation(np.asarray(W, np.float64) - blocked.dequantize(), H)


def deviation(off: Array, H: Array | None = None) -> float:
    """Return `error` of weights that are off by `off`, float64 (N, K).

    Raises:
        ValueError: `H` does not fit.
    """
    depth = off.shape[1]
    if H is not None and H.shape not in {(depth,), (depth, depth)}:
        raise ValueError(f"H is {H.shape}, not ({depth},) or ({depth}, {depth})")
    wide = None if H is None else np.asarray(H, np.float64)
    return float(row_errors(off, wide).sum()) / max(len(off) * (depth if H is None else 1), 1)


def row_errors(off: Array, H: Array | None) -> Array:
    """The error of each row, float64 (N,): e H e' for e of `off`, (N, K), and H as `error` has it."""
    if H is None:
        pulled = off
    elif H.ndim == 1:
        pulled = off * H
    else:
        pulled = off @ H
    made: Array = np.einsum("nk,nk->n", pulled, off, dtype=np.float64)
    return made
