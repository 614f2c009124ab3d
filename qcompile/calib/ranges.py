"""From statistics to a range: each method is a pure function `TensorStats -> (low, high)`.

* `minmax`: smallest and largest value seen.
* `mean`: mean over the samples of each sample's smallest and largest value. A rare outlier then
  costs a little saturation in one sample instead of resolution in all of them.
* `percentile`: cuts the same share of values (1e-5 in total) off both ends.
* `mse`: minimizes the squared error of rounding and saturation (Banner et al. 2019, in place of their
  analytic forms a search over the histogram).
* `kl`: minimizes the Kullback-Leibler divergence of the quantized from the true distribution
  (Migacz 2017, 8-bit inference with TensorRT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from qcompile.calib.stats import TensorStats, bin_values

Method = Literal["minmax", "mean", "percentile", "mse", "kl"]
Range = tuple[float, float]
Array = npt.NDArray[np.float64]

HISTOGRAM_METHODS = ("percentile", "mse", "kl")
_TAIL = 1e-5
_STEPS = 40
_SMALL = 4096  # values a sample


def minmax(stats: TensorStats) -> Range:
    """The extremes over all samples."""
    return stats.low, stats.high


def mean(stats: TensorStats) -> Range:
    """The mean of the samples' extremes; small tensors (gates, pooled features) take all of their range.

    The extremes of a few values a sample say nothing about outliers: their mean would saturate every
    other sample.
    """
    if stats.count < _SMALL * len(stats.lows):
        return minmax(stats)
    return float(np.mean(stats.lows or [0.0])), float(np.mean(stats.highs or [0.0]))


def percentile(stats: TensorStats, tail: float = _TAIL) -> Range:
    """The range without the outermost `tail` share of values, half of it at each end."""
    values, counts = _histogram(stats)
    if not values.size:
        return 0.0, 0.0
    share = np.cumsum(counts) / counts.sum()
    low = values[np.searchsorted(share, tail / 2)]
    high = values[min(int(np.searchsorted(share, 1 - tail / 2)), values.size - 1)]
    return _seen(stats, float(low)), _seen(stats, float(high))


def mse(stats: TensorStats, levels: int = 256) -> Range:
    """The range whose asymmetric `levels`-code quantization has the least squared error.

    The ends are searched in turn, each over `_STEPS` shrink factors, as they hardly interact.
    """
    values, counts = _histogram(stats)
    low, high = min(stats.low, 0.0), max(stats.high, 0.0)
    if not values.size or low == high:
        return stats.low, stats.high
    factors = np.geomspace(1.0, 0.05, _STEPS)
    for _ in range(2):
        if high > 0:
            errors = [_error(values, counts, low, high_, levels) for high_ in stats.high * factors]
            high = float(max(stats.high, 0.0) * factors[int(np.argmin(errors))])
        if low < 0:
            errors = [_error(values, counts, low_, high, levels) for low_ in stats.low * factors]
            low = float(min(stats.low, 0.0) * factors[int(np.argmin(errors))])
    return low, high


def _error(values: Array, counts: Array, low: float, high: float, levels: int) -> float:
    step = (high - low) / (levels - 1)
    if step <= 0:
        return float("inf")
    inside = np.clip(values, low, high)
    # Within a step the error is uniform: the histogram is finer than the grid only near zero, where
    # rounding can be computed; elsewhere its expectation is used.
    fine = np.abs(values) / 128 < step / 2
    rounding = np.where(fine, np.square(np.round(inside / step) * step - inside), step * step / 12)
    error = np.square(values - inside) + np.where(inside == values, rounding, 0.0)
    return float((error * counts).sum())


def kl(stats: TensorStats, levels: int = 256, bins: int = 4096) -> Range:
    """The range whose 8-bit quantization loses the least information.

    The magnitudes are put on `bins` equal bins; thresholds from `levels // 2` bins upwards are
    tried. One-sided tensors keep their bound at zero.
    """
    values, counts = _histogram(stats)
    top = max(abs(stats.low), abs(stats.high))
    if not values.size or top == 0:
        return stats.low, stats.high
    index = np.minimum((np.abs(values) / top * bins).astype(np.int64), bins - 1)
    p = np.asarray(np.bincount(index, weights=counts, minlength=bins), np.float64)
    p[0] = p[1] if p.size > 1 else p[0]  # zeros are represented exactly, whatever the threshold
    half = levels if stats.low >= 0 or stats.high <= 0 else levels // 2
    ends = np.unique(np.linspace(half, bins, 128).astype(np.int64))
    best = int(min(ends, key=lambda end: _divergence(p, int(end), half)))
    threshold = top * best / bins
    return _seen(stats, -threshold), _seen(stats, threshold)


def _divergence(p: Array, end: int, levels: int) -> float:
    kept = p[:end].copy()
    reference = kept.copy()
    reference[-1] += p[end:].sum()  # saturated values land on the last code
    edges = np.linspace(0, end, levels + 1).astype(np.int64)
    group = np.repeat(np.arange(levels), np.diff(edges))
    filled = kept > 0
    sums = np.bincount(group, weights=kept, minlength=levels)
    sizes = np.bincount(group, weights=filled, minlength=levels)
    q = np.where(filled, (sums / np.maximum(sizes, 1))[group], 0.0)
    total_p, total_q = reference.sum(), q.sum()
    if total_p == 0 or total_q == 0:
        return float("inf")
    reference, q = reference / total_p, q / total_q
    mask = reference > 0
    return float((reference[mask] * np.log(reference[mask] / np.maximum(q[mask], 1e-12))).sum())


def _seen(stats: TensorStats, end: float) -> float:
    """The nearest value between those seen: the centre of a bin may lie beyond them."""
    return min(max(end, stats.low), stats.high)


def _histogram(stats: TensorStats) -> tuple[Array, Array]:
    if stats.counts is None:
        return np.zeros(0), np.zeros(0)
    return bin_values(stats.counts)


METHODS: Mapping[str, Callable[[TensorStats], Range]] = {
    "minmax": minmax, "mean": mean, "percentile": percentile, "mse": mse, "kl": kl,
}  # fmt: skip
