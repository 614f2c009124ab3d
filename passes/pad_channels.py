"""Adds channels of zeros where ORT's blocked float layout needs a multiple of its block.

    Conv (24 channels) -> Relu -> MaxPool -> Conv   =>   Conv (32) -> Relu -> MaxPool -> Conv (of 32)

ORT computes float convolutions in blocks of channels (NCHWc: 16 with AVX512, 8 with AVX2) and fills the last block with
zeros by itself, but a MaxPool between them takes no tensor whose channels do not fill their blocks: it runs on NCHW, with a
copy of the tensor before and one behind it. Where the zeros are part of the model, all stays in blocks. The last reader's
weights for them are zeros: no number changes.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.graph.edit import Names, add_initializer, array, attribute, is_op
from qcompile.step import Outcome, Pass

MS = "com.microsoft"
_GROWTH = 1.5  # at most so many channels for each that there was
_POINTWISE = ("Relu", "Clip", "MaxPool", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish")
_CODES = ("QuantizeLinear", "DequantizeLinear")


@dataclasses.dataclass(frozen=True)
class PadChannels(Pass):
    """See the module.

    Attributes:
        block: channels of a block; 1 changes nothing.
    """

    name: ClassVar[str] = "pad_channels"
    block: int

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Skipped: channels that others than convolutions read, and those that would grow too many."""
        outcome, names = Outcome(), Names(model)
        for node in list(model.graph):
            count = _made(node)
            more = -count % self.block
            if not more:
                continue
            reach = _Reach(node, count)
            if not reach.pools:
                continue  # nothing is gained
            reason = reach.reason or (
                ""
                if count + more <= _GROWTH * count
                else f"{count} channels would become {count + more}"
            )
            if reason:
                outcome.skipped[node.name or ""] = reason
                continue
            reach.widen(names, more)
            outcome.changed.append(node.name or "")
        return outcome


def _made(node: ir.Node) -> int:
    """The channels that a float convolution of images makes; 0 if it is none whose weights are known."""
    weight = array(node.inputs[1]) if _is_conv(node) and node.op_type != "QLinearConv" else None
    if weight is None or weight.ndim != 4 or attribute(node, "group", 1) != 1:
        return 0
    biased = len(node.inputs) > 2 and node.inputs[2] is not None
    if len(node.inputs) > 3 or (biased and array(node.inputs[2]) is None):
        return 0
    return int(weight.shape[0])


def _is_conv(node: ir.Node) -> bool:
    return is_op(node, "Conv", "QLinearConv") or (node.domain == MS and node.op_type == "FusedConv")


class _Reach:
    """All that more channels of one convolution reach."""

    def __init__(self, root: ir.Node, count: int) -> None:
        """`root` makes `count` channels."""
        self._count = count
        self._rows = [root]  # convolutions that make the channels
        self._columns: list[ir.Node] = []  # and those that read them all
        self._values: list[ir.Value] = []
        self.pools = 0
        self.reason = ""
        self._spread(root.outputs[0], integer=False)

    def _spread(self, value: ir.Value, *, integer: bool) -> None:
        if value.is_graph_output():
            self.reason = "its channels are an output"
        self._values.append(value)
        for use in value.uses():
            node = use.node
            if self.reason:
                return
            if (
                use.idx != 0
                or node.graph is not self._rows[0].graph
                or not self._takes(node, integer=integer)
            ):
                self.reason = f"its channels are read by {node.op_type} {node.name or ''}".strip()

    def _takes(self, node: ir.Node, *, integer: bool) -> bool:
        """Whether a reader takes more channels; those that pass them on are followed."""
        inputs = [value for value in node.inputs if value is not None]
        single = is_op(node, "Max") and len(inputs) == 1
        if is_op(node, *_POINTWISE) or single:
            if len(node.outputs) != 1:
                return False
            self.pools += is_op(node, "MaxPool") and not integer
            self._spread(node.outputs[0], integer=integer)
            return True
        if is_op(node, *_CODES):
            scale = node.inputs[1]
            if scale is None or scale.shape is None or len(scale.shape) != 0:
                return False
            self._spread(node.outputs[0], integer=is_op(node, "QuantizeLinear"))
            return True
        return _is_conv(node) and self._convolves(node)

    def _convolves(self, node: ir.Node) -> bool:
        place = 3 if node.op_type == "QLinearConv" else 1
        weight = node.inputs[place]
        coded = None if weight is None else weight.producer()
        group = attribute(node, "group", 1)
        if group == 1:
            if is_op(coded, "DequantizeLinear"):
                assert coded is not None
                plain = (len(coded.inputs) < 3 or _zero(coded.inputs[2])) and _by_row(coded)
                weight = coded.inputs[0] if plain else None
            elif node.op_type == "QLinearConv" and not _zero(node.inputs[5]):
                return False
            self._columns.append(node)
            return array(weight) is not None
        values = array(weight)
        if values is None or group != self._count or values.shape[:2] != (group, 1):
            return False
        known = (value for value in node.inputs[1:] if value is not None)
        if any(array(value) is None for value in known):
            return False
        if len(node.inputs) > (9 if node.op_type == "QLinearConv" else 3):
            return False
        self._rows.append(node)
        self._spread(node.outputs[0], integer=node.op_type == "QLinearConv")
        return True

    def widen(self, names: Names, more: int) -> None:
        """Adds `more` channels of zeros."""
        for value in self._values:
            if value.shape is not None and len(value.shape) > 1:
                dims = list(value.shape)
                dims[1] = self._count + more
                value.shape = ir.Shape(dims)
        for node in dict.fromkeys(self._rows):
            _more_rows(names, node, self._count, more)
        for node in dict.fromkeys(self._columns):
            _more_columns(names, node, more)


