"""A stored weight rounded to nearest a few rows at a time, with the error that this makes, in several threads.

Rows are independent, so the codes are those that `algo.rtn` gives for the whole weight. Only the codes are held whole:
the weight stays in its file, and a slab of it fits a cache of the processor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.algo.blocks import Blocked, groups, width
from qcompile.algo.rtn import rtn, search
from qcompile.errors import ModelError
from qcompile.graph.chain import Stored

SLAB = 1 << 18  # weights of a slab: 1 MiB of float32
_ROWS = 32  # of a slab at least: where the file has columns, shorter runs of them are slow to read
_SAFE = (
    1e-24,
    1e24,
)  # sums of squares that are exact enough in float32; others are made in float64


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a weight is rounded.

    Attributes:
        bits: of a code.
        block: weights of a row that share a scale; 0 for the whole row.
        symmetric: no zero points.
        search: whether scales of least error are searched for.
    """

    bits: int
    block: int
    symmetric: bool
    search: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Rounded:
    """What became of a weight.

    Attributes:
        blocked: the codes.
        error: sqrt(sum (w - w')^2 / sum w^2); 0 for a weight of zeros.
    """

    blocked: Blocked
    error: float


@contextlib.contextmanager
def mapped(tensor: ir.TensorProtocol) -> Iterator[None]:
    """Meanwhile the numbers of a tensor are mapped from its file, if it has one; nobody may keep a view of them."""
    external = isinstance(tensor, ir.ExternalTensor)
    if external:
        tensor.numpy()
        _fetch(tensor)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if external:
            with contextlib.suppress(BufferError):  # another reader has it open still
                tensor.release()  # type: ignore[attr-defined]


def _fetch(tensor: ir.ExternalTensor) -> None:
    """The system begins to read the tensor from its file, where it can be told to."""
    if tensor.raw is None or not hasattr(mmap, "MADV_WILLNEED"):
        return
    start = (tensor.offset or 0) // mmap.PAGESIZE * mmap.PAGESIZE
    end = (tensor.offset or 0) + tensor.nbytes
    with contextlib.suppress(OSError, ValueError):  # it is only advice
        tensor.raw.madvise(mmap.MADV_WILLNEED, start, end - start)


def round_stored(weight: Stored, scheme: Scheme, pool: Executor) -> Rounded:
    """The codes nearest to a stored weight (N, K), and their error; scales have the type that the reader sees.

    Raises:
        ModelError: the weight holds NaN or infinities.
    """
    rows, depth = weight.shape
    shape = (rows, groups(depth, scheme.block))
    codes = np.empty((rows, depth), np.uint8)
    scale, zero = np.empty(shape, np.float32), np.empty(shape, np.uint8)
    step = max(SLAB // max(depth, 1), _ROWS)
    with mapped(weight.tensor):

        def slab(first: int) -> tuple[float, float]:
            part = slice(first, first + step)
            W = contiguous(weight, weight.moved()[part])
            made = _round(W, scheme, weight, first)
            codes[part], scale[part], zero[part] = made.codes, made.scale, made.zero
            return squares(W, made)

        sums = list(pool.map(slab, range(0, rows, step)))
    off, whole = (math.fsum(part) for part in zip(*sums, strict=True))
    blocked = Blocked(codes, scale, zero, scheme.bits, scheme.block)
    return Rounded(blocked, math.sqrt(off / whole) if whole else 0.0)


def contiguous(weight: Stored, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Some rows of a stored weight as the reader sees them, float32 (n, K), contiguous.

    Rows of a transposed weight are copied as they are stored first: to turn them where they stand, each number from
    another page, takes ten times as long.
    """
    if not values.flags.c_contiguous:
        values = np.ascontiguousarray(values.T).T
    return np.ascontiguousarray(weight.cast(values))


def _round(W: npt.NDArray[np.float32], scheme: Scheme, weight: Stored, first: int) -> Blocked:
    """`W`, rows of the weight from `first` on, rounded."""
    rounding = search if scheme.search else rtn
    try:
        return rounding(
            W, bits=scheme.bits, block=scheme.block, symmetric=scheme.symmetric,
            scales="float16" if weight.dtype == ir.DataType.FLOAT16 else "float32",
        )  # fmt: skip
    except ModelError as error:
        bad = np.argwhere(~np.isfinite(W))
        if not len(bad):
            raise
        row, column = bad[0]
        raise ModelError(
            f"the weight {weight.root.name!r} is {W[row, column]} at output {first + row}, input {column}: "
            "no scale fits it; repair the model."
        ) from error


def squares(W: npt.NDArray[np.float32], made: Blocked) -> tuple[float, float]:
    """The sums of (w - w')^2 and of w^2."""
    rows, depth = W.shape
    number = made.scale.shape[1]
    if width(depth, made.block) * number != depth:
        off = made.dequantize()
    else:  # blocks of one length need no repeated scales
        shaped = made.codes.reshape(rows, number, -1).astype(np.float32)
        shaped -= made.zero[:, :, None]
        shaped *= made.scale[:, :, None]
        off = shaped.reshape(rows, depth)
    off -= W
    return _squared(off), _squared(W)


def _squared(values: npt.NDArray[np.float32]) -> float:
    flat = values.reshape(-1)
    with np.errstate(over="ignore"):
        total = float(np.dot(flat, flat))
    if total == 0 and not flat.any():
        return 0.0
    if _SAFE[0] < total < _SAFE[1]:
        return total
    wide = flat.astype(np.float64)
    return float(np.dot(wide, wide))
