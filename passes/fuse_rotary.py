"""Rotary position embeddings (Su et al. 2021) as one operator of ORT.

    Add(Mul(x, cos), Mul(Concat(Neg(Slice(x, upper half)), Slice(x, lower half)), sin))  ->  RotaryEmbedding(x, ids, cos, sin)

Six operators for queries and six for keys of every layer: for one token they take longer to start than to run. The cosines
and sines that the model computes of its positions become the tables, one row for each place in the batch. The operator takes
one place at least: where there is none, the result fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import (
    Names,
    add_initializer,
    add_node,
    attribute,
    drop_unread,
    ints,
    is_op,
    scalar,
    sole_user,
    supersede,
)
from qcompile.run.probe import Fact
from qcompile.step import Outcome, Pass

MS = "com.microsoft"
_FEWEST = 3  # that pay for the tables
_STEPS = 6  # operators between angles and what is multiplied
_SCALES = ("Mul", "Div")  # of queries


class _Rotary(NamedTuple):
    """One embedding: the Add, and what it is made of."""

    add: ir.Node
    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    half: int


@dataclasses.dataclass(frozen=True)
class FuseRotary(Pass):
    """See the module.

    Attributes:
        facts: shapes by name of value.
    """

    name: ClassVar[str] = "fuse_rotary"
    facts: Mapping[str, Fact]

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Skipped: fewer embeddings of the same angles than pay."""
        outcome, names = Outcome(), Names(model)
        found: dict[tuple[ir.Value, ir.Value], list[_Rotary]] = {}
        for node in model.graph:
            rotary = self._match(node)
            if rotary is not None:
                found.setdefault((rotary.cos, rotary.sin), []).append(rotary)
        for those in found.values():
            own = [node.add.name or "" for node in those]
            if len(those) < _FEWEST:
                outcome.skipped |= dict.fromkeys(own, "too few embeddings of these angles to gain")
                continue
            _write(model.graph, names, those)
            outcome.changed += own
        if outcome.changed:
            model.opset_imports.setdefault(MS, 1)
            drop_unread(model)
        return outcome

    def _shape(self, value: ir.Value | None) -> tuple[int, ...]:
        fact = None if value is None else self.facts.get(value.name or "")
        return () if fact is None or fact.shape is None or fact.dtype != np.float32 else fact.shape

    def _match(self, node: ir.Node) -> _Rotary | None:
        if not is_op(node, "Add"):
            return None
        for plain, turned in (node.inputs, reversed(node.inputs)):
            for x, cos in _factors(plain):
                for rotated, sin in _factors(turned):
                    half = _rotated(rotated, x)
                    if half and self._angles(cos, sin, half) and self._heads(x, cos, half):
                        return _Rotary(node, x, cos, sin, half)
        return None

    def _heads(self, x: ir.Value, cos: ir.Value, half: int) -> bool:
        """Whether `x` is (batch, heads, length, size) for the angles of (batch or 1, 1, length, size).

        One feed tells sizes; which axis is which is told by the Transpose that brings heads forward. A feed of length 1 tells too
        little.
        """
        shape, angles = self._shape(x), self._shape(cos)
        node = x.producer()
        while is_op(node, *_SCALES) and node is not None and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        if (
            node is None
            or not is_op(node, "Transpose")
            or list(attribute(node, "perm", [])) != [0, 2, 1, 3]
        ):
            return False
        if len(shape) != 4 or shape[3] != 2 * half or 0 in shape:
            return False
        return shape[2] == angles[2] > 1 and angles[0] in (1, shape[0])

    def _angles(self, cos: ir.Value, sin: ir.Value, half: int) -> bool:
        """Whether these are cosine and sine of the same angles, twice side by side, for all heads."""
        a, b = (_twice(value, kind) for value, kind in ((cos, "Cos"), (sin, "Sin")))
        shapes = (self._shape(cos), self._shape(sin))
        if a is None or a is not b or shapes[0] != shapes[1] or len(shapes[0]) != 4:
            return False
        return shapes[0][1] == 1 and shapes[0][3] == 2 * half and self._shape(a)[-1:] == (half,)


