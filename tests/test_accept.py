"""Which changes are kept: against all subsets, and in how many evaluations."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.accept import Accepted, accept, better, spare


@dataclasses.dataclass
class Judged:
    noise: float
    divergence: float | None = None
    differing: int = 0


def total(effects: Sequence[float], chosen: Sequence[int]) -> Judged:
    noise = 1.0
    for i in chosen:
        noise *= effects[i]
    return Judged(noise)


@pytest.mark.parametrize("bad", range(0, 32, 5))
def test_one_harmful_change_is_isolated_in_few_evaluations(bad: int) -> None:
    effects = [0.9] * 32
    effects[bad] = 1e9
    found = accept(list(range(32)), lambda c: total(effects, c), Judged(1.0), most=100)
    assert found.kept == [i for i in range(32) if i != bad]
    assert found.evaluations <= 2 * math.log2(32) + 5


@given(st.lists(st.sampled_from([0.5, 0.8, 1.3, 2.0]), max_size=6))
def test_never_worse_than_nothing_and_harm_alone_is_never_kept(effects: list[float]) -> None:
    found = accept(list(range(len(effects))), lambda c: total(effects, c), Judged(1.0), most=100)
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(len(effects)), k) for k in range(len(effects) + 1)
    )
    least = min(total(effects, s).noise for s in subsets)
    assert least <= found.best.noise <= 1.0
    assert found.best.noise == pytest.approx(total(effects, found.kept).noise)
    if effects and min(effects) > 1:
        assert found.kept == []


def test_less_noise_is_not_enough() -> None:
    old = Judged(1.0, 0.1, 3)
    assert better(Judged(0.9, 0.1, 3), old)
    assert not better(Judged(0.9, 0.2, 3), old)  # another order of the scores
    assert not better(Judged(0.9, 0.1, 5), old)  # more decisions that differ
    assert not better(Judged(0.99, 0.1, 3), old)  # chance
    assert not better(Judged(math.nan), old)


def test_evaluations_are_bounded() -> None:
    found = accept(list(range(64)), lambda c: Judged(2.0), Judged(1.0), most=7)
    assert (found.kept, found.evaluations) == ([], 7)


def test_what_costs_time_and_hardly_helps_goes() -> None:
    """Changes 4 to 9 save 1 % each, 0 to 3 half of the noise; 0 and 9 cost nothing."""
    effects = [0.5] * 4 + [0.99] * 6
    names = list(range(10))

    def judge(chosen: Sequence[int]) -> Judged:
        return total(effects, chosen)

    found = Accepted(list(names), judge(names), 0)
    spare(found, judge, names[1:9], lambda i: 1 - effects[i])
    assert found.kept == [0, 1, 2, 3, 9]
    assert found.best.noise == pytest.approx(judge(found.kept).noise)
    assert found.evaluations <= 4


@given(st.lists(st.sampled_from([0.5, 0.9, 0.97, 0.999]), max_size=9), st.integers(0, 5))
def test_sparing_costs_little_noise_and_no_more_evaluations(
    effects: list[float], most: int
) -> None:
    names = list(range(len(effects)))
    whole = total(effects, names)
    found = Accepted(list(names), whole, 0)
    spare(found, lambda c: total(effects, c), names, lambda i: 1 - effects[i], most=most)
    assert found.best.noise <= 1.1 * whole.noise
    assert found.best.noise == pytest.approx(total(effects, found.kept).noise)
    assert found.evaluations <= most
    if most >= 4:  # the least prefix by worth that is good enough
        ranked = sorted(names, key=lambda i: effects[i])
        counts = [
            k
            for k in range(len(names) + 1)
            if total(effects, ranked[:k]).noise <= 1.1 * whole.noise
        ]
        assert len(found.kept) == min(counts)


def test_sparing_heeds_decisions_and_divergence() -> None:
    for worse in (Judged(1.0, 0.2, 3), Judged(1.0, 0.1, 9), Judged(2.0, 0.1, 3), Judged(math.nan)):
        found = Accepted([0, 1], Judged(1.0, 0.1, 3), 0)
        spare(found, lambda _, worse=worse: worse, [0, 1], float)  # type: ignore[misc]
        assert found.kept == [0, 1]
    found = Accepted([0, 1], Judged(1.0, 0.1, 3), 0)
    spare(found, lambda _: Judged(1.05, 0.1, 3), [1], float)
    assert found.kept == [0]
