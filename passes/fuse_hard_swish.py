"""Recognizes hard swish and hard sigmoid written out in elementary operators.

    x * Clip(x + 3, 0, 6) / 6  ->  x * HardSigmoid(x; alpha 1/6, beta 1/2)
    Clip(x + 3, 0, 6) / 6      ->  HardSigmoid(x; alpha 1/6, beta 1/2)

(Howard et al. 2019, Searching for MobileNetV3, section 5.2.) Four passes over the activation become
two, and the second form has an integer kernel: a table lookup.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from qcompile.graph.edit import (
    Names,
    add_node,
    attribute,
    dtype,
    is_op,
    nodes,
    replace,
    scalar,
    sole_user,
    with_number,
)  # fmt: skip
from qcompile.step import Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class FuseHardSwish(Pass):
    """`Add(3) -> Clip(0, 6) -> Mul(x) -> Div(6)` -> `HardSigmoid -> Mul(x)`.

    Any numbers with Clip's lower bound 0 are taken, alpha and beta follow. Mul and Div may come in
    either order, Mul(1/6) may stand for Div(6), and without Mul a HardSigmoid remains.
    """

    name: ClassVar[str] = "fuse_hard_swish"

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Skipped: steps that other nodes read, types other than float32."""
        outcome, names = Outcome(), Names(model)
        for node in nodes(model):
            if not is_op(node, "Clip"):
                continue
            reason = _fuse(names, node)
            if reason is None:
                outcome.changed.append(node.name or "")
            elif reason:
                outcome.skipped[node.name or ""] = reason
        return outcome


def _fuse(names: Names, clip: ir.Node) -> str | None:
    """None if the chain around the Clip was fused, "" if there is none, else the reason."""
    low, high = _bounds(clip)
    shifted = clip.inputs[0]
    add = shifted.producer() if shifted is not None else None
    if low != 0.0 or high is None or high <= 0 or shifted is None or add is None:
        return ""
    found = with_number(add) if is_op(add, "Add") else None
    if found is None:
        return ""
    x, shift = found
    tail = _tail(clip, x, high)
    if not any(is_op(node, "Div") or _is_inverse(node, high) for node in tail):
        return "its result is not divided by its upper bound, or is read elsewhere"
    if not 0 < shift < high:
        return "the sum is not inside the bounds"
    if add.graph is not clip.graph or sole_user(shifted) is not clip:
        return "the sum is read elsewhere"
    if dtype(shifted) != ir.DataType.FLOAT:
        return "ORT's HardSigmoid takes float32"
    _rewrite(names, [add, clip, *tail], x, 1 / high, shift / high)
    return None


def _rewrite(
    names: Names, chain: Sequence[ir.Node], x: ir.Value, alpha: float, beta: float
) -> None:
    clip, last = chain[1], chain[-1]
    gate = add_node(
        names, "HardSigmoid", [x], before=clip, name=f"{clip.name}_hard_sigmoid",
        output=f"{clip.outputs[0].name}_gate", attributes={"alpha": alpha, "beta": beta},
    )  # fmt: skip
    result = gate.outputs[0]
    result.type, result.shape = x.type, x.shape
    if any(x in node.inputs for node in chain[2:]):
        mul = add_node(
            names, "Mul", [x, result], before=clip, name=f"{clip.name}_hard_swish",
            output=f"{last.outputs[0].name}_fused",
        )  # fmt: skip
        result = mul.outputs[0]
        result.type, result.shape = x.type, x.shape
    replace(last.outputs[0], result)
    graph = clip.graph
    assert graph is not None
    for node in reversed(chain):
        graph.remove(node, safe=True)


def _bounds(clip: ir.Node) -> tuple[float | None, float | None]:
    if len(clip.inputs) == 1:  # opset 6
        return attribute(clip, "min", None), attribute(clip, "max", None)
    return scalar(clip.inputs[1]), scalar(clip.inputs[2]) if len(clip.inputs) > 2 else None


def _tail(clip: ir.Node, x: ir.Value, high: float) -> list[ir.Node]:
    """Of `Mul(x)` and `Div(high)` those that follow the Clip, in either order, each read only once."""
    value, chain = clip.outputs[0], list[ir.Node]()
    kinds = set[str]()
    while True:
        user = sole_user(value)
        if user is None or user.graph is not clip.graph:
            return chain
        if is_op(user, "Mul") and x in user.inputs:
            kind = "times x"
        elif _is_inverse(user, high) or (
            is_op(user, "Div") and user.inputs[0] is value and scalar(user.inputs[1]) == high
        ):
            kind = "over bound"
        else:
            return chain
        if kind in kinds:
            return chain
        kinds.add(kind)
        chain.append(user)
        value = user.outputs[0]


def _is_inverse(node: ir.Node, high: float) -> bool:
    found = with_number(node) if is_op(node, "Mul") else None
    return found is not None and abs(found[1] * high - 1) < 1e-6
