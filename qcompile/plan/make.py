"""Makes the plan: the cheapest assignment of forms, as a minimum cut.

Every node that can be static costs so much as an integer kernel and so much as a float one; every
tensor between the two costs a QuantizeLinear or a DequantizeLinear, once however many read it. The
assignment of least total cost is a minimum cut of a graph with one vertex a node and one a tensor
(Greig, Porteous and Seheult 1989), found exactly by `qcompile.plan.network`. An integer island that does
not pay for its borders thus stays float without a rule that says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import attribute, graphs
from qcompile.graph.io import MAX_OPSET
from qcompile.plan.candidates import Candidate, Facts, candidate
from qcompile.plan.network import Network
from qcompile.plan.plan import Form, NodePlan, Plan
from qcompile.targets.schema import Target

_CLEARLY = 0.95  # of the time of a dynamic product: less is noise of the clock
_STATIC = ("conv", "binary", "unary", "pool", "concat", "same", "free")


@dataclasses.dataclass(frozen=True)
class Request:
    """What limits a plan.

    Attributes:
        calibrated: there is data, so static forms are possible.
        static: static forms are wanted.
        keep_float: node names -> why they must stay float.
        forms: forms that a person or a measurement fixed, by node name.
        reasons: why `forms` has a node float, where that was no person's plan.
        dynamic: dynamic forms are allowed.
        noise: noise-to-signal ratio that the outputs get from rounding a tensor, or from a dynamic node.
        weights: the same from rounding the weight of a node, by its name.
        price: nanoseconds that one unit of noise costs; the plan then trades speed for accuracy.
        most_noise: what the noise of a plan may sum up to; the plan is then the cheapest one within it.
        measured: (float, integer) nanoseconds of nodes, in place of the target's costs.
        border: factor on the target's costs of borders.
        gain: factor on the target's costs of float nodes.
        only: nodes that may be static: those of a plan that was calibrated; None: all.
        by_block: nanoseconds of products with an 8-bit weight alone, by name, where that may be.
        block_noise: noise-to-signal ratio that the outputs get from such a product.
        clock: a search that takes too long may end with the best plan so far.
    """

    calibrated: bool = True
    static: bool = True
    keep_float: Mapping[str, str] = dataclasses.field(default_factory=dict)
    forms: Mapping[str, Form] = dataclasses.field(default_factory=dict)
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dynamic: bool = True
    noise: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    price: float = 0.0
    most_noise: float = math.inf
    measured: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    border: float = 1.0
    gain: float = 1.0
    only: AbstractSet[str] | None = None
    by_block: Mapping[str, float] = dataclasses.field(default_factory=dict)
    block_noise: Mapping[str, float] = dataclasses.field(default_factory=dict)
    clock: bool = True


def find_candidates(model: ir.Model, target: Target, facts: Facts) -> dict[str, Candidate | str]:
    """For every node of every graph, by name, its candidate or the reason why it stays float."""
    found: dict[str, Candidate | str] = {}
    opset = model.opset_imports.get("", 99)
    for graph in graphs(model):
        for node in graph:
            result = candidate(node, target, facts)
            if isinstance(result, Candidate) and result.role in _STATIC and opset > MAX_OPSET:
                result = f"opset {opset} has no QuantizeLinear in ONNX Runtime: export it at {MAX_OPSET} or below"
            if isinstance(result, Candidate) and opset < (12 if node.op_type == "MaxPool" else 11):
                result = f"opset {opset} has no 8-bit form of it, and could not be raised"
            if (
                graph is not model.graph
                and isinstance(result, Candidate)
                and result.role in _STATIC
            ):
                result = "inside a control-flow body, where ranges are not observed yet"
            found[node.name or ""] = result
    return found


def make_plan(
    model: ir.Model, target: Target, facts: Facts, request: Request,
    found: Mapping[str, Candidate | str] | None = None,
) -> Plan:  # fmt: skip
    """The plan of least cost for the shapes in `facts`."""
    found = find_candidates(model, target, facts) if found is None else found
    static = {
        name: item
        for name, item in found.items()
        if isinstance(item, Candidate) and item.role in _STATIC and _allowed(name, item, request)
    }
    linear = {
        name: item
        for name, item in found.items()
        if isinstance(item, Candidate) and item.role == "dynamic" and request.dynamic
        and _allowed(name, item, request) and _worth_its_noise(name, item, facts, request)
    }  # fmt: skip
    absorbed = {n.name or "": c for c in (*static.values(), *linear.values()) for n in c.absorbed}
    for name in absorbed:
        static.pop(name, None)
    coded = static if request.calibrated and request.static else {}
    if math.isfinite(request.most_noise):
        chosen, by_block = _cut(coded, linear, target, facts, request)
    else:
        chosen = _cut(coded, {}, target, facts, request)[0] | linear.keys()
        by_block = {
            name for name, item in linear.items() if _faster_by_block(name, item, facts, request)
        }
    ops = {node.name or "": node.op_type for graph in graphs(model) for node in graph}
    entries = []
    for name, item in found.items():
        if name in by_block and isinstance(item, Candidate):
            entries.append(_by_block(name, item))
            continue
        entries.append(_entry(name, item, chosen, static, absorbed, target, request, ops))
    return Plan(target.name, target.activation, tuple(entries))


def product_costs(
    name: str, item: Candidate, facts: Facts, request: Request
) -> tuple[float, float, float | None]:
    """Nanoseconds of a product as float, as dynamic, and with an 8-bit weight alone, where it may be that."""
    form = request.forms.get(name)
    as_float, as_int = request.measured.get(name) or node_costs(item, facts)
    by_block = request.by_block.get(name) if item.block else None
    if form is Form.WEIGHT and item.block:
        return as_float, as_int, as_int if by_block is None else by_block
    return as_float, as_int, None if form is Form.DYNAMIC else by_block


def _faster_by_block(name: str, item: Candidate, facts: Facts, request: Request) -> bool:
    """Whether a product is faster with an 8-bit weight alone, or must be so."""
    _, as_int, by_block = product_costs(name, item, facts, request)
    if by_block is None:
        return False
    return request.forms.get(name) is Form.WEIGHT or by_block < _CLEARLY * as_int


def _by_block(name: str, item: Candidate) -> NodePlan:
    scheme = f"int8.axis0/{item.block}.sym"
    return NodePlan(name, item.node.op_type, Form.WEIGHT, scheme, "8-bit weight, scales by block")


def _worth_its_noise(name: str, item: Candidate, facts: Facts, request: Request) -> bool:
    if not request.price or name not in request.noise:
        return True
    as_float, as_int = request.measured.get(name) or node_costs(item, facts)
    noise = request.noise[name] + request.weights.get(name, 0.0)
    return request.price * noise < as_float - as_int


def _allowed(name: str, item: Candidate, request: Request) -> bool:
    if request.only is not None and item.role in _STATIC and name not in request.only:
        return False
    names = [name, *(n.name or "" for n in item.absorbed)]
    # a node that a plan sets to integer takes what it absorbs with it
    wanted = request.forms.get(name) in (Form.STATIC, Form.DYNAMIC, Form.WEIGHT)
    fixed = () if wanted else [n for n in names if request.forms.get(n) == Form.FLOAT]
    return not fixed and not any(n in request.keep_float for n in names)


def _entry(
    name: str, item: Candidate | str, chosen: AbstractSet[str], static: Mapping[str, Candidate],
    absorbed: Mapping[str, Candidate], target: Target, request: Request,
    ops: Mapping[str, str],
) -> NodePlan:  # fmt: skip
    op = ops.get(name, "")
    if name in request.keep_float:
        return NodePlan(name, op, Form.FLOAT, why=request.keep_float[name])
    if name in absorbed and (absorbed[name].node.name or "") in chosen:
        return NodePlan(name, op, Form.ABSORBED, why=f"part of {absorbed[name].node.name}")
    if isinstance(item, str):
        return NodePlan(name, op, Form.FLOAT, why=item)
    if request.forms.get(name) == Form.FLOAT:
        return NodePlan(name, op, Form.FLOAT, why=request.reasons.get(name, "set in the plan"))
    for after in item.absorbed if name not in chosen else ():
        if after.name in request.keep_float or request.forms.get(after.name or "") == Form.FLOAT:
            return NodePlan(name, op, Form.FLOAT, why=f"{after.name} after it stays float")
    if item.role in ("dynamic", "recurrent"):
        if not request.dynamic:
            return NodePlan(name, op, Form.FLOAT, why="dynamic quantization is off")
        if item.role == "dynamic" and name not in chosen:
            return NodePlan(name, op, Form.FLOAT, why="left float for accuracy")
        axis = 1 if item.role == "dynamic" else 0
        if item.role == "dynamic" and attribute(item.node, "transB", 0):
            axis = 0
        scheme = target.weight.replace("axis0", f"axis{axis}")
        return NodePlan(name, op, Form.DYNAMIC, scheme, "integer kernel, scale found at run time")
    if item.role == "embedding":
        return NodePlan(name, op, Form.WEIGHT, "int8.axis0.sym", "8-bit rows, looked up")
    if name in chosen:
        if item.role == "free":
            return NodePlan(name, op, Form.FREE, why="only changes scale and zero point")
        weight = target.weight if item.role == "conv" else ""
        return NodePlan(name, op, Form.STATIC, weight, "integer kernel")
    if not request.static:
        return NodePlan(name, op, Form.FLOAT, why="static quantization is off")
    if not request.calibrated:
        return NodePlan(name, op, Form.FLOAT, why="needs calibration data: give --data")
    if name in static:
        why = (
            "left float for accuracy or speed"
            if request.price or request.measured or math.isfinite(request.most_noise)
            else "an integer kernel would not pay for its borders"
        )
        return NodePlan(name, op, Form.FLOAT, why=why)
    if name in absorbed:
        return NodePlan(
            name, op, Form.FLOAT, why=f"{absorbed[name].node.name} before it stays float"
        )
    return NodePlan(name, op, Form.FLOAT, why="an integer kernel would not pay for its borders")


def _cut(
    static: Mapping[str, Candidate], linear: Mapping[str, Candidate], target: Target, facts: Facts, request: Request,
) -> tuple[set[str], set[str]]:  # fmt: skip
    """The names of the nodes that become integer, and of those among them whose weight alone does.

    Those of `linear` have no borders.
    """
    network = Network()
    vertex = {name: network.vertex() for name in (*static, *linear)}
    producer = {item.result: name for name, item in static.items()}
    for name, item in static.items():
        for value in item.node.outputs[1:]:
            producer[value] = name
    dynamic: dict[str, int] = {}
    for name, item in (*static.items(), *linear.items()):
        rounded = name if name in linear else item.result.name or ""
        # some only hand on what is rounded already
        noise = 0.0 if item.role in ("same", "free") else request.noise.get(rounded, 0.0)
        noise += request.weights.get(name, 0.0)
        if name in linear:
            dynamic[name] = _product(network, vertex[name], name, item, noise, facts, request)
            continue
        _node(network, vertex[name], name, item, noise, facts, request)
        if item.node.op_type == "MaxPool":
            _after_channels_last(network, vertex, name, item, static, producer)
    _borders(network, vertex, static, producer, target, facts, request)
    side = None
    if math.isfinite(request.most_noise):
        side = network.integer_side_within(request.most_noise, clock=request.clock)
    if side is None:
        side = network.integer_side(request.price)
    chosen = {name for name, number in vertex.items() if number in side}
    return chosen, {
        name for name, number in dynamic.items() if name in chosen and number not in side
    }


def _node(
    network: Network, vertex: int, name: str, item: Candidate, noise: float, facts: Facts, request: Request
) -> None:  # fmt: skip
    """What a node costs on either side."""
    as_float, as_int = request.measured.get(name) or node_costs(item, facts)
    as_float *= 1.0 if name in request.measured else request.gain
    if request.forms.get(name) in (Form.STATIC, Form.FREE, Form.DYNAMIC):
        network.edge(0, vertex, None)
    network.edge(0, vertex, as_float)
    network.edge(vertex, 1, as_int, noise)


def _product(
    network: Network, vertex: int, name: str, item: Candidate, noise: float, facts: Facts, request: Request
) -> int:  # fmt: skip
    """What a product costs in each of its forms; the vertex that is on the integer side if it is dynamic.

    With an 8-bit weight alone it stands between the others: `vertex` is on the integer side, and that one is not.
    """
    as_float, as_int, by_block = product_costs(name, item, facts, request)
    quiet = request.block_noise.get(name, 0.0)
    if request.forms.get(name) in (Form.DYNAMIC, Form.WEIGHT):
        network.edge(0, vertex, None)
    network.edge(0, vertex, as_float)
    if by_block is None:
        network.edge(vertex, 1, as_int, noise)
        return vertex
    second = network.vertex()
    network.edge(second, vertex, None)
    network.edge(vertex, second, by_block, quiet)
    if request.forms.get(name) is Form.WEIGHT or (by_block < as_int and quiet <= noise):
        network.edge(second, 1, None)  # dynamic is worse in both
    else:
        network.edge(second, 1, as_int, noise)
    return second


def _borders(
    network: Network, vertex: Mapping[str, int], static: Mapping[str, Candidate], producer: Mapping[ir.Value, str],
    target: Target, facts: Facts, request: Request,
) -> None:  # fmt: skip
    """What a QuantizeLinear or DequantizeLinear costs wherever a tensor is read on the other side, once each."""
    readers: dict[ir.Value, list[str]] = {}
    for name, item in static.items():
        for value in dict.fromkeys(item.data):
            readers.setdefault(value, []).append(name)
    for value in dict.fromkeys([*readers, *producer]):
        codes = readers.get(value, [])
        code_nodes = {id(static[name].node) for name in codes}
        floats = value.is_graph_output() or any(
            id(use.node) not in code_nodes for use in value.uses()
        )
        to_codes, to_float = (request.border * ns for ns in border_costs(value, target, facts))
        made_by = vertex[producer[value]] if value in producer else 1
        if codes:  # noise is paid where codes are made, however many read them
            gate = network.gate()
            network.edge(gate, made_by, to_codes, request.noise.get(value.name or "", 0.0))
            for name in codes:
                network.edge(vertex[name], gate, None)
        if value in producer:
            if floats:
                network.edge(made_by, 1, to_float)
            elif codes:
                gate = network.gate()
                network.edge(made_by, gate, to_float)
                for name in codes:
                    network.edge(gate, vertex[name], None)


def _after_channels_last(
    network: Network, vertex: Mapping[str, int], name: str, item: Candidate,
    static: Mapping[str, Candidate], producer: Mapping[ir.Value, str],
) -> None:  # fmt: skip
    """8-bit MaxPool pays only as NhwcMaxPool: behind an integer operator that ORT runs channels-last.

    In NCHW it takes 50 to 100 times as long as in float (measured with 1.32).
    """
    maker = producer.get(item.data[0])
    kinds = ("Conv", "Add", "Concat", "MaxPool")
    if maker is None or static[maker].node.op_type not in kinds:
        network.edge(vertex[name], 1, None)
    else:
        network.edge(vertex[name], vertex[maker], None)


def node_costs(item: Candidate, facts: Facts) -> tuple[float, float]:
    """Nanoseconds of a node as float and as integer, borders not counted."""
    fact = facts.get(item.node.outputs[0].name or "")
    elements = fact.elements if fact is not None else 0
    source = facts.get(item.data[0].name or "") if item.data else None
    inputs = source.elements if source is not None else 0
    if item.row is None:  # a product or sum with a number: free as integer
        return 0.19 * elements, 0.0
    macs = 0.0
    if item.role == "conv":
        weight = item.node.inputs[1]
        assert weight is not None and weight.shape is not None
        macs = elements * float(np.prod([int(d) for d in list(weight.shape)[1:]]))  # type: ignore[arg-type]
    elif item.role == "dynamic":
        weight = item.node.inputs[1]
        assert weight is not None and weight.shape is not None
        depth = weight.shape[1 if attribute(item.node, "transB", 0) else 0]
        macs = elements * float(int(depth))  # type: ignore[arg-type]
    return item.row.float.ns(macs, elements, inputs), item.row.int8.ns(macs, elements, inputs)


def border_costs(value: ir.Value, target: Target, facts: Facts) -> tuple[float, float]:
    """Nanoseconds of a QuantizeLinear and of a DequantizeLinear on a value."""
    fact = facts.get(value.name or "")
    elements = fact.elements if fact is not None else 0
    border = target.boundary
    layout = (
        border.layout
        if fact is not None and fact.shape is not None and len(fact.shape) == 4
        else 0.0
    )
    return (
        border.overhead + elements * (border.quantize + layout),
        border.overhead + elements * (border.dequantize + layout),
    )
