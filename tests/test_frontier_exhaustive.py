"""The search within limits against every plan there is, on toys; the clock is the plan's cost, the errors are real."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from bench_search import CostReferee, Entry, Toy, compared

from qcompile.verify.metric import load_metric, scored

SLOWER = 0.03  # than the fastest plan that keeps the limit
MEASURED = 16


@functools.cache
def toy(seed: int, *, chain: bool) -> tuple[Toy, list[Entry]]:
    """Six convolutions, and all plans but the one where nothing is integer."""
    made = Toy(6, chain=chain, seed=seed)
    return made, list(made.every())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chain", [False, True], ids=["apart", "chain"])
def test_the_search_comes_near_the_best_of_all_plans(seed: int, *, chain: bool) -> None:
    made, entries = toy(seed, chain=chain)
    assert len(entries) == 63
    rows = compared(made, entries, levels=5)
    gaps = {f"{row.limit:.1f} dB": row.gap for row in rows}
    assert max(gaps.values()) <= SLOWER, gaps
    assert max(row.measured for row in rows) <= MEASURED
    answers = {row.found.floats for row in rows}
    assert len(answers) > 1  # the limits ask for different plans


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_metric_whose_limit_of_noise_is_not_known(share: float) -> None:
    """The metric is the relative error on the samples held out, so that the best plan within it is known."""
    made, entries = toy(0, chain=True)
    samples = made.opened.samples
    assert samples is not None
    feeds = list(samples.held_out())
    wanted = [made.opened.session.run(feed)[0] for feed in feeds]

    def error(session: Any) -> float:
        wrong = sum(
            float(np.sum((session.run(None, feed)[0] - y) ** 2))
            for feed, y in zip(feeds, wanted, strict=True)
        )
        return float(np.sqrt(wrong / sum(float(np.sum(y**2)) for y in wanted)))

    metric = scored(load_metric(error, lower_is_better=True), made.opened.session)
    decibels = sorted(e.db for e in entries if e.ns < made.float_ns)
    limit = decibels[int(share * len(decibels))]
    most = 10 ** (-limit / 20) * 1.0001
    referee = CostReferee(made, metric, max_drop=f"{most:.8f}")
    found, measured = made.search(referee)
    best = min(e.ns for e in entries if e.db >= limit)
    assert found.db >= limit - 0.01
    assert found.ns <= (1 + SLOWER) * best
    assert measured <= MEASURED


def test_a_toy_is_the_same_each_time() -> None:
    first, second = Toy(3, chain=True, seed=5), Toy(3, chain=True, seed=5)
    assert list(first.every()) == list(second.every())
    answers = [it.search(CostReferee(it, min_sqnr=20.0)) for it in (first, second)]
    assert answers[0] == answers[1]
