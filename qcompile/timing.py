"""What this machine's kernels take for the nodes of a model, measured node by node.

A target's costs are a line through many shapes; a model has a few dozen. Each candidate is cut out with what it
absorbs and its own shapes, alike ones once, and all stand side by side in one model (`qcompile.pieces`). ORT's
profiler tells what each took in that model as float, and in the integer model built from it.

What stands at the borders of a piece (Q, DQ, and layout changes: ORT runs a float Conv in blocks of channels, an
integer one channels-last) is no part of it: it gives the cost of borders. Only a node that cannot work in the
layout of the Convs beside it is charged for the changes that it makes necessary. Times belong to the machine, and
are kept (`qcompile.run.cache`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.build import Solution, build
from qcompile.errors import ModelError
from qcompile.graph.edit import is_op
from qcompile.pieces import Collection, Piece, cut_out
from qcompile.plan.candidates import Candidate, Facts
from qcompile.plan.make import Request, border_costs, find_candidates, make_plan
from qcompile.plan.plan import Form
from qcompile.plan.tensors import coding
from qcompile.run.cache import Cache, open_cache
from qcompile.run.profile import Kernel, kernels
from qcompile.solve.activations import solve_activations
from qcompile.solve.weights import solve_weights
from qcompile.targets.schema import Target

logger = logging.getLogger(__name__)

_RUNS = 16
_CHUNK_BYTES = 256 << 20  # of inputs, weights and results in one model
_CHUNK_NS = 4e7  # of kernels in one run of one model, float and integer, as the target expects
_ROWS = 16  # of 128 rows MatMulNBits with 8 bits takes 4 times as long as an integer product, of one row less
_TICK = 1000.0  # nanoseconds: what the profiler counts in, rounding down
_BORDER_SHAPES = ((1, 64, 7, 7), (1, 64, 20, 20), (1, 64, 56, 56), (1, 64, 112, 112))
_BORDER_KINDS = (
    ("QuantizeLinear",),
    ("DequantizeLinear",),
    ("Transpose",),
    ("ReorderInput", "ReorderOutput"),
)
_BORDER_OPS = frozenset({op for kind in _BORDER_KINDS for op in kind} - {"Transpose"})
_OWNER = re.compile(r"k(\d+)(?!\d)([ft]\d+)?")


@dataclasses.dataclass(frozen=True)
class Border:
    """Nanoseconds of what stands between float and integer nodes, for tensors of the sizes of `_BORDER_SHAPES`.

    Attributes:
        quantize: QuantizeLinear.
        dequantize: DequantizeLinear.
        layout: NCHW to or from NHWC, of 8-bit codes.
        reorder: NCHW to or from blocks of channels, of floats.
    """

    quantize: tuple[float, ...] = ()
    dequantize: tuple[float, ...] = ()
    layout: tuple[float, ...] = ()
    reorder: tuple[float, ...] = ()

    def ns(self, kind: tuple[float, ...], elements: int) -> float:
        """Nanoseconds for so many elements, one of the attributes as `kind`: linear between sizes, and beyond."""
        if not kind:
            return 0.0
        sizes = [math.prod(shape) for shape in _BORDER_SHAPES]
        beyond = max(elements / sizes[-1], 1.0)
        return beyond * float(np.interp(elements, sizes, kind))

    def factor(self, target: Target, facts: Facts, values: Iterable[ir.Value]) -> float:
        """What a pair of borders on one of these values takes, against what the target says.

        The median over the values, within 0.5 to 4; 1 if nothing is known. Integer nodes want their images
        channels-last, so both borders change the layout; the float nodes beside them work in blocks of channels
        about half of the time, so one of the two reorders.
        """
        ratios = []
        for value in values:
            fact, expected = facts.get(value.name or ""), sum(border_costs(value, target, facts))
            if fact is None or fact.shape is None or not self.quantize or expected <= 0:
                continue
            kinds = [self.quantize, self.dequantize]
            if len(fact.shape) == 4:
                kinds += [self.layout, self.layout, self.reorder]
            ratios.append(sum(self.ns(kind, fact.elements) for kind in kinds) / expected)
        return min(max(float(np.median(ratios)), 0.5), 4.0) if ratios else 1.0


@dataclasses.dataclass(frozen=True)
class KernelTimes:
    """What kernels take here.

    Attributes:
        nodes: nanoseconds as float and as integer, by name of a candidate: see `Request.measured`.
        each: of borders, by size.
        border: factor on the target's costs of borders: see `Request.border`.
        measured: signatures that were measured now.
        cached: signatures that were known.
        seconds: that all of it took.
        by_block: nanoseconds of products of few rows with an 8-bit weight alone: see `Request.by_block`.
    """

    nodes: Mapping[str, tuple[float, float]]
    each: Border
    border: float
    measured: int
    cached: int
    seconds: float
    by_block: Mapping[str, float] = dataclasses.field(default_factory=dict)


def kernel_times(
    prepared: ir.Model, found: Mapping[str, Candidate | str], target: Target, facts: Facts, *,
    threads: int, by_block: bool = False, cache: bool = True, seconds: float = 10.0,
    tick: Callable[[int, int | None], None] = lambda done, total: None,
) -> KernelTimes:  # fmt: skip
    """The times of all candidates whose shapes and constants are known.

    Args:
        prepared: the model; it is only read.
        found: its candidates, as `find_candidates` gives them.
        target: what integer forms look like, and what they are expected to cost.
        facts: the shapes.
        threads: of ORT's sessions.
        by_block: products of at most `_ROWS` rows are timed with an 8-bit weight alone as well.
        cache: whether known times are used and new ones kept.
        seconds: no new measurement begins after so many; the costliest signatures come first.
        tick: is called with (signatures done, their number or None).
    """
    start = time.perf_counter()
    store = open_cache(threads) if cache else Cache(None, "")
    pieces = dict(cut_out(found, target, facts))
    distinct = {piece.key: piece for piece in pieces.values()}
    known = {key: row for key in distinct if (row := store.get(key)) is not None and len(row) == 2}
    cached = len(known)
    todo = sorted((p for p in distinct.values() if p.key not in known), key=lambda p: -p.cost)
    tick(0, len(todo))
    bench = _Bench(prepared.opset_imports, target, threads)
    border = _border(store, bench)
    for chunk in _chunks(todo):
        if time.perf_counter() - start > seconds:
            logger.info("no time left for %d of %d kernels", len(distinct) - len(known), len(distinct))  # fmt: skip
            break
        new = bench.measure(chunk, border)
        known.update(new)
        store.add(new)
        tick(len(chunk), None)
    rowed = {n: p for n, p in pieces.items() if by_block and p.item.block and _rows(p) <= _ROWS}
    blocks = _times_by_block(rowed, bench, store, lambda: time.perf_counter() - start > seconds)
    nodes = {name: known[piece.key] for name, piece in pieces.items() if piece.key in known}
    values = dict.fromkeys(v for p in pieces.values() for v in (*p.item.data, p.item.result))
    return KernelTimes(
        {name: (row[0], row[1]) for name, row in nodes.items()}, border, border.factor(target, facts, values),
        len(known) - cached, cached, time.perf_counter() - start, blocks,
    )  # fmt: skip


def _times_by_block(
    pieces: Mapping[str, Piece], bench: _Bench, store: Cache, over: Callable[[], bool]
) -> dict[str, float]:
    """Nanoseconds with an 8-bit weight alone, by name."""
    keys = {name: f"{piece.key} block{piece.item.block}" for name, piece in pieces.items()}
    distinct = {keys[name]: piece for name, piece in pieces.items()}
    known = {
        key: row[0] for key in distinct if (row := store.get(key)) is not None and len(row) == 1
    }
    todo = [key for key in distinct if key not in known]
    for chunk in _chunks([distinct[key] for key in todo]):
        if over():
            break
        times = bench.by_block(chunk)
        new = dict(zip(todo, times, strict=False)) if times else {}
        todo = todo[len(chunk) :]
        known |= new
        store.add({key: (ns,) for key, ns in new.items()})
    return {name: known[key] for name, key in keys.items() if key in known}


def _rows(piece: Piece) -> int:
    """Rows of the input of a product, over all its leading axes."""
    return math.prod(piece.shapes[piece.item.data[0]][:-1])


def _border(store: Cache, bench: _Bench) -> Border:
    key, sizes = f"border {bench.target.activation}", len(_BORDER_SHAPES)
    row = store.get(key)
    if row is None or len(row) != len(_BORDER_KINDS) * sizes:
        row = bench.border()
        if any(row):
            store.add({key: row})
    return Border(*(row[i : i + sizes] for i in range(0, len(row), sizes)))


def _chunks(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The pieces in order, so many together as one model may hold."""
    chunk: list[Piece] = []
    size, cost = 0, 0.0
    for piece in pieces:
        if chunk and (size + piece.bytes > _CHUNK_BYTES or cost + piece.cost > _CHUNK_NS):
            yield chunk
            chunk, size, cost = [], 0, 0.0
        chunk.append(piece)
        size, cost = size + piece.bytes, cost + piece.cost
    if chunk:
        yield chunk


