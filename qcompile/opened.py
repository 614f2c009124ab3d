"""A model and its data, opened: what every command starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.calib import store
from qcompile.calib.data import Data, open_data
from qcompile.calib.split import Judges, Samples
from qcompile.calib.statistics import Statistics, check_data, check_model, check_versions, settle
from qcompile.graph import io
from qcompile.graph.digest import digest
from qcompile.graph.edit import nodes
from qcompile.graph.kv_cache import find_caches
from qcompile.graph.skeleton import SHARED_BYTES, release
from qcompile.inputs import MADE_UP, check_compilable, input_specs, running, stand_in
from qcompile.keep import fixed_forms, match_patterns
from qcompile.plan.make import Request
from qcompile.plan.plan import Form, Plan
from qcompile.prepare import prepare_for
from qcompile.progress import Progress, Silent
from qcompile.recipe import Recipe, load_recipe
from qcompile.run.probe import Fact
from qcompile.run.session import Feed, Options, Session, version
from qcompile.targets.schema import Target, load_target
from qcompile.verify.compare import Reference
from qcompile.verify.slices import parts_of
from qcompile.version import __version__

FEW = 4  # samples that judge a result: with less than that, a warning says so


@dataclasses.dataclass
class Opened:
    """A model and its data, ready to be planned."""

    path: Path | None
    original: ir.Model
    session: Session
    prepared: ir.Model
    target: Target
    recipe: Recipe
    samples: Judges | None
    feed: Feed
    facts: Mapping[str, Fact]
    notes: list[str]
    data: str = ""  # how the samples were named on the command line
    statistics: Statistics | None = None  # gathered before

    @property
    def guessed(self) -> bool:
        """Whether the preprocessing of images was guessed."""
        return any("guessed" in note for note in self.notes)

    def few_judges(self) -> list[str]:
        """A sentence, if there is data and so little is held out that it promises nothing of other inputs."""
        if self.samples is None or self.samples.shared or self.samples.held_out_count >= FEW:
            return []
        count = self.samples.held_out_count
        held = "1 sample was" if count == 1 else f"{count} samples were"
        return [
            f"Only {held} held out to judge the result, which says little of other inputs: give {5 * FEW} samples and more "
            f"with --data, of which {FEW} and more judge."
        ]

    def request(self, forms: Plan | None = None) -> Request:
        """What the recipe and an edited plan ask for.

        Raises:
            RecipeError: a pattern matches nothing, or the plan names unknown nodes.
        """
        keep = match_patterns(self.prepared, self.recipe.keep_float, self.original)
        self.notes.extend(keep.notes)
        why = dict(keep.why)
        if self.recipe.kv_cache is not None:
            stays = "--kv-cache stores what it makes"
            why |= {cache.node.name or "": stays for cache in find_caches(self.prepared)[0]}
        if self.recipe.format == "qdq":
            no_lstm = "ONNX has no integer LSTM: use --format fused or auto"
            why |= {n.name or "": no_lstm for n in nodes(self.prepared) if n.op_type == "LSTM"}
        fixed = {} if forms is None else fixed_forms(forms, self.prepared)
        if self.recipe.format == "qdq":
            fixed = self._portable(fixed)
        return Request(
            calibrated=self.samples is not None, static=self.recipe.static,
            keep_float=why, forms=fixed, dynamic=self.recipe.dynamic, clock=self.recipe.timing,
        )  # fmt: skip

    def _portable(self, forms: Mapping[str, Form]) -> dict[str, Form]:
        """Products of a plan are dynamic in place of having an 8-bit weight alone, which a note says."""
        products = {n.name for n in nodes(self.prepared) if n.op_type in ("MatMul", "Gemm")}
        alone = [n for n, form in forms.items() if form is Form.WEIGHT and n in products]
        self.notes.extend(
            f"{name} is dynamic, not weight as in the plan: the portable format has no such product; use --format fused or auto."
            for name in alone
        )
        return {**forms, **dict.fromkeys(alone, Form.DYNAMIC)}

    def reference(self) -> Reference:
        """The float model on the held-out samples, or on the stand-in where there is no data."""
        parts = {
            value.name or "": parts_of(value, self.facts) for value in self.prepared.graph.outputs
        }
        samples = self.samples
        if samples is None:
            return Reference(self.session, lambda: iter([self.feed]), parts)
        numbers = samples.held_out_numbers

        def where(number: int) -> str:
            return f"sample {numbers[number]} of the calibration data"

        return Reference(self.session, samples.held_out, parts, where)


def open_model(
    model: str | Path | ir.Model | Any, data: str | Path | Iterable[Any] | None = None,
    recipe: str | Path | Recipe | None = None, target: str | None = None,
    progress: Progress | None = None, *, stats: str | Path | None = None, force: bool = False,
    held_out: int | None = None,
) -> Opened:  # fmt: skip
    """Everything that needs no plan: the float session, the prepared graph, types and shapes.

    At most `held_out` samples are held out, if it is given; all else is as for `compile_model`.

    Raises:
        ModelError, DataError, RecipeError: as `compile_model`.
    """
    chosen = load_recipe(recipe)
    aim = load_target(target or chosen.target)
    show = progress or Silent()
    with show.stage("loading"):
        original = io.load(model, mapped=_is_large(model))
        check_compilable(original)
        release(original)
        options = Options("all", threads=chosen.threads, shared=True)
        title = str(model) if isinstance(model, str | Path) else "the model"
        session = Session(_source(model, original), options, title)
        specs = input_specs(session, original)
    notes: list[str] = []
    samples: Judges | None = None
    if data is not None:
        source: Data = open_data(
            data, specs, chosen.data, normalizes=_normalizes(original), finite=not chosen.skip_bad
        )
        samples, notes = Samples(source, held_out), list(source.notes)
    statistics = None
    if stats is not None:
        statistics, samples = _statistics(Path(stats), model, original, samples, force=force)
        if (
            isinstance(samples, Samples)
            and not statistics.held
            and samples.digest in {shard.digest for shard in statistics.key.shards}
        ):
            notes.append(
                f"{stats} was gathered with --held-out 0: samples of its own data both calibrate and judge."
            )
    with show.stage("preparing"):
        feed = stand_in(specs) if samples is None else samples.first()
        with running(MADE_UP if samples is None else "the first sample of the calibration data"):
            tied = chosen.bits is not None or chosen.keeps_weights
            prepared = prepare_for(feed, original, session, tied=tied)
        notes.extend(prepared.notes)
    if not aim.fits_here():
        notes.append(f"{aim.name} is not this machine: the times are those of this one.")
    path = Path(model) if isinstance(model, str | Path) else None
    named = str(data) if isinstance(data, str | Path) else ""
    return Opened(
        path,
        original,
        session,
        prepared.model,
        aim,
        chosen,
        samples,
        feed,
        prepared.facts,
        notes,
        named,
        statistics,
    )


def versions() -> dict[str, str]:
    """What prepares and runs the model: with other versions tensors may have other names or values."""
    return {"qcompile": __version__, "onnxruntime": version()}


def _statistics(
    path: Path, model: Any, original: ir.Model, samples: Judges | None, *, force: bool
) -> tuple[Statistics, Judges]:
    """Statistics that fit the model and the data, if there is some; and the samples that judge."""
    found = store.load(path)
    title = Path(model).name if isinstance(model, str | Path) else "the model given"
    mismatches = [
        *check_model(found, str(path), digest(original), title),
        *check_versions(found, str(path), versions()),
    ]
    if isinstance(samples, Samples) and found.held:  # without any, other data is what should judge
        mismatches += check_data(found, str(path), samples.digest, samples.description)
    forced = (*found.forced, *settle(mismatches, force=force))
    found = dataclasses.replace(found, forced=forced)
    return found, found.judges() if samples is None else samples


def _is_large(model: Any) -> bool:
    """Whether weights stay in the file, where ORT and we read the same bytes."""
    path = Path(model) if isinstance(model, str | Path) else None
    return path is not None and path.is_file() and path.stat().st_size >= SHARED_BYTES


def _source(model: Any, original: ir.Model) -> ir.Model | Path:
    if _is_large(model) or not isinstance(model, str | Path):
        return original
    return Path(model)


def _normalizes(model: ir.Model) -> bool:
    """Whether the graph scales its input itself: its first operators are Sub, Div, Mul or BatchNormalization."""
    first = [use.node for value in model.graph.inputs for use in value.uses()]
    return bool(first) and all(
        node.op_type in ("Sub", "Div", "Mul", "BatchNormalization", "Cast", "InstanceNormalization")
        for node in first
    )
