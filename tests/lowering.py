"""Small graphs compiled through `build`, and what they should compute, node by node in numpy."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from rewrites import parse, random_feed, run

from qcompile.build import Format, Solution, build
from qcompile.calib.observe import observe
from qcompile.graph import io
from qcompile.graph.edit import array, attribute
from qcompile.plan.candidates import Candidate
from qcompile.plan.make import Request, find_candidates, make_plan
from qcompile.plan.plan import Form, Plan
from qcompile.plan.tensors import coding
from qcompile.prepare import prepare
from qcompile.quant.affine import dequantize, quantize
from qcompile.run.probe import Fact, probe
from qcompile.solve.activations import solve_activations
from qcompile.solve.weights import Weight, solve_weights
from qcompile.step import Need
from qcompile.targets.schema import OpRow, Target, detect, load_target

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from qcompile.quant.scheme import QParams

    Array = npt.NDArray[Any]

TARGET = detect().name  # the kernels of another CPU would not compute the same
SATURATES = load_target(TARGET).saturating  # then full 8-bit weights may overflow: they have 7 bits
STATIC_ROLES = ("conv", "binary", "unary", "pool", "concat", "same", "free")


def eager(name: str = TARGET) -> Target:
    """A target whose rows have no least size, so that tiny graphs are planned as well."""
    target = load_target(name)
    rows: list[OpRow] = [dataclasses.replace(r, min_macs=0, min_bytes=0) for r in target.op]
    return dataclasses.replace(target, op=tuple(rows))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A prepared graph, what was decided about it, and its two built forms."""

    prepared: ir.Model
    plan: Plan
    solution: Solution
    target: Target
    facts: Mapping[str, Fact]
    feeds: list[dict[str, Array]]
    qdq: ir.Model
    fused: ir.Model

    def forms(self) -> dict[str, str]:
        """The form of each node, by name."""
        return {entry.node: entry.form.value for entry in self.plan.nodes}

    @property
    def narrow(self) -> bool:
        """Whether weights have 7 bits because the target saturates: steps twice as large."""
        return any(weight.params.scheme.bits == 7 for weight in self.solution.weights.values())

    def rebuilt(self, form: Format) -> ir.Model:
        """The same, built once more."""
        return build(self.prepared, self.plan, self.solution, self.target, self.facts, form)


def compiled(
    text: str | ir.Model,
    *,
    target: str = TARGET,
    opset: int = 17,
    given: Mapping[str, Array] | None = None,
    keep: Mapping[str, str] | None = None,
    scale: float = 1.0,
) -> Compiled:
    """The graph with all that can be integer made so, calibrated on four random feeds by minmax.

    Whatever CPU it is made for, this one must be able to run it.
    """
    model = parse(text, opset) if isinstance(text, str) else text
    feeds = [random_feed(model, seed, given) for seed in range(4)]
    for feed in feeds:
        for name, values in feed.items():
            feed[name] = values * np.float32(scale) if values.dtype == np.float32 else values
    prepared, _ = prepare(model.clone())
    chip = eager(target)
    chip = dataclasses.replace(chip, saturating=chip.saturating or SATURATES)
    facts = probe(prepared, feeds[0])
    found = find_candidates(prepared, chip, facts)
    static = {
        name: Form.FREE if item.role == "free" else Form.STATIC
        for name, item in found.items()
        if isinstance(item, Candidate) and item.role in STATIC_ROLES
    }
    plan = make_plan(prepared, chip, facts, Request(forms=static, keep_float=keep or {}), found)
    tensors = coding(prepared, plan, found)
    wanted = {value.name or "": Need(value.name or "") for value in tensors.tensors}
    stats = observe(prepared, wanted, lambda: enumerate(feeds), facts).tensors
    params = solve_activations(plan, tensors, stats, "minmax")
    weights = solve_weights(plan, found, params, {}, saturating=chip.saturating, search=False)
    solution = Solution(params, weights)
    forms: tuple[Format, Format] = ("qdq", "fused")
    qdq, fused = (build(prepared, plan, solution, chip, facts, form) for form in forms)
    return Compiled(prepared, plan, solution, chip, facts, feeds, qdq, fused)


def reference(made: Compiled, feed: Mapping[str, Array]) -> list[Array]:
    """The outputs of the plan, computed node by node in float with every coded tensor rounded."""
    return _Interpreter(made, feed).run()


