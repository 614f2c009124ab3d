"""A float graph with one node of interest, under construction."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from qcompile.targets.schema import OpRow

Array = npt.NDArray[Any]
SUBJECT = "subject"  # the name of the node that the row speaks of


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph with the row's node in it, and one feed.

    Attributes:
        row: the row that it belongs to.
        name: shape and context, for people.
        model: the float model; the row's node is named `SUBJECT`.
        feed: standard normal numbers.
        macs: multiply-accumulates of that node in one run.
        context: the node reads what a Conv made, so that ORT may keep its tensors in NHWC.
    """

    row: OpRow
    name: str
    model: ir.Model
    feed: dict[str, Array]
    macs: float = 0.0
    context: bool = False


class Graph:
    """A float graph under construction: weights are drawn in the order they are asked for."""

    def __init__(self) -> None:
        self.tape = Tape()
        self.inputs: list[ir.Value] = []
        self.feed: dict[str, Array] = {}
        self.rng = np.random.default_rng(0)
        self.context = False

    def input(self, *shape: int) -> ir.Value:
        name = f"x{len(self.inputs)}"
        self.feed[name] = self.rng.standard_normal(shape, np.float32)
        kind = ir.TensorType(ir.DataType.FLOAT)
        self.inputs.append(ir.Value(name=name, type=kind, shape=ir.Shape(shape)))
        return self.inputs[-1]

    def ids(self, count: int, limit: int) -> ir.Value:
        name = f"x{len(self.inputs)}"
        self.feed[name] = self.rng.integers(0, limit, (1, count), np.int64)
        kind = ir.TensorType(ir.DataType.INT64)
        self.inputs.append(ir.Value(name=name, type=kind, shape=ir.Shape((1, count))))
        return self.inputs[-1]

    def constant(self, values: Any, dtype: Any = np.float32) -> ir.Value:
        name = f"c{len(self.tape.initializers)}"
        return self.tape.initializer(ir.Tensor(np.asarray(values, dtype), name=name), name)

    def weight(self, *shape: int) -> ir.Value:
        fan_in = float(np.prod(shape[1:], dtype=np.float64))
        return self.constant(self.rng.standard_normal(shape) / np.sqrt(fan_in))

    def op(
        self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any
    ) -> list[ir.Value]:
        results = self.tape.op_multi_out(
            op_type, inputs, attributes or None, num_outputs=outputs, name=SUBJECT
        )
        return list(results)

    def behind_conv(self, *shape: int) -> ir.Value:
        """The output of a Conv, of this shape."""
        self.context = True
        x, w = self.input(*shape), self.weight(shape[1], shape[1], 1, 1)
        return self.tape.op("Conv", (x, w), {"kernel_shape": [1, 1]}, name="before")

    def before_conv(self, value: ir.Value, channels: int) -> ir.Value:
        """The output of a Conv that reads `value`."""
        w = self.weight(channels, channels, 1, 1)
        return self.tape.op("Conv", (value, w), {"kernel_shape": [1, 1]}, name="after")

    def case(self, row: OpRow, name: str, outputs: Sequence[ir.Value], macs: float = 0.0) -> Case:
        for i, value in enumerate(outputs):
            value.name, value.type = f"y{i}", ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            self.inputs, outputs, nodes=self.tape.nodes, initializers=self.tape.initializers,
            opset_imports={"": 17}, name="probe",
        )  # fmt: skip
        return Case(row, name, ir.Model(graph, ir_version=8), self.feed, macs, self.context)