class _Bench:
    """Runs models of pieces and reads what the pieces took."""

    def __init__(self, opsets: Mapping[str, int], target: Target, threads: int) -> None:
        self.opsets, self.target, self.threads = opsets, target, threads

    def border(self) -> tuple[float, ...]:
        """Nanoseconds of each of `_BORDER_KINDS` for each size, around a Conv; nothing if ORT refuses it."""
        collection = Collection(self.opsets)
        for number, shape in enumerate(_BORDER_SHAPES):
            collection.add_border(f"border{number}", shape)
        try:
            as_float, as_int = self._profiles(collection)
        except ModelError as error:
            logger.info("borders are not measured: %s", error)
            return ()
        sizes = [math.prod(shape) for shape in _BORDER_SHAPES]
        return tuple(
            _mean(
                [
                    _typical(kernel.times)
                    for kernel in (*as_float, *as_int)
                    if kernel.op_type in kind and math.prod(kernel.shape) == size
                ]
            )
            for kind in _BORDER_KINDS
            for size in sizes
        )

    def measure(self, pieces: Sequence[Piece], border: Border) -> dict[str, tuple[float, float]]:
        """(Float, integer) nanoseconds by signature; of pieces that ORT refuses, none."""
        collection = Collection(self.opsets)
        for number, piece in enumerate(pieces):
            collection.add(number, piece)
        try:
            as_float, as_int = (_read(found, pieces) for found in self._profiles(collection))
        except ModelError as error:
            if len(pieces) == 1:
                logger.info("a %s is not measured: %s", pieces[0].item.node.op_type, error)
                return {}
            middle = len(pieces) // 2
            return self.measure(pieces[:middle], border) | self.measure(pieces[middle:], border)
        return {
            p.key: (_float_ns(p, f, border), _int_ns(p, i, border))
            for p, f, i in zip(pieces, as_float, as_int, strict=True)
        }

    def by_block(self, pieces: Sequence[Piece]) -> list[float]:
        """Nanoseconds of each product with an 8-bit weight alone; nothing if ORT refuses it."""
        collection = Collection(self.opsets)
        for number, piece in enumerate(pieces):
            collection.add(number, piece)
        try:
            found = kernels(
                self._built(collection, Form.WEIGHT),
                collection.feed,
                threads=self.threads,
                runs=_RUNS,
            )
        except ModelError as error:
            logger.info("weights alone are not measured: %s", error)
            return []
        return [took.own for took in _read(found, pieces)]

    def _profiles(self, collection: Collection) -> tuple[list[Kernel], list[Kernel]]:
        """The model as float, and with everything integer that can be."""
        model, made = collection.model, self._built(collection, Form.DYNAMIC)
        feed, threads = collection.feed, self.threads
        return (
            kernels(model, feed, threads=threads, runs=_RUNS),
            kernels(made, feed, threads=threads, runs=_RUNS),
        )

    def _built(self, collection: Collection, products: Form) -> ir.Model:
        """The model with everything integer that can be, and products in one of their forms."""
        model, facts = collection.model, collection.facts
        found = find_candidates(model, self.target, facts)
        forms = {
            name: Form.FREE if item.role == "free" else Form.STATIC
            for name, item in found.items()
            if isinstance(item, Candidate) and item.role != "dynamic"
        }
        forms |= {
            name: products
            for name, item in found.items()
            if isinstance(item, Candidate) and item.role == "dynamic"
        }
        plan = make_plan(model, self.target, facts, Request(forms=forms), found)
        coded = coding(model, plan, found)
        ranges = {root.name or "": collection.range_of(root.name or "") for root in coded.roots}
        params = solve_activations(plan, coded, {}, "minmax", ranges)
        weights = solve_weights(
            plan, found, params, {}, saturating=self.target.saturating, search=False
        )
        return build(model, plan, Solution(params, weights), self.target, facts, "fused")


