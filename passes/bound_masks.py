"""Replaces masks of absurd size before a Softmax by numbers that a scale of 8 bits can hold.

    Softmax(Add(x, Where(open, 0, -1e9)))  ->  Softmax(Clip(Add(x, Where(open, 0, -94)), floor))

What is proved, and from what: see `qcompile.solve.masks`. As float the Clip costs time and saves nothing; a plan makes it
the saturation of an integer Add, which the mask would have kept float.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from qcompile.graph.edit import Names, add_initializer, add_node, supersede
from qcompile.run.probe import Fact
from qcompile.solve.masks import Bound, Mask, bound_of, find_masks, replaced
from qcompile.step import Need, Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import onnx_ir as ir

    from qcompile.calib.stats import TensorStats

_MARK = "qcompile.bounded"


@dataclasses.dataclass(frozen=True)
class BoundMasks(Pass):
    """The masks of the main graph.

    Attributes:
        facts: types and shapes.
        stats: ranges of what `needs` names.
        only: names of masks (of the first node that adds each); None: all.
    """

    name: ClassVar[str] = "bound_masks"
    facts: Mapping[str, Fact]
    stats: Mapping[str, TensorStats] = dataclasses.field(default_factory=dict)
    only: Collection[str] | None = None

    def needs(self, model: ir.Model) -> Sequence[Need]:
        """Ranges of what masks are added to, and of what stands beside their constants."""
        found = []
        for mask in find_masks(model, self.facts):
            if not mask.refused:
                found += [*mask.adds.values(), *mask.factors, *mask.others]
        # a flag has no range, and is no factor that could be proved either
        floats = [value for value in found if self._is_float(value)]
        return [Need(value.name or "") for value in dict.fromkeys(floats)]

    def _is_float(self, value: ir.Value) -> bool:
        fact = self.facts.get(value.name or "")
        return fact is not None and fact.is_float

    def apply(self, model: ir.Model) -> Outcome:
        """See the class.

        Skipped: masks of which something is not proved, by the name of the first node that adds them.
        """
        outcome, names = Outcome(), Names(model)
        opset = model.opset_imports.get("", 1)
        for mask in find_masks(model, self.facts):
            if self.only is not None and mask.name not in self.only:
                continue
            if all(_MARK in node.metadata_props for node in mask.adds):
                continue
            bound = bound_of(mask, self.stats, self.facts, opset)
            if isinstance(bound, str):
                outcome.skipped[mask.name] = bound
                continue
            _edit(model.graph, names, mask, bound)
            outcome.changed += [node.name or "" for node in mask.adds]
            outcome.rescaled |= {value.name or "" for value in mask.values}
            outcome.rescaled |= {_result(node).name or "" for node in mask.adds}
        return outcome


def _result(node: ir.Node) -> ir.Value:
    """What the Softmax reads: behind the Clip, if there is one."""
    made = node.outputs[0]
    users = [use.node for use in made.uses()]
    return users[0].outputs[0] if users and users[0].op_type == "Clip" else made


def _edit(graph: ir.Graph, names: Names, mask: Mask, bound: Bound) -> None:
    for node, index in mask.uses:
        old = node.inputs[index]
        assert old is not None
        new = add_initializer(
            graph, names, f"{old.name}_bounded", replaced(node, index, bound.number)
        )
        node.replace_input_with(index, new)
    for node in mask.adds:
        node.metadata_props[_MARK] = "1"
        floor = bound.floors.get(node.outputs[0].name or "")
        if floor is None:
            continue
        old = node.outputs[0]
        low = add_initializer(graph, names, f"{node.name}_floor", np.array(floor, np.float32))
        clip = add_node(
            names, "Clip", [old, low], after=node, name=f"{node.name}_clip", output=f"{old.name}_clipped"
        )  # fmt: skip
        clip.outputs[0].type, clip.outputs[0].shape = old.type, old.shape
        supersede(old, clip.outputs[0])
        clip.replace_input_with(0, old)
