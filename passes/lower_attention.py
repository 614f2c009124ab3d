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
    is_op,
    scalar,
    sole_user,
    supersede,
    with_number,
)  # fmt: skip
from qcompile.run.probe import Fact
from qcompile.step import Outcome, Pass

MS = "com.microsoft"
_LEAST = -1000.0  # masks are lower, biases are not
_LOST = -1e9  # what is as low, or lower, is not changed by scores that are added to it
_HALF = _LEAST / 2
_MOVES = ("Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand", "Slice", "Identity", "Cast")
_DEEP = 12  # operators that a question about a mask may go back


class _NoError(Exception):
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
        masks: dict[tuple[ir.Value, str], ir.Value] = {}
        for softmax in [node for node in model.graph if is_op(node, "Softmax")]:
            try:
                found = _Found(softmax, self.facts, model.opset_imports.get("", 0))
            except _NoError as reason:
                if str(reason):
                    outcome.skipped[softmax.name or ""] = str(reason)
                continue
            _write(model.graph, names, found, masks)
            outcome.changed.append(softmax.name or "")
        return outcome


@dataclasses.dataclass
class _Seen:
    """What may be seen.

    Attributes:
        value: a mask, or the condition of a Where.
        kind: `added`, a mask that is added; `hidden`, where the condition tells what is masked; or `open`, what is not.
        number: of what is masked.
    """

    value: ir.Value
    kind: str
    number: float


class _Found:
    """An attention, taken apart."""

    def __init__(self, softmax: ir.Node, facts: Mapping[str, Fact], opset: int) -> None:
        """Raises: _NoError, with a reason if the products are there and are integer."""
        self._facts = facts
        behind = sole_user(softmax.outputs[0])
        if (
            behind is None
            or not is_op(behind, "MatMul")
            or behind.inputs[0] is not softmax.outputs[0]
        ):
            raise _NoError
        self.scale = 1.0
        self.seen: _Seen | None = None
        product = self._scores(softmax.inputs[0])
        self.v, v_shape = self._split(behind.inputs[1], (0, 2, 1, 3), scaled=False)
        self.q, q_shape = self._split(self._scaled(product.inputs[0]), (0, 2, 1, 3))
        self.k, _ = self._split(self._scaled(product.inputs[1]), (0, 2, 3, 1))
        sources = {
            (node.inputs[0], node.inputs[2], node.inputs[4]) for node in (self.q, self.k, self.v)
        }
        if len(sources) != 1:
            raise _NoError("queries, keys and values are not made of one tensor")
        source = self.q.inputs[0].producer() if self.q.inputs[0] is not None else None
        if not is_op(source, "DynamicQuantizeLinear"):
            raise _NoError("their input is not quantized at run time")
        assert source is not None
        x = source.inputs[0]
        assert x is not None
        self.x, rows = x, self._shape(x)
        widths = {self._shape(node.outputs[0])[-1] for node in (self.q, self.k, self.v)}
        if len(rows) != 3 or len(widths) != 1:
            raise _NoError("queries, keys and values are not of one width")
        self.heads = q_shape[2]
        if q_shape != v_shape or q_shape[:2] != rows[:2] or self.heads * q_shape[3] != widths.pop():
            raise _NoError("heads are not told apart by a Reshape of (batch, length, heads, size)")
        axis = attribute(softmax, "axis", -1 if opset >= 13 else 1)
        if axis not in (-1, 3):
            raise _NoError("the Softmax is not over keys")
        self.root = 1 / math.sqrt(q_shape[3])
        self.last = self._joined(behind, rows, q_shape)
        if self.seen is not None:
            self._check_mask(rows)

    def _shape(self, value: ir.Value | None) -> tuple[int, ...]:
        fact = None if value is None else self._facts.get(value.name or "")
        if fact is None or fact.shape is None:
            raise _NoError("a shape is not known")
        return fact.shape

    def _scores(self, value: ir.Value | None) -> ir.Node:
        """The product of queries and keys behind masks and scales."""
        node = _maker(value)
        if is_op(node, "Add"):
            a, b = node.inputs
            for mask, other in ((a, b), (b, a)):
                number = _number(mask)
                if mask is not None and number is not None:
                    self.seen, node = _Seen(mask, "added", number), _maker(other)
                    break
            else:
                raise _NoError
        elif is_op(node, "Where"):
            for i, kind in ((1, "hidden"), (2, "open")):
                low, condition = scalar(node.inputs[i]), node.inputs[0]
                if condition is not None and low is not None and low <= _LOST:
                    self.seen, node = _Seen(condition, kind, low), _maker(node.inputs[3 - i])
                    break
            else:
                raise _NoError
        product = _maker(self._scaled(node.outputs[0]))
        if not is_op(product, "MatMul"):
            raise _NoError
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
            raise _NoError
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
            raise _NoError
        split = _maker(self._scaled(node.inputs[0]) if scaled else node.inputs[0])
        if not is_op(split, "Reshape"):
            raise _NoError
        product = _maker(self._scaled(split.inputs[0]) if scaled else split.inputs[0])
        if product.domain != MS or product.op_type != "MatMulIntegerToFloat":
            raise _NoError
        if any(array(product.inputs[i]) is None for i in (1, 3, 5, 6) if i < len(product.inputs)):
            raise _NoError
        return product, self._shape(split.outputs[0])

    def _joined(self, behind: ir.Node, rows: tuple[int, ...], heads: tuple[int, ...]) -> ir.Node:
        """The Reshape that puts heads together again."""
        turned = sole_user(behind.outputs[0])
        if turned is None or not is_op(turned, "Transpose") or _order(turned) != (0, 2, 1, 3):
            raise _NoError("its result is not turned back")
        last, wanted = sole_user(turned.outputs[0]), (*rows[:2], heads[2] * heads[3])
        if last is None or not is_op(last, "Reshape") or self._shape(last.outputs[0]) != wanted:
            raise _NoError("its heads are not joined")
        return last

    def _check_mask(self, rows: tuple[int, ...]) -> None:
        assert self.seen is not None
        shape = self._shape(self.seen.value)
        fits = (
            len(shape) == 4 and shape[1] == 1 and shape[3] == rows[1] and shape[0] in (1, rows[0])
        )
        if not fits or shape[2] not in (1, rows[1]) or self.heads == 1:
            raise _NoError("its mask is not the same for all heads")


