"""Writes ORT's integer attention in place of three integer products and the float attention behind them.

    x -> DynamicQuantizeLinear -> MatMulIntegerToFloat (q), (k), (v) -> Reshape -> Transpose
      Softmax(scale q k' + mask) v -> Transpose -> Reshape
      => DynamicQuantizeLinear -> QAttention

Self-attention of an encoder: q, k and v are products of one tensor, and nothing else reads them. The codes and scales are the
same, and so are the sums; one product takes the place of three, and nothing is transposed in memory.

QAttention takes what may be seen as whole numbers (batch, query, key). They are read off the mask that is added, or of the
condition of a Where, once for all layers that share it; what is masked gets the same number as before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import (
    Names,
    add_initializer,
    add_node,
    array,
    attribute,
    drop_unread,
    ints,
    is_op,
    scalar,
    sole_user,
    supersede,
    with_number,
)  # fmt: skip
from qcompile.graph.stack import Stack
from qcompile.graph.visible import Seen, hidden_number
from qcompile.run.probe import Fact
from qcompile.step import Outcome, Pass

MS = "com.microsoft"
_LOST = -1e30  # what is as low, or lower, is not changed by scores that are added to it


class _MismatchError(Exception):
    """Why something is no attention that QAttention computes."""


@dataclasses.dataclass(frozen=True)
class LowerAttention(Pass):
    """See the module.

    Attributes:
        facts: shapes by name of value.
    """

    name: ClassVar[str] = "lower_attention"
    facts: Mapping[str, Fact]

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Skipped: what is not that pattern to the letter, where the products are integer."""
        outcome, names = Outcome(), Names(model)
        stacks: list[Stack] = []
        for softmax in [node for node in model.graph if is_op(node, "Softmax")]:
            try:
                found = _Found(softmax, self.facts, model.opset_imports.get("", 0))
            except _MismatchError as reason:
                if str(reason):
                    outcome.skipped[softmax.name or ""] = str(reason)
                continue
            stack = next((one for one in stacks if one.holds(found.x)), None)
            if stack is None:
                stack = Stack(model.graph, names, found.x, found.last)
                stacks.append(stack)
            _write(model.graph, names, found, stack)
            outcome.changed.append(softmax.name or "")
        if outcome.changed:
            drop_unread(model)
        return outcome


