"""Folds BatchNormalization in inference form.

    y = (x - mean) / sqrt(var + eps) * gamma + beta  =  x * f + g,   f = gamma / sqrt(var + eps),
                                                                     g = beta - mean * f

After Conv, ConvTranspose and Gemm, f goes into the weight's output channels and g into the bias.
Elsewhere the node becomes `Mul(x, f) -> Add(., g)`, which later passes know how to move.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from passes.fold_affine import fold_into_producer
from qcompile.graph.edit import (
    Names,
    add_initializer,
    add_node,
    array,
    attribute,
    dtype,
    is_op,
    nodes,
    rank,
    replace,
)  # fmt: skip
from qcompile.step import Outcome, Pass

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class FoldBatchnorm(Pass):
    """`Conv -> BatchNormalization` -> `Conv`; any other BatchNormalization -> `Mul -> Add`."""

    name: ClassVar[str] = "fold_batchnorm"

    def apply(self, model: ir.Model) -> Outcome:
        """See the class.

        Skipped: training mode, extra outputs, statistics that are not constant, not per channel or
        not finite, inputs of unknown rank.
        """
        outcome, names = Outcome(), Names(model)
        for node in nodes(model):
            if not is_op(node, "BatchNormalization"):
                continue
            reason = _fold(names, node)
            if reason is None:
                outcome.changed.append(node.name or "")
            else:
                outcome.skipped[node.name or ""] = reason
        return outcome


def _fold(names: Names, node: ir.Node) -> str | None:
    if attribute(node, "training_mode", 0):
        return "training mode"
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its running statistics are read"
    statistics = [array(value) for value in node.inputs[1:5]]
    known = [np.asarray(values, np.float64) for values in statistics if values is not None]
    if len(known) < 4:
        return "its statistics are not constant"
    if any(values.ndim != 1 for values in known):
        return "its statistics are not per channel"
    gamma, beta, mean, var = known
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = gamma / np.sqrt(var + attribute(node, "epsilon", 1e-5))
        offset = beta - mean * factor
    if not (np.isfinite(factor).all() and np.isfinite(offset).all()):
        return "its statistics give factors that are not finite"
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    if fold_into_producer(names, x, factor, offset, y) is None:
        return None
    dims = rank(x) or rank(y)
    if dims is None:
        return "the rank of its input is unknown"
    _split(names, node, factor, offset, dims)
    return None


def _split(names: Names, node: ir.Node, factor: Array, offset: Array, dims: int) -> None:
    graph, x, y = node.graph, node.inputs[0], node.outputs[0]
    assert isinstance(graph, ir.Graph)
    # The statistics may be wider than x from opset 15 on; before, all have one type.
    kind = dtype(x) or dtype(y) or dtype(node.inputs[1])
    assert kind is not None
    shape = (-1,) + (1,) * max(dims - 2, 0)  # (C, 1, 1): broadcasts along axis 1
    scale, shift = (
        add_initializer(
            graph, names, f"{y.name}_{part}", values.reshape(shape).astype(kind.numpy())
        )
        for part, values in (("scale", factor), ("shift", offset))
    )
    mul = add_node(
        names, "Mul", [x, scale], before=node, name=f"{node.name}_mul", output=f"{y.name}_scaled"
    )
    add = add_node(
        names, "Add", [mul.outputs[0], shift], before=node, name=f"{node.name}_add",
        output=f"{y.name}_shifted",
    )  # fmt: skip
    mul.outputs[0].type, mul.outputs[0].shape = y.type, y.shape
    replace(y, add.outputs[0])
    graph.remove(node, safe=True)
