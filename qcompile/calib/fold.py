"""From the values of a tensor in a few samples to statistics, in calls that are few, whatever the shapes.

Extremes and sums go over all values. A histogram counts about `counted` values of a tensor and sample, and the
extremes: of a larger tensor every k-th value, of a feature map a grid of places (`qcompile.calib.maps`). Each
counted value stands for as many as were left out, so that counts add up to the number of values.

Samples may differ in shape: their values stand behind each other, and `reduceat` keeps them apart. What is
found for a sample does not depend on which others are folded with it, but for the rounding of
float64 sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.calib.histogram import UNIT, Histogram
from qcompile.calib.stats import Channels, Extremes, TensorStats
from qcompile.step import Need

F32 = npt.NDArray[np.float32]
COUNTED = 4096  # values of a tensor and sample in its histogram, and a few more
_ROWS = 512  # rows up to which sums by column are exact enough in float32


def fold(
    values: Sequence[npt.NDArray[Any]], need: Need, axis: int, counted: int
) -> TensorStats | None:
    """Statistics of one tensor, of any float type, from its values in each sample.

    None if a value is NaN or infinite. There are none by channel where the number of channels varies, or the
    tensor has one dimension.
    """
    with np.errstate(over="ignore"):  # doubles beyond float32 are infinite
        values = [np.ascontiguousarray(array, np.float32) for array in values if array.size]
    if not values:
        return TensorStats()
    flats = [array.reshape(-1) for array in values]
    by_channel = need.channels or need.gram
    by_channel &= values[0].ndim > 1 and len({(a.ndim, a.shape[axis]) for a in values}) == 1
    if by_channel:
        planes = _Planes(values, axis)
        lows, highs = planes.lows.min(axis=1), planes.highs.max(axis=1)
    else:
        flat, starts = _joined(flats), _starts([part.size for part in flats])
        lows, highs = np.minimum.reduceat(flat, starts), np.maximum.reduceat(flat, starts)
    if not math.isfinite(float(lows.sum(dtype=np.float64)) + float(highs.sum(dtype=np.float64))):
        return None
    made = ranged(sum(part.size for part in flats), lows, highs)
    if need.histogram:
        made.histogram = Histogram()
        chosen = [part[:: stride(part.size, counted)] for part in flats]
        count_chosen(made.histogram, chosen, [part.size for part in flats], lows, highs)
    if by_channel:
        made.channels = planes.channels()
        if need.gram:
            made.gram, made.rows = _gram(values, axis)
    return made


def fold_finite(values: npt.NDArray[Any], need: Need, counted: int) -> TensorStats:
    """Statistics of the finite values of one sample's tensor, none by channel; infinities are counted."""
    with np.errstate(over="ignore"):
        flat = np.asarray(values, np.float32).reshape(-1)
    finite = flat[np.isfinite(flat)]
    made = fold([finite], Need(need.tensor, need.histogram), 0, counted)
    assert made is not None
    made.infinite = flat.size - finite.size
    return made


def stride(size: int, most: int) -> int:
    """The least k, without a factor in common with `size`, of which every k-th value are `most` or fewer.

    Thus no row, column or channel of the tensor is left out.
    """
    step = max(1, -(-size // most))
    while math.gcd(step, size) > 1:
        step += 1
    return step


def _joined(parts: Sequence[F32]) -> F32:
    return parts[0].reshape(-1) if len(parts) == 1 else np.concatenate(parts, axis=None)


def _starts(sizes: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes)[:-1]])


def ranged(count: int, lows: F32, highs: F32) -> TensorStats:
    """Statistics of so many values, with these extremes of each sample: float32 (samples,)."""
    low, high = lows.tolist(), highs.tolist()
    extremes = Extremes(len(low), math.fsum(low), math.fsum(high), lows, highs)
    return TensorStats(count, min(low), max(high), extremes)


def count_chosen(
    made: Histogram, chosen: Sequence[F32], sizes: Sequence[int], lows: F32, highs: F32
) -> None:  # fmt: skip
    """Counts what was chosen of each sample's `sizes[i]` values, weighted to stand for all of them."""
    by_weight: dict[int, list[F32]] = {}
    for part, size in zip(chosen, sizes, strict=True):
        by_weight.setdefault(round(UNIT * size / part.size), []).append(part)
    for weight, parts in by_weight.items():
        made.count(np.ascontiguousarray(_joined(parts)), weight)
    partly = [part.size < size for part, size in zip(chosen, sizes, strict=True)]
    if any(partly):  # that there are extremes is known, whether they were chosen or not
        made.count(np.concatenate([lows[partly], highs[partly]]))


class _Planes:
    """Samples of one tensor cut into pieces that belong to one sample and one channel, or to some rows of all.

    Attributes:
        lows, highs: of each sample and channel, float32 (samples, channels).
    """

    def __init__(self, values: Sequence[F32], axis: int) -> None:
        self.width, self.axis = values[0].shape[axis], axis
        self._flat = _joined(values)
        if axis in (-1, values[0].ndim - 1):
            self._values = self._flat.reshape(-1, self.width)
            counts = [array.size // self.width for array in values]
            firsts = _starts(counts)
            # a few rows at a time: their sums are exact enough in float32
            pieces = [
                np.arange(0, n, _ROWS) + first for n, first in zip(counts, firsts, strict=True)
            ]
            self._starts, self._samples = np.concatenate(pieces), _starts([p.size for p in pieces])
        else:
            self._values = self._flat
            counts = [math.prod(array.shape[:axis]) for array in values]
            sizes = [
                np.full(n * self.width, a.size // (n * self.width))
                for n, a in zip(counts, values, strict=True)
            ]
            self._starts, self._samples = _starts(np.concatenate(sizes)), _starts(counts)
        self.lows = np.minimum.reduceat(
            self._pieces(np.minimum, self._values), self._samples, axis=0
        )
        self.highs = np.maximum.reduceat(
            self._pieces(np.maximum, self._values), self._samples, axis=0
        )

    def _pieces(self, reduce: np.ufunc, values: F32) -> F32:
        """Each piece reduced: float32 (pieces, channels)."""
        if values.ndim > 1:  # rows: reduceat along them is slow
            ends = [*self._starts[1:].tolist(), len(values)]
            pairs = zip(self._starts.tolist(), ends, strict=True)
            return np.stack([reduce.reduce(values[start:end], axis=0) for start, end in pairs])
        found: F32 = reduce.reduceat(values, self._starts).reshape(-1, self.width)
        return found

    def sums(self, *, square: bool) -> npt.NDArray[np.float64]:
        """The sum over each channel of the values, or of their squares: float64 (channels,)."""
        values = np.square(self._values) if square else self._values
        return np.asarray(self._pieces(np.add, values).sum(axis=0, dtype=np.float64))

    def channels(self) -> Channels:
        """The statistics by channel."""
        count = self._flat.size // self.width
        with np.errstate(over="ignore"):  # squares of values beyond 1e19
            sums, squares = self.sums(square=False), self.sums(square=True)
        lows, highs = self.lows.min(axis=0), self.highs.max(axis=0)
        return Channels(self.axis, count, sums, lows, highs, count, squares)


def _gram(values: Sequence[F32], axis: int) -> tuple[npt.NDArray[np.float64], int]:
    """X'X, float64 (channels, channels), and the number of rows of X."""
    width = values[0].shape[axis]
    total, count = np.zeros((width, width)), 0
    for part in values:
        rows = np.moveaxis(part, axis, -1).reshape(-1, width)
        total += rows.T @ rows
        count += rows.shape[0]
    return total, count
