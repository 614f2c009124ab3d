"""What integer nodes save: time of their kernels as float less that as integer, and of what the borders cost."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompile.calib.taps import with_outputs
from qcompile.harm import alone
from qcompile.plan.candidates import Candidate
from qcompile.plan.make import Request, border_costs, node_costs
from qcompile.plan.plan import Form, Plan
from qcompile.run.session import Feed, Options, Session
from qcompile.verify.latency import race
from qcompile.verify.layerwise import Quantized, Unit
from qcompile.workshop import Workshop

_ALONE = 8  # nodes that are timed in a model of their own
_SECONDS = 0.3  # of timing one


def node_gains(shop: Workshop, request: Request, plan: Plan) -> dict[str, float]:
    """Nanoseconds that each integer node saves, by name: what its float readers then have to wait for counts.

    Times are those of `Request.measured`, or what the target says. LSTM and lookups, of which neither tells
    anything, are missing, and so are nodes whose sizes are unknown.
    """
    found: dict[str, float] = {}
    for entry in plan.of(Form.STATIC, Form.DYNAMIC, Form.WEIGHT, Form.FREE):
        item = shop.found[entry.node]
        assert isinstance(item, Candidate)
        known = item.node.outputs[0].name in shop.facts or entry.node in request.measured
        if item.role in ("recurrent", "embedding") or not known:
            continue
        as_float, as_int = request.measured.get(entry.node) or node_costs(item, shop.facts)
        if entry.form is Form.WEIGHT:
            as_int = request.by_block.get(entry.node, as_int)
        found[entry.node] = as_float - as_int
        if entry.form in (Form.STATIC, Form.FREE) and _has_float_readers(shop, plan, item):
            found[entry.node] -= (
                request.border * border_costs(item.result, shop.target, shop.facts)[1]
            )
    return found


def border_gain(shop: Workshop, request: Request, tensor: str) -> float:
    """Nanoseconds, below zero, of quantizing a tensor that no integer node makes."""
    values = {value.name: value for value in shop.prepared.graph.inputs}
    values |= {value.name: value for node in shop.prepared.graph for value in node.outputs}
    return -request.border * border_costs(values[tensor], shop.target, shop.facts)[0]


def _has_float_readers(shop: Workshop, plan: Plan, item: Candidate) -> bool:
    """Whether a coded result must become float again for someone."""

    def by_codes(node: ir.Node) -> bool:
        entry, reader = plan.get(node.name), shop.found.get(node.name or "")
        coded = entry is not None and entry.form in (Form.STATIC, Form.FREE)
        return coded and isinstance(reader, Candidate) and item.result in reader.data

    return item.result.is_graph_output() or not all(
        by_codes(use.node) for use in item.result.uses()
    )


def timed_alone(
    shop: Workshop, given: Quantized, units: Sequence[Unit], feed: Feed
) -> dict[Unit, float]:
    """Nanoseconds that nodes save which no cut weighs: the model with one of them quantized, against the float one.

    Lookups are left out: they save memory, and less time than can be seen.
    """
    units = [unit for unit in units if given.item(unit.node).role != "embedding"]
    if not units:
        return {}
    outputs = [value.name or "" for value in given.prepared.graph.outputs]
    options = Options("all", threads=shop.recipe.threads)
    plain = Session(with_outputs(given.prepared, outputs), options)
    found: dict[Unit, float] = {}
    with shop.progress.stage("timing single nodes", len(units[:_ALONE])) as step:
        for unit in units[:_ALONE]:
            session = alone(shop, given, unit, outputs)
            if session is not None:
                seen = race({"fp32": plain, "alone": session}, feed, seconds=_SECONDS)
                found[unit] = 1e6 * seen.ms["fp32"] * (1.0 - 1.0 / seen.speedup["alone"])
            step(1, None)
    return found