def _factors(value: ir.Value | None) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The operands of a product that only the embedding reads, in both orders."""
    node = None if value is None or sole_user(value) is None else value.producer()
    if node is None or not is_op(node, "Mul"):
        return
    a, b = node.inputs
    if a is not None and b is not None:
        yield a, b
        yield b, a


def _rotated(value: ir.Value, x: ir.Value) -> int:
    """The size of a half, if a value is the upper half of `x`, negated, and then its lower one; else 0."""
    node = value.producer()
    if (
        node is None
        or not is_op(node, "Concat")
        or len(node.inputs) != 2
        or sole_user(value) is None
    ):
        return 0
    if attribute(node, "axis", 0) not in (-1, 3):
        return 0
    negated, low = (part.producer() if part is not None else None for part in node.inputs)
    if negated is None or not is_op(negated, "Neg") or low is None or negated.inputs[0] is None:
        return 0
    high = negated.inputs[0].producer()
    if high is not None and high is low and is_op(low, "Split"):
        return _split(low, negated.inputs[0], node.inputs[1], x)
    upper, lower = _slice(high, x), _slice(low, x)
    if upper is None or lower is None or lower[0] != 0 or lower[1] != upper[0]:
        return 0
    return lower[1] if upper[1] >= 2 * lower[1] else 0


def _split(node: ir.Node, high: ir.Value, low: ir.Value | None, x: ir.Value) -> int:
    sizes = ints(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.inputs[0] is not x or attribute(node, "axis", 0) not in (-1, 3) or sizes is None:
        return 0
    whole = len(sizes) == 2 and sizes[0] == sizes[1] and list(node.outputs) == [low, high]
    return sizes[0] if whole else 0


def _slice(node: ir.Node | None, x: ir.Value) -> tuple[int, int] | None:
    """Start and end of a Slice of the last axis of `x`, both counted from the front."""
    if node is None or not is_op(node, "Slice") or node.inputs[0] is not x or len(node.inputs) < 4:
        return None
    start, end, axis, step = (ints(value) for value in (*node.inputs[1:5], *[None] * 4)[:4])
    plain = len(node.inputs) < 5 or node.inputs[4] is None or step == (1,)
    if start is None or end is None or axis not in ((-1,), (3,)) or not plain:
        return None
    return (start[0], end[0]) if start[0] >= 0 and end[0] > 0 else None


def _twice(value: ir.Value | None, kind: str) -> ir.Value | None:
    """The angles of which two copies, side by side, went into a cosine or sine; None if it is no such thing."""
    seen = False
    for _ in range(_STEPS):
        node = None if value is None else value.producer()
        if node is None:
            return None
        if is_op(node, "Concat"):
            same = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
            last = attribute(node, "axis", 0) == -1
            return node.inputs[0] if seen and same and last else None
        if is_op(node, kind) and not seen:
            seen = True
        elif is_op(node, "Mul") and seen is False:
            if scalar(node.inputs[1]) is None:
                return None
        elif is_op(node, "Unsqueeze"):
            if ints(node.inputs[1] if len(node.inputs) > 1 else None) != (1,) and tuple(
                attribute(node, "axes", ())
            ) != (1,):
                return None
        elif not is_op(node, "Cast", "Identity"):
            return None
        value = node.inputs[0]
    return None


def _write(graph: ir.Graph, names: Names, those: list[_Rotary]) -> None:
    first = those[0]
    base = first.cos.name

    def step(op_type: str, inputs: list[ir.Value], part: str, **attributes: Any) -> ir.Value:
        return add_node(
            names, op_type, inputs, before=first.add, name=f"{base}_{part}", output=f"{base}_{part}", attributes=attributes
        ).outputs[0]  # fmt: skip

    def const(part: str, values: Any) -> ir.Value:
        return add_initializer(graph, names, f"{base}_{part}", np.array(values, np.int64))

    begin, end, axis = const("begin", [0]), const("half", [first.half]), const("axis", [3])
    flat = const("flat", [-1, first.half])
    tables = []
    for value, part in ((first.cos, "cos"), (first.sin, "sin")):
        lower = step("Slice", [value, begin, end, axis], f"{part}_half")
        tables.append(step("Reshape", [lower, flat], f"{part}_table"))
    where = const("where", [0, 2])  # batch and length
    own = step("Gather", [step("Shape", [first.cos], "shape"), where], "sizes")
    wanted = step("Gather", [step("Shape", [first.x], "heads"), where], "wanted")
    count = step("ReduceProd", [own], "count", keepdims=0)
    rows = step("Range", [const("zero", 0), count, const("one", 1)], "rows")
    ids = step("Expand", [step("Reshape", [rows, own], "grid"), wanted], "ids")
    for rotary in those:
        add = rotary.add
        made = add_node(
            names, "RotaryEmbedding", [rotary.x, ids, *tables], before=add, domain=MS, name=f"{add.name}_rotary",
            output=f"{add.outputs[0].name}_rotary",
        )  # fmt: skip
        made.outputs[0].type, made.outputs[0].shape = add.outputs[0].type, add.outputs[0].shape
        supersede(add.outputs[0], made.outputs[0])
        graph.remove(add, safe=True)
