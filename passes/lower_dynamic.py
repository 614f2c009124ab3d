"""Replaces MatMul and Gemm by integer products whose input scale is found at run time.

    x -> MatMul(W) -> Add(b)
      => fused:    DynamicQuantizeMatMul(x, W_q, scale, zero, b), or one DynamicQuantizeLinear for all
                   readers of x and a MatMulIntegerToFloat each
      => portable: DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul(scales) -> Add(b)

No calibration, and the accuracy of a scale that fits each input. ORT fuses the portable form itself.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import (
    Names,
    add_initializer,
    add_node,
    array,
    attribute,
    graphs,
    is_op,
    supersede,
)  # fmt: skip
from qcompile.plan.candidates import Candidate
from qcompile.plan.plan import Form, Plan
from qcompile.step import Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from qcompile.solve.weights import Weight

MS = "com.microsoft"


@dataclasses.dataclass(frozen=True)
class LowerDynamic(Pass):
    """The DYNAMIC MatMul and Gemm nodes of a plan, in every graph.

    Attributes:
        plan: the forms.
        found: the candidates, of the model that the pass is applied to.
        weights: codes and scales by node name.
        form: operators of ONNX only, or ORT's fused ones.
    """

    name: ClassVar[str] = "lower_dynamic"
    plan: Plan
    found: Mapping[str, Candidate | str]
    weights: Mapping[str, Weight]
    form: Literal["portable", "fused"] = "fused"

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Results keep their names; nodes that read equal codes share them."""
        outcome, names = Outcome(), Names(model)
        planned = [
            item
            for entry in self.plan.of(Form.DYNAMIC)
            if isinstance(item := self.found[entry.node], Candidate) and item.role == "dynamic"
        ]
        lowering = _Lowering(names, self.form, planned)
        for item in planned:
            lowering.lower(item, self.weights[item.node.name or ""])
            outcome.changed.append(item.node.name or "")
        if planned and self.form == "fused":
            for graph in graphs(model):
                graph.opset_imports.setdefault(MS, 1)
        return outcome


@dataclasses.dataclass(frozen=True)
class _Payload:
    """A stored weight: its arrays, and the initializers that hold codes, scale and zero point."""

    weight: Weight
    values: tuple[ir.Value, ir.Value, ir.Value]


