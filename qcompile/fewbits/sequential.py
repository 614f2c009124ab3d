"""Matrices solved part after part: each sees the inputs that the quantized parts before it make.

For each part of the graph (`qcompile.fewbits.cut`) the inputs of its matrices are gathered twice: as the float model makes
them, and as the parts before make them with their codes (`qcompile.fewbits.streams`). Codes are chosen for the second ones,
and to give what the float matrices give for the first ones (`qcompile.algo.drift`). The part then runs with its codes, and
what passes to the next part is that. Inputs of float layers alone would let the errors of all layers add up unseen; inputs
of quantized layers alone, as in Frantar et al. 2022, see them but do not undo them. Memory is that of one part, of what
passes for all samples, and of the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor

import onnx_ir as ir
from threadpoolctl import threadpool_limits

from qcompile.algo.blocks import Blocked
from qcompile.algo.choose import Factors, Tally, solve_blocks
from qcompile.algo.drift import Drift
from qcompile.fewbits.assign import Scheme
from qcompile.fewbits.cut import Part, cut, read_values
from qcompile.fewbits.scales import AWQ
from qcompile.fewbits.streams import Streams
from qcompile.graph.edit import attribute
from qcompile.graph.linear import Linear
from qcompile.recipe import Recipe
from qcompile.run.probe import Fact
from qcompile.run.session import Feed

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


_DATALESS = ("auto", "all", "rtn", "search", "kquant", "hqq")


def solve_in_order(
    prepared: ir.Model, chosen: Sequence[Chosen], samples: Sequence[Feed], held_out: Sequence[Feed],
    facts: Mapping[str, Fact], recipe: Recipe, tick: Callable[[], object] = lambda: None,
) -> Found:  # fmt: skip
    """Codes by what the matrices compute, by node name.

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
    algorithm = "search" if recipe.algorithm == AWQ else recipe.algorithm
    for number, part in enumerate(parts):
        within = nodes[part.first : part.last]
        place = {node: i for i, node in enumerate(within)}
        inside = sorted((c for c in tapped if c[0].node in place), key=lambda c: place[c[0].node])
        taps = {item.name: tap(item, prepared) for item, _ in inside}
        found |= _solve_part(streams, part, within, inside, algorithm, taps, tick)
        names = [item.name for item, _ in deciding if item.node in place]
        needed = {name for later in parts[number + 1 :] for name in later.reads} | inputs
        streams.advance(part, {name: found[name][0] for name in names if name in found}, needed)
    for item, _ in chosen:
        assert item.weight is not None
        found[item.name] = found[last[item.weight.key]]
    return found


def _solve_part(
    streams: Streams, part: Part, nodes: Iterable[ir.Node], chosen: Sequence[Chosen], algorithm: str,
    taps: Mapping[str, str], tick: Callable[[], object],
) -> Found:  # fmt: skip
    """The codes of a part's matrices; those that others of the part make the inputs of come first."""
    found: Found = {}
    level = _levels(chosen, nodes)
    mine = {item.node for item, _ in chosen}
    pairs = {
        item.name: (taps[item.name], _behind(item, level, mine, streams.facts))
        for item, _ in chosen
    }
    streams.begin(
        part, [name for pair in pairs.values() for name in pair if name and name not in part.reads]
    )
    for number in sorted({level[node] for node in mine}):
        group = [pair for pair in chosen if level[pair[0].node] == number]
        asked = list(dict.fromkeys(pairs[item.name] for item, _ in group))
        drifts = streams.drifts(part, asked, {name: made for name, (made, _) in found.items()})
        factors = {pair: Factors(drift[0].H) for pair, drift in drifts.items()}

        def one(pair: Chosen) -> tuple[str, tuple[Blocked, Tally]]:
            item, scheme = pair
            read = pairs[item.name]
            made = _solve(item, scheme, algorithm, factors[read], drifts[read])  # noqa: B023 - the pool ends before
            tick()
            return item.name, made

        # products of one thread each: what threads of products wait for each other is more than they gain
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(streams.workers) as pool:
            found |= dict(pool.map(one, group))
    return found


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
    item: Linear, scheme: Scheme, algorithm: str, H: Factors | None = None, drift: tuple[Drift, Drift] | None = None
) -> tuple[Blocked, Tally]:  # fmt: skip
    return solve_blocks(
        item.read(), bits=scheme.bits, block=scheme.block, symmetric=scheme.symmetric, algorithm=algorithm, H=H,
        drift=drift,
    )  # fmt: skip


def tally(found: Iterable[tuple[Blocked, Tally]]) -> dict[str, int]:
    """How many matrices each algorithm won, most frequent first."""
    counts: dict[str, int] = {}
    for _, one in found:
        counts[one.algorithm] = counts.get(one.algorithm, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))
