"""Where statistics are taken out of a graph: outputs of the tensors, or of reductions put behind them.

What a large feature map needs is computed behind it by ORT's own kernels, while it is in the cache and in the
layout that convolutions use: the mean, the greatest and the least value of each channel, and a grid of
places for the histogram. Only these come out, a few percent of the values:

    x -> GlobalMaxPool, GlobalAveragePool, ReduceMin (none behind a Relu, whose least value is known),
         Slice(start s // 2, step s), Shape

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

from qcompile.calib.fold import COUNTED, Reduced, fold, fold_reduced
from qcompile.calib.stats import TensorStats
from qcompile.graph.edit import Names, add_initializer, drop_unread, is_op
from qcompile.plan.candidates import clip_bounds
from qcompile.run.probe import Fact
from qcompile.step import Need

_LARGE = 2 * COUNTED  # values above which a feature map is reduced in the graph
_PLACES = 3  # of a grid, at least, along each axis that has as many
_CHANNELS_FIRST = (
    "Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "MaxPool", "AveragePool",
    "GlobalAveragePool", "GlobalMaxPool", "Resize", "DepthToSpace", "SpaceToDepth", "PRelu",
)  # fmt: skip
_UNIT = ("Sigmoid", "HardSigmoid", "Softmax")
_OPSET = 10  # Slice takes its numbers as inputs


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
    """Where a tensor's channels are: axis 1 about convolutions, else the last one."""
    near = [use.node for use in value.uses()]
    for _ in range(8):  # through activations and sums back to a convolution
        node = value.producer()
        if node is None:
            break
        near.append(node)
        ahead = [v for v in node.inputs if v is not None and v.const_value is None]
        if not ahead or node.op_type in ("Reshape", "Transpose", "Flatten", "MatMul", "Gemm"):
            break
        value = ahead[0]
    for node in near:
        if is_op(node, *_CHANNELS_FIRST):
            return 1
        if is_op(node, "MatMul", "Gemm", "LayerNormalization", "Reshape", "Transpose", "Flatten"):
            return -1
    return -1


@dataclasses.dataclass(frozen=True)
class Tap:
    """One tensor, and the outputs that tell of it.

    Attributes:
        need: what is wanted of it.
        axis: of its channels.
        outputs: names, in the order of `roles`.
        roles: `whole`, or those of `Reduced`'s fields that the graph computes.
        floor: its least possible value, if it is reduced.
        bytes: what the outputs take for the sample that its size was taken from.
    """

    need: Need
    axis: int
    outputs: tuple[str, ...]
    roles: tuple[str, ...]
    floor: float
    bytes: int

    def read(
        self, samples: Sequence[Sequence[npt.NDArray[Any]]], counted: int
    ) -> TensorStats | None:
        """Statistics from the outputs of each sample; None if they do not tell all: of NaN or an infinity."""
        if self.roles == ("whole",):
            return fold([arrays[0] for arrays in samples], self.need, self.axis, counted)
        parts = []
        for arrays in samples:
            found = dict(zip(self.roles, arrays, strict=True))
            bottoms = _flat(found["bottoms"]) if "bottoms" in found else None
            peaks, means = _flat(found["peaks"]), _flat(found["means"])
            shape = tuple(map(int, found["shape"]))
            parts.append(Reduced(shape, peaks, means, bottoms, found.get("grid"), self.floor))
        return fold_reduced(parts, self.need)


