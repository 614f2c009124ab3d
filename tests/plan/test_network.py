"""Cuts against all assignments of sides, on random networks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.plan.network import Network

Edge = tuple[int, int, float | None, float]


@st.composite
def networks(draw: st.DrawFn) -> tuple[int, int, list[Edge]]:
    """Nodes 2, 3 ..., gates behind them, and edges: costs in tens of nanoseconds, so that capacities are exact."""
    nodes, gates = draw(st.integers(1, 6)), draw(st.integers(0, 2))
    size = 2 + nodes + gates
    ends = st.integers(0, size - 1)
    cost = st.none() | st.integers(0, 30).map(lambda n: 10.0 * n)
    edges: list[Edge] = []
    for v in range(2, 2 + nodes):  # each can be on either side, at a cost
        edges.append((0, v, 10.0 * draw(st.integers(0, 30)), 0.0))
        edges.append((v, 1, 10.0 * draw(st.integers(0, 30)), float(draw(st.integers(0, 9)))))
    for gate in range(2 + nodes, size):
        reader, maker = (draw(st.integers(2, 1 + nodes)) for _ in range(2))
        edges.append((reader, gate, None, 0.0))
        edges.append((gate, maker, 10.0 * draw(st.integers(0, 30)), float(draw(st.integers(0, 9)))))
    for _ in range(draw(st.integers(0, 4))):
        start, end, ns = draw(st.integers(2, 1 + nodes)), draw(ends), draw(cost)
        if end >= 2 or ns is not None:
            edges.append((start, end, ns, float(draw(st.integers(0, 9))) if ns else 0.0))
    return nodes, gates, edges


def made(nodes: int, gates: int, edges: list[Edge]) -> Network:
    network = Network()
    assert [network.vertex() for _ in range(nodes)] == list(range(2, 2 + nodes))
    assert [network.gate() for _ in range(gates)] == list(range(2 + nodes, 2 + nodes + gates))
    for edge in edges:
        network.edge(*edge)
    return network


def cut(side: set[int], edges: list[Edge]) -> tuple[float, float]:
    """Nanoseconds (infinite if an edge is cut that must not be) and noise."""
    found = [edge for edge in edges if edge[0] in side and edge[1] not in side]
    ns = sum(float("inf") if edge[2] is None else edge[2] for edge in found)
    return ns, sum(edge[3] for edge in found)


def sides(size: int) -> Iterator[set[int]]:
    for flags in itertools.product((False, True), repeat=size - 2):
        yield {0, *(v for v, flag in enumerate(flags, 2) if flag)}


@settings(max_examples=80)
@given(network=networks(), price=st.sampled_from([0.0, 10.0, 50.0]))
def test_no_cut_costs_less(network: tuple[int, int, list[Edge]], price: float) -> None:
    nodes, gates, edges = network
    ns, noise = cut(made(*network).integer_side(price), edges)
    costs = (cut(side, edges) for side in sides(2 + nodes + gates))
    assert ns + price * noise == pytest.approx(min(n + price * z for n, z in costs))


@settings(max_examples=120)
@given(network=networks(), most=st.integers(0, 30).map(lambda n: n + 0.5))
def test_no_cut_within_the_noise_costs_less(
    network: tuple[int, int, list[Edge]], most: float
) -> None:
    nodes, gates, edges = network
    found = made(*network).integer_side_within(most)
    within = [c for side in sides(2 + nodes + gates) if (c := cut(side, edges))[1] <= most]
    assert found is not None  # all float has no noise
    ns, noise = cut(found, edges)
    assert noise <= most
    assert ns == pytest.approx(min(n for n, _ in within), rel=2e-3, abs=1e-3)


def test_nothing_within_the_noise() -> None:
    """A node that must be integer has more noise than is allowed."""
    network = made(1, 0, [(0, 2, None, 0.0), (2, 1, 10.0, 5.0)])
    assert network.integer_side_within(4.0) is None
    assert network.integer_side_within(6.0) == {0, 2}


def test_an_edge_to_itself_is_none() -> None:
    network = made(1, 0, [(2, 2, None, 3.0), (0, 2, 10.0, 0.0)])
    assert network.integer_side() == {0, 2}
    assert network.integer_side_within(1.0) == {0, 2}


def test_an_empty_network() -> None:
    assert Network().integer_side() == {0}
