"""How much each site of a plan adds to the error of the outputs, measured with one session.

The float graph, with the weights already rounded, gets a switch at every site: a coded tensor passes
through Q/DQ or not, the input of a dynamic product is quantized or not. Switches and scales are inputs, so
that one session serves all measurements:

    x -> Where(switch[i], DequantizeLinear(QuantizeLinear(x, scale[i], zero[i])), x) -> readers

Noise is the noise-to-signal power ratio of the worst output slice. Ratios of separate sites nearly add up
as long as they are small; what is measured with all switches off is the share of the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.graph.edit import Names, add_initializer, add_node, attribute
from qcompile.plan.candidates import Candidate
from qcompile.plan.plan import Form, Plan
from qcompile.plan.tensors import Coding
from qcompile.quant.affine import dequantize
from qcompile.quant.scheme import QParams
from qcompile.run.session import Feed, Options, Session, quick_level
from qcompile.solve.weights import Weight
from qcompile.verify.compare import Reference

SWITCHES, SCALES, ZEROS = "qc_switches", "qc_scales", "qc_zeros"


@dataclasses.dataclass(frozen=True)
class Site:
    """A place where a plan adds error: the root of coded tensors, the input of a dynamic node, or a weight.

    Attributes:
        name: of the tensor; of the node, where the site is its input or its weight.
        dynamic: it is the input of a dynamic node.
        weight: it is the weight of a node.
        result: the value behind the switch of a tensor.
    """

    name: str
    dynamic: bool
    weight: bool = False
    result: str = ""


def switched(
    prepared: ir.Model, plan: Plan, found: Mapping[str, Candidate | str], coding: Coding,
    weights: Mapping[str, Weight], code_type: ir.DataType, *, by_weight: bool = False,
) -> tuple[ir.Model, list[Site]]:  # fmt: skip
    """The float model with a switch at every site of the main graph, and the sites in graph order.

    Weights of products are rounded; `by_weight`: they are sites too, the first ones, and so are tables.
    """
    model = prepared.clone()
    graph, names = model.graph, Names(model)
    builder = _Builder(graph, names, code_type)
    by_node = {node.name: node for node in graph}
    for entry in plan.of(Form.STATIC, Form.DYNAMIC, Form.WEIGHT):
        item = found[entry.node]
        if not by_weight and isinstance(item, Candidate) and item.role == "embedding":
            continue
        if entry.node in weights and entry.node in by_node and isinstance(item, Candidate):
            if by_weight:
                builder.weight(by_node[entry.node], weights[entry.node])
            else:
                round_weight(graph, names, by_node[entry.node], weights[entry.node])
    by_value = {value.name: value for value in graph.inputs}
    by_value |= {value.name: value for node in graph for value in node.outputs}
    order = {name: i for i, name in enumerate(by_value)}
    by_codes = {entry.node for entry in plan.of(Form.STATIC, Form.FREE)}
    for root in sorted(coding.roots, key=lambda value: order.get(value.name, 0)):
        value = by_value[root.name]
        builder.tensor(value, None if made_by_codes(root, plan) else by_codes)
    for entry in plan.of(Form.DYNAMIC):
        item = found[entry.node]
        if entry.node in by_node and isinstance(item, Candidate) and item.role == "dynamic":
            builder.dynamic(by_node[entry.node])
    graph.sort()
    return model, builder.sites


def made_by_codes(value: ir.Value, plan: Plan) -> bool:
    """Whether an integer node makes the tensor, so that float readers see its codes as well."""
    node = value.producer()
    entry = plan.get(node.name) if node is not None else None
    return entry is not None and entry.form in (Form.STATIC, Form.FREE, Form.ABSORBED)


def round_weight(graph: ir.Graph, names: Names, node: ir.Node, weight: Weight) -> None:
    """The node reads the weight, and the corrected bias, as they will be; a Gather its table."""
    place = 0 if node.op_type == "Gather" else 1
    source = node.inputs[place]
    assert source is not None and source.const_value is not None
    shape = tuple(int(d) for d in source.const_value.shape)  # type: ignore[arg-type]
    back = dequantize(weight.codes, weight.params)
    if node.op_type == "Gemm":  # the codes are (K, N), and alpha times the weight
        back = back.T if attribute(node, "transB", 0) else back
        back = back / np.float32(attribute(node, "alpha", 1.0) or 1.0)
    node.replace_input_with(place, add_initializer(graph, names, "qc_weight", back.reshape(shape)))
    if node.op_type == "Conv" and weight.bias is not None:
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, add_initializer(graph, names, "qc_bias", weight.bias))


class _Builder:
    """Inserts switches; `sites` grows with them."""

    def __init__(self, graph: ir.Graph, names: Names, code_type: ir.DataType) -> None:
        self.graph, self.names = graph, names
        self.sites: list[Site] = []
        self._inputs = [
            ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape([None]))
            for name, kind in (
                (SWITCHES, ir.DataType.BOOL), (SCALES, ir.DataType.FLOAT), (ZEROS, code_type)
            )
        ]  # fmt: skip
        graph.inputs.extend(self._inputs)

    def tensor(self, value: ir.Value, readers: AbstractSet[str] | None) -> None:
        """A switch between a tensor and its readers: all of them, or the nodes of these names."""
        uses = [u for u in value.uses() if readers is None or u.node.name in readers]
        was_output = value.is_graph_output() and readers is None
        flag, scale, zero = self._pick(len(self.sites))
        q = self._add("QuantizeLinear", [value, scale, zero])
        back = self._add("DequantizeLinear", [q, scale, zero])
        result = self._behind(value, flag, back, uses, was_output=was_output)
        name = str(result.name if was_output else value.name)
        self.sites.append(Site(name, dynamic=False, result=str(result.name)))

    def weight(self, node: ir.Node, weight: Weight) -> None:
        """A switch at the weight and the bias of a product; behind a Gather, whose table may be large."""
        flag = self._pick(len(self.sites))[0]
        self.sites.append(Site(node.name or "", dynamic=False, weight=True))
        if node.op_type == "Gather":
            value = node.outputs[0]
            uses = list(value.uses())
            rounded = self._add("Gather", node.inputs)
            copy = rounded.producer()
            assert copy is not None
            copy.attributes.update(node.attributes)
            round_weight(self.graph, self.names, copy, weight)
            self._behind(value, flag, rounded, uses, was_output=value.is_graph_output())
            return
        old = [*node.inputs, None][1:3]
        if old[1] is None and weight.bias is not None and node.op_type == "Conv":
            old[1] = add_initializer(
                self.graph, self.names, "qc_bias", np.zeros_like(weight.bias, np.float32)
            )
        round_weight(self.graph, self.names, node, weight)
        for i, before in enumerate(old, 1):
            new = node.inputs[i] if i < len(node.inputs) else None
            if before is not None and new is not None and new is not before:
                node.replace_input_with(i, self._add("Where", [flag, new, before]))

    def _behind(
        self, value: ir.Value, flag: ir.Value, changed: ir.Value, uses: Iterable[tuple[ir.Node, int]], *, was_output: bool
    ) -> ir.Value:  # fmt: skip
        """What these uses read instead of a value: `changed` if the flag is set."""
        result = self._add("Where", [flag, changed, value])
        result.type, result.shape = value.type, value.shape
        for node, i in uses:
            node.replace_input_with(i, result)
        if was_output:
            for i, output in enumerate(self.graph.outputs):
                if output is value:
                    self.graph.outputs[i] = result
            value.name, result.name = self.names.fresh(f"{value.name}_float"), value.name
        return result

    def dynamic(self, node: ir.Node) -> None:
        """A switch at the input of a dynamic product."""
        x = node.inputs[0]
        assert x is not None
        flag = self._pick(len(self.sites))[0]
        dynamic = ir.node(
            "DynamicQuantizeLinear", [x], num_outputs=3, name=self.names.fresh("qc_dynamic")
        )
        for value in dynamic.outputs:
            value.name = self.names.fresh("qc_dynamic")
        self.graph.append(dynamic)
        back = self._add("DequantizeLinear", list(dynamic.outputs))
        node.replace_input_with(0, self._add("Where", [flag, back, x]))
        self.sites.append(Site(node.name or "", dynamic=True))

    def _pick(self, index: int) -> list[ir.Value]:
        """The site's entries of the three inputs, as scalars."""
        number = add_initializer(self.graph, self.names, "qc_index", np.asarray(index, np.int64))
        return [self._add("Gather", [source, number]) for source in self._inputs]

    def _add(self, op_type: str, inputs: Sequence[ir.Value | None]) -> ir.Value:
        name = f"qc_{op_type}"
        return add_node(
            self.names, op_type, inputs, graph=self.graph, name=name, output=name
        ).outputs[0]