def _flat(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.reshape(array.shape[:2])


def tapped(
    model: ir.Model, needs: Iterable[Need], facts: Mapping[str, Fact], *, counted: int = COUNTED,
    whole: bool = False,
) -> tuple[ir.Model, list[Tap]]:  # fmt: skip
    """A copy of the model whose outputs tell what is needed, and how to read them.

    Args:
        model: the float model; weights are shared with the copy.
        needs: each of another tensor of the main graph.
        facts: types and sizes.
        counted: values of a tensor and sample in its histogram.
        whole: nothing is reduced in the graph.
    """
    needs = list(needs)
    clone = with_outputs(model, [need.tensor for need in needs])
    values = list(clone.graph.outputs)
    # in the whole graph, as the copy lacks readers
    origins = {v.name: v for v in model.graph.inputs}
    origins |= {v.name: v for node in model.graph for v in node.outputs}
    reducer = _Reducer(clone, counted)
    clone.graph.outputs.clear()
    taps = []
    for need, value in zip(needs, values, strict=True):
        fact = facts.get(need.tensor)
        axis = channel_axis(origins.get(need.tensor, value))
        small = whole or need.gram or reducer.opset < _OPSET
        if not small and fact is not None and axis == 1 and _is_large_map(fact, value):
            taps.append(reducer.tap(need, value, fact))
        else:
            size = 0 if fact is None or fact.dtype is None else fact.elements * fact.dtype.itemsize
            gram = 8 * fact.shape[axis] ** 2 if need.gram and fact and fact.shape else 0
            taps.append(Tap(need, axis, (need.tensor,), ("whole",), -math.inf, size + gram))
            clone.graph.outputs.append(value)
    return clone, taps


def _is_large_map(fact: Fact, value: ir.Value) -> bool:
    return (
        value.producer() is not None
        and fact.dtype == np.float32
        and fact.shape is not None
        and 3 <= len(fact.shape) <= 5
        and fact.elements > _LARGE
        and math.prod(fact.shape[2:]) > 1
    )


class _Reducer:
    """Puts reductions behind the feature maps of a graph."""

    def __init__(self, model: ir.Model, counted: int) -> None:
        self.graph, self.names, self.counted = model.graph, Names(model), counted
        self.opset = model.opset_imports.get("", 1)

    def tap(self, need: Need, value: ir.Value, fact: Fact) -> Tap:
        """A tap of reductions behind `value`."""
        assert fact.shape is not None
        floor, _ = known_bounds(value)
        outputs = {
            "shape": self._add("Shape", [value], ir.DataType.INT64),
            "peaks": self._add("GlobalMaxPool", [value]),
            "means": self._add("GlobalAveragePool", [value]),
        }
        spatial = list(range(2, len(fact.shape)))
        if not math.isfinite(floor):
            outputs["bottoms"] = self._least(value, spatial)
        size = 0
        if need.histogram or need.channels:
            steps = grid_steps(fact.shape, self.counted)
            size = 4 * math.prod(fact.shape[:2]) * math.prod(map(_places, fact.shape[2:], steps))
            ends = [np.iinfo(np.int64).max] * len(spatial)
            numbers = [[step // 2 for step in steps], ends, spatial, steps]
            outputs["grid"] = self._add("Slice", [value, *map(self._numbers, numbers)])
        self.graph.outputs.extend(outputs.values())
        names = tuple(output.name or "" for output in outputs.values())
        return Tap(need, 1, names, tuple(outputs), floor, size)

    def _least(self, value: ir.Value, axes: list[int]) -> ir.Value:
        if self.opset >= 18:
            return self._add("ReduceMin", [value, self._numbers(axes)])
        return self._add("ReduceMin", [value], axes=axes)

    def _numbers(self, numbers: list[int]) -> ir.Value:
        return add_initializer(self.graph, self.names, "qc_tap", np.asarray(numbers, np.int64))

    def _add(
        self, op: str, inputs: list[ir.Value], kind: ir.DataType = ir.DataType.FLOAT, **attributes: list[int],
    ) -> ir.Value:  # fmt: skip
        """The output of a new node right behind the tensor: ORT then need not keep the tensor for long."""
        node = ir.node(op, inputs, attributes=attributes, name=self.names.fresh("qc_tap"))
        producer = inputs[0].producer()
        assert producer is not None
        self.graph.insert_after(producer, node)
        node.outputs[0].name, node.outputs[0].type = self.names.fresh("qc_tap"), ir.TensorType(kind)
        return node.outputs[0]


def grid_steps(shape: Sequence[int], counted: int) -> list[int]:
    """The steps of a grid of about `counted` values in a feature map (N, C, sides...), one a side.

    They are odd, so as not to see only one kind of what transposed convolutions and shuffles alternate,
    and leave three places of a side at least.
    """
    sides, steps, step = shape[2:], [1] * len(shape[2:]), 1
    while math.prod(shape[:2]) * math.prod(map(_places, sides, steps)) > counted:
        step += 2
        wider = [
            step if _places(side, step) >= _PLACES else old
            for side, old in zip(sides, steps, strict=True)
        ]
        if step > max(sides):
            break
        steps = wider
    return steps


def _places(side: int, step: int) -> int:
    return max(0, -(-(side - step // 2) // step))


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
