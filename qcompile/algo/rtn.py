"""Blocks rounded to nearest: over their whole range, or over the part of it that leaves least error.

`rtn` gives what ONNX Runtime's own quantizer gives. `search` tries, for each block, narrower and wider steps; for
symmetric blocks both signs of the scale, as either end may get the code that lies one step further out, and for
asymmetric ones the zero points beside the nearest one. A block keeps the first trial of least

    sum_k p_k (w_k - w'_k)^2,      p = E[x^2] if given, else 1

With p it is the error of the output for uncorrelated inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.algo.blocks import Blocked, check_power, check_scheme, check_weights
from qcompile.algo.columns import (
    Columns,
    ScaleType,
    Writer,
    columns,
    nearest,
    spread,
    steps,
    storable,
)

Array = npt.NDArray[Any]

FACTORS = (1.0, 1.14, 1.07, 0.95, 0.9, 0.85, 0.8, 0.74, 0.67, 0.6)
"""What `search` multiplies the step of the whole range by. 8/7 is the step that clips neither end if symmetric."""

_FINE = 8  # bits of which the first factors alone are tried: on normal weights the others never win
_WIDE = 3  # of the factors


def rtn(
    W: Array, *, bits: int, block: int | None, symmetric: bool, scales: ScaleType = "float32"
) -> Blocked:
    """Return the codes nearest to `W`, the scale of each block covering it and 0.

    Args:
        W: float (N, K).
        bits: 2 to 8.
        block: weights that share a scale; 0 or None for a row.
        symmetric: the zero points are 2**(bits - 1).
        scales: type whose values scales are rounded to, before the codes are chosen.

    Raises:
        ValueError: an argument is out of range.
        ModelError: `W` holds NaN or infinities.
    """
    check_scheme(bits, block)
    W = check_weights(W)
    writer = Writer((W.shape[0], W.shape[1]), bits, block)
    for part in columns(W, block):
        scale, zero = whole(part, bits, symmetric=symmetric, scales=scales)
        writer.put(part, nearest(part.values, scale, zero, bits, out=part.values), scale, zero)
    return writer.result()


def search(
    W: Array, *, bits: int, block: int | None, symmetric: bool, power: Array | None = None,
    scales: ScaleType = "float32", factors: Sequence[float] | None = None,
) -> Blocked:  # fmt: skip
    """Return the codes nearest to `W` for the scales of least error; no block is worse off than with `rtn`.

    Args:
        W: float (N, K).
        bits: 2 to 8.
        block: as for `rtn`.
        symmetric: the zero points are 2**(bits - 1).
        power: E[x^2], (K,).
        scales: as for `rtn`.
        factors: positive; the whole range is always tried first. By default `FACTORS`, of 8 bits the widest alone: to clip never helps.

    Raises:
        ValueError, ModelError: as `rtn`; a factor is not positive.
        DataError: `power` holds what no mean square can be.
    """
    check_scheme(bits, block)
    W = check_weights(W)
    factors = factors or (FACTORS[:_WIDE] if bits >= _FINE else FACTORS)
    if not all(factor > 0 for factor in factors):
        raise ValueError(f"factors {list(factors)} are not all above 0")
    power = check_power(power, W.shape[1])
    writer = Writer((W.shape[0], W.shape[1]), bits, block)
    for part in columns(W, block):
        weight = None if power is None else spread(power, len(W[part.rows]), block)
        scale, zero = search_columns(
            part, bits, symmetric=symmetric, weight=weight, scales=scales, factors=factors
        )
        writer.put(part, nearest(part.values, scale, zero, bits, out=part.values), scale, zero)
    return writer.result()


def whole(
    part: Columns, bits: int, *, symmetric: bool, scales: ScaleType = "float32"
) -> tuple[Array, Array]:
    """The scale, in units, and the zero point that cover each column, float32 (M,)."""
    return steps(*part.reach(), bits, symmetric=symmetric, unit=part.unit, kind=scales)


def search_columns(
    part: Columns, bits: int, *, symmetric: bool, weight: Array | None = None,
    scales: ScaleType = "float32", factors: Sequence[float] = FACTORS,
) -> tuple[Array, Array]:  # fmt: skip
    """The scale, in units, and the zero point of least error for each column, float32 (M,).

    Args:
        part: the columns.
        bits: of a code.
        symmetric: as for `search`.
        scales: as for `search`.
        factors: as for `search`.
        weight: of the squared errors, float32, as the values or (B, 1).
    """
    best_scale, best_zero = whole(part, bits, symmetric=symmetric, scales=scales)
    work = np.empty_like(part.values), np.empty_like(part.values)
    best = loss(part.values, best_scale, best_zero, bits, weight, work)
    for scale, zero in trials(best_scale, best_zero, bits, symmetric=symmetric, factors=factors):
        stored = storable(scale, part.unit, bits, scales)
        error = loss(part.values, stored, zero, bits, weight, work)
        better = error < best
        best = np.where(better, error, best)
        best_scale = np.where(better, stored, best_scale)
        best_zero = np.where(better, zero, best_zero)
    return best_scale, best_zero


def trials(
    scale: Array, zero: Array, bits: int, *, symmetric: bool, factors: Sequence[float] = FACTORS
) -> Iterator[tuple[Array, Array]]:
    """Other scales and zero points to try than those of the whole range, (M,) each."""
    if symmetric:
        for factor, sign in itertools.product(factors, (1, -1)):
            if (factor, sign) != (1, 1):
                yield scale * np.float32(sign * factor), zero
        return
    top = np.float32((1 << bits) - 1)
    for factor, shift in itertools.product(factors, (0, 1, -1)):
        if (factor, shift) != (1, 0):
            moved = np.clip(zero + np.float32(shift), 0, top) if shift else zero
            yield scale * np.float32(factor), moved


def loss(
    values: Array, scale: Array, zero: Array, bits: int, weight: Array | None,
    work: tuple[Array, Array] | None = None,
) -> Array:  # fmt: skip
    """The weighted squared error of each column when rounded to nearest, float32 (M,).

    Args:
        values: float32 (B, M), of magnitude 2 at most.
        scale: float32 (M,).
        zero: float32 (M,).
        bits: of a code.
        weight: as for `search_columns`.
        work: two arrays as `values`, to write to.
    """
    exact, codes = work or (np.empty_like(values), np.empty_like(values))
    np.divide(values, scale, out=exact)
    np.rint(exact, out=codes)
    np.maximum(codes, -zero, out=codes)
    np.minimum(codes, np.float32((1 << bits) - 1) - zero, out=codes)
    exact -= codes
    exact *= scale  # before the square: values over a step of 1e-30 have no square
    np.square(exact, out=exact)
    if weight is not None:
        exact *= weight
    made: Array = exact.sum(axis=0)
    return made
