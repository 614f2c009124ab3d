"""Reads what a tapped model gives for samples: quickly as a rule, value by value where something is odd."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.batches import Batch, may_run_together
from qcompile.calib.fold import fold, fold_finite
from qcompile.calib.stats import TensorStats
from qcompile.calib.taps import Taps, tapped
from qcompile.errors import ModelError
from qcompile.graph.edit import graphs, is_op
from qcompile.run.probe import Fact
from qcompile.run.session import Bound, Feed, Options, Session, quick_level
from qcompile.step import Need

_HUGE = 1e8  # constants as large as this are masks, and infinities what they lead to
_MASK_SIZE = 1 << 16  # values of a constant that is looked through for them
_FINDERS = (
    "NonZero",
    "Compress",
    "Unique",
    "NonMaxSuppression",
    "RoiAlign",
    "Multinomial",
    "Bernoulli",
)
_TRIALS = 2  # batches that are compared with their samples, one by one

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Bad:
    """A value that no range can hold: of which sample and tensor, and where in it."""

    sample: int
    tensor: str
    index: tuple[int, ...]
    value: float

    def __str__(self) -> str:
        what = "NaN" if np.isnan(self.value) else "infinite"
        place = f" at index {list(self.index)}" if self.index else ""
        return f"tensor {self.tensor!r} is {what}{place} for sample {self.sample} of the calibration data"


@dataclasses.dataclass
class Found:
    """What a batch left: statistics of each tensor of its good samples, as one part or several; the bad ones."""

    stats: list[list[TensorStats]]
    bad: list[Bad]


class _Loaded:
    """A tapped model, loaded. Each thread reads its outputs where ORT wrote them."""

    def __init__(self, model: ir.Model, taps: Taps, threads: int, *, pattern: bool) -> None:
        self.taps = taps
        level = quick_level(model)
        self._session = Session(model, Options(level, threads, pattern=pattern, in_order=True))
        self._own = threading.local()

    def run(self, feed: Feed) -> list[Array]:
        """The outputs, as views that hold until this thread's next run."""
        bound: Bound | None = getattr(self._own, "bound", None)
        if bound is None:
            bound = self._own.bound = self._session.bound(self.taps.outputs)
        return bound.run(feed)

    def split(self, arrays: list[Array], count: int) -> list[list[Array]]:
        """What samples that ran together gave, one by one."""
        parts: list[list[Array]] = [[] for _ in range(count)]
        for rank, array in zip(self.taps.shapes, arrays, strict=True):
            pieces = [_share(array, rank, count)] * count if rank else np.split(array, count)
            for part, piece in zip(parts, pieces, strict=True):
                part.append(piece)
        return parts

    def same(self, batch: Batch) -> bool:
        """Whether samples together give the same bits as one by one."""
        apart = [[array.copy() for array in self.run(feed)] for feed in batch.feeds]
        try:
            joined = self.run(batch.joined())
        except ModelError:
            return False
        count = len(batch.feeds)
        sized = [array for array, rank in zip(joined, self.taps.shapes, strict=True) if not rank]
        if any(not array.ndim or array.shape[0] % count for array in sized):
            return False
        return all(
            a.shape == b.shape and a.tobytes() == b.tobytes()
            for ours, theirs in zip(self.split(joined, count), apart, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        )


class Runner:
    """The tapped model, once for samples of the shapes that the facts are of, once for all others.

    The second one also has to tell the shapes of feature maps, which takes them out of the layout of
    convolutions.
    """

    def __init__(
        self, model: ir.Model, needs: Sequence[Need], facts: Mapping[str, Fact], *, counted: int,
        threads: int, whole: bool = False,
    ) -> None:  # fmt: skip
        """With `whole` nothing is reduced in the graph. A run takes `threads` threads, 0: ORT's choice."""
        self.model, self.needs, self.facts = model, needs, facts
        self.counted, self.threads, self._whole = counted, threads, whole
        self._lock = threading.Lock()
        self._trials = 0
        self._loaded: dict[bool, _Loaded] = {}
        inputs = [value.name or "" for value in model.graph.inputs]
        self._usual = {name: facts[name].shape for name in inputs if name in facts}
        self._follow = _shapes_follow(model, facts)
        self.taps = self._load(told=False).taps
        self.together = may_run_together(model, facts) and not whole

    @property
    def bytes(self) -> int:
        """What the outputs of a sample take."""
        return sum(self.taps.bytes.values())

    def run(self, feed: Feed) -> list[Array]:
        """The outputs where nothing is reduced, as views that hold until this thread's next run."""
        return self._load(told=False).run(feed)

    def read(self, batch: Batch) -> list[TensorStats] | None:
        """Statistics of each tensor over the batch; None if the outputs do not tell all.

        Raises:
            ModelError: ORT fails.
        """
        alike = batch.alike
        usual = (
            self._follow
            and alike
            and all(
                np.shape(value) == self._usual.get(name) for name, value in batch.feeds[0].items()
            )
        )
        loaded = self._load(told=bool(self.taps.maps) and not usual)
        count = len(batch.numbers)
        if count == 1:
            samples = [loaded.run(batch.feeds[0])]
        elif self.together and alike and self._proved(loaded, batch):
            samples = loaded.split(loaded.run(batch.joined()), count)
        else:
            samples = [[array.copy() for array in loaded.run(feed)] for feed in batch.feeds]
        return loaded.taps.read(samples, self.counted)

    def _load(self, *, told: bool) -> _Loaded:
        with self._lock:
            if told not in self._loaded:
                made, taps = tapped(
                    self.model, self.needs, self.facts, whole=self._whole, shapes=told
                )
                self._loaded[told] = _Loaded(
                    made, taps, self.threads, pattern=_has_fixed_shapes(self.model)
                )
            return self._loaded[told]

    def _proved(self, loaded: _Loaded, batch: Batch) -> bool:
        """Whether samples may run together: it is tried on the first batches."""
        with self._lock:
            if self._trials < _TRIALS and self.together:
                self.together = loaded.same(batch)
                self._trials += 1
            return self.together


def _share(shapes: Array, rank: int, count: int) -> Array:
    """The shapes, one behind the other, of one of so many samples that ran together."""
    own = shapes.copy()
    own[::rank] //= count
    return own


def _shapes_follow(model: ir.Model, facts: Mapping[str, Fact]) -> bool:
    """Whether all shapes follow from those of the inputs: no value is found or counted, or made a size."""
    inputs = [facts.get(value.name or "") for value in model.graph.inputs]
    if any(fact is None or not fact.is_float for fact in inputs):
        return False
    for graph in graphs(model):
        for node in graph:
            if graph is not model.graph or is_op(node, *_FINDERS):
                return False
            source = (
                facts.get(node.inputs[0].name or "") if node.inputs and node.inputs[0] else None
            )
            made = facts.get(node.outputs[0].name or "")
            known = source is not None and made is not None
            if is_op(node, "Cast") and not (known and (made.is_float or not source.is_float)):  # type: ignore[union-attr]
                return False
    return True


def _has_fixed_shapes(model: ir.Model) -> bool:
    """Whether only the first dimensions of the inputs vary."""
    return all(
        value.shape is not None and all(isinstance(dim, int) for dim in value.shape[1:])
        for value in model.graph.inputs
    )


class Exact:
    """Reads samples one by one from all values of their tensors, and tells which value is wrong."""

    def __init__(self, quick: Runner, *, masks: bool, infinite: Iterable[str] = ()) -> None:
        """With `masks` infinities are what the model's own constants lead to, and no error."""
        self._quick, self._masks = quick, masks
        self._runner: Runner | None = None
        self._lock = threading.Lock()
        self.infinite: set[str] = set(infinite)  # tensors whose infinities belong to the model

    def read(self, batch: Batch, *, first: bool) -> Found:
        """What the samples leave; with `first` the infinities of the first good one belong to the model."""
        with self._lock:
            if self._runner is None:
                quick = self._quick
                self._runner = Runner(
                    quick.model, quick.needs, quick.facts, counted=quick.counted, threads=quick.threads,
                    whole=True,
                )  # fmt: skip
        found = Found([], [])
        for number, feed in batch.singles:
            values = self._runner.run(feed)
            expected = {
                item.need.tensor
                for item, array in zip(self._runner.taps.wholes, values, strict=True)
                if first and np.isinf(array).any() and not np.isnan(array).any()
            }
            stats: list[TensorStats] = []
            for item, array in zip(self._runner.taps.wholes, values, strict=True):
                one = fold([array], item.need, item.axis, self._runner.counted)
                if one is None:
                    bad = self._bad(number, item.need.tensor, array, expected)
                    if bad is not None:
                        found.bad.append(bad)
                        break
                    one = fold_finite(array, item.need, self._runner.counted)
                stats.append(one)
            else:
                found.stats.append(stats)
                self.infinite |= expected
                first = False
        return found

    def _bad(self, number: int, tensor: str, array: Array, expected: set[str]) -> Bad | None:
        wrong = np.isnan(array)
        if not wrong.any():
            if self._masks or tensor in self.infinite or tensor in expected:
                return None
            wrong = np.isinf(array)
        index = tuple(map(int, np.argwhere(wrong)[0])) if array.ndim else ()
        return Bad(number, tensor, index, float(array[index]))


def has_masks(model: ir.Model) -> bool:
    """Whether a constant of the model is as large as only those are that mask something out."""
    for graph in graphs(model):
        tensors = [v.const_value for v in graph.initializers.values() if v.const_value is not None]
        tensors += [
            a.as_tensor() for n in graph for a in n.attributes.values()
            if a.type == ir.AttributeType.TENSOR and not a.is_ref()
        ]  # fmt: skip
        for tensor in tensors:
            if tensor.dtype.is_floating_point() and 0 < tensor.size <= _MASK_SIZE:
                values = np.asarray(tensor.numpy(), np.float64)
                if np.abs(values).max() >= _HUGE:
                    return True
    return False
