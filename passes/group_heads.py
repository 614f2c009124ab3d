"""Attention with fewer heads of keys and values than of queries, without copies of these heads.

    MatMul(Q, repeat(K))  ->  Reshape(MatMul(Reshape(Q), K))

Grouped-query attention (Ainslie et al. 2023) is exported as ordinary attention: Unsqueeze, Expand and Reshape write each head of
keys and values g times, for every token anew. The queries of a group stand side by side, so that they can as well be rows of one product:
(b, h g, t, d) and (b, h, g t, d) are the same in memory. The sums are the same.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.graph.dims import dims
from qcompile.graph.edit import (
    Names,
    add_initializer,
    add_node,
    array,
    attribute,
    ints,
    is_op,
    nodes,
    replace,
    sole_user,
)
from qcompile.graph.symbols import Known, Size, Symbol, find
from qcompile.step import Outcome, Pass

_RANK = 4
_SWAP = [0, 1, 3, 2]


@dataclasses.dataclass(frozen=True)
class GroupHeads(Pass):
    """See the module."""

    name: ClassVar[str] = "group_heads"

    def apply(self, model: ir.Model) -> Outcome:
        """Skipped: products with repeated heads whose other operand is not known to have as many."""
        outcome, names = Outcome(), Names(model)
        known = dims(model, one_batch=True)
        for node in list(nodes(model)):
            if not is_op(node, "MatMul") or not isinstance(node.graph, ir.Graph):
                continue
            found = _repeated(known, node.inputs[1])
            if found is None:
                continue
            heads, swap, counts = found
            sizes = known.shape(node.inputs[0])
            if sizes is None or len(sizes) != _RANK or sizes[1] != counts[1]:
                outcome.skipped[node.name or ""] = "its queries are not known to have as many heads"
                continue
            _rewrite(node.graph, names, node, heads, swap, counts)
            outcome.changed.append(node.name or "")
        return outcome


def _repeated(
    known: Known, value: ir.Value | None
) -> tuple[ir.Value, ir.Node | None, tuple[int, int]] | None:
    """Heads, the Transpose behind their copies if there is one, and how many heads there are, without copies and with them."""
    swap = value.producer() if value is not None else None
    if is_op(swap, "Transpose") and swap is not None and list(attribute(swap, "perm", [])) == _SWAP:
        value = swap.inputs[0]
    else:
        swap = None
    steps: list[ir.Node] = []
    for op_type in ("Reshape", "Expand", "Unsqueeze"):
        node = value.producer() if value is not None else None
        if node is None or not is_op(node, op_type):
            return None
        steps.append(node)
        value = node.inputs[0]
    merged, wide, new = steps
    heads, copies, flat = (known.shape(v) for v in (value, wide.outputs[0], merged.outputs[0]))
    if value is None or heads is None or copies is None or flat is None or len(heads) != _RANK:
        return None
    batch, h, s, d = heads
    if len(copies) != _RANK + 1 or ints(new.inputs[1] if len(new.inputs) > 1 else None) != (2,):
        return None
    g = copies[2]
    if isinstance(h, Symbol) or isinstance(g, Symbol):
        return None
    as_expected = copies == (batch, h, g, s, d) and len(flat) == _RANK
    as_expected &= (flat[1], flat[3]) == (h * g, d)
    # Where one is 0, what stands in its place is copied: of the length that is g, which does not fit, so that the run
    # fails; of the batch it is the batch.
    sizes = (known.shapes[merged.outputs[0]][i] for i in (0, 2))
    as_expected &= tuple(find(_written(size)) for size in sizes) == (batch, s)
    return (value, swap, (h, h * g)) if as_expected else None


def _written(size: Size) -> Size:
    """The size that a Reshape was told, which may have been 0."""
    return size.copied if isinstance(size, Symbol) and size.copied is not None else size


def _rewrite(
    graph: ir.Graph, names: Names, node: ir.Node, heads: ir.Value, swap: ir.Node | None, counts: tuple[int, int]
) -> None:  # fmt: skip
    """The product with the heads themselves; `counts`: of these, and of what was read."""
    rows, own = node.inputs[0], node.name or node.op_type
    assert rows is not None
    apart, together = _shapes(graph, names, node, rows, counts)
    right = heads
    if swap is not None:
        right = add_node(
            names, "Transpose", [heads], before=node, name=f"{swap.name}_grouped",
            output=f"{swap.outputs[0].name}_grouped", attributes={"perm": _SWAP},
        ).outputs[0]  # fmt: skip
        right.type = heads.type
    left = add_node(
        names, "Reshape", [rows, apart], before=node, name=f"{own}_by_group", output=f"{rows.name}_by_group",
    ).outputs[0]  # fmt: skip
    left.type = rows.type
    node.replace_input_with(0, left)
    node.replace_input_with(1, right)
    result = _scaled(node)
    back = add_node(
        names, "Reshape", [result, together], after=result.producer(), name=f"{own}_by_head", output=f"{result.name}_by_head",
    )  # fmt: skip
    back.outputs[0].type = result.type
    replace(result, back.outputs[0])
    back.replace_input_with(0, result)
    result.shape = None  # it was that of the new one


def _scaled(node: ir.Node) -> ir.Value:
    """The product, or what the factors behind it make of it: ORT merges these where nothing stands between."""
    while True:
        value = node.outputs[0]
        user = sole_user(value)
        if user is None or not is_op(user, "Mul", "Div") or user.graph is not node.graph:
            return value
        place = user.inputs.index(value)
        held = array(user.inputs[1 - place])
        if held is None or held.ndim or (is_op(user, "Div") and place):
            return value
        value.shape = None
        node = user


def _shapes(
    graph: ir.Graph, names: Names, node: ir.Node, rows: ir.Value, counts: tuple[int, int]
) -> tuple[ir.Value, ir.Value]:
    """(0, h, g t, 0) and (0, h g, t, 0) for rows (b, h g, t, d); 0 copies. No -1, which ORT refuses of what is empty."""
    (heads, count), own = counts, node.name or node.op_type

    def constant(*values: int) -> ir.Value:
        wish = "sizes_" + "x".join(map(str, values))
        return add_initializer(graph, names, wish, np.array(values, np.int64))

    def add(op_type: str, inputs: list[ir.Value], what: str) -> ir.Value:
        made = add_node(
            names, op_type, inputs, before=node, name=f"{own}_{what}", output=f"{own}_{what}",
            attributes={"axis": 0} if op_type in ("Gather", "Concat") else None,
        ).outputs[0]  # fmt: skip
        made.type = ir.TensorType(ir.DataType.INT64)
        return made

    t = add("Gather", [add("Shape", [rows], "shape"), constant(2)], "rows")
    all_rows = add("Mul", [t, constant(count // heads)], "rows_of_group")
    last = constant(0)
    apart = add("Concat", [constant(0, heads), all_rows, last], "groups")
    together = add("Concat", [constant(0, count), t, last], "heads")
    return apart, together