class _Found:
    """An attention, taken apart."""

    def __init__(self, softmax: ir.Node, facts: Mapping[str, Fact], opset: int) -> None:
        """Raises: _MismatchError, with a reason if the products are there and are integer."""
        self._facts = facts
        behind = sole_user(softmax.outputs[0])
        if (
            behind is None
            or not is_op(behind, "MatMul")
            or behind.inputs[0] is not softmax.outputs[0]
        ):
            raise _MismatchError
        self.scale = 1.0
        self.seen: Seen | None = None
        product = self._scores(softmax.inputs[0])
        self.v, v_shape = self._split(behind.inputs[1], (0, 2, 1, 3), scaled=False)
        self.q, q_shape = self._split(self._scaled(product.inputs[0]), (0, 2, 1, 3))
        self.k, _ = self._split(self._scaled(product.inputs[1]), (0, 2, 3, 1))
        sources = {
            (node.inputs[0], node.inputs[2], node.inputs[4]) for node in (self.q, self.k, self.v)
        }
        if len({node.inputs[1].dtype for node in (self.q, self.k, self.v) if node.inputs[1]}) != 1:
            raise _MismatchError("their weights are not of one type")
        if len(sources) != 1:
            raise _MismatchError("queries, keys and values are not made of one tensor")
        source = self.q.inputs[0].producer() if self.q.inputs[0] is not None else None
        if not is_op(source, "DynamicQuantizeLinear"):
            raise _MismatchError("their input is not quantized at run time")
        assert source is not None
        x = source.inputs[0]
        assert x is not None
        self.x, rows = x, self._shape(x)
        widths = {self._shape(node.outputs[0])[-1] for node in (self.q, self.k, self.v)}
        if len(rows) != 3 or len(widths) != 1:
            raise _MismatchError("queries, keys and values are not of one width")
        self.heads = q_shape[2]
        if q_shape != v_shape or q_shape[:2] != rows[:2] or self.heads * q_shape[3] != widths.pop():
            raise _MismatchError(
                "heads are not told apart by a Reshape of (batch, length, heads, size)"
            )
        axis = attribute(softmax, "axis", -1 if opset >= 13 else 1)
        if axis not in (-1, 3):
            raise _MismatchError("the Softmax is not over keys")
        self.root = 1 / math.sqrt(q_shape[3])
        self.last = self._joined(behind, rows, q_shape)
        if self.seen is not None:
            self._check_mask(rows)

    def _shape(self, value: ir.Value | None) -> tuple[int, ...]:
        fact = None if value is None else self._facts.get(value.name or "")
        if fact is None or fact.shape is None:
            raise _MismatchError("a shape is not known")
        return fact.shape

    def _scores(self, value: ir.Value | None) -> ir.Node:
        """The product of queries and keys behind masks and scales."""
        node = _maker(value)
        if is_op(node, "Add"):
            a, b = node.inputs
            for mask, other in ((a, b), (b, a)):
                number = hidden_number(mask)
                if mask is not None and number is not None:
                    self.seen, node = Seen(mask, "added", number), _maker(other)
                    break
            else:
                raise _MismatchError
        elif is_op(node, "Where"):
            for i, kind in ((1, "hidden"), (2, "open")):
                low, condition = scalar(node.inputs[i]), node.inputs[0]
                if condition is not None and low is not None and low <= _LOST:
                    self.seen, node = Seen(condition, kind, low), _maker(node.inputs[3 - i])
                    break
            else:
                raise _MismatchError
        product = _maker(self._scaled(node.outputs[0]))
        if not is_op(product, "MatMul"):
            raise _MismatchError
        return product

    def _scaled(self, value: ir.Value | None) -> ir.Value | None:
        """What is multiplied by a number, which goes into the scale."""
        node = None if value is None else value.producer()
        if value is None or node is None or not is_op(node, "Mul", "Div"):
            return value
        found = with_number(node)
        if (
            found is None
            or sole_user(value) is None
            or (is_op(node, "Div") and found[0] is not node.inputs[0])
        ):
            return value
        if found[1] <= 0:
            raise _MismatchError
        self.scale *= found[1] if is_op(node, "Mul") else 1 / found[1]
        return found[0]

    def _split(
        self, value: ir.Value | None, order: tuple[int, ...], *, scaled: bool = True
    ) -> tuple[ir.Node, tuple[int, ...]]:
        """The integer product behind a Reshape into heads and a Transpose, and the shape between them."""
        node = _maker(value)
        twice = order == (0, 2, 3, 1) and _order(node) == (0, 1, 3, 2)
        if twice:  # keys may be turned in two steps
            node, order = _maker(node.inputs[0]), (0, 2, 1, 3)
        if not is_op(node, "Transpose") or _order(node) != order:
            raise _MismatchError
        split = _maker(self._scaled(node.inputs[0]) if scaled else node.inputs[0])
        if not is_op(split, "Reshape") or not _keeps_rows(split):
            raise _MismatchError
        product = _maker(self._scaled(split.inputs[0]) if scaled else split.inputs[0])
        if product.domain != MS or product.op_type != "MatMulIntegerToFloat":
            raise _MismatchError
        if any(array(product.inputs[i]) is None for i in (1, 3, 5, 6) if i < len(product.inputs)):
            raise _MismatchError
        return product, self._shape(split.outputs[0])

    def _joined(self, behind: ir.Node, rows: tuple[int, ...], heads: tuple[int, ...]) -> ir.Node:
        """The Reshape that puts heads together again."""
        turned = sole_user(behind.outputs[0])
        if turned is None or not is_op(turned, "Transpose") or _order(turned) != (0, 2, 1, 3):
            raise _MismatchError("its result is not turned back")
        last, wanted = sole_user(turned.outputs[0]), (*rows[:2], heads[2] * heads[3])
        if (
            last is None
            or not is_op(last, "Reshape")
            or not _keeps_rows(last)
            or self._shape(last.outputs[0]) != wanted
        ):
            raise _MismatchError("its heads are not joined")
        return last

    def _check_mask(self, rows: tuple[int, ...]) -> None:
        assert self.seen is not None
        shape = self._shape(self.seen.value)
        fits = (
            len(shape) == 4 and shape[1] == 1 and shape[3] == rows[1] and shape[0] in (1, rows[0])
        )
        if not fits or shape[2] not in (1, rows[1]) or self.heads == 1:
            raise _MismatchError("its mask is not the same for all heads")


