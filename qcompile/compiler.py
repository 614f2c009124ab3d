"""The driver: prepare, plan, calibrate, solve, build, verify. Each step on its own line."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile import finish, search
from qcompile.errors import DataError, RecipeError
from qcompile.fewbits.compile import compile_weights
from qcompile.fewbits.large import compile_large, is_large
from qcompile.keep import unmet
from qcompile.kv import quantizable
from qcompile.opened import Opened, open_model
from qcompile.plan.make import Request
from qcompile.plan.plan import Form, Plan
from qcompile.progress import Progress, Silent
from qcompile.recipe import Recipe, load_recipe
from qcompile.report import Result, check_folder
from qcompile.verify.metric import load_metric, scored
from qcompile.workshop import Workshop


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
    stats: str | Path | None = None,
    force: bool = False,
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
        stats: statistics of `qcompile calibrate`, in place of `data`; with both, the data judges the result.
        force: use the statistics even if they are of another model, other data or other versions.

    Raises:
        ModelError: the model cannot be read, run or compiled.
        DataError: the data does not fit the model, or holds NaN or infinities.
        RecipeError: an option, plan or target is wrong.
        OutputError: the result cannot be written.
    """
    start = time.perf_counter()
    show = progress or Silent()
    read = {
        "the calibration data": data, "the recipe": recipe, "the target": target,
        "the statistics": stats,
    }  # fmt: skip
    paths = {kind: Path(v) for kind, v in read.items() if isinstance(v, str | Path)}
    tokenizer = recipe.data.tokenizer if isinstance(recipe, Recipe) else None
    chosen = load_recipe(recipe)
    label = f"int{chosen.bits or 8}" if not chosen.keeps_weights else f"kv-{chosen.kv_cache}"
    place = finish.output_path(model, output, {**paths, "the tokenizer": tokenizer}, label)
    if report is not None:
        check_folder(Path(report))
    if chosen.bits is not None and (plan is not None or stats is not None):
        raise RecipeError(
            "plans and statistics are for 8-bit activations: leave them out with weights of few bits."
        )
    if chosen.keeps_weights and (plan is not None or stats is not None):
        raise RecipeError(
            "plans and statistics are for 8-bit activations, and the recipe leaves all but caches float: leave them out."
        )
    if chosen.kv_cache is not None and data is None and stats is None:
        raise DataError(
            f"--kv-cache {chosen.kv_cache} takes its scales from samples: give texts with --data."
        )
    if (
        chosen.bits is not None
        and place is not None
        and isinstance(model, str | Path)
        and is_large(model)
    ):
        return compile_large(Path(model), place, chosen, report, start, show, data=data is not None)
    metric = None
    if chosen.metric is not None:
        metric = load_metric(chosen.metric, lower_is_better=chosen.lower_is_better)
    opened = open_model(model, data, chosen, target, show, stats=stats, force=force)
    if chosen.kv_cache is not None:
        quantizable(opened.prepared, chosen.kv_cache)  # or says why, before any work is done
    if metric is not None:
        with show.stage("scoring the float model"):
            metric = scored(metric, opened.session)
    if chosen.bits is not None or chosen.keeps_weights:
        return compile_weights(opened, place, report, start, show)
    shop, request, draft = begin(opened, plan, show)
    shop, best, history = search.find_best(shop, request, draft, opened, metric)
    return finish.finish(opened, shop, best, history, place, report, start, show)


def begin(opened: Opened, plan: Plan | None, show: Progress) -> tuple[Workshop, Request, Plan]:
    """The calibrated working state, what is asked for, and the fastest plan, before anything is tried.

    Args:
        opened: the model and its data.
        plan: an edited plan that fixes the forms of its nodes.
        show: shows the stages.

    Raises:
        DataError, RecipeError: as `compile_model`.
    """
    request = opened.request(plan)
    shop = Workshop(
        opened.prepared,
        opened.target,
        opened.facts,
        opened.recipe,
        opened.samples,
        opened.reference(),
        show,
        opened.statistics,
    )
    widest = shop.widest(request)
    if widest.of(Form.STATIC, Form.FREE):
        opened.notes.extend(shop.calibrate(widest))
        request = dataclasses.replace(request, keep_float={**shop.unusable(), **request.keep_float})
    elif opened.recipe.skip_bad:
        opened.notes.extend(shop.drop_bad())
    if opened.samples is not None and not opened.samples.held_out_count:
        raise DataError("every held-out sample is bad: give more samples with --data.")
    calibrated = frozenset(entry.node for entry in widest.of(Form.STATIC, Form.FREE))
    request = dataclasses.replace(request, only=calibrated)
    request = shop.timed(request)
    draft = shop.plan(request)
    opened.notes.extend(unmet(request.forms, draft))
    return shop, request, draft
