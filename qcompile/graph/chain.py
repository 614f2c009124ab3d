"""Constant tensors as operators read them: where they are stored, and the moves between there and the reader.

Exporters leave weights behind Constant, Identity, Cast, Transpose, Reshape, Squeeze, Unsqueeze and Flatten. `follow` goes
back through these and reads nothing; shapes are found by moving an array that has strides of 0 and one number.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import attribute, is_op

if TYPE_CHECKING:
    import numpy.typing as npt

Move = tuple[str, tuple[int, ...]]  # ("transpose", perm) or ("reshape", shape)

_FLOATS = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}

_SIGN_AND_REST = np.int32(0x0FFFFFFF - (1 << 31))  # all bits but those that the sign was spread to
_NO_FLOAT16 = 65536.0  # 2**16 has the exponent that float16 keeps for what is no number


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A constant tensor as it is read.

    Attributes:
        root: the initializer, or the result of the Constant node, that holds the numbers.
        tensor: the numbers; read only by `read`.
        moves: from the stored shape to the one that is read. None is a no-op, and no two neighbours could be one.
        casts: float types that the numbers are rounded to on the way, in order.
        shape: after the moves.
    """

    root: ir.Value
    tensor: ir.TensorProtocol
    moves: tuple[Move, ...]
    casts: tuple[ir.DataType, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> ir.DataType:
        """The element type that the reader sees."""
        return self.casts[-1] if self.casts else self.tensor.dtype

    @property
    def key(self) -> tuple[ir.Value, tuple[Move, ...]]:
        """Equal for readers that see the same numbers in the same places."""
        return self.root, self.moves

    def transposed(self, *perm: int) -> Stored:
        """The tensor with its axes in the order `perm`."""
        moves, shape = self.moves, tuple(self.shape[axis] for axis in perm)
        if moves and moves[-1][0] == "transpose":
            perm = tuple(moves[-1][1][axis] for axis in perm)
            moves = moves[:-1]
        if perm != tuple(range(len(perm))):
            moves = (*moves, ("transpose", perm))
        return dataclasses.replace(self, moves=moves, shape=shape)

    def reshaped(self, *shape: int) -> Stored:
        """The tensor in another shape of the same size, without -1."""
        if shape == self.shape:
            return self
        moves = self.moves
        if moves and moves[-1][0] == "reshape":
            moves = moves[:-1]
        before = dataclasses.replace(self, moves=moves).moved_shape()
        if shape != before:
            moves = (*moves, ("reshape", shape))
        return dataclasses.replace(self, moves=moves, shape=shape)

    def moved_shape(self) -> tuple[int, ...]:
        """The shape that follows from the moves."""
        shape = tuple(int(dim) for dim in self.tensor.shape.numpy())
        for kind, numbers in self.moves:
            shape = numbers if kind == "reshape" else tuple(shape[axis] for axis in numbers)
        return shape

    def read(self) -> npt.NDArray[np.float32]:
        """The numbers, float32, of `shape`.

        A view of the stored ones, mapped from a file, unless they have another type or are reshaped after a transpose.
        """
        return self.cast(self.moved())

    def moved(self) -> npt.NDArray[Any]:
        """The numbers as they are stored, of `shape`: a view unless they are reshaped after a transpose."""
        values: npt.NDArray[Any] = self.tensor.numpy()
        for kind, numbers in self.moves:
            values = values.transpose(numbers) if kind == "transpose" else values.reshape(numbers)
        return values

    def cast(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Some of the stored numbers as the reader sees them, float32."""
        for cast in self.casts:
            values = _as(values, _FLOATS[cast])
        return _as(values, np.dtype(np.float32))


def _as(values: npt.NDArray[Any], kind: np.dtype[Any]) -> npt.NDArray[Any]:
    """The numbers rounded to another type: as `astype` does, which widens float16 five times as slowly."""
    if values.dtype != np.float16 or kind != np.float32:
        return values.astype(kind, copy=False)
    bits = values.view(np.int16).astype(np.int32)  # the sign fills the upper half
    bits <<= 13  # the exponent's lowest bit and the fraction are where float32 has them
    bits &= _SIGN_AND_REST
    wide: npt.NDArray[np.float32] = bits.view(np.float32)
    wide *= np.float32(2.0**112)  # biases are 127 and 15; subnormal numbers become normal, exactly
    top = max(wide.max(initial=0), -wide.min(initial=0))
    return wide if top < _NO_FLOAT16 else values.astype(kind)  # infinities and NaN


def follow(value: ir.Value | None) -> Stored | str | None:
    """What `value` reads: a constant, the reason why it is none that can be used, or None for an activation."""
    if value is None:
        return None
    if value.is_initializer():
        if value.const_value is None:
            return None
        if value.is_graph_input():
            return f"its weight {value.name!r} is also a graph input, which a caller may override"
        return _stored(value, value.const_value)
    node = value.producer()
    if is_op(node, "Constant"):
        assert node is not None
        tensor = _constant(node)
        return None if tensor is None else _stored(value, tensor)
    if not is_op(
        node, "Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"
    ):
        return None
    assert node is not None
    before = follow(node.inputs[0])
    return _step(node, before) if isinstance(before, Stored) else before


def _stored(value: ir.Value, tensor: ir.TensorProtocol) -> Stored:
    return Stored(value, tensor, (), (), tuple(int(dim) for dim in tensor.shape.numpy()))


def _constant(node: ir.Node) -> ir.TensorProtocol | None:
    """The numbers of a Constant node."""
    for name in ("value", "value_float", "value_floats"):
        attr = node.attributes.get(name)
        if attr is not None and not attr.is_ref():
            return (
                attr.as_tensor() if name == "value" else ir.tensor(np.array(attr.value, np.float32))
            )
    return None


def _step(node: ir.Node, before: Stored) -> Stored | str | None:
    """One operator further."""
    if node.op_type == "Identity":
        return before
    if node.op_type == "Cast":
        to = ir.DataType(attribute(node, "to", 0))
        if to not in _FLOATS or before.dtype not in _FLOATS:
            return f"its weight is cast from {before.dtype.name} to {to.name}"
        return (
            before if to == before.dtype else dataclasses.replace(before, casts=(*before.casts, to))
        )
    if node.op_type == "Transpose":
        return before.transposed(*attribute(node, "perm", range(len(before.shape))[::-1]))
    shape = _new_shape(node, before.shape)
    return "its weight has a shape that is computed" if shape is None else before.reshaped(*shape)


def _new_shape(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that Flatten, Reshape, Squeeze or Unsqueeze gives to a tensor; None if it is computed."""
    probe = np.broadcast_to(np.int8(0), shape)
    if node.op_type == "Flatten":
        axis = attribute(node, "axis", 1)
        axis += len(shape) if axis < 0 else 0
        return int(np.prod(shape[:axis], dtype=int)), int(np.prod(shape[axis:], dtype=int))
    numbers = _numbers(node, "shape" if node.op_type == "Reshape" else "axes")
    if node.op_type == "Squeeze" and numbers is None and len(node.inputs) < 2:
        return np.squeeze(probe).shape
    if numbers is None:
        return None
    if node.op_type == "Squeeze":
        return np.squeeze(probe, numbers).shape
    if node.op_type == "Unsqueeze":
        return np.expand_dims(probe, numbers).shape
    if not attribute(node, "allowzero", 0):
        numbers = tuple(shape[i] if dim == 0 else dim for i, dim in enumerate(numbers))
    return probe.reshape(numbers).shape


def _numbers(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """Constant integers: the second input, or before opset 5 (Reshape) and 13 the attribute."""
    if name in node.attributes:
        return tuple(attribute(node, name, ()))
    found = follow(node.inputs[1]) if len(node.inputs) > 1 else None
    if not isinstance(found, Stored) or found.tensor.dtype not in (
        ir.DataType.INT64,
        ir.DataType.INT32,
    ):
        return None
    return tuple(int(number) for number in found.tensor.numpy().reshape(-1))
