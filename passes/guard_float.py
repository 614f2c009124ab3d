"""Keeps float what the plan keeps float.

ORT's optimizer moves a QuantizeLinear in front of a MaxPool, where the 8-bit kernel is 50 times slower than
the float one, and makes QLinearAveragePool or QLinearSoftmax of any AveragePool or Softmax between
DequantizeLinear and QuantizeLinear, both several times slower as well. A Max of one tensor, which ORT
neither removes nor looks through, stands in the way; it costs one pass over the tensor. Reshape, Transpose
and their like do not stand in the way: ORT moves the QuantizeLinear in front of them first.

    MaxPool -> QuantizeLinear                =>   MaxPool -> Max -> QuantizeLinear
    MaxPool -> Reshape -> QuantizeLinear     =>   MaxPool -> Reshape -> Max -> QuantizeLinear
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qcompile.graph.edit import Names, add_node, is_op
from qcompile.plan.plan import Form, Plan
from qcompile.step import Outcome, Pass

_SLOW = ("MaxPool", "AveragePool", "Softmax", "LogSoftmax")
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice")


@dataclasses.dataclass(frozen=True)
class GuardFloat(Pass):
    """See the module."""

    name: ClassVar[str] = "guard_float"
    plan: Plan | None = None  # what it makes integer needs no guard

    def apply(self, model: ir.Model) -> Outcome:
        """A Max of one tensor before each QuantizeLinear that reads one of those operators, or a move of it."""
        outcome, names = Outcome(), Names(model)
        for node in list(model.graph):
            source = node.inputs[0] if is_op(node, "QuantizeLinear") else None
            maker = None if source is None else _moved(source).producer()
            if source is None or maker is None or not is_op(maker, *_SLOW):
                continue
            entry = None if self.plan is None else self.plan.get(maker.name)
            if entry is not None and entry.form is Form.STATIC:
                continue
            guard = add_node(
                names, "Max", [source], before=node, name=f"{node.name}_guard", output=f"{source.name}_guarded",
            )  # fmt: skip
            guard.outputs[0].type, guard.outputs[0].shape = source.type, source.shape
            node.replace_input_with(0, guard.outputs[0])
            outcome.changed.append(node.name or "")
        return outcome


def _moved(value: ir.Value) -> ir.Value:
    """The value whose numbers these are, before they were moved about."""
    node = value.producer()
    while is_op(node, *_MOVES):
        assert node is not None
        source = node.inputs[0]
        assert source is not None
        value, node = source, source.producer()
    return value
