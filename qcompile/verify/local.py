"""Which range of a tensor serves the layers that read it best: error of their outputs, all tensors at once.

Behind the float graph every reader of a coded tensor is run a second time, on the quantized tensor:

    x -> reader -> y;   x -> Q/DQ(scale[i], zero[i]) -> copy of reader -> y~;   sum (y~ - y)^2 / sum y^2

Everything else stays float, so one run tells each tensor's own error, and one session with the parameters as
inputs serves all range methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.taps import with_outputs
from qcompile.graph.edit import Names, add_initializer, add_node, sole_user
from qcompile.plan.candidates import clip_bounds
from qcompile.plan.plan import Form, Plan
from qcompile.plan.tensors import Coding
from qcompile.quant.scheme import QParams
from qcompile.run.session import Feed, Options, Session

_SCALES, _ZEROS, _ERRORS = "qc_scales", "qc_zeros", "qc_errors"
_TINY = 1e-30  # power of an output that is zero


class LocalErrors:
    """Measures the error that each coded tensor's parameters bring to the outputs of its readers."""

    def __init__(
        self, prepared: ir.Model, plan: Plan, coding: Coding, code_type: ir.DataType, *, threads: int
    ) -> None:  # fmt: skip
        """Raises: ModelError if ORT refuses the doubled graph."""
        self.roots: list[str] = []
        self._kind = code_type.numpy()
        model = with_outputs(prepared, [value.name or "" for value in prepared.graph.outputs])
        by_name = {v.name: v for v in model.graph.inputs}
        by_name |= {v.name: v for node in model.graph for v in node.outputs}
        readers = {e.node for e in plan.of(Form.STATIC, Form.FREE)}
        doubler = _Doubler(model, code_type)
        for root in coding.roots:
            value = by_name.get(root.name)
            if value is not None:
                doubler.double(value, len(self.roots), readers)
                self.roots.append(root.name or "")
        doubler.finish()
        self._session = (
            Session(model, Options("all", threads=threads, in_order=True)) if self.roots else None
        )

    def measure(
        self, tables: Mapping[str, Mapping[str, QParams]], samples: Iterable[Feed]
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Noise-to-signal power ratio of each of `roots`, by the name of a table of parameters.

        It is summed over samples and readers: float64 (roots,).
        """
        totals = {name: np.zeros(len(self.roots)) for name in tables}
        if self._session is None:
            return totals
        inputs = {name: self._inputs(table) for name, table in tables.items()}
        for feed in samples:
            for name, extra in inputs.items():
                totals[name] += self._session.run({**feed, **extra}, [_ERRORS])[0]
        return totals

    def _inputs(self, table: Mapping[str, QParams]) -> Feed:
        scales = np.array([float(table[name].scale) for name in self.roots], np.float32)
        zeros = np.array([int(table[name].zero) for name in self.roots], self._kind)
        return {_SCALES: scales, _ZEROS: zeros}


def best_methods(
    errors: Mapping[str, npt.NDArray[np.float64]], roots: Sequence[str]
) -> dict[str, str]:
    """The method of least error by root; of equals the first."""
    methods = list(errors)
    table = np.stack([errors[method] for method in methods])  # (methods, roots)
    return {root: methods[int(i)] for root, i in zip(roots, table.argmin(axis=0), strict=True)}


class _Doubler:
    """Adds the quantized copies of readers, and the two outputs that compare them."""

    def __init__(self, model: ir.Model, code_type: ir.DataType) -> None:
        self.model, self.graph, self.names = model, model.graph, Names(model)
        self.errors: list[ir.Value] = []
        self.scales, self.zeros = (
            ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape([None]))
            for name, kind in ((_SCALES, ir.DataType.FLOAT), (_ZEROS, code_type))
        )
        self.graph.inputs.extend([self.scales, self.zeros])
        self.shape, self.tiny = (
            add_initializer(self.graph, self.names, "qc_number", number)
            for number in (np.array([1], np.int64), np.array([_TINY], np.float32))
        )

    def double(self, value: ir.Value, index: int, readers: set[str]) -> None:
        """What integer nodes make of the tensor is compared; the tensor itself if there are none."""
        nodes = [n for n in dict.fromkeys(u.node for u in value.uses()) if n.name in readers]
        number = add_initializer(self.graph, self.names, "qc_index", np.asarray(index, np.int64))
        scale, zero = (self._add("Gather", [v, number]) for v in (self.scales, self.zeros))
        back = self._add(
            "DequantizeLinear", [self._add("QuantizeLinear", [value, scale, zero]), scale, zero]
        )
        pairs = [(value, back)] if value.is_graph_output() or not nodes else []
        pairs += [self._copy(node, value, back) for node in nodes]
        ratios = [self._ratio(*pair) for pair in pairs]
        self.errors.append(ratios[0] if len(ratios) == 1 else self._add("Sum", ratios))

    def finish(self) -> None:
        """The graph's only output are the errors, float32 (roots,)."""
        self.graph.outputs.clear()
        if self.errors:
            joined = self._add("Concat", self.errors, axis=0)
            joined.name, joined.type = _ERRORS, ir.TensorType(ir.DataType.FLOAT)
            self.graph.outputs.append(joined)
        self.graph.sort()

    def _copy(self, node: ir.Node, old: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        """What the node makes, and what it makes of `new`; behind a Relu or Clip that alone reads it."""
        copy = ir.node(
            node.op_type, [new if v is old else v for v in node.inputs], domain=node.domain,
            attributes={name: a.value for name, a in node.attributes.items()},
            num_outputs=len(node.outputs), name=self.names.fresh("qc_copy"),
        )  # fmt: skip
        for made in copy.outputs:
            made.name = self.names.fresh("qc_copy")
        self.graph.append(copy)
        user = sole_user(node.outputs[0])
        if user is not None and user.graph is self.graph and clip_bounds(user) is not None:
            return self._copy(user, node.outputs[0], copy.outputs[0])
        return node.outputs[0], copy.outputs[0]

    def _ratio(self, true: ir.Value, other: ir.Value) -> ir.Value:
        signal = self._add("Max", [self._power(true), self.tiny])
        return self._add("Div", [self._power(self._add("Sub", [other, true])), signal])

    def _power(self, value: ir.Value) -> ir.Value:
        return self._add("Reshape", [self._add("ReduceSumSquare", [value], keepdims=0), self.shape])

    def _add(self, op: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
        name = f"qc_{op}"
        return add_node(
            self.names, op, inputs, graph=self.graph, name=name, output=name, attributes=attributes
        ).outputs[0]
