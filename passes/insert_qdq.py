"""Inserts QuantizeLinear and DequantizeLinear where a plan says so.

    x[f32] -> op -> y[f32]   =>   x -> Q -> x_q[u8] -> DQ -> op -> Q -> y_q[u8] -> DQ -> y'[f32]

A tensor has one Q, at its producer, and one DQ for all of its readers. Relu and Clip that the
plan calls absorbed are gone: Q saturates where they did. Products and sums with a number that the
plan calls free are gone too: their readers dequantize the same codes with other parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import Names, add_initializer, add_node, array
from qcompile.plan.candidates import Candidate
from qcompile.plan.plan import Form, Plan
from qcompile.plan.tensors import Coding
from qcompile.quant.affine import quantize
from qcompile.quant.scheme import QParams, Scheme
from qcompile.solve.activations import constant_params
from qcompile.solve.weights import Weight
from qcompile.step import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class InsertQdq(Pass):
    """The static part of a plan, as portable Q/DQ.

    Attributes:
        plan: the forms; STATIC, FREE and ABSORBED are used.
        found: the candidates, of the model that the pass is applied to.
        coding: the coded tensors.
        params: their parameters, by tensor name.
        weights: by node name.
    """

    name: ClassVar[str] = "insert_qdq"
    plan: Plan
    found: Mapping[str, Candidate | str]
    coding: Coding
    params: Mapping[str, QParams]
    weights: Mapping[str, Weight]

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Node names stay; the integer nodes are those whose inputs are dequantized."""
        return _Insertion(self, model).run()