@dataclasses.dataclass
class _Took:
    """What one piece took.

    Attributes:
        own: nanoseconds of its own nodes.
        feeders: of those around it, by name.
        blocked: it ran in blocks of channels.
        shape: that its node made.
    """

    own: float = 0.0
    feeders: dict[str, float] = dataclasses.field(default_factory=dict)
    blocked: bool = False
    shape: tuple[int, ...] = ()


def _read(found: Sequence[Kernel], pieces: Sequence[Piece]) -> list[_Took]:
    took = [_Took() for _ in pieces]
    for kernel in found:
        owner = _OWNER.match(kernel.name)
        if owner is None or kernel.op_type in _BORDER_OPS:
            continue
        piece, mine = pieces[int(owner[1])], took[int(owner[1])]
        if kernel.op_type == "Transpose" and not is_op(piece.item.node, "Transpose"):
            continue  # a layout change
        ns = _typical(kernel.times)
        if owner[2] is not None:
            mine.feeders[owner[2]] = mine.feeders.get(owner[2], 0.0) + ns
        else:
            mine.own += ns
            mine.blocked |= "nchwc" in kernel.name
            mine.shape = kernel.shape
    return took


def _float_ns(piece: Piece, took: _Took, border: Border) -> float:
    if piece.merged:
        return 0.0
    if piece.summed:  # one of two like Convs did it, in that much more time
        return took.own + max(took.feeders.values()) - min(took.feeders.values())
    moved = () if took.blocked else piece.moved
    return took.own + sum(border.ns(border.reorder, elements) for elements in moved)


def _int_ns(piece: Piece, took: _Took, border: Border) -> float:
    if piece.item.role == "free":
        return 0.0
    # what comes as NCHW was not turned to channels-last
    moves = piece.item.role != "conv" and not is_op(piece.item.node, "Transpose")
    turned = moves and took.shape == piece.shapes[piece.item.node.outputs[0]]
    moved = piece.moved if turned else ()
    return took.own + sum(border.ns(border.layout, elements) for elements in moved)


def _typical(times: Sequence[float]) -> float:
    """The median; of times near the profiler's tick the mean without the slowest, as the median would jump."""
    ranked = sorted(times)
    middle = float(np.median(ranked)) if ranked else 0.0
    if middle < 5 * _TICK:
        middle = float(np.mean(ranked[: max(1, len(ranked) * 3 // 4)])) if ranked else 0.0
    return middle + _TICK / 2


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0