def _order(transpose: ir.Node) -> tuple[int, ...]:
    return tuple(attribute(transpose, "perm", ()))


def _maker(value: ir.Value | None) -> ir.Node:
    """The node that makes a value which it alone is made for."""
    node = None if value is None or sole_user(value) is None else value.producer()
    if node is None:
        raise _NoError
    return node


def _number(value: ir.Value | None, steps: int = _DEEP) -> float | None:
    """What is added where something is masked, if that and 0 is all that a tensor holds; else None."""
    node = None if value is None else value.producer()
    if value is None or node is None or steps == 0:
        return None
    if is_op(node, *_MOVES) and not (is_op(node, "Cast") and value.dtype is not ir.DataType.FLOAT):
        return _number(node.inputs[0], steps - 1)
    if is_op(node, "Where"):
        numbers = sorted(n for n in map(scalar, node.inputs[1:]) if n is not None)
        return (
            numbers[0] if len(numbers) == 2 and numbers[1] == 0 and numbers[0] <= _LEAST else None
        )
    if is_op(node, "Mul"):
        found = with_number(node)
        if found is not None and found[1] <= _LEAST and _zero_or_one(found[0]):
            return found[1]
    return None


def _zero_or_one(value: ir.Value | None) -> bool:
    """Whether a tensor is 1 - m of the zeros and ones of an attention mask, moved about."""
    node = None if value is None else value.producer()
    while is_op(node, *_MOVES) and not is_op(node, "Cast"):
        assert node is not None
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if not is_op(node, "Sub") or node is None or scalar(node.inputs[0]) != 1:
        return False
    source = node.inputs[1]
    for _ in range(_DEEP):
        cast = None if source is None else source.producer()
        if not is_op(cast, *_MOVES) or cast is None:
            return False
        source = cast.inputs[0]
        kind = None if source is None else source.dtype
        if (
            is_op(cast, "Cast")
            and kind is not None
            and (kind.is_integer() or kind is ir.DataType.BOOL)
        ):
            return True
    return False


def _write(
    graph: ir.Graph, names: Names, found: _Found, masks: dict[tuple[ir.Value, str], ir.Value]
) -> None:
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
        key = (found.seen.value, found.seen.kind)
        if key not in masks:
            masks[key] = _visible(graph, names, found)
        seen = masks[key]
        attributes["mask_filter_value"] = float(found.seen.number)
    made = add_node(
        names, "QAttention", [x_codes, weight, bias, x_scale, scale, seen, x_zero, zero], before=found.last, domain=MS,
        name=f"{name}_attention", output=f"{found.last.outputs[0].name}_attention", attributes=attributes,
    )  # fmt: skip
    made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    supersede(found.last.outputs[0], made.outputs[0])
    _drop(found.last)
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


def _visible(graph: ir.Graph, names: Names, found: _Found) -> ir.Value:
    """Ones and zeros (batch, query, key), int32."""
    assert found.seen is not None
    value, base = found.seen.value, found.seen.value.name
    place = found.last

    def step(op_type: str, inputs: list[ir.Value], part: str, **attributes: Any) -> ir.Value:
        return add_node(
            names, op_type, inputs, before=place, name=f"{base}_{part}", output=f"{base}_{part}", attributes=attributes
        ).outputs[0]  # fmt: skip

    def const(part: str, values: Any, kind: Any = np.int64) -> ir.Value:
        return add_initializer(graph, names, f"{base}_{part}", np.array(values, kind))

    open_ = value
    if found.seen.kind == "hidden":
        open_ = step("Not", [value], "open")
    elif found.seen.kind == "added":
        open_ = step("Greater", [value, const("half", _HALF, np.float32)], "open")
    whole = step("Cast", [open_], "visible", to=int(ir.DataType.INT32))
    shape = step("Shape", [found.x], "shape")
    sizes = step("Gather", [shape, const("order", [0, 1, 1])], "sizes")  # batch, length, length
    flat = step(
        "Gather", [whole, const("only", 0)], "rows", axis=1
    )  # no Squeeze: its axes moved at opset 13
    return step("Expand", [flat, sizes], "all")


def _drop(last: ir.Node) -> None:
    """Removes a node, and all before it that nobody else reads."""
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        before = [value.producer() for value in node.inputs if value is not None]
        node.graph.remove(node, safe=True)
        waiting += [maker for maker in before if maker is not None]
