"""Errors at the results of layers: what each adds by itself, and what is there in the quantized model.

A layer's own error is seen behind the float graph, where every quantized node is run a second time, on float
inputs, with its weight rounded and its result rounded to codes:

    x -> node(W) -> y;   x -> node(W~) -> Q/DQ -> y~;   sum (y~ - y)^2 / sum y^2

(a dynamic node rounds its input, not its result). One run of that graph serves all layers. The whole error comes
from the float graph in which everything is rounded at once. All are noise-to-signal power ratios, powers summed
over the samples. Nodes in bodies of If, Loop and Scan have results that cannot be seen from outside: none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes.lower_recurrent import LowerRecurrent
from qcompile.build import Solution
from qcompile.calib.taps import with_outputs
from qcompile.graph.edit import Names, add_initializer, add_node
from qcompile.plan.candidates import Candidate, Facts
from qcompile.plan.plan import Form, NodePlan, Plan
from qcompile.plan.tensors import Coding
from qcompile.quant.scheme import QParams
from qcompile.run.session import Feed, Options, Session
from qcompile.solve.weights import Weight
from qcompile.step import run_pass
from qcompile.verify.sensitivity import SCALES, SWITCHES, ZEROS, Site, made_by_codes, round_weight

Array = npt.NDArray[Any]
_NOISE, _POWER = "qc_noise", "qc_power"
_CHUNK_BYTES = 128 << 20  # of results that one run hands out
_HAND_ON = ("same", "free")  # roles that round nothing


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one line of the table stands for.

    Attributes:
        node: a node that rounds something: its weight, its input or its result; "" for a border: a tensor that
            no integer node makes, rounded because integer nodes read it.
        tensor: the node's result, behind what it absorbs; the tensor of a border.
    """

    node: str
    tensor: str

    @property
    def name(self) -> str:
        """The node, or the tensor of a border."""
        return self.node or self.tensor


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A prepared graph, its plan, and what was solved for it."""

    prepared: ir.Model
    plan: Plan
    found: Mapping[str, Candidate | str]
    coding: Coding
    solution: Solution
    saturating: bool

    def item(self, node: str) -> Candidate:
        """The candidate of a planned node."""
        item = self.found[node]
        assert isinstance(item, Candidate)
        return item


def units_of(given: Quantized) -> list[Unit]:
    """Everything that rounds, nodes in the order of the plan, then borders."""
    units = []
    for entry in given.plan.of(Form.STATIC, Form.DYNAMIC, Form.WEIGHT):
        item = given.item(entry.node)
        if item.role not in _HAND_ON:
            units.append(Unit(entry.node, _result(item)))
    borders = (v.name or "" for v in given.coding.roots if not made_by_codes(v, given.plan))
    return [*units, *(Unit("", name) for name in borders)]


def _result(item: Candidate) -> str:
    """The name of what a candidate makes; of an LSTM the first output that is there."""
    named = (value.name for value in item.node.outputs if value.name)
    return (item.result.name if item.absorbed else next(named, "")) or ""


def sites_of(given: Quantized, unit: Unit, sites: Sequence[Site]) -> list[int]:
    """Indices of the sites, those of weights among them, that make up a unit; none in a body."""
    static = unit.node and given.plan[unit.node].form is Form.STATIC
    return [
        i
        for i, site in enumerate(sites)
        if (
            site.name == unit.node
            if site.weight or site.dynamic
            else (static or not unit.node) and site.name == unit.tensor
        )
    ]


def own_errors(
    given: Quantized, units: Sequence[Unit], feeds: Sequence[Feed], *, threads: int
) -> dict[Unit, float]:
    """Noise-to-signal power ratio that each unit alone adds to its result, on float inputs.

    Raises:
        ModelError: ORT refuses the doubled graph.
    """
    twins = _Twins(given)
    seen = [unit for unit in units if twins.add(unit)]
    if not seen:
        return {}
    model = twins.finish()
    session = Session(model, Options("all", threads=threads, in_order=True))
    noise, power = np.zeros(len(seen)), np.zeros(len(seen))
    for feed in feeds:
        found = session.run(feed, [_NOISE, _POWER])
        noise, power = noise + found[0], power + found[1]
    return dict(zip(seen, _ratios(noise, power), strict=True))


def total_errors(
    given: Quantized, switches: tuple[ir.Model, Sequence[Site]], units: Sequence[Unit], feeds: Sequence[Feed],
    facts: Facts, *, threads: int,
) -> dict[Unit, float]:  # fmt: skip
    """The same with everything rounded: what each unit's result differs by in the quantized model.

    Args:
        given: the plan.
        switches: the graph and the sites of `switched`, weights with switches.
        units: results that are looked at.
        feeds: samples.
        facts: sizes of results.
        threads: of ORT's sessions.

    Raises:
        ModelError: ORT refuses the graph.
    """
    graph, sites = switches
    model = graph.clone()
    _lower_recurrent(model, given)
    behind = {
        unit: sites[i].result
        for unit in units
        for i in sites_of(given, unit, sites)
        if sites[i].result
    }
    extra = _all_on(model, sites, given.solution.params)
    options = Options("all", threads=threads)
    found: dict[Unit, float] = {}
    for chunk in _chunks([unit for unit in units if unit.tensor in _values(given.prepared)], facts):
        names = [unit.tensor for unit in chunk], [behind.get(u, u.tensor) for u in chunk]
        plain = Session(with_outputs(given.prepared, dict.fromkeys(names[0])), options)
        rounded = Session(with_outputs(model, dict.fromkeys(names[1])), options)
        runs = ((plain.run(f, names[0]), rounded.run({**f, **extra}, names[1])) for f in feeds)
        found |= zip(chunk, _compared(runs, len(chunk)), strict=True)
    return found


def _compared(runs: Iterable[tuple[list[Array], list[Array]]], count: int) -> list[float]:
    """The ratio of each of so many tensors, from pairs of what was computed in float and rounded."""
    noise, power = np.zeros(count), np.zeros(count)
    for true, seen in runs:
        for i, (y, z) in enumerate(zip(true, seen, strict=True)):
            noise[i] += np.square(np.subtract(z, y, dtype=np.float64)).sum()
            power[i] += np.square(y, dtype=np.float64).sum()
    return _ratios(noise, power)


def _values(model: ir.Model) -> dict[str, ir.Value]:
    """The tensors of the main graph, by name."""
    found = {value.name: value for value in model.graph.inputs}
    found |= {value.name: value for node in model.graph for value in node.outputs}
    return {name: value for name, value in found.items() if name}


def _ratios(noise: npt.NDArray[np.float64], power: npt.NDArray[np.float64]) -> list[float]:
    """Noise over power; infinite where a result of zeros got noise."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = noise / power
    return np.where(noise == 0.0, 0.0, ratio).tolist()  # type: ignore[no-any-return]


