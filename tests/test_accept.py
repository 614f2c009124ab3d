"""Which changes are kept: against all subsets, and in how many evaluations."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.accept import accept, better


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
