"""Codes and scales of blocks, moved one after the other as long as the error of the output falls.

With e = w - w' of a row and H = E[x x'], the error e H e' is quadratic in a code and in the scale of a block:

    code_k  += round((e H)_k / (scale H_kk))                 coordinate descent; QuantEase, Behdin et al. 2023
    scale_B += (c H e') / (c H c'),  c the codes of block B less its zero point, 0 elsewhere      least squares

No move raises the error. In a sweep, the codes of a block are moved, then its scale, then the next block's; e H is kept
up to date by a product of matrices for each block. It improves what GPTQ gives, which never looks back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.algo.blocks import Blocked, check_weights, row_errors, width
from qcompile.algo.columns import ScaleType, powers, storable
from qcompile.algo.gptq import DAMP, moment

Array = npt.NDArray[Any]

_PIECE = 64  # inputs whose moves are carried to all others at once
_LEAST = 2.0**-100  # of the row's greatest weight: scales below it do not move
_ROWS = 1 << 24  # weights at once: 64 MiB of float32


def polish(
    W: Array, blocked: Blocked, H: Array, *, sweeps: int = 2, refit: bool = True, damp: float = DAMP,
    scales: ScaleType = "float32",
) -> Blocked:  # fmt: skip
    """Return better codes and scales for the zero points of `blocked`; no row has a larger error for `H`.

    Args:
        W: float (N, K).
        blocked: to start from.
        H: E[x x'] or a multiple of it, (K, K).
        sweeps: over all codes, at most.
        refit: scales are moved as well.
        damp: share of the mean power that is added to that of each input, as `gptq.prepare` does, against moves that
            suit only the data at hand. Rows are judged without it.
        scales: type whose values scales are rounded to.

    Raises:
        ValueError: shapes do not fit.
        ModelError: `W` holds NaN or infinities.
        DataError: `H` is no second moment.
    """
    W = check_weights(W)
    if W.shape != blocked.shape or H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"weights {W.shape}, codes {blocked.shape} and H {H.shape} do not fit")
    wide = moment(H)
    power = np.diag(wide)
    mean = power[power > 0].mean() if np.any(power > 0) else 1.0
    gram = (wide + damp * mean * np.eye(len(wide))).astype(np.float32)
    codes, scale = blocked.codes.copy(), blocked.scale.copy()
    step = max(_ROWS // max(W.shape[1], 1), 1)
    for first in range(0, len(W), step):
        rows = np.s_[first : first + step]
        part = blocked.rows(rows)
        sweeper = _Sweeper(W[rows], part, gram, scales)
        for _ in range(sweeps):
            if not sweeper.sweep(refit=refit):
                break
        codes[rows], scale[rows] = _better(W[rows], part, sweeper.result(), wide)
    return Blocked(codes, scale, blocked.zero, blocked.bits, blocked.block)


class _Sweeper:
    """Some rows that are being moved. Layout (K, N), divided by a power of two for each row."""

    def __init__(self, W: Array, start: Blocked, gram: Array, scales: ScaleType) -> None:
        self._start, self._gram, self._scales = start, gram, scales
        self._size = width(W.shape[1], start.block)
        self._unit = powers(np.abs(W).max(axis=1, initial=0))
        self._stored = (
            start.scale.T.copy()
        )  # a copy even of one block a row, whose transpose is contiguous
        self._scale = self._stored / self._unit
        self._zero = np.ascontiguousarray(start.zero.T).astype(np.float32)
        group = np.arange(W.shape[1]) // self._size
        self._codes = start.codes.T.astype(np.float32) - self._zero[group]  # less the zero point
        self._off = (W / self._unit[:, None]).T - self._codes * self._scale[group]
        self._pull = np.empty_like(self._off)

    def sweep(self, *, refit: bool) -> bool:
        """Move every code, and every scale if `refit`; whether any moved."""
        self._pull = self._gram @ self._off  # anew: sums in float32 drift
        moved = False
        depth = len(self._codes)
        for first in range(0, depth, self._size):
            last = min(first + self._size, depth)
            for start in range(first, last, _PIECE):
                moved |= self._move(first // self._size, start, min(start + _PIECE, last))
            if refit:
                moved |= self._refit(first // self._size, first, last)
        return moved

    def result(self) -> Blocked:
        """What there is now."""
        group = np.arange(len(self._codes)) // self._size
        codes = (self._codes + self._zero[group]).T.astype(np.uint8)
        scale = np.ascontiguousarray(self._stored.T)
        return Blocked(codes, scale, self._start.zero, self._start.bits, self._start.block)

    def _move(self, group: int, first: int, last: int) -> bool:
        inside = self._gram[first:last, first:last]
        scale, low = self._scale[group], -self._zero[group]
        # a block that is nothing beside the rest of its row has no scale left in the row's unit: it stays
        divisor = np.where(np.abs(scale) > _LEAST, scale, np.float32(np.inf))
        high = low + np.float32((1 << self._start.bits) - 1)
        changes = np.zeros((last - first, self._codes.shape[1]), np.float32)
        for i, own in enumerate(self._codes[first:last]):
            here = self._pull[first + i] - inside[i, :i] @ changes[:i]
            here /= divisor * inside[i, i]
            np.rint(here, out=here)
            here += own
            np.minimum(np.maximum(here, low, out=here), high, out=here)
            np.subtract(here, own, out=changes[i])
            own[:] = here
            changes[i] *= scale
        if not changes.any():
            return False
        self._off[first:last] -= changes
        self._pull -= self._gram[:, first:last] @ changes
        return True

    def _refit(self, group: int, first: int, last: int) -> bool:
        codes = self._codes[first:last]
        carried = self._gram[:, first:last] @ codes
        square = np.einsum("kn,kn->n", codes, carried[first:last])
        product = np.einsum("kn,kn->n", codes, self._pull[first:last])
        wish = np.divide(product, square, out=np.zeros_like(square), where=square > 0)
        scale = self._scale[group]
        stored = storable(scale + wish, self._unit, self._start.bits, self._scales)
        change = stored - scale
        # rounded to its type, a scale may have gone too far
        change[(change * (2 * product - change * square) <= 0) | (np.abs(scale) <= _LEAST)] = 0
        if not change.any():
            return False
        moved = change != 0
        self._scale[group] = np.where(moved, stored, scale)
        self._stored[group] = np.where(moved, stored * self._unit, self._stored[group])
        self._off[first:last] -= codes * change
        self._pull -= carried * change
        return True


def _better(W: Array, start: Blocked, moved: Blocked, H: Array) -> tuple[Array, Array]:
    """Codes and scales of the rows that moved for the better, and else those of the start."""
    wide = W.astype(np.float64)
    errors = [row_errors(wide - b.dequantize(), H) for b in (start, moved)]
    better = (errors[1] < errors[0])[:, None]
    return (
        np.where(better, moved.codes, start.codes),
        np.where(better, moved.scale, start.scale),
    )
