"""SmoothQuant: moves the spread of input channels from activations to weights.

Xiao et al. 2023, SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, eq. 4:

    y = (x / s) (s W),      s_k = max|x_k|^alpha / max|W_k|^(1 - alpha)

Alpha is searched by the error that quantization then leaves in the product, measured on rows of real inputs.
Rows count alike, whatever their size: a LayerNorm behind makes them equal, and a few rows of an encoder are a
hundred times as large as the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.quant.affine import dequantize, quantize
from qcompile.quant.ranges import weight_params
from qcompile.quant.scheme import Scheme

Array = npt.NDArray[Any]

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_GAIN = 0.1  # of the error on held-out rows, that smoothing must save
_FLOOR = 1e-5  # of the greatest: channels that are nearly zero are not blown up without end
_SHARE = 0.1  # of the mean power of a row, that its own power is never taken to be less than


@dataclasses.dataclass(frozen=True)
class Smoothed:
    """The scale found, float32 (K,), its alpha, and the relative error on held-out rows without and with it."""

    scale: Array
    alpha: float
    before: float
    after: float


def smoothing_scale(peak: Array, reach: Array, alpha: float) -> Array:
    """The scale of each input channel, float32 (K,), of geometric mean 1.

    Args:
        peak: largest magnitude of each input channel, (K,).
        reach: largest magnitude of each row of the weights, (K,).
        alpha: 0 leaves the weights equal, 1 the activations.
    """
    x, w = (
        np.maximum(np.asarray(a, np.float64), _FLOOR * max(a.max(), 1e-30)) for a in (peak, reach)
    )
    log = alpha * np.log(x) - (1 - alpha) * np.log(w)
    made: Array = np.exp(log - log.mean()).astype(np.float32)
    return made


def dynamic_codes(x: Array) -> Array:
    """What DynamicQuantizeLinear leaves of a sample: 8 bits for the whole of it, zero kept. (rows, K) float32."""
    low, high = min(float(x.min(initial=0.0)), 0.0), max(float(x.max(initial=0.0)), 0.0)
    scale = np.float32((high - low) / 255)
    if scale == 0:
        return x
    zero = np.clip(np.rint(-low / scale), 0, 255)
    codes = np.clip(np.rint(x / scale) + zero, 0, 255)
    made: Array = ((codes - zero) * scale).astype(np.float32)
    return made


def product_error(
    samples: Sequence[Array], weight: Array, scale: Array | None, scheme: Scheme
) -> float:
    """The error of the quantized product, relative to its own power, mean over rows.

    Args:
        samples: float32 (rows, K), one array a sample: each has a scale of its own.
        weight: float32 (K, N).
        scale: float32 (K,), or None for none.
        scheme: of the weight, per column.
    """
    scaled = weight if scale is None else weight * scale[:, None]
    params = weight_params(scaled, scheme)
    rounded = dequantize(quantize(scaled, params), params)
    total, count = 0.0, 0
    for x in samples:
        y = x @ weight
        z = dynamic_codes(x if scale is None else x / scale) @ rounded
        power = np.square(y).sum(axis=1, dtype=np.float64)
        noise = np.square(z - y).sum(axis=1, dtype=np.float64)
        total += float((noise / (power + _SHARE * power.mean() + 1e-30)).sum())
        count += len(x)
    return total / max(count, 1)


def search_scale(
    samples: Sequence[Array], held_out: Sequence[Array], weights: Sequence[Array], scheme: Scheme,
    alphas: Sequence[float] = ALPHAS,
) -> Smoothed | None:  # fmt: skip
    """The scale of least error for all products that read the same input; None if it does not help on held-out rows.

    Args:
        samples: rows of calibration samples, float32 (rows, K) each.
        held_out: rows of other samples.
        weights: of the products, float32 (K, N) each.
        scheme: of the weights.
        alphas: to try.
    """
    joined = np.concatenate(list(weights), axis=1)
    peak = np.max([np.abs(x).max(axis=0, initial=0.0) for x in samples], axis=0)
    reach = np.abs(joined).max(axis=1)
    if not peak.max() > 0:
        return None
    scales = {alpha: smoothing_scale(peak, reach, alpha) for alpha in alphas}
    errors = {a: product_error(samples, joined, s, scheme) for a, s in scales.items()}
    alpha = min(errors, key=lambda a: errors[a])
    before = product_error(held_out, joined, None, scheme)
    after = product_error(held_out, joined, scales[alpha], scheme)
    if not after < (1 - _GAIN) * before:
        return None
    return Smoothed(scales[alpha], alpha, before, after)