class _Interpreter:
    def __init__(self, made: Compiled, feed: Mapping[str, Array]) -> None:
        self.made, self.graph = made, made.prepared.graph
        found = find_candidates(made.prepared, made.target, made.facts)
        self.items = {k: v for k, v in found.items() if isinstance(v, Candidate)}
        self.coded = coding(made.prepared, made.plan, found).tensors
        self.floats: dict[ir.Value, Array] = {}
        self.codes: dict[ir.Value, Array] = {}
        for value in self.graph.inputs:
            if value.name is not None and value.name in feed:
                self.floats[value] = feed[value.name]
        for value in self.graph.initializers.values():
            assert value.const_value is not None
            self.floats.setdefault(value, value.const_value.numpy())

    def run(self) -> list[Array]:
        for node in self.graph:
            self.compute(node)
        return [self.told(value) for value in self.graph.outputs]

    def params(self, value: ir.Value) -> QParams:
        return self.made.solution.params[value.name or ""]

    def told(self, value: ir.Value) -> Array:
        """What a float reader sees: what the codes say, if a coded node made them."""
        made_coded = value in self.codes and self.by_codes(value)
        return (
            dequantize(self.codes[value], self.params(value)) if made_coded else self.floats[value]
        )

    def by_codes(self, value: ir.Value) -> bool:
        node = value.producer()
        entry = self.made.plan.get(node.name) if node is not None else None
        return entry is not None and entry.form in (Form.STATIC, Form.FREE, Form.ABSORBED)

    def code(self, value: ir.Value) -> Array:
        if value not in self.codes:
            self.codes[value] = quantize(self.floats[value], self.params(value))
        return self.codes[value]

    def read(self, value: ir.Value) -> Array:
        """What an integer node reads."""
        return dequantize(self.code(value), self.params(value))

    def compute(self, node: ir.Node) -> None:
        entry = self.made.plan[node.name or ""]
        item = self.items.get(entry.node)
        if entry.form is Form.FREE:
            assert item is not None
            self.codes[node.outputs[0]] = self.code(item.data[0])
            return
        values: list[Array | None] = []
        for value in node.inputs:
            if value is None:
                values.append(None)
            elif entry.form is Form.STATIC and item is not None and value in item.data:
                values.append(self.read(value))
            elif entry.form is Form.ABSORBED:  # reads what the node before it made, not rounded yet
                values.append(self.floats[value])
            else:
                values.append(self.told(value))
        if entry.form is Form.STATIC and item is not None and item.role == "conv":
            values[1:] = self.weight(node)
        if entry.form is Form.DYNAMIC:
            results = [self.product(node, values[0])]
        elif entry.form is Form.WEIGHT:
            weight = self.made.solution.weights[entry.node]
            results = [evaluate(node, [dequantize(weight.codes, weight.params), *values[1:]])[0]]
        else:
            results = evaluate(node, values)
        for value, result in zip(node.outputs, results, strict=False):
            self.floats[value] = result
            whole = item is None or not item.absorbed or entry.form is not Form.STATIC
            last = entry.form is Form.STATIC and whole
            if value in self.coded and (last or entry.form is Form.ABSORBED):
                self.codes[value] = quantize(result, self.params(value))

    def weight(self, node: ir.Node) -> list[Array]:
        """Weight and bias of a Conv as their integers say."""
        weight: Weight = self.made.solution.weights[node.name or ""]
        values = [dequantize(weight.codes, weight.params)]
        if weight.bias is not None:
            x = node.inputs[0]
            assert x is not None
            scale = self.params(x).scale * weight.params.scale
            values.append(
                (np.rint(weight.bias.astype(np.float64) / scale) * scale).astype(np.float32)
            )
        return values

    def product(self, node: ir.Node, x: Array | None) -> Array:
        """A MatMul or Gemm as DynamicQuantizeLinear and MatMulInteger define it."""
        assert x is not None
        weight = self.made.solution.weights[node.name or ""]
        low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
        scale = np.float32((high - low) / np.float32(255))
        zero = np.clip(np.rint(-low / scale), 0, 255)
        codes = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
        shifted = weight.codes.astype(np.float64) - weight.params.zero
        result: Array = (codes.astype(np.float64) @ shifted) * scale * weight.params.scale
        bias = array(node.inputs[2]) if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        if bias is not None and attribute(node, "beta", 1.0) != 0:
            result = result + bias * attribute(node, "beta", 1.0)
        return result.astype(np.float32)


