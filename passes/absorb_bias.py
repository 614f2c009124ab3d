"""Moves a part of biases through an activation into the biases of the layers behind it.

    Conv(W1, b1) -> Relu -> Conv(W2, b2)   ->   Conv(W1, b1 - c) -> Relu -> Conv(W2, b2 + W2 c)

Exact where no channel falls below its c before the Relu: see `qcompile.solve.shifts`. The tensor between has a narrower
range then.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from qcompile.graph.edit import Names, add_initializer, array
from qcompile.run.probe import Fact
from qcompile.solve.shifts import response, shift_groups
from qcompile.step import Need, Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from qcompile.algo.equalization import Array

_MARK = "qcompile.absorbed"


@dataclasses.dataclass(frozen=True)
class AbsorbBias(Pass):
    """The groups in `shifts`, by name; `facts` give shapes."""

    name: ClassVar[str] = "absorb_bias"
    facts: Mapping[str, Fact]
    shifts: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def needs(self, model: ir.Model) -> Sequence[Need]:
        """Ranges by channel behind the activations of all groups."""
        groups, _ = shift_groups(model, self.facts)
        return [Need(group.name, channels=True) for group in groups]

    def apply(self, model: ir.Model) -> Outcome:
        """See the class.

        Skipped: groups that are not in the graph or not legal, shifts of another size or below 0.
        """
        outcome, names = Outcome(), Names(model)
        found, refused = shift_groups(model, self.facts)
        groups = {group.name: group for group in found}
        by_name = {node.name or "": node for node in model.graph}
        for name, shift in self.shifts.items():
            group = groups.get(name)
            if group is None:
                outcome.skipped[name] = refused.get(name, "there is no such group")
                continue
            producer = by_name[group.producer]
            if _MARK in producer.metadata_props:
                continue
            if shift.shape != (group.channels,):
                outcome.skipped[name] = f"it has {group.channels} channels, the shift {shift.size}"
                continue
            if not (np.isfinite(shift).all() and (shift >= 0).all()):
                outcome.skipped[name] = "its shift is below 0"
                continue
            producer.metadata_props[_MARK] = "1"
            _add(model.graph, names, producer, -shift.astype(np.float64))
            for reader in group.readers:
                node = by_name[reader]
                _add(model.graph, names, node, response(node, shift.astype(np.float64)))
            outcome.changed += [group.producer, *group.readers]
            outcome.rescaled |= set(group.tensors)
        return outcome


def _add(graph: ir.Graph, names: Names, node: ir.Node, amount: Array) -> None:
    """To the bias, as a new initializer: other nodes, and other models, may read the old one."""
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    old = node.inputs[2]
    values = array(old)
    weight = node.inputs[1]
    assert weight is not None
    kind = np.float32 if values is None else values.dtype
    before = np.zeros(amount.size) if values is None else values.astype(np.float64)
    wish = f"{weight.name}_bias" if old is None else old.name or "bias"
    made = (before + amount).astype(kind)
    node.replace_input_with(2, add_initializer(graph, names, wish, made))
