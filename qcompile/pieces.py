"""Candidates cut out of a model, to be timed alone: their signatures, and models that hold many of them.

    x_i -> [feeder] -> node_i -> [Relu] -> y_i        for every i

A feeder makes what the node reads just before, so that it is in the cache as it would be in the model. Where the
model has a Conv before the node, ORT keeps the tensor in the layout of that Conv (blocks of channels as float,
channels-last as integer); then the feeder is a Conv 1x1 of few channels, else a Max of one tensor, which copies.
Likewise a Conv reads the result where the model has one that does: ORT's optimizer may then move the changes of
layout past the node, or may not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.graph.edit import array, is_op, sole_user
from qcompile.plan.candidates import Candidate, Facts, clip_bounds
from qcompile.plan.make import node_costs
from qcompile.run.probe import Fact
from qcompile.targets.schema import Target

Shapes = Mapping[ir.Value, tuple[int, ...]]

_SMALL = 64  # elements of a float constant that is used as it is
_FEW = 4  # channels of the input of a feeding Conv
_MERGED = ("Relu", "Clip", "LeakyRelu", "HardSigmoid")  # in float part of the Conv before, for free
_PASS_ON = ("MaxPool", "GlobalAveragePool", "Concat", "Split", "Slice", "Resize")  # the layout


@dataclasses.dataclass(frozen=True)
class Piece:
    """One candidate cut out.

    Attributes:
        item: the candidate.
        shapes: of the values that it reads and makes.
        fed: the values that it reads in the layout of a Conv.
        summed: as float it is part of one of the Convs before it, which adds the other operand.
        merged: as float it is part of the Conv before it, at no cost.
        onward: what reads its result wants the layout of a Conv.
        cost: nanoseconds that the target expects, as float and integer together.
        key: its signature: pieces of one signature take the same time.
    """

    item: Candidate
    shapes: Shapes
    fed: frozenset[ir.Value]
    summed: bool
    merged: bool
    onward: bool
    cost: float
    key: str

    @property
    def bytes(self) -> int:
        """Of all values, roughly."""
        weights = (array(value) for value in self.item.node.inputs)
        own = sum(w.nbytes for w in weights if w is not None)
        return own + 8 * sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def moved(self) -> list[int]:
        """Elements of each tensor whose layout changes, where the node cannot work in that of the Convs beside it."""
        values = [*self.fed, *(self.item.node.outputs if self.onward and self.fed else ())]
        return [math.prod(self.shapes[value]) for value in values]


def cut_out(
    found: Mapping[str, Candidate | str], target: Target, facts: Facts
) -> Iterator[tuple[str, Piece]]:
    """The candidates whose shapes and constants are known, by name.

    Left out are LSTM and Gather from a table, which no cut weighs, what others absorb, and MaxPool that
    `make_plan` leaves float anyway.
    """
    items = {name: item for name, item in found.items() if isinstance(item, Candidate)}
    absorbed = {node for item in items.values() for node in item.absorbed}
    layouts = _layouts(items.values())
    for name, item in items.items():
        if item.role in ("recurrent", "embedding") or item.node in absorbed:
            continue
        shapes = _shapes(item, facts)
        if shapes is None:
            continue
        summed = _summed(item, shapes)
        fed = frozenset(layouts & {*item.data} if summed or _by_layout(item, shapes) else ())
        if is_op(item.node, "MaxPool") and not fed:
            continue
        merged = item.node.op_type in _MERGED and _alone_behind_conv(item.data[0])
        onward = any(v in layouts for use in item.result.uses() for v in use.node.outputs)
        flags = (summed, merged, onward)
        words = (target.activation, target.weight, flags, *_words(item, shapes, fed))
        key = hashlib.sha256(repr(words).encode()).hexdigest()[:32]
        yield name, Piece(item, shapes, fed, *flags, sum(node_costs(item, facts)), key)


def _shapes(item: Candidate, facts: Facts) -> Shapes | None:
    """Shapes of what a piece reads and makes; None if one is unknown, or something else is computed."""
    shapes = {}
    chain = (item.node, *item.absorbed)
    inner = {node.outputs[0] for node in chain}
    for value in (*item.data, *item.node.outputs, item.result):
        fact = facts.get(value.name or "")
        if fact is None or fact.shape is None or not fact.elements:
            return None
        shapes[value] = fact.shape
    for node in chain:
        for source in node.inputs:
            if source is not None and source not in (*item.data, *inner) and array(source) is None:
                return None
    return shapes


def _layouts(items: Iterable[Candidate]) -> set[ir.Value]:
    """The values that ORT keeps in the layout of a Conv before them."""
    found: set[ir.Value] = set()
    for item in items:
        passes_on = item.role in ("binary", "unary", "free") or item.node.op_type in _PASS_ON
        enough = all if item.role == "concat" else any
        if item.role == "conv" or (passes_on and enough(value in found for value in item.data)):
            found.update((*item.node.outputs, item.result))
    return found


def _by_layout(item: Candidate, shapes: Shapes) -> bool:
    """Whether its time depends on the layout: elementwise operators are fast in any."""
    known = [shapes[value] for value in item.data]
    if any(len(shape) != 4 for shape in known):
        return False
    return item.role not in ("binary", "unary", "free") or len(set(known)) > 1


def _summed(item: Candidate, shapes: Shapes) -> bool:
    a, b = item.data[0], item.data[-1]
    return (
        is_op(item.node, "Add") and item.role == "binary" and a is not b and shapes[a] == shapes[b]
        and len(shapes[a]) == 4 and any(_alone_behind_conv(value) for value in (a, b))
    )  # fmt: skip


def _alone_behind_conv(value: ir.Value) -> bool:
    return is_op(value.producer(), "Conv") and sole_user(value) is not None


def _words(item: Candidate, shapes: Shapes, fed: frozenset[ir.Value]) -> Iterator[object]:
    """What a piece's time depends on: operators, attributes, shapes, integer constants, layouts."""
    order: dict[ir.Value, int] = {}
    for node in (item.node, *item.absorbed):
        yield node.op_type
        yield sorted((a.name, repr(a.value)) for a in node.attributes.values())
        for value in node.inputs:
            values = None if value in item.data else array(value)
            if values is not None:
                numbers = values.tolist() if values.dtype.kind in "iub" else ()
                yield values.dtype.str, values.shape, numbers
            elif value is not None:
                yield order.setdefault(value, len(order)), shapes.get(value), value in fed
            else:
                yield None
        for value in node.outputs:
            yield order.setdefault(value, len(order)), shapes.get(value)


