"""Which of many independent changes to keep, by their effect on the whole model, in few evaluations.

All changes together are tried first; a part that does not help is halved and its halves are tried on top of what
was kept so far. One harmful change among n costs about 2 log2(n) evaluations, as in group testing (Dorfman 1943).
Then halves of what was kept are left out in turn: what does no good goes. Of changes that cost time, so many go that what is
left has hardly more noise: those of least worth first, their number found by bisection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Judged(Protocol):
    """What an evaluation finds out."""

    @property
    def noise(self) -> float:
        """Noise-to-signal power ratio of the worst output slice."""

    @property
    def divergence(self) -> float | None:
        """Mean KL divergence of outputs with scores of classes."""

    @property
    def differing(self) -> int:
        """Decisions that differ from the float model's."""


J = TypeVar("J", bound=Judged)
_GAIN = 0.02  # of the noise, that a change must save: less may be chance
_SPARED = 0.1  # of the noise, that may be added where that saves time: 0.4 dB
_LEVELS = 2  # of halves, when what was kept is looked at again
_WORSE = 1.05  # of the divergence, that a change may cost: it is an estimate as well


def better(new: Judged, old: Judged, gain: float = _GAIN) -> bool:
    """Whether `new` has less noise, and no more divergence nor decisions that differ.

    The SQNR of scores alone misleads: saturated scores can have less noise and another order.
    """
    if not new.noise < (1 - gain) * old.noise or new.differing > old.differing + 1:
        return False
    if new.divergence is None or old.divergence is None:
        return True
    return new.divergence <= _WORSE * old.divergence


@dataclasses.dataclass
class Accepted(Generic[T, J]):
    """The changes kept, what they lead to, and how many evaluations that took."""

    kept: list[T]
    best: J
    evaluations: int


def accept(
    changes: Sequence[T], judge: Callable[[Sequence[T]], J], base: J, *, most: int = 16
) -> Accepted[T, J]:
    """The changes to keep.

    Args:
        changes: in an order in which neighbours have to do with each other.
        judge: evaluates a subset, given in the order of `changes`.
        base: with no change at all.
        most: evaluations.
    """
    place = {id(change): i for i, change in enumerate(changes)}
    found: Accepted[T, J] = Accepted([], base, 0)

    def tried(subset: list[T]) -> bool:
        ordered = sorted(subset, key=lambda change: place[id(change)])
        attempt = judge(ordered)
        found.evaluations += 1
        if better(attempt, found.best):
            found.kept, found.best = ordered, attempt
            return True
        return False

    waiting = [list(changes)] if changes else []
    whole = True
    while waiting and found.evaluations < most:
        part = waiting.pop(0)
        if tried([*found.kept, *part]):
            continue
        whole = False
        if len(part) > 1:
            waiting += _halves(part)
    if whole and len(found.kept) > 1:
        _prune(found, tried, most)
    return found


def spare(
    found: Accepted[T, J], judge: Callable[[Sequence[T]], J], costly: Sequence[T], worth: Callable[[T], Any],
    *, most: int = 5,
) -> None:  # fmt: skip
    """Leave out changes that cost time and hardly help, in place.

    Args:
        found: what `accept` gave.
        judge: as for `accept`.
        costly: those of all changes that cost time.
        worth: of a change by itself: the greatest stay longest.
        most: evaluations.
    """
    cost = {id(change) for change in costly}
    ranked = sorted((c for c in found.kept if id(c) in cost), key=worth, reverse=True)
    place = {id(change): i for i, change in enumerate(found.kept)}
    full = found.best
    low, high = 0, len(ranked)  # with `high` of them it is good
    for _ in range(most):
        if low >= high:
            return
        middle = (low + high) // 2
        gone = {id(change) for change in ranked[middle:]}
        rest = [change for change in found.kept if id(change) not in gone]
        attempt = judge(sorted(rest, key=lambda change: place[id(change)]))
        found.evaluations += 1
        if _nearly(attempt, full):
            found.kept, found.best, high = rest, attempt, middle
        else:
            low = middle + 1


def _nearly(new: Judged, old: Judged) -> bool:
    """Whether `new` has hardly more noise, divergence and decisions that differ."""
    if not new.noise <= (1 + _SPARED) * old.noise or new.differing > old.differing + 1:
        return False
    if new.divergence is None or old.divergence is None:
        return True
    return new.divergence <= (1 + _SPARED) * old.divergence


def _prune(found: Accepted[T, J], tried: Callable[[list[T]], bool], most: int) -> None:
    """Leaves out halves and quarters of what was kept, where that is better."""
    waiting = [(part, _LEVELS) for part in _halves(found.kept)]
    while waiting and found.evaluations < most:
        part, level = waiting.pop(0)
        out = {id(change) for change in part}
        rest = [change for change in found.kept if id(change) not in out]
        if not tried(rest) and level > 1 and len(part) > 1:
            waiting += [(half, level - 1) for half in _halves(part)]


def _halves(items: list[T]) -> list[list[T]]:
    half = (len(items) + 1) // 2
    return [part for part in (items[:half], items[half:]) if part]
