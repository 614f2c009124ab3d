"""What is remembered of a tensor: a histogram of fixed size, and two numbers a sample.

The histogram counts values by the upper 16 bits of their float32 representation: sign, exponent and
7 bits of mantissa. Bins are thus known before any data is seen, they never have to grow, two
histograms add up exactly, and each is at most 1/128 as wide as the values it holds, denormal ones apart.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 1 << 16
_SAMPLED = 1 << 16  # values of one sample's tensor that are counted: every k-th of larger ones

_MASK = 1e8  # no activation is as large; masks are -1e9, -FLT_MAX or -inf


@dataclasses.dataclass
class TensorStats:
    """Statistics of one tensor over the calibration samples.

    Attributes:
        count: number of values seen.
        lows, highs: smallest and largest value of each sample.
        counts: int64 (65536,), values by the upper half of their float32 bits; None if not asked for.
        sums: float64 (channels,), sum over axis 1 slices; None if not asked for.
        per_channel: number of values summed into each entry of `sums`.
    """

    count: int = 0
    lows: list[float] = dataclasses.field(default_factory=list)
    highs: list[float] = dataclasses.field(default_factory=list)
    counts: npt.NDArray[np.int64] | None = None
    sums: npt.NDArray[np.float64] | None = None
    per_channel: int = 0

    @property
    def low(self) -> float:
        """The smallest value seen; 0 if none was."""
        return min(self.lows, default=0.0)

    @property
    def high(self) -> float:
        """The largest value seen; 0 if none was."""
        return max(self.highs, default=0.0)

    @property
    def bounded(self) -> bool:
        """Whether a scale can serve the values: no infinity was seen, nor the -1e9 of a mask."""
        return max(abs(self.low), abs(self.high)) < _MASK

    @property
    def span(self) -> float:
        """Width of the range that holds all values seen and 0, which always has a code."""
        return max(self.high, 0.0) - min(self.low, 0.0)

    def mean(self) -> npt.NDArray[np.float64]:
        """Mean of each channel, float64 (channels,)."""
        assert self.sums is not None
        return self.sums / max(self.per_channel, 1)

    def add(self, values: npt.NDArray[Any], *, histogram: bool, channels: bool) -> bool:
        """Whether `values` (any shape, float32 or float16) held no NaN and were counted."""
        if values.size == 0:
            return True
        low, high = float(values.min()), float(values.max())
        if np.isnan(low) or np.isnan(high):
            return False
        self.count += values.size
        self.lows.append(low)
        self.highs.append(high)
        if histogram:
            added = count_bins(values)
            self.counts = added if self.counts is None else self.counts + added
        if channels and values.ndim >= 2:
            axes = tuple(axis for axis in range(values.ndim) if axis != 1)
            sums = values.sum(axis=axes, dtype=np.float64) if values.ndim == 2 else _sums(values)
            self.sums = sums if self.sums is None else self.sums + sums
            self.per_channel += values.size // max(values.shape[1], 1)
        return True


def _sums(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    # float32 pairwise sums along contiguous memory, float64 across them: fast, and exact enough
    flat = values.reshape(values.shape[0], values.shape[1], -1)  # (N, C, pixels)
    pixels = flat.sum(axis=2, dtype=np.float32)
    sums: npt.NDArray[np.float64] = pixels.sum(axis=0, dtype=np.float64)
    return sums


def count_bins(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """int64 (65536,): how many of `values` fall into each bin.

    Of a large tensor every k-th value is counted; its extremes are kept apart, exactly. No dimension
    has a factor in common with k, so that no row, column or channel is left out.
    """
    flat = values.reshape(-1)
    step = max(1, -(-flat.size // _SAMPLED))
    while flat.size and math.gcd(step, flat.size) > 1:
        step += 1
    flat = np.ascontiguousarray(flat[::step], np.float32)
    return np.bincount(flat.view(np.uint32) >> np.uint32(16), minlength=BINS)


def bin_values(
    counts: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The histogram sorted by value: centres of the filled bins, float64 (k,), and their counts."""
    filled = np.flatnonzero(counts)
    upper = filled.astype(np.uint32) << np.uint32(16)
    lower_edge = upper.view(np.float32).astype(np.float64)
    inside = np.where(np.isinf(lower_edge), np.uint32(0), np.uint32(0xFFFF))
    upper_edge = (upper | inside).view(np.float32).astype(np.float64)
    centres = np.where(filled % (BINS // 2) == 0, 0.0, (lower_edge + upper_edge) / 2)
    order = np.argsort(centres, kind="stable")
    return centres[order], counts[filled][order].astype(np.float64)
