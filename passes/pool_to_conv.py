"""Writes average pooling as a depthwise convolution with equal weights, and zero padding as part of it.

    AveragePool(k x k)            ->  Conv(weights 1 / k^2, one group a channel)
    Pad(zeros) -> Conv            ->  Conv(pads)

The integer kernel of AveragePool is up to 20 times slower than the float one, and ORT takes it wherever an
AveragePool stands between DequantizeLinear and QuantizeLinear. The depthwise integer convolution is fast.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import (
    Names,
    add_initializer,
    add_node,
    array,
    attribute,
    dtype,
    is_op,
    nodes,
    replace,
    scalar,
    sole_user,
)  # fmt: skip
from qcompile.step import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class PoolToConv(Pass):
    """`AveragePool` -> depthwise `Conv`; `Pad -> Conv` -> `Conv`."""

    name: ClassVar[str] = "pool_to_conv"

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Skipped: borders that count fewer values, unknown channels, other paddings."""
        outcome, names = Outcome(), Names(model)
        for node in nodes(model):
            if not is_op(node, "AveragePool") or node.graph is None:
                continue
            reason = _refusal(node)
            if reason:
                outcome.skipped[node.name or ""] = reason
                continue
            _convert(names, node)
            outcome.changed.append(node.name or "")
        for node in nodes(model):
            if is_op(node, "Pad") and node.graph is not None and _fold_pad(node):
                outcome.changed.append(node.name or "")
        return outcome


def _refusal(node: ir.Node) -> str | None:
    x = node.inputs[0]
    if attribute(node, "auto_pad", "NOTSET") != "NOTSET" or attribute(node, "ceil_mode", 0):
        return "auto_pad or ceil_mode"
    if any(attribute(node, "pads", [])) and not attribute(node, "count_include_pad", 0):
        return "its borders average fewer values"
    if x is None or dtype(x) != ir.DataType.FLOAT:
        return "its type is not known to be float32"
    if _channels(x) is None:
        return "its channels are not known"
    if len(attribute(node, "kernel_shape", [])) != 2:
        return "not 2-D"
    return None


def _channels(value: ir.Value, depth: int = 12) -> int | None:
    """The size of axis 1: declared, or the output channels of the Conv that made the value."""
    if value.shape is not None and len(value.shape) == 4 and isinstance(value.shape[1], int):
        return value.shape[1]
    node = value.producer()
    if node is None or depth == 0:
        return None
    if is_op(node, "Conv"):
        weight = array(node.inputs[1])
        return None if weight is None else int(weight.shape[0])
    if is_op(node, "Mul", "Add"):  # operands may broadcast: the larger count is that of the result
        counts = [
            _channels(v, depth - 1) for v in node.inputs if v is not None and scalar(v) is None
        ]
        return None if None in counts or not counts else max(c for c in counts if c is not None)
    kept = ("Relu", "Clip", "HardSigmoid", "Sigmoid", "MaxPool", "LeakyRelu")
    source = node.inputs[0] if is_op(node, *kept) or _keeps_channels(node) else None
    return None if source is None else _channels(source, depth - 1)


def _keeps_channels(node: ir.Node) -> bool:
    """Whether a Pad or Resize of an image works within channels."""
    if is_op(node, "Pad"):
        amounts = _amounts(node)
        return amounts is not None and len(amounts) == 8 and amounts[1] == amounts[5] == 0
    scales = array(node.inputs[2]) if is_op(node, "Resize") and len(node.inputs) > 2 else None
    return scales is not None and scales.size == 4 and float(scales[1]) == 1.0


def _amounts(pad: ir.Node) -> list[int] | None:
    """How much is padded: before each axis, then behind each."""
    given = array(pad.inputs[1]) if len(pad.inputs) > 1 else np.asarray(attribute(pad, "pads", ()))
    return None if given is None else [int(v) for v in given]


def _convert(names: Names, node: ir.Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None and isinstance(node.graph, ir.Graph)
    channels = _channels(x)
    assert channels is not None
    kernel = [int(k) for k in attribute(node, "kernel_shape", [])]
    weight = np.full((channels, 1, *kernel), 1.0 / np.prod(kernel), np.float32)
    attributes: dict[str, Any] = {"group": channels, "kernel_shape": kernel}
    for key in ("strides", "pads", "dilations"):
        if key in node.attributes:
            attributes[key] = list(attribute(node, key, []))
    constant = add_initializer(node.graph, names, f"{node.name}_weight", weight)
    conv = add_node(
        names, "Conv", [x, constant], before=node, name=f"{node.name}_conv", output=f"{y.name}_pooled",
        attributes=attributes,
    )  # fmt: skip
    conv.outputs[0].type, conv.outputs[0].shape = y.type, y.shape
    replace(y, conv.outputs[0])
    node.graph.remove(node, safe=True)


def _fold_pad(pad: ir.Node) -> bool:
    """Whether zero padding of the two last axes went into the Conv that alone reads it."""
    x, y = pad.inputs[0], pad.outputs[0]
    conv = sole_user(y)
    if (
        x is None
        or conv is None
        or not is_op(conv, "Conv")
        or conv.inputs[0] is not y
        or conv.graph is not pad.graph
    ):
        return False
    amounts = _amounts(pad)
    value = pad.inputs[2] if len(pad.inputs) > 2 else None
    if (
        attribute(pad, "mode", "constant") != "constant"
        or attribute(pad, "value", 0.0) != 0.0
        or (value is not None and scalar(value) != 0.0)
    ):
        return False
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        return False
    if (
        amounts is None
        or len(amounts) != 8
        or min(amounts) < 0
        or any(amounts[i] for i in (0, 1, 4, 5))
    ):
        return False
    if attribute(conv, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    old = list(attribute(conv, "pads", [0, 0, 0, 0]))
    extra = [amounts[2], amounts[3], amounts[6], amounts[7]]
    conv.attributes["pads"] = ir.AttrInt64s(
        "pads", [a + b for a, b in zip(old, extra, strict=True)]
    )
    conv.attributes.pop("auto_pad", None)
    conv.replace_input_with(0, x)
    assert pad.graph is not None
    pad.graph.remove(pad, safe=True)
    return True