def _chunks(units: Sequence[Unit], facts: Facts) -> Iterator[list[Unit]]:
    chunk: list[Unit] = []
    size = 0
    for unit in units:
        fact = facts.get(unit.tensor)
        own = 8 * fact.elements if fact is not None else 0  # float and rounded
        if chunk and size + own > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(unit)
        size += own
    if chunk:
        yield chunk


def _all_on(model: ir.Model, sites: Sequence[Site], params: Mapping[str, QParams]) -> Feed:
    (zeros,) = (value for value in model.graph.inputs if value.name == ZEROS)
    assert zeros.dtype is not None
    known = [None if s.dynamic or s.weight else params[s.name] for s in sites]
    return {
        SWITCHES: np.ones(len(sites), np.bool_),
        SCALES: np.array([1.0 if p is None else float(p.scale) for p in known], np.float32),
        ZEROS: np.array([0 if p is None else int(p.zero) for p in known], zeros.dtype.numpy()),
    }


def _lower_recurrent(model: ir.Model, given: Quantized) -> None:
    """The planned LSTM nodes of a graph, in every body, are integer."""
    planned = {e.node for e in given.plan.of(Form.DYNAMIC)}
    nodes = {n.name or "": n for g in model.graphs() for n in g if n.op_type == "LSTM"}
    items = {name: given.item(name) for name in nodes.keys() & planned}
    found = {
        name: dataclasses.replace(item, node=nodes[name])
        for name, item in items.items()
        if item.role == "recurrent"
    }
    run_pass(LowerRecurrent(given.plan, found, "fused", given.saturating), model)


