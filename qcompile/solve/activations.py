"""Scales and zero points of all coded tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qcompile.calib.least_error import Grid
from qcompile.calib.ranges import method as range_method
from qcompile.calib.stats import TensorStats
from qcompile.graph.edit import array, attribute, is_op
from qcompile.plan.candidates import clip_bounds
from qcompile.plan.plan import Plan
from qcompile.plan.tensors import Coded, Coding
from qcompile.quant.affine import choose
from qcompile.quant.scheme import QParams, Scheme

# Outputs whose range follows from the operator: nothing to calibrate (ORT's own choice for Sigmoid and Softmax).
_KNOWN = {"Sigmoid": 1 / 256, "Softmax": 1 / 256, "HardSigmoid": 1 / 255}
_ALIKE = 2.0
_FINE_OFFSET = 6  # steps: an offset this large is made a whole number of steps by a coarser scale


def solve_activations(
    plan: Plan, coding: Coding, stats: Mapping[str, TensorStats], method: str,
    overrides: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, QParams]:  # fmt: skip
    """Parameters of every coded tensor, by name; tensors that share codes differ in meaning only.

    Args:
        plan: gives the scheme of activations.
        coding: the coded tensors.
        stats: of each root, by tensor name.
        method: one of `qcompile.calib.ranges.METHODS`, or `percentile:P`.
        overrides: ranges that were fixed by hand or by a search, by root name.
    """
    scheme = Scheme.parse(plan.activation)
    params: dict[str, QParams] = {}
    groups = coding.members()
    if not groups:
        return params
    find, grid = range_method(method), grid_of(scheme)
    ranges = {
        root.name or "": (overrides or {}).get(root.name or "")
        or find(stats[root.name or ""], grid)
        for root in groups
        if _known_scale(root) is None
    }
    _agree(groups, coding, ranges)
    for root, members in groups.items():
        name = root.name or ""
        known = _known_scale(root)
        if known is not None and all(member.offset == 0.0 for member in members):
            scale, zero = known, float(scheme.qmin)
        elif known is not None:  # a sum behind it wants codes outside of 0..1
            scale, zero = _grid(0.0, 1.0, members, scheme)
        else:
            low, high = ranges[name]
            scale, zero = _grid(*_useful(root, coding, low, high), members, scheme)
        for member in members:
            params[member.value.name or ""] = _meaning(member, scale, zero, scheme)
    return params


def grid_of(scheme: Scheme) -> Grid:
    """The codes of a scheme, as a search for a range wants to know them."""
    return Grid(scheme.qmax - scheme.qmin + 1, scheme.symmetric)


def _agree(
    groups: Mapping[ir.Value, list[Coded]], coding: Coding, ranges: dict[str, tuple[float, float]]
) -> None:
    """Tensors that a Concat joins get one range where theirs are alike: it then copies, and need not rescale.

    Alike is within a factor `_ALIKE` of the common range, for all tensors that are joined directly or through
    other Concats; boxes and scores of a detector are not.
    """
    joined: dict[str, set[str]] = {}
    by_name = {root.name or "": members for root, members in groups.items()}
    makers = {root.name or "": root.producer() for root in groups}

    def alike(names: set[str]) -> tuple[float, float] | None:
        low = min(min(ranges[n][0], 0.0) for n in names)
        high = max(max(ranges[n][1], 0.0) for n in names)
        least = min(max(ranges[n][1], 0.0) - min(ranges[n][0], 0.0) for n in names)
        if (high - low) > _ALIKE * least:
            return None
        step = (high - low) / 255  # a Relu or Clip that saturation does must go on being done by it
        limits = [clip_bounds(node) for n in names if (node := makers[n]) is not None]
        beyond = any(low < b[0] - step or high > b[1] + step for b in limits if b is not None)
        return None if beyond else (low, high)

    for root in groups:
        node = root.producer()
        if not is_op(node, "Concat") or node is None:
            continue
        parts = [coding.tensors.get(value) for value in node.inputs if value is not None]
        names = {root.name or "", *(p.root.name or "" for p in parts if p is not None)}
        plain = all(
            m.factor == 1.0 and m.offset == 0.0 for n in names & by_name.keys() for m in by_name[n]
        )
        if None in parts or not plain or not names <= ranges.keys():
            continue
        family = set().union(*(joined.get(name, {name}) for name in names))
        common = alike(family)
        if common is not None:
            joined.update(dict.fromkeys(family, family))
    for family in joined.values():
        common = alike(family)
        assert common is not None
        for name in family:
            ranges[name] = common


def _known_scale(root: ir.Value) -> float | None:
    node = root.producer()
    return None if node is None or node.domain else _KNOWN.get(node.op_type)


def _useful(root: ir.Value, coding: Coding, low: float, high: float) -> tuple[float, float]:
    """The part of the range that matters to the readers.

    x * HardSigmoid(x) is zero wherever HardSigmoid is: codes below -beta / alpha would be wasted.
    """
    readers = [use.node for use in root.uses()]
    gates = [node for node in readers if is_op(node, "HardSigmoid")]
    others = [node for node in readers if not is_op(node, "HardSigmoid")]
    if root.is_graph_output() or len(gates) != 1 or gates[0].outputs[0] not in coding.tensors:
        return low, high
    if not all(is_op(n, "Mul") and set(n.inputs) == {root, gates[0].outputs[0]} for n in others):
        return low, high
    floor = -attribute(gates[0], "beta", 0.5) / attribute(gates[0], "alpha", 0.2)
    return max(low, floor) if high > 0 else low, high


def _grid(low: float, high: float, members: list[Coded], scheme: Scheme) -> tuple[float, float]:
    """Scale and zero point of the root, such that every member's zero is a code as well."""
    offsets = [-m.offset / m.factor for m in members if m.offset != 0.0]
    base = choose(float(min([low, *offsets])), float(max([high, *offsets])), scheme)
    scale, zero = float(base.scale), float(base.zero)
    for offset in offsets:
        steps = abs(offset) / scale
        if steps >= _FINE_OFFSET:  # a whole number of steps, at a slightly coarser scale
            coarser = choose(
                float(min([low, *offsets]) * (scale_up := steps / np.floor(steps))),
                float(max([high, *offsets]) * scale_up), scheme,
            )  # fmt: skip
            scale, zero = abs(offset) / np.floor(steps), float(coarser.zero)
            break
    return scale, zero


def _meaning(member: Coded, scale: float, zero: float, scheme: Scheme) -> QParams:
    own_scale = scale * member.factor
    own_zero = np.clip(
        np.rint(zero - member.offset / own_scale), scheme.qtype.qmin, scheme.qtype.qmax
    )
    return QParams(
        np.asarray(own_scale, np.float32), np.asarray(own_zero, scheme.qtype.dtype), scheme
    )


def constant_params(value: ir.Value, scheme: Scheme) -> QParams:
    """Parameters of a constant operand: its own range."""
    values = array(value)
    assert values is not None
    return choose(float(values.min()), float(values.max()), scheme)
