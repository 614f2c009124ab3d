"""Merges a residual around a gate into the gate.

    x * g + x  ->  x * (g + 1)        g has one value a channel, x one a pixel

Squeeze-and-excitation blocks with a shortcut are exported this way; the sum over the whole
activation becomes a sum over its channels.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import (
    Names,
    add_initializer,
    add_node,
    dtype,
    is_op,
    nodes,
    replace,
    sole_user,
)  # fmt: skip
from qcompile.step import Outcome, Pass

_STEPS = 8  # operators between the pooling and the gate


@dataclasses.dataclass(frozen=True)
class FoldGate(Pass):
    """`Add(x, Mul(x, g))` -> `Mul(x, Add(g, 1))`, where g comes from a global pooling."""

    name: ClassVar[str] = "fold_gate"

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Skipped: gates and products that are read elsewhere, or not known small."""
        outcome, names = Outcome(), Names(model)
        for node in nodes(model):
            if not is_op(node, "Add"):
                continue
            a, b = node.inputs
            for x, product in ((a, b), (b, a)):
                mul = product.producer() if product is not None else None
                if x is None or mul is None or not is_op(mul, "Mul") or x not in mul.inputs:
                    continue
                reason = _fold(names, node, mul, x)
                if reason is None:
                    outcome.changed.append(node.name or "")
                    break
                outcome.skipped[node.name or ""] = reason
        return outcome


def _fold(names: Names, add: ir.Node, mul: ir.Node, x: ir.Value) -> str | None:
    """None if `add` was merged into the gate of `mul`, else the reason."""
    index = 1 if mul.inputs[0] is x else 0
    gate, product, graph = mul.inputs[index], mul.outputs[0], add.graph
    if gate is None or not _pooled(gate):
        return "its gate is not known to be smaller than the activation"
    if not isinstance(graph, ir.Graph) or mul.graph is not graph or sole_user(product) is not add:
        return "the product is read elsewhere"
    if gate.graph is not graph or sole_user(gate) is not mul:
        return "the gate is read elsewhere"
    kind = dtype(x) or dtype(gate)
    if kind is None:
        return "its type is unknown"
    one = add_initializer(graph, names, f"{gate.name}_one", np.ones((), kind.numpy()))
    plus = add_node(
        names, "Add", [gate, one], before=mul, name=f"{mul.name}_plus_one",
        output=f"{gate.name}_plus_one",
    )  # fmt: skip
    plus.outputs[0].type, plus.outputs[0].shape = gate.type, gate.shape
    mul.replace_input_with(index, plus.outputs[0])
    replace(add.outputs[0], product)
    graph.remove(add, safe=True)
    return None


def _pooled(gate: ir.Value) -> bool:
    """Whether the value is made from a global pooling by operators that keep it 1x1."""
    value: ir.Value | None = gate
    for _ in range(_STEPS):
        node = value.producer() if value is not None else None
        if is_op(node, "GlobalAveragePool", "GlobalMaxPool"):
            return True
        if not is_op(node, "Conv", "Relu", "HardSigmoid", "Sigmoid", "Clip", "Add", "HardSwish"):
            return False
        assert node is not None
        value = node.inputs[0]
    return False