class _Insertion:
    def __init__(self, step: InsertQdq, model: ir.Model) -> None:
        self.step, self.model, self.graph = step, model, model.graph
        self.names = Names(model)
        self.outcome = Outcome()
        self.codes: dict[ir.Value, ir.Value] = {}  # coded tensor -> the value that holds its codes
        self.back: dict[tuple[ir.Value, bytes], ir.Value] = {}  # (codes, meaning) -> float value
        self.constants: dict[tuple[str, bytes], ir.Value] = {}

    def run(self) -> Outcome:
        for entry in self.step.plan.nodes:
            if entry.form in (Form.STATIC, Form.FREE):
                item = self.step.found[entry.node]
                assert isinstance(item, Candidate)
                self.convert(item, entry.form)
                self.outcome.changed.append(entry.node)
        return self.outcome

    def convert(self, item: Candidate, form: Form) -> None:
        node, old = item.node, item.result
        uses, was_output = list(old.uses()), old.is_graph_output()
        if form is Form.FREE:
            self.codes[old] = self.code(item.data[0])
            self.read(node, old, uses, was_output)
            self.graph.remove(node, safe=True)
            return
        for i, value in enumerate(node.inputs):
            if value is not None and value in item.data:
                node.replace_input_with(i, self.float_of(value))
        if item.role == "conv":
            self.weigh(node)
        for i, value in enumerate(node.outputs):
            value_old = old if i == 0 else value
            uses, was_output = list(value_old.uses()), value_old.is_graph_output()
            if not uses and not was_output:
                continue
            self.codes[value_old] = self.quantize(
                value, self.step.params[value_old.name or ""], value_old.name or ""
            )
            self.read(node, value_old, uses, was_output)
        for dead in reversed(item.absorbed):
            self.graph.remove(dead, safe=True)

    def read(self, node: ir.Node, old: ir.Value, uses: list[ir.Usage], was_output: bool) -> None:  # type: ignore[name-defined]
        """The readers of `old`, which is about to go, read its codes dequantized."""
        if not uses and not was_output:
            return
        result = self.float_of(old)
        for use in uses:
            use.node.replace_input_with(use.idx, result)
        if was_output:
            name = old.name
            for i, output in enumerate(self.graph.outputs):
                if output is old:
                    self.graph.outputs[i] = result
            old.name = f"{name}__replaced"
            result.name, result.shape = name, old.shape

    def code(self, value: ir.Value) -> ir.Value:
        """The codes of a coded tensor; a tensor of a float producer is quantized behind it."""
        if value not in self.codes:
            self.codes[value] = self.quantize(
                value, self.step.params[value.name or ""], value.name or ""
            )
        return self.codes[value]

    def quantize(self, value: ir.Value, params: QParams, name: str) -> ir.Value:
        scale, zero = self.params_of(params)
        producer = value.producer()
        node = add_node(
            self.names, "QuantizeLinear", [value, scale, zero], name=f"{name}_quantize", output=f"{name}_q",
        )  # fmt: skip
        codes = node.outputs[0]
        codes.type, codes.shape = ir.TensorType(zero.dtype), value.shape
        self.place(node, producer)
        return codes

    def place(self, node: ir.Node, producer: ir.Node | None) -> None:
        if producer is not None:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)

    def float_of(self, value: ir.Value) -> ir.Value:
        """`value` as its codes say, or a constant operand as its own codes say."""
        constant = array(value)
        if constant is not None:
            scheme = Scheme.parse(self.step.plan.activation)
            params = constant_params(value, scheme)
            codes = add_initializer(
                self.graph, self.names, f"{value.name}_q", quantize(constant, params)
            )
        else:
            params, codes = self.step.params[value.name or ""], self.code(value)
        key = (codes, params.scale.tobytes() + params.zero.tobytes())
        if key not in self.back:
            scale, zero = self.params_of(params)
            node = add_node(
                self.names, "DequantizeLinear", [codes, scale, zero],
                name=f"{value.name}_dequantize", output=f"{value.name}_dq",
            )  # fmt: skip
            node.outputs[0].type, node.outputs[0].shape = (
                ir.TensorType(ir.DataType.FLOAT),
                value.shape,
            )
            self.place(node, codes.producer())
            self.back[key] = node.outputs[0]
        return self.back[key]

    def params_of(self, params: QParams) -> tuple[ir.Value, ir.Value]:
        return self.constant("scale", params.scale), self.constant("zero_point", params.zero)

    def constant(self, kind: str, values: np.ndarray) -> ir.Value:
        key = (kind, values.dtype.str.encode() + values.tobytes() + str(values.shape).encode())
        if key not in self.constants:
            self.constants[key] = add_initializer(self.graph, self.names, f"qc_{kind}", values)
        return self.constants[key]

    def weigh(self, node: ir.Node) -> None:
        """The Conv reads its weight and its int32 bias through DequantizeLinear."""
        weight = self.step.weights[node.name or ""]
        source = node.inputs[1]
        assert source is not None
        codes = add_initializer(self.graph, self.names, f"{source.name}_q", weight.codes)
        scale = add_initializer(self.graph, self.names, f"{source.name}_scale", weight.params.scale)
        zero = self.constant("zero_point", weight.params.zero)
        self.dequantize_constant(node, 1, codes, scale, zero, f"{source.name}_dq")
        if weight.bias is None:
            if len(node.inputs) > 2:
                node.resize_inputs(2)
            return
        x = node.inputs[0]
        assert x is not None
        reader = x.producer()
        assert reader is not None and reader.inputs[1] is not None
        x_scale = array(reader.inputs[1])
        assert x_scale is not None
        own = np.asarray(np.float32(x_scale) * weight.params.scale, np.float32)
        codes_bias = np.clip(np.rint(weight.bias.astype(np.float64) / own), -(2**31), 2**31 - 1)
        wish = f"{node.name}_bias"
        bias = add_initializer(self.graph, self.names, f"{wish}_q", codes_bias.astype(np.int32))
        bias_scale = add_initializer(self.graph, self.names, f"{wish}_scale", own)
        bias_zero = self.constant("zero_point", np.zeros(own.shape, np.int32))
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        self.dequantize_constant(node, 2, bias, bias_scale, bias_zero, f"{wish}_dq")

    def dequantize_constant(
        self, node: ir.Node, index: int, codes: ir.Value, scale: ir.Value, zero: ir.Value, name: str
    ) -> None:
        # DequantizeLinear's axis is 1 if it is not written: output channels of Conv are axis 0.
        per_axis = {"axis": 0} if scale.shape is not None and len(scale.shape) == 1 else None
        back = add_node(
            self.names, "DequantizeLinear", [codes, scale, zero], before=node, name=name, output=name,
            attributes=per_axis,
        )  # fmt: skip
        back.outputs[0].type, back.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), codes.shape
        node.replace_input_with(index, back.outputs[0])
