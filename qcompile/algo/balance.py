"""Scales of input channels that make the weights of a block share their scale with less loss.

The weights of a block have one scale, which the largest of them decides, though errors of some cost more than those of
others. With columns multiplied by s and inputs divided by it, as in AWQ (Lin et al. 2023, `qcompile.algo.awq`), the error
of a block that GPTQ leaves is about

    sum_k (w_k s_k)^2  *  sum_k left_k / s_k^2,

w_k the root of the mean square of column k, left_k what an error of it costs that no later one makes up for
(`gptq.Factor.left`). By Cauchy and Schwarz it is least for s_k^2 = sqrt(left_k) / w_k. The first sum stands for the range
of the block, which is no mean square; so a part of this way, and other mixtures, are tried by GPTQ on some rows, and
the best on data that judges is taken, if it is better than none. On SmolLM2 half the exponents are best for most inputs,
and q, k and v gain most: up to 29 % of the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.algo.blocks import check_weights, row_errors, some
from qcompile.algo.gptq import Factor, gptq

Array = npt.NDArray[Any]

EXPONENTS = ((0.125, 0.25), (0.2, 0.1), (0.2, 0.45))
"""Of `left`, and of 1 / w, in the scales that are tried."""

_ROWS = 96  # of each weight, that scales are tried on
_FLOOR = 1e-3  # of the greatest: a column of zeros is not blown up without end
_MOST = 64.0  # that a scale may be, and 1 / _MOST the least


def scales(
    weights: Sequence[Array], factor: Factor, exponents: tuple[float, float]
) -> npt.NDArray[np.float32]:
    """Return left^a / w^b, float32 (K,), of geometric mean 1 but for what is bounded.

    Args:
        weights: float32 (N, K) each, which all read the input.
        factor: of the input, K deep.
        exponents: a and b.
    """
    left = np.empty(len(factor.left), np.float64)
    left[factor.order] = factor.left
    square = sum(np.square(W, dtype=np.float64).sum(axis=0) for W in weights)
    log = exponents[0] * _log(left) - exponents[1] / 2 * _log(np.asarray(square))
    made: Array = np.exp(np.clip(log - log.mean(), -np.log(_MOST), np.log(_MOST)))
    return made.astype(np.float32)


def balance(
    weights: Sequence[Array], factor: Factor, held_out_H: Array, *, bits: int, block: int | None, symmetric: bool
) -> tuple[npt.NDArray[np.float32] | None, float]:  # fmt: skip
    """Return the best scale, float32 (K,), or None if none helps; and its error relative to that without.

    Args:
        weights: all that read the input, float (N, K) each.
        factor: of data that chooses, in the order of inputs.
        held_out_H: E[x x'] of data that judges, (K, K).
        bits: as for `gptq`.
        block: as for `gptq`.
        symmetric: as for `gptq`.

    Raises:
        ValueError: there are no weights, or shapes do not fit.
        ModelError: a weight is NaN or infinite.
    """
    checked = [check_weights(W) for W in weights]
    if not checked or {W.shape[1] for W in checked} != {len(factor.left)} or factor.ordered:
        raise ValueError(
            f"weights {[W.shape for W in checked]} do not share {len(factor.left)} inputs in their order"
        )
    few = np.concatenate([W[some(len(W), _ROWS)] for W in checked])
    judge = np.asarray(held_out_H, np.float64)
    if not few.size or not np.any(np.diag(judge)):
        return None, 1.0

    def error(scale: Array | None) -> float:
        turned = factor if scale is None else factor.scaled(scale)
        wanted = few if scale is None else few * scale
        off = (
            wanted - gptq(wanted, turned, bits=bits, block=block, symmetric=symmetric).dequantize()
        )
        return float(row_errors(off if scale is None else off / scale, judge).sum())

    before = error(None)
    tried = [scales(checked, factor, exponents) for exponents in EXPONENTS]
    errors = [error(scale) for scale in tried]
    best = int(np.argmin(errors))
    if not errors[best] < before:
        return None, 1.0
    return tried[best], errors[best] / before


def _log(values: Array) -> Array:
    """Logarithms, of what is nearly nothing as of a thousandth of the greatest."""
    return np.log(
        np.maximum(values, max(_FLOOR * values.max(initial=0.0), np.finfo(np.float64).tiny))
    )
