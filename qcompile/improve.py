"""Rewrites that data decides on: masks bounded, scales folded into neighbours, smoothed products, searched rounding.

Each is tried on the whole model and kept where it lowers the error on held-out samples: all places at once, then
halves of them (`qcompile.accept`). Masks are bounded for speed: these are kept where that does no harm.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from passes.absorb_bias import AbsorbBias
from passes.bound_masks import BoundMasks
from passes.scale_channels import ScaleChannels
from passes.smooth_linear import SmoothLinear
from qcompile.accept import accept, better, spare
from qcompile.algo.equalization import Array
from qcompile.errors import ModelError
from qcompile.opened import Opened
from qcompile.plan.candidates import Candidate
from qcompile.plan.make import Request
from qcompile.plan.plan import Form, Plan
from qcompile.run.probe import probe
from qcompile.solve.channels import channel_groups, channel_scales
from qcompile.solve.masks import find_masks
from qcompile.solve.reconstruction import reconstruct
from qcompile.solve.shifts import channel_shifts, shift_groups
from qcompile.solve.smoothing import solve_smoothing
from qcompile.step import Pass, run_pass
from qcompile.workshop import LARGE, Attempt, Workshop

logger = logging.getLogger(__name__)
_JUDGES = 24  # held-out samples that judge: all; of 8, divergence is chance
_TRIES = 12  # evaluations a kind
_FEEDS = 16  # calibration feeds that products are smoothed on
_ROUNDED = 64  # calibration feeds that codes of weights are searched on
_ROUNDING_TRIES = 4  # each layer was judged by itself
_WIDE = 8.0  # times the median scale: a channel worth a word
_HARM = -0.05  # of the noise, that an Add gained by a bounded mask may cost
_FREE_DB = 24.0  # above, a product is smoothed only where that costs no time


class Log(Protocol):
    """Where sentences for the report go."""

    notes: list[str]


def improve(
    shop: Workshop, request: Request, best: Attempt, opened: Opened, log: Log
) -> tuple[Workshop, Request, Attempt]:
    """The best attempt with all that helps, the working state that it belongs to, and what is asked for there."""
    recipe = shop.recipe
    if opened.samples is None or len(best.plan.of(Form.STATIC, Form.DYNAMIC)) > LARGE:
        return shop, request, best
    if recipe.masks and best.plan.of(Form.STATIC):
        shop, request, best = _bounded(shop, request, best, opened, log)
    if recipe.equalize and best.plan.of(Form.STATIC):
        shop, best = _equalized(shop, request, best, opened, log)
    if recipe.absorb and best.plan.of(Form.STATIC, Form.DYNAMIC):
        shop, best = _absorbed(shop, request, best, opened, log)
    if recipe.smooth and best.plan.of(Form.DYNAMIC):
        shop, best = _smoothed(shop, request, best, opened, log)
    if recipe.rounding and best.plan.of(Form.STATIC, Form.DYNAMIC):
        best = _rounded(shop, best, log)
    return shop, request, best


def _bounded(
    shop: Workshop, request: Request, best: Attempt, opened: Opened, log: Log
) -> tuple[Workshop, Request, Attempt]:
    """Masks of a size that codes can hold, where the Adds that they kept float then pay as integer ones."""
    why = {n: r for n, r in shop.unusable().items() if request.keep_float.get(n) == r}
    masks = [mask for mask in find_masks(shop.prepared, shop.facts) if why.keys() & mask.names]
    if not masks:
        return shop, request, best
    step = BoundMasks(shop.facts, shop.observed, [mask.name for mask in masks])
    with shop.progress.stage("trying: bounded masks"):
        try:
            changed, rescaled = _rewritten(shop, opened, step)
            if not rescaled:
                return shop, request, best
            changed.replace(changed.observe_again(rescaled))
            freed = why.keys() - changed.unusable().keys()
            keep = {n: r for n, r in request.keep_float.items() if n not in freed}
            wanted = dataclasses.replace(request, keep_float=keep)
            plan = changed.plan(wanted)
            gained = [e.node for e in plan.of(Form.STATIC) if e.node in freed]
            if not gained:
                return shop, request, best
            attempt = changed.attempt(plan, best.ranging, best.form)
        except ModelError as error:
            logger.warning("bounded masks: %s", error)
            return shop, request, best
    changed.judge(attempt, _JUDGES)
    if not better(attempt, best, _HARM):
        log.notes.append(
            f"{gained[0]} stays float: with its mask bounded and in 8 bits the result has {attempt.db:.1f} dB, not {best.db:.1f}."
        )
        return shop, request, best
    log.notes.append(
        f"{len(masks)} masks bounded, so that {len(gained)} more nodes are integer: {best.db:.1f} -> {attempt.db:.1f} dB."
    )
    return changed, wanted, attempt


def _rewritten(shop: Workshop, opened: Opened, step: Pass) -> tuple[Workshop, set[str]]:
    """The working state after a pass that keeps the float function, and the tensors that it rescaled."""
    prepared = shop.prepared.clone()
    outcome = run_pass(step, prepared)
    if not outcome.changed:
        return shop, set()
    return shop.variant(prepared, probe(prepared, opened.feed)), outcome.rescaled


def _equalized(
    shop: Workshop, request: Request, best: Attempt, opened: Opened, log: Log
) -> tuple[Workshop, Attempt]:
    """Scales of channels folded into the neighbouring weights."""
    groups, refused = channel_groups(shop.prepared, shop.facts)
    logger.info("channel scales: %d groups, %d refused", len(groups), len(refused))
    scales = channel_scales(shop.prepared, groups, shop.observed)
    if not scales:
        return shop, best

    def step(names: Sequence[str]) -> Pass:
        return ScaleChannels(shop.facts, {name: scales[name] for name in names})

    what = "channel scales folded into weights"
    return _keep(
        step,
        list(scales),
        shop,
        request,
        best,
        opened,
        log,
        what,
        lambda kept: _widest(scales, kept),
    )


def _widest(scales: Mapping[str, Array], kept: Sequence[str]) -> str:
    """A sentence on the channel that reaches furthest beyond the others of its tensor, if one does; else nothing."""
    ratios = {name: scales[name] / np.median(scales[name]) for name in kept}
    name = max(kept, key=lambda name: float(ratios[name].max()))
    channel = int(ratios[name].argmax())
    factor = float(ratios[name][channel])
    if factor < _WIDE:
        return ""
    return f" Channel {channel} of {name} reached furthest beyond the others of its tensor: it was brought down {factor:.0f}-fold."


def _absorbed(
    shop: Workshop, request: Request, best: Attempt, opened: Opened, log: Log
) -> tuple[Workshop, Attempt]:
    """High biases moved behind the activations."""
    groups, refused = shift_groups(shop.prepared, shop.facts)
    logger.info("high biases: %d groups, %d refused", len(groups), len(refused))
    shifts = channel_shifts(groups, shop.observed)
    if not shifts:
        return shop, best

    def step(names: Sequence[str]) -> Pass:
        return AbsorbBias(shop.facts, {name: shifts[name] for name in names})

    what = "high biases absorbed by the next layers"
    return _keep(step, list(shifts), shop, request, best, opened, log, what)


def _smoothed(
    shop: Workshop, request: Request, best: Attempt, opened: Opened, log: Log
) -> tuple[Workshop, Attempt]:
    """Scales of the inputs of products moved to their weights."""
    assert shop.samples is not None
    products = [e.node for e in best.plan.of(Form.DYNAMIC) if _is_product(shop, e.node)]
    with shop.progress.stage("smoothing"):
        found = solve_smoothing(
            shop.prepared, shop.facts, products, shop.samples.few(_FEEDS), shop.held_out(_JUDGES),
            weight=shop.target.weight, saturating=shop.target.saturating, threads=shop.recipe.threads,
        )  # fmt: skip
    if best.db >= _FREE_DB:
        found = {name: item for name, item in found.items() if item.fold}
    if not found:
        return shop, best

    def step(names: Sequence[str]) -> Pass:
        return SmoothLinear({name: found[name] for name in names})

    # a float share beside a product saves outliers, which no scale does
    worth = {
        n: (bool(s.keep), s.error_before / max(s.error_after, 1e-30)) for n, s in found.items()
    }
    costly = [name for name, item in found.items() if not item.fold]
    what = "inputs of products smoothed"
    return _keep(
        step,
        list(found),
        shop,
        request,
        best,
        opened,
        log,
        what,
        costly=costly,
        worth=worth.__getitem__,
    )


def _rounded(shop: Workshop, best: Attempt, log: Log) -> Attempt:
    """Codes of weights searched for the least error of the layers' outputs."""
    assert shop.samples is not None
    before = shop.solve(best.plan, best.ranging)
    means = {n: s.channels.mean() for n, s in shop.stats.items() if s.channels is not None}
    layers = len(best.plan.of(Form.STATIC, Form.DYNAMIC))
    with shop.progress.stage("searching how weights round", layers) as tick:
        weights, gains = reconstruct(
            shop.prepared, best.plan, shop.found, before.params, before.weights,
            shop.samples.few(_ROUNDED), shop.held_out(_JUDGES), shop.facts,
            means=means if shop.recipe.bias_correction else None, memory=shop.recipe.memory,
            threads=shop.recipe.threads, tick=lambda: tick(1, None),
        )  # fmt: skip
    names = [entry.node for entry in best.plan.nodes if entry.node in gains]

    def judge(chosen: Sequence[str]) -> Attempt:
        rounded = {**best.ranging.rounded, **{name: weights[name] for name in chosen}}
        ranging = dataclasses.replace(best.ranging, rounded=rounded)
        attempt = shop.attempt(best.plan, ranging, best.form)
        shop.judge(attempt, _JUDGES)
        return attempt

    found = accept(names, judge, best, most=_ROUNDING_TRIES)
    if found.kept:
        log.notes.append(
            f"Rounding of {len(found.kept)} of {len(names)} weights searched: "
            f"{best.db:.1f} -> {found.best.db:.1f} dB."
        )
    return found.best


