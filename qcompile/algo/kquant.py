"""Scales and zero points refitted to the codes they gave, from several starts: what llama.cpp does for its k-quants.

llama.cpp (ggml-quants.c, `make_qx_quants` and `make_qkx2_quants`) tries steps a little narrower and wider than that of
the whole range, rounds, solves for the scale (and the least value) of least weighted squared error given the codes,
and keeps the best. Here, for a block with weights p_k and codes c_k relative to the zero point,

    symmetric:   scale = sum p w c / sum p c^2
    asymmetric:  scale and offset by least squares first, the zero point rint(-offset / scale), then as symmetric

Departures: zero points are integers, which MatMulNBits needs; scales are no 6-bit numbers; p is E[x^2], the power of
the input, or 1, as that is the error that counts here; llama.cpp multiplies it by a function of w.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.algo.blocks import Blocked, check_power, check_scheme, check_weights
from qcompile.algo.columns import Columns, ScaleType, Writer, columns, nearest, spread, storable
from qcompile.algo.rtn import loss, trials, whole

Array = npt.NDArray[Any]

STARTS = (1.0, 1.2, 1.1, 0.93, 0.87, 0.8, 0.73, 0.65, 0.57)
"""What the step of the whole range is multiplied by, for a start each."""

_REFITS = 3  # of the best, with the codes that the last refit gave


def kquant(
    W: Array, *, bits: int, block: int | None, symmetric: bool, power: Array | None = None,
    scales: ScaleType = "float32",
) -> Blocked:  # fmt: skip
    """Return the codes nearest to `W` for refitted scales; no block is worse off than with `rtn`.

    Args:
        W: float (N, K).
        bits: 2 to 8.
        block: weights that share a scale; 0 or None for a row.
        symmetric: the zero points are 2**(bits - 1).
        power: E[x^2], (K,), the weights of squared errors.
        scales: type whose values scales are rounded to.

    Raises:
        ValueError: an argument is out of range.
        ModelError: `W` holds NaN or infinities.
        DataError: `power` holds what no mean square can be.
    """
    check_scheme(bits, block)
    W = check_weights(W)
    power = check_power(power, W.shape[1])
    if power is None:
        power = np.ones(W.shape[1], np.float32)
    writer = Writer((W.shape[0], W.shape[1]), bits, block)
    for part in columns(W, block):
        weight = spread(power, len(W[part.rows]), block)
        fit = _Fit(part, weight, bits, symmetric, scales)
        scale, zero = fit.solve()
        writer.put(part, nearest(part.values, scale, zero, bits, out=part.values), scale, zero)
    return writer.result()


class _Fit:
    """The search in some columns; keeps the best scale and zero point, (M,) each, and their losses."""

    def __init__(
        self, part: Columns, weight: Array, bits: int, symmetric: bool, scales: ScaleType
    ) -> None:
        """`weight` is float32 as the values; 0 where zeros fill up."""
        self._part, self._weight, self._bits = part, weight, bits
        self._symmetric, self._scales = symmetric, scales
        self._weighted = part.values * weight
        self._sums = weight.sum(axis=0), self._weighted.sum(axis=0)  # of p and p w
        self._work = np.empty_like(part.values), np.empty_like(part.values)
        self.scale, self.zero = whole(part, bits, symmetric=symmetric, scales=scales)
        self._loss = loss(part.values, self.scale, self.zero, bits, weight, self._work)

    def solve(self) -> tuple[Array, Array]:
        first = self.scale, self.zero
        starts = trials(*first, self._bits, symmetric=self._symmetric, factors=STARTS)
        for scale, zero in (first, *starts):
            if not self._symmetric and zero is first[1]:
                self._try(*self._refit(*self._line(scale, zero)))
            self._try(*self._refit(scale, zero))
        for _ in range(_REFITS):
            self._try(*self._refit(self.scale, self.zero))
        return self.scale, self.zero

    def _refit(self, scale: Array, zero: Array) -> tuple[Array, Array]:
        """The scale of least error for the codes that these ones give, and the zero point."""
        codes = nearest(self._part.values, scale, zero, self._bits, out=self._work[0])
        codes -= zero
        return _quotient(self._dot(codes), self._square(codes), scale), zero

    def _line(self, scale: Array, zero: Array) -> tuple[Array, Array]:
        """Scale and zero point of the line of least squares through codes and weights."""
        codes = nearest(self._part.values, scale, zero, self._bits, out=self._work[0])
        total, weights = self._sums
        np.multiply(codes, self._weight, out=self._work[1])
        codes_sum = self._work[1].sum(axis=0)
        product, square = self._dot(codes), self._square(codes)
        spread_ = total * square - codes_sum**2
        slope = _quotient(total * product - weights * codes_sum, spread_, scale)
        offset = _quotient(square * weights - codes_sum * product, spread_, -scale * zero)
        usable = slope > 0
        slope = np.where(usable, slope, scale)
        moved = np.clip(np.rint(-offset / slope), 0, (1 << self._bits) - 1)
        return slope, np.where(usable, moved, zero).astype(np.float32)

    def _dot(self, codes: Array) -> Array:
        np.multiply(codes, self._weighted, out=self._work[1])
        made: Array = self._work[1].sum(axis=0)
        return made

    def _square(self, codes: Array) -> Array:
        np.multiply(codes, codes, out=self._work[1])
        np.multiply(self._work[1], self._weight, out=self._work[1])
        made: Array = self._work[1].sum(axis=0)
        return made

    def _try(self, scale: Array, zero: Array) -> None:
        stored = storable(scale, self._part.unit, self._bits, self._scales)
        error = loss(self._part.values, stored, zero, self._bits, self._weight, self._work)
        better = error < self._loss
        self._loss = np.where(better, error, self._loss)
        self.scale = np.where(better, stored, self.scale)
        self.zero = np.where(better, zero, self.zero)


def _quotient(above: Array, below: Array, otherwise: Array) -> Array:
    """Their ratio, and `otherwise` where that is no usable number: a block of equal codes fixes no line."""
    usable = (below > 0) & (above != 0)
    ratio = np.divide(above, below, out=np.zeros_like(above), where=usable)
    made: Array = np.where(usable & np.isfinite(ratio), ratio, otherwise)
    return made
