"""Tries plans, range methods and formats, measures each, and keeps the best."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qcompile.build import Format
from qcompile.errors import ModelError
from qcompile.plan.make import Request
from qcompile.plan.plan import Form, Plan
from qcompile.run.session import Session
from qcompile.verify.latency import race, typical_feeds
from qcompile.workshop import Attempt, Workshop

if TYPE_CHECKING:
    from qcompile.compiler import Opened

logger = logging.getLogger(__name__)
_QUICK = 8  # held-out samples that choose between range methods


@dataclasses.dataclass
class History:
    """What was tried, and sentences about it for the report."""

    warnings: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def find_best(
    shop: Workshop, request: Request, draft: Plan, opened: Opened
) -> tuple[Attempt, History]:
    """The best attempt: accurate first, then fast."""
    history = History()
    form: Format = "qdq" if shop.recipe.format == "qdq" else "fused"
    best = _choose_ranges(shop, draft, form, history)
    best = _choose_format(shop, best, opened, history)
    return best, history


def _choose_ranges(shop: Workshop, plan: Plan, form: Format, history: History) -> Attempt:
    """The range method of least error on held-out samples."""
    methods = shop.methods if plan.of(Form.STATIC) else ("none",)
    attempts = []
    with shop.progress.stage("solving and checking", len(methods)) as step:
        for method in methods:
            attempt = shop.attempt(plan, method, form)
            shop.judge(attempt, _QUICK)
            attempts.append(attempt)
            step(1, None)
    best = min(attempts, key=lambda a: a.comparison.noise_to_signal if a.comparison else 0.0)
    if len(attempts) > 1:
        tried = ", ".join(
            f"{a.method} {a.comparison.worst_db:.1f} dB" for a in attempts if a.comparison
        )
        history.notes.append(
            f"Ranges: {tried} (worst output slice on held-out samples); {best.method} was taken."
        )
    return best


def _choose_format(shop: Workshop, best: Attempt, opened: Opened, history: History) -> Attempt:
    """The faster of the formats that the recipe allows, timed against the float model."""
    racers: dict[str, Attempt] = {best.form: best}
    if shop.recipe.format == "auto" and best.plan.quantizes:
        try:
            racers["qdq"] = shop.attempt(best.plan, best.method, "qdq")
        except ModelError as error:
            history.notes.append(f"The portable format was not taken: {error}")
    with shop.progress.stage("timing"):
        speeds = time_attempts(racers, opened, shop.recipe.bench_seconds)
    for name, attempt in racers.items():
        attempt.speedup = speeds[name]
    fastest = max(racers.values(), key=lambda a: a.speedup)
    # The portable form is worth a little time: every runtime reads it.
    chosen = fastest
    if len(racers) > 1:
        history.notes.append(
            "Formats: "
            + ", ".join(f"{n} {a.speedup:.2f}x" for n, a in racers.items())
            + f"; {chosen.form} was taken."
        )
    return chosen


def time_attempts(
    racers: Mapping[str, Attempt], opened: Opened, seconds: float
) -> dict[str, float]:
    """The least speed-up over float on the typical feeds, by racer."""
    sessions: dict[str, Session] = {"fp32": opened.session}
    sessions |= {name: attempt.session for name, attempt in racers.items()}
    feeds = typical_feeds(timing_feeds(opened))
    timings = [race(sessions, feed, seconds=seconds / len(feeds)) for _, feed in feeds]
    return {name: min(t.speedup[name] for t in timings) for name in racers}


def timing_feeds(opened: Opened) -> list:
    """Held-out feeds, or the stand-in where there is no data."""
    if opened.samples is None:
        return [opened.feed]
    return list(opened.samples.held_out())
