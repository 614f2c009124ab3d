"""Which nodes could be integer, in which role, and why the others could not.

Roles: `conv` has 8-bit codes in and out and an 8-bit weight; `binary`, `unary`, `pool`, `concat` map
codes to codes; `same` moves codes about without changing them; `free` only changes what the codes
mean (a product or sum with a number); `dynamic` (MatMul, Gemm) and `recurrent` take floats and find
the scale themselves, and may have an 8-bit weight alone; `embedding` looks up 8-bit rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.graph.edit import array, attribute, is_op, scalar, sole_user
from qcompile.quant.affine import too_small
from qcompile.run.probe import Fact
from qcompile.targets.schema import OpRow, Role, Target

Facts = Mapping[str, Fact]
AnyRole = Role | Literal["free"]

_MOVES = (
    "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split",
    "DepthToSpace", "Gather", "Resize",
)  # fmt: skip


_LSTM_ATTRIBUTES = frozenset(
    {
        "activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size",
        "input_forget", "layout",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A node that can be integer.

    Attributes:
        node: the node.
        role: how it is quantized.
        row: the target's row; None for `free`.
        data: the values that it reads as codes (as floats for `dynamic` and `recurrent`).
        absorbed: nodes after it that become part of it: Relu or Clip as saturation of its output, the
            Add of a bias after a MatMul.
    """

    node: ir.Node
    role: AnyRole
    row: OpRow | None
    data: tuple[ir.Value, ...]
    absorbed: tuple[ir.Node, ...] = ()

    @property
    def block(self) -> int:
        """Weights that share a scale if only the weight of a product is 8-bit; 0: there is no such form."""
        by_itself = is_op(self.node, "Gemm") and attribute(self.node, "alpha", 1.0) == 0
        return 0 if self.row is None or self.role != "dynamic" or by_itself else self.row.block

    @property
    def result(self) -> ir.Value:
        """The value that carries the codes it makes: behind what it absorbs."""
        return (self.absorbed[-1] if self.absorbed else self.node).outputs[0]


def candidate(node: ir.Node, target: Target, facts: Facts) -> Candidate | str:
    """The candidate for a node, or the reason why it stays float."""
    if node.domain not in ("", "ai.onnx"):
        return f"operator of domain {node.domain}"
    if node.op_type in target.refused:
        return target.refused[node.op_type]
    finder = _FINDERS.get(node.op_type)
    if finder is None:
        return "no integer kernel"
    return finder(node, target, facts)


def _is_float32(value: ir.Value | None, facts: Facts) -> bool:
    if value is None or value.name is None:
        return False
    fact = facts.get(value.name)
    if fact is not None and fact.dtype is not None:
        return bool(fact.dtype == np.float32)
    return value.dtype == ir.DataType.FLOAT


def _dtype_reason(value: ir.Value | None, facts: Facts) -> str:
    fact = facts.get(value.name or "") if value is not None else None
    kind = "an unknown type" if fact is None or fact.dtype is None else str(fact.dtype)
    return f"works on {kind}, integer kernels take float32"


def _conv(node: ir.Node, target: Target, facts: Facts) -> Candidate | str:
    x, w = node.inputs[0], node.inputs[1]
    if x is None or not _is_float32(x, facts):
        return _dtype_reason(x, facts)
    if array(x) is not None:
        return "its input is constant"
    weight = array(w)
    if weight is None:
        return "its weight is not constant"
    if len(node.inputs) > 2 and node.inputs[2] is not None and array(node.inputs[2]) is None:
        return "its bias is not constant"
    if weight.size == 0:
        return "its weight is empty"
    if small := too_small(weight):
        return small
    group = attribute(node, "group", 1)
    variant = ""
    if group > 1:
        depthwise = group == weight.shape[0] and weight.shape[1] == 1
        variant = (
            "depthwise" if depthwise else "grouped" if weight.shape[1] >= 16 else "narrow_groups"
        )
    elif weight.shape[1] <= 4:
        variant = "few_inputs"
    row = target.row("Conv", variant)
    assert row is not None
    return Candidate(node, "conv", row, (x,), _saturated(node.outputs[0]))


def _saturated(value: ir.Value) -> tuple[ir.Node, ...]:
    """A Relu or Clip that alone reads `value` and whose bounds include zero."""
    user = sole_user(value)
    if user is None or user.graph is not value.graph:
        return ()
    return (user,) if clip_bounds(user) is not None else ()


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """The bounds of a Relu or a Clip with constant bounds around zero, else None."""
    if is_op(node, "Relu"):
        return 0.0, float("inf")
    if not is_op(node, "Clip"):
        return None
    if len(node.inputs) == 1:  # opset 6
        low = attribute(node, "min", -float("inf"))
        high = attribute(node, "max", float("inf"))
        return (low, high) if low <= 0 <= high else None
    bounds = [-float("inf"), float("inf")]
    for i, value in enumerate(node.inputs[1:3]):
        if value is not None:
            number = scalar(value)
            if number is None:
                return None
            bounds[i] = number
    return (bounds[0], bounds[1]) if bounds[0] <= 0 <= bounds[1] else None


