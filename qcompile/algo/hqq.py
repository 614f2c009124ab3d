"""Half-quadratic quantization: zero points (or scales) that let a few weights be far off so that most are close.

Badri & Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models. With w' = scale (c - zero), the error
is measured by |w - w'|^p, p < 1, which outliers hardly move. Split in two, the problem is solved in turns:

    e    = shrink(w - w', beta),     shrink(x, beta) = sign(x) max(|x| - |x|^(p - 1) / beta, 0)       eq. 5
    zero = mean(c - (w - e) / scale)                                                                  eq. 6

Departures: errors are in units of the scale, so that `beta` means the same for all weights (in theirs, small weights are
never outliers); the scale is solved for as well, by least squares on w - e, as symmetric blocks have no other freedom,
and as a zero point that must be an integer can hardly move alone; zero points are rounded in the end, since float ones
fall off the fast path of MatMulNBits, to the better one of both neighbours; and a block keeps what `rtn` gives where the
squared error of the weights is not less. No data is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.algo.blocks import Blocked, check_scheme, check_weights
from qcompile.algo.columns import Columns, ScaleType, Writer, columns, nearest, spread, storable
from qcompile.algo.rtn import loss, whole

Array = npt.NDArray[Any]

_BETA, _GROWTH = 10.0, 1.01  # of the paper: weight of the quadratic term, and its growth a turn
_STILL = 1e-3  # of a step, or of the scale: changes below it end the turns
_TINY = np.float32(1e-6)  # of a step: below it errors are 0, and |x|^(p - 1) stays finite


def hqq(
    W: Array, *, bits: int, block: int | None, symmetric: bool, p: float = 0.7, turns: int = 20,
    scales: ScaleType = "float32",
) -> Blocked:  # fmt: skip
    """Return the codes nearest to `W`; no block has a larger squared error than with `rtn`.

    Args:
        W: float (N, K).
        bits: 2 to 8.
        block: weights that share a scale; 0 or None for a row.
        symmetric: the zero points are 2**(bits - 1).
        p: the exponent of the error, above 0 and below 1.
        turns: of both steps, at most.
        scales: type whose values scales are rounded to.

    Raises:
        ValueError: an argument is out of range.
        ModelError: `W` holds NaN or infinities.
    """
    check_scheme(bits, block)
    if not 0 < p < 1:
        raise ValueError(f"the exponent p is {p}: expected a number above 0 and below 1")
    W = check_weights(W)
    writer = Writer((W.shape[0], W.shape[1]), bits, block)
    ones = np.ones(W.shape[1], np.float32)
    for part in columns(W, block):
        start, zero = whole(part, bits, symmetric=symmetric, scales=scales)
        real = spread(ones, len(W[part.rows]), block)
        fit = _Turns(part.values, real, bits, symmetric, p)
        scale, exact = fit.solve(start, zero, turns)
        tried = [(start, zero)]
        for whole_zero in (zero,) if symmetric else (np.floor(exact), np.ceil(exact)):
            # the zero point moved: the scale that fits it
            fitted, _ = fit.solve(scale, whole_zero, 2, fixed=True)
            tried.append((storable(fitted, part.unit, bits, scales), whole_zero))
        scale, zero = _best(part, tried, bits)
        writer.put(part, nearest(part.values, scale, zero, bits, out=part.values), scale, zero)
    return writer.result()


def shrink(x: Array, beta: float, p: float) -> Array:
    """The proximal step of |x|^p: sign(x) max(|x| - |x|^(p - 1) / beta, 0); a new array as `x`."""
    size = np.abs(x)
    size -= np.power(np.maximum(size, _TINY), np.float32(p - 1)) / np.float32(beta)
    np.maximum(size, 0, out=size)
    made: Array = np.copysign(size, x)
    return made


class _Turns:
    """Both steps in turns, for some columns."""

    def __init__(self, values: Array, real: Array, bits: int, symmetric: bool, p: float) -> None:
        """`real` is float32 as `values`, 0 where zeros fill up, which must not count, and else 1."""
        self._values, self._real, self._p = values, real, p
        self._symmetric, self._top = symmetric, np.float32((1 << bits) - 1)
        self._count = np.maximum(real.sum(axis=0), 1)

    def solve(
        self, scale: Array, zero: Array, turns: int, *, fixed: bool = False
    ) -> tuple[Array, Array]:
        """Scales and float zero points, (M,); the zero points stay if they are `fixed`."""
        beta = _BETA
        for _ in range(turns):
            off, codes = self._off(scale, zero)
            off -= shrink(off, beta, self._p)  # (w - e) / scale - (c - zero): what shall be less
            change = np.zeros_like(zero)
            if not (fixed or self._symmetric):
                change = (off * self._real).sum(axis=0) / self._count
                moved = np.clip(zero - change, 0, self._top)
                off += moved - zero
                zero = moved
            power = np.square(codes).sum(axis=0)
            gain = np.divide(
                (off * codes).sum(axis=0), power, out=np.zeros_like(power), where=power > 0
            )
            scale = scale * (1 + np.clip(gain, -0.5, 0.5))
            beta *= _GROWTH
            if not np.any(np.maximum(np.abs(change), np.abs(gain)) > _STILL):
                break
        return scale, zero

    def _off(self, scale: Array, zero: Array) -> tuple[Array, Array]:
        """(w - w') / scale, and c - zero, 0 where zeros fill up."""
        off = self._values / scale
        codes = np.clip(np.rint(off + zero), 0, self._top)
        codes -= zero
        codes *= self._real
        off -= codes
        return off, codes


def _best(part: Columns, tried: list[tuple[Array, Array]], bits: int) -> tuple[Array, Array]:
    """For each column the first pair of least squared error."""
    losses = np.stack([loss(part.values, scale, zero, bits, None) for scale, zero in tried])
    best = np.argmin(losses, axis=0)
    at = np.arange(len(best))
    return np.stack([t[0] for t in tried])[best, at], np.stack([t[1] for t in tried])[best, at]
