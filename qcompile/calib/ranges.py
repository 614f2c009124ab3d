"""From statistics to a range: each method is a pure function of them, and of the codes to come.

* `minmax`: the smallest and the largest value seen.
* `mean`: mean over the samples of each sample's extremes. A rare outlier then costs a little saturation in one
  sample instead of resolution in all of them.
* `moving-average`: the same with later samples weighing more (Jacob et al. 2018, quantization for
  integer-arithmetic-only inference; constant of ORT).
* `percentile`, `percentile:P`: P percent of the values, as many cut off at either end (McKinstry et al. 2018,
  Wu et al. 2020, integer quantization for deep learning inference).
* `mse`: least squared error of rounding and saturation (`qcompile.calib.least_error`).
* `kl`: least Kullback-Leibler divergence (`qcompile.calib.divergence`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from qcompile.calib.divergence import BINS, best_threshold, linear
from qcompile.calib.least_error import Grid, search
from qcompile.calib.stats import TensorStats
from qcompile.errors import RecipeError, nearest

Range = tuple[float, float]
Method = Callable[[TensorStats, Grid], Range]

PERCENT = 99.999
GRID = Grid()
_AVERAGING = 0.01
_SMALL = 4096  # values a sample


def minmax(stats: TensorStats, grid: Grid = GRID) -> Range:
    """The extremes over all samples."""
    del grid
    return stats.low, stats.high


def mean(stats: TensorStats, grid: Grid = GRID) -> Range:
    """The mean of the samples' extremes; small tensors (gates, pooled features) take all of their range.

    The extremes of a few values a sample say nothing about outliers: their mean would saturate every
    other sample.
    """
    del grid
    found = stats.extremes
    if not found.samples or stats.count < _SMALL * found.samples:
        return minmax(stats)
    return found.low_sum / found.samples, found.high_sum / found.samples


def moving_average(stats: TensorStats, grid: Grid = GRID, constant: float = _AVERAGING) -> Range:
    """The exponential moving average of the samples' extremes, in order; small tensors as in `mean`."""
    del grid
    found = stats.extremes
    if not found.samples or stats.count < _SMALL * found.samples:
        return minmax(stats)
    weights = constant * (1 - constant) ** np.arange(found.lows.size - 1, -1, -1.0)
    weights[0] /= constant  # the first sample starts the average
    low, high = weights @ found.lows.astype(np.float64), weights @ found.highs.astype(np.float64)
    return float(low), float(high)


def percentile(stats: TensorStats, grid: Grid = GRID, percent: float = PERCENT) -> Range:
    """The range of `percent` percent of the values, the others half below and half above it."""
    del grid
    if stats.histogram is None or not stats.count:
        return minmax(stats)
    bins = stats.histogram.bins().clipped(stats.low, stats.high)
    tail = (1 - percent / 100) / 2
    return _seen(stats, bins.quantile(tail)), _seen(stats, bins.quantile(1 - tail))


def mse(stats: TensorStats, grid: Grid = GRID) -> Range:
    """The range whose codes have the least squared error."""
    low, high = min(stats.low, 0.0), max(stats.high, 0.0)
    if stats.histogram is None or low == high:
        return minmax(stats)
    return search(stats.histogram.bins().clipped(stats.low, stats.high), low, high, grid)


def kl(stats: TensorStats, grid: Grid = GRID) -> Range:
    """The range whose codes lose the least information; one-sided tensors keep their bound at zero."""
    top = max(abs(stats.low), abs(stats.high))
    if stats.histogram is None or not top:
        return minmax(stats)
    one_sided = (stats.low >= 0 or stats.high <= 0) and not grid.symmetric
    counts = linear(stats.histogram, top)
    if not counts.any():
        return minmax(stats)
    levels = min(grid.levels if one_sided else grid.levels // 2, BINS)
    threshold = top * best_threshold(counts, levels) / BINS
    return _seen(stats, -threshold), _seen(stats, threshold)


def _seen(stats: TensorStats, end: float) -> float:
    """The nearest value between those seen."""
    return min(max(end, stats.low), stats.high)


METHODS: dict[str, Method] = {
    "minmax": minmax, "mean": mean, "moving-average": moving_average, "percentile": percentile,
    "mse": mse, "kl": kl,
}  # fmt: skip
HISTOGRAM_METHODS = ("percentile", "mse", "kl")
AUTO = ("mean", "minmax", "mse")  # what `auto` tries on whole models, and their mixture by tensor


def method(name: str) -> Method:
    """The method of that name, such as `mse` or `percentile:99.9`.

    Raises:
        RecipeError: there is none, or its number is no percentage of 50 or more.
    """
    kind, _, number = name.partition(":")
    if kind not in METHODS or (number and kind != "percentile"):
        raise RecipeError(
            f"ranges is {name!r}, not one of auto, {', '.join(METHODS)}, percentile:99.9 or the like."
            f"{nearest(name, ['auto', *METHODS])}"
        )
    if not number:
        return METHODS[kind]
    try:
        percent = float(number)
    except ValueError:
        percent = math.nan
    if not 50 <= percent <= 100:
        raise RecipeError(
            f"ranges is {name!r}: give a percentage from 50 to 100, as percentile:99.99."
        )
    return partial(percentile, percent=percent)


def needs_histogram(name: str) -> bool:
    """Whether a method, or `auto`, reads the histogram."""
    return name == "auto" or name.partition(":")[0] in HISTOGRAM_METHODS
