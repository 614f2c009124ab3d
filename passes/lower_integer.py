"""Writes ONNX Runtime's integer operators in place of Q/DQ groups.

    DQ, DQ, DQ -> Conv -> Q   =>   QLinearConv
    DQ -> HardSigmoid -> Q    =>   QLinearLeakyRelu with alpha 1: a table lookup that saturates

The result computes what the Q/DQ graph says, to one code, and does not depend on which patterns a
version of the runtime recognizes. What this pass leaves as Q/DQ still runs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from passes.insert_qdq import saturates
from qcompile.graph.edit import Names, add_initializer, array, attribute, is_op, sole_user
from qcompile.plan.candidates import clip_bounds
from qcompile.plan.plan import Form, Plan
from qcompile.step import Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

MS = "com.microsoft"


@dataclasses.dataclass(frozen=True)
class LowerInteger(Pass):
    """Integer operators for the nodes that the plan calls STATIC.

    Attributes:
        plan: the forms.
    """

    name: ClassVar[str] = "lower_integer"
    plan: Plan

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Skipped: nodes that are not wholly between DQ and Q."""
        outcome, names = Outcome(), Names(model)
        for node in list(model.graph):
            entry = self.plan.get(node.name)
            if entry is None or entry.form not in (Form.STATIC, Form.ABSORBED) or node.domain:
                continue
            reason = _Lowering(model.graph, names, node).run()
            if reason is None:
                outcome.changed.append(node.name or "")
            else:
                outcome.skipped[node.name or ""] = reason
        if outcome.changed:
            model.opset_imports.setdefault(MS, 1)
        _drop_unread(model.graph)
        return outcome


