"""Runs the float model on the calibration samples and keeps statistics of chosen tensors.

Samples run side by side, one a core and each on a single thread: that is faster than one sample on all cores. What
a run leaves is folded into statistics of fixed size, in the order of the samples. If the outputs of the
runs would exceed the memory allowed, fewer run side by side, and then tensors are observed in groups, one pass over
the data a group.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import onnx_ir as ir

from qcompile.calib.batches import Batch, batch_size, batches
from qcompile.calib.fold import COUNTED
from qcompile.calib.reading import Bad, Exact, Found, Runner, has_masks
from qcompile.calib.stats import TensorStats
from qcompile.calib.taps import tapped
from qcompile.errors import DataError, ModelError
from qcompile.run.probe import Fact
from qcompile.run.session import Feed
from qcompile.step import Need

MEMORY = 256 << 20

Tick = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How samples are run.

    Attributes:
        memory: bytes that the outputs of the runs side by side may take, as far as one tensor allows.
        workers: runs side by side, each on one thread, or threads of a run where memory allows but one; 0: one a
            core.
        skip_bad: samples that make NaN or an unexpected infinity are left out, not an error.
        allow_all_bad: it is no error if no sample is good.
        infinite: tensors whose infinities belong to the model; None: those that have some in the first sample.
        counted: values of a tensor and sample in its histogram; beyond, each stands for several.
    """

    memory: int = MEMORY
    workers: int = 0
    skip_bad: bool = False
    allow_all_bad: bool = False
    infinite: frozenset[str] | None = None
    counted: int = COUNTED


@dataclasses.dataclass(frozen=True)
class Observed:
    """Statistics by tensor name, over `samples` samples in `passes` passes, without those in `bad`.

    `infinite` names the tensors whose infinities were taken to belong to the model; `together` says whether
    samples of the same shapes ran several at once.
    """

    tensors: Mapping[str, TensorStats]
    samples: int
    passes: int
    bad: tuple[Bad, ...] = ()
    together: bool = False
    infinite: frozenset[str] = frozenset()


def observe(
    model: ir.Model, needs: Mapping[str, Need], samples: Callable[[], Iterable[tuple[int, Feed]]],
    facts: Mapping[str, Fact], settings: Settings | None = None,
    tick: Tick = lambda number, passes: None,
) -> Observed:  # fmt: skip
    """Statistics of tensors of the main graph.

    Args:
        model: the float model; not changed.
        needs: by tensor name.
        samples: gives an iterator over (number, feed), anew at each call.
        facts: sizes of the tensors for one sample, from which groups are made.
        settings: memory and the like.
        tick: called with (pass, passes) after each sample.

    Raises:
        DataError: a tensor holds NaN or an infinity that is no mask, and bad samples are not to be skipped;
            or all samples are bad. The message names tensor, sample and index.
        ModelError: ORT cannot run the model on a sample.
    """
    settings = settings or Settings()
    groups, workers = _groups(model, needs, facts, settings)
    bad: dict[int, Bad] = {}
    made: list[_Pass] = []
    while len(made) < len(groups):
        number = len(made)
        run = _Pass(model, groups[number], facts, settings, workers, bad)
        before = len(bad)
        run.run(samples, lambda number=number: tick(number, len(groups)))  # type: ignore[misc]
        if len(bad) > before and number:
            made = []  # what was found here must not count in passes before, either
        else:
            made.append(run)
    tensors = {name: stats for run in made for name, stats in run.tensors.items()}
    seen = made[0].samples if made else 0
    if bad and not seen and not settings.allow_all_bad:
        raise DataError(f"{next(iter(bad.values()))}, and every other sample is bad as well.")
    order = {name: tensors[name] for name in needs}
    return Observed(
        order, seen, len(groups), tuple(bad[i] for i in sorted(bad)),
        any(run.together for run in made),
        frozenset().union(*(run.infinite for run in made)),
    )  # fmt: skip


