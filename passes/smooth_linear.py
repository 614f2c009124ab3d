"""Moves scales of the inputs of products to their weights (SmoothQuant, Xiao et al. 2023).

    MatMul(x, W) = MatMul(x / s, s W)

1/s goes into constants before x where that is possible: see `qcompile.solve.smoothing`. Else a Mul by 1/s is put before
the products. Channels K that are to stay float are zeros there and in W, and come back behind the bias,

    Add(MatMul(x, W), b) = Add(Add(MatMul(x without K, W without K), b), MatMul(x_K, W_K))

so that product and bias stay one pattern. The small product is written so that no integer kernel takes it: with a
weight of three dimensions, or as a Gemm whose bias is the sum so far.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import (
    Names,
    add_initializer,
    add_node,
    array,
    attribute,
    is_op,
    rank,
    sole_user,
    supersede,
)
from qcompile.solve.smoothing import Smoothing, depth, find_path, matrix, refusal, takers
from qcompile.step import Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet

    import numpy.typing as npt

    Array = npt.NDArray[Any]

MARK = "qcompile.smoothed"
"""Key of the metadata of products that are smoothed."""


@dataclasses.dataclass(frozen=True)
class SmoothLinear(Pass):
    """The groups in `smoothings`, by the name of the tensor that they read.

    Attributes:
        smoothings: scales, and where they go.
        coded: names of products whose weights codes will replace that have the scales already: these weights stay.
    """

    name: ClassVar[str] = "smooth_linear"
    smoothings: Mapping[str, Smoothing]
    coded: AbstractSet[str] = frozenset()

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Nodes that are changed already are left as they are.

        Skipped: groups whose products are not there, do not read the tensor, or have weights of another depth.
        """
        outcome, editor = Outcome(), _Editor(model, self.coded)
        for tensor, smoothing in self.smoothings.items():
            nodes = [editor.nodes[n] for n in smoothing.nodes if n in editor.nodes]
            marked = [MARK in node.metadata_props for node in nodes]
            if marked and all(marked):
                continue
            why = "some of them are smoothed already" if any(marked) else ""
            why = why or _unfit(tensor, smoothing, nodes)
            if why:
                outcome.skipped[smoothing.nodes[0] if smoothing.nodes else tensor] = why
                continue
            outcome.rescaled |= editor.smooth(nodes, smoothing)
            outcome.changed += smoothing.nodes
        return outcome


def _unfit(tensor: str, smoothing: Smoothing, nodes: Sequence[ir.Node]) -> str:
    scale, keep = smoothing.scale, smoothing.keep
    if not nodes or len(nodes) < len(smoothing.nodes):
        return "it is not in the graph"
    for node in nodes:
        why = refusal(node)
        if why:
            return why
        if node.inputs[0] is None or node.inputs[0].name != tensor:
            return f"it does not read {tensor}"
        if scale.shape != (depth(node),):
            return f"its weight has {depth(node)} rows, the scale {scale.size}"
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        return "its scale is not positive"
    if keep and not 0 <= min(keep) <= max(keep) < scale.size:
        return "there is no such channel to keep"
    if keep and _rank(nodes, smoothing) < 2:
        return f"how many dimensions {tensor} has is not known"
    return ""


def _rank(nodes: Sequence[ir.Node], smoothing: Smoothing) -> int:
    """Of what the products read; 0 if unknown."""
    if any(is_op(node, "Gemm") for node in nodes):
        return 2
    return rank(nodes[0].inputs[0]) or smoothing.rank