class _Twins:
    """The float graph with a quantized copy of each unit beside it, and two outputs that compare them."""

    def __init__(self, given: Quantized) -> None:
        self.given = given
        outputs = [value.name or "" for value in given.prepared.graph.outputs]
        self.model = with_outputs(given.prepared, outputs)
        self.graph, self.names = self.model.graph, Names(self.model)
        self.nodes = {node.name: node for node in self.graph}
        self.values = _values(self.model)
        self.shape = add_initializer(self.graph, self.names, "qc_one", np.array([1], np.int64))
        self.noise: list[ir.Value] = []
        self.power: list[ir.Value] = []
        self.entries: list[NodePlan] = []
        self.recurrent: dict[str, Candidate | str] = {}

    def add(self, unit: Unit) -> bool:
        """Compares a unit's result with what it makes of it; False if the graph lacks it."""
        true = self.values.get(unit.tensor)
        if true is None or (unit.node and unit.node not in self.nodes):
            return False
        other = self._node(unit.node) if unit.node else true
        if not unit.node or self.given.plan[unit.node].form is Form.STATIC:
            other = self._rounded(other, self.given.solution.params[unit.tensor])
        self.power.append(self._sum(true))
        self.noise.append(self._sum(self._add("Sub", [other, true])))
        return True

    def finish(self) -> ir.Model:
        """The graph's only outputs are the powers, float32 (units,) each."""
        self.graph.outputs.clear()
        for name, values in ((_NOISE, self.noise), (_POWER, self.power)):
            joined = self._add("Concat", values, axis=0)
            joined.name, joined.type = name, ir.TensorType(ir.DataType.FLOAT)
            self.graph.outputs.append(joined)
        self.graph.sort()
        plan = dataclasses.replace(self.given.plan, nodes=tuple(self.entries))
        run_pass(LowerRecurrent(plan, self.recurrent, "fused", self.given.saturating), self.model)
        return self.model

    def _node(self, name: str) -> ir.Value:
        """What the quantized copy of a node makes, and of what it absorbs: not yet rounded."""
        node, entry, item = self.nodes[name], self.given.plan[name], self.given.item(name)
        copy = self._copy(node, {})
        weight: Weight | None = self.given.solution.weights.get(name)
        if weight is not None:
            round_weight(self.graph, self.names, copy, weight)
        if item.role == "recurrent":
            self.entries.append(dataclasses.replace(entry, node=copy.name or ""))
            self.recurrent[copy.name or ""] = dataclasses.replace(item, node=copy)
        elif entry.form is Form.DYNAMIC:
            x = copy.inputs[0]
            assert x is not None
            copy.replace_input_with(0, self._dynamic(x))
        last, made = node, copy
        for after in item.absorbed:
            behind = self.nodes[after.name]
            made = self._copy(behind, {last.outputs[0]: made.outputs[0]})
            last = behind
        place = next((i for i, v in enumerate(last.outputs) if v.name), 0)
        return made.outputs[place]

    def _copy(self, node: ir.Node, instead: Mapping[ir.Value, ir.Value]) -> ir.Node:
        copy = ir.node(
            node.op_type, [v if v is None else instead.get(v, v) for v in node.inputs], domain=node.domain,
            attributes={name: a.value for name, a in node.attributes.items()},
            num_outputs=len(node.outputs), name=self.names.fresh("qc_copy"),
        )  # fmt: skip
        for made, old in zip(copy.outputs, node.outputs, strict=True):
            made.name = self.names.fresh("qc_copy") if old.name else ""
            made.type, made.shape = old.type, old.shape
        self.graph.append(copy)
        return copy

    def _dynamic(self, x: ir.Value) -> ir.Value:
        node = ir.node(
            "DynamicQuantizeLinear", [x], num_outputs=3, name=self.names.fresh("qc_dynamic")
        )
        for value in node.outputs:
            value.name = self.names.fresh("qc_dynamic")
        self.graph.append(node)
        return self._add("DequantizeLinear", list(node.outputs))

    def _rounded(self, value: ir.Value, params: QParams) -> ir.Value:
        scale = add_initializer(self.graph, self.names, "qc_scale", np.asarray(params.scale))
        zero = add_initializer(self.graph, self.names, "qc_zero", np.asarray(params.zero))
        q = self._add("QuantizeLinear", [value, scale, zero])
        return self._add("DequantizeLinear", [q, scale, zero])

    def _sum(self, value: ir.Value) -> ir.Value:
        return self._add("Reshape", [self._add("ReduceSumSquare", [value], keepdims=0), self.shape])

    def _add(self, op: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
        name = f"qc_{op}"
        return add_node(
            self.names, op, inputs, graph=self.graph, name=name, output=name, attributes=attributes
        ).outputs[0]
