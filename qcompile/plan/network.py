"""A two-sided network of plans: nodes on the integer side or on the float side, and what each border between costs.

Without a limit on noise the cheapest assignment is a minimum cut (Greig, Porteous and Seheult 1989), found by SciPy's
maximum flow. With one it is an integer program, the same cut under a single further constraint, solved by HiGHS.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

_UNIT = 10.0  # nanoseconds: capacities are int32
_INFINITE = 1 << 29
_GAP = 1e-3
_CLOCK = {"node_limit": 5000, "time_limit": 20.0}
_NO_CLOCK = {"node_limit": 200}  # which ends where it ends, however fast the machine is
_TINY = 1e-9  # nanoseconds of noise's own, so that of plans of equal time the quieter one is taken


@dataclasses.dataclass(frozen=True)
class _Edge:
    start: int
    end: int
    ns: float | None
    noise: float


class Network:
    """A flow network under construction; vertex 0 is the integer side, 1 the float side."""

    def __init__(self) -> None:
        self._whole = [True, True]
        self._edges: list[_Edge] = []

    @property
    def size(self) -> int:
        """Vertices so far."""
        return len(self._whole)

    def vertex(self) -> int:
        """A node of the model."""
        self._whole.append(True)
        return self.size - 1

    def gate(self) -> int:
        """A vertex between nodes, whose side follows from theirs."""
        self._whole.append(False)
        return self.size - 1

    def edge(self, start: int, end: int, ns: float | None, noise: float = 0.0) -> None:
        """Cut if `start` is on the integer side and `end` is not; `ns` None: never cut."""
        if start != end:
            self._edges.append(_Edge(start, end, ns, noise))

    def integer_side(self, price: float = 0.0) -> set[int]:
        """The vertices on the integer side of a minimum cut, where a unit of noise costs `price` nanoseconds."""
        capacities: dict[tuple[int, int], int] = {}
        for edge in self._edges:
            ns = _INFINITE * _UNIT if edge.ns is None else edge.ns + price * edge.noise
            units = min(_INFINITE, max(0, round(ns / _UNIT)))
            if units:
                key = (edge.start, edge.end)
                capacities[key] = min(_INFINITE, capacities.get(key, 0) + units)
        if not capacities:
            return {0}
        rows, columns = (np.array(axis, np.int32) for axis in zip(*capacities, strict=True))
        capacity = csr_array(
            (np.array(list(capacities.values()), np.int32), (rows, columns)),
            shape=(self.size, self.size),
        )
        flow = maximum_flow(capacity, 0, 1).flow
        residual = csr_array(capacity - flow)
        residual.eliminate_zeros()
        return set(map(int, breadth_first_order(residual, 0, return_predecessors=False)))

    def integer_side_within(self, most: float, *, clock: bool = True) -> set[int] | None:
        """The integer side of the cheapest cut whose noise is at most `most`; None if none was found.

        The search for it ends after some branches, with `clock` also after some seconds, with the best one so far.

        Variables are a side u in [0, 1] for each vertex (whole numbers for nodes of the model) and a share
        e >= u[start] - u[end] for each edge; the sum of ns * e is least while that of noise * e is at most `most`.
        """
        finite = [edge for edge in self._edges if edge.ns is not None]
        fixed = [edge for edge in self._edges if edge.ns is None]
        count, cuts = self.size, len(finite)
        rows, columns, values = [], [], []
        for i, edge in enumerate((*finite, *fixed)):
            row = [(edge.start, 1.0), (edge.end, -1.0), *([(count + i, -1.0)] if i < cuts else [])]
            for column, value in row:
                rows.append(i)
                columns.append(column)
                values.append(value)
        sides = coo_array((values, (rows, columns)), shape=(cuts + len(fixed), count + cuts))
        noise = np.zeros(count + cuts)
        noise[count:] = [edge.noise for edge in finite]
        noise /= max(most, 1e-30)
        cost = np.zeros(count + cuts)
        cost[count:] = [max(0.0, edge.ns or 0.0) / 1000 for edge in finite]
        low, high = np.zeros(count + cuts), np.ones(count + cuts)
        low[0], high[1] = 1.0, 0.0
        whole = np.zeros(count + cuts)
        whole[:count] = self._whole
        found = milp(
            cost + _TINY * np.minimum(noise, 1.0), integrality=whole, bounds=Bounds(low, high),
            constraints=[
                LinearConstraint(csr_array(sides), -np.inf, 0.0),
                LinearConstraint(noise[None, :], -np.inf, 1.0),
            ],
            options={"mip_rel_gap": _GAP, **(_CLOCK if clock else _NO_CLOCK)},
        )  # fmt: skip
        if found.x is None:
            return None
        return {v for v in range(count) if found.x[v] > 0.5}
