"""A graph cut into parts that run one after the other, where few bytes pass from one to the next.

A transformer is cut twice a layer, where only the residual stream passes. What passes is kept for a few samples, so
that each part runs alone, on what the parts before it make once they are quantized (Frantar et al. 2022, section 4).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qcompile.run.probe import Fact

_WIDE = 1.5  # times the bytes that pass at the usual place: beyond, two parts stay one


@dataclasses.dataclass(frozen=True)
class Part:
    """Some consecutive nodes of the main graph.

    Attributes:
        first, last: places of the nodes, the last one excluded.
        reads: values made before, by name.
        makes: values that later nodes read.
    """

    first: int
    last: int
    reads: tuple[str, ...]
    makes: tuple[str, ...]


def cut(
    model: ir.Model, linears: Sequence[ir.Node], facts: Mapping[str, Fact], *, whole: bool = False
) -> list[Part]:
    """The parts from the first node up to the last of `linears`, each with some of them.

    Args:
        model: its main graph is sorted.
        linears: nodes of the main graph that are to be quantized.
        facts: sizes of values.
        whole: the last part goes on to the end of the graph.
    """
    nodes = list(model.graph)
    place = {id(node): i for i, node in enumerate(nodes)}
    marks = sorted(place[id(node)] for node in linears if id(node) in place)
    if not marks:
        return []
    made, used = _lives(nodes)
    passing = _passing(made, used, facts, marks[-1] + 1)
    best = [
        min(range(a + 1, b + 1), key=lambda i: (passing[i], -i))
        for a, b in itertools.pairwise(marks)
    ]
    usual = sorted(passing[i] for i in best)[len(best) // 4] if best else 0
    end_of_all = len(nodes) if whole else marks[-1] + 1
    ends = sorted({i for i in best if passing[i] <= _WIDE * usual} | {end_of_all})
    parts, first = [], 0
    for end in ends:
        read = {v.name for node in nodes[first:end] for v in read_values(node) if v is not None}
        reads = tuple(n for n, at in made.items() if at < first and n in read)
        later = end < ends[-1]  # behind the last part nobody asks
        makes = tuple(n for n, at in made.items() if later and first <= at < end <= used.get(n, -1))
        parts.append(Part(first, end, reads, makes))
        first = end
    return parts


def part_model(
    model: ir.Model, part: Part, outputs: Sequence[str], facts: Mapping[str, Fact]
) -> ir.Model:
    """A model of the part alone, that reads what passes as inputs and makes `outputs`; weights are shared."""
    starts = dict.fromkeys((*part.reads, *(value.name or "" for value in model.graph.inputs)))
    graph = ir.convenience.extract(model.graph, list(starts), list(outputs))
    for value in [v for v in graph.inputs if not (v.uses() or v.is_graph_output())]:
        graph.inputs.remove(value)
    reads = set(part.reads)
    for value in graph.inputs:
        if value.name not in reads:
            continue
        known = facts.get(value.name, Fact(None, None))
        dtype = ir.DataType.FLOAT if known.dtype is None else ir.DataType.from_numpy(known.dtype)
        value.type = ir.TensorType(dtype)
        # samples differ in length
        value.shape = None if known.shape is None else ir.Shape([None] * len(known.shape))
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)


def read_values(node: ir.Node) -> list[ir.Value | None]:
    """What a node reads, and what its bodies read."""
    found = list(node.inputs)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found += [v for inner in attribute.as_graph().all_nodes() for v in inner.inputs]
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += [
                v for g in attribute.as_graphs() for inner in g.all_nodes() for v in inner.inputs
            ]
    return found


def _lives(nodes: Sequence[ir.Node]) -> tuple[dict[str, int], dict[str, int]]:
    """Where each value is made, and where it is read last."""
    made: dict[str, int] = {}
    used: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for value in read_values(node):
            if value is not None and value.name in made:
                used[value.name] = i
        made |= {v.name: i for v in node.outputs if v.name}
    return made, used


def _passing(
    made: Mapping[str, int], used: Mapping[str, int], facts: Mapping[str, Fact], end: int
) -> list[int]:
    """Elements that pass each place between nodes, up to `end`."""
    change = [0] * (end + 2)
    for name, at in made.items():
        size = facts[name].elements if name in facts else 1
        last = min(used.get(name, at), end)
        if at < end and last > at:
            change[at + 1] += size
            change[last + 1] -= size
    return list(itertools.accumulate(change))[: end + 1]
