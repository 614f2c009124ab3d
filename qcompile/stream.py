"""Large models: weights rounded to nearest, one at a time, from file to file.

Nothing holds the model: weights are mapped from the file that has them, their codes are made when the result is written,
and what was made last is dropped before the next. Peak anonymous memory follows the largest weight (two to three bytes
a number), not the model. No data is needed, and nothing is run but single layers, to check them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from passes.lower_nbits import LowerNbits
from passes.name_nodes import NameNodes
from qcompile.algo.blocks import Blocked
from qcompile.errors import ModelError, PassError, QcompileError, RecipeError
from qcompile.graph import io
from qcompile.graph.documentation import documentation, restore
from qcompile.graph.linear import Linear, find_linears
from qcompile.graph.publish import atomic, check_apart, data_file
from qcompile.keep import match_patterns
from qcompile.progress import Progress, Silent, Step
from qcompile.quant.nbits import BLOCKS, Layout
from qcompile.resident import Peak
from qcompile.solve.payload import Deferred
from qcompile.solve.slabs import Scheme, round_stored
from qcompile.spot import SpotCheck, check_layers
from qcompile.step import run_pass


@dataclasses.dataclass(frozen=True)
class StreamSettings:
    """How weights are stored.

    Attributes:
        bits: 4 or 8.
        block: weights that share a scale: 16, 32, 64, 128 or 256, or 0 for a whole row (one output channel).
        symmetric: no zero points.
        search: scales of least error are searched for, which takes about ten times as long.
        tables: embeddings are rounded, too.
        keep_float: patterns of nodes that stay as they are; see `keep.match_patterns`.
        bits_for: patterns and other bits for nodes that match; of several the last one counts.
        accuracy_level: of MatMulNBits, as `LowerNbits` has it.
        threads: that round.
        checks: layers of the result that are run against the float ones; 0 for none.
    """

    bits: int = 4
    block: int = 32
    symmetric: bool = True
    search: bool = False
    tables: bool = True
    keep_float: tuple[str, ...] = ()
    bits_for: tuple[tuple[str, int], ...] = ()
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    threads: int = 2
    checks: int = 8

    def __post_init__(self) -> None:
        """Raises: RecipeError if a number is none of those."""
        for bits in (self.bits, *(bits for _, bits in self.bits_for)):
            if bits not in (4, 8):
                raise RecipeError(f"weights of {bits} bits: large models are stored in 4 or 8.")
        least, most = BLOCKS
        if self.block and not (least <= self.block <= most and self.block.bit_count() == 1):
            raise RecipeError(
                f"blocks of {self.block} weights: give 16, 32, 64, 128 or 256, or 0 for a row."
            )
        if self.threads < 1 or self.checks < 0:
            raise RecipeError(
                f"{self.threads} threads and {self.checks} checks: give at least 1 and 0."
            )


@dataclasses.dataclass(frozen=True)
class WeightLine:
    """What became of a weight.

    Attributes:
        name: of the tensor; empty for a node without one.
        nodes: names of the nodes that read it so.
        shape: (N, K), outputs and inputs; () where it is no matrix.
        bits: of its codes; None if it stays float, as block and error.
        block: weights that share a scale; 0 for a row.
        before: bytes of the float weight.
        after: bytes of codes, scales and zero points, and of the float weight where that is still read.
        error: sqrt(sum (w - w')^2 / sum w^2).
        reason: why it stays float.
    """

    name: str
    nodes: tuple[str, ...]
    shape: tuple[int, ...]
    bits: int | None
    block: int | None
    before: int
    after: int
    error: float | None
    reason: str | None


@dataclasses.dataclass(frozen=True)
class StreamReport:
    """What was done.

    Attributes:
        weights: one line a stored matrix, in graph order; what stays float is among them.
        before: bytes of the files of the model.
        after: bytes of the files of the result.
        seconds: that it took, checks included.
        peak: the most anonymous memory of this process, in bytes; None where the system does not tell.
        growth: the same, beyond what the process had at the beginning.
        checks: the layers that were run.
    """

    weights: tuple[WeightLine, ...]
    before: int
    after: int
    seconds: float
    peak: int | None
    growth: int | None
    checks: tuple[SpotCheck, ...]

    @property
    def quantized(self) -> tuple[WeightLine, ...]:
        """The lines of weights that are codes now."""
        return tuple(line for line in self.weights if line.bits is not None)


@dataclasses.dataclass(eq=False)
class _Job:
    """A matrix with its scheme, and the nodes that read it."""

    items: list[Linear]
    scheme: Scheme
    error: float | None = None


def quantize_large(
    path: Path, output: Path, settings: StreamSettings | None = None, progress: Progress | None = None,
    describe: Callable[[ir.Model], None] = lambda model: None,
) -> StreamReport:  # fmt: skip
    """`output` (and `output`.data, if weights have more than 1.9 GB) holds the model with weights of few bits.

    `describe` may write into the metadata of the result.

    Raises:
        ModelError: the model cannot be read, holds NaN or infinities, or has no weight that could be rounded.
        RecipeError: a pattern matches nothing.
        OutputError: the result cannot be written, or would replace the model. Nothing is left behind.
        PassError: the result does not compute what it should; it is not kept.
    """
    settings, begin = settings or StreamSettings(), time.perf_counter()
    with Peak() as peak:
        model = io.load(path, mapped=True)
        files = {path.resolve(), *(file.resolve() for file in io.external_files(model))}
        for file in sorted(files):
            what = "the model" if file == path.resolve() else "a data file of the model"
            check_apart(output, {what: file})
            check_apart(data_file(output), {what: file})
        before = sum(file.stat().st_size for file in files)
        run_pass(NameNodes(), model)
        entries = _assign(model, settings)
        jobs = [entry for entry in entries if isinstance(entry, _Job)]
        if not jobs:
            raise ModelError(f"{path} has no weight to round{_why(entries)}.")
        describe(model)
        checks, after = _written(model, output, jobs, settings, progress or Silent())
        lines = (_line(item) if isinstance(item, _Job) else item for item in entries)
        weights = tuple(lines)
    growth = None if peak.most is None or peak.start is None else peak.most - peak.start
    seconds = time.perf_counter() - begin
    return StreamReport(weights, before, after, seconds, peak.most, growth, checks)


def _assign(model: ir.Model, settings: StreamSettings) -> list[_Job | WeightLine]:
    """The matrices to round, each once, and the nodes that stay float, in graph order.

    Raises:
        RecipeError: a pattern matches nothing.
    """
    kept = match_patterns(model, settings.keep_float).why
    bits = _bits(model, settings)
    entries: list[_Job | WeightLine] = []
    jobs: dict[object, _Job] = {}
    for item in find_linears(model):
        reason = item.reason or kept.get(item.name) or _unwanted(item, settings)
        if reason is not None or item.weight is None:
            entries.append(_float(item, reason or "it has no matrix"))
            continue
        scheme = Scheme(
            bits.get(item.name, settings.bits), settings.block, settings.symmetric, settings.search
        )
        key = item.weight.key, item.weight.dtype, scheme
        if key in jobs:
            jobs[key].items.append(item)
        else:
            entries.append(jobs.setdefault(key, _Job([item], scheme)))
    return entries


def _bits(model: ir.Model, settings: StreamSettings) -> dict[str, int]:
    """Node names -> bits, for those that patterns name."""
    found: dict[str, int] = {}
    for pattern, bits in settings.bits_for:
        try:
            found.update(
                dict.fromkeys(match_patterns(model, [pattern], option="--bits-for").why, bits)
            )
        except RecipeError as error:
            raise RecipeError(str(error).replace("--keep-float", "--bits-for")) from error
    return found


def _unwanted(item: Linear, settings: StreamSettings) -> str | None:
    if item.kind == "gather" and not settings.tables:
        return "tables stay float"
    if item.rarely_pays:
        return "its activations would be transposed twice, which takes longer than is saved"
    return None


def _float(item: Linear, reason: str) -> WeightLine:
    weight = item.weight
    name, shape = ("", ()) if weight is None else (weight.root.name or "", weight.shape)
    size = item.nbytes
    return WeightLine(name, (item.name,), shape, None, None, size, size, None, reason)


def _line(job: _Job) -> WeightLine:
    first, scheme = job.items[0], job.scheme
    weight = first.weight
    assert weight is not None
    layout = Layout(*first.shape, scheme.bits, scheme.block, scheme.symmetric)
    table = all(item.kind == "gather" for item in job.items)
    after = math.prod(layout.table_shape if table else layout.product_shape)
    after += layout.rows * layout.groups * (2 if weight.dtype == ir.DataType.FLOAT16 else 4)
    after += 0 if scheme.symmetric else math.prod(layout.zeros_shape)
    if weight.root.is_initializer() and weight.root.uses():
        after += weight.tensor.nbytes
    nodes = tuple(item.name for item in job.items)
    return WeightLine(
        weight.root.name or "", nodes, first.shape, scheme.bits, scheme.block, first.nbytes, after,
        job.error, None,
    )  # fmt: skip


def _why(entries: list[_Job | WeightLine]) -> str:
    """The first reason, as an example."""
    reasons = [entry for entry in entries if isinstance(entry, WeightLine)]
    return f": {reasons[0].nodes[0]}: {reasons[0].reason}" if reasons else ""


def _written(
    model: ir.Model, output: Path, jobs: list[_Job], settings: StreamSettings, progress: Progress
) -> tuple[tuple[SpotCheck, ...], int]:
    """The results of the checks, and the bytes of the files; the codes are made meanwhile.

    Raises:
        OutputError, ModelError, PassError: as `quantize_large`.
    """
    with ThreadPoolExecutor(settings.threads) as pool:
        work = _Work(jobs, pool)
        said = documentation(model)
        outcome = run_pass(LowerNbits(work.weights(), "nbits", settings.accuracy_level), model)
        restore(model, said)
        for name in work.weights():
            if name in outcome.skipped:
                raise PassError(f"{name} was to be rounded: {outcome.skipped[name]}.")
        with atomic(output) as temporary:
            with progress.stage("rounding weights", len(jobs)) as work.step:
                work.save(model, temporary)
            files = (temporary, data_file(temporary))
            after = sum(file.stat().st_size for file in files if file.exists())
            with progress.stage("checking the result"):
                checks = _checked(temporary, jobs, settings.checks)
    return checks, after


class _Work:
    """Makes the codes of each job when they are asked for."""

    def __init__(self, jobs: list[_Job], pool: Executor) -> None:
        self._pool = pool
        self._failed: QcompileError | None = None
        self.step: Step = lambda done, total: None
        self._weights: dict[str, Deferred] = {}
        for job in jobs:
            scheme = job.scheme
            late = Deferred(scheme.bits, scheme.block, scheme.symmetric, self._maker(job))
            self._weights.update((item.name, late) for item in job.items)

    def weights(self) -> Mapping[str, Deferred]:
        """By node name; nodes that read one matrix have one object."""
        return self._weights

    def save(self, model: ir.Model, path: Path) -> None:
        """The model is written.

        Raises:
            QcompileError: what `round_stored` raises, which serializers may wrap.
        """
        try:
            io.write(model, path)
        except Exception as error:
            if self._failed is not None and error is not self._failed:
                raise self._failed from error
            raise

    def _maker(self, job: _Job) -> Callable[[], Blocked]:
        weight = job.items[0].weight
        assert weight is not None

        def make() -> Blocked:
            try:
                made = round_stored(weight, job.scheme, self._pool)
            except QcompileError as error:
                self._failed = error
                raise
            if (
                job.error is None
            ):  # tiny tensors are written by the serializer, from codes made again
                self.step(1, None)
            job.error = made.error
            return made.blocked

        return make


def _checked(path: Path, jobs: list[_Job], most: int) -> tuple[SpotCheck, ...]:
    """What `check_layers` found in a file that was written.

    Raises:
        PassError: it is no valid model, or a layer is off.
    """
    complaint = io.check_file(path)
    if complaint is not None:
        raise PassError(f"the result is not valid: {complaint}.")
    layers = [(job.items[0], job.error or 0.0) for job in jobs]
    return check_layers(io.load(path, mapped=True), layers, most)
