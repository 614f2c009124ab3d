"""Folds scales of channels into the convolutions before and after a feature map.

    Conv(W1, b1) -> Relu -> Conv(W2)   ->   Conv(W1 / s, b1 / s) -> Relu -> Conv(s W2)

A Clip(0, b) between them is exact where s <= 1 and no value of a channel exceeds s b: beyond, channels saturate
there, as codes would.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import Names, add_initializer, array
from qcompile.run.probe import Fact
from qcompile.solve.channels import ChannelGroup, channel_groups, is_depthwise
from qcompile.step import Need, Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qcompile.algo.equalization import Array

_MARK = "qcompile.scaled"


@dataclasses.dataclass(frozen=True)
class ScaleChannels(Pass):
    """The groups in `scales`, by name; `facts` give the shapes that tell which tensors belong together."""

    name: ClassVar[str] = "scale_channels"
    facts: Mapping[str, Fact]
    scales: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def needs(self, model: ir.Model) -> Sequence[Need]:
        """Ranges and moments by channel of all tensors of all groups."""
        groups, _ = channel_groups(model, self.facts)
        return [Need(name, channels=True) for group in groups for name in group.tensors]

    def apply(self, model: ir.Model) -> Outcome:
        """See the class.

        Skipped: groups that are not in the graph or not legal, scales of another size or not positive.
        """
        outcome, names = Outcome(), Names(model)
        found, refused = channel_groups(model, self.facts)
        groups = {group.name: group for group in found}
        by_name = {node.name or "": node for node in model.graph}
        for name, scale in self.scales.items():
            group = groups.get(name)
            if group is None:
                outcome.skipped[name] = refused.get(name, "there is no such group")
                continue
            makers = [by_name[producer] for producer in group.producers]
            if all(node.metadata_props.get(f"{_MARK}.out") for node in makers):
                continue
            why = _unfit(group, scale)
            if why:
                outcome.skipped[name] = why
                continue
            for node in makers:
                _rows(model.graph, names, node, 1 / scale)
                node.metadata_props[f"{_MARK}.out"] = "1"
            for consumer in group.consumers:
                node = by_name[consumer]
                axis = 0 if is_depthwise(node) else 1
                _weight(model.graph, names, node, scale, axis)
            outcome.changed += [*group.producers, *group.consumers]
            outcome.rescaled |= set(group.tensors)
        return outcome


def _unfit(group: ChannelGroup, scale: Array) -> str:
    if scale.shape != (group.channels,):
        return f"it has {group.channels} channels, the scale {scale.size}"
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        return "its scale is not positive"
    if np.isfinite(group.limit) and scale.max() > 1 + 1e-9:
        return "a Clip would saturate earlier"
    return ""


def _rows(graph: ir.Graph, names: Names, node: ir.Node, factor: Array) -> None:
    _weight(graph, names, node, factor, 0)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        _set(graph, names, node, 2, factor)


def _weight(graph: ir.Graph, names: Names, node: ir.Node, factor: Array, axis: int) -> None:
    weight = array(node.inputs[1])
    assert weight is not None
    shape = [1] * weight.ndim
    shape[axis] = -1
    _set(graph, names, node, 1, factor.reshape(shape))


def _set(graph: ir.Graph, names: Names, node: ir.Node, index: int, factor: Array) -> None:
    """As a new initializer: other nodes, and other models, may read the old one."""
    old = node.inputs[index]
    values = array(old)
    assert old is not None
    assert values is not None
    made = (values.astype(np.float64) * factor).astype(values.dtype)
    node.replace_input_with(index, add_initializer(graph, names, old.name or "weight", made))
