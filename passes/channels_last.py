"""Keeps regions of integer convolutions in the layout that their kernels work in: channels last (NHWC).

    QLinearConv -> QLinearAdd -> QLinearConv
      => Transpose -> QLinearConv (channels_last) -> QLinearAdd -> QLinearConv (channels_last) -> Transpose

ORT turns the input and the result of every integer convolution, and then moves the Transposes to where they cancel. It does
not move one through an Add whose other side is not turned already: behind a float stem, each residual block of a stage keeps
four. Here the layout of operators that do not care is chosen by the fewest bytes to turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir

from qcompile.graph.edit import Names, add_node, array, is_op
from qcompile.run.probe import Fact
from qcompile.step import Outcome, Pass

MS = "com.microsoft"
_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
_ONE = ("QLinearLeakyRelu", "QLinearSigmoid")  # of one tensor
_TWO = ("QLinearAdd", "QLinearMul")
_ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class ChannelsLast(Pass):
    """See the module.

    Attributes:
        facts: shapes by name of the value; codes have the name of what they stand for, and `_q`.
    """

    name: ClassVar[str] = "channels_last"
    facts: Mapping[str, Fact]

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Skipped: convolutions of other ranks, and such as ORT turns at no greater cost."""
        outcome = Outcome()
        layout = _Layout(model.graph, self.facts)
        if not layout.gains():
            return outcome
        layout.write(Names(model))
        outcome.changed += [node.name or "" for node in layout.last if _is_conv(node)]
        return outcome


def _is_conv(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "QLinearConv"


def _images(node: ir.Node) -> list[ir.Value]:
    """The inputs that are images, of a node that may work on either layout."""
    places = (0, 3) if node.op_type in _TWO else (0,)
    return [value for i in places if (value := node.inputs[i]) is not None]


class _Layout:
    """Which nodes work on channels last."""

    def __init__(self, graph: ir.Graph, facts: Mapping[str, Fact]) -> None:
        self._graph, self._facts = graph, facts
        convs = [node for node in graph if is_op(node, "QLinearConv") and self._is_image(node)]
        free = [
            node for node in graph
            if node.domain == MS and node.op_type in (*_ONE, *_TWO) and self._is_image(node)
        ]  # fmt: skip
        self.last: dict[ir.Node, None] = dict.fromkeys(convs)
        known = set(free)
        for node in graph:  # ORT moves a Transpose through where all that is read is turned
            if node in known and all(value.producer() in self.last for value in _images(node)):
                self.last[node] = None
        self._alone = self._bytes()
        near = self._near(convs, free)
        self.last |= dict.fromkeys(near)
        for _ in range(_ROUNDS):
            if not [node for node in near if self._improves(node)]:
                break

    def gains(self) -> bool:
        """Whether fewer bytes are turned than by ORT itself."""
        return self._bytes() < self._alone

    def _size(self, value: ir.Value | None) -> tuple[int, ...]:
        name = "" if value is None or value.name is None else value.name
        fact = self._facts.get(name.removesuffix("_q"))
        return () if fact is None or fact.shape is None else fact.shape

    def _is_image(self, node: ir.Node) -> bool:
        """Whether all that it reads and makes is of rank 4, and of one shape where it has two operands."""
        if node.graph is not self._graph:
            return False
        shapes = [self._size(value) for value in _images(node)]
        if any(len(shape) != 4 for shape in shapes) or len(set(shapes)) != 1:
            return False
        if any(array(value) is not None for value in _images(node)):
            return False
        weight = node.inputs[3] if _is_conv(node) else None
        return weight is None or (weight.shape is not None and len(weight.shape) == 4)

    def _near(self, convs: list[ir.Node], free: list[ir.Node]) -> list[ir.Node]:
        """Those that a tensor, or several with such nodes between, joins with a convolution."""
        left, found, waiting = set(free), [], list(convs)
        while waiting:
            node = waiting.pop()
            around = [value.producer() for value in _images(node)]
            around += [use.node for use in node.outputs[0].uses()]
            for other in around:
                if other is not None and other in left:
                    left.remove(other)
                    found.append(other)
                    waiting.append(other)
        return found

    def _turned(self, value: ir.Value) -> bool:
        """Whether somebody reads a tensor in the layout that it is not made in."""
        made = value.producer() in self.last
        readers = [use.node for use in value.uses()]
        reads = {node in self.last and value in _images(node) for node in readers}
        return (not made) in reads or (made and value.is_graph_output())

    def _cost(self, value: ir.Value) -> int:
        if not self._turned(value):
            return 0
        count = 1
        for size in self._size(value):
            count *= size
        return count

    def _bytes(self) -> int:
        values = {value for node in self.last for value in (*_images(node), node.outputs[0])}
        return sum(map(self._cost, values))

    def _improves(self, node: ir.Node) -> bool:
        """Turns a node to the other layout if fewer bytes are turned then."""
        values = list(dict.fromkeys([*_images(node), node.outputs[0]]))
        before = sum(map(self._cost, values))
        was = node in self.last
        if was:
            del self.last[node]
        else:
            self.last[node] = None
        if sum(map(self._cost, values)) < before:
            return True
        if was:
            self.last[node] = None
        else:
            del self.last[node]
        return False

    def write(self, names: Names) -> None:
        """Turns tensors at the borders, once each, and tells the convolutions."""
        turned: dict[ir.Value, ir.Value] = {}
        order = [node for node in self._graph if node in self.last]
        made = {node.outputs[0] for node in order}
        for node in order:
            for place, value in enumerate(node.inputs):
                if value is None or value not in _images(node) or place not in (0, 3):
                    continue
                if value in made or (_is_conv(node) and place):
                    continue
                if value not in turned:
                    turned[value] = self._turn(names, value, _LAST, before=node)
                node.replace_input_with(place, turned[value])
        for node in order:
            value = node.outputs[0]
            others = [(use.node, use.idx) for use in value.uses() if use.node not in self.last]
            shape, value.shape = value.shape, None
            if others or value.is_graph_output():
                self._back(names, node, others, shape)
            if _is_conv(node):
                node.domain = MS
                node.version = None
                node.attributes["channels_last"] = ir.AttrInt64("channels_last", 1)

    def _turn(
        self, names: Names, value: ir.Value, perm: tuple[int, ...], *, before: ir.Node
    ) -> ir.Value:
        node = add_node(
            names, "Transpose", [value], before=before, name=f"{value.name}_turned", output=f"{value.name}_last",
            attributes={"perm": list(perm)},
        )  # fmt: skip
        node.outputs[0].type = value.type
        return node.outputs[0]

    def _back(
        self,
        names: Names,
        node: ir.Node,
        others: Sequence[tuple[ir.Node, int]],
        shape: ir.Shape | None,
    ) -> None:
        value = node.outputs[0]
        back = add_node(
            names, "Transpose", [value], after=node, name=f"{value.name}_back", output=f"{value.name}_first",
            attributes={"perm": list(_FIRST)},
        ).outputs[0]  # fmt: skip
        back.type, back.shape = value.type, shape
        for reader, place in others:
            reader.replace_input_with(place, back)
        if value.is_graph_output():
            graph = self._graph
            graph.outputs[list(graph.outputs).index(value)] = back
            name = value.name
            value.name = names.fresh(f"{name}_last")
            back.name = name
