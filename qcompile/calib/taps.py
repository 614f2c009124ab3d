"""Where statistics are taken out of a graph: outputs of the tensors, or of reductions put behind them.

What a large feature map needs is computed behind it by ORT's own kernels, while it is in the cache and in the
layout that convolutions use: the mean, the greatest and the least value of each channel, and a grid of
places for the histogram. Only these come out, a few percent of the values:

    x -> GlobalMaxPool, GlobalAveragePool, ReduceMin (none behind a Relu, whose least value is known),
         MaxPool(kernel 1, strides s)

Every other tensor becomes an output as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.fold import COUNTED, fold
from qcompile.calib.maps import ROLES, Map, Maps, places
from qcompile.calib.stats import TensorStats
from qcompile.graph.edit import Names, add_initializer, drop_unread, is_op
from qcompile.plan.candidates import clip_bounds
from qcompile.run.probe import Fact
from qcompile.step import Need

_LARGE = 2 * COUNTED  # values above which a feature map is reduced in the graph
_STEPS = ((65, 5), (9, 3), (0, 1))  # of a grid, along sides of so many places or more
_PLACES = 6  # along a side, that a step above those leaves at least
_CHANNELS_FIRST = (
    "Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "MaxPool", "AveragePool",
    "GlobalAveragePool", "GlobalMaxPool", "Resize", "DepthToSpace", "SpaceToDepth", "PRelu",
)  # fmt: skip
_CHANNELS_LAST = ("MatMul", "Gemm", "LayerNormalization")
_BACK = 8  # operators
_UNIT = ("Sigmoid", "HardSigmoid", "Softmax")


def known_bounds(value: ir.Value) -> tuple[float, float]:
    """What its operator alone says of a tensor's range; infinite where it says nothing."""
    node = value.producer()
    if node is None or node.domain:
        return -math.inf, math.inf
    if node.op_type in _UNIT:
        return 0.0, 1.0
    if is_op(node, "Abs", "Sqrt", "Exp"):
        return 0.0, math.inf
    return clip_bounds(node) or (-math.inf, math.inf)


def channel_axis(value: ir.Value) -> int:
    """Where a tensor's channels are: axis 1 about convolutions, else the last one.

    What reads it decides, then what it was made by: through activations and sums back to a convolution.
    """
    readers = [use.node for use in value.uses()]
    if any(is_op(node, *_CHANNELS_FIRST) for node in readers):
        return 1
    if any(is_op(node, *_CHANNELS_LAST) for node in readers):
        return -1
    for _ in range(_BACK):
        node = value.producer()
        if is_op(node, *_CHANNELS_FIRST):
            return 1
        if node is None or is_op(node, *_CHANNELS_LAST, "Reshape", "Transpose", "Flatten"):
            return -1
        ahead = [v for v in node.inputs if v is not None and v.const_value is None]
        if not ahead:
            return -1
        value = ahead[0]
    return -1


