"""Splits the user's samples: most calibrate, the others are held out to judge the result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

import numpy as np

from qcompile.errors import DataError
from qcompile.run.session import Feed

MOST_HELD_OUT = 24
TUNING = 16  # calibration feeds that are kept for what is solved by running the model
_CACHE_BYTES = 96 << 20


class Sized(Protocol):
    """A re-iterable source of feeds that knows its length."""

    description: str

    def __iter__(self) -> Iterator[Feed]: ...
    def __len__(self) -> int: ...


class Judges(Protocol):
    """The samples that are there once statistics are: those held out, and a few to tune on."""

    @property
    def calibration_count(self) -> int:
        """How many samples the statistics are of."""

    @property
    def held_out_count(self) -> int:
        """How many samples judge the result."""

    @property
    def held_out_numbers(self) -> list[int]:
        """Their places in the source."""

    @property
    def shared(self) -> bool:
        """Whether the samples that judge also calibrated."""

    def held_out(self) -> Iterator[Feed]:
        """The held-out feeds."""

    def few(self, most: int) -> list[Feed]:
        """Up to `most` feeds that calibrated, or might have."""

    def first(self) -> Feed:
        """Any feed: it tells shapes."""


class Samples:
    """Calibration and held-out samples of one source; feeds are kept in memory while they are few bytes.

    Every fifth sample is held out, 24 at most, spread over the source. A single sample serves for both.
    """

    def __init__(self, data: Sized, most_held_out: int | None = None) -> None:
        """With `most_held_out` so many samples are held out, half of all at most; with 0 all calibrate.

        Raises:
            DataError: there are no samples.
        """
        self._data = data
        self.description = getattr(data, "description", type(data).__name__)
        self.manner: str = getattr(data, "manner", "")
        self.count = len(data)
        if self.count == 0:
            raise DataError(
                "the calibration data holds no samples: check the source given with --data."
            )
        held = 1 if self.count < 10 else min(MOST_HELD_OUT, self.count // 5)
        held = held if most_held_out is None else min(most_held_out, max(1, self.count // 2))
        self._all_calibrate = self.count == 1 or most_held_out == 0
        if self.count == 1 and most_held_out != 0:
            self._held = {0}
        elif not held:
            self._held = set()
        else:
            self._held = set(
                np.linspace(self.count - 1, 0, held, endpoint=False).astype(int).tolist()
            )
        self._kept: list[Feed] | None = None
        self._digest = ""
        self._out: set[int] = set()
        self._few: list[Feed] | None = None

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
        held = 0 if self._all_calibrate else len(self._held)
        return self.count - held - len(self._out)

    @property
    def shared(self) -> bool:
        """Whether the only sample both calibrates and judges."""
        return self.count == 1 and bool(self._held)

    @property
    def digest(self) -> str:
        """SHA-256 of all feeds in order, in hexadecimal; known once all were read, which this does if need be."""
        if not self._digest:
            self._digest = digest_of(self._data)
        return self._digest

    def calibration(self) -> Iterator[tuple[int, Feed]]:
        """(number in the source, feed) of each calibration sample; keeps held-out feeds on the way."""
        kept: list[Feed] | None = [] if self._kept is None else None
        room = _CACHE_BYTES
        made = hashlib.sha256()
        for index, feed in enumerate(self._data):
            made.update(_digest_of_feed(feed))
            if index in self._out:
                continue
            if index in self._held:
                if kept is not None:
                    room -= sum(np.asarray(v).nbytes for v in feed.values())
                    kept = [*kept, feed] if room > 0 else None
                if not self.shared:
                    continue
            yield index, feed
        self._digest = made.hexdigest()
        if kept is not None and len(kept) == len(self._held):
            self._kept = kept

    def numbered(self) -> Iterator[tuple[int, Feed]]:
        """(number in the source, feed) of each sample that is held out."""
        return zip(self.held_out_numbers, self.held_out(), strict=True)

    def leave_out(self, numbers: AbstractSet[int]) -> None:
        """These samples, bad ones, are in neither part from now on."""
        if not numbers:
            return
        kept = self._kept
        if kept is not None:
            pairs = zip(self.held_out_numbers, kept, strict=True)
            self._kept = [feed for number, feed in pairs if number not in numbers]
        self._out |= numbers
        self._held -= numbers
        self._few = None

    def held_out(self) -> Iterator[Feed]:
        """The held-out feeds."""
        if self._kept is not None:
            yield from self._kept
            return
        yield from (feed for index, feed in enumerate(self._data) if index in self._held)

    def few(self, most: int) -> list[Feed]:
        """Up to `most` calibration feeds, spread evenly, bounded in bytes; `TUNING` of them are remembered."""
        if most > TUNING:
            return self._gathered(most)
        if self._few is None:
            self._few = self._gathered(TUNING)
        return _spread(self._few, most)

    def _gathered(self, most: int) -> list[Feed]:
        wanted = set(_places(self.calibration_count, most))
        found: list[Feed] = []
        room = _CACHE_BYTES
        for position, (_, feed) in enumerate(self.calibration()):
            if position in wanted and room > 0:
                found.append(feed)
                room -= sum(np.asarray(v).nbytes for v in feed.values())
        return found

    def first(self) -> Feed:
        """The first feed."""
        return next(iter(self._data))


class StoredSamples:
    """The samples that came with statistics: see `Judges`."""

    def __init__(
        self, held: Sequence[Feed], few: Sequence[Feed], calibrated: int, *, shared: bool = False
    ) -> None:
        self._shared = shared
        self._held, self._few = list(held), list(few)
        self.calibration_count = calibrated

    @property
    def held_out_count(self) -> int:
        """See `Judges`."""
        return len(self._held)

    @property
    def held_out_numbers(self) -> list[int]:
        """See `Judges`."""
        return list(range(len(self._held)))

    @property
    def shared(self) -> bool:
        """See `Judges`."""
        return self._shared

    def held_out(self) -> Iterator[Feed]:
        """See `Judges`."""
        return iter(self._held)

    def few(self, most: int) -> list[Feed]:
        """See `Judges`."""
        return _spread(self._few, most)

    def first(self) -> Feed:
        """See `Judges`."""
        return (self._few or self._held)[0]


def _spread(feeds: list[Feed], most: int) -> list[Feed]:
    return [feeds[i] for i in _places(len(feeds), most)]


def _places(count: int, most: int) -> list[int]:
    """Up to `most` of so many places, spread evenly."""
    taken = min(count, most)
    return [i * count // taken for i in range(taken)]


def digest_of(feeds: Sized) -> str:
    """SHA-256 of feeds in order, in hexadecimal."""
    made = hashlib.sha256()
    for feed in feeds:
        made.update(_digest_of_feed(feed))
    return made.hexdigest()


def _digest_of_feed(feed: Feed) -> bytes:
    made = hashlib.sha256()
    for name in sorted(feed):
        array = np.asarray(feed[name])
        made.update(f"{name} {array.dtype} {array.shape}".encode())
        if array.dtype.kind in "OSU":
            made.update(repr(array.tolist()).encode())
        else:
            made.update(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
    return made.digest()
