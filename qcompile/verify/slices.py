"""Which parts of an output mean different things.

A detector returns boxes, scores and classes in one tensor. An error that is small for the whole can be
total for one of them, so each input of a Concat behind an output is measured on its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qcompile.graph.edit import attribute, is_op
from qcompile.run.probe import Fact
from qcompile.verify.metrics import Part

_MAX_PARTS = 64


def parts_of(output: ir.Value, facts: Mapping[str, Fact]) -> list[Part]:
    """The whole output, then its slices along the Concat axis that made it, if one did."""
    parts = [Part("all")]
    axis_map: list[int] | None = None
    node = output.producer()
    while is_op(node, "Identity", "Transpose", "Cast", "Sigmoid", "Mul", "Add"):
        assert node is not None
        if is_op(node, "Transpose"):
            perm = attribute(node, "perm", None)
            if perm is None:
                return parts
            perm = list(perm)
            axis_map = perm if axis_map is None else [perm[a] for a in axis_map]
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    if node is None or not is_op(node, "Concat") or len(node.inputs) < 2:
        return parts
    axis = attribute(node, "axis", 0)
    start = 0
    for value in node.inputs:
        fact = facts.get(value.name or "") if value is not None else None
        if value is None or fact is None or fact.shape is None:
            return [parts[0]]
        at = axis + len(fact.shape) if axis < 0 else axis
        if at >= len(fact.shape):
            return [parts[0]]
        size = fact.shape[at]
        place = at if axis_map is None else axis_map.index(at)
        parts.append(Part(f"[{start}:{start + size}] {value.name}", place, start, start + size))
        start += size
    return parts if len(parts) <= _MAX_PARTS else [parts[0]]
