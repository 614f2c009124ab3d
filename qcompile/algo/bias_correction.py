"""Bias correction: removes the mean error that quantization adds to a layer's output.

Nagel et al. 2019, Data-Free Quantization through Weight Equalization and Bias Correction, eq. 15:

    E[y~] - E[y] = (W~ - W) E[x]  +  W~ (E[x~] - E[x])

The first term is the rounding of the weights, the second that of the input (saturation above all).
The expectations come from calibration data, where the paper takes them from batch normalization.
Borders of padded convolutions see fewer terms; they are treated as the interior.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def weight_shift(error: Array, mean: Array, group: int = 1) -> Array:
    """Mean output error per channel from weights that are off by `error`.

    Args:
        error: W~ - W, (out, in/group, k...), float.
        mean: E[x], (in,), float64.
        group: groups of the convolution.

    Returns:
        float64 (out,).
    """
    taps = error.reshape(error.shape[0], error.shape[1], -1).sum(axis=2, dtype=np.float64)
    per_group = taps.reshape(group, -1, taps.shape[1])  # (group, out/group, in/group)
    inputs = np.asarray(mean, np.float64).reshape(group, -1, 1)  # (group, in/group, 1)
    shift: Array = np.matmul(per_group, inputs).reshape(-1)
    return shift


def input_shift(weight: Array, error: Array, group: int = 1) -> Array:
    """Mean output error per channel from inputs that are off by `error` on average.

    Args:
        weight: W~, (out, in/group, k...), float.
        error: E[x~] - E[x], (in,), float64.
        group: groups of the convolution.

    Returns:
        float64 (out,).
    """
    return weight_shift(weight, error, group)
