"""Finds out why a result is slow, and plans again with what was measured.

ORT's profiler times every node of the result and of the float model. Nodes get these times in place of the
target's costs, borders are rescaled to what they really took, and the cut is solved again.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qcompile.plan.candidates import Candidate
from qcompile.plan.make import Request, border_costs, node_costs
from qcompile.plan.plan import Form, Plan
from qcompile.run.profile import Profile, profile
from qcompile.run.session import Feed
from qcompile.workshop import Attempt, Workshop

_BORDER_OPS = ("QuantizeLinear", "DequantizeLinear", "Transpose")


def measured_request(
    shop: Workshop, request: Request, attempt: Attempt, feed: Feed, floats: Profile
) -> Request:
    """The request with measured costs for every node whose time was seen in both forms."""
    seen = profile(attempt.model, feed, threads=shop.recipe.threads)
    measured = dict(request.measured)
    ratios = []
    for entry in attempt.plan.of(Form.STATIC, Form.FREE):
        item = shop.found[entry.node]
        assert isinstance(item, Candidate)
        as_int = seen.nodes.get(entry.node)
        as_float = _float_time(item, floats)
        expected = node_costs(item, shop.facts)[1]
        if as_int is not None and expected > 0:
            ratios.append(as_int / expected)
        if as_int is not None and as_float is not None:
            measured[entry.node] = (as_float, as_int)
    _expect(shop, request, floats, measured, float(np.median(ratios)) if ratios else 1.0)
    return dataclasses.replace(
        request, measured=measured, border=_border_factor(shop, attempt, seen)
    )


def _expect(
    shop: Workshop, request: Request, floats: Profile, measured: dict[str, tuple[float, float]], ratio: float
) -> None:  # fmt: skip
    """Nodes that were not integer yet: their float time as measured, their integer cost at this machine's pace."""
    for name, item in shop.found.items():
        if name in measured or not isinstance(item, Candidate):
            continue
        as_float = _float_time(item, floats)
        if as_float is not None and (request.only is None or name in request.only):
            measured[name] = (as_float, ratio * node_costs(item, shop.facts)[1])


def _float_time(item: Candidate, floats: Profile) -> float | None:
    """The node's time as float, with what it absorbs and its share of the layout changes around it.

    ORT fuses activations under the Conv's name or output; its blocked layout (NCHWc) needs reorders, which
    belong to no node of the model.
    """
    names = [item.node.name or "", item.node.outputs[0].name or "", item.result.name or ""]
    found = [floats.nodes[name] for name in dict.fromkeys(names) if name in floats.nodes]
    extra = [floats.nodes.get(n.name or "", 0.0) for n in item.absorbed]
    reorders = sum(floats.operators.get(op, 0.0) for op in ("ReorderInput", "ReorderOutput"))
    rest = max(sum(floats.operators.values()) - reorders, 1.0)
    return (sum(found) + sum(extra)) * (1 + reorders / rest) if found else None


def _border_factor(shop: Workshop, attempt: Attempt, seen: Profile) -> float:
    took = sum(seen.operators.get(op, 0.0) for op in _BORDER_OPS)
    expected = 0.0
    coded = shop.coding(attempt.plan).tensors
    made = {
        item.result
        for entry in attempt.plan.of(Form.STATIC, Form.FREE)
        if isinstance(item := shop.found[entry.node], Candidate)
    }
    for value in coded:
        to_codes, to_float = border_costs(value, shop.target, shop.facts)
        if value not in made and coded[value].root is value:
            expected += to_codes
        readers = {use.node.name for use in value.uses()}
        if value.is_graph_output() or any(
            (entry := attempt.plan.get(name)) is None or entry.form is Form.FLOAT
            for name in readers
        ):
            expected += to_float if value in made else 0.0
    return min(max(took / expected, 0.5), 8.0) if expected > 0 else 1.0


def plan_again(shop: Workshop, request: Request, attempt: Attempt) -> Plan | None:
    """The plan for measured costs, if it is another one."""
    plan = shop.plan(request)
    forms = [entry.form for entry in plan.nodes]
    return (
        plan if forms != [entry.form for entry in attempt.plan.nodes] and plan.quantizes else None
    )