def evaluate(node: ir.Node, values: list[Array | None]) -> list[Array]:
    """One node in ORT."""
    inputs: list[ir.Value | None] = []
    feed: dict[str, Array] = {}
    for i, value in enumerate(values):
        if value is None:
            inputs.append(None)
            continue
        kind = ir.DataType.from_numpy(value.dtype)
        inputs.append(ir.Value(name=f"i{i}", type=ir.TensorType(kind), shape=ir.Shape(value.shape)))
        feed[f"i{i}"] = value
    copy = ir.Node(
        node.domain, node.op_type, inputs, list(node.attributes.values()),
        num_outputs=len(node.outputs), name="node",
    )  # fmt: skip
    for i, made in enumerate(copy.outputs):
        made.name = f"o{i}"
    given = [value for value in inputs if value is not None]
    graph = ir.Graph(given, copy.outputs, nodes=[copy], opset_imports={"": 17}, name="one")
    return run(ir.Model(graph, ir_version=8), feed)


@dataclasses.dataclass(frozen=True)
class Distance:
    """Greatest difference between outputs, in codes of each output."""

    codes: float

    @classmethod
    def between(cls, made: Compiled, ours: list[Array], theirs: list[Array]) -> Distance:
        worst = 0.0
        for value, got, want in zip(made.prepared.graph.outputs, ours, theirs, strict=True):
            assert got.shape == want.shape
            assert got.dtype == want.dtype
            if not got.size:
                continue
            known = made.solution.params.get(value.name or "")
            step = float(np.abs(want).max()) / 255 or 1.0 if known is None else float(known.scale)
            worst = max(worst, float(np.abs(got.astype(np.float64) - want).max()) / step)
        return cls(worst)


def assert_lowered(
    made: Compiled, *, fused: float = 1.01, deployed: float = 2.01, accuracy: float = 0.05
) -> None:
    """Both forms are valid and compute what the plan says.

    Args:
        made: what was compiled.
        fused: codes of an output by which the two forms may differ, as written.
        deployed: codes by which each, with all of ORT's optimizations, may differ from the plan.
        accuracy: of the greatest magnitude of an output, error against the float model; where weights
            have 7 bits their part of it doubles, which is at most the default once more.
    """
    accuracy += 0.05 if made.narrow else 0.0
    for model in (made.qdq, made.fused):
        assert io.check(model) is None
        for ours, theirs in (
            (model.graph.inputs, made.prepared.graph.inputs),
            (model.graph.outputs, made.prepared.graph.outputs),
        ):
            assert [(v.name, v.dtype) for v in ours] == [(v.name, v.dtype) for v in theirs]
    for feed in made.feeds:
        wanted = reference(made, feed)
        exact = run(made.qdq, feed)
        assert Distance.between(made, exact, wanted).codes < 1e-3
        assert Distance.between(made, run(made.fused, feed), exact).codes <= fused
        for model in (made.qdq, made.fused):
            assert Distance.between(made, run(model, feed, "all"), exact).codes <= deployed
        for got, want in zip(exact, run(made.prepared, feed), strict=True):
            assert np.abs(got - want).max(initial=0.0) <= accuracy * np.abs(want).max(initial=1e-9)


def op_types(model: ir.Model) -> list[str]:
    """The operators of the main graph, in order."""
    return [node.op_type for node in model.graph]


def integer_ops(model: ir.Model) -> list[str]:
    """Those of the main graph that are not Q or DQ."""
    return [op for op in op_types(model) if op not in ("QuantizeLinear", "DequantizeLinear")]


def constant(name: str, *shape: int, seed: int = 0, scale: float = 1.0) -> str:
    """The declaration of a random float initializer, in ONNX text."""
    rng = np.random.default_rng([seed, *name.encode()])
    values = rng.standard_normal(shape).reshape(-1) * scale
    numbers = ", ".join(f"{value:.4f}" for value in values)
    return f"float{list(shape) if shape else ''} {name} = {{{numbers}}}".replace(" = {}", " = {0}")