def _keeps_rows(reshape: ir.Node) -> bool:
    """Whether the first two sizes that a Reshape makes, batch and length, are no fixed numbers."""
    sizes = ints(reshape.inputs[1])
    if sizes is not None:
        return all(size in (0, -1) for size in sizes[:2])
    node = None if reshape.inputs[1] is None else reshape.inputs[1].producer()
    if is_op(node, "Concat") and node is not None:
        parts = [ints(value) for value in node.inputs[:2]]
        return all(part is None or part in ((0,), (-1,)) for part in parts)
    return is_op(node, "Shape", "Gather", "Slice")


def _order(transpose: ir.Node) -> tuple[int, ...]:
    return tuple(attribute(transpose, "perm", ()))


def _maker(value: ir.Value | None) -> ir.Node:
    """The node that makes a value which it alone is made for."""
    node = None if value is None or sole_user(value) is None else value.producer()
    if node is None:
        raise _MismatchError
    return node


def _write(graph: ir.Graph, names: Names, found: _Found, stack: Stack) -> None:
    products = (found.q, found.k, found.v)
    stored = [_wide(node) for node in products]
    codes, scales, zeros, biases = (
        np.concatenate(part, axis=-1) for part in zip(*stored, strict=True)
    )
    name = found.q.name or "attention"
    bases = [node.inputs[1].name or "" for node in products if node.inputs[1] is not None]
    values = [
        add_initializer(graph, names, f"{bases[0]}{suffix}", part)
        for suffix, part in (("kv_q", codes), ("kv_scale", scales), ("kv_zero_point", zeros), ("kv_bias", biases))
    ]  # fmt: skip
    weight, scale, zero, bias = values
    x_codes, _, x_scale, _, x_zero = found.q.inputs[:5]
    attributes: dict[str, Any] = {"num_heads": found.heads}
    if abs(found.scale / found.root - 1) > 1e-6:
        attributes["scale"] = float(found.scale)
    seen = None
    if found.seen is not None:
        seen = stack.visible(found.seen)
        attributes["mask_filter_value"] = float(found.seen.number)
    assert x_codes is not None
    x_codes = stack.filled(x_codes, found.last)
    made = add_node(
        names, "QAttention", [x_codes, weight, bias, x_scale, scale, seen, x_zero, zero], before=found.last, domain=MS,
        name=f"{name}_attention", output=f"{found.last.outputs[0].name}_attention", attributes=attributes,
    )  # fmt: skip
    made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    result = stack.cut(made.outputs[0], found.last)
    result.type = made.outputs[0].type
    supersede(found.last.outputs[0], result)
    made.name = found.q.name or made.name  # by which reports find it


def _wide(node: ir.Node) -> tuple[Any, Any, Any, Any]:
    """Codes (K, N), and scale, zero point and bias (N,) of an integer product."""
    codes, scale, zero = (array(node.inputs[i]) for i in (1, 3, 5))
    assert codes is not None
    assert scale is not None
    width = codes.shape[1]
    known = array(node.inputs[6]) if len(node.inputs) > 6 else None
    bias = np.zeros(width, np.float32) if known is None else known.reshape(-1)
    zero = np.zeros((), codes.dtype) if zero is None else zero
    scale, zero = (np.broadcast_to(part.reshape(-1), (width,)) for part in (scale, zero))
    return codes, scale, zero, bias
