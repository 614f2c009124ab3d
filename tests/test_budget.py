"""Limits as people write them, what breaks them, and the front of what was measured."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.budget import Budget, Point, budget_of, pareto
from qcompile.errors import RecipeError
from qcompile.limits import Limit, parse_limit
from qcompile.recipe import Recipe


def point(**more: Any) -> Point:
    base = Point("it", 1, 0, 20.0, 0.01, None, None, None, 5.0, 2.0, 4.0)
    return dataclasses.replace(base, **more)


@pytest.mark.parametrize(
    ("text", "unit", "wanted"),
    [("4", "MB", Limit(4)), ("4MB", "MB", Limit(4)), ("4 mb", "MB", Limit(4)), ("50%", "MB", Limit(0.5, relative=True)),
     ("0.5%", "", Limit(0.005, relative=True)), ("0", "", Limit(0))],
)  # fmt: skip
def test_limits(text: str, unit: str, wanted: Limit) -> None:
    assert parse_limit(text, "x", unit) == wanted


@pytest.mark.parametrize("text", ["", "a", "-1", "nan", "4GB", "1e", "5%%"])
def test_no_limits(text: str) -> None:
    with pytest.raises(RecipeError, match="max_size is"):
        parse_limit(text, "max_size", "MB")


def test_a_metric_without_a_drop() -> None:
    with pytest.raises(RecipeError, match="metric is given without max_drop"):
        Recipe(metric="a:b")


def test_shares_are_of_the_float_model() -> None:
    recipe = Recipe(max_drop="0.5%", max_size="50%", max_latency="3ms", min_sqnr=20.0)
    made = budget_of(recipe, metric=80.0, ms=10.0, mb=8.0)
    assert made == Budget(pytest.approx(0.4), 20.0, 4.0, 3.0)
    assert budget_of(recipe, metric=None, ms=10.0, mb=8.0).max_drop == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("budget", "words"),
    [(Budget(max_drop=0.001), "1% of what the outputs say is lost"), (Budget(min_sqnr=21), "20.0 dB SQNR, the limit is 21 dB"),
     (Budget(max_size=3), "the size is 4.00 MB"), (Budget(max_latency=4), "the latency is 5.00 ms")],
)  # fmt: skip
def test_what_is_missed(budget: Budget, words: str) -> None:
    assert words in budget.misses(point())[0]
    assert budget.excess(point()) > 0
    assert Budget().misses(point()) == ()
    assert Budget().excess(point()) == 0


def test_the_best_is_within_the_limits_then_fast() -> None:
    points = [point(speedup=3.0, drop=0.2), point(speedup=1.5), point(speedup=2.0)]
    assert Budget(max_drop=0.1).best(points) == 2
    assert Budget().best(points) == 0
    assert Budget(max_drop=0.001).best(points) in (1, 2)  # none fits: the nearest
    assert Budget(smallest=True).best([point(size_mb=3.0), point(size_mb=2.0)]) == 1


@pytest.mark.parametrize(
    ("drop", "sigma", "scored", "kept", "doubted"),
    [(0.3, 0.7, 200, True, False), (1.0, 0.7, 200, True, True), (1.3, 0.7, 200, False, False), (1.0, 0.7, 99, False, False),
     (1.0, None, 0, False, False), (0.6, 0.0, 200, False, False), (0.5, 0.1, 200, True, False), (math.inf, 1.0, 200, False, False)],
)  # fmt: skip
def test_what_the_samples_cannot_tell(
    drop: float, sigma: float | None, scored: int, kept: bool, doubted: bool
) -> None:
    """Two of 200 images more are wrong: nothing shows that 0.5 % are lost."""
    budget = Budget(max_drop=0.5)
    made = point(drop=drop, sigma=sigma, scored=scored, metric=80.0)
    assert (budget.misses(made) == ()) == (budget.excess(made) == 0) == kept
    doubt = budget.doubt(made)
    assert bool(doubt) == doubted
    if doubted:
        assert "worse by 1 ± 0.7, the limit is 0.5: 200 samples cannot tell" in doubt
        assert "(390 could)" in doubt


@given(st.integers(100, 400))
def test_no_loss_means_none(count: int) -> None:
    """One lost sample of n is worse by 1/n with a noise of 1/n: no excess is negative, and nothing is granted."""
    lossy = point(drop=1 / count, sigma=1 / count, scored=count, metric=1.0, speedup=1.5)
    good = point(drop=0.0, sigma=0.0, scored=count, metric=1.0, speedup=3.0)
    assert Budget(max_drop=0.0).excess(lossy) > 0
    assert Budget(max_drop=0.0).misses(lossy)
    for limit in (0.0, 1e-3, 1.0):
        assert Budget(max_drop=limit).excess(lossy) >= 0
        assert Budget(max_drop=limit).best([lossy, good]) == 1


FIGURES = st.tuples(
    st.floats(0, 1), st.one_of(st.none(), st.floats(0, 90)), st.floats(0.1, 9), st.floats(1, 9)
)


@given(st.lists(FIGURES, max_size=8))
def test_the_front_is_what_nothing_beats(
    rows: list[tuple[float, float | None, float, float]],
) -> None:
    points = [point(drop=d, sqnr_db=db, speedup=s, size_mb=m) for d, db, s, m in rows]

    def beats(a: Point, b: Point) -> bool:
        x, y = (
            (p.drop, -(math.inf if p.sqnr_db is None else p.sqnr_db), -p.speedup, p.size_mb)
            for p in (a, b)
        )
        return all(i <= j for i, j in zip(x, y, strict=True)) and x != y

    front = pareto(points)
    assert all(not any(beats(q, points[i]) for q in points) for i in front)
    for i, p in enumerate(points):
        if i not in front:
            assert any(
                beats(q, p) or (q == p and j in front) for j, q in enumerate(points) if j != i
            )
