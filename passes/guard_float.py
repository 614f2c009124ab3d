"""Keeps float what the plan keeps float.

ORT's optimizer moves a QuantizeLinear in front of a MaxPool, where the 8-bit kernel is 50 times slower than
the float one, and makes QLinearAveragePool or QLinearSoftmax of any AveragePool or Softmax between
DequantizeLinear and QuantizeLinear, both several times slower as well. A Max of one tensor, which ORT
neither removes nor looks through, stands in the way; it costs one pass over the tensor.

    MaxPool -> QuantizeLinear   =>   MaxPool -> Max -> QuantizeLinear
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qcompile.graph.edit import Names, add_node, is_op
from qcompile.step import Outcome, Pass

_SLOW = ("MaxPool", "AveragePool", "Softmax", "LogSoftmax")


@dataclasses.dataclass(frozen=True)
class GuardFloat(Pass):
    """See the module."""

    name: ClassVar[str] = "guard_float"

    def apply(self, model: ir.Model) -> Outcome:
        """A Max of one tensor before each QuantizeLinear that directly reads one of those operators."""
        outcome, names = Outcome(), Names(model)
        for node in list(model.graph):
            source = node.inputs[0] if node.inputs else None
            if (
                not is_op(node, "QuantizeLinear")
                or source is None
                or not is_op(source.producer(), *_SLOW)
            ):
                continue
            guard = add_node(
                names,
                "Max",
                [source],
                before=node,
                name=f"{node.name}_guard",
                output=f"{source.name}_guarded",
            )
            guard.outputs[0].type, guard.outputs[0].shape = source.type, source.shape
            node.replace_input_with(0, guard.outputs[0])
            outcome.changed.append(node.name or "")
        return outcome
