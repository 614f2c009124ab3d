"""Parameters of weights, from the weights alone: their range, or the scale of least error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qcompile.quant.affine import choose, fake_quantize, slabs
from qcompile.quant.scheme import QParams, Scheme

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

SHRINKS = tuple(1 - 0.025 * i for i in range(1, 21))
"""0.975, 0.95, ... 0.5: what `weight_params_mse` multiplies the full range by, besides 1."""


def weight_params(w: npt.NDArray[np.floating], scheme: Scheme) -> QParams:
    """Return parameters that cover each group of `w` from its least to its greatest value.

    Args:
        w: any shape that has the scheme's axis, any float type; not copied. Groups without
            elements, and groups of zeros, get scale 1.
        scheme: how the weights are quantized.

    Raises:
        ValueError: `w` has no such axis, or holds NaN or infinities.
    """
    return choose(*_bounds(w, scheme), scheme)


def weight_params_mse(
    w: npt.NDArray[np.floating], scheme: Scheme, candidates: Sequence[float] = SHRINKS
) -> QParams:
    """Return, for each group, the parameters of least squared error among shrunken ranges.

    Each candidate scales the range of every group; a group keeps the first factor whose error
    `sum((w - fake_quantize(w))**2)`, in float64, is least. The full range is always tried first, so
    that no group is worse off than with `weight_params`.

    Args:
        w: any shape that has the scheme's axis, any float type; temporaries are a few slabs.
        scheme: a symmetric one.
        candidates: factors above 0, at most 1.

    Raises:
        ValueError: the scheme is not symmetric, a factor is out of range, or as `weight_params`.
    """
    if not scheme.symmetric:
        raise ValueError(f"the search for a scale is for symmetric schemes, not {scheme}")
    if not all(0 < factor <= 1 for factor in candidates):
        raise ValueError(f"candidates {list(candidates)} are not all above 0 and at most 1")
    lo, hi = _bounds(w, scheme)
    best = choose(lo, hi, scheme)
    scale, error = best.scale, squared_error(w, best)
    for factor in candidates:
        trial = choose(lo * factor, hi * factor, scheme)
        trial_error = squared_error(w, trial)
        better = trial_error < error
        scale = np.where(better, trial.scale, scale)
        error = np.where(better, trial_error, error)
    return QParams(np.asarray(scale), best.zero, scheme)


def squared_error(w: npt.NDArray[np.floating], params: QParams) -> npt.NDArray[np.float64]:
    """Return the sum over each group of `(w - fake_quantize(w))**2`, summed in float64.

    The result has the shape of the scale.

    Raises:
        ValueError: the parameters do not fit the shape of `w`.
    """
    granularity = params.scheme.granularity
    error = np.zeros(granularity.params_shape(w.shape), np.float64)
    for index in slabs(w.shape, granularity):
        where = granularity.params_index(index)
        part = np.asarray(w[index], np.float32)
        here = QParams(
            np.asarray(params.scale[where]), np.asarray(params.zero[where]), params.scheme
        )
        # float64 before the square: an error of 1e-25 matters, and its square is not a float32.
        loss = np.square(part.astype(np.float64) - fake_quantize(part, here))
        error[where] += granularity.reduce(np.add, loss)
    return error


def _bounds(
    w: npt.NDArray[np.floating], scheme: Scheme
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The least and the greatest value of each group and 0; NaN stays, for `choose` to name."""
    granularity = scheme.granularity
    granularity.params_shape(w.shape)  # raises if there is no such axis
    return (
        granularity.reduce(np.minimum, w).astype(np.float64),
        granularity.reduce(np.maximum, w).astype(np.float64),
    )