class Meter:
    """Measures the noise of sets of sites on a few calibration samples."""

    def __init__(
        self, model: ir.Model, sites: Sequence[Site], params: Mapping[str, QParams], reference: Reference,
        *, samples: int, threads: int,
    ) -> None:  # fmt: skip
        """Raises: ModelError if ORT refuses the switched model."""
        self.sites, self._reference, self._samples = list(sites), reference, samples
        self._session = Session(model, Options(quick_level(model), threads=threads))
        (zeros,) = (value for value in model.graph.inputs if value.name == ZEROS)
        assert zeros.dtype is not None
        self._scales = np.array(
            [1.0 if s.dynamic or s.weight else float(params[s.name].scale) for s in sites],
            np.float32,
        )
        self._zeros = np.array(
            [0 if s.dynamic or s.weight else int(params[s.name].zero) for s in sites],
            zeros.dtype.numpy(),
        )

    def noise(self, on: Sequence[int], trial: tuple[int, QParams] | None = None) -> float:
        """Noise with these sites quantized, one of them perhaps with other parameters."""
        flags = np.zeros(len(self.sites), np.bool_)
        flags[list(on)] = True
        scales, zeros = self._scales, self._zeros
        if trial is not None:
            scales, zeros = scales.copy(), zeros.copy()
            scales[trial[0]], zeros[trial[0]] = trial[1].scale, trial[1].zero
        extra = {SWITCHES: flags, SCALES: scales, ZEROS: zeros}
        return self._reference.compare(
            _Extended(self._session, extra), self._samples
        ).noise_to_signal

    def adopt(self, site: int, params: QParams) -> None:
        """The site has these parameters from now on."""
        self._scales[site], self._zeros[site] = params.scale, params.zero