def _groups(
    model: ir.Model, needs: Mapping[str, Need], facts: Mapping[str, Fact], settings: Settings
) -> tuple[list[list[Need]], int]:
    """Needs whose outputs fit the memory together, and how many runs go side by side."""
    workers = settings.workers or os.cpu_count() or 1
    _, taps = tapped(model, needs.values(), facts)
    total = sum(taps.bytes.values())
    while workers > 1 and total * workers > settings.memory:
        workers -= 1
    groups: list[list[Need]] = []
    room = 0
    for name, size in taps.bytes.items():
        if not groups or size * workers > room:
            groups.append([])
            room = settings.memory
        groups[-1].append(needs[name])
        room -= size * workers
    return groups, workers


class _Pass:
    """One pass over the data, for one group of tensors."""

    def __init__(
        self, model: ir.Model, needs: list[Need], facts: Mapping[str, Fact], settings: Settings,
        workers: int, bad: dict[int, Bad],
    ) -> None:  # fmt: skip
        self.tensors = {need.tensor: TensorStats() for need in needs}
        self.samples = 0
        self._settings, self._workers, self._bad = settings, workers, bad
        threads = 1 if workers > 1 else settings.workers  # alone, a run takes all that there are
        self._runner = Runner(model, needs, facts, counted=settings.counted, threads=threads)
        self._exact = Exact(self._runner, masks=has_masks(model), infinite=settings.infinite or ())

    def run(
        self, samples: Callable[[], Iterable[tuple[int, Feed]]], tick: Callable[[], None]
    ) -> None:
        """Folds all samples; bad ones are entered, unless they are an error."""
        good = ((number, feed) for number, feed in samples() if number not in self._bad)
        waiting: collections.deque[tuple[Batch, Future[Found]]] = collections.deque()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                for batch in batches(good, self._size):
                    # what is infinite in the first sample is so by design
                    if not self.samples and self._settings.infinite is None:
                        self._take(batch, self._fold(batch, first=True), tick)
                        continue
                    waiting.append((batch, pool.submit(self._fold, batch)))
                    if len(waiting) > self._workers:
                        self._finish(*waiting.popleft(), tick)
                while waiting:
                    self._finish(*waiting.popleft(), tick)
            finally:
                for _, job in waiting:
                    job.cancel()

    @property
    def infinite(self) -> set[str]:
        """Tensors whose infinities belong to the model."""
        return self._exact.infinite

    @property
    def together(self) -> bool:
        """Whether samples of the same shapes ran several at once."""
        return self._runner.together

    def _finish(self, batch: Batch, job: Future[Found], tick: Callable[[], None]) -> None:
        self._take(batch, job.result(), tick)

    def _take(self, batch: Batch, found: Found, tick: Callable[[], None]) -> None:
        for bad in found.bad:
            if not self._settings.skip_bad:
                raise DataError(
                    f"{bad}: the float model itself fails there. Mend or remove that sample, or leave "
                    "such samples out with --skip-bad."
                )
            self._bad[bad.sample] = bad
        for stats in found.stats:
            for mine, theirs in zip(self.tensors.values(), stats, strict=True):
                mine.add(theirs)
        self.samples += len(batch.numbers) - len(found.bad)
        for _ in batch.numbers:
            tick()

    def _fold(self, batch: Batch, *, first: bool = False) -> Found:
        """Statistics of a batch; if something is odd, of its samples one by one, exactly of the odd ones."""
        try:
            stats = self._runner.read(batch)
        except ModelError:  # perhaps sizes that cannot be joined; else it fails again
            stats = None
        if stats is not None:
            return Found([stats], [])
        if len(batch.numbers) == 1:
            return self._exact.read(batch, first=first)
        found = Found([], [])
        for number, feed in batch.singles:
            one = self._fold(Batch([number], [feed]), first=first)
            first &= not one.stats
            found.stats += one.stats
            found.bad += one.bad
        return found

    def _size(self, feed: Feed) -> int:
        """How many samples like this one go into a batch."""
        inputs = sum(np.asarray(value).nbytes for value in feed.values())
        return batch_size(self._runner.bytes + inputs, self._settings.memory)
