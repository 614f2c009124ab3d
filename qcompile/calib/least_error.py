"""Ranges of least squared error, after Banner et al. 2019 (post-training 4-bit quantization), by a search.

The expected squared error of a range is that of saturation, which bins tell, and that of rounding: a value
that is nearer to zero than half a step is rounded to zero, which has a code; any other is off
by a twelfth of a squared step in the mean. Prefix sums give both for every pair of ends at once.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from qcompile.calib.histogram import Bins

Array = npt.NDArray[np.float64]

FACTORS = np.geomspace(1.0, 1 / 128, 64)
"""What the ends of the full range are multiplied by."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """The codes that a range is cut into.

    Attributes:
        levels: number of codes, 256 of 8 bits.
        symmetric: zero is in the middle, and as far below it as above.
    """

    levels: int = 256
    symmetric: bool = False

    def step(self, low: Array, high: Array) -> Array:
        """The distance between two codes of the range."""
        if self.symmetric:
            return np.maximum(-low, high) / (self.levels // 2 - 1)
        return (high - low) / (self.levels - 1)


def search(bins: Bins, low: float, high: float, grid: Grid) -> tuple[float, float]:
    """The range (low, high) of least expected error within the given one, which holds 0."""
    if grid.symmetric:
        tops = max(-low, high) * FACTORS
        lows, highs = -tops, tops
    else:
        # one end may be at zero, and stays there
        lows, highs = (
            low * FACTORS if low < 0 else np.zeros(1),
            (high * FACTORS if high > 0 else np.zeros(1)),
        )
        lows, highs = (side.reshape(-1) for side in np.meshgrid(lows, highs, indexing="ij"))
    best = int(np.argmin(errors(bins, lows, highs, grid)))
    return max(float(lows[best]), low), min(float(highs[best]), high)


def errors(bins: Bins, lows: Array, highs: Array, grid: Grid) -> Array:
    """The expected sum of squared errors of each range (lows[i], highs[i]): float64, of the same shape."""
    values, counts = bins.middle, bins.counts
    steps = grid.step(lows, highs)
    if not grid.symmetric:  # the ends are codes, of which zero is one
        zeros = np.rint(-lows / np.where(steps > 0, steps, 1.0))
        lows, highs = -zeros * steps, (grid.levels - 1 - zeros) * steps
    up = _Sums(values, counts)
    over = up.beyond(highs)
    mirrored = _Sums(-values[::-1], counts[::-1])
    under = mirrored.beyond(-lows)
    few, small_squares = up.within(lows, highs, steps / 2)
    inside = counts.sum() - over[0] - under[0]
    rounding = small_squares + np.maximum(inside - few, 0.0) * np.square(steps) / 12
    return np.where(steps > 0, over[1] + under[1] + rounding, np.inf)


class _Sums:
    """Prefix sums over values in ascending order."""

    def __init__(self, values: Array, counts: Array) -> None:
        self.values = values
        self.n, self.x, self.xx = (
            np.concatenate([[0.0], np.cumsum(part)])
            for part in (counts, counts * values, counts * values * values)
        )

    def beyond(self, ends: Array) -> tuple[Array, Array]:
        """How many values are greater than each end, and the sum of their squared distances to it."""
        i = np.searchsorted(self.values, ends, side="right")
        n, x, xx = (part[-1] - part[i] for part in (self.n, self.x, self.xx))
        return n, np.maximum(xx - 2 * ends * x + np.square(ends) * n, 0.0)

    def within(self, lows: Array, highs: Array, limits: Array) -> tuple[Array, Array]:
        """How many values of each range are nearer to zero than its limit, and the sum of their squares."""
        first = np.maximum(
            np.searchsorted(self.values, lows, side="left"),
            np.searchsorted(self.values, -limits, side="right"),
        )
        last = np.minimum(
            np.searchsorted(self.values, highs, side="right"),
            np.searchsorted(self.values, limits, side="left"),
        )
        return self.n[last] - self.n[first], np.maximum(self.xx[last] - self.xx[first], 0.0)
