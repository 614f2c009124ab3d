"""Histograms of fixed, logarithmic bins: no range has to be known, and two of them add up exactly.

A bin holds the float32 numbers that share their upper 16 bits: sign, exponent, and 7 bits of mantissa.
It is at most 1/128 as wide as the values in it, denormal ones apart, so the middle of a bin is within
0.4 % of all its values, wherever the range ends. Bins are known before any data is seen: they never
have to grow, split or be put on another grid. Of each sign they are stored from the first to the
last one that was ever filled.

Counts are in 256ths of a value, so that of a large tensor a part can be counted and stand for all.
"""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]

SIGN = 1 << 15  # bins of each sign, zero's among them
UNIT = 256  # what one value counts
_LITTLE = sys.byteorder == "little"
_COMMON = 96 << 7  # the bin of 2**-31: smaller magnitudes are rare


@dataclasses.dataclass(eq=False)
class Window:
    """Counts of the bins `start`, `start + 1`, ... of one sign: int64 (bins,)."""

    start: int = 0
    counts: Counts = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, start: int, counts: Counts) -> None:
        """The counts of the bins from `start` are added; the array may be kept."""
        if not counts.size:
            return
        if not self.counts.size:
            self.start, self.counts = start, counts
            return
        stop, end = start + counts.size, self.start + self.counts.size
        if start < self.start or stop > end:
            first, last = min(start, self.start), max(stop, end)
            wider = np.zeros(last - first, np.int64)
            wider[self.start - first : end - first] = self.counts
            self.start, self.counts = first, wider
        self.counts[start - self.start : stop - self.start] += counts


@dataclasses.dataclass(eq=False)
class Histogram:
    """How many values fell into each bin, in 256ths.

    Attributes:
        zeros: values that were 0, or less than 2**-133 in magnitude.
        positive, negative: the other bins; those of negative values by magnitude.
    """

    zeros: int = 0
    positive: Window = dataclasses.field(default_factory=Window)
    negative: Window = dataclasses.field(default_factory=Window)

    @property
    def total(self) -> int:
        """All counts together."""
        return self.zeros + int(self.positive.counts.sum()) + int(self.negative.counts.sum())

    def add(self, other: Histogram) -> None:
        """The values of `other` are counted as well: exactly what one histogram of both would hold."""
        self.zeros += other.zeros
        for mine, theirs in ((self.positive, other.positive), (self.negative, other.negative)):
            mine.add(theirs.start, theirs.counts if mine.counts.size else theirs.counts.copy())

    def count(self, values: npt.NDArray[np.float32], weight: int = UNIT) -> None:
        """Each of `values`, finite, contiguous and of rank 1, adds `weight`."""
        if not values.size:
            return
        halves = values.view(np.uint16)
        counts = np.bincount(halves[1::2] if _LITTLE else halves[::2])
        for window, part in ((self.positive, counts[:SIGN]), (self.negative, counts[SIGN:])):
            if part.size:
                self.zeros += int(part[0]) * weight
                start = 1 if part[1:_COMMON].max(initial=0) else _COMMON
                window.add(start, part[start:] * weight)

    def bins(self) -> Bins:
        """The filled bins, in the order of their values."""
        low_n, high_n, count_n = _edges(self.negative)
        low_p, high_p, count_p = _edges(self.positive)
        zero = np.zeros(1 if self.zeros else 0)
        return Bins(
            np.concatenate([-high_n[::-1], zero, low_p]),
            np.concatenate([-low_n[::-1], zero, high_p]),
            np.concatenate([count_n[::-1], [self.zeros] * zero.size, count_p]).astype(np.float64),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Bins:
    """Bins as intervals: `low`, `high` and `counts`, float64 (bins,), sorted. That of zero has no width."""

    low: Array
    high: Array
    counts: Array

    @property
    def middle(self) -> Array:
        """The middles of the bins, float64 (bins,)."""
        return (self.low + self.high) / 2

    def clipped(self, low: float, high: float) -> Bins:
        """The same counts in bins that end where the values do: the extremes are known exactly."""
        return Bins(np.clip(self.low, low, high), np.clip(self.high, low, high), self.counts)

    def quantile(self, share: float) -> float:
        """The value that this share of the values is at most: the middle of its bin; 0 of no values.

        The middle is within 0.4 % of all in the bin. Shares of 0 and 1 are the ends of the first and last one.
        """
        if not self.counts.size:
            return 0.0
        if share in (0.0, 1.0):
            return float(self.high[-1] if share else self.low[0])
        rank = share * self.counts.sum()
        after = np.cumsum(self.counts)
        i = min(int(np.searchsorted(after, rank)), after.size - 1)
        return float(self.low[i] + self.high[i]) / 2

    def above(self, value: float) -> float:
        """How many values are greater, those of a bin that is cut in proportion."""
        cut = (self.low <= value) & (value < self.high)
        part = np.divide(
            self.high - value, self.high - self.low, out=np.zeros_like(self.low), where=cut
        )
        return float((np.where(self.low > value, 1.0, part) * self.counts).sum())


def _edges(window: Window) -> tuple[Array, Array, Counts]:
    """Magnitudes where the filled bins begin and end, and their counts."""
    filled = np.flatnonzero(window.counts)
    first = (filled + window.start).astype(np.uint32) << np.uint32(16)
    last = first | np.uint32(0xFFFF)  # of the greatest finite bin too, this is finite
    low = first.view(np.float32).astype(np.float64)
    high = last.view(np.float32).astype(np.float64)
    return low, high, window.counts[filled]
