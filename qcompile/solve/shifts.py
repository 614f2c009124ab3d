"""Layers whose bias the layers behind them can take over a part of: high-bias absorption (Nagel et al. 2019, 4.1.3).

    W1 x + b1 -> Relu -> W2 . + b2   =   W1 x + (b1 - c) -> Relu -> W2 . + (b2 + W2 c),     if W1 x + b1 >= c

A reader that pads with zeros would see them where c is meant, so it must not pad.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qcompile.algo.equalization import Array, high_bias
from qcompile.calib.stats import TensorStats
from qcompile.graph.edit import array, attribute, is_op, sole_user
from qcompile.plan.candidates import clip_bounds
from qcompile.run.probe import Fact

_KEEP = ("GlobalAveragePool", "GlobalMaxPool", "MaxPool", "Flatten")


@dataclasses.dataclass(frozen=True)
class ShiftGroup:
    """A layer, the activation behind it, and the layers that read that.

    Attributes:
        name: of the tensor behind the activation.
        producer: name of the Conv or Gemm.
        readers: names of the Convs and Gemms.
        tensors: names of all tensors between, that are lower by c.
        channels: C.
        limit: upper bound of the activation; infinite for Relu.
    """

    name: str
    producer: str
    readers: tuple[str, ...]
    tensors: tuple[str, ...]
    channels: int
    limit: float


def shift_groups(
    model: ir.Model, facts: Mapping[str, Fact]
) -> tuple[list[ShiftGroup], dict[str, str]]:
    """The groups of the main graph, and why others are none, by the name of the tensor behind the activation."""
    groups, refused = [], {}
    for node in model.graph:
        after = sole_user(node.outputs[0]) if is_op(node, "Conv", "Gemm") else None
        if after is None or not is_op(after, "Relu", "Clip") or after.graph is not node.graph:
            continue
        found = _group(model, node, after, facts)
        if isinstance(found, str):
            refused[after.outputs[0].name or ""] = found
        else:
            groups.append(found)
    return groups, refused


def channel_shifts(groups: list[ShiftGroup], stats: Mapping[str, TensorStats]) -> dict[str, Array]:
    """The c that are worth having, float64 (C,), by the name of the group.

    Args:
        groups: of the prepared graph.
        stats: with channels, of the tensors that groups are named after.
    """
    found = {}
    for group in groups:
        own = stats.get(group.name)
        channels = None if own is None else own.channels
        if channels is None or channels.lows.shape != (group.channels,):
            continue
        shift = high_bias(channels.lows, channels.highs, group.limit)
        if shift is not None:
            found[group.name] = shift
    return found


def response(node: ir.Node, shift: Array) -> Array:
    """W2 c: what a reader makes of an input that is c everywhere, float64 (outputs,)."""
    weight = array(node.inputs[1])
    assert weight is not None
    wide = weight.astype(np.float64)
    if is_op(node, "Gemm"):
        made: Array = attribute(node, "alpha", 1.0) * (
            wide @ shift if attribute(node, "transB", 0) else shift @ wide
        )
        return made
    taps = wide.reshape(*wide.shape[:2], -1).sum(axis=2)  # (out, in / group)
    parts = shift.reshape(attribute(node, "group", 1), -1)  # (group, in / group)
    each = np.repeat(parts, len(taps) // len(parts), axis=0)
    return np.asarray((taps * each).sum(axis=1))


def _group(
    model: ir.Model, node: ir.Node, after: ir.Node, facts: Mapping[str, Fact]
) -> ShiftGroup | str:
    bounds = clip_bounds(after)
    if bounds is None or bounds[0] != 0.0:
        return "its activation is not bounded by 0"
    why = _layer(node)
    if why:
        return why
    width = _width(node)
    value = after.outputs[0]
    tensors, readers, waiting = [node.outputs[0]], [], [value]
    while waiting:
        value = waiting.pop()
        tensors.append(value)
        if value.is_graph_output():
            return "it is an output of the model"
        if not value.uses():
            return "nothing reads it"
        for use in value.uses():
            reader = use.node
            if reader.graph is not model.graph:
                return "a body of If, Loop or Scan reads it"
            if is_op(reader, *_KEEP) and len(reader.outputs) == 1:
                if is_op(reader, "Flatten") and not _single(value, reader, width, facts):
                    return "it is flattened, several places to a channel"
                waiting.append(reader.outputs[0])
                continue
            why = _reader(reader, use.idx)
            if why:
                return why
            readers.append(reader.name or "")
    names = tuple(v.name or "" for v in tensors)
    return ShiftGroup(
        after.outputs[0].name or "", node.name or "", tuple(dict.fromkeys(readers)), names, width, bounds[1]
    )  # fmt: skip


def _width(node: ir.Node) -> int:
    """Output channels of a layer."""
    weight = array(node.inputs[1])
    assert weight is not None
    return int(weight.shape[1 if is_op(node, "Gemm") and not attribute(node, "transB", 0) else 0])


def _layer(node: ir.Node) -> str:
    """Why a Conv or Gemm has no weight or bias that can be worked with."""
    if array(node.inputs[1]) is None:
        return f"the weight of {node.op_type} {node.name} is not constant"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return ""
    values = array(bias)
    if values is None:
        return f"the bias of {node.op_type} {node.name} is not constant"
    if values.size != _width(node) or values.shape[-1:] != (values.size,):
        return f"the bias of {node.op_type} {node.name} is no number a channel"
    if attribute(node, "beta", 1.0) != 1.0:
        return f"the bias of {node.op_type} {node.name} has a factor"
    return ""


def _reader(node: ir.Node, index: int) -> str:
    """Why a node that reads the tensor cannot make up for c."""
    if not is_op(node, "Conv", "Gemm") or index != 0:
        return f"{node.op_type} {node.name} reads it"
    if is_op(node, "Gemm") and attribute(node, "transA", 0):
        return f"Gemm {node.name} transposes it"
    if any(attribute(node, "pads", ())) or attribute(node, "auto_pad", "NOTSET") in (
        "SAME_UPPER",
        "SAME_LOWER",
    ):
        return f"Conv {node.name} pads it with zeros"
    return _layer(node)


def _single(value: ir.Value, node: ir.Node, width: int, facts: Mapping[str, Fact]) -> bool:
    """Whether a Flatten only drops axes of size 1."""
    fact = facts.get(value.name or "")
    shape = None if fact is None else fact.shape
    return shape is not None and math.prod(shape[1:]) == width and attribute(node, "axis", 1) == 1
