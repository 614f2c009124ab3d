"""Inserts QuantizeLinear and DequantizeLinear where a plan says so.

    x[f32] -> op -> y[f32]   =>   x -> Q -> x_q[u8] -> DQ -> op -> Q -> y_q[u8] -> DQ -> y'[f32]

A tensor has one Q, at its producer, and one DQ for all of its readers. Relu and Clip that the
plan calls absorbed are gone: Q saturates where they did. Products and sums with a number that the
plan calls free are gone too: their readers dequantize the same codes with other parameters.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import Names, add_initializer, add_node, array, put_aside
from qcompile.plan.candidates import Candidate, clip_bounds
from qcompile.plan.plan import Form, Plan
from qcompile.quant.affine import quantize
from qcompile.quant.scheme import QParams, Scheme
from qcompile.solve.activations import constant_params
from qcompile.step import Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from qcompile.plan.tensors import Coding
    from qcompile.solve.weights import Weight

_SLACK = 1.5  # codes beyond a bound that still count as saturating at it


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
        """See the class. Node names stay; the integer nodes are those whose inputs are dequantized.

        An absorbed Relu or Clip stays, and is reported as skipped, if the codes of its output reach
        further than it does.
        """
        return _Insertion(self, model).run()


def saturates(scale: npt.NDArray[Any], zero: npt.NDArray[Any], bounds: tuple[float, float]) -> bool:
    """Whether codes of this meaning, which saturate as their type does, stay within the bounds."""
    info, step = np.iinfo(zero.dtype), float(scale)
    low, high = ((end - int(zero)) * step for end in (info.min, info.max))
    return low >= bounds[0] - _SLACK * step and high <= bounds[1] + _SLACK * step


class _Insertion:
    def __init__(self, step: InsertQdq, model: ir.Model) -> None:
        self.step, self.model, self.graph = step, model, model.graph
        self.names = Names(model)
        self.outcome = Outcome()
        self.codes: dict[ir.Value, ir.Value] = {}  # coded tensor -> the value that holds its codes
        self.back: dict[tuple[ir.Value, bytes], ir.Value] = {}  # (codes, meaning) -> float value
        self.constants: dict[tuple[str, bytes], ir.Value] = {}

    def run(self) -> Outcome:
        for node in list(self.graph):  # whatever the order of a plan that was edited
            entry = self.step.plan.get(node.name)
            if entry is not None and entry.form in (Form.STATIC, Form.FREE):
                item = self.step.found[entry.node]
                assert isinstance(item, Candidate)
                (self.free if entry.form is Form.FREE else self.convert)(item)
                self.outcome.changed.append(entry.node)
        return self.outcome

    def free(self, item: Candidate) -> None:
        """The readers of the result read the codes of the operand; the node is gone."""
        old = item.result
        self.codes[old] = self.code(item.data[0])
        self.read(old, self.float_of(old), self.readers(old))
        self.graph.remove(item.node, safe=True)

    def convert(self, item: Candidate) -> None:
        """The node reads what is dequantized, and what it makes is quantized."""
        node = item.node
        for i, value in enumerate(node.inputs):
            if value is not None and value in item.data:
                node.replace_input_with(i, self.float_of(value))
        if item.role == "conv":
            self.weigh(node)
        merged = self.merged(item)
        made = item.result if not merged else node.outputs[0]
        if item.absorbed and not merged:  # two integer nodes of one range, not a float one
            self.recode(node.outputs[0], self.step.params[item.result.name or ""])
        for value, old in zip(
            (made, *node.outputs[1:]), (item.result, *node.outputs[1:]), strict=True
        ):
            readers = self.readers(old)
            if readers or old.is_graph_output():
                name = old.name or ""
                self.codes[old] = self.quantize(value, self.step.params[name], name)
                self.read(old, self.float_of(old), readers)
        if merged:
            for dead in reversed(item.absorbed):
                self.graph.remove(dead, safe=True)

    def recode(self, value: ir.Value, params: QParams) -> None:
        """The readers of `value` read it as these parameters say."""
        readers = self.readers(value)
        back = self.dequantize(self.quantize(value, params, value.name or ""), params, value)
        for reader, i in readers:
            reader.replace_input_with(i, back)

    def merged(self, item: Candidate) -> bool:
        """Whether saturation of the result does what the absorbed nodes did."""
        params = self.step.params[item.result.name or ""]
        for node in item.absorbed:
            bounds = clip_bounds(node)
            assert bounds is not None
            if not saturates(params.scale, params.zero, bounds):
                reason = "the codes of its output reach beyond its bounds"
                self.outcome.skipped[node.name or ""] = reason
                return False
        return True

    def readers(self, value: ir.Value) -> list[tuple[ir.Node, int]]:
        """Who reads a value now, by node and position."""
        return [(use.node, use.idx) for use in value.uses()]

    def read(self, old: ir.Value, result: ir.Value, readers: Sequence[tuple[ir.Node, int]]) -> None:
        """These readers of `old`, which is about to go, read `result`; so does the graph's output."""
        for node, i in readers:
            node.replace_input_with(i, result)
        if not old.is_graph_output():
            return
        if result.is_graph_output():  # two outputs of one meaning need two values
            result = self.dequantize(self.codes[old], self.step.params[old.name or ""], old)
        for i, output in enumerate(self.graph.outputs):
            if output is old:
                self.graph.outputs[i] = result
        put_aside(old, result)

    def code(self, value: ir.Value) -> ir.Value:
        """The codes of a coded tensor; a tensor of a float producer is quantized behind it."""
        if value not in self.codes:
            name = value.name or ""
            self.codes[value] = self.quantize(value, self.step.params[name], name)
        return self.codes[value]

    def quantize(self, value: ir.Value, params: QParams, name: str) -> ir.Value:
        scale, zero = self.params_of(params)
        node = add_node(
            self.names, "QuantizeLinear", [value, scale, zero], name=f"{name}_quantize",
            output=f"{name}_q",
        )  # fmt: skip
        codes = node.outputs[0]
        codes.type, codes.shape = zero.type, value.shape
        self.place(node, value.producer())
        return codes

    def dequantize(self, codes: ir.Value, params: QParams, value: ir.Value) -> ir.Value:
        scale, zero = self.params_of(params)
        node = add_node(
            self.names, "DequantizeLinear", [codes, scale, zero], name=f"{value.name}_dequantize",
            output=f"{value.name}_dq",
        )  # fmt: skip
        back = node.outputs[0]
        back.type, back.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
        self.place(node, codes.producer())
        return back

    def place(self, node: ir.Node, producer: ir.Node | None) -> None:
        if producer is not None:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)

    def float_of(self, value: ir.Value) -> ir.Value:
        """`value` as its codes say, or a constant operand as its own codes say."""
        constant = array(value)
        if constant is not None:
            params = constant_params(value, Scheme.parse(self.step.plan.activation))
            if value not in self.codes:
                stored = quantize(constant, params)
                self.codes[value] = add_initializer(
                    self.graph, self.names, f"{value.name}_q", stored
                )
        else:
            params = self.step.params[value.name or ""]
        codes = self.code(value)
        key = (codes, params.scale.tobytes() + params.zero.tobytes())
        if key not in self.back:
            self.back[key] = self.dequantize(codes, params, value)
        return self.back[key]

    def params_of(self, params: QParams) -> tuple[ir.Value, ir.Value]:
        return self.constant("scale", params.scale), self.constant("zero_point", params.zero)

    def constant(self, kind: str, values: npt.NDArray[Any]) -> ir.Value:
        key = (kind, values.dtype.str.encode() + values.tobytes() + str(values.shape).encode())
        if key not in self.constants:
            self.constants[key] = add_initializer(self.graph, self.names, f"qc_{kind}", values)
        return self.constants[key]

    def weigh(self, node: ir.Node) -> None:
        """The Conv reads its weight and its int32 bias through DequantizeLinear."""
        weight = self.step.weights[node.name or ""]
        x, source = node.inputs[:2]
        assert source is not None
        assert x is not None
        codes = add_initializer(self.graph, self.names, f"{source.name}_q", weight.codes)
        scale = add_initializer(self.graph, self.names, f"{source.name}_scale", weight.params.scale)
        zero = self.constant("zero_point", weight.params.zero)
        self.read_constant(node, 1, f"{source.name}_dq", (codes, scale, zero))
        if weight.bias is None:
            if len(node.inputs) > 2:
                node.resize_inputs(2)
            return
        reader = x.producer()
        assert reader is not None
        x_scale = array(reader.inputs[1])
        assert x_scale is not None
        own = np.asarray(np.float32(x_scale) * weight.params.scale, np.float32)
        wide = np.clip(np.rint(weight.bias.astype(np.float64) / own), -(2**31), 2**31 - 1)
        wish = f"{node.name}_bias"
        stored = (
            add_initializer(self.graph, self.names, f"{wish}_q", wide.astype(np.int32)),
            add_initializer(self.graph, self.names, f"{wish}_scale", own),
            self.constant("zero_point", np.zeros(own.shape, np.int32)),
        )
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        self.read_constant(node, 2, f"{wish}_dq", stored)

    def read_constant(
        self, node: ir.Node, index: int, name: str, stored: tuple[ir.Value, ir.Value, ir.Value]
    ) -> None:
        """Input `index` of the node is (codes, scale, zero point), dequantized."""
        codes, scale, _ = stored
        # DequantizeLinear's axis is 1 if it is not written: output channels of Conv are axis 0.
        per_axis = {"axis": 0} if scale.shape is not None and len(scale.shape) == 1 else None
        back = add_node(
            self.names, "DequantizeLinear", stored, before=node, name=name, output=name,
            attributes=per_axis,
        ).outputs[0]  # fmt: skip
        back.type, back.shape = ir.TensorType(ir.DataType.FLOAT), codes.shape
        node.replace_input_with(index, back)