@dataclasses.dataclass
class Noise:
    """Noise by site, and that of the weights.

    Attributes:
        sites: by the site's name.
        measured: indices of sites that were measured alone, not as part of a group.
        weights: with all switches off.
        total: with all switches on.
    """

    sites: dict[str, float]
    measured: list[int]
    weights: float
    total: float


def measure(
    meter: Meter, *, groups: int, share: float = 0.9, most: int = 40,
    tick: Callable[[], None] = lambda: None,
) -> Noise:  # fmt: skip
    """The noise of every site: groups of neighbours first, then each site of the noisiest groups.

    Groups are refined until those refined hold `share` of the noise, or `most` sites; a group that is not refined shares
    its noise evenly among its sites.
    """
    count = len(meter.sites)
    weights, total = meter.noise([]), meter.noise(range(count))
    noise, measured = measure_units(
        lambda on: max(meter.noise(on) - weights, 0.0), [[i] for i in range(count)],
        groups=groups, share=share, most=most, tick=tick,
    )  # fmt: skip
    return Noise(
        {site.name: value for site, value in zip(meter.sites, noise, strict=True)},
        measured, weights, total,
    )  # fmt: skip


def measure_units(
    noise_of: Callable[[Sequence[int]], float], units: Sequence[Sequence[int]], *, groups: int, share: float,
    most: int, tick: Callable[[], None] = lambda: None,
) -> tuple[list[float], list[int]]:  # fmt: skip
    """As `measure`, for sets of sites: the noise of each unit, and which were measured alone.

    Args:
        noise_of: what these sites, switched on, add to the noise.
        units: indices of the sites of each.
        groups: into which neighbours are joined at first.
        share: of the noise that refined groups hold.
        most: units that are measured alone.
        tick: called after each measurement.
    """
    count = len(units)
    if not count:
        return [], []
    parts = [list(map(int, part)) for part in np.array_split(np.arange(count), min(groups, count))]
    sums = []
    for part in parts:
        sums.append(noise_of([i for k in part for i in units[k]]))
        tick()
    noise = {i: s / len(part) for part, s in zip(parts, sums, strict=True) for i in part}
    measured: list[int] = []
    covered = 0.0
    for k in sorted(range(len(parts)), key=lambda k: -sums[k]):
        if covered >= share * sum(sums) or len(measured) >= most:
            break
        covered += sums[k]
        for i in parts[k]:
            if len(parts[k]) > 1:
                noise[i] = noise_of(units[i])
                tick()
            measured.append(i)
    return [noise[i] for i in range(count)], measured


def improve_ranges(
    meter: Meter, noise: Noise, alternatives: Callable[[str], Iterator[tuple[Any, QParams]]], *, most: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """For the noisiest tensors the alternative of least output noise, where it beats what they have.

    Args:
        meter: adopts what is chosen.
        noise: updated for the sites that change.
        alternatives: for a tensor's name, (label, parameters) to try.
        most: number of tensors.
        tick: called after each trial.

    Returns:
        label by tensor name, for those that changed.
    """
    chosen: dict[str, Any] = {}
    ranked = sorted(noise.measured, key=lambda i: -noise.sites[meter.sites[i].name])
    for i in [i for i in ranked if not meter.sites[i].dynamic][:most]:
        name = meter.sites[i].name
        for label, params in alternatives(name):
            value = max(meter.noise([i], (i, params)) - noise.weights, 0.0)
            tick()
            if value < 0.8 * noise.sites[name]:  # a clear gain: few samples judge
                noise.sites[name], chosen[name] = value, label
                meter.adopt(i, params)
    return chosen


class _Extended:
    """A session whose feeds carry further, fixed inputs."""

    def __init__(self, session: Session, extra: Mapping[str, npt.NDArray[Any]]) -> None:
        self._session, self._extra = session, extra

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[npt.NDArray[Any]]:
        return self._session.run({**feed, **self._extra}, outputs)
