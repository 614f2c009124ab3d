"""Shapes that are known become constants, and each other one is computed once.

    Reshape(x, Concat(Shape(x)[0], Shape(x)[1], 12, 32))  ->  Reshape(x, [0, 0, 12, 32])

A 0 takes over the size of x at its place. What reads a shape that is computed twice, by whatever operators, reads the first one.
Exporters take shapes apart in every layer, and a decoder computes them for every token.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.graph.dims import dims
from qcompile.graph.edit import Names, add_initializer, array, attribute, graphs, is_op, replace
from qcompile.graph.symbols import Known, Numbers
from qcompile.step import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class FoldShapes(Pass):
    """See the module."""

    name: ClassVar[str] = "fold_shapes"

    def apply(self, model: ir.Model) -> Outcome:
        """Skipped: Reshapes to a shape that is computed, and not known."""
        outcome, names, known = Outcome(), Names(model), dims(model)
        for graph in graphs(model):
            _fold(graph, known, _Constants(graph, names), outcome)
        return outcome


def _fold(graph: ir.Graph, known: Known, constants: _Constants, outcome: Outcome) -> None:
    first: dict[Numbers, ir.Value] = {}
    for node in list(graph):
        value = node.outputs[0] if node.outputs else None
        numbers = known.contents(value)
        if value is not None and numbers is not None and _read(value, numbers):
            numeric = all(isinstance(size, int) for size in numbers.sizes)
            other = constants.get(numbers) if numeric else first.setdefault(numbers, value)
            if other is not value:
                replace(value, other)
                outcome.changed.append(node.name or "")
        if is_op(node, "Reshape") and len(node.inputs) == 2 and array(node.inputs[1]) is None:
            target = _target(known, node)
            if target is None:
                outcome.skipped[node.name or ""] = "its shape is not known before it runs"
            else:
                node.replace_input_with(1, constants.get(target))
                outcome.changed.append(node.name or "")


def _read(value: ir.Value, numbers: Numbers) -> bool:
    """Whether a value may give way to another one, and somebody would notice."""
    return bool(value.uses()) and not value.is_graph_output() and numbers.kind != ir.DataType.BOOL


def _target(known: Known, node: ir.Node) -> Numbers | None:
    """The shape of a Reshape as a constant, None if there is no such."""
    target, sizes = known.contents(node.inputs[1]), known.shape(node.inputs[0])
    if target is None or attribute(node, "allowzero", 0):
        return None
    made = []
    for place, size in enumerate(target.sizes):
        if isinstance(size, int):
            made.append(size)
        elif sizes is not None and place < len(sizes) and sizes[place] is size:
            made.append(0)
        else:
            return None
    return dataclasses.replace(target, sizes=tuple(made))


class _Constants:
    """Initializers of a graph, one for the same numbers."""

    def __init__(self, graph: ir.Graph, names: Names) -> None:
        self._graph, self._names = graph, names
        self._made: dict[Numbers, ir.Value] = {}

    def get(self, numbers: Numbers) -> ir.Value:
        if numbers not in self._made:
            values = np.array(numbers.sizes, numbers.kind.numpy())
            label = "x".join(map(str, numbers.sizes)) or "none"
            self._made[numbers] = add_initializer(
                self._graph, self._names, f"sizes_{label}", values.reshape(()) if numbers.scalar else values
            )  # fmt: skip
        return self._made[numbers]