def _linear(node: ir.Node, target: Target, facts: Facts) -> Candidate | str:
    a, b = node.inputs[0], node.inputs[1]
    if a is None or not _is_float32(a, facts):
        return _dtype_reason(a, facts)
    weight = array(b)
    if weight is None:
        if array(a) is not None:
            return "its constant operand is the first one"
        return "both operands are activations"
    if weight.ndim != 2 or weight.size == 0:
        return f"its weight has {weight.ndim} dimensions, the integer kernel takes 2"
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0):
            return "transA is set"
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = array(node.inputs[2])
            if bias is None:
                return "its bias is not constant"
    if not np.isfinite(weight).all():
        return "its weight holds NaN or infinities"
    if small := too_small(weight):
        return small
    row = target.row(node.op_type)
    assert row is not None
    fact = facts.get(node.outputs[0].name or "")
    depth = weight.shape[1] if attribute(node, "transB", 0) else weight.shape[0]
    if fact is not None and fact.shape is not None and fact.elements * depth < row.min_macs:
        return f"too small to gain ({fact.elements * depth} multiply-accumulates)"
    bias_add = _bias_add(node, weight, facts)
    return (
        bias_add if isinstance(bias_add, str) else Candidate(node, "dynamic", row, (a,), bias_add)
    )


def _bias_add(node: ir.Node, weight: npt.NDArray[Any], facts: Facts) -> tuple[ir.Node, ...] | str:
    """The Add of a constant per output channel that alone reads a MatMul; a reason if it is in the way."""
    user = sole_user(node.outputs[0]) if is_op(node, "MatMul") else None
    if user is None or not is_op(user, "Add") or user.graph is not node.graph:
        return ()
    other = user.inputs[1] if user.inputs[0] is node.outputs[0] else user.inputs[0]
    bias = array(other)
    per_channel = (
        bias is not None and bias.shape[-1:] == weight.shape[1:] and bias.size == weight.shape[1]
    )
    if not per_channel or bias is None or bias.dtype != np.float32:
        return ()
    fact = facts.get(node.outputs[0].name or "")
    shape = None if fact is None else fact.shape
    if bias.ndim > (1 if shape is None else max(1, len(shape))):
        return "the bias behind it may add dimensions, which ORT's fusion loses"
    return (user,)


