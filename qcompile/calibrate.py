"""Calibration as a product of its own: statistics that any method can use later, joined and kept."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from passes.bound_masks import BoundMasks
from qcompile.calib import store
from qcompile.calib.observe import Observed
from qcompile.calib.split import TUNING, Samples
from qcompile.calib.statistics import (
    SUFFIX,
    Key,
    Shard,
    Statistics,
    check_model,
    check_versions,
    merge,
    settle,
)
from qcompile.errors import OutputError, RecipeError
from qcompile.graph import io
from qcompile.graph.digest import digest
from qcompile.graph.publish import check_apart, check_writable
from qcompile.opened import Opened, open_model, versions
from qcompile.prepare import PASSES
from qcompile.progress import Progress, Silent
from qcompile.recipe import Recipe
from qcompile.run.session import Feed
from qcompile.solve.needs import everything, notes_on, unobserved
from qcompile.workshop import Workshop

KEPT_BYTES = 32 << 20  # of samples that go into the file, for each of their two purposes


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What `calibrate_model` made.

    Attributes:
        statistics: all of it.
        output: where it was written; None if nowhere.
        passes: how often the data was read for it; 0 if statistics were only merged.
        together: whether samples of the same shapes ran several at once.
        notes: sentences on what was guessed, left out or read more than once.
    """

    statistics: Statistics
    output: Path | None
    passes: int
    together: bool
    notes: tuple[str, ...]


def calibrate_model(
    model: str | Path | Any,
    data: str | Path | Iterable[Any] | None = None,
    *,
    output: str | Path | None = None,
    merged: Sequence[str | Path] = (),
    recipe: str | Path | Recipe | None = None,
    target: str | None = None,
    held_out: int | None = None,
    gram: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Statistics of a model's tensors over the samples of `data`, and those in the files `merged`.

    Args:
        model: path of an ONNX file, or a ModelProto, or an `ir.Model`; not changed.
        data: calibration samples: see `qcompile.calib.data.open_data`.
        output: receives the statistics; None: `MODEL.stats` beside a model given as a path, and nowhere for one
            in memory.
        merged: files of statistics of other samples of the same model, which come first.
        recipe: how data is read, threads, memory, and whether bad samples are left out.
        target: name or file; its plan decides which tensors are worth observing.
        held_out: samples that are kept out of the statistics, to judge results on, and stored with them as far as
            they fit; None: every fifth, 24 at most; 0: all samples calibrate, and none is stored.
        gram: gather X'X of what weights are multiplied with, for GPTQ: channels squared numbers each.
        force: merge although models, versions or data do not fit.
        progress: shows the stages; None: silent.

    Raises:
        ModelError: the model cannot be read or run.
        DataError: the data does not fit the model or is bad, files cannot be merged.
        RecipeError: an option is wrong, or there is neither data nor anything to merge.
        OutputError: the statistics cannot be written.
    """
    if data is None and not merged:
        raise RecipeError(
            "there is nothing to gather: give samples with --data, or files with --merge."
        )
    place = _place(model, output, data, merged)
    show = progress or Silent()
    parts = [(str(path), store.load(Path(path))) for path in merged]
    notes: tuple[str, ...] = ()
    passes, together = 0, False
    forced = _check_parts(model, parts, force=force) if parts else ()
    if data is not None:
        opened = open_model(model, data, recipe, target, show, held_out=held_out)
        made, passes, together, notes = _gather(opened, show, gram=gram)
        parts.append(("the data", made))
    found = merge(parts, force=force) if len(parts) > 1 else parts[0][1]
    found = dataclasses.replace(found, forced=tuple(dict.fromkeys((*found.forced, *forced))))
    if place is not None:
        store.save(found, place)
    return Calibration(found, place, passes, together, (*notes, *found.forced))


def _place(
    model: Any, output: str | Path | None, data: Any, merged: Sequence[str | Path]
) -> Path | None:
    path = Path(model) if isinstance(model, str | Path) else None
    if output is None and path is None:
        return None
    if path is not None and not path.is_file():
        io.load(path)  # says what is wrong with it
    place = Path(output) if output is not None else Path(str(path)).with_suffix(SUFFIX)
    inputs = {"the model": path, "the data": Path(data) if isinstance(data, str | Path) else None}
    inputs |= {f"{file}, which is merged,": Path(file) for file in merged}
    check_apart(place, inputs)
    if path is not None:
        io.check_outside(place, path)
    check_writable(place)
    if place.exists() and not store.is_statistics(place):
        raise OutputError(
            f"{place} exists and holds no statistics: choose another file with -o, or remove it."
        )
    return place


def _check_parts(
    model: Any, parts: Sequence[tuple[str, Statistics]], *, force: bool
) -> tuple[str, ...]:
    title = Path(model).name if isinstance(model, str | Path) else "the model given"
    own = digest(io.load(model))
    sentences = [s for name, part in parts for s in check_model(part, name, own, title)]
    sentences += [s for name, part in parts for s in check_versions(part, name, versions())]
    return settle(sentences, force=force)


def _gather(
    opened: Opened, show: Progress, *, gram: bool
) -> tuple[Statistics, int, bool, tuple[str, ...]]:
    """Statistics of the opened model over its samples."""
    samples = opened.samples
    assert isinstance(samples, Samples)
    shop = Workshop(
        opened.prepared,
        opened.target,
        opened.facts,
        opened.recipe,
        samples,
        opened.reference(),
        show,
    )
    coding = shop.coding(shop.widest(opened.request()))
    steps = (*PASSES, BoundMasks(opened.facts))  # the others need no more than what is coded
    needs = everything(opened.prepared, coding, opened.facts, steps, gram=gram)
    found = shop.observe(needs) if needs else Observed({}, samples.calibration_count, 0)
    nothing = (
        () if needs else ("Nothing could be observed: the main graph has no node with weights.",)
    )
    held = _fitting(samples.held_out(), samples.held_out_count)
    title = opened.path.name if opened.path is not None else "a model in memory"
    shard = Shard(samples.description, samples.digest, found.samples, samples.manner)
    made = Statistics(
        key=Key(digest(opened.original), title, (shard,), versions()),
        tensors=found.tensors, samples=found.samples, skipped=len(found.bad),
        unobserved=unobserved(opened.prepared, needs),
        held=held, few=_fitting(samples.few(TUNING), TUNING) if held else (), shared=samples.shared,
    )  # fmt: skip
    notes = (*opened.notes, *nothing, *notes_on(found, opened.recipe.memory))
    return made, found.passes, found.together, notes


def _fitting(feeds: Iterable[Feed], most: int) -> list[Feed]:
    """The first feeds, one at least, that take no more than `KEPT_BYTES`."""
    kept: list[Feed] = []
    room = KEPT_BYTES
    for feed in itertools.islice(feeds, most):
        room -= sum(value.nbytes for value in feed.values())
        if kept and room < 0:
            break
        kept.append(feed)
    return kept
