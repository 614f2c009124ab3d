"""Replaces LSTM by ORT's DynamicQuantizeLSTM: 8-bit weights, input and state quantized at run time.

    Y, Y_h, Y_c = LSTM(X, W, R, B, sequence_lens, initial_h, initial_c, P)
      => DynamicQuantizeLSTM(X, W_q, R_q, B, sequence_lens, initial_h, initial_c, P,
                             W_scale, W_zero, R_scale, R_zero)

W and R are transposed: (directions, 4 * hidden, k) becomes (directions, k, 4 * hidden). Gates, biases
and the cell stay float. The kernel is ORT's own; there is no form of it in operators of ONNX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.graph.edit import Names, add_initializer, array, graphs
from qcompile.plan.candidates import Candidate
from qcompile.plan.plan import Form, Plan
from qcompile.quant.affine import quantize
from qcompile.quant.granularity import PerAxis, PerTensor
from qcompile.quant.ranges import weight_params
from qcompile.quant.scheme import INT8, UINT8, QParams, Scheme
from qcompile.solve.weights import can_saturate
from qcompile.step import Outcome, Pass

MS = "com.microsoft"

_Weight = tuple[ir.Value, ir.Value, ir.Value]  # codes, scale, zero


@dataclasses.dataclass(frozen=True)
class LowerRecurrent(Pass):
    """The DYNAMIC LSTM nodes of a plan, in every graph.

    Attributes:
        plan: the forms; the schemes are those of W and R as (4 * hidden, k), per tensor or per row,
            one for each direction.
        found: the candidates, of the model that the pass is applied to.
        form: there is only a `fused` form, so that with `portable` every LSTM stays float.
        saturating: the target's kernels saturate in 16 bits.
    """

    name: ClassVar[str] = "lower_recurrent"
    plan: Plan
    found: Mapping[str, Candidate | str]
    form: Literal["portable", "fused"] = "fused"
    saturating: bool = False

    def apply(self, model: ir.Model) -> Outcome:
        """See the class."""
        outcome, names = Outcome(), Names(model)
        done: dict[tuple[ir.Value, str], _Weight] = {}
        for entry in self.plan.of(Form.DYNAMIC):
            item = self.found.get(entry.node)
            if not isinstance(item, Candidate):
                continue  # another pass says why
            if item.role != "recurrent" or item.node.op_type != "LSTM":
                continue
            reason = self._refusal(entry.weight)
            if reason is not None:
                outcome.skipped[entry.node] = reason
                continue
            weights = [
                self._weight(value, entry.weight, names, done) for value in item.node.inputs[1:3]
            ]
            _lower(item.node, weights)
            outcome.changed.append(entry.node)
        if outcome.changed:
            for graph in graphs(model):
                graph.opset_imports.setdefault(MS, 1)
        return outcome

    def _refusal(self, spelling: str) -> str | None:
        scheme = Scheme.parse(spelling)
        if self.form == "portable":
            return "ONNX has no integer LSTM: DynamicQuantizeLSTM is an operator of ORT"
        if scheme.qtype not in (INT8, UINT8):
            return f"its kernel takes int8 and uint8 weights, not {scheme.qtype}"
        if scheme.granularity != PerTensor() and scheme.granularity != PerAxis(0):
            return f"its kernel has one scale a direction or one a row, not {scheme}"
        if scheme.granularity == PerAxis(0) and not scheme.symmetric:
            return "its kernel has no zero points by row"
        return None

    def _weight(
        self, value: ir.Value | None, spelling: str, names: Names,
        done: dict[tuple[ir.Value, str], _Weight],
    ) -> _Weight:  # fmt: skip
        """Codes, scale and zero point beside a float W or R; LSTMs that share one share them."""
        assert value is not None
        if (value, spelling) not in done:
            w = array(value)
            home = value.graph
            assert w is not None and isinstance(home, ir.Graph)
            codes, scale, zero = _quantize(w, Scheme.parse(spelling), saturating=self.saturating)
            done[value, spelling] = (
                add_initializer(home, names, f"{value.name}_q", codes),
                add_initializer(home, names, f"{value.name}_scale", scale),
                add_initializer(home, names, f"{value.name}_zero", zero),
            )
        return done[value, spelling]


def _quantize(
    w: npt.NDArray[np.floating], scheme: Scheme, *, saturating: bool
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32], npt.NDArray[Any]]:
    """Codes (directions, k, 4 * hidden), scale and zero (directions,) or (directions, 4 * hidden)."""
    codes, params = [], []
    for rows in w:  # (4 * hidden, k)
        own = _params(rows, scheme, saturating=saturating)
        params.append(own)
        codes.append(quantize(rows, own).T)
    return (
        np.stack(codes),
        np.stack([own.scale for own in params]),
        np.stack([own.zero for own in params]),
    )


def _params(rows: npt.NDArray[np.floating], scheme: Scheme, *, saturating: bool) -> QParams:
    own = weight_params(rows, scheme)
    if saturating and scheme.bits is None and can_saturate(quantize(rows, own).T):
        return weight_params(rows, dataclasses.replace(scheme, bits=7))
    return own


def _lower(node: ir.Node, weights: list[_Weight]) -> None:
    """The LSTM becomes the integer operator in place: outputs, name and other attributes stay."""
    (w, w_scale, w_zero), (r, r_scale, r_zero) = weights
    float_r = array(node.inputs[2])  # (directions, 4 * hidden, hidden)
    assert float_r is not None
    node.domain, node.op_type, node.version = MS, "DynamicQuantizeLSTM", None
    node.attributes.pop("layout", None)  # 0, and not an attribute of this one
    if "hidden_size" not in node.attributes:
        node.attributes.add(ir.AttrInt64("hidden_size", float_r.shape[2]))
    node.resize_inputs(12)
    for i, value in zip(
        (1, 2, 8, 9, 10, 11), (w, r, w_scale, w_zero, r_scale, r_zero), strict=True
    ):
        node.replace_input_with(i, value)
