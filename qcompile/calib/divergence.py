"""Ranges by Kullback-Leibler divergence, as Migacz 2017 (8-bit inference with TensorRT) proposes.

Magnitudes are put on `BINS` equal bins. For a threshold after bin e, P is the distribution of the first e
bins, all that is saturated added to the last of them, and Q is what `levels` codes leave of these
bins: within each code's bins, those that are filled share evenly. The threshold with the least divergence
of P from Q wins.

With prefix sums every threshold costs O(levels) instead of O(bins), so that all of them are tried:

    sum P log P          = A[e] - a(p[e-1]) + a(p[e-1] + rest),     a(x) = x log x, A its prefix sums
    sum P log Q          = sum over codes S log(S / n) + rest log Q[e-1]

S being a code's sum and n the number of its filled bins.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from qcompile.calib.histogram import Histogram, Window

Array = npt.NDArray[np.float64]

BINS = 2048
TINY = 1e-12  # share of a bin that Q leaves empty


def linear(histogram: Histogram, top: float, bins: int = BINS) -> Array:
    """Counts of the magnitudes on equal bins from 0 to `top`: float64 (bins,).

    What is in a bin of the histogram is spread evenly over it. Zeros, which any range holds exactly, count as
    much as the second bin holds.
    """
    edges = np.linspace(0.0, top, bins + 1)
    below = _up_to(histogram.positive, edges) + _up_to(histogram.negative, edges)
    total = float(histogram.positive.counts.sum() + histogram.negative.counts.sum())
    below[-1] = total  # the middle of the last bin may lie beyond what was seen
    counts = np.diff(below)
    counts[0] = counts[1]
    return np.asarray(counts, np.float64)


def _up_to(window: Window, edges: Array) -> Array:
    """How many values of one sign have a magnitude of at most each edge."""
    filled = np.flatnonzero(window.counts)
    if not filled.size:
        return np.zeros(edges.size)
    first = (filled + window.start).astype(np.uint32) << np.uint32(16)
    ends = np.stack([first, first | np.uint32(0xFFFF)], axis=1).reshape(-1)
    total = np.cumsum(window.counts[filled])
    after = np.stack([total - window.counts[filled], total], axis=1).reshape(-1)
    return np.interp(edges, ends.view(np.float32).astype(np.float64), after.astype(np.float64))


def best_threshold(counts: Array, levels: int) -> int:
    """The number of bins, `levels` or more, whose end is the threshold of least divergence; the first of equals."""
    divergences = all_divergences(counts, levels)
    return levels + int(np.argmin(divergences))


def all_divergences(counts: Array, levels: int) -> Array:
    """The divergence for each threshold from `levels` bins to all of them; infinite where nothing is kept."""
    ends = np.arange(levels, counts.size + 1)
    edges = _edges(counts.size, levels)
    before = _prefix(counts)
    filled = _prefix((counts > 0).astype(np.float64))
    total, kept = before[-1], before[ends]
    rest = total - kept
    sums = np.diff(before[edges], axis=1)
    sizes = np.diff(filled[edges], axis=1)
    codes = _log_ratio(sums, sizes).sum(axis=1)
    last = counts[ends - 1]
    own = _x_log_x(counts)
    p_log_p = _prefix(own)[ends] - own[ends - 1] + _x_log_x(last + rest)
    share = np.where(last > 0, sums[:, -1] / np.maximum(sizes[:, -1], 1.0), 0.0)
    floor = TINY * np.maximum(kept, np.finfo(np.float64).tiny)
    p_log_q = codes + rest * np.log(np.maximum(share, floor))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (p_log_p - p_log_q) / total - np.log(total) + np.log(kept)
    return np.where(kept > 0, found, np.inf)


@cache
def _edges(bins: int, levels: int) -> npt.NDArray[np.int64]:
    """Where each code's bins begin, for each threshold: int64 (thresholds, levels + 1)."""
    ends = np.arange(levels, bins + 1)
    return (ends[:, None] * np.arange(levels + 1)[None, :]) // levels


def _prefix(values: Array) -> Array:
    return np.concatenate([[0.0], np.cumsum(values)])


def _x_log_x(x: Array) -> Array:
    return np.asarray(x * np.log(np.where(x > 0, x, 1.0)), np.float64)


def _log_ratio(sums: Array, sizes: Array) -> Array:
    full = sums > 0
    return np.asarray(
        sums * np.log(np.where(full, sums, 1.0) / np.where(full, sizes, 1.0)), np.float64
    )
