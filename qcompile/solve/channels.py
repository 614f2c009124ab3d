"""Tensors of feature maps that must share one scale per channel, with the layers that can absorb it.

Operators that work channel by channel and are positively homogeneous hand a scale on, and a sum ties its operands
together: what they link is a group. It is legal if every tensor in it is made by a layer that can be divided
(output channels of a Conv) and read by layers that can be multiplied (input channels of a Conv).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.algo.equalization import MARGIN, Array, Carrier, Reader, best_scale
from qcompile.calib.stats import TensorStats
from qcompile.graph.edit import array, attribute, is_op, read_once, scalar, sole_user
from qcompile.plan.candidates import clip_bounds
from qcompile.run.probe import Fact

_LINKS = (
    "Relu", "LeakyRelu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity",
)  # fmt: skip
_SUMS = ("Add", "Sub")


@dataclasses.dataclass(frozen=True)
class ChannelGroup:
    """Tensors (N, C, ...) that share scales.

    Attributes:
        name: the first tensor's.
        tensors: names, in graph order.
        producers: names of the Convs that make them.
        consumers: names of the Convs that read them.
        channels: C.
        limit: least upper bound that a Clip between them has; infinite without one.
    """

    name: str
    tensors: tuple[str, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    channels: int
    limit: float = math.inf


def channel_groups(
    model: ir.Model, facts: Mapping[str, Fact]
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The legal groups of the main graph, and why others are not, by the name of their first tensor."""
    parent: dict[ir.Value, ir.Value] = {}

    def root(value: ir.Value) -> ir.Value:
        while parent.setdefault(value, value) is not value:
            parent[value] = parent[parent[value]]
            value = parent[value]
        return value

    for node in model.graph:
        for a, b in _linked(node, facts):
            parent[root(b)] = root(a)
        if is_op(node, "Conv"):
            root(node.outputs[0])
            if node.inputs[0] is not None:
                root(node.inputs[0])
    members: dict[ir.Value, list[ir.Value]] = {}
    order = {v: i for i, v in enumerate(v for n in model.graph for v in n.outputs)}
    for value in sorted(parent, key=lambda v: order.get(v, -1)):
        members.setdefault(root(value), []).append(value)
    groups, refused = [], {}
    for values in members.values():
        group = _group(model, values, facts)
        if isinstance(group, str):
            refused[values[0].name or ""] = group
        else:
            groups.append(group)
    return groups, refused


def is_depthwise(node: ir.Node) -> bool:
    """Whether each output channel of a Conv reads one input channel, the one of its own number."""
    weight = array(node.inputs[1])
    group = attribute(node, "group", 1)
    return weight is not None and group > 1 and group == weight.shape[0] and weight.shape[1] == 1


def _linked(node: ir.Node, facts: Mapping[str, Fact]) -> list[tuple[ir.Value, ir.Value]]:
    """Pairs of values of which one is scaled if the other is."""
    made = node.outputs[0]
    ahead = [v for v in node.inputs if v is not None and array(v) is None]
    if is_op(node, *_LINKS) and len(ahead) == 1 and len(node.outputs) == 1:
        bounds = clip_bounds(node) if is_op(node, "Clip") else (0.0, math.inf)
        return [(ahead[0], made)] if bounds is not None and bounds[0] == 0.0 else []
    if is_op(node, *_SUMS) and len(ahead) == 2:
        shapes = {
            None if (f := facts.get(v.name or "")) is None else f.shape for v in (*ahead, made)
        }
        return [(v, made) for v in ahead] if len(shapes) == 1 and None not in shapes else []
    if is_op(node, "Mul") and len(ahead) == 1:
        number = next((scalar(v) for v in node.inputs if v is not ahead[0]), None)
        return [(ahead[0], made)] if number is not None and number > 0 else []
    return []


