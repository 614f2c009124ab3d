"""What the layers of an encoder that stand on each other share: batch, length and masks, for ORT's integer attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import Names, add_initializer, add_node
from qcompile.graph.visible import LEAST, Seen

_HALF = LEAST / 2
_FAR = 400  # values between two layers


class Stack:
    """Layers on top of each other: their inputs are of one batch and one length, which are asked for once."""

    def __init__(self, graph: ir.Graph, names: Names, x: ir.Value, place: ir.Node) -> None:
        """`x` goes into the first layer; nodes are written before `place`."""
        self._graph, self._names, self._place, self._base = graph, names, place, x.name
        self._masks: dict[tuple[ir.Value, str], ir.Value] = {}
        self._made: set[ir.Value] = set()
        shape = self._step("Shape", [x], "shape")
        self.batch, more, self._pads = self._missing(shape)
        sizes = self._step("Gather", [shape, self._const("order", [0, 1, 1])], "sizes")
        extra = self._step("Concat", [more, self._const("none", [0, 0])], "extra", axis=0)
        self._sizes = self._step("Add", [sizes, extra], "square")  # batch, length, length

    def _missing(self, shape: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The batch of a shape of rank 3; how many samples to add, one where it is empty; and these as pads.

        An empty batch ends the process in QAttention: it gets one of zeros, which is cut off again.
        """
        batch = self._step("Gather", [shape, self._const("first", [0])], "batch")
        empty = self._step("Equal", [batch, self._const("nothing", [0])], "empty")
        more = self._step("Cast", [empty], "more", to=int(ir.DataType.INT64))
        ends = self._const("before", [0, 0, 0]), self._const("after", [0, 0])
        return batch, more, self._step("Concat", [ends[0], more, ends[1]], "pads", axis=0)

    def holds(self, x: ir.Value) -> bool:
        """Whether `x` is made of what a layer of this stack gives."""
        waiting, seen = [x], {x}
        while waiting and len(seen) < _FAR:
            value = waiting.pop(0)
            if value in self._made:
                return True
            node = value.producer()
            before = [] if node is None else [v for v in node.inputs if v is not None]
            waiting += [v for v in before if v not in seen and not v.is_initializer()]
            seen.update(before)
        return False

    def _step(self, op_type: str, inputs: list[ir.Value], part: str, **attributes: Any) -> ir.Value:
        return add_node(
            self._names, op_type, inputs, before=self._place, name=f"{self._base}_{part}", output=f"{self._base}_{part}",
            attributes=attributes,
        ).outputs[0]  # fmt: skip

    def _const(self, part: str, values: Any, kind: Any = np.int64) -> ir.Value:
        return add_initializer(
            self._graph, self._names, f"{self._base}_{part}", np.array(values, kind)
        )

    def filled(self, codes: ir.Value, before: ir.Node) -> ir.Value:
        """Codes of a batch that is not empty."""
        self._place = before
        made = self._step("Pad", [codes, self._pads], "filled")
        made.type = codes.type
        return made

    def cut(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """The result for the batch that there is."""
        self._place = before
        ends = self._const("begin", [0]), self._const("axis", [0])
        made = self._step("Slice", [value, ends[0], self.batch, ends[1]], "cut")
        self._made.add(made)
        return made

    def visible(self, seen: Seen) -> ir.Value:
        """Ones and zeros (batch, query, key), int32."""
        key = (seen.value, seen.kind)
        if key not in self._masks:
            self._masks[key] = self._visible(seen)
        return self._masks[key]

    def _visible(self, seen: Seen) -> ir.Value:
        open_ = seen.value
        if seen.kind == "hidden":
            open_ = self._step("Not", [open_], "open")
        elif seen.kind == "added":
            open_ = self._step("Greater", [open_, self._const("half", _HALF, np.float32)], "open")
        whole = self._step("Cast", [open_], "visible", to=int(ir.DataType.INT32))
        # no Squeeze: its axes moved at opset 13
        flat = self._step("Gather", [whole, self._const("only", 0)], "rows", axis=1)
        pads = self._missing(self._step("Shape", [flat], "seen"))[2]
        flat = self._step("Pad", [flat, pads], "padded")
        return self._step("Expand", [flat, self._sizes], "all")
