"""The rows that weights are multiplied with, and what reconstruction keeps of them.

A Conv multiplies each row of its weight with patches of its input (im2col), a MatMul or Gemm with rows along the last
axis. Some evenly spread ones of each sample are enough for

    H = sum of x x',      sum of x,      their number

which are of fixed size whatever the number of samples. Rows are kept as columns, (k, rows): that is how patches are
gathered without another copy, and X X' is the same product.

A row of which an element saturates is left out: what it adds to the layer's output is off by more than
rounding, in few samples, and is not something to make up for in all others.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.taps import with_outputs
from qcompile.graph.edit import array, attribute, is_op
from qcompile.run.probe import Fact
from qcompile.run.session import Feed, Options, Session

Array = npt.NDArray[Any]

ROWS = 100  # of a sample
_WAITING = 1 << 20  # elements of columns that are gathered before they are multiplied
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclasses.dataclass(frozen=True)
class Window:
    """How a node takes rows from its input; equal ones take equal rows.

    Attributes:
        groups: of the inputs; each has rows of its own.
        depth: k, elements of a row.
        kernel, strides, dilations: of a Conv, one number a side; all empty for MatMul and Gemm.
        pads: of a Conv, first those in front of each side, then those behind.
        same: "", or auto_pad SAME_UPPER or SAME_LOWER, which `pads` does not tell then.
    """

    groups: int
    depth: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    same: str = ""


def window(node: ir.Node) -> Window | str:
    """How a node takes rows from its first input, or why it is not known."""
    weight = array(node.inputs[1]) if len(node.inputs) > 1 else None
    if not is_op(node, "Conv", "MatMul", "Gemm"):
        return f"{node.op_type} multiplies no rows with a weight"
    if weight is None:
        return "its weight is not constant"
    if is_op(node, "Conv"):
        return _conv_window(node, weight)
    if weight.ndim != 2:
        return f"its weight has {weight.ndim} dimensions, not 2"
    if attribute(node, "transA", 0):
        return "transA is set"
    return Window(1, weight.shape[1 if attribute(node, "transB", 0) else 0])


def _conv_window(node: ir.Node, weight: Array) -> Window:
    sides = weight.ndim - 2
    auto = attribute(node, "auto_pad", "NOTSET")
    pads = attribute(node, "pads", None)
    return Window(
        attribute(node, "group", 1),
        math.prod(weight.shape[1:]),
        weight.shape[2:],
        tuple(attribute(node, "strides", None) or (1,) * sides),
        tuple(attribute(node, "dilations", None) or (1,) * sides),
        tuple(pads) if auto == "NOTSET" and pads else (0,) * (2 * sides),
        auto if auto.startswith("SAME") else "",
    )


def columns(shape: Window, x: Array, most: int = ROWS) -> Array:
    """Evenly spread rows that a node multiplies its weight with, as columns: (groups, k, rows), rows <= most.

    Args:
        shape: of the node.
        x: its input: (N, C, sides...) for a Conv, (..., k) for a product.
        most: rows of all positions of all N.
    """
    if not shape.kernel:
        rows = x.reshape(-1, shape.depth)
        taken = rows if len(rows) <= most else rows[spread(len(rows), most)]
        return taken.T[None]
    index, inside = _places(shape, x.shape, most)  # (taps, rows)
    flat = (
        x.reshape(x.shape[1], -1) if len(x) == 1 else np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
    )
    taken = flat.take(index.reshape(-1), axis=1).reshape(len(flat), *index.shape)
    if not inside.all():
        taken *= inside
    return taken.reshape(shape.groups, shape.depth, index.shape[1])


def spread(total: int, most: int) -> Array:
    """`most` places out of `total`, one in each of as many equal parts; all if there are no more.

    Where in its part turns by the golden section, as a fixed step may see but one column of an image.
    """
    if total <= most:
        return np.arange(total)
    ends = np.arange(most + 1) * total // most
    turn = (np.arange(most) * _GOLDEN) % 1.0
    places: Array = ends[:-1] + (turn * np.diff(ends)).astype(np.int64)
    return places


@functools.lru_cache(maxsize=256)
def _places(shape: Window, dims: tuple[int, ...], most: int) -> tuple[Array, Array]:
    """For each tap and row the place in (N, sides...), and whether it is inside; (taps, rows) each."""
    sides = dims[2:]
    front, out = _borders(shape, sides)
    total = dims[0] * math.prod(out)
    image, *position = np.unravel_index(spread(total, most), (dims[0], *out))
    index, inside = image[None], np.ones((1, len(image)), np.bool_)
    for i, side in enumerate(sides):
        taps = np.arange(shape.kernel[i])[:, None] * shape.dilations[i]
        at = position[i] * shape.strides[i] - front[i] + taps
        good = (at >= 0) & (at < side)
        index = (index[:, None] * side + np.where(good, at, 0)).reshape(-1, len(image))
        inside = (inside[:, None] & good).reshape(-1, len(image))
    return index, inside


def _borders(shape: Window, sides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Padding in front of each side, and the output's sides."""
    front, out = [], []
    for i, side in enumerate(sides):
        reach = (shape.kernel[i] - 1) * shape.dilations[i] + 1
        stride = shape.strides[i]
        if shape.same:
            places = -(-side // stride)
            pad = max(0, (places - 1) * stride + reach - side)
            front.append(pad // 2 if shape.same == "SAME_UPPER" else pad - pad // 2)
        else:
            front.append(shape.pads[i])
            places = (side + shape.pads[i] + shape.pads[i + len(sides)] - reach) // stride + 1
        out.append(max(0, places))
    return front, out


@dataclasses.dataclass(frozen=True, eq=False)
class Gram:
    """What is kept of the rows of one window.

    Attributes:
        matrix: sum of x x', float64 (groups, k, k).
        sums: sum of x, float64 (groups, k).
        count: number of rows, int64 (groups,).
    """

    matrix: Array
    sums: Array
    count: Array

    def moment(self, about: Array | float = 0.0) -> Array:
        """E[(x - m)(x - m)'], float64 (groups, k, k); 0 where there were no rows.

        Args:
            about: m, (groups, k) or a number.
        """
        count = np.maximum(self.count, 1)[:, None]
        mean = self.sums / count
        m = np.where(self.count[:, None] > 0, np.broadcast_to(about, mean.shape), 0.0)
        matrix: Array = self.matrix / count[..., None]
        matrix -= mean[:, :, None] * m[:, None] + m[:, :, None] * (mean - m)[:, None]
        return matrix


class Gatherer:
    """Sums over columns that come sample by sample."""

    def __init__(self, shape: Window, low: float = -math.inf, high: float = math.inf) -> None:
        """Rows with an element below `low` or above `high` are left out."""
        self._low, self._high = low, high
        groups, depth = shape.groups, shape.depth
        self._matrix = np.zeros((groups, depth, depth))
        self._sums = np.zeros((groups, depth))
        self._count = np.zeros(groups, np.int64)
        self._waiting: list[Array] = []
        self._room = 0

    def add(self, x: Array) -> None:
        """(groups, k, rows) float32, which must not change any more."""
        self._waiting.append(x)
        self._room += x.size
        # few large products are much faster than many small ones
        if self._room >= max(_WAITING, 2 * self._matrix.size):
            self._multiply()

    def finish(self) -> Gram:
        """The sums over all columns so far."""
        self._multiply()
        return Gram(self._matrix, self._sums, self._count)

    def _multiply(self) -> None:
        if not self._waiting:
            return
        x = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting, axis=2)
        self._waiting, self._room = [], 0
        kept: Array = np.full((len(x), x.shape[2]), True)
        if x.size and not (x.min() >= self._low and x.max() <= self._high):
            kept = np.all((x >= self._low) & (x <= self._high), axis=1)
            x = x[:, :, kept[0]] if len(x) == 1 else np.where(kept[:, None], x, np.float32(0))
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # such sums are infinite, and nobody's scale
            self._matrix += np.matmul(x, x.transpose(0, 2, 1))
        self._sums += x.sum(axis=2, dtype=np.float64)
        self._count += kept.sum(axis=1)


def gather(
    model: ir.Model, wanted: Mapping[str, Iterable[Window]], samples: Iterable[Feed],
    limits: Mapping[str, tuple[float, float]], *, most: int = ROWS, threads: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> dict[tuple[str, Window], Gram]:  # fmt: skip
    """What is kept of the rows of each tensor and window, over all samples.

    Args:
        model: the float model; run once on each sample, with all tensors as outputs.
        wanted: windows by name of the tensor.
        samples: feeds; read once, one at a time.
        limits: the least and the greatest value that codes of a tensor can say; where missing, nothing saturates.
        most: rows of a sample.
        threads: intra-op threads, 0 for ORT's choice.
        tick: called after each sample.
    """
    keys = {name: tuple(dict.fromkeys(windows)) for name, windows in wanted.items()}
    made = {
        (name, shape): Gatherer(shape, *limits.get(name, (-math.inf, math.inf)))
        for name, windows in keys.items()
        for shape in windows
    }
    bound = Session(
        with_outputs(model, keys), Options("all", threads=threads, in_order=True)
    ).bound(list(keys))
    for feed in samples:
        for name, x in zip(keys, bound.run(feed), strict=True):
            for shape in keys[name]:
                # a view of the session's memory would change with the next run
                found = columns(shape, x, most)
                made[name, shape].add(np.array(found) if np.shares_memory(found, x) else found)
        tick()
    return {key: gatherer.finish() for key, gatherer in made.items()}


def windows_within(
    wanted: Mapping[str, Iterable[Window]], facts: Mapping[str, Fact], memory: int
) -> list[dict[str, tuple[Window, ...]]]:
    """The tensors in groups that take at most `memory` bytes, where that is possible: their values, and what is kept of them."""
    groups: list[dict[str, tuple[Window, ...]]] = []
    room = 0
    for name, windows in wanted.items():
        shapes = tuple(dict.fromkeys(windows))
        size = 4 * facts[name].elements if name in facts else 0
        size += sum(16 * shape.groups * shape.depth**2 for shape in shapes)  # sums, and one product
        if not groups or size > room:
            groups.append({})
            room = memory
        groups[-1][name] = shapes
        room -= size
    return groups