def _group(
    model: ir.Model, values: Sequence[ir.Value], facts: Mapping[str, Fact]
) -> ChannelGroup | str:
    inside = set(values)
    producers: list[str] = []
    consumers: list[str] = []
    limit = math.inf
    sizes = set()
    for value in values:
        fact = facts.get(value.name or "")
        if fact is None or fact.shape is None or len(fact.shape) < 3:
            return "the shape of a tensor is not known"
        sizes.add(fact.shape[1])
        if value.is_graph_output() or value.is_graph_input():
            return "it reaches an input or output of the model"
        node = value.producer()
        if node is None or node.graph is not model.graph:
            return "a tensor of it has no producer in the main graph"
        if is_op(node, "Conv") and array(node.inputs[1]) is not None and _bias_known(node):
            if not read_once(node.inputs[1]):  # it would be stored twice
                return "a Conv makes it whose weight others read"
            producers.append(node.name or "")
        elif not any(a in inside for a, b in _linked(node, facts) if b is value):
            return f"{node.op_type} makes a tensor of it"
        if is_op(node, "Clip"):
            limit = min(limit, (clip_bounds(node) or (0.0, math.inf))[1])
        for use in value.uses():
            reader = use.node
            if reader.graph is not model.graph:
                return "a body of If, Loop or Scan reads it"
            if is_op(reader, "Conv") and use.idx == 0 and array(reader.inputs[1]) is not None:
                if attribute(reader, "group", 1) > 1 and not is_depthwise(reader):
                    return "a grouped Conv reads it"
                if not read_once(reader.inputs[1]):
                    return "a Conv reads it whose weight others read"
                consumers.append(reader.name or "")
            elif not any(a is value and b in inside for a, b in _linked(reader, facts)):
                return f"{reader.op_type} reads it"
    if len(sizes) != 1 or not producers or not consumers:
        return "no Conv makes it, or none reads it"
    return ChannelGroup(
        values[0].name or "", tuple(v.name or "" for v in values), tuple(dict.fromkeys(producers)),
        tuple(dict.fromkeys(consumers)), sizes.pop(), limit,
    )  # fmt: skip


def _bias_known(node: ir.Node) -> bool:
    return len(node.inputs) < 3 or node.inputs[2] is None or array(node.inputs[2]) is not None


def channel_scales(
    model: ir.Model, groups: Sequence[ChannelGroup], stats: Mapping[str, TensorStats],
    margin: float = MARGIN,
) -> dict[str, Array]:  # fmt: skip
    """The scales worth having, float64 (C,) by the name of the group.

    Args:
        model: the prepared graph.
        groups: of it.
        stats: with channels, of the tensors that carry codes.
        margin: see `qcompile.algo.equalization.best_scale`.
    """
    values = {v.name: v for node in model.graph for v in node.outputs}
    found = {}
    for group in groups:
        carriers = [
            carrier
            for name in group.tensors
            if (carrier := _carrier(values[name], stats.get(name), group)) is not None
        ]
        if any(carrier.readers for carrier in carriers):
            scale = best_scale(carriers, group.limit, margin)
            if scale is not None:
                found[group.name] = scale
    return found


def _carrier(value: ir.Value, stats: TensorStats | None, group: ChannelGroup) -> Carrier | None:
    """The tensor as one that carries codes; None if a Relu or Clip behind it does, or it was not observed."""
    user = sole_user(value)
    hidden = user is not None and is_op(user, "Relu", "Clip")
    channels = None if stats is None else stats.channels
    if hidden or channels is None or channels.axis != 1 or channels.sums.size != group.channels:
        return None
    readers = tuple(
        _reader(use.node) for use in value.uses() if is_op(use.node, "Conv") and use.idx == 0
    )
    peak = channels.peak().astype(np.float64)
    return Carrier(peak, np.maximum(channels.second_moment(), 1e-12 * peak.max() ** 2), readers)


def _reader(node: ir.Node) -> Reader:
    weight = array(node.inputs[1])
    assert weight is not None
    wide = weight.astype(np.float64)
    axes = tuple(range(2, wide.ndim))
    if is_depthwise(node):
        return Reader(np.square(wide).sum(axis=(1, *axes)))
    return Reader(
        np.square(wide).sum(axis=(0, *axes)), np.abs(wide).max(axis=axes) if axes else np.abs(wide)
    )
