"""Which products can be smoothed, where their scale goes, and which scale it is.

Products that read the same tensor (q, k and v; gate and up) are smoothed together: they share its codes. If only they
read it, the scale goes into constants before it: scale and bias of a normalization, a product with a constant vector,
weight and bias of a linear layer, directly before it or past operators that hand channels on:

    x V -> Reshape -> Transpose -> MatMul(attention, .) -> Transpose -> Reshape -> product

Where each channel went is found by numbering the channels of the layer and moving the numbers as the operators do.
Else one Mul by 1/s is put before the products, which is cheap beside a float product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.algo.smoothquant import Found, Sample, row_budget, search
from qcompile.calib.moments import groups_within
from qcompile.calib.taps import with_outputs
from qcompile.graph.edit import array, attribute, graphs, ints, is_op, read_once, scalar
from qcompile.quant.scheme import Scheme
from qcompile.run.probe import Fact
from qcompile.run.session import Feed, Options, Session

Array = npt.NDArray[Any]

_MEMORY = 256 << 20
_STEPS = 12  # operators that a fold may go back
_NUMBERS = 1 << 24  # elements of a tensor whose channels are followed
_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
_SELECTS = ("Split", "Slice", "Gather")
# What commutes with a positive factor of each channel.
_CARRIERS = (*_RESHAPES, *_SELECTS, "Transpose", "Identity", "Relu", "LeakyRelu")


@dataclasses.dataclass(frozen=True)
class Fold:
    """A node whose constants can divide a tensor by a scale of its channels.

    Attributes:
        node: its name.
        channels: for each channel of the tensor, that of the node's result.
        path: for each value from the tensor back to the result: its name, its producer's, its readers'.
    """

    node: str
    channels: tuple[int, ...]
    path: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class LinearGroup:
    """Products that read one tensor: its name, theirs, and what takes its scale; None if that is a Mul."""

    tensor: str
    nodes: tuple[str, ...]
    place: Fold | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Smoothing:
    """What becomes of a group. Each stands alone: any of several can be applied.

    Attributes:
        tensor: name of what the products read.
        nodes: names of the products.
        scale: s, float32 (K,): channels of the input are divided by it, rows of weights multiplied.
        alpha: that it was made with; None if s is 1.
        place: what takes 1/s; None if that is a Mul.
        keep: input channels whose share is computed in float beside the product.
        error_before, error_after: relative error of the quantized products on held-out rows.
        rank: dimensions of the tensor; 0 if unknown.
    """

    tensor: str
    nodes: tuple[str, ...]
    scale: Array
    alpha: float | None = 0.5
    place: Fold | None = None
    keep: tuple[int, ...] = ()
    error_before: float = 0.0
    error_after: float = 0.0
    rank: int = 0

    @property
    def fold(self) -> str:
        """The node that takes 1/s; empty if it costs time."""
        return "" if self.place is None or self.keep else self.place.node


@dataclasses.dataclass(frozen=True)
class Taker:
    """A constant input of a node, and the axis along which it holds a number for each channel of the result."""

    node: ir.Node
    index: int
    axis: int

    @property
    def width(self) -> int:
        """The number of channels."""
        values = array(self.node.inputs[self.index])
        return 0 if values is None else int(values.shape[self.axis])


def linear_groups(
    model: ir.Model, facts: Mapping[str, Fact], nodes: Iterable[str]
) -> tuple[list[LinearGroup], dict[str, str]]:
    """The products of the main graph by the tensor that they read, and why others cannot be smoothed, by name.

    Args:
        model: the prepared graph.
        facts: shapes, which tell where channels go.
        nodes: names of MatMul and Gemm nodes with constant weights.
    """
    by_name = {node.name or "": node for graph in graphs(model) for node in graph}
    by_tensor: dict[ir.Value, list[ir.Node]] = {}
    refused = {}
    for name in dict.fromkeys(nodes):
        node = by_name.get(name)
        why = "it is not in the graph" if node is None else refusal(node)
        if node is not None and node.graph is not model.graph:
            why = "it is in a body of If, Loop or Scan"
        if why or node is None or node.inputs[0] is None:
            refused[name] = why
        elif any(depth(other) != depth(node) for other in by_tensor.get(node.inputs[0], ())):
            refused[name] = "others that read the same tensor have weights of another depth"
        else:
            by_tensor.setdefault(node.inputs[0], []).append(node)
    return [
        LinearGroup(
            value.name or "", tuple(n.name or "" for n in found), find_fold(value, found, facts)
        )
        for value, found in by_tensor.items()
    ], refused


def refusal(node: ir.Node) -> str:
    """Why a node's weight cannot take scales of its input channels; empty if it can."""
    if not is_op(node, "MatMul", "Gemm") or node.inputs[0] is None:
        return "it is no product"
    weight = array(node.inputs[1])
    if weight is None or weight.ndim != 2 or not weight.size:
        return "its weight is no constant matrix"
    if weight.dtype != np.float32:
        return f"its weight is {weight.dtype}"
    if attribute(node, "transA", 0):
        return "transA is set"
    return ""


