"""Splits the user's samples: most calibrate, the others are held out to judge the result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from qcompile.errors import DataError
from qcompile.run.session import Feed

_MOST_HELD_OUT = 24
_CACHE_BYTES = 96 << 20


class Sized(Protocol):
    """A re-iterable source of feeds that knows its length."""

    def __iter__(self) -> Iterator[Feed]: ...
    def __len__(self) -> int: ...


class Samples:
    """Calibration and held-out samples of one source; feeds are kept in memory while they are few bytes.

    Every fifth sample is held out, 24 at most, spread over the source. A single sample serves for both.
    """

    def __init__(self, data: Sized) -> None:
        """Raises: DataError if there are no samples."""
        self._data = data
        self.count = len(data)
        if self.count == 0:
            raise DataError(
                "the calibration data holds no samples: check the source given with --data."
            )
        held = 1 if self.count < 10 else min(_MOST_HELD_OUT, self.count // 5)
        if self.count == 1:
            self._held = {0}
        else:
            self._held = set(
                np.linspace(self.count - 1, 0, held, endpoint=False).astype(int).tolist()
            )
        self._kept: list[Feed] | None = None
        self._few: dict[int, list[Feed]] = {}

    @property
    def held_out_count(self) -> int:
        """How many samples judge the result."""
        return len(self._held)

    @property
    def held_out_numbers(self) -> list[int]:
        """Their places in the source."""
        return sorted(self._held)

    @property
    def calibration_count(self) -> int:
        """How many samples calibrate."""
        return max(1, self.count - len(self._held))

    @property
    def shared(self) -> bool:
        """Whether the only sample both calibrates and judges."""
        return self.count == 1

    def calibration(self) -> Iterator[tuple[int, Feed]]:
        """(number in the source, feed) of each calibration sample; keeps held-out feeds on the way."""
        kept: list[Feed] | None = [] if self._kept is None else None
        room = _CACHE_BYTES
        for index, feed in enumerate(self._data):
            if index in self._held:
                if kept is not None:
                    room -= sum(np.asarray(v).nbytes for v in feed.values())
                    kept = [*kept, feed] if room > 0 else None
                if not self.shared:
                    continue
            yield index, feed
        if kept is not None and len(kept) == len(self._held):
            self._kept = kept

    def held_out(self) -> Iterator[Feed]:
        """The held-out feeds."""
        if self._kept is not None:
            yield from self._kept
            return
        yield from (feed for index, feed in enumerate(self._data) if index in self._held)

    def few(self, most: int) -> list[Feed]:
        """Up to `most` calibration feeds, spread evenly, bounded in bytes."""
        if most in self._few:
            return self._few[most]
        step = max(1, self.calibration_count // most)
        chosen: list[Feed] = []
        room = _CACHE_BYTES
        for position, (_, feed) in enumerate(self.calibration()):
            if position % step == 0 and len(chosen) < most and room > 0:
                chosen.append(feed)
                room -= sum(np.asarray(v).nbytes for v in feed.values())
        self._few[most] = chosen
        return chosen

    def first(self) -> Feed:
        """The first feed."""
        return next(iter(self._data))
