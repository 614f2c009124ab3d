"""Matrices solved part after part: each sees the inputs that the quantized parts before it make.

For each part of the graph (`qcompile.fewbits.cut`) the inputs of its matrices are gathered twice: as the float model makes
them, and as the parts before make them with their codes (`qcompile.fewbits.streams`). Codes are chosen for the second ones,
and to give what the float matrices give for the first ones (`qcompile.algo.drift`). The part then runs with its codes, and
what passes to the next part is that. Inputs of float layers alone would let the errors of all layers add up unseen; inputs
of quantized layers alone, as in Frantar et al. 2022, see them but do not undo them. Memory is that of one part, of what
passes for all samples, and of the codes.

Where constants before can take it, inputs are scaled so that blocks lose less (`qcompile.algo.balance`). Scales are found
with the codes, from the same moments; constants are divided by them when all is solved (`qcompile.fewbits.fold`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from qcompile.algo.balance import balance
from qcompile.algo.blocks import Blocked
from qcompile.algo.choose import Factors, Tally, solve_blocks
from qcompile.algo.drift import Drift
from qcompile.fewbits.assign import Scheme
from qcompile.fewbits.cut import Part, cut, read_values
from qcompile.fewbits.scales import AWQ
from qcompile.fewbits.streams import Streams
from qcompile.graph.edit import attribute, read_once
from qcompile.graph.linear import Linear
from qcompile.recipe import Recipe
from qcompile.run.probe import Fact
from qcompile.run.session import Feed
from qcompile.solve.smoothing import LinearGroup, Smoothing, find_path, linear_groups, takers

Array = npt.NDArray[Any]
Chosen = tuple[Linear, Scheme]
Found = dict[str, tuple[Blocked, Tally]]


def solve_plain(
    chosen: Sequence[Chosen], algorithm: str, tick: Callable[[], object] = lambda: None
) -> Found:
    """Codes by the weights alone, by node name; readers of one matrix share them.

    Raises:
        RecipeError: the algorithm is not known, or needs data.
    """
    found: Found = {}
    made: dict[object, tuple[Blocked, Tally]] = {}
    for item, scheme in chosen:
        assert item.weight is not None
        key = item.weight.key
        if key not in made:
            made[key] = _solve(item, scheme, algorithm)
        found[item.name] = made[key]
        tick()
    return found


_BALANCED = ("auto", "all")  # algorithms that may scale inputs
_FINE = 8  # bits, at which scales have nothing left to gain
_DATALESS = ("auto", "all", "rtn", "search", "kquant", "hqq")


def solve_in_order(
    prepared: ir.Model, chosen: Sequence[Chosen], samples: Sequence[Feed], held_out: Sequence[Feed],
    facts: Mapping[str, Fact], recipe: Recipe, tick: Callable[[], object] = lambda: None,
) -> tuple[Found, dict[str, Smoothing]]:  # fmt: skip
    """Codes by what the matrices compute, by node name; and the scales of inputs that they are made for, by tensor.

    Args:
        prepared: the float graph, sorted; not changed.
        chosen: matrices and their schemes. Tables and what stands in bodies is solved by its weights alone, but a table
            that is a head as well by the inputs of the head.
        samples: feeds that choose codes.
        held_out: feeds that judge which algorithm was best for a matrix.
        facts: sizes and types.
        recipe: algorithm, accuracy level, threads and memory.
        tick: called after each matrix.
    """
    last: dict[object, str] = {}  # who decides on a matrix that several nodes read
    for item, _ in chosen:
        assert item.weight is not None
        if tap(item, prepared) or item.weight.key not in last:
            last[item.weight.key] = item.name
    deciding = [c for c in chosen if c[0].weight and last[c[0].weight.key] == c[0].name]
    tapped = [c for c in deciding if tap(c[0], prepared)]
    plain = recipe.algorithm if recipe.algorithm in _DATALESS else "auto"
    found = solve_plain([c for c in deciding if not tap(c[0], prepared)], plain, tick)
    parts = cut(prepared, [item.node for item, _ in tapped], facts)
    nodes = list(prepared.graph)
    inputs = {value.name or "" for value in prepared.graph.inputs}
    streams = Streams(prepared, facts, recipe, [*samples, *held_out], len(samples))
    # the codes of a matrix that others read meet inputs that nobody divides
    schemes = {item.name: scheme for item, scheme in tapped if not item.shared}
    free = _free(prepared, schemes, facts) if recipe.algorithm in _BALANCED else {}
    if recipe.max_size is not None:
        free = {tensor: group for tensor, group in free.items() if _takes_no_room(prepared, group)}
    algorithm = "search" if recipe.algorithm == AWQ else recipe.algorithm
    for number, part in enumerate(parts):
        within = nodes[part.first : part.last]
        place = {node: i for i, node in enumerate(within)}
        inside = sorted((c for c in tapped if c[0].node in place), key=lambda c: place[c[0].node])
        taps = {item.name: tap(item, prepared) for item, _ in inside}
        found |= _solve_part(streams, part, within, inside, algorithm, (taps, free), tick)
        names = [item.name for item, _ in deciding if item.node in place]
        needed = {name for later in parts[number + 1 :] for name in later.reads} | inputs
        streams.advance(part, {name: found[name][0] for name in names if name in found}, needed)
    for item, _ in chosen:
        assert item.weight is not None
        found[item.name] = found[last[item.weight.key]]
    scales = {t: dataclasses.replace(one, place=free[t].place) for t, one in streams.scales.items()}
    return found, scales


def _free(
    prepared: ir.Model, schemes: Mapping[str, Scheme], facts: Mapping[str, Fact]
) -> dict[str, LinearGroup]:  # fmt: skip
    """The groups of matrices whose input can be scaled at no cost, by the input."""
    return {
        group.tensor: group
        for group in linear_groups(prepared, facts, schemes)[0]
        if group.place is not None
        and len({schemes[name] for name in group.nodes}) == 1
        and schemes[group.nodes[0]].bits < _FINE
    }


def _takes_no_room(prepared: ir.Model, group: LinearGroup) -> bool:
    """Whether the constants that would be divided are read by nobody else, so that no copy of them is needed."""
    value = next(v for node in prepared.graph for v in node.outputs if v.name == group.tensor)
    path = [] if group.place is None else find_path(value, group.place)
    return bool(path) and all(read_once(t.node.inputs[t.index]) for t in takers(path[-1]))


def _solve_part(
    streams: Streams, part: Part, nodes: Iterable[ir.Node], chosen: Sequence[Chosen], algorithm: str,
    where: tuple[Mapping[str, str], Mapping[str, LinearGroup]], tick: Callable[[], object],
) -> Found:  # fmt: skip
    """The codes of a part's matrices; those that others of the part make the inputs of come first.

    `where`: what each reads, and which inputs can be scaled; scales that are taken are added to those of `streams`.
    """
    taps, free = where
    found: Found = {}
    depth = _levels(chosen, nodes)
    mine = {item.node for item, _ in chosen}
    pairs = {
        item.name: (taps[item.name], _behind(item, depth, mine, streams.facts))
        for item, _ in chosen
    }
    streams.begin(
        part, [name for pair in pairs.values() for name in pair if name and name not in part.reads]
    )
    for number in sorted({depth[node] for node in mine}):
        group = [pair for pair in chosen if depth[pair[0].node] == number]
        asked = list(dict.fromkeys(pairs[item.name] for item, _ in group))
        drifts = streams.drifts(part, asked, {name: made for name, (made, _) in found.items()})
        factors = {pair: Factors(drift[0].H) for pair, drift in drifts.items()}
        level = _Level(
            group,
            algorithm,
            taps,
            {name: factors[pair] for name, pair in pairs.items() if pair in factors},
            {name: drifts[pair] for name, pair in pairs.items() if pair in drifts},
        )
        # products of one thread each: what threads of products wait for each other is more than they gain
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(streams.workers) as pool:
            made, scales = level.solve(pool, free, tick)
        found |= made
        streams.scales |= scales
    return found


@dataclasses.dataclass(frozen=True)
class _Level:
    """Matrices of a part whose inputs are known, by name."""

    chosen: Sequence[Chosen]
    algorithm: str
    taps: Mapping[str, str]
    factors: Mapping[str, Factors]
    drifts: Mapping[str, tuple[Drift, Drift]]

    def solve(
        self, pool: ThreadPoolExecutor, free: Mapping[str, LinearGroup], tick: Callable[[], object]
    ) -> tuple[Found, dict[str, Smoothing]]:
        """Codes, and the scales of inputs that are better scaled and that `free` names."""
        names = {item.name for item, _ in self.chosen}
        read = dict.fromkeys(self.taps[item.name] for item, _ in self.chosen)
        tensors = [t for t in read if t in free and names.issuperset(free[t].nodes)]
        scales = dict(zip(tensors, pool.map(self._balanced, tensors), strict=True))

        def one(pair: Chosen) -> tuple[str, tuple[Blocked, Tally]]:
            item, scheme = pair
            return item.name, _solve(
                item, scheme, self.algorithm, self.factors[item.name], self.drifts[item.name],
                scales.get(self.taps[item.name]),
            )  # fmt: skip

        found: Found = {}
        for name, made in pool.map(one, self.chosen):
            found[name] = made
            tick()
        for tensor in tensors:
            tallies = [found[name][1] for name in free[tensor].nodes]
            if scales[tensor] is not None and any(one.error > one.rtn for one in tallies):
                scales[tensor] = None  # none may be worse than rounded to nearest
                found |= pool.map(one, self._readers(tensor))
        taken = {t: Smoothing(t, free[t].nodes, s) for t, s in scales.items() if s is not None}
        return found, taken

    def _readers(self, tensor: str) -> list[Chosen]:
        return [pair for pair in self.chosen if self.taps[pair[0].name] == tensor]

    def _balanced(self, tensor: str) -> Array | None:
        readers = self._readers(tensor)
        (first, scheme), weights = readers[0], [item.read() for item, _ in readers]
        factor, judge = self.factors[first.name].get(order=False), self.drifts[first.name][1].H
        return balance(
            weights, factor, judge, bits=scheme.bits, block=scheme.block, symmetric=scheme.symmetric
        )[0]


def _levels(chosen: Sequence[Chosen], nodes: Iterable[ir.Node]) -> dict[ir.Node, int]:
    """How many of the matrices stand before each node, one behind the other: those of one level read nothing of each other."""
    mine = {item.node for item, _ in chosen}
    level: dict[ir.Node, int] = {}
    for node in nodes:
        before = {v.producer() for v in read_values(node) if v is not None}
        level[node] = max((level[n] + (n in mine) for n in before if n in level), default=0)
    return level


def _behind(
    item: Linear, level: Mapping[ir.Node, int], mine: AbstractSet[ir.Node], facts: Mapping[str, Fact]
) -> str:  # fmt: skip
    """The value that the output of a matrix is added to, alone or with a bias, by name; empty if there is none.

    It is there before the matrix is solved, and has the shape of the output.
    """
    value = item.node.outputs[0]
    for _ in range(2):  # a bias may come first
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != "Add":
            return ""
        node, place = uses[0]
        if node.domain or node.graph is not item.node.graph:
            return ""
        other = node.inputs[1 - place]
        if other is None or value is other or not other.name:
            return ""
        if other.const_value is None:
            break
        value = node.outputs[0]
    else:
        return ""
    maker = other.producer()
    if maker is not None and maker in level and level[maker] + (maker in mine) > level[item.node]:
        return ""
    mine_is, its = facts.get(item.node.outputs[0].name or ""), facts.get(other.name)
    alike = mine_is is not None and its is not None and its.is_float and mine_is.shape == its.shape
    return other.name if alike else ""


def tap(item: Linear, model: ir.Model) -> str:
    """The input whose last axis the matrix reduces, by name; empty if there is none in the main graph."""
    node = item.node
    plain = item.kind == "matmul" and not item.left
    plain |= item.kind == "gemm" and not attribute(node, "transA", 0)
    x = node.inputs[item.x] if plain else None
    return x.name or "" if x is not None and node.graph is model.graph else ""


def _solve(
    item: Linear, scheme: Scheme, algorithm: str, H: Factors | None = None, drift: tuple[Drift, Drift] | None = None,
    scale: Array | None = None,
) -> tuple[Blocked, Tally]:  # fmt: skip
    return solve_blocks(
        item.read(), bits=scheme.bits, block=scheme.block, symmetric=scheme.symmetric, algorithm=algorithm, H=H,
        drift=drift, scale=scale,
    )  # fmt: skip


def tally(found: Iterable[tuple[Blocked, Tally]]) -> dict[str, int]:
    """How many matrices each algorithm won, most frequent first."""
    counts: dict[str, int] = {}
    for _, one in found:
        counts[one.algorithm] = counts.get(one.algorithm, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))