@dataclasses.dataclass(frozen=True)
class Whole:
    """A tensor that comes out as it is.

    Attributes:
        need: what is wanted of it; its name is that of the output.
        axis: of its channels.
        bytes: what it takes for the sample that its size was taken from.
    """

    need: Need
    axis: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Taps:
    """How the outputs of a tapped model tell of the tensors that are needed, in the order of the needs.

    Attributes:
        needs: all of them.
        wholes: tensors that come out as they are.
        maps: feature maps that the graph reduces, by rank.
    """

    needs: tuple[Need, ...]
    wholes: tuple[Whole, ...]
    maps: tuple[Maps, ...]

    @property
    def bytes(self) -> dict[str, int]:
        """What the outputs of each tensor take, by its name."""
        sizes = {item.need.tensor: item.bytes for item in self.wholes}
        sizes |= {item.need.tensor: item.bytes for group in self.maps for item in group.maps}
        return {need.tensor: sizes[need.tensor] for need in self.needs}

    @property
    def outputs(self) -> list[str]:
        """The names of all outputs: whole tensors first, then those of `maps`."""
        names = [item.need.tensor for item in self.wholes]
        return names + [name for group in self.maps for name in group.outputs.values()]

    @property
    def shapes(self) -> list[int]:
        """For each output the rank of the shapes that it lists; 0 if it holds values."""
        ranks = [0] * len(self.wholes)
        return ranks + [
            group.rank * (role == "shapes") for group in self.maps for role in group.outputs
        ]

    def read(
        self, samples: Sequence[Sequence[npt.NDArray[Any]]], counted: int
    ) -> list[TensorStats] | None:
        """Statistics of each tensor from the outputs of each sample; None if they do not tell all."""
        found: dict[str, TensorStats] = {}
        for i, item in enumerate(self.wholes):
            stats = fold([arrays[i] for arrays in samples], item.need, item.axis, counted)
            if stats is None:
                return None
            found[item.need.tensor] = stats
        place = len(self.wholes)
        for group in self.maps:
            end = place + len(group.outputs)
            read = group.read(
                [dict(zip(group.outputs, arrays[place:end], strict=True)) for arrays in samples],
                counted,
            )
            if read is None:
                return None
            found |= {m.need.tensor: stats for m, stats in zip(group.maps, read, strict=True)}
            place = end
        return [found[need.tensor] for need in self.needs]


def tapped(
    model: ir.Model, needs: Iterable[Need], facts: Mapping[str, Fact], *, whole: bool = False, shapes: bool = True
) -> tuple[ir.Model, Taps]:  # fmt: skip
    """A copy of the model whose outputs tell what is needed, and how to read them.

    Args:
        model: the float model; weights are shared with the copy.
        needs: each of another tensor of the main graph.
        facts: types and sizes.
        whole: nothing is reduced in the graph.
        shapes: the shapes of feature maps are told; if not, they are taken to be those in `facts`.
    """
    needs = tuple(needs)
    clone = with_outputs(model, [need.tensor for need in needs])
    values = list(clone.graph.outputs)
    # in the whole graph, as the copy lacks readers
    origins = {v.name: v for v in model.graph.inputs}
    origins |= {v.name: v for node in model.graph for v in node.outputs}
    reducer = _Reducer(clone, shapes=shapes)
    clone.graph.outputs.clear()
    wholes = []
    for need, value in zip(needs, values, strict=True):
        fact = facts.get(need.tensor)
        axis = channel_axis(origins.get(need.tensor, value))
        small = whole or need.gram
        if not small and fact is not None and axis == 1 and _is_large_map(fact, value):
            reducer.tap(need, value, fact)
            continue
        size = 0 if fact is None or fact.dtype is None else fact.elements * fact.dtype.itemsize
        gram = 8 * fact.shape[axis] ** 2 if need.gram and fact and fact.shape else 0
        wholes.append(Whole(need, axis, size + gram))
        clone.graph.outputs.append(value)
    return clone, Taps(needs, tuple(wholes), reducer.finish())


def _is_large_map(fact: Fact, value: ir.Value) -> bool:
    return (
        value.const_value is None
        and fact.dtype == np.float32
        and fact.shape is not None
        and 3 <= len(fact.shape) <= 5  # what pooling takes
        and fact.elements > _LARGE
        and math.prod(fact.shape[2:]) > 1
    )


