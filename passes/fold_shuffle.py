"""Recognizes the channel shuffle of ShuffleNet (Zhang et al. 2018) and reads the channels directly.

    x (1, C, H, W) -> Reshape (C/g, g, H W) -> Transpose (1, 0, 2) -> Reshape (g, 1, C/g, H, W) -> Gather (k)
      => Gather(x, [k, k + g, k + 2 g, ...], axis 1)

Three passes over the activation, and layouts that block the channels-last kernels, become one copy of whole
planes.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import (
    Names,
    add_initializer,
    add_node,
    array,
    attribute,
    is_op,
    nodes,
    replace,
)
from qcompile.run.probe import inferred
from qcompile.step import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class FoldShuffle(Pass):
    """`Reshape -> Transpose -> Reshape -> Gather` -> `Gather` of channels, for a batch of one."""

    name: ClassVar[str] = "fold_shuffle"

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Skipped: shapes that are not known, other orders."""
        outcome, names = Outcome(), Names(model)
        found = [(node, chain) for node in nodes(model) if (chain := _chain(node)) is not None]
        if not found:
            return outcome
        shapes = {
            value.name: value.shape
            for node in inferred(model, {}).graph
            for value in (*node.inputs, *node.outputs)
            if value is not None
        }
        for gather, (first, transpose, second) in found:
            x = first.inputs[0]
            assert x is not None
            groups = _groups(first, transpose, second, gather, shapes.get(x.name))
            if groups is None:
                outcome.skipped[gather.name or ""] = "not a channel shuffle of a known shape"
                continue
            _rewrite(names, gather, x, groups)
            outcome.changed.append(gather.name or "")
        return outcome


def _chain(node: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """The Reshape, Transpose and Reshape before a Gather along axis 0."""
    if not is_op(node, "Gather") or attribute(node, "axis", 0) != 0:
        return None
    steps = []
    value = node.inputs[0]
    for op_type in ("Reshape", "Transpose", "Reshape"):
        step = value.producer() if value is not None else None
        if step is None or not is_op(step, op_type) or step.graph is not node.graph:
            return None
        steps.append(step)
        value = step.inputs[0]
    return steps[2], steps[1], steps[0]


def _groups(
    first: ir.Node, transpose: ir.Node, second: ir.Node, gather: ir.Node, shape: ir.Shape | None
) -> tuple[int, int, int] | None:
    """Channels, groups and the group that is taken, if the chain is a shuffle."""
    if shape is None or len(shape) != 4 or not all(isinstance(d, int) for d in shape):
        return None
    batch, channels, height, width = (int(d) for d in shape)  # type: ignore[arg-type]
    split, merged, index = (array(node.inputs[1]) for node in (first, second, gather))
    if (
        batch != 1
        or split is None
        or merged is None
        or index is None
        or index.size != 1
        or index.ndim
    ):
        return None
    if list(attribute(transpose, "perm", [])) != [1, 0, 2] or split.size != 3:
        return None
    groups = int(split[1])
    if (
        groups < 2
        or channels % groups
        or [int(v) for v in split] != [channels // groups, groups, height * width]
    ):
        return None
    wanted = [groups, 1, channels // groups, height, width]
    given = [int(v) for v in merged]
    if len(given) != 5 or any(b not in (a, -1) for a, b in zip(wanted, given, strict=True)):
        return None
    return channels, groups, int(index) % groups


def _rewrite(names: Names, gather: ir.Node, x: ir.Value, groups: tuple[int, int, int]) -> None:
    channels, count, taken = groups
    graph, y = gather.graph, gather.outputs[0]
    assert isinstance(graph, ir.Graph)
    indices = add_initializer(
        graph, names, f"{y.name}_channels", np.arange(taken, channels, count, dtype=np.int64)
    )
    select = add_node(
        names, "Gather", [x, indices], before=gather, name=f"{gather.name}_channels", output=f"{y.name}_selected",
        attributes={"axis": 1},
    )  # fmt: skip
    select.outputs[0].type = y.type
    replace(y, select.outputs[0])
    graph.remove(gather, safe=True)
