"""What a plan costs by the same figures that the minimum cut weighs, so that plans can be compared without timing.

Nodes without an integer kernel cost the same in every plan and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qcompile.plan.candidates import Candidate, Facts
from qcompile.plan.make import Request, border_costs, node_costs, product_costs
from qcompile.plan.plan import Form, Plan
from qcompile.targets.schema import Target

_INTEGER = (Form.STATIC, Form.FREE, Form.DYNAMIC, Form.WEIGHT)
_APART = ("recurrent", "embedding")  # neither is part of the cut


def plan_cost(
    plan: Plan, found: Mapping[str, Candidate | str], target: Target, facts: Facts, request: Request
) -> float:
    """Nanoseconds of a plan's kernels and borders, as `make_plan` weighs them; noise has no price here.

    Args:
        plan: of the model that `found` and `facts` are of.
        found: candidates by node name.
        target: its costs, in which `request.measured`, `border` and `gain` take part.
        facts: shapes by value name.
        request: what the plan was made for.
    """
    total = 0.0
    integer: set[str] = set()
    items = {}
    candidates = [item for item in found.values() if isinstance(item, Candidate)]
    absorbed = {node.name for item in candidates for node in item.absorbed}
    for entry in plan.nodes:
        item = found.get(entry.node)
        if not isinstance(item, Candidate) or item.role in _APART or entry.form is Form.ABSORBED:
            continue
        if entry.node in absorbed and entry.form not in _INTEGER:
            continue  # as float it is fused as well
        if entry.form is Form.WEIGHT:
            _, as_int, by_block = product_costs(entry.node, item, facts, request)
            total += as_int if by_block is None else by_block
            continue
        measured = request.measured.get(entry.node)
        as_float, as_int = measured or node_costs(item, facts)
        if entry.form in _INTEGER:
            total += as_int
        else:
            total += as_float * (1.0 if measured else request.gain)
        if item.role != "dynamic":
            items[entry.node] = item
            integer |= {entry.node} if entry.form in _INTEGER else set()
    return total + request.border * _borders(items, integer, target, facts)


def expected_ms(
    plan: Plan, found: Mapping[str, Candidate | str], target: Target, facts: Facts
) -> tuple[float, float]:
    """Milliseconds of the float model and of a plan by the target's costs alone, where nothing may be timed.

    Both are of nodes with an integer kernel, and their borders: the arguments are those of `plan_cost`.
    """
    as_float = plan.keep_float((entry.node for entry in plan.nodes), "")
    before, after = (
        plan_cost(each, found, target, facts, Request()) / 1e6 for each in (as_float, plan)
    )
    return before, after


def _borders(
    items: Mapping[str, Candidate], integer: set[str], target: Target, facts: Facts
) -> float:
    """Nanoseconds of a QuantizeLinear or DequantizeLinear wherever codes and floats meet, once a tensor."""
    made = {v for n in integer for v in (items[n].result, *items[n].node.outputs[1:])}
    read = {v for n in integer for v in items[n].data}
    users = {id(items[n].node) for n in integer}
    users |= {id(a) for n in integer for a in items[n].absorbed}
    total = 0.0
    for value in dict.fromkeys([*made, *read]):
        to_codes, to_float = border_costs(value, target, facts)
        if value not in made:
            total += to_codes
        elif _read_as_float(value, users):
            total += to_float
    return total


def _read_as_float(value: ir.Value, users: set[int]) -> bool:
    return value.is_graph_output() or any(id(use.node) not in users for use in value.uses())
