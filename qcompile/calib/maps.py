"""Feature maps that the graph itself reduced: from what came out to the statistics of all of them at once.

Of all maps of one rank the same things stand side by side in one output each, so that a sample takes few calls
however many maps there are: peaks, means and least values as (N, channels of all maps), grids of places as
(N, values of all grids), shapes one behind the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.calib.fold import count_chosen, ranged, stride
from qcompile.calib.histogram import Histogram
from qcompile.calib.stats import Channels, TensorStats
from qcompile.step import Need

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
ROLES = ("shapes", "peaks", "means", "bottoms", "grids")


@dataclasses.dataclass(frozen=True)
class Map:
    """One feature map (N, channels, sides...).

    Attributes:
        need: what is wanted of it.
        shape: of the sample that its size was taken from.
        steps: of its grid, one a side.
        floor: its least value possible; if that is finite, it is taken for its least value.
        bytes: what its outputs take for the sample that its size was taken from.
    """

    need: Need
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    floor: float
    bytes: int

    @property
    def channels(self) -> int:
        """How many channels it has."""
        return self.shape[1]

    @property
    def has_bottoms(self) -> bool:
        """Whether the least value of each channel is found out."""
        return not math.isfinite(self.floor)


def places(side: int, step: int) -> int:
    """How many places of a side are in a grid: the first, and from there by steps."""
    return -(-side // step)


@dataclasses.dataclass(frozen=True)
class Maps:
    """The feature maps of one rank, and the names of the outputs that tell of them, by role of `ROLES`.

    If there is no output for the shapes, they are those of the maps.
    """

    rank: int
    maps: tuple[Map, ...]
    outputs: Mapping[str, str]

    def read(
        self, samples: Sequence[Mapping[str, Array]], counted: int
    ) -> list[TensorStats] | None:
        """Statistics of each map over the samples, whose outputs are given by role.

        None if they do not tell all: of NaN or an infinity, or where a map is empty.
        """
        known = np.array([m.shape for m in self.maps])
        shapes = np.stack([found.get("shapes", known).reshape(-1) for found in samples]).reshape(
            len(samples), -1, self.rank
        )
        if not shapes.all():
            return None  # without values there are no extremes
        rows = [int(found["peaks"].shape[0]) for found in samples]
        firsts = np.concatenate([[0], np.cumsum(rows)[:-1]])
        peaks, means = (_rows(samples, role) for role in ("peaks", "means"))
        starts = _starts([m.channels for m in self.maps])
        highs = np.maximum.reduceat(np.maximum.reduceat(peaks, starts, axis=1), firsts, axis=0)
        lows = np.repeat(np.array([[m.floor for m in self.maps]], np.float32), len(samples), axis=0)
        below = [i for i, m in enumerate(self.maps) if m.has_bottoms]
        least = np.array([m.floor for m in self.maps for _ in range(m.channels)], np.float32)
        if below:
            bottoms = _rows(samples, "bottoms")
            own = _starts([self.maps[i].channels for i in below])
            lows[:, below] = np.minimum.reduceat(
                np.minimum.reduceat(bottoms, own, axis=1), firsts, axis=0
            )
            least[~np.isfinite(least)] = bottoms.min(axis=0)
        with np.errstate(over="ignore", invalid="ignore"):
            total = (
                highs.sum(dtype=np.float64)
                + lows.sum(dtype=np.float64)
                + means.sum(dtype=np.float64)
            )
        if not math.isfinite(float(total)):
            return None
        planes = shapes[:, :, 2:].prod(axis=2)  # (samples, maps): values of a channel
        weights = np.repeat(planes, [m.channels for m in self.maps], axis=1).astype(np.float64)
        sums = (means * np.repeat(weights, rows, axis=0)).sum(axis=0)
        grids = self._grids(samples, shapes)
        most = peaks.max(axis=0)
        made = []
        for i, (item, start) in enumerate(zip(self.maps, starts.tolist(), strict=True)):
            sizes = (shapes[:, i, 0] * item.channels * planes[:, i]).tolist()
            stats = ranged(sum(sizes), lows[:, i].copy(), highs[:, i].copy())
            part = slice(start, start + item.channels)
            if item.need.channels:
                stats.channels = Channels(
                    1, stats.count // item.channels, sums[part], least[part], most[part],
                    grids.places[i], grids.squares[part],
                )  # fmt: skip
            if item.need.histogram:
                stats.histogram = Histogram()
                chosen = [part[:: stride(part.size, counted)] for part in grids.values(i)]
                count_chosen(stats.histogram, chosen, sizes, lows[:, i], highs[:, i])
            made.append(stats)
        return made

    def _grids(self, samples: Sequence[Mapping[str, Array]], shapes: Array) -> _Grids:
        """What the grids hold."""
        counts = np.stack(
            [
                np.array([[places(int(side), step) for side, step in zip(sides, m.steps, strict=True)]
                          for sides, m in zip(shape[:, 2:], self.maps, strict=True)]).prod(axis=1)
                for shape in shapes
            ]
        )  # fmt: skip
        channels = np.array([m.channels for m in self.maps])
        squares = np.zeros(channels.sum())
        ends = []
        for found, count in zip(samples, counts, strict=True):
            sizes = np.repeat(count, channels)  # of each channel's part of a row
            values = found["grids"].reshape(found["grids"].shape[0], -1)
            with np.errstate(over="ignore"):  # squares of values beyond 1e19
                sums = np.add.reduceat(np.square(values), _starts(sizes), axis=1)
            squares += sums.sum(axis=0, dtype=np.float64)
            ends.append(np.concatenate([[0], np.cumsum(count * channels)]).tolist())
        rows = shapes[:, :, 0]
        return _Grids(samples, ends, (counts * rows).sum(axis=0).tolist(), squares)


@dataclasses.dataclass(frozen=True)
class _Grids:
    """The grids of all maps in each sample: where each map's ends, its values a channel, sums of squares."""

    samples: Sequence[Mapping[str, Array]]
    ends: Sequence[Sequence[int]]
    places: Sequence[int]
    squares: npt.NDArray[np.float64]

    def values(self, index: int) -> list[F32]:
        """The values of one map's grid in each sample."""
        return [
            found["grids"].reshape(found["grids"].shape[0], -1)[:, ends[index] : ends[index + 1]].reshape(-1)
            for found, ends in zip(self.samples, self.ends, strict=True)
        ]  # fmt: skip


def _rows(samples: Sequence[Mapping[str, Array]], role: str) -> F32:
    """Side by side what stands for channels, samples below each other: float32 (N of all samples, channels)."""
    return np.concatenate([found[role].reshape(found[role].shape[0], -1) for found in samples])


def _starts(sizes: Sequence[int] | Array) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes)[:-1]])
