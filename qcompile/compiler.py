"""The driver: prepare, plan, calibrate, solve, build, verify. Each step on its own line."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile import finish, search
from qcompile.calib.data import Data, open_data
from qcompile.calib.split import Samples
from qcompile.graph import io
from qcompile.graph.edit import nodes
from qcompile.inputs import MADE_UP, check_compilable, input_specs, running, stand_in
from qcompile.keep import fixed_forms, match_patterns, unmet
from qcompile.plan.make import Request
from qcompile.plan.plan import Form, Plan
from qcompile.prepare import prepare
from qcompile.progress import Progress, Silent
from qcompile.recipe import Recipe, load_recipe
from qcompile.report import Result, check_folder
from qcompile.run.probe import Fact, probe
from qcompile.run.session import Feed, Options, Session
from qcompile.targets.schema import Target, load_target
from qcompile.verify.compare import Reference
from qcompile.verify.slices import parts_of
from qcompile.workshop import Workshop


@dataclasses.dataclass
class Opened:
    """A model and its data, ready to be planned."""

    path: Path | None
    original: ir.Model
    session: Session
    prepared: ir.Model
    target: Target
    recipe: Recipe
    samples: Samples | None
    feed: Feed
    facts: Mapping[str, Fact]
    notes: list[str]
    data: str = ""  # how the samples were named on the command line

    def request(self, forms: Plan | None = None) -> Request:
        """What the recipe and an edited plan ask for.

        Raises:
            RecipeError: a pattern matches nothing, or the plan names unknown nodes.
        """
        keep = match_patterns(self.prepared, self.recipe.keep_float, self.original)
        self.notes.extend(keep.notes)
        why = dict(keep.why)
        if self.recipe.format == "qdq":
            no_lstm = "ONNX has no integer LSTM: use --format fused or auto"
            why |= {n.name or "": no_lstm for n in nodes(self.prepared) if n.op_type == "LSTM"}
        fixed = {} if forms is None else fixed_forms(forms, self.prepared)
        return Request(
            calibrated=self.samples is not None, static=self.recipe.static,
            keep_float=why, forms=fixed, dynamic=self.recipe.dynamic,
        )  # fmt: skip


def open_model(
    model: str | Path | ir.Model | Any, data: str | Path | Iterable[Any] | None = None,
    recipe: str | Path | Recipe | None = None, target: str | None = None,
    progress: Progress | None = None,
) -> Opened:  # fmt: skip
    """Everything that needs no plan: the float session, the prepared graph, types and shapes.

    Raises:
        ModelError, DataError, RecipeError: as `compile_model`.
    """
    chosen = load_recipe(recipe)
    aim = load_target(target or chosen.target)
    show = progress or Silent()
    with show.stage("loading"):
        original = io.load(model)
        check_compilable(original)
        session = Session(_source(model, original), Options("all", threads=chosen.threads))
        specs = input_specs(session, original)
    notes: list[str] = []
    samples = None
    if data is not None:
        source: Data = open_data(data, specs, chosen.data, normalizes=_normalizes(original))
        samples, notes = Samples(source), list(source.notes)
    with show.stage("preparing"):
        prepared, _ = prepare(original.clone())
        feed = stand_in(specs) if samples is None else samples.first()
        with running(MADE_UP if samples is None else "the first sample of the calibration data"):
            facts = probe(prepared, feed)
    if not aim.fits_here():
        notes.append(f"{aim.name} is not this machine: the times are those of this one.")
    path = Path(model) if isinstance(model, str | Path) else None
    named = str(data) if isinstance(data, str | Path) else ""
    return Opened(
        path, original, session, prepared, aim, chosen, samples, feed, facts, notes, named
    )


def compile_model(
    model: str | Path | ir.Model | Any,
    data: str | Path | Iterable[Any] | None = None,
    *,
    output: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    target: str | None = None,
    plan: Plan | None = None,
    report: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """A verified quantized model at `output`, and what is to be known of it.

    Args:
        model: path of an ONNX file, or a ModelProto, or an `ir.Model`; not changed.
        data: calibration samples: see `qcompile.calib.data.open_data`. None: dynamic forms only.
        output: where the result goes; None: `MODEL.int8.onnx` beside a model given as a path, and
            nowhere for one in memory (the `Result` then has no `output`).
        recipe: a `Recipe`, the name of a built-in one, or a TOML file.
        target: name or file; overrides the recipe's.
        plan: an edited plan that fixes the forms of its nodes.
        report: folder that receives `report.json`, `report.md` and `plan.json`.
        progress: shows the stages; None: silent.

    Raises:
        ModelError: the model cannot be read, run or compiled.
        DataError: the data does not fit the model, or holds NaN or infinities.
        RecipeError: an option, plan or target is wrong.
        OutputError: the result cannot be written.
    """
    start = time.perf_counter()
    show = progress or Silent()
    place = finish.output_path(model, output)
    if report is not None:
        check_folder(Path(report))
    opened = open_model(model, data, recipe, target, show)
    request = opened.request(plan)
    shop = Workshop(
        opened.prepared,
        opened.target,
        opened.facts,
        opened.recipe,
        opened.samples,
        _reference(opened),
        show,
    )
    # Ranges are gathered for more nodes than seem to pay: measured times may turn out in their favour.
    widest = shop.plan(dataclasses.replace(request, gain=6.0, border=0.2))
    if widest.of(Form.STATIC, Form.FREE):
        shop.calibrate(widest)
        request = dataclasses.replace(request, keep_float={**shop.unusable(), **request.keep_float})
    calibrated = frozenset(entry.node for entry in widest.of(Form.STATIC, Form.FREE))
    request = dataclasses.replace(request, only=calibrated)
    draft = shop.plan(request)
    opened.notes.extend(unmet(request.forms, draft))
    best, history = search.find_best(shop, request, draft, opened)
    return finish.finish(opened, shop, best, history, place, report, start, show)


def _source(model: Any, original: ir.Model) -> ir.Model | Path:
    return Path(model) if isinstance(model, str | Path) else original


def _reference(opened: Opened) -> Reference:
    parts = {
        value.name or "": parts_of(value, opened.facts) for value in opened.prepared.graph.outputs
    }
    samples = opened.samples
    if samples is None:
        return Reference(opened.session, lambda: iter([opened.feed]), parts)
    numbers = samples.held_out_numbers

    def where(number: int) -> str:
        return f"sample {numbers[number]} of the calibration data"

    return Reference(opened.session, samples.held_out, parts, where)


def _normalizes(model: ir.Model) -> bool:
    """Whether the graph scales its input itself: its first operators are Sub, Div, Mul or BatchNormalization."""
    first = [use.node for value in model.graph.inputs for use in value.uses()]
    return bool(first) and all(
        node.op_type in ("Sub", "Div", "Mul", "BatchNormalization", "Cast", "InstanceNormalization")
        for node in first
    )