def _recurrent(node: ir.Node, target: Target, facts: Facts) -> Candidate | str:
    row = target.row("LSTM")
    if row is None:
        return "no integer kernel"
    x = node.inputs[0]
    if x is None or not _is_float32(x, facts):
        return _dtype_reason(x, facts)
    weights = [array(value) for value in node.inputs[1:3]]
    for w in weights:
        if w is None:
            return "its weights are not constant"
        if w.ndim != 3 or w.size == 0 or w.dtype != np.float32:
            return f"its weights are {w.dtype} of {w.ndim} dimensions"
        if not np.isfinite(w).all():
            return "its weight holds NaN or infinities"
        if small := too_small(w):
            return small
    if attribute(node, "layout", 0):
        return "layout 1 has no kernel"
    unknown = sorted(node.attributes.keys() - _LSTM_ATTRIBUTES)
    if unknown:
        return f"its kernel has no attribute {unknown[0]}"
    one = sum(w.nbytes // len(w) for w in weights if w is not None)
    if one < row.min_bytes:  # a step costs so little that quantizing the state costs more
        return f"too small to gain ({one} bytes of weights a direction)"
    return Candidate(node, "recurrent", row, (x,))


def _binary(node: ir.Node, target: Target, facts: Facts) -> Candidate | str:
    a, b = node.inputs
    if a is None or b is None or not _is_float32(a, facts) or not _is_float32(b, facts):
        return _dtype_reason(a, facts)
    constants = [array(a) is not None, array(b) is not None]
    if all(constants):
        return "constant"
    if any(constants):
        number = scalar(a if constants[0] else b)
        if number is None:
            return "an operand is a constant tensor"
        if node.op_type == "Mul" and not (1e-6 < number < 1e6):
            return f"a product with {number:g}"
        if not np.isfinite(number):
            return f"an operand is {number}"
        other, c = (b, a) if constants[0] else (a, b)
        known = facts.get(other.name or "")
        if known is not None and known.shape is not None and len(c.shape or ()) > len(known.shape):
            return "its constant adds dimensions"
        if node.op_type == "Add" and is_op(other.producer(), "Sigmoid", "HardSigmoid"):
            return "its input's scale is fixed by the operator"
        return Candidate(node, "free", None, (other,))
    row = target.row(node.op_type)
    assert row is not None
    if not _broadcasts_simply(a, b, facts):
        return "broadcasting of both operands"
    return Candidate(node, "binary", row, (a, b), _saturated(node.outputs[0]))


def _broadcasts_simply(a: ir.Value, b: ir.Value, facts: Facts) -> bool:
    first, second = facts.get(a.name or ""), facts.get(b.name or "")
    if first is None or second is None or first.shape is None or second.shape is None:
        return True
    out = np.broadcast_shapes(first.shape, second.shape)
    return out in (first.shape, second.shape)


def _unary(node: ir.Node, target: Target, facts: Facts) -> Candidate | str:
    x = node.inputs[0]
    if x is None or not _is_float32(x, facts):
        return _dtype_reason(x, facts)
    if array(x) is not None:
        return "its input is constant"
    if is_op(node, "Relu", "Clip") and clip_bounds(node) is None:
        return "its bounds are not constant, or do not include zero"
    if is_op(node, "HardSigmoid"):
        if not 0 < attribute(node, "beta", 0.5) < 1:
            return "beta is not between 0 and 1"
        if attribute(node, "alpha", 0.2) <= 0:
            return "alpha is not positive"
    row = target.row(node.op_type)
    if row is None:
        return "no integer kernel"
    return Candidate(node, "unary", row, (x,))


def _pool(node: ir.Node, target: Target, facts: Facts) -> Candidate | str:
    x = node.inputs[0]
    if x is None or not _is_float32(x, facts):
        return _dtype_reason(x, facts)
    if array(x) is not None:
        return "its input is constant"
    row = target.row("GlobalAveragePool")
    assert row is not None
    return Candidate(node, "pool", row, (x,))


def _concat(node: ir.Node, target: Target, facts: Facts) -> Candidate | str:
    data = tuple(value for value in node.inputs if value is not None)
    if not all(_is_float32(value, facts) for value in data):
        return _dtype_reason(data[0], facts)
    if any(array(value) is not None for value in data):
        return "an operand is constant"
    if any(
        facts[value.name or ""].elements == 0
        for value in data
        if value.name in facts and facts[value.name or ""].shape is not None
    ):
        return "an operand is empty"
    row = target.row("Concat")
    assert row is not None
    return Candidate(node, "concat", row, data)


def _same(node: ir.Node, target: Target, facts: Facts) -> Candidate | str:
    x = node.inputs[0]
    if x is None or not _is_float32(x, facts) or array(x) is not None:
        return _dtype_reason(x, facts)
    variant = ""
    if is_op(node, "Gather"):
        return _gather(node, target, facts)
    if is_op(node, "MaxPool") and (
        len(node.outputs) > 1 or len(facts.get(x.name or "", Fact(None, ())).shape or ()) != 4
    ):
        return "returns indices, or is not 2-D"
    if is_op(node, "Resize") and attribute(node, "mode", "nearest") != "nearest":
        return f"no integer kernel for mode {attribute(node, 'mode', '')}"
    if attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        return "what it extrapolates is a number, not a code"
    known = facts.get(x.name or "")
    shape = None if known is None else known.shape
    if is_op(node, "MaxPool") and shape is not None and shape[1] % 16:
        variant = "unblocked"
    row = target.row(node.op_type, variant)
    if row is None:
        return "no integer kernel"
    return Candidate(node, "same", row, (x,))


def _gather(node: ir.Node, target: Target, facts: Facts) -> Candidate | str:
    table, indices = node.inputs[0], node.inputs[1]
    weight = array(table)
    if table is None or (
        not _is_float32(table, facts) and (weight is None or weight.dtype != np.float32)
    ):
        return _dtype_reason(table, facts)
    if weight is None:
        row = target.row("Gather", "select")
        if row is None or array(indices) is None:
            return "indices into an activation"
        return Candidate(node, "same", row, (table,))
    row = target.row("Gather")
    if row is None or weight.ndim != 2 or attribute(node, "axis", 0) != 0:
        return "not a lookup of rows"
    if weight.nbytes < row.min_bytes:
        return f"too small to gain ({weight.nbytes} bytes)"
    if not np.isfinite(weight).all():
        return "its table holds NaN or infinities"
    if small := too_small(weight):
        return small
    return Candidate(node, "embedding", row, ())


_FINDERS = {
    "Conv": _conv, "MatMul": _linear, "Gemm": _linear, "LSTM": _recurrent,
    "Add": _binary, "Mul": _binary,
    "Sigmoid": _unary, "HardSigmoid": _unary, "LeakyRelu": _unary, "Relu": _unary, "Clip": _unary,
    "GlobalAveragePool": _pool, "Concat": _concat, **dict.fromkeys(_MOVES, _same), "Gather": _gather,
}  # fmt: skip
