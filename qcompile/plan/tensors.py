"""Which tensors carry codes under a plan, and which of them share the same ones.

Operators that only move data about leave codes as they are, so input and output share scale and zero
point. A product or sum with a number leaves the codes too and changes their meaning:

    v = a * r + b,  r = s (q - z)   =>   v = (a s) (q - (z - b / (a s)))

Every coded tensor is thus an affine function of one root, and each root needs one range.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from qcompile.graph.edit import array, is_op, scalar
from qcompile.plan.candidates import Candidate
from qcompile.plan.plan import Form, Plan


@dataclasses.dataclass(frozen=True)
class Coded:
    """A tensor with codes: `value = factor * root + offset`, the codes those of `root`."""

    value: ir.Value
    root: ir.Value
    factor: float = 1.0
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Coding:
    """All coded tensors of a plan, by value; `roots` lists those that need a range, in graph order."""

    tensors: Mapping[ir.Value, Coded]

    @property
    def roots(self) -> list[ir.Value]:
        """The values whose range must be found."""
        return [value for value, coded in self.tensors.items() if coded.root is value]

    def members(self) -> Mapping[ir.Value, list[Coded]]:
        """For each root the tensors that share its codes, itself first."""
        groups: dict[ir.Value, list[Coded]] = {}
        for coded in self.tensors.values():
            groups.setdefault(coded.root, []).append(coded)
        return groups


def coding(model: ir.Model, plan: Plan, found: Mapping[str, Candidate | str]) -> Coding:
    """The coded tensors that follow from the forms of a plan."""
    tensors: dict[ir.Value, Coded] = {}

    def code(value: ir.Value) -> Coded:
        if value not in tensors:
            tensors[value] = Coded(value, value)
        return tensors[value]

    for node in model.graph:
        entry, item = plan.get(node.name), found.get(node.name or "")
        if (
            entry is None
            or not isinstance(item, Candidate)
            or entry.form not in (Form.STATIC, Form.FREE)
        ):
            continue
        data = [value for value in item.data if array(value) is None]
        sources = [code(value) for value in data]
        if item.role == "same":
            for value in node.outputs:
                tensors[value] = Coded(value, sources[0].root, sources[0].factor, sources[0].offset)
        elif item.role == "free":
            a, b = affine_of(node)
            source, value = sources[0], node.outputs[0]
            tensors[value] = Coded(value, source.root, a * source.factor, a * source.offset + b)
        else:
            code(item.result)
    return Coding(tensors)


def affine_of(node: ir.Node) -> tuple[float, float]:
    """A and b of the `a * x + b` that a Mul or Add with a number computes."""
    number = scalar(node.inputs[1])
    if number is None:
        number = scalar(node.inputs[0])
    assert number is not None
    return (number, 0.0) if is_op(node, "Mul") else (1.0, number)
