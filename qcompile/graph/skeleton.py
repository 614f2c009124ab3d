"""A model without its large weights: its bytes, and where ONNX Runtime finds the weights, which are not copied here."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

SHARED_BYTES = 64 << 20
"""Weights of more than this are not copied into a message of protobuf, nor read from a file at once."""
_LEAST = 1024  # bytes: smaller weights stay in, where shape inference reads them
_KINDS = frozenset(
    {
        ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.UINT8,
        ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.INT32, ir.DataType.INT64,
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A serialized model whose large weights stand elsewhere.

    Attributes:
        data: the bytes; large weights are external data of files in `folder`, or of no file.
        folder: of the files that hold weights; None if there are none.
        weights: by name those of no file.
    """

    data: bytes
    folder: Path | None
    weights: Mapping[str, npt.NDArray[Any]]


def skeleton(model: ir.Model) -> Skeleton:
    """The model so; large weights of its main graph that are mapped from a file stay there. It is not changed."""
    fed = set(model.graph.inputs)
    held = [
        (value, value.const_value)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    ]
    folder: Path | None = None
    weights: dict[str, npt.NDArray[Any]] = {}
    try:
        for value, tensor in held:
            # what callers may feed as well has to stay a default value; bodies of If and Loop keep theirs
            moves = value.graph is model.graph and value not in fed and tensor.nbytes >= _LEAST
            moves &= tensor.dtype in _KINDS and bool(
                value.uses()
            )  # ORT drops what nobody reads first
            if isinstance(tensor, ir.ExternalTensor):
                file = Path(tensor.path).resolve()
                folder = file.parent if moves and folder is None else folder
                if moves and file.parent == folder:
                    value.const_value = _elsewhere(tensor, file.name, tensor.offset or 0)
                    continue
            if moves:
                weights[value.name or ""] = np.ascontiguousarray(tensor.numpy())
                value.const_value = _elsewhere(tensor, "weights", 0)
            elif isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        data: bytes = ir.to_proto(model).SerializeToString()
    finally:
        for value, tensor in held:
            value.const_value = tensor
    return Skeleton(data, folder, weights)


def _elsewhere(tensor: ir.TensorProtocol, file: str, offset: int) -> ir.ExternalTensor:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(
        file, offset, tensor.nbytes, tensor.dtype, shape=shape, name=tensor.name or ""
    )


def release(model: ir.Model) -> None:
    """Weights that are mapped from files are let go, and mapped again when they are read; arrays of them stay valid."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                with contextlib.suppress(BufferError):  # somebody looks at it
                    value.const_value.release()
