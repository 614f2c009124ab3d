"""Gives every node a unique name, so that plans and reports can speak of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from qcompile.graph.edit import Names, nodes
from qcompile.step import Outcome, Pass

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class NameNodes(Pass):
    """An unnamed node is named `Type:first_output`; a repeated name gets a number."""

    name: ClassVar[str] = "name_nodes"

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Names that are unique already stay."""
        outcome, names, taken = Outcome(), Names(model), set[str]()
        for node in nodes(model):
            for value in node.outputs:
                if not value.name and (value.uses() or value.is_graph_output()):
                    value.name = names.fresh("value")
            if node.name and node.name not in taken:
                taken.add(node.name)
                continue
            first = next((value.name for value in node.outputs if value.name), "")
            node.name = names.fresh(node.name or f"{node.op_type}:{first}")
            taken.add(node.name)
            outcome.changed.append(node.name)
        return outcome
