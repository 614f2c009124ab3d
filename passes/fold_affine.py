"""Folds per-channel affine maps after a linear operator into its weight and bias.

    conv(x, W, b) * f + g = conv(x, W * f, b * f + g)       f, g: per output channel, or one number

Mul, Div, Add and Sub with a constant are such maps. Exported OCR and detection models carry hundreds
of them as nodes of their own, each a pass over the whole activation.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import (
    Names,
    add_initializer,
    array,
    attribute,
    can_replace,
    is_op,
    nodes,
    replace,
    sole_user,
)  # fmt: skip
from qcompile.step import Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class FoldAffine(Pass):
    """`Conv -> Mul(c) -> Add(d)` -> `Conv`. Also Div, Sub; also after ConvTranspose and Gemm."""

    name: ClassVar[str] = "fold_affine"

    def apply(self, model: ir.Model) -> Outcome:
        """See the class.

        Skipped: constants that are not one number a channel, products that other nodes read, weights
        that are not constant, results that are not finite.
        """
        outcome, names = Outcome(), Names(model)
        for node in nodes(model):
            if not is_op(node, "Mul", "Div", "Add", "Sub"):
                continue
            reason = _fold(names, node)
            if reason is None:
                outcome.changed.append(node.name or "")
            elif reason:
                outcome.skipped[node.name or ""] = reason
        return outcome


def _fold(names: Names, node: ir.Node) -> str | None:
    """None if the node was folded, "" if it is no affine map of a linear operator, else the reason."""
    first, second = array(node.inputs[0]), array(node.inputs[1])
    if (first is None) == (second is None):
        return ""
    x = node.inputs[1] if second is None else node.inputs[0]
    constant = first if second is None else second
    assert x is not None
    assert constant is not None
    producer = x.producer()
    if producer is None or not is_op(producer, "Conv", "ConvTranspose", "Gemm"):
        return ""
    if node.attributes:
        return "it broadcasts in the manner of opset 6"
    shape = _weight_shape(producer)
    if shape is None:
        return "the weight is not constant"
    c = _per_channel(constant.astype(np.float64), _layout(producer, shape)[0], len(shape))
    if c is None:
        return "the constant is not one number, or one a channel"
    one, zero = np.ones_like(c), np.zeros_like(c)
    match node.op_type, second is None:
        case "Mul", _:
            return fold_into_producer(names, x, c, zero, node.outputs[0])
        case "Add", _:
            return fold_into_producer(names, x, one, c, node.outputs[0])
        case "Sub", False:
            return fold_into_producer(names, x, one, -c, node.outputs[0])
        case "Sub", True:
            return fold_into_producer(names, x, -one, c, node.outputs[0])
        case "Div", False if c.all():
            return fold_into_producer(names, x, 1 / c, zero, node.outputs[0])
        case "Div", False:
            return "it divides by zero"
    return "it divides a constant"


def fold_into_producer(
    names: Names, x: ir.Value, factor: Array, offset: Array, y: ir.Value
) -> str | None:
    """None if `y = x * factor + offset` went into the operator that makes `x`, else the reason.

    If it did, the node that made `y` is gone.

    Args:
        names: of the model.
        x: output of a Conv, ConvTranspose or Gemm; of another operator is a reason.
        factor: float64 (channels,), along axis 1 of `x`.
        offset: float64 (channels,), along axis 1 of `x`.
        y: output of the node to fold.
    """
    node, user = x.producer(), y.producer()
    assert user is not None
    if node is None or not is_op(node, "Conv", "ConvTranspose", "Gemm"):
        return "no linear operator comes before it"
    if node.graph is not user.graph or sole_user(x) is not user:
        return f"the result of {node.name} is read elsewhere"
    if not can_replace(y, x):
        return "the graph returns it as another output"
    weight, bias = array(node.inputs[1]), _bias(node)
    if weight is None or weight.dtype.kind != "f":
        return "the weight is not constant"
    if isinstance(bias, str):
        return bias
    channels, spread = _layout(node, weight.shape)
    if factor.shape != (channels,):
        return f"it has {factor.size} channels, the weight {channels}"
    with np.errstate(over="ignore", invalid="ignore"):
        # In float64, so that each fold rounds once.
        folded = (weight.astype(np.float64) * spread(factor)).astype(weight.dtype)
        old = np.zeros(channels) if bias is None else np.broadcast_to(bias, (channels,))
        shifted = (old.astype(np.float64) * factor + offset).astype(weight.dtype)
    if not (np.isfinite(folded).all() and np.isfinite(shifted).all()):
        return "the folded weight or bias would not be finite"
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    if np.any(factor != 1.0):
        wish = f"{_stem(node.inputs[1])}_folded"
        node.replace_input_with(1, add_initializer(graph, names, wish, folded))
    if bias is not None or np.any(offset != 0.0):
        value = add_initializer(graph, names, f"{node.name or 'node'}_bias_folded", shifted)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, value)
        if "beta" in node.attributes:
            del node.attributes["beta"]
    replace(y, x)
    graph.remove(user, safe=True)
    return None


def _bias(node: ir.Node) -> Array | str | None:
    """The bias as (1,) or (channels,), the beta of a Gemm applied; None if there is none."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    beta = attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
    if value is None or beta == 0.0:
        return None
    bias = array(value)
    if bias is None:
        return "the bias is not constant"
    if bias.ndim == 2 and bias.shape[0] != 1:  # Gemm: (M, N) or (M, 1)
        return "the bias varies along other axes than the channel"
    return bias.reshape(-1) * np.float64(beta)


def _stem(value: ir.Value | None) -> str:
    return "weight" if value is None or value.name is None else value.name.removesuffix("_folded")


def _weight_shape(node: ir.Node) -> tuple[int, ...] | None:
    weight = array(node.inputs[1])
    return None if weight is None or weight.size == 0 else weight.shape


def _layout(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, Callable[[Array], Array]]:
    """The number of output channels, and f (C,) -> an array that scales those of the weight."""
    if node.op_type == "Conv":  # (out, in/group, k...)
        return shape[0], lambda f: f.reshape((-1,) + (1,) * (len(shape) - 1))
    if node.op_type == "Gemm":
        if attribute(node, "transB", 0):  # (out, in)
            return shape[0], lambda f: f[:, None]
        return shape[1], lambda f: f[None, :]
    group = attribute(node, "group", 1)  # ConvTranspose: (in, out/group, k...)
    rows = shape[0] // group

    def spread(f: Array) -> Array:
        table = np.repeat(f.reshape(group, shape[1]), rows, axis=0)  # (in, out/group)
        return table.reshape(table.shape + (1,) * (len(shape) - 2))

    return shape[1] * group, spread


def _per_channel(values: Array, channels: int, dims: int) -> Array | None:
    """`values` as (channels,), if broadcasting them against (N, C, ...) of rank `dims` means that.

    A (C,) constant runs along the last axis: the channel of a Gemm's output, the width of a Conv's.
    """
    if values.ndim > dims:
        return None
    if values.size == 1:
        return np.full(channels, values.reshape(()))
    shape = (1,) * (dims - values.ndim) + values.shape
    per_channel = shape[1] == channels == values.size
    return values.reshape(-1) if per_channel else None