def matrix(node: ir.Node) -> Array:
    """The weight of a product as float32 (K, N), alpha of a Gemm applied."""
    weight = array(node.inputs[1])
    assert weight is not None
    turned: Array = weight.T if attribute(node, "transB", 0) else weight
    alpha = np.float32(attribute(node, "alpha", 1.0))
    return turned if alpha == 1 else turned * alpha


def depth(node: ir.Node) -> int:
    """K, the number of input channels of a product."""
    weight = array(node.inputs[1])
    assert weight is not None
    return int(weight.shape[1 if attribute(node, "transB", 0) else 0])


def find_fold(value: ir.Value, nodes: Sequence[ir.Node], facts: Mapping[str, Fact]) -> Fold | None:
    """What can divide `value` by a scale of its last axis, for these readers alone."""
    # a product that reads it twice is not among them twice
    if value.is_graph_output() or {*readers(value)} != {*nodes} or len(readers(value)) > len(nodes):
        return None
    for path in _paths(value, _STEPS):
        channels = _followed(path, depth(nodes[0]), facts)
        node = path[-1].producer()
        if channels is not None and node is not None:
            return Fold(node.name or "", channels, tuple(map(_look, path)))
    return None


def find_path(value: ir.Value, fold: Fold) -> list[ir.Value]:
    """The values from `value` back to the result of the fold's node; empty if that is no longer as it was."""
    return next((p for p in _paths(value, _STEPS) if tuple(map(_look, p)) == fold.path), [])


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read the values of a tensor, not only its shape."""
    return [use.node for use in value.uses() if not is_op(use.node, "Shape", "Size")]


def takers(value: ir.Value) -> tuple[Taker, ...]:
    """The constants that, divided by a vector each, divide `value` by it along its last axis; or none."""
    node = value.producer()
    if node is None or node.outputs[0] is not value:
        return ()
    found: tuple[Taker, ...] = ()
    if node.op_type in _NORMS and node.domain in ("", "ai.onnx"):
        found = tuple(Taker(node, i, -1) for i in (1, 2) if _has(node, i))
    elif is_op(node, "MatMul", "Gemm") and not refusal(node) and read_once(node.inputs[1]):
        found = (Taker(node, 1, 0 if attribute(node, "transB", 0) else 1),)
        found += (Taker(node, 2, -1),) if _has(node, 2) else ()
    elif is_op(node, "Mul", "Add"):
        for i, x in ((0, node.inputs[1]), (1, node.inputs[0])):
            if x is not None and array(x) is None and _is_vector(node.inputs[i]):
                alone = readers(x) == [node] and not x.is_graph_output()
                inner = takers(x) if is_op(node, "Add") and alone else ()
                found = (*inner, Taker(node, i, -1)) if inner or is_op(node, "Mul") else ()
    plain = all(_is_vector(t.node.inputs[t.index]) for t in found if t.axis == -1)
    return found if plain and len({taker.width for taker in found}) == 1 else ()


def _has(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _is_vector(value: ir.Value | None) -> bool:
    """Whether a constant varies along its last axis alone."""
    v = array(value)
    return v is not None and v.dtype == np.float32 and v.ndim > 0 and v.size == v.shape[-1] > 1


def _look(value: ir.Value) -> tuple[str, ...]:
    node = value.producer()
    assert node is not None
    return (value.name or "", node.name or "", *sorted(n.name or "" for n in readers(value)))


def _paths(value: ir.Value, steps: int) -> Iterator[list[ir.Value]]:
    """Ways back to a node that has takers, as values; by form alone."""
    node = value.producer()
    if node is None or not steps:
        return
    if takers(value):
        yield [value]
        return
    for x in _carried(node):
        found = readers(x)
        found.remove(node)
        # further readers must select other channels, see `_followed`
        if not x.is_graph_output() and all(
            is_op(n, *_SELECTS) and n.graph is node.graph for n in found
        ):
            yield from ([value, *path] for path in _paths(x, steps - 1))


def _carried(node: ir.Node) -> list[ir.Value]:
    """The inputs whose channels a node hands on, each alone."""
    if is_op(node, *_CARRIERS):
        found = node.inputs[:1]
    elif is_op(node, "MatMul"):  # the values of an attention
        found = node.inputs[1:2]
    elif is_op(node, "Mul"):
        found = node.inputs
    elif is_op(node, "Div"):
        found = node.inputs[:1] if scalar(node.inputs[1]) is not None else ()
    else:
        found = ()
    return [x for x in found if x is not None and array(x) is None]


def _followed(
    path: Sequence[ir.Value], width: int, facts: Mapping[str, Fact]
) -> tuple[int, ...] | None:
    """The channel of the last value of a path that each channel of the first one holds; None if it is mixed."""
    made = takers(path[-1])[0].width
    if len(path) == 1:
        return tuple(range(width)) if made == width else None
    shape = _shape(path[-1].name, facts)
    if not shape or shape[-1] != made or np.prod(shape) > _NUMBERS:
        return None
    numbers = np.broadcast_to(np.arange(made, dtype=np.int32), shape)
    for outer, inner in zip(path[-2::-1], path[:0:-1], strict=True):
        moved = _moved(outer, inner, numbers, facts)
        others = (v for node in readers(inner) for v in node.outputs if v.uses() and v is not outer)
        theirs = (_moved(v, inner, numbers, facts) for v in others)
        if moved is None or any(t is None or np.intersect1d(t, moved).size for t in theirs):
            return None
        numbers = moved
    if not numbers.size or numbers.shape[-1:] != (width,):
        return None
    rows = numbers.reshape(-1, width)
    alike = (rows == rows[0]).all() and len(np.unique(rows[0])) == width
    return tuple(rows[0].tolist()) if alike else None


def _shape(name: str | None, facts: Mapping[str, Fact]) -> tuple[int, ...] | None:
    fact = facts.get(name or "")
    return None if fact is None else fact.shape


def _moved(
    value: ir.Value, inner: ir.Value, numbers: Array, facts: Mapping[str, Fact]
) -> Array | None:
    """Numbers of channels as the producer of `value` hands them on from `inner`; None if it mixes them."""
    node, shape = value.producer(), _shape(value.name, facts)
    assert node is not None
    if shape is None or (is_op(node, *_CARRIERS) and node.inputs[0] is not inner):
        return None
    moved: Array | None = numbers
    if is_op(node, *_RESHAPES):
        moved = numbers.reshape(shape) if numbers.size == np.prod(shape) else None
    elif is_op(node, "Transpose"):
        moved = numbers.transpose(attribute(node, "perm", None) or range(numbers.ndim)[::-1])
    elif is_op(node, "MatMul"):
        # one place alone would hide that places mix channels
        known = min(numbers.ndim, len(shape)) > 1 and numbers.shape[-2] > 1
        alike = known and (numbers == numbers[..., :1, :]).all()
        moved = np.broadcast_to(numbers[..., :1, :], shape) if alike else None
    elif is_op(node, *_SELECTS):
        moved = _selected(node, value, numbers, facts)
    return moved if moved is not None and moved.shape == shape else None


def _selected(
    node: ir.Node, value: ir.Value, numbers: Array, facts: Mapping[str, Fact]
) -> Array | None:
    """What a Split, Slice or Gather takes, if that is constant."""
    axis = attribute(node, "axis", 0)
    if is_op(node, "Gather"):
        indices = array(node.inputs[1])
        return None if indices is None else numbers.take(indices, axis)
    if is_op(node, "Split"):
        shapes = [_shape(v.name, facts) for v in node.outputs]
        ends = np.cumsum([0, *(0 if s is None else s[axis] for s in shapes)])
        at = list(node.outputs).index(value)
        if ends[-1] != numbers.shape[axis]:
            return None
        return numbers.take(range(ends[at], ends[at + 1]), axis)
    given = [ints(v) for v in node.inputs[1:4]]
    stride = ints(node.inputs[4]) if _has(node, 4) else (1,)
    if len(given) < 3 or None in given or stride is None or set(stride) != {1}:
        return None
    where = [slice(None)] * numbers.ndim
    for start, end, a in zip(*(g or () for g in given), strict=True):
        where[a] = slice(start, end)
    return numbers[tuple(where)]


def solve_smoothing(
    model: ir.Model, facts: Mapping[str, Fact], nodes: Sequence[str], samples: Sequence[Feed],
    held_out: Sequence[Feed], *, saturating: bool, weight: str = "int8.axis0.sym", rows: int = 256,
    threads: int = 0,
) -> dict[str, Smoothing]:  # fmt: skip
    """The smoothings that lower the error of their products on held-out samples, by the name of the tensor.

    Args:
        model: the prepared float graph; run once on each sample, more often only if tensors exceed the memory.
        facts: shapes of tensors.
        nodes: names of MatMul and Gemm nodes whose inputs are quantized at run time.
        samples: feeds that choose the scale.
        held_out: feeds that judge it.
        saturating: weights have 7 bits, as the target's kernels would overflow with 8.
        weight: spelling of the scheme of weights, of a Conv: axis 0 is that of the outputs.
        rows: of a sample and tensor, at most; fewer where weights are large.
        threads: of a run.
    """
    groups, _ = linear_groups(model, facts, nodes)
    by_name = {node.name: node for node in model.graph}
    scheme = Scheme.parse(weight.replace("axis0", "axis1"))
    if saturating and scheme.bits is None:
        scheme = dataclasses.replace(scheme, bits=7)
    weights = {g.tensor: [matrix(by_name[name]) for name in g.nodes] for g in groups}
    most = {name: row_budget(ws, len(samples), rows) for name, ws in weights.items()}
    feeds = (*samples, *held_out)
    kept = {n: len(feeds) * m * len(weights[n][0]) for n, m in most.items()}
    sizes = {n: Fact(None, (kept[n] + (facts[n].elements if n in facts else 0),)) for n in most}
    found: dict[str, Found | None] = {}
    for names in groups_within(weights, sizes, _MEMORY):
        taken = _samples(model, {name: most[name] for name in names}, feeds, threads)
        for name, items in taken.items():
            if {len(item.low) for item in items} == {len(weights[name][0])}:
                halves = items[: len(samples)], items[len(samples) :]
                found[name] = search(*halves, weights[name], scheme)
    return {
        g.tensor: Smoothing(
            g.tensor, g.nodes, item.scale, item.alpha, g.place, item.keep, item.before, item.after,
            len(_shape(g.tensor, facts) or ()),
        )
        for g in groups
        if (item := found.get(g.tensor)) is not None
    }  # fmt: skip


def _samples(
    model: ir.Model, most: Mapping[str, int], feeds: Sequence[Feed], threads: int
) -> dict[str, list[Sample]]:
    """So many rows of each tensor and feed."""
    session = Session(with_outputs(model, most), Options("all", threads=threads, in_order=True))
    taken: dict[str, list[Sample]] = {name: [] for name in most}
    for feed in feeds:
        for name, x in zip(most, session.run(feed, list(most)), strict=True):
            taken[name].append(Sample.of(x.reshape(-1, *x.shape[-1:]), most[name]))
    return taken
