"""The cheapest choice within a limit, against all choices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qcompile.plan.knapsack import choose


def best(sizes: list[list[int]], costs: list[list[float]], limit: int) -> float | None:
    """The least cost of all choices that keep the limit."""
    found = [
        sum(row[i] for row, i in zip(costs, pick, strict=True))
        for pick in itertools.product(*(range(len(row)) for row in sizes))
        if sum(row[i] for row, i in zip(sizes, pick, strict=True)) <= limit
    ]
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(8))
def test_as_good_as_the_best_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, 6)
    sizes = [rng.integers(1, 10**6, n).tolist() for n in counts]
    costs = [rng.exponential(size=n).tolist() for n in counts]
    least = sum(map(min, sizes))
    for limit in (least, int(1.3 * least), 2 * least, 10 * least):
        found = choose(sizes, costs, limit)
        assert found is not None
        assert sum(row[i] for row, i in zip(sizes, found, strict=True)) <= limit
        cost = sum(row[i] for row, i in zip(costs, found, strict=True))
        wanted = best(sizes, costs, limit)
        assert wanted is not None
        assert cost <= wanted * (1 + 1e-3)
    assert choose(sizes, costs, least - 1) is None


def test_not_one_byte_too_many() -> None:
    # each step up gains the same: all of them would fit but for one byte
    sizes = [[10**9, 10**9 + 1] for _ in range(200)]
    costs = [[1.0, 0.0] for _ in range(200)]
    found = choose(sizes, costs, 200 * 10**9 + 199)
    assert found is not None
    assert sum(found) == 199


def test_costs_of_any_size_and_none_at_all() -> None:
    assert choose([[2, 1]], [[1e-30, 1e-20]], 2) == [0]
    assert choose([[2, 1]], [[0.0, 0.0]], 2) == [1]  # the smaller of equals
    assert choose([], [], 0) == []
