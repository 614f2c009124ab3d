"""One option for each of many things, of least cost together within a limit: a multiple-choice knapsack.

An integer program, solved by HiGHS to within `_GAP` of the best. Its work is limited by nodes of the search, not by time, so
that the same options always give the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

_GAP = 1e-4
_OPTIONS = {"mip_rel_gap": _GAP, "node_limit": 20000}


def choose(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], limit: int
) -> list[int] | None:
    """Return which option of each thing to take, by number; None if no choice keeps the limit.

    Args:
        sizes: of the options of each thing, 0 or more; each thing has at least one.
        costs: of the same options, finite, 0 or more.
        limit: that the sum of the sizes may have.
    """
    least = [min(range(len(row)), key=lambda i: (row[i], i)) for row in sizes]
    if sum(row[i] for row, i in zip(sizes, least, strict=True)) > limit:
        return None
    kept = [_useful(size, cost) for size, cost in zip(sizes, costs, strict=True)]
    places = [(thing, option) for thing, options in enumerate(kept) for option in options]
    if len(places) == len(kept):
        return [options[0] for options in kept]
    size = np.array([sizes[thing][option] for thing, option in places], np.float64)
    cost = np.array([costs[thing][option] for thing, option in places], np.float64)
    one = csr_array(
        (np.ones(len(places)), ([thing for thing, _ in places], range(len(places)))),
        shape=(len(kept), len(places)),
    )
    # numbers near 1: what HiGHS calls feasible is 1e-6 off, which must not be a byte too many
    unit = max(limit, 1)
    found = milp(
        cost / max(cost.max(), 1e-300), integrality=np.ones(len(places)), bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(size[None, :] / unit, -np.inf, limit / unit),
        ],
        options=_OPTIONS,
    )  # fmt: skip
    chosen = list(least)
    if found.x is not None:
        for (thing, option), share in zip(places, found.x, strict=True):
            if share > 0.5:
                chosen[thing] = option
    return _within(chosen, kept, sizes, costs, limit)


def _useful(sizes: Sequence[int], costs: Sequence[float]) -> list[int]:
    """Options that no other one beats in both, smallest first."""
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], costs[i], i))
    kept: list[int] = []
    for i in order:
        if not kept or costs[i] < costs[kept[-1]]:
            kept.append(i)
    return kept


def _within(
    chosen: list[int], kept: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]],
    costs: Sequence[Sequence[float]], limit: int,
) -> list[int]:  # fmt: skip
    """The choice, with smaller options where a solver's tolerance let it pass the limit: those that cost least a byte."""
    while sum(row[i] for row, i in zip(sizes, chosen, strict=True)) > limit:
        steps = [
            ((costs[t][i] - costs[t][now]) / (sizes[t][now] - sizes[t][i]), t, i)
            for t, now in enumerate(chosen)
            for i in kept[t]
            if sizes[t][i] < sizes[t][now]
        ]
        _, thing, option = min(steps)
        chosen[thing] = option
    return chosen