class _Reducer:
    """Puts reductions behind the feature maps of a graph, and joins what they find."""

    def __init__(self, model: ir.Model, *, shapes: bool) -> None:
        self.graph, self.names, self.shapes = model.graph, Names(model), shapes
        self.opset = model.opset_imports.get("", 1)
        self._maps: dict[
            tuple[int, int], list[Map]
        ] = {}  # by rank and N, which must agree to be joined
        self._parts: dict[tuple[int, int], dict[str, list[ir.Value]]] = {}

    def tap(self, need: Need, value: ir.Value, fact: Fact) -> None:
        """Reductions behind `value`."""
        assert fact.shape is not None
        one_sided = known_bounds(value)[0] == 0
        floor = 0.0 if one_sided else -math.inf  # of a Clip from -1, say, -1 need not be reached
        rank = len(fact.shape)
        steps = grid_steps(fact.shape)
        size = math.prod(fact.shape[:2]) * math.prod(map(places, fact.shape[2:], steps))
        item = Map(need, fact.shape, tuple(steps), floor, 4 * size)
        self._maps.setdefault((rank, fact.shape[0]), []).append(item)
        parts = self._parts.setdefault((rank, fact.shape[0]), {role: [] for role in ROLES})
        if self.shapes:
            parts["shapes"].append(self._add("Shape", [value], ir.DataType.INT64))
        parts["peaks"].append(self._add("GlobalMaxPool", [value]))
        parts["means"].append(self._add("GlobalAveragePool", [value]))
        if item.has_bottoms:
            parts["bottoms"].append(self._least(value, list(range(2, rank))))
        grid = self._add("MaxPool", [value], kernel_shape=[1] * (rank - 2), strides=steps)
        parts["grids"].append(self._add("Flatten", [grid]))

    def finish(self) -> tuple[Maps, ...]:
        """What was found of the maps of one rank is one output a role."""
        groups = []
        for key, parts in self._parts.items():
            outputs = {}
            for role, values in parts.items():
                if values:
                    kind = ir.DataType.INT64 if role == "shapes" else ir.DataType.FLOAT
                    joined = self._add("Concat", values, kind, axis=0 if role == "shapes" else 1)
                    self.graph.outputs.append(joined)
                    outputs[role] = joined.name or ""
            groups.append(Maps(key[0], tuple(self._maps[key]), outputs))
        return tuple(groups)

    def _least(self, value: ir.Value, axes: list[int]) -> ir.Value:
        if self.opset >= 18:  # axes became an input
            return self._add("ReduceMin", [value, self._numbers(axes)])
        return self._add("ReduceMin", [value], axes=axes)

    def _numbers(self, numbers: list[int]) -> ir.Value:
        return add_initializer(self.graph, self.names, "qc_tap", np.asarray(numbers, np.int64))

    def _add(
        self, op: str, inputs: list[ir.Value], kind: ir.DataType = ir.DataType.FLOAT, **attributes: Any
    ) -> ir.Value:  # fmt: skip
        """The output of a new node right behind the tensor, which ORT then need not keep for long."""
        node = ir.node(op, inputs, attributes=attributes, name=self.names.fresh("qc_tap"))
        producer = inputs[0].producer()
        if op == "Concat" or not len(self.graph):
            self.graph.append(node)
        elif producer is not None:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        node.outputs[0].name, node.outputs[0].type = self.names.fresh("qc_tap"), ir.TensorType(kind)
        return node.outputs[0]


def grid_steps(shape: Sequence[int]) -> list[int]:
    """The steps of a grid of places in a feature map (N, C, sides...), one a side.

    Small ones, lest the edges, where paddings show, count too much; larger ones in maps of many values. They are odd,
    so as not to see only one kind of what transposed convolutions and shuffles alternate.
    """
    sides = shape[2:]
    steps = [next(step for least, step in _STEPS if side >= least) for side in sides]
    while math.prod(shape[:2]) * math.prod(map(places, sides, steps)) > _LARGE:
        wider = [
            s + 2 if places(side, s + 2) >= _PLACES else s
            for side, s in zip(sides, steps, strict=True)
        ]
        if wider == steps:
            break
        steps = wider
    return steps


def with_outputs(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy of the model that computes these values of the main graph; weights are shared."""
    clone = model.clone()
    by_name = dict(clone.graph.initializers)
    by_name |= {value.name or "": value for node in clone.graph for value in node.outputs}
    by_name |= {value.name or "": value for value in clone.graph.inputs}
    clone.graph.outputs.clear()
    clone.graph.outputs.extend(by_name[name] for name in names)
    drop_unread(clone)
    return clone
