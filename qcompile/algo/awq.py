"""Scales of input channels, so that weights that large inputs meet are rounded more finely.

Lin et al. 2023, AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, eq. 4 and 5:

    W x = (W diag(s)) (x / s),      s = m^alpha,      m = mean |x|

with alpha from a grid, by the error of the output when W diag(s) is rounded to nearest. What comes before the layer
absorbs 1 / s, so one s holds for all weights that read the input. For e = W - Q(W diag(s)) diag(1/s) the error is
e H e', H = E[x x']: no data is needed beyond H.

Departures: m is sqrt(E[x^2]), the root of H's diagonal, unless mean |x| is given; s is kept only if it lowers the error
on held-out data as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.algo.blocks import check_weights, row_errors
from qcompile.algo.gptq import moment
from qcompile.algo.rtn import rtn, search

Array = npt.NDArray[Any]

ALPHAS = tuple(0.1 * i for i in range(11))
"""0, 0.1, ... 1; the paper's grid is twice as fine."""

_FLOOR = (
    1e-4  # of the greatest magnitude: a channel that is nearly zero is not blown up without end
)


@dataclasses.dataclass(frozen=True, eq=False)
class Scaled:
    """The result of `find_scale`.

    Attributes:
        scale: s, float32 (K,), of geometric mean 1; all 1 if none helps.
        alpha: that made it; 0 if none helps.
        before: error on held-out data with s = 1, summed over the weights; with clipped blocks if `clip`.
        after: the same with s; at most `before`.
    """

    scale: npt.NDArray[np.float32]
    alpha: float
    before: float
    after: float


def scales(magnitude: Array, alpha: float) -> npt.NDArray[np.float32]:
    """Return magnitude^alpha, float32 (K,), of geometric mean 1.

    Args:
        magnitude: of each input, (K,), not negative; zeros count as nearly zero.
        alpha: 0 gives 1 for all.
    """
    wide = np.asarray(magnitude, np.float64)
    floor = max(_FLOOR * wide.max(initial=0.0), np.finfo(np.float64).tiny)
    log = alpha * np.log(np.maximum(wide, floor))
    made: Array = (
        np.exp(log - log.mean()).astype(np.float32) if len(log) else wide.astype(np.float32)
    )
    return made


def find_scale(
    weights: Sequence[Array], H: Array, held_out_H: Array, *, bits: int, block: int | None, symmetric: bool,
    magnitude: Array | None = None, clip: bool = False, alphas: Sequence[float] = ALPHAS,
) -> Scaled:  # fmt: skip
    """Return the scale of least error for `H`, or none if it does not help for `held_out_H`.

    Args:
        weights: all that read the input, float (N, K) each.
        H: E[x x'] of the data that chooses, (K, K).
        held_out_H: of the data that judges, (K, K).
        bits: as for `rtn`.
        block: as for `rtn`.
        symmetric: as for `rtn`.
        magnitude: mean |x|, (K,).
        clip: scales of blocks are those of `rtn.search`, weighted by the power of x / s.
        alphas: to try.

    Raises:
        ValueError: there are no weights, or shapes do not fit.
        ModelError: a weight is NaN or infinite.
        DataError: `H` or `held_out_H` is no second moment.
    """
    checked = [check_weights(W) for W in weights]
    depths = {W.shape[1] for W in checked} | {len(H), len(held_out_H)}
    if not checked or len(depths) != 1:
        raise ValueError(
            f"weights {[W.shape for W in checked]} and H {H.shape} do not share an input"
        )
    gram = moment(H)
    judge, unit = moment(held_out_H), float(np.abs(held_out_H).max(initial=0))
    mean = np.sqrt(np.diag(gram)) if magnitude is None else magnitude
    if mean.shape != (len(gram),):
        raise ValueError(f"the magnitude is {mean.shape}, not ({len(gram)},)")

    def offs(scale: Array) -> list[Array]:
        power = np.diag(gram) / np.square(scale, dtype=np.float64) if clip else None
        return [_off(W, scale, power, bits, block, symmetric) for W in checked]

    ones = np.ones(len(gram), np.float32)
    plain = offs(ones)
    before = _total(plain, judge)
    best, alpha, least, found = ones, 0.0, _total(plain, gram), plain
    for trial in alphas:
        scale = scales(mean, trial)
        made = offs(scale)
        error = _total(made, gram)
        if error < least:
            best, alpha, least, found = scale, float(trial), error, made
    after = _total(found, judge)
    if not after < before:
        best, alpha, after = ones, 0.0, before
    return Scaled(best, alpha, before * unit, after * unit)


def _off(
    W: Array, scale: Array, power: Array | None, bits: int, block: int | None, symmetric: bool
) -> Array:
    """W - Q(W diag(s)) diag(1/s), float64 (N, K)."""
    scale = scale / scale.max(
        initial=np.float32(1e-30)
    )  # codes do not change, and huge weights stay finite
    scaled = W * scale
    if power is None:
        made = rtn(scaled, bits=bits, block=block, symmetric=symmetric)
    else:
        made = search(scaled, bits=bits, block=block, symmetric=symmetric, power=power)
    off: Array = W.astype(np.float64) - made.dequantize() / scale.astype(np.float64)
    return off


def _total(offs: Sequence[Array], H: Array) -> float:
    """The error of the output, a mean over rows, summed over weights."""
    return sum(float(row_errors(off, H).sum()) / max(len(off), 1) for off in offs)
