"""Times models against each other in turn, so that a change of the machine's speed meets all alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from qcompile.run.session import Feed

_WARM_UP = 3
_LEAST_ROUNDS = 12


class Runs(Protocol):
    """What can be timed, such as a session."""

    def run(self, feed: Feed) -> object:
        """One run."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians over the rounds: milliseconds by model, and the ratio to the first model, pair by pair."""

    ms: Mapping[str, float]
    speedup: Mapping[str, float]
    rounds: int


def race(
    sessions: Mapping[str, Runs], feed: Feed, *, seconds: float = 1.0, most: int = 400
) -> Timing:
    """Runs all models in turn on one feed until `seconds` are over; the first one is the reference."""
    names = list(sessions)
    rows: list[list[float]] = []
    deadline = time.perf_counter() + seconds
    while len(rows) < _LEAST_ROUNDS + _WARM_UP or (
        time.perf_counter() < deadline and len(rows) < most
    ):
        row = []
        for name in names:
            start = time.perf_counter()
            sessions[name].run(feed)
            row.append(time.perf_counter() - start)
        rows.append(row)
        if len(rows) == _WARM_UP and 4 * sum(rows[-1]) > seconds:
            break  # large models: three rounds tell enough
    table = np.array(rows[_WARM_UP:] or rows[1:])
    ms = dict(zip(names, (1000 * np.median(table, axis=0)).tolist(), strict=True))
    ratios = np.median(table[:, :1] / table, axis=0)
    return Timing(ms, dict(zip(names, ratios.tolist(), strict=True)), len(table))


def typical_feeds(feeds: Sequence[Feed]) -> list[tuple[str, Feed]]:
    """Feeds to time: the one of middle size, and the smallest if it is less than half of that.

    A decoder is timed on a prefill and on a single token this way.
    """

    def size(feed: Feed) -> int:
        return max((int(np.size(value)) for value in feed.values()), default=0)

    def work(feed: Feed) -> int:
        # caches grow while the work shrinks: count only inputs that are not caches
        plain = [int(np.size(v)) for k, v in feed.items() if "past" not in k and "mask" not in k]
        return max(plain, default=size(feed))

    ranked = sorted(feeds, key=work)
    middle = ranked[len(ranked) // 2]
    chosen = [middle]
    if work(ranked[0]) * 2 < work(middle):
        chosen.append(ranked[0])
    return [(describe(feed), feed) for feed in chosen]


def describe(feed: Feed) -> str:
    """The shapes of a feed's first input, `1x3x224x224`."""
    first = next(iter(feed.values()), None)
    return "no input" if first is None else "x".join(map(str, np.shape(first))) or "scalar"
