"""Nodes and constants put in the place of one node, and constants that go when nobody reads them any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import Names, add_initializer, add_node

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from qcompile.graph.linear import Linear


class Steps:
    """Adds nodes before the node of a linear layer, and constants to its graph, under names made of its own."""

    def __init__(self, names: Names, item: Linear) -> None:
        self.names, self.item = names, item
        graph = item.node.graph
        assert isinstance(graph, ir.Graph)
        self.graph = graph

    def __call__(
        self, op_type: str, inputs: Sequence[ir.Value | None], part: str,
        attributes: dict[str, Any] | None = None, domain: str = "", *, main: bool = False,
    ) -> ir.Value:  # fmt: skip
        """The result of a new node; `main`: the node bears the name of the old one."""
        node, given = self.item.node, list(inputs)
        while given and given[-1] is None:
            given.pop()
        made = add_node(
            self.names, op_type, given, before=node, domain=domain, name=f"{self.item.name}_{part}",
            output=f"{node.outputs[0].name}_{part}", attributes=attributes,
        )  # fmt: skip
        if main:
            made.name = node.name
        return made.outputs[0]

    def ints(self, part: str, numbers: Sequence[int]) -> ir.Value:
        """A constant int64 (len(numbers),)."""
        values = np.array(numbers, np.int64)
        return add_initializer(self.graph, self.names, f"{self.item.name}_{part}", values)

    def floats(self, part: str, values: npt.ArrayLike) -> ir.Value:
        """A constant of the type of the layer's weight."""
        weight = self.item.weight
        assert weight is not None
        kind = np.float16 if weight.dtype == ir.DataType.FLOAT16 else np.float32
        return add_initializer(
            self.graph, self.names, f"{self.item.name}_{part}", np.asarray(values, kind)
        )


def release(value: ir.Value | None) -> None:
    """A constant that nobody reads is gone, and what it alone was made of; an input or output stays."""
    if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    if value.is_initializer():
        assert value.graph is not None
        del value.graph.initializers[value.name or ""]
        return
    node = value.producer()
    if node is None or node.graph is None:
        return
    read = list(node.inputs)
    node.graph.remove(node, safe=True)
    for other in read:
        release(other)
