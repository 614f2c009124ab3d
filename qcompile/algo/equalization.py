"""Scales of channels that neighbouring layers can absorb, chosen by the error that rounding then leaves.

Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, section 4.1:

    W2 relu(W1 x + b1) = (W2 S) relu(S^-1 (W1 x + b1)),      S = diag(s), s > 0

Weights have a scale per output channel here, so rows of W1 lose nothing when they are divided; what is at stake is
the range of the tensor between, one for all channels, and the columns of W2. For a depthwise W2 these are rows as
well: then all channels may have the same range for nothing, which equals a scale a channel of the activation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ALPHAS = (0.15, 0.3, 0.5, 0.7, 0.85, 1.0)
MARGIN = 1.3  # over the greatest value of calibration, below an upper bound that stays where it is
ROOM = 0.1  # of the range of a channel, beyond what calibration saw
_FLOOR = 1 / 64  # of the greatest: a channel that is nearly zero is not blown up without end
_GAIN = 0.05  # of the predicted error, that scales must save


@dataclasses.dataclass(frozen=True)
class Reader:
    """A layer that reads a tensor of the group.

    Attributes:
        energy: sum of the squares of its weights by input channel, float64 (C,).
        reach: largest magnitude of each output channel and input channel, (O, C); None for depthwise layers,
            whose rows keep their relative error.
    """

    energy: Array
    reach: Array | None = None


@dataclasses.dataclass(frozen=True)
class Carrier:
    """A tensor of the group that carries codes.

    Attributes:
        peak: largest magnitude by channel, (C,).
        moment: E[x^2] by channel, (C,).
        readers: the layers that multiply it with weights.
    """

    peak: Array
    moment: Array
    readers: tuple[Reader, ...]


def predicted_error(carriers: Sequence[Carrier], scale: Array) -> float:
    """The noise that rounding brings to the readers, relative to their power, summed over all of them.

    Steps of 8 bits for each tensor (one scale) and each row of weights; rounding errors are taken as uniform.
    """
    total = 0.0
    for carrier in carriers:
        step = float((carrier.peak / scale).max()) / 255
        for reader in carrier.readers:
            power = float((reader.energy * carrier.moment).sum())
            noise = step**2 / 12 * float((scale**2 * reader.energy).sum())
            if reader.reach is not None:
                rows = (reader.reach * scale).max(axis=1) / 127
                noise += float((rows**2).sum()) / 12 * float((carrier.moment / scale**2).sum())
            total += noise / max(power, 1e-30)
    return total


def best_scale(
    carriers: Sequence[Carrier], limit: float = np.inf, margin: float = MARGIN
) -> Array | None:
    """The scales of least predicted error, float64 (C,); None if none saves enough.

    Candidates are those of SmoothQuant: powers of the ratio of activations to weights.

    Args:
        carriers: tensors that share the scales.
        limit: an upper bound that all channels are clipped at: it stays where it is, so a channel must not be
            blown up beyond `limit / margin`, and those that reach the bound keep their scale.
        margin: see `limit`.
    """
    peaks = np.stack([np.maximum(c.peak, _FLOOR * max(c.peak.max(), 1e-30)) for c in carriers])
    peak = np.exp(np.log(peaks / peaks.max(axis=1, keepdims=True)).mean(axis=0))
    reach = _reach(carriers, len(peak))
    least = _least(peaks.max(axis=0), limit, margin)
    none = predicted_error(carriers, np.ones(len(peak)))
    best, found = (1 - _GAIN) * none, None
    for alpha in ALPHAS:
        scale = peak**alpha / reach ** (1 - alpha)
        scale = scale / (scale.max() if np.isfinite(limit) else np.exp(np.log(scale).mean()))
        scale = np.maximum(scale, least)
        error = predicted_error(carriers, scale)
        if error < best:
            best, found = error, scale
    return found


def _least(peak: Array, limit: float, margin: float) -> Array | float:
    """The least scales with which channels stay below the limit, at most 1."""
    if np.isinf(limit):
        return 0.0
    return np.minimum(margin * peak / limit, 1.0) if limit > 0 else np.ones_like(peak)


def _reach(carriers: Sequence[Carrier], channels: int) -> Array:
    """How far weights reach by input channel, relative to their rows; 1 where no dense layer reads."""
    found = [
        (r.reach / np.maximum(r.reach.max(axis=1, keepdims=True), 1e-30)).max(axis=0)
        for c in carriers
        for r in c.readers
        if r.reach is not None
    ]
    reach = np.max(found, axis=0) if found else np.ones(channels)
    if not reach.any():  # weights of zeros
        return np.ones(channels)
    made: Array = np.maximum(reach, _FLOOR * reach.max())
    return made


def high_bias(low: Array, high: Array, limit: float = np.inf, margin: float = ROOM) -> Array | None:
    """What the next layer's bias can absorb of each channel behind a Relu, float64 (C,); None if nothing is gained.

    Section 4.1.3: relu(z) = relu(z - c) + c where z >= c, so b1 becomes b1 - c and b2 becomes b2 + W2 c. The paper takes
    c = max(0, beta - 3 sigma) from batch normalization; here it is the least value seen, less a share of the range.

    Args:
        low: least value of each channel behind the Relu, (C,).
        high: greatest value, (C,).
        limit: an upper bound of the activation, which channels that come near it must reach as before.
        margin: of the width of a channel's range, that values may go beyond it unchanged.
    """
    lows, highs = np.asarray(low, np.float64), np.asarray(high, np.float64)
    room = margin * (highs - lows)
    shift = np.where(highs + room <= limit, np.maximum(lows - room, 0.0), 0.0)
    before, after = highs.max(initial=0.0), (highs - shift).max(initial=0.0)
    return shift if after < (1 - _GAIN) * before else None