def _drop_unread(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if (
            is_op(node, "DequantizeLinear")
            and not node.outputs[0].uses()
            and not node.outputs[0].is_graph_output()
        ):
            graph.remove(node, safe=True)


class _Lowering:
    """One node between its DequantizeLinear inputs and its QuantizeLinear output."""

    def __init__(self, graph: ir.Graph, names: Names, node: ir.Node) -> None:
        self.graph, self.names, self.node = graph, names, node

    def run(self) -> str | None:
        """None if the node was replaced, else the reason."""
        rule = _RULES.get(self.node.op_type)
        if rule is None:
            return f"no integer operator for {self.node.op_type}"
        outs = [value for value in self.node.outputs if value.uses() or value.is_graph_output()]
        quantizers = [sole_user(value) for value in outs]
        if not outs or not all(is_op(q, "QuantizeLinear") for q in quantizers):
            return "its output is not quantized"
        wanted = [v for v in self.node.inputs[: _DATA.get(self.node.op_type, 1)] if v is not None]
        if self.node.op_type == "Concat":
            wanted = [v for v in self.node.inputs if v is not None]
        if not all(is_op(value.producer(), "DequantizeLinear") for value in wanted):
            return "an input is not dequantized"
        assert quantizers[0] is not None
        replacement = rule(self, quantizers[0])
        if isinstance(replacement, str):
            return replacement
        self.graph.insert_before(self.node, replacement)
        for old, quantizer in zip(outs, quantizers, strict=True):
            assert quantizer is not None
            new = replacement.outputs[self.node.outputs.index(old)]
            codes = quantizer.outputs[0]
            new.type, new.shape = codes.type, codes.shape
            name = codes.name
            ir.convenience.replace_all_uses_with(codes, new, replace_graph_outputs=True)
            codes.name, new.name = self.names.fresh(f"{name}_was"), name
            self.graph.remove(quantizer, safe=True)
        self.graph.remove(self.node, safe=True)
        return None

    def dequantized(self, index: int) -> list[ir.Value | None]:
        """Codes, scale and zero point behind an input."""
        value = self.node.inputs[index]
        producer = value.producer() if value is not None else None
        assert producer is not None
        return list(producer.inputs[:3])

    def make(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        domain: str,
        attributes: dict[str, Any] | None = None,
    ) -> ir.Node:
        """The replacement, under the node's own name."""
        return ir.node(
            op_type,
            inputs,
            attributes,
            domain=domain,
            num_outputs=len(self.node.outputs),
            name=self.node.name,
        )

    def constant(self, name: str, values: npt.NDArray[Any]) -> ir.Value:
        """A new initializer that belongs to the node."""
        return add_initializer(self.graph, self.names, f"{self.node.name}_{name}", values)


def _conv(self: _Lowering, quantizer: ir.Node) -> ir.Node | str:
    x, w = self.dequantized(0), self.dequantized(1)
    inputs = [*x, *w, quantizer.inputs[1], quantizer.inputs[2]]
    if len(self.node.inputs) > 2 and self.node.inputs[2] is not None:
        inputs.append(self.dequantized(2)[0])
    return self.make("QLinearConv", inputs, "", dict(self.node.attributes))


def _binary(self: _Lowering, quantizer: ir.Node) -> ir.Node | str:
    inputs = [*self.dequantized(0), *self.dequantized(1), quantizer.inputs[1], quantizer.inputs[2]]
    return self.make(f"QLinear{self.node.op_type}", inputs, MS)


def _sigmoid(self: _Lowering, quantizer: ir.Node) -> ir.Node | str:
    return self.make(
        "QLinearSigmoid", [*self.dequantized(0), quantizer.inputs[1], quantizer.inputs[2]], MS
    )


def _leaky(self: _Lowering, quantizer: ir.Node) -> ir.Node | str:
    alpha = {"Relu": 0.0, "Clip": 1.0}.get(self.node.op_type, attribute(self.node, "alpha", 0.01))
    scale, zero = array(quantizer.inputs[1]), array(quantizer.inputs[2])
    assert scale is not None
    assert zero is not None
    if self.node.op_type == "Clip":
        bounds = clip_bounds(self.node)
        assert bounds is not None
        if not saturates(scale, zero, bounds):
            return "its bounds are tighter than its output's codes"
    inputs = [*self.dequantized(0), quantizer.inputs[1], quantizer.inputs[2]]
    return self.make("QLinearLeakyRelu", inputs, MS, {"alpha": float(alpha)})


def _hard_sigmoid(self: _Lowering, quantizer: ir.Node) -> ir.Node | str:
    """max(0, min(1, alpha x + beta)) with codes 0..255 for 0..1 is x itself, requantized and saturated.

    Code c stands for x = (c / 255 - beta) / alpha: a scale of 1 / (255 alpha) and a zero point of
    255 beta, rounded: at most half a code off.
    """
    scale, zero = array(quantizer.inputs[1]), array(quantizer.inputs[2])
    assert scale is not None
    assert zero is not None
    alpha, beta = attribute(self.node, "alpha", 0.2), attribute(self.node, "beta", 0.5)
    info = np.iinfo(zero.dtype)
    if int(zero) != info.min or abs(float(scale) * (info.max - info.min) - 1) > 1e-3:
        return "its output's codes are not those of 0..1"
    point = np.clip(np.rint(int(zero) + beta / float(scale)), info.min, info.max)
    inputs = [
        *self.dequantized(0),
        self.constant("line_scale", np.asarray(float(scale) / alpha, np.float32)),
        self.constant("line_zero", np.asarray(point, zero.dtype)),
    ]
    return self.make("QLinearLeakyRelu", inputs, MS, {"alpha": 1.0})


def _pool(self: _Lowering, quantizer: ir.Node) -> ir.Node | str:
    inputs = [*self.dequantized(0), quantizer.inputs[1], quantizer.inputs[2]]
    return self.make("QLinearGlobalAveragePool", inputs, MS, {"channels_last": 0})


def _concat(self: _Lowering, quantizer: ir.Node) -> ir.Node | str:
    inputs = [quantizer.inputs[1], quantizer.inputs[2]]
    for i in range(len(self.node.inputs)):
        inputs += self.dequantized(i)
    return self.make("QLinearConcat", inputs, MS, {"axis": attribute(self.node, "axis", 1)})


def _move(self: _Lowering, quantizer: ir.Node) -> ir.Node | str:
    codes, scale, zero = self.dequantized(0)
    same = [
        (array(a), array(b)) for a, b in ((scale, quantizer.inputs[1]), (zero, quantizer.inputs[2]))
    ]
    if not all(a is not None and b is not None and np.array_equal(a, b) for a, b in same):
        return "its input and output have different scales"
    return self.make(
        self.node.op_type, [codes, *self.node.inputs[1:]], "", dict(self.node.attributes)
    )


_DATA = {"Add": 2, "Mul": 2, "Conv": 2}
_RULES: dict[str, Callable[[_Lowering, ir.Node], ir.Node | str]] = {
    "Conv": _conv, "Add": _binary, "Mul": _binary, "Sigmoid": _sigmoid, "HardSigmoid": _hard_sigmoid,
    "LeakyRelu": _leaky, "Relu": _leaky, "Clip": _leaky, "GlobalAveragePool": _pool, "Concat": _concat,
    **dict.fromkeys(
        ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split",
         "DepthToSpace", "Gather", "Resize"), _move),
}  # fmt: skip
