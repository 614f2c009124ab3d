"""Moves scales of the inputs of products to their weights (SmoothQuant, Xiao et al. 2023).

    MatMul(x, W) = MatMul(x / s, s W)

1/s goes into the node that makes x where that is possible: scale and bias of a LayerNormalization, a product with
a constant vector, weight and bias of a linear layer. Else a Mul by 1/s is put before the products.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import Names, add_initializer, add_node, array, attribute, is_op
from qcompile.solve.smoothing import (
    Smoothing,
    biased_product,
    depth,
    fold_target,
    refusal,
    takes_scale,
)
from qcompile.step import Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    Array = npt.NDArray[Any]

_MARK = "qcompile.smoothed"


@dataclasses.dataclass(frozen=True)
class SmoothLinear(Pass):
    """The groups in `smoothings`, by the name of the tensor that they read."""

    name: ClassVar[str] = "smooth_linear"
    smoothings: Mapping[str, Smoothing]

    def apply(self, model: ir.Model) -> Outcome:
        """See the class.

        Skipped: groups whose products are not there, do not read the tensor, or have weights of another depth.
        """
        outcome, names = Outcome(), Names(model)
        by_name = {node.name: node for node in model.graph}
        for tensor, smoothing in self.smoothings.items():
            nodes = [by_name.get(name) for name in smoothing.group.nodes]
            present = [node for node in nodes if node is not None]
            if present and all(_MARK in node.metadata_props for node in present):
                continue
            why = _unfit(tensor, smoothing, nodes)
            if why:
                outcome.skipped[smoothing.group.nodes[0]] = why
                continue
            _smooth(model.graph, names, present, smoothing, outcome)
        return outcome


def _unfit(tensor: str, smoothing: Smoothing, nodes: Sequence[ir.Node | None]) -> str:
    scale = smoothing.scale
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        return "its scale is not positive"
    for node in nodes:
        if node is None:
            return "it is not in the graph"
        why = refusal(node)
        if why:
            return why
        if node.inputs[0] is None or node.inputs[0].name != tensor:
            return f"it does not read {tensor}"
        if depth(node) != scale.size:
            return f"its weight has {depth(node)} rows, the scale {scale.size}"
    return ""


def _smooth(
    graph: ir.Graph, names: Names, nodes: Sequence[ir.Node], smoothing: Smoothing, outcome: Outcome
) -> None:
    scale = smoothing.scale.astype(np.float64)
    value = nodes[0].inputs[0]
    assert value is not None
    producer = value.producer()
    # other changes may have put a reader beside those that were there when the place was chosen
    if smoothing.fold and producer is not None and fold_target(value, nodes) == smoothing.fold:
        _divide(graph, names, producer, scale)
        outcome.changed.append(producer.name or "")
        outcome.rescaled.add(value.name or "")
    else:
        _put_mul(graph, names, value, nodes, scale)
    for node in nodes:
        columns = scale[None, :] if attribute(node, "transB", 0) else scale[:, None]
        _set(graph, names, node, 1, columns)
        node.metadata_props[_MARK] = f"{smoothing.alpha:g}"
        outcome.changed.append(node.name or "")


def _put_mul(
    graph: ir.Graph, names: Names, value: ir.Value, nodes: Sequence[ir.Node], scale: Array
) -> None:
    inverse = add_initializer(
        graph, names, f"{value.name}_inverse_scale", (1 / scale).astype(np.float32)
    )
    order = {id(node): i for i, node in enumerate(graph)}
    first = min(nodes, key=lambda node: order[id(node)])
    made = add_node(
        names, "Mul", [value, inverse], before=first, name=f"{first.name}_smooth", output=f"{value.name}_smooth"
    )  # fmt: skip
    made.outputs[0].type, made.outputs[0].shape = value.type, value.shape
    for node in nodes:
        node.replace_input_with(0, made.outputs[0])


def _divide(graph: ir.Graph, names: Names, node: ir.Node, scale: Array) -> None:
    """The node's result is divided by the scale."""
    assert takes_scale(node, scale.size)
    if is_op(node, "LayerNormalization"):
        for i in range(1, len(node.inputs)):
            _set(graph, names, node, i, 1 / scale)
    elif is_op(node, "Mul"):
        vectors = [
            i
            for i, v in enumerate(node.inputs)
            if (a := array(v)) is not None and a.size == scale.size
        ]
        _set(graph, names, node, vectors[0], 1 / scale)
    elif is_op(node, "Add"):
        product = biased_product(node)
        assert product is not None
        bias = 1 if node.inputs[0] is product.outputs[0] else 0
        _set(graph, names, node, bias, 1 / scale)
        _divide(graph, names, product, scale)
    else:
        rows = scale[:, None] if attribute(node, "transB", 0) else scale[None, :]
        _set(graph, names, node, 1, 1 / rows)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            _set(graph, names, node, 2, 1 / scale)


def _set(graph: ir.Graph, names: Names, node: ir.Node, index: int, factor: Array) -> None:
    """The constant input is multiplied; as a new initializer, others may read the old one."""
    old = node.inputs[index]
    values = array(old)
    if old is None or values is None:  # a LayerNormalization without a bias
        return
    made = (values.astype(np.float64) * factor.reshape(factor.shape)).astype(np.float32)
    node.replace_input_with(
        index, add_initializer(graph, names, old.name or "weight", made.reshape(values.shape))
    )