class Collection:
    """A model of independent pieces.

    Names of all that belongs to piece 3 begin with `k3`, those of its feeders with `k3f0`, `k3f1`, and
    of Convs that read it with `k3t0`.

    Attributes:
        facts: types and shapes of all values.
        feed: all inputs.
    """

    def __init__(self, opsets: Mapping[str, int]) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports=dict(opsets), name="pieces")
        self.facts: dict[str, Fact] = {}
        self.feed: dict[str, npt.NDArray[Any]] = {}
        self._bounds: dict[str, tuple[float, float]] = {}
        self._arrays: dict[tuple[int, ...], npt.NDArray[Any]] = {}

    @property
    def model(self) -> ir.Model:
        """The model so far."""
        return ir.Model(self.graph, ir_version=8)

    def range_of(self, name: str) -> tuple[float, float]:
        """A range for the codes of a value: that of the Relu or Clip that made it."""
        low, high = self._bounds.get(name, (-4.0, 4.0))
        return max(low, -4.0), min(high, 4.0)

    def add(self, number: int, piece: Piece) -> None:
        """One more piece."""
        item, name = piece.item, f"k{number}"
        values: dict[ir.Value | None, ir.Value | None] = {None: None}
        for i, old in enumerate(dict.fromkeys(item.data)):
            make = self._conv if old in piece.fed or piece.summed else self._copy
            values[old] = make(f"{name}f{i}", piece.shapes[old])
        for step, node in enumerate((item.node, *item.absorbed)):
            own = f"{name}_{step}" if step else name
            for i, old_input in enumerate(node.inputs):
                if old_input not in values:
                    values[old_input] = self._constant(f"{own}_c{i}", old_input)
            shapes = [piece.shapes.get(v, piece.shapes[item.result]) for v in node.outputs]
            made = self._node(own, node, [values[v] for v in node.inputs], shapes)
            values.update(zip(node.outputs, made, strict=True))
            bounds = clip_bounds(node) if step else None
            if bounds is not None:
                self._bounds[made[0].name or ""] = bounds
        wanted = piece.fed and piece.onward and item.role != "conv"
        for i, value in enumerate(made):
            tail = wanted and len(self.facts[value.name or ""].shape or ()) == 4
            self.graph.outputs.append(self._tail(f"{name}t{i}", value) if tail else value)

    def add_border(self, name: str, shape: tuple[int, int, int, int]) -> None:
        """A Conv between two borders, of (N, C, H, W)."""
        x = self._copy(f"{name}_copy", shape)
        w = self._weight(f"{name}_w", (shape[1], shape[1], 1, 1))
        self.graph.outputs.extend(self._node(name, ir.node("Conv", []), [x, w], [shape]))

    def _conv(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        x = self._input(f"{name}_x", (shape[0], _FEW, *shape[2:]))
        w = self._weight(f"{name}_w", (shape[1], _FEW, 1, 1))
        return self._node(name, ir.node("Conv", []), [x, w], [shape])[0]

    def _tail(self, name: str, x: ir.Value) -> ir.Value:
        shape = self.facts[x.name or ""].shape
        assert shape is not None
        w = self._weight(f"{name}_w", (_FEW, shape[1], 1, 1))
        return self._node(name, ir.node("Conv", []), [x, w], [(shape[0], _FEW, *shape[2:])])[0]

    def _copy(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        return self._node(name, ir.node("Max", []), [self._input(f"{name}_x", shape)], [shape])[0]

    def _node(
        self, name: str, like: ir.Node, inputs: Sequence[ir.Value | None], shapes: Sequence[tuple[int, ...]]
    ) -> Sequence[ir.Value]:  # fmt: skip
        attributes = list(like.attributes.values())
        node = ir.Node("", like.op_type, inputs, attributes, num_outputs=len(shapes), name=name)
        self.graph.append(node)
        for i, (value, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
            self._declare(value, f"{name}_y{i}", shape)
        return node.outputs

    def _input(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        """An input of its own, for ORT would make one feeder of two alike; arrays are shared."""
        value = self._declare(ir.Value(), name, shape)
        self.graph.inputs.append(value)
        if shape not in self._arrays:
            self._arrays[shape] = _noise(shape)
        self.feed[name] = self._arrays[shape]
        return value

    def _declare(self, value: ir.Value, name: str, shape: tuple[int, ...]) -> ir.Value:
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)  # fmt: skip
        self.facts[name] = Fact(np.dtype(np.float32), shape)
        return value

    def _constant(self, name: str, old: ir.Value | None) -> ir.Value:
        """A constant of the node: numbers that matter as they are, large weights at random."""
        values = array(old)
        assert values is not None
        plain = values.dtype != np.float32 or values.size <= _SMALL
        return self._initializer(name, values if plain else _noise(values.shape))

    def _weight(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        return self._initializer(name, _noise(shape))

    def _initializer(self, name: str, values: npt.NDArray[Any]) -> ir.Value:
        tensor = ir.Tensor(values, name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
        value = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _noise(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Numbers in -1..1; what they are does not matter."""
    block = np.random.default_rng(0).uniform(-1, 1, 4099).astype(np.float32)
    made: npt.NDArray[np.float32] = np.resize(block, shape)
    return made
