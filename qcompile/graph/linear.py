"""Products of an activation with a constant matrix, wherever they stand and however they are written.

    kind      node                                   as the product x W', W of shape (N, K)
    matmul    MatMul(x, W') or MatMul(W, x)          the second is (x' W')', for x of two axes
    gemm      Gemm(x, W', C)                         transA, transB, alpha, beta as the node has them
    einsum    Einsum(x, W), see `graph.equation`     several contracted or free axes count as one
    conv      Conv(x, W) of 1 by 1 kernels           channels last; pays rarely, so callers opt in
    gather    Gather(W, ids) on axis 0               rows of the table W; a tied head reads the same W

`find_linears` reads no weights: shapes come from metadata, and `Linear.read` maps what a file holds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from qcompile.graph.chain import Stored, follow
from qcompile.graph.edit import attribute, graphs, is_op, rank
from qcompile.graph.equation import Product, as_product

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Kind = Literal["matmul", "gemm", "einsum", "conv", "gather"]

LEAST_DEPTH = 16
"""The least K: a block of scales has 16 weights at least, so a shorter row would be mostly padding."""

_TYPES = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
)  # of activations that MatMulNBits takes on the CPU
_KINDS: dict[str, Kind] = {
    "MatMul": "matmul", "Gemm": "gemm", "Einsum": "einsum", "Conv": "conv", "Gather": "gather",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """One such node.

    Attributes:
        node: the node.
        kind: what it is.
        weight: where the matrix is stored, read as (N, K); None where there is a reason and no matrix.
        x: which input of the node is the activation (the indices of a gather).
        reason: why it cannot have weights of a few bits, or None.
        product: of an einsum.
        free: of an einsum, the sizes of the axes that make up N.
        shared: names of the other nodes that read the same matrix, those with a reason left out.
    """

    node: ir.Node
    kind: Kind
    weight: Stored | None
    x: int
    reason: str | None = None
    product: Product | None = None
    free: tuple[int, ...] = ()
    shared: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the node; one without a name is called `Type:output`, as `NameNodes` does."""
        return self.node.name or f"{self.node.op_type}:{self.node.outputs[0].name}"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K); only without a reason."""
        assert self.reason is None and self.weight is not None
        rows, depth = self.weight.shape
        return rows, depth

    @property
    def nbytes(self) -> int:
        """Bytes of the stored float weight, counted once however many nodes share it."""
        return 0 if self.weight is None else self.weight.tensor.nbytes

    @property
    def left(self) -> bool:
        """Whether the matrix is the first operand of a MatMul."""
        return self.kind == "matmul" and self.x == 1

    @property
    def rarely_pays(self) -> bool:
        """Whether the rewrite costs two Transposes of activations, as for a convolution."""
        return self.kind == "conv" or self.left

    def read(self) -> npt.NDArray[np.float32]:
        """W, float32 (N, K); a view of the stored numbers if these are float32."""
        assert self.weight is not None
        return self.weight.read()


def find_linears(model: ir.Model) -> list[Linear]:
    """Every product of an activation with a constant, in graph order: main graph, bodies, then functions.

    Those that cannot have weights of a few bits are listed with a reason. Products of two activations, constants that
    nothing but constants meet, convolutions of larger kernels and tables of integers are no linears.
    """
    found = [made for graph in graphs(model) for node in graph if (made := linear(node))]
    for function in model.functions.values():
        reason = (
            f"it stands in the function {function.name!r}, which can store no weights: inline it"
        )
        for graph in (function.graph, *function.graph.subgraphs()):
            found += [
                dataclasses.replace(made, reason=made.reason or reason)
                for node in graph
                if (made := linear(node))
            ]
    readers: dict[object, list[str]] = {}
    for item in found:
        if item.reason is None and item.weight is not None:
            readers.setdefault(item.weight.key, []).append(item.name)
    return [dataclasses.replace(item, shared=_others(item, readers)) for item in found]


def _others(item: Linear, readers: dict[object, list[str]]) -> tuple[str, ...]:
    if item.reason is not None or item.weight is None:
        return ()
    return tuple(name for name in readers[item.weight.key] if name != item.name)


def linear(node: ir.Node) -> Linear | None:
    """The node as a product with a constant matrix, with a reason if it is of no use; None if it is none."""
    if not is_op(node, *_KINDS) or len(node.inputs) < 2:
        return None
    kind = _KINDS[node.op_type]
    if kind == "gather":
        sides = [follow(node.inputs[0])]
    elif kind == "conv":
        if not _is_pointwise(node):
            return None
        sides = [None, follow(node.inputs[1])]
    else:
        sides = [follow(value) for value in node.inputs[:2]]
    if any(
        isinstance(side, Stored) for side in sides
    ):  # an input with a default is fed like any other
        sides = [side if isinstance(side, Stored) else None for side in sides]
    constant = [i for i, side in enumerate(sides) if side is not None]
    if len(constant) != 1:  # two activations, or a product of constants: folding is not our task
        return None
    at = constant[0]
    side, x = sides[at], 1 - at
    if isinstance(side, str):
        return Linear(node, kind, None, x, side)
    assert side is not None
    if kind == "gather":
        if (
            side.dtype not in (*_TYPES, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)
            or len(side.shape) < 2
        ):
            return None  # a list of sizes, or of integers
        if isinstance(follow(node.inputs[1]), Stored):
            return None
    return _checked(_FINDERS[kind](node, side, x))


def _checked(item: Linear) -> Linear:
    """The item with what may be wrong with any kind of weight."""
    weight = item.weight
    assert weight is not None
    reason = item.reason
    if weight.dtype not in _TYPES:
        reason = f"its weight is {weight.dtype.name}; kernels for weights of a few bits take FLOAT and FLOAT16"
    elif reason is None and 0 in weight.shape:
        reason = "its weight is empty"
    elif reason is None and weight.shape[1] < LEAST_DEPTH:
        reason = f"its depth {weight.shape[1]} is less than a block of {LEAST_DEPTH} weights"
    elif reason is None and item.kind != "gather" and rank(item.node.inputs[item.x]) == 1:
        reason = "its input has one axis"
    return dataclasses.replace(item, reason=reason)


def _matmul(node: ir.Node, weight: Stored, x: int) -> Linear:
    if len(weight.shape) != 2:
        batched = "has one axis" if len(weight.shape) < 2 else f"has {len(weight.shape)} axes"
        return Linear(node, "matmul", weight, x, f"its weight {batched}, kernels take two")
    if x == 0:
        return Linear(node, "matmul", weight.transposed(1, 0), x)  # (K, N) -> (N, K)
    reason = None
    if rank(node.inputs[1]) != 2:
        reason = "its weight is the first operand, and its input is not known to have two axes"
    return Linear(node, "matmul", weight, x, reason)


def _gemm(node: ir.Node, weight: Stored, x: int) -> Linear:
    reason = None
    if x == 1:
        reason = "its weight is the first operand"
    elif len(weight.shape) != 2:
        reason = f"its weight has {len(weight.shape)} axes, not two"
    elif attribute(node, "alpha", 1.0) == 0:
        reason = "its alpha is 0"
    if reason is None and not attribute(node, "transB", 0):
        weight = weight.transposed(1, 0)  # (K, N) -> (N, K)
    return Linear(node, "gemm", weight, x, reason)


def _einsum(node: ir.Node, weight: Stored, x: int) -> Linear:
    product = as_product(attribute(node, "equation", ""), 1 - x)
    if isinstance(product, str):
        return Linear(node, "einsum", weight, x, product)
    if len(product.perm) != len(weight.shape):
        return Linear(node, "einsum", weight, x, "its equation does not fit the axes of its weight")
    weight = weight.transposed(*product.perm)  # (free..., contracted...)
    free = weight.shape[: product.free]
    weight = weight.reshaped(math.prod(free), math.prod(weight.shape[product.free :]))
    return Linear(node, "einsum", weight, x, product=product, free=free)


def _conv(node: ir.Node, weight: Stored, x: int) -> Linear:
    return Linear(node, "conv", weight.reshaped(*weight.shape[:2]), x)  # (N, K, 1, 1) -> (N, K)


def _is_pointwise(node: ir.Node) -> bool:
    """Whether a Conv has kernels of one element, one group, and steps nowhere."""
    weight = follow(node.inputs[1])
    if isinstance(weight, Stored) and not (len(weight.shape) > 2 and set(weight.shape[2:]) == {1}):
        return False
    if not isinstance(weight, Stored) and set(attribute(node, "kernel_shape", (0,))) != {1}:
        return False
    ones, zeros = set(attribute(node, "strides", (1,))), set(attribute(node, "pads", (0,)))
    return ones == {1} and zeros == {0} and attribute(node, "group", 1) == 1


def _gather(node: ir.Node, weight: Stored, x: int) -> Linear:
    reason = None
    if len(weight.shape) != 2:
        reason = f"its table has {len(weight.shape)} axes, not two"
    elif attribute(node, "axis", 0) % 2:
        reason = "it looks up columns"
    return Linear(node, "gather", weight, x, reason)


_FINDERS = {
    "matmul": _matmul, "gemm": _gemm, "einsum": _einsum, "conv": _conv, "gather": _gather,
}  # fmt: skip