def _keep(
    step: Callable[[Sequence[str]], Pass], names: Sequence[str], shop: Workshop, request: Request,
    best: Attempt, opened: Opened, log: Log, what: str, detail: Callable[[Sequence[str]], str] = lambda _: "",
    costly: Sequence[str] = (), worth: Callable[[str], Any] = len,
) -> tuple[Workshop, Attempt]:  # fmt: skip
    """What helps of the changes that `step` makes for names; what it rescales is observed once, for all of them.

    `detail` is a further sentence on what was kept. Of those that are `costly`, some of little `worth` may go again.
    """
    shops: dict[int, Workshop] = {}

    def judge(chosen: Sequence[str]) -> Attempt:
        changed, names_changed = _rewritten(shop, opened, step(chosen))
        changed.replace({name: stats for name, stats in known.items() if name in names_changed})
        attempt = changed.attempt(changed.plan(_same(request, best.plan)), best.ranging, best.form)
        changed.judge(attempt, _JUDGES)
        shops[id(attempt)] = changed
        tick(1, None)
        return attempt

    with shop.progress.stage(f"trying: {what}", _TRIES) as tick:
        try:
            whole, rescaled = _rewritten(shop, opened, step(names))
            known = whole.observe_again(rescaled)
            found = accept(names, judge, best, most=_TRIES)
            spare(found, judge, costly, worth)
        except ModelError as error:
            logger.warning("%s: %s", what, error)
            return shop, best
    if not found.kept:
        return shop, best
    log.notes.append(
        f"{len(found.kept)} of {len(names)} {what}: {best.db:.1f} -> {found.best.db:.1f} dB."
        + detail(found.kept)
    )
    return shops[id(found.best)], found.best


def _same(request: Request, plan: Plan) -> Request:
    """The request for the forms of a plan: what helps is judged with all else as it was."""
    forms = {e.node: Form.STATIC if e.form is Form.FREE else e.form for e in plan.nodes}
    chosen = (Form.STATIC, Form.DYNAMIC, Form.WEIGHT, Form.FLOAT)
    reasons = {e.node: e.why for e in plan.of(Form.FLOAT)}
    return dataclasses.replace(
        request, forms={**{n: f for n, f in forms.items() if f in chosen}, **request.forms},
        reasons={**reasons, **request.reasons},
    )  # fmt: skip


def _is_product(shop: Workshop, name: str) -> bool:
    """Whether a node is a product that can be smoothed without a second copy of its weight.

    A weight that products of other inputs read, or that is looked up as well, would be stored once for each scale.
    """
    item = shop.found.get(name)
    if not isinstance(item, Candidate) or item.role != "dynamic":
        return False
    weight, x = item.node.inputs[1], item.node.inputs[0]
    return weight is not None and all(
        use.idx == 1 and use.node.inputs[0] is x for use in weight.uses()
    )
