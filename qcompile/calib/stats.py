"""What is remembered of a tensor: of fixed size, whatever the number of samples, and mergeable.

Statistics of two sets of samples, merged, are those of the samples together: exactly for counts, ranges and
histograms, and to the rounding of float64 for sums.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from qcompile.calib.histogram import Histogram

Array = npt.NDArray[np.float64]

KEPT = 16384  # samples up to which the extremes of each are kept
RECENT = 1024  # of more samples, those of the last ones

_MASK = 1e8  # no activation is as large; masks are -1e9, -FLT_MAX or -inf


@dataclasses.dataclass(eq=False)
class Extremes:
    """The least and the greatest value of each sample: float32 (samples,) each, in order.

    Of up to `KEPT` samples all are kept, of more the last `RECENT`; sums go over all samples.
    """

    samples: int = 0
    low_sum: float = 0.0
    high_sum: float = 0.0
    lows: npt.NDArray[np.float32] = dataclasses.field(default_factory=lambda: np.zeros(0, "f4"))
    highs: npt.NDArray[np.float32] = dataclasses.field(default_factory=lambda: np.zeros(0, "f4"))

    def add(self, other: Extremes) -> None:
        """The samples of `other` follow."""
        self.samples += other.samples
        self.low_sum += other.low_sum
        self.high_sum += other.high_sum
        kept = slice(None) if self.samples <= KEPT else slice(-RECENT, None)
        self.lows = np.concatenate([self.lows, other.lows])[kept]
        self.highs = np.concatenate([self.highs, other.highs])[kept]


@dataclasses.dataclass(eq=False)
class Channels:
    """Statistics by channel.

    Attributes:
        axis: of the channels in the tensor, from its front or, negative, from its end.
        count: values of each channel.
        sums: float64 (channels,), of all values.
        lows, highs: float32 (channels,).
        square_count: values of each channel that `squares` go over: all of them, or of large feature
            maps those of a grid of places.
        squares: float64 (channels,), sum of the squares.
    """

    axis: int
    count: int
    sums: Array
    lows: npt.NDArray[np.float32]
    highs: npt.NDArray[np.float32]
    square_count: int
    squares: Array

    def add(self, other: Channels) -> bool:
        """Whether `other` has as many channels, and was added."""
        if self.sums.shape != other.sums.shape or self.axis != other.axis:
            return False
        self.count += other.count
        self.sums = self.sums + other.sums
        self.lows = np.minimum(self.lows, other.lows)
        self.highs = np.maximum(self.highs, other.highs)
        self.square_count += other.square_count
        self.squares = self.squares + other.squares
        return True

    def mean(self) -> Array:
        """E[x], float64 (channels,)."""
        return self.sums / max(self.count, 1)

    def second_moment(self) -> Array:
        """E[x^2], float64 (channels,)."""
        return self.squares / max(self.square_count, 1)

    def peak(self) -> npt.NDArray[np.float32]:
        """The largest magnitude, float32 (channels,): what SmoothQuant calls max |X_j|."""
        return np.maximum(np.abs(self.lows), np.abs(self.highs))


@dataclasses.dataclass(eq=False)
class TensorStats:
    """Statistics of one tensor over the calibration samples.

    Attributes:
        count: number of values seen.
        low, high: the least and the greatest of them; 0 if there were none.
        extremes: of each sample.
        infinite: number of infinite values, which nothing else counts.
        histogram: None if it was not asked for.
        channels: None if not asked for, or if the number of channels varies between samples.
        gram: float64 (channels, channels), sum over all rows x of the tensor of x x'; None likewise.
        rows: number of rows in `gram`.
    """

    count: int = 0
    low: float = 0.0
    high: float = 0.0
    extremes: Extremes = dataclasses.field(default_factory=Extremes)
    infinite: int = 0
    histogram: Histogram | None = None
    channels: Channels | None = None
    gram: Array | None = None
    rows: int = 0

    @property
    def bounded(self) -> bool:
        """Whether a scale can serve the values: no infinity was seen, nor the -1e9 of a mask."""
        return not self.infinite and max(abs(self.low), abs(self.high)) < _MASK

    @property
    def span(self) -> float:
        """Width of the range that holds all values seen and 0, which always has a code."""
        return max(self.high, 0.0) - min(self.low, 0.0)

    @property
    def mean(self) -> float | None:
        """E[x] over all channels; None if they were not asked for, or sums are not finite."""
        if self.channels is None:
            return None
        mean = float(self.channels.mean().mean())
        return mean if math.isfinite(mean) else None  # float32 sums of masks overflow

    @property
    def deviation(self) -> float | None:
        """The standard deviation of all values; None as `mean`."""
        if self.channels is None or self.mean is None:
            return None
        square = float(self.channels.second_moment().mean())
        return math.sqrt(max(square - self.mean**2, 0.0)) if math.isfinite(square) else None

    def share_of_zeros(self) -> float | None:
        """The share of values that are 0; None without a histogram."""
        if self.histogram is None:
            return None
        return self.histogram.zeros / max(self.histogram.total, 1)

    def share_saturated(self) -> float | None:
        """The share of values in the bins of the extremes, as behind a Clip; None without a histogram.

        An extreme of 0, as behind a Relu, does not count.
        """
        if self.histogram is None or not self.count:
            return None
        bins = self.histogram.bins().clipped(self.low, self.high)
        ends = [end for end in {self.low, self.high} if end != 0.0]
        total = sum(bins.counts[(bins.low <= end) & (bins.high >= end)].sum() for end in ends)
        return float(total / max(self.histogram.total, 1))

    def share_of_outliers(self, deviations: float = 6.0) -> float | None:
        """The share of values further from the mean than so many standard deviations."""
        if self.histogram is None or self.mean is None or not self.deviation:
            return None
        bins = self.histogram.bins().clipped(self.low, self.high)
        reach = deviations * self.deviation
        outside = bins.above(self.mean + reach) + bins.counts.sum() - bins.above(self.mean - reach)
        return float(outside / max(self.histogram.total, 1))

    def add(self, other: TensorStats) -> None:
        """The samples of `other` are included."""
        if other.count:
            self.low = other.low if not self.count else min(self.low, other.low)
            self.high = other.high if not self.count else max(self.high, other.high)
        seen = self.extremes.samples > 0
        self.count += other.count
        self.infinite += other.infinite
        self.extremes.add(other.extremes)
        if other.histogram is not None:
            self.histogram = self.histogram or Histogram()
            self.histogram.add(other.histogram)
        self._add_channels(other, seen=seen)

    def _add_channels(self, other: TensorStats, *, seen: bool) -> None:
        if not other.extremes.samples:
            return
        if not seen:
            self.channels, self.gram, self.rows = _copy(other.channels), other.gram, other.rows
            return
        if self.channels is not None and (
            other.channels is None or not self.channels.add(other.channels)
        ):
            self.channels = None
        if self.gram is not None:
            fits = other.gram is not None and other.gram.shape == self.gram.shape
            self.gram = self.gram + other.gram if fits and other.gram is not None else None
            self.rows += other.rows


def _copy(channels: Channels | None) -> Channels | None:
    return None if channels is None else dataclasses.replace(channels)
