"""Keeps float what the plan keeps float.

ORT's optimizer moves a QuantizeLinear in front of a MaxPool, where the 8-bit kernel is 50 times slower than
the float one, and makes QLinearAveragePool or QLinearSoftmax of any AveragePool or Softmax between
DequantizeLinear and QuantizeLinear, both several times slower as well. A Max of one tensor, which ORT
neither removes nor looks through, stands in the way; it costs one pass over the tensor. Reshape, Transpose
and their like do not stand in the way: ORT moves the QuantizeLinear in front of them first.

    MaxPool -> QuantizeLinear                =>   MaxPool -> Max -> QuantizeLinear
    MaxPool -> Reshape -> QuantizeLinear     =>   MaxPool -> Reshape -> Max -> QuantizeLinear

A float Conv, ConvTranspose or Gemm behind a DequantizeLinear, with nothing but Relu and Clip between it and a
QuantizeLinear, gets an 8-bit weight from ORT (WeightBiasQuantization, since 1.21), with one scale for the whole tensor, whatever
that costs. The Max of one tensor keeps it float as well. In the fused form it costs nothing: FusedConv, that ORT makes of
Conv and its activation in any case, is not looked for.

    DequantizeLinear -> Conv -> Relu -> QuantizeLinear   =>   DequantizeLinear -> FusedConv -> QuantizeLinear
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import Names, add_node, array, is_op, sole_user, supersede
from qcompile.plan.candidates import clip_bounds
from qcompile.plan.plan import Form, Plan
from qcompile.step import Outcome, Pass

MS = "com.microsoft"
_SLOW = ("MaxPool", "AveragePool", "Softmax", "LogSoftmax")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm")
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice")


@dataclasses.dataclass(frozen=True)
class GuardFloat(Pass):
    """See the module.

    Attributes:
        plan: what it makes integer needs no guard.
        fused: whether operators of ORT's own may be written.
    """

    name: ClassVar[str] = "guard_float"
    plan: Plan | None = None
    fused: bool = False

    def apply(self, model: ir.Model) -> Outcome:
        """Guards before each QuantizeLinear that would reach one of those operators, or behind a move of it."""
        outcome, names = Outcome(), Names(model)
        for node in list(model.graph):
            if is_op(node, "QuantizeLinear") and self._slow(node):
                _guard(names, node)
                outcome.changed.append(node.name or "")
            elif (quantize := _quantized_by_ort(node)) is not None:
                if self.fused and is_op(node, "Conv"):
                    _fuse(model, names, node)
                else:
                    _guard(names, quantize)
                outcome.changed.append(node.name or "")
        return outcome

    def _slow(self, quantize: ir.Node) -> bool:
        """Whether the integer kernel that ORT would take is slow, and nobody wants it."""
        source = quantize.inputs[0]
        maker = None if source is None else _moved(source).producer()
        if maker is None or not is_op(maker, *_SLOW):
            return False
        entry = None if self.plan is None else self.plan.get(maker.name)
        return entry is None or entry.form is not Form.STATIC


def _guard(names: Names, quantize: ir.Node) -> None:
    source = quantize.inputs[0]
    assert source is not None
    guard = add_node(
        names, "Max", [source], before=quantize, name=f"{quantize.name}_guard", output=f"{source.name}_guarded",
    )  # fmt: skip
    guard.outputs[0].type, guard.outputs[0].shape = source.type, source.shape
    quantize.replace_input_with(0, guard.outputs[0])


def _quantized_by_ort(node: ir.Node) -> ir.Node | None:
    """The QuantizeLinear behind a float product whose weight ORT would make 8-bit."""
    if not is_op(node, *_WEIGHTED) or len(node.inputs) < 2:
        return None
    x, weight = node.inputs[:2]
    values = array(weight)
    before = None if x is None else x.producer()
    if values is None or values.dtype != np.float32 or not is_op(before, "DequantizeLinear"):
        return None
    value = node.outputs[0]
    while True:
        uses = value.uses()
        reader = next(iter(uses)).node if len(uses) == 1 else None
        if is_op(reader, "QuantizeLinear"):
            return reader
        if reader is None or not is_op(reader, "Relu", "Clip") or reader.graph is not node.graph:
            return None
        value = reader.outputs[0]


def _fuse(model: ir.Model, names: Names, conv: ir.Node) -> None:
    """FusedConv in place of a Conv, and of the activation that alone reads it."""
    attributes, last = dict(conv.attributes), conv
    activation = sole_user(conv.outputs[0])
    bounds = None if activation is None else clip_bounds(activation)
    if activation is not None and bounds is not None:
        last = activation
        attributes["activation"] = ir.AttrString("activation", activation.op_type)
        if is_op(activation, "Clip"):
            most = float(np.finfo(np.float32).max)
            limits = [float(np.clip(bound, -most, most)) for bound in bounds]
            attributes["activation_params"] = ir.AttrFloat32s("activation_params", limits)
    fused = ir.Node(
        MS, "FusedConv", conv.inputs, list(attributes.values()), num_outputs=1, name=conv.name
    )
    assert last.graph is not None
    last.graph.insert_after(last, fused)
    fused.outputs[0].name = names.fresh(f"{last.outputs[0].name}_fused")
    supersede(last.outputs[0], fused.outputs[0])
    assert fused.graph is not None
    for node in dict.fromkeys((last, conv)):
        fused.graph.remove(node, safe=True)
    model.opset_imports.setdefault(MS, 1)


def _moved(value: ir.Value) -> ir.Value:
    """The value whose numbers these are, before they were moved about."""
    node = value.producer()
    while is_op(node, *_MOVES):
        assert node is not None
        source = node.inputs[0]
        assert source is not None
        value, node = source, source.producer()
    return value