class _Lowering:
    """What the nodes of one model share: weights, and inputs quantized at run time."""

    def __init__(self, names: Names, form: str, planned: list[Candidate]) -> None:
        self.names, self.form = names, form
        self.readers = Counter((item.data[0], item.node.graph) for item in planned)
        self.payloads: dict[ir.Value, list[_Payload]] = {}
        self.quantized: dict[tuple[ir.Value, Any], ir.Node] = {}

    def lower(self, item: Candidate, weight: Weight) -> None:
        node = item.node
        tail = item.absorbed[-1] if item.absorbed else node
        wish, name = tail.outputs[0].name or "y", node.name or "matmul"
        bias, matrix = self.bias(item, weight)
        if self.form == "fused":
            result = self.fused(item, self.stored(node, weight), bias, wish)
        else:
            result = self.portable(item, self.stored(node, weight), bias, wish)
        if matrix is not None:
            assert isinstance(node.graph, ir.Graph)
            constant = add_initializer(node.graph, self.names, f"{name}_bias", matrix)
            result = add_node(
                self.names, "Add", [result, constant], before=node, name=f"{name}_bias_add",
                output=f"{wish}_biased",
            ).outputs[0]  # fmt: skip
        result.type = ir.TensorType(ir.DataType.FLOAT)
        supersede(tail.outputs[0], result)
        for step in dict.fromkeys((tail, node)):
            assert step.graph is not None
            step.graph.remove(step, safe=True)

    def stored(self, node: ir.Node, weight: Weight) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Codes, scale and zero point: one payload for all nodes whose weight has the same codes."""
        source = node.inputs[1]
        assert source is not None
        payloads = self.payloads.setdefault(source, [])
        for payload in payloads:
            if _same(payload.weight, weight):
                return payload.values
        home = source.graph  # codes can be read wherever the weight can
        assert isinstance(home, ir.Graph)
        values = (
            add_initializer(home, self.names, f"{source.name}_q", weight.codes),
            add_initializer(home, self.names, f"{source.name}_scale", weight.params.scale),
            add_initializer(home, self.names, f"{source.name}_zero_point", weight.params.zero),
        )
        payloads.append(_Payload(weight, values))
        return values

    def bias(
        self, item: Candidate, weight: Weight
    ) -> tuple[ir.Value | None, npt.NDArray[np.float32] | None]:
        """The bias (N,), and one that varies along other axes and needs an Add of its own."""
        node = item.node
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        if item.absorbed:
            add = item.absorbed[0]
            other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
            values = array(other)
            assert other is not None
            assert values is not None
            if values.ndim == 1:
                return other, None
            return add_initializer(
                graph, self.names, f"{other.name}_flat", values.reshape(-1)
            ), None
        if weight.bias is not None:
            return add_initializer(graph, self.names, f"{node.name}_bias", weight.bias), None
        beta = np.float32(attribute(node, "beta", 1.0))
        if not is_op(node, "Gemm") or len(node.inputs) < 3 or beta == 0:
            return None, None
        values = array(node.inputs[2])
        return None, None if values is None else np.asarray(values * beta, np.float32)

    def fused(
        self, item: Candidate, stored: tuple[ir.Value, ...], bias: ir.Value | None, wish: str
    ) -> ir.Value:
        node = item.node
        x = node.inputs[0]  # not item.data[0]: what made that may have been lowered meanwhile
        assert x is not None
        codes, scale, zero = stored
        if self.readers[item.data[0], node.graph] == 1:
            op_type, inputs = "DynamicQuantizeMatMul", [x, codes, scale, zero]
        else:
            x_codes, x_scale, x_zero = self.dynamic(x, node)
            op_type, inputs = (
                "MatMulIntegerToFloat", [x_codes, codes, x_scale, scale, x_zero, zero],
            )  # fmt: skip
        new = add_node(
            self.names, op_type, [*inputs, *([] if bias is None else [bias])], before=node, domain=MS,
            name=f"{node.name}_int", output=f"{wish}_int",
        )  # fmt: skip
        new.name = node.name
        return new.outputs[0]

    def portable(
        self, item: Candidate, stored: tuple[ir.Value, ...], bias: ir.Value | None, wish: str
    ) -> ir.Value:
        node, x = item.node, item.node.inputs[0]
        assert x is not None
        codes, scale, zero = stored
        x_codes, x_scale, x_zero = self.dynamic(x, node)

        def step(
            op_type: str,
            inputs: list[ir.Value],
            part: str,
            attributes: dict[str, Any] | None = None,
        ) -> ir.Value:
            return add_node(
                self.names, op_type, inputs, before=node, name=f"{node.name}_{part}",
                output=f"{wish}_{part}", attributes=attributes,
            ).outputs[0]  # fmt: skip

        product = step("MatMulInteger", [x_codes, codes, x_zero, zero], "int")
        cast = step("Cast", [product], "cast", {"to": int(ir.DataType.FLOAT)})
        result = step("Mul", [cast, step("Mul", [x_scale, scale], "scales")], "scaled")
        return result if bias is None else step("Add", [result, bias], "biased")

    def dynamic(self, x: ir.Value, reader: ir.Node) -> tuple[ir.Value, ...]:
        """Codes, scale and zero point of `x`, found once in each graph that reads it."""
        graph = reader.graph
        assert graph is not None
        key = (x, graph)
        if key not in self.quantized:
            name = self.names.fresh(f"{x.name}_quantize")
            node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name=name)
            for value, part in zip(node.outputs, ("q", "scale", "zero_point"), strict=True):
                value.name = self.names.fresh(f"{x.name}_{part}")
            producer = x.producer()
            if producer is not None and producer.graph is graph:
                graph.insert_after(producer, node)
            else:
                graph.insert_before(graph[0], node)
            self.quantized[key] = node
        return tuple(self.quantized[key].outputs)


def _same(a: Weight, b: Weight) -> bool:
    pairs = ((a.codes, b.codes), (a.params.scale, b.params.scale), (a.params.zero, b.params.zero))
    return all(np.array_equal(left, right) for left, right in pairs)
