"""What is added to the product of a linear layer, and in which shape a kernel can take it."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompile.graph.chain import Stored, follow
from qcompile.graph.edit import attribute, is_op, rank, sole_user
from qcompile.graph.linear import Linear
from qcompile.graph.place import Steps


@dataclasses.dataclass(frozen=True)
class Bias:
    """An addend.

    Attributes:
        flat: a constant (N,), which a kernel adds.
        other: one of another shape, or no constant, which an Add must add.
        node: the Add behind the product that it was taken from.
    """

    flat: ir.Value | None = None
    other: ir.Value | None = None
    node: ir.Node | None = None


def find_bias(item: Linear, step: Steps) -> Bias:
    """The addend of a layer; new constants and nodes that it needs are made by `step`.

    C of a Gemm, times beta; the bias of a Conv; an Add of a constant (N,) that alone reads a MatMul or an Einsum.
    """
    node = item.node
    if item.kind in ("matmul", "einsum"):
        return _absorbed(item, step)
    value = node.inputs[2] if len(node.inputs) > 2 else None
    beta = float(attribute(node, "beta", 1.0)) if item.kind == "gemm" else 1.0
    if value is None or beta == 0:
        return Bias()
    found = follow(value)
    if isinstance(found, Stored):
        return _constant(item, found, beta, step)
    if beta != 1:
        value = step("Mul", [value, step.floats("beta", beta)], "scaled_bias")
    return Bias(other=value)


def _absorbed(item: Linear, step: Steps) -> Bias:
    output = item.node.outputs[0]
    user = sole_user(output)
    if item.left or len(item.free) > 1 or user is None or not is_op(user, "Add"):
        return Bias()
    found = follow(user.inputs[1] if user.inputs[0] is output else user.inputs[0])
    assert item.weight is not None
    if user.graph is not item.node.graph or not isinstance(found, Stored):
        return Bias()
    rows, axes = item.shape[0], len(found.shape)
    if found.dtype != item.weight.dtype or found.shape != (1,) * (axes - 1) + (rows,):
        return Bias()
    if axes > 1 and axes > (rank(output) or 0):
        return Bias()  # it may add axes
    return dataclasses.replace(_constant(item, found, 1.0, step), node=user)


def _constant(item: Linear, found: Stored, beta: float, step: Steps) -> Bias:
    """A constant addend: the stored one if it is as the kernel wants it, else a new one."""
    rows, shape = item.shape[0], found.shape
    flat = set(shape[:-1]) <= {1} and shape[-1:] in {(), (1,), (rows,)}
    stored = found.root.is_initializer() and not found.casts and not found.moves
    if beta == 1 and stored and (shape == (rows,) or not flat):
        return Bias(found.root) if flat else Bias(other=found.root)
    values = found.read() * np.float32(beta)
    if flat:
        return Bias(step.floats("bias", np.broadcast_to(values.reshape(-1), (rows,))))
    return Bias(other=step.floats("bias", values))
