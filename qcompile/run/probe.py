"""Types and shapes as ONNX Runtime sees them: inference that never gives up.

onnx's shape inference stops at custom operators and at shapes computed at run time. Here the model
is loaded with every value as an output, which tells the types, and run once on a real feed with
`Shape` of each, which tells the shapes. Nothing large is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError
from qcompile.graph.edit import Names
from qcompile.run.session import Feed, Options, Session

_NOT_TENSORS = ("Sequence", "Optional", "SplitToSequence", "ConcatFromSequence", "StringSplit")


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is known of one value: its dtype and, if it was computed for the feed, its shape."""

    dtype: np.dtype[Any] | None
    shape: tuple[int, ...] | None

    @property
    def elements(self) -> int:
        """The number of elements, 0 if the shape is unknown."""
        return 0 if self.shape is None else int(np.prod(self.shape, dtype=np.int64))


def probe(model: ir.Model, feed: Feed | None) -> Mapping[str, Fact]:
    """A fact for each value of the main graph, its inputs included.

    With `feed` None only the types are found.
    """
    values = [
        value
        for node in model.graph
        if not node.op_type.startswith(_NOT_TENSORS)
        for value in node.outputs
        if value.name and not isinstance(value.type, ir.SequenceType | ir.OptionalType)
    ]
    clone = model.clone()
    names = Names(clone)
    by_name = {value.name: value for node in clone.graph for value in node.outputs}
    shapes: dict[str, str] = {}
    outputs = {value.name for value in clone.graph.outputs}
    for value in values:
        copy = by_name[value.name]
        shape = ir.node("Shape", [copy], num_outputs=1, name=names.fresh("probe_shape"))
        shape.outputs[0].name = names.fresh(f"{value.name}_shape")
        shape.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        clone.graph.append(shape)
        clone.graph.outputs.append(shape.outputs[0])
        assert shape.outputs[0].name is not None and value.name is not None
        shapes[value.name] = shape.outputs[0].name
        if value.name not in outputs:
            clone.graph.outputs.append(copy)
    try:
        session = Session(clone, Options("off"))
    except ModelError:
        return _declared(model, feed)
    facts: dict[str, Fact] = {}
    types = {info.name: info.dtype for info in session.outputs}
    found: dict[str, tuple[int, ...]] = {}
    if feed is not None:
        results = session.run(feed, list(shapes.values()))
        found = {name: tuple(map(int, r)) for name, r in zip(shapes, results, strict=True)}
    for value in values:
        assert value.name is not None
        facts[value.name] = Fact(types.get(value.name), found.get(value.name))
    facts.update(_inputs(session, feed))
    return facts


def _inputs(session: Session, feed: Feed | None) -> dict[str, Fact]:
    return {
        info.name: Fact(
            info.dtype, None if feed is None or info.name not in feed else np.shape(feed[info.name])
        )
        for info in session.inputs
    }


def _declared(model: ir.Model, feed: Feed | None) -> dict[str, Fact]:
    """What the model itself says, where ORT does not load it with extra outputs."""
    facts = {}
    for node in model.graph:
        for value in node.outputs:
            shape = value.shape
            known = shape is not None and all(isinstance(d, int) for d in shape)
            dims = tuple(int(d) for d in shape) if known and shape is not None else None  # type: ignore[arg-type]
            dtype = None
            if value.dtype is not None and value.dtype != ir.DataType.UNDEFINED:
                dtype = value.dtype.numpy()
            if value.name:
                facts[value.name] = Fact(dtype, dims)
    for value in model.graph.inputs:
        if value.name:
            data = None if feed is None else feed.get(value.name)
            facts[value.name] = Fact(
                None if value.dtype is None else value.dtype.numpy(),
                None if data is None else np.shape(data),
            )
    return facts