class _Editor:
    """The edits of one model."""

    def __init__(self, model: ir.Model, coded: AbstractSet[str]) -> None:
        self.graph, self.names, self.coded = model.graph, Names(model), coded
        self.nodes = {node.name or "": node for node in model.graph}
        self.order = {name: i for i, name in enumerate(self.nodes)}

    def smooth(self, nodes: Sequence[ir.Node], smoothing: Smoothing) -> set[str]:
        """Products that fit, smoothed; names of the tensors whose values are others now."""
        value = nodes[0].inputs[0]
        assert value is not None
        scale, keep = smoothing.scale.astype(np.float64), list(smoothing.keep)
        folded = set() if keep else self.fold(value, smoothing)
        rescaled = folded
        if keep:
            rescaled = self.side_paths(nodes, value, keep, _rank(nodes, smoothing))
        if not folded:
            inverse = 1 / scale
            inverse[keep] = 0
            self.put_mul(nodes, value, inverse)
        scale[keep] = 0
        done: dict[tuple[ir.Value | None, int], ir.Value] = {}  # a shared weight stays shared
        for node in nodes:
            axis = 1 if attribute(node, "transB", 0) else 0
            key = (node.inputs[1], axis)
            if node.name not in self.coded:
                if key not in done:
                    done[key] = self.scaled(node.inputs[1], scale, axis)
                node.replace_input_with(1, done[key])
            node.metadata_props[MARK] = "split" if keep else f"{smoothing.alpha or 0:g}"
        return rescaled

    def scaled(self, old: ir.Value | None, factor: Array, axis: int) -> ir.Value:
        """A constant times a vector along an axis, as a new initializer: others may read the old one."""
        values = array(old)
        assert old is not None
        assert values is not None
        shape = [1] * values.ndim
        shape[axis] = -1
        made = (values.astype(np.float64) * factor.reshape(shape)).astype(values.dtype)
        return add_initializer(self.graph, self.names, old.name or "weight", made)

    def fold(self, value: ir.Value, smoothing: Smoothing) -> set[str]:
        """The scale taken from constants before `value`, if they are where they were found; else nothing."""
        place = smoothing.place
        # other changes may have put a reader beside those that were there when the place was found
        path = [] if place is None else find_path(value, place)
        if place is None or not path:
            return set()
        taken = takers(path[-1])
        factor = np.ones(taken[0].width)
        factor[list(place.channels)] = 1 / smoothing.scale.astype(np.float64)
        for taker in taken:
            if (
                taker.node.name in self.coded
                and taker.index == 1
                and is_op(taker.node, "MatMul", "Gemm")
            ):
                continue
            new = self.scaled(taker.node.inputs[taker.index], factor, taker.axis)
            taker.node.replace_input_with(taker.index, new)
        made = (*path, *(taker.node.outputs[0] for taker in taken))
        return {v.name or "" for v in made}

    def put_mul(self, nodes: Sequence[ir.Node], value: ir.Value, factor: Array) -> None:
        """The products read `value` times a vector."""
        first = min(nodes, key=lambda node: self.order[node.name or ""])
        constant = add_initializer(
            self.graph, self.names, f"{value.name}_inverse_scale", factor.astype(np.float32)
        )
        made = add_node(
            self.names, "Mul", [value, constant], before=first, name=f"{first.name}_smooth",
            output=f"{value.name}_smooth",
        ).outputs[0]  # fmt: skip
        made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
        for node in nodes:
            node.replace_input_with(0, made)

    def side_paths(
        self, nodes: Sequence[ir.Node], value: ir.Value, keep: list[int], dims: int
    ) -> set[str]:
        """The share of these channels of `value` is added behind the products, and behind their biases."""
        first = min(nodes, key=lambda node: self.order[node.name or ""])
        index = add_initializer(
            self.graph, self.names, f"{first.name}_kept", np.array(keep, np.int64)
        )
        kept = add_node(
            self.names, "Gather", [value, index], before=first, name=f"{first.name}_keep",
            output=f"{value.name}_kept", attributes={"axis": -1},
        ).outputs[0]  # fmt: skip
        kept.type = ir.TensorType(ir.DataType.FLOAT)
        if value.shape is not None:
            kept.shape = ir.Shape([*value.shape[:-1], len(keep)])
        for node in nodes:
            tail = _behind_bias(node, dims)
            rows = matrix(node)[keep] if dims == 2 else matrix(node)[keep][None]
            weight = add_initializer(self.graph, self.names, f"{node.name}_kept_weight", rows)
            self.add_share(node, tail, kept, weight, dims)
        return {node.outputs[0].name or "" for node in nodes}

    def add_share(
        self, node: ir.Node, tail: ir.Node, kept: ir.Value, weight: ir.Value, dims: int
    ) -> None:
        """What `tail` makes is the sum of that and of the small product."""
        old = tail.outputs[0]
        name, wish = f"{node.name}_kept", f"{old.name}_kept"
        if dims == 2:
            last = add_node(
                self.names, "Gemm", [kept, weight, old], after=tail, name=name, output=wish
            )
        else:
            share = add_node(
                self.names, "MatMul", [kept, weight], after=tail, name=name, output=wish
            )
            share.outputs[0].type, share.outputs[0].shape = old.type, old.shape
            last = add_node(
                self.names, "Add", [old, share.outputs[0]], after=share, name=f"{name}_add",
                output=f"{wish}_added",
            )  # fmt: skip
        supersede(old, last.outputs[0])
        last.replace_input_with(2 if dims == 2 else 0, old)


def _behind_bias(node: ir.Node, dims: int) -> ir.Node:
    """The Add of a vector that alone reads a MatMul, which the planner takes for its bias; else the MatMul."""
    user = sole_user(node.outputs[0]) if is_op(node, "MatMul") else None
    if user is None or not is_op(user, "Add") or user.graph is not node.graph:
        return node
    constants = [values for value in user.inputs if (values := array(value)) is not None]
    width = matrix(node).shape[1]
    fits = [c.size == width and c.shape[-1:] == (width,) and c.ndim <= dims for c in constants]
    return user if any(fits) else node