def _by_row(coded: ir.Node) -> bool:
    """Whether a DequantizeLinear has one scale, or one for each row of the weight."""
    scale = coded.inputs[1]
    if scale is None or scale.shape is None or attribute(coded, "block_size", 0):
        return False
    return len(scale.shape) == 0 or (len(scale.shape) == 1 and attribute(coded, "axis", 1) == 0)


def _zero(value: ir.Value | None) -> bool:
    values = array(value)
    return values is not None and not np.any(values)


def _more_rows(names: Names, node: ir.Node, count: int, more: int) -> None:
    """More channels that a convolution makes: weight and bias are zero, scales those of the last channel."""
    for place, value in enumerate(node.inputs):
        values = array(value) if place else None
        if value is None or values is None or values.ndim == 0 or values.shape[0] != count:
            continue
        scales = node.op_type == "QLinearConv" and place in (4, 5)
        added = (
            values[-1:].repeat(more, 0)
            if scales
            else np.zeros((more, *values.shape[1:]), values.dtype)
        )
        _put(names, node, place, np.concatenate([values, added]))
    if attribute(node, "group", 1) != 1:
        node.attributes["group"] = ir.AttrInt64("group", count + more)


def _more_columns(names: Names, node: ir.Node, more: int) -> None:
    """More channels that a convolution reads, and does not use."""
    place = 3 if node.op_type == "QLinearConv" else 1
    weight = node.inputs[place]
    assert weight is not None
    coded = weight.producer()
    values = array(weight if coded is None else coded.inputs[0])
    assert values is not None
    added = np.zeros((values.shape[0], more, *values.shape[2:]), values.dtype)
    wide = np.concatenate([values, added], 1)
    if coded is None:
        _put(names, node, place, wide)
        return
    assert node.graph is not None
    attributes = list(coded.attributes.values())
    own = ir.Node(
        "",
        "DequantizeLinear",
        coded.inputs,
        attributes,
        num_outputs=1,
        name=names.fresh(f"{coded.name}_wide"),
    )
    own.outputs[0].name = names.fresh(f"{weight.name}_wide")
    own.outputs[0].type = weight.type
    node.graph.insert_before(node, own)
    _put(names, own, 0, wide)
    node.replace_input_with(place, own.outputs[0])


def _put(names: Names, node: ir.Node, place: int, values: npt.NDArray[np.generic]) -> None:
    old = node.inputs[place]
    assert old is not None
    assert node.graph is not None
    new = add_initializer(_main(node), names, f"{old.name}_wide", values, old.dtype)
    node.replace_input_with(place, new)


def _main(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph
