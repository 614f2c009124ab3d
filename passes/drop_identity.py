"""Removes nodes that return their input.

Identity, inference-time Dropout, a Concat of one tensor, and products with 1 or sums with 0 of
one number.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from qcompile.graph.edit import array, can_replace, is_op, nodes, replace, with_number
from qcompile.step import Outcome, Pass

if TYPE_CHECKING:
    import onnx_ir as ir

_NEUTRAL = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0}


@dataclasses.dataclass(frozen=True)
class DropIdentity(Pass):
    """`x -> Identity -> y` -> `x` for the readers of y."""

    name: ClassVar[str] = "drop_identity"

    def apply(self, model: ir.Model) -> Outcome:
        """See the class.

        Skipped: what the graph returns as a copy of an input, an initializer, another output or, in
        a body, a value of the outer graph; Dropout that trains, or whose mask is read.
        """
        outcome = Outcome()
        for node in nodes(model):
            source = _returned(node)
            if source is None:
                continue
            reason = source if isinstance(source, str) else _drop(node, source)
            if reason is None:
                outcome.changed.append(node.name or "")
            else:
                outcome.skipped[node.name or ""] = reason
        return outcome


def _drop(node: ir.Node, source: ir.Value) -> str | None:
    """None if the node is gone and its readers read `source`, else the reason."""
    y = node.outputs[0]
    if source.graph is not node.graph and y.is_graph_output():
        return "a body returns a value of the outer graph"
    if not can_replace(y, source):
        return "the graph returns a copy of an input, an initializer or another output"
    replace(y, source)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return None


def _returned(node: ir.Node) -> ir.Value | str | None:
    """The input that the node returns; None if it does not, the reason if it might under training."""
    if is_op(node, "Identity"):
        return node.inputs[0]
    if is_op(node, "Dropout"):
        return _dropout(node)
    if is_op(node, "Concat"):
        return node.inputs[0] if len(node.inputs) == 1 else None
    if not is_op(node, *_NEUTRAL):
        return None
    found = with_number(node)
    if found is None or found[1] != _NEUTRAL[node.op_type]:
        return None
    x = found[0]
    return None if is_op(node, "Div", "Sub") and x is not node.inputs[0] else x


def _dropout(node: ir.Node) -> ir.Value | str | None:
    if any(mask.uses() or mask.is_graph_output() for mask in node.outputs[1:]):
        return "its mask is read"
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        flag = array(node.inputs[2])
        if flag is None or flag.any():
            return "training mode"
    return node.inputs[0]
