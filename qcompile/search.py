"""Tries plans, range methods and formats, measures each, and keeps the best."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from qcompile import faster, frontier, tune
from qcompile.budget import Budget, Point
from qcompile.build import Format
from qcompile.errors import ModelError
from qcompile.improve import improve
from qcompile.opened import Opened
from qcompile.plan.cost import expected_ms
from qcompile.plan.make import Request
from qcompile.plan.plan import Form, Plan
from qcompile.referee import Referee
from qcompile.run.profile import profile
from qcompile.run.session import Feed, Session
from qcompile.verify.latency import race, typical_feeds
from qcompile.verify.metric import Metric
from qcompile.workshop import LARGE, Attempt, Ranging, Workshop

logger = logging.getLogger(__name__)
_JUDGES = 24  # held-out samples that choose: all; of 8, divergence is chance
_FINE_DB = 45.0  # no tuning above this
_WORTH_IT = 1.2  # speed-up that leaving nodes float for accuracy must not go below
_STILL = 0.96  # share of a speed-up below that which accuracy may still cost
_LEAST = 1.03
_WORTH_DB = 1.0  # short of the goal, nodes are left float only for this much
_SECONDS = 15.0  # that plans of less noise may be searched for
_DIFFER = 0.01  # of the decisions on held-out samples, may differ from the float model's
_FEW = 1  # of them: so few tell nothing
_FAST = 1.4  # below, measured costs may find a better plan
_ROUNDS = 3  # of planning again with measured costs


@dataclasses.dataclass
class History:
    """What was tried, for the report.

    Attributes:
        warnings, notes: sentences.
        points: what was measured against limits; the last one is the result.
        budget: the limits; None if the recipe has none.
        blame: a sentence on the sites that add most of the noise, or nothing.
    """

    warnings: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    points: list[Point] = dataclasses.field(default_factory=list)
    budget: Budget | None = None
    blame: str = ""


def find_best(
    shop: Workshop, request: Request, draft: Plan, opened: Opened, metric: Metric | None = None
) -> tuple[Workshop, Attempt, History]:
    """The best attempt, and the working state that it was made in.

    It is accurate first, then fast; with limits it is the fastest (or smallest) one within them.
    """
    history, recipe = History(), shop.recipe
    form: Format = "qdq" if recipe.format == "qdq" else "fused"
    best = choose_ranges(shop, draft, form, history)
    shop, request, best = improve(shop, request, best, opened, history)
    found = None
    goal = recipe.min_sqnr or recipe.sqnr_goal
    small = len(best.plan.of(Form.STATIC)) <= LARGE
    if opened.samples is not None and (best.db < (_FINE_DB if small else goal) or recipe.limited):
        found = tune.sensitivity(shop, best.plan, best.ranging, best)
    if found is not None and best.plan.of(Form.STATIC) and len(shop.methods) > 1:
        best = _tune(shop, best, found, history)
    best.speedup = _speed(shop, best, opened)
    best = _faster(shop, request, best, opened, history)
    if recipe.limited:
        referee = Referee(opened, metric)
        frontier.within(shop, request, best, None if found is None else found.noise, referee)
        assert referee.best is not None
        history.blame = frontier.blame(None if found is None else found.noise)
        if referee.best.attempt is not best and history.blame:
            history.notes.append(f"The fastest plan was not taken. {history.blame}")
        best = _choose_format(shop, referee.best.attempt, opened, history)
        history.points, history.budget = referee.points, referee.budget
        doubt = referee.budget.doubt(referee.measure(shop, best, "the result"))
        history.warnings += [doubt] if doubt else []
    else:
        if found is not None and goal and not met(best, goal):
            best = _more_accurate(shop, request, best, found, goal, opened, history)
        best = _choose_format(shop, best, opened, history)
    return shop, best, history


def choose_ranges(shop: Workshop, plan: Plan, form: Format, history: History) -> Attempt:
    """The range method of least error on held-out samples."""
    methods = shop.methods if plan.of(Form.STATIC, Form.FREE) else ("none",)
    attempts = []
    with shop.progress.stage("solving and checking", len(methods)) as step:
        for method in methods:
            attempt = shop.attempt(plan, Ranging(method), form)
            shop.judge(attempt, _JUDGES)
            attempts.append(attempt)
            step(1, None)
        if len(attempts) > 1:  # and a mixture of all methods
            general = min(attempts, key=lambda a: a.noise).ranging.method
            mixed = Ranging(general, tune.local_ranges(shop, plan))
            attempts.append(shop.attempt(plan, mixed, form))
            shop.judge(attempts[-1], _JUDGES)
    best = min(attempts, key=lambda a: a.noise)
    if 0 < len(plan.of(Form.STATIC)) <= LARGE and shop.recipe.bias_correction:
        best = _shifted(shop, best)
    if len(attempts) > 1:
        tried = ", ".join(
            f"{'by tensor' if a.ranging.single else a.ranging.method} {a.db:.1f} dB"
            for a in attempts
        )
        history.notes.append(f"Ranges on held-out samples, worst output slice: {tried}.")
    return best


def _shifted(shop: Workshop, best: Attempt) -> Attempt:
    """The same with biases corrected for the inputs' error as well, if that is better."""
    attempt = shop.attempt(best.plan, dataclasses.replace(best.ranging, shift=True), best.form)
    shop.judge(attempt, _JUDGES)
    return attempt if attempt.noise < best.noise else best


def _tune(shop: Workshop, best: Attempt, found: tune.Sensitivity, history: History) -> Attempt:
    """Single tensors get another range where that lowers the error of the outputs; kept if it does."""
    single = tune.tune_ranges(shop, best, found)
    if not single:
        return best
    ranging = Ranging(best.ranging.method, {**best.ranging.single, **single})
    attempt = shop.attempt(best.plan, ranging, best.form)
    shop.judge(attempt, _JUDGES)
    if shop.recipe.bias_correction:
        attempt = _shifted(shop, attempt)
    if attempt.noise >= best.noise:
        return best
    history.notes.append(
        f"{len(single)} tensors have a range of their own: {best.db:.1f} -> {attempt.db:.1f} dB."
    )
    return attempt


def _faster(
    shop: Workshop, request: Request, best: Attempt, opened: Opened, history: History
) -> Attempt:
    """Plans again with measured costs while that pays, if the result gains less than the plan promised."""
    static = len(best.plan.of(Form.STATIC))
    if not static or not shop.recipe.timing or best.speedup >= (_FAST if static <= LARGE else 1.0):
        return best
    rounds = _ROUNDS if static <= LARGE else 1
    feed = _middle(opened)
    with shop.progress.stage("finding what is slow", rounds) as step:
        floats = profile(shop.prepared, feed, threads=shop.recipe.threads)
        current, wanted = best, request
        for _ in range(rounds):
            wanted = faster.measured_request(shop, wanted, current, feed, floats)
            plan = faster.plan_again(shop, wanted, current)
            step(1, None)
            if plan is None:
                break
            current = shop.attempt(plan, best.ranging, best.form)
            current.speedup = _speed(shop, current, opened)
            logger.info("planned again: %.2fx", current.speedup)
            if current.speedup > best.speedup:
                shop.judge(current, _JUDGES)
                goal = shop.recipe.min_sqnr or shop.recipe.sqnr_goal
                if current.db < min(goal, best.db - _WORTH_DB):
                    history.notes.append(
                        f"A faster plan had {current.db:.1f} dB and was not taken."
                    )
                    break
                history.notes.append(
                    f"Planned again with measured costs: {best.speedup:.2f}x -> {current.speedup:.2f}x."
                )
                best = current
    return best


def _more_accurate(
    shop: Workshop, request: Request, best: Attempt, found: tune.Sensitivity, goal: float,
    opened: Opened, history: History,
) -> Attempt:  # fmt: skip
    """Leaves the most harmful nodes float until the goal is met, as long as the result stays fast.

    The goal is a limit as any other, and the search the same; what breaks it is taken all the same if it is worth it.
    """
    assert best.comparison is not None
    enough = min(_WORTH_IT, max(_STILL * best.speedup, _LEAST))
    differ = max(_DIFFER, _FEW / max(best.comparison.decisions, 1))
    limits = Budget(max_drop=differ, min_sqnr=goal, min_speedup=enough)
    referee = Referee(opened, seconds=_SECONDS, samples=_JUDGES, limits=limits)
    frontier.within(shop, request, best, found.noise, referee)
    assert referee.best is not None
    new = referee.best.attempt
    worth = met(new, goal) or new.db >= best.db + _WORTH_DB
    if new is best or new.speedup < enough or not worth:
        return best
    more = len(new.plan.of(Form.FLOAT)) - len(best.plan.of(Form.FLOAT))
    history.notes.append(
        f"{more} nodes more left float for accuracy: {best.db:.1f} -> {new.db:.1f} dB, "
        f"{best.speedup:.2f}x -> {new.speedup:.2f}x (--sqnr-goal 0 turns this off)."
    )
    return new


def met(attempt: Attempt, goal: float) -> bool:
    """Whether an attempt has so many decibels, and nearly all decisions are those of the float model."""
    comparison = attempt.comparison
    assert comparison is not None
    allowed = max(_FEW, int(_DIFFER * comparison.decisions))
    return comparison.worst_db >= goal and comparison.differing <= allowed


def _choose_format(shop: Workshop, best: Attempt, opened: Opened, history: History) -> Attempt:
    """The faster of the formats that the recipe allows, timed against the float model; without timing, the one it has."""
    if not shop.recipe.timing:
        history.notes.append(
            f"The costs of {shop.target.name} decided, and no time that was measured here."
        )
        return best
    racers: dict[str, Attempt] = {best.form: best}
    both = shop.recipe.format == "auto" and len(best.plan.of(Form.STATIC)) <= LARGE
    if both and best.plan.quantizes and not shop.only_fused(best.plan):
        try:
            racers["qdq"] = shop.attempt(best.plan, best.ranging, "qdq")
        except ModelError as error:
            history.notes.append(f"The portable format was not taken: {error}")
    with shop.progress.stage("timing"):
        speeds = time_attempts(racers, opened, shop.recipe.bench_seconds)
    for name, attempt in racers.items():
        attempt.speedup = speeds[name]
    chosen = max(racers.values(), key=lambda a: a.speedup)
    if len(racers) > 1:
        tried = ", ".join(f"{n} {a.speedup:.2f}x" for n, a in racers.items())
        history.notes.append(f"Formats: {tried}; {chosen.form} was taken.")
    return chosen


def _speed(shop: Workshop, attempt: Attempt, opened: Opened) -> float:
    if not shop.recipe.timing:
        before, after = expected_ms(attempt.plan, shop.found, shop.target, shop.facts)
        return before / after if after else 1.0
    return time_attempts({"it": attempt}, opened, 0.6)["it"]


def time_attempts(
    racers: Mapping[str, Attempt], opened: Opened, seconds: float
) -> dict[str, float]:
    """The least speed-up over float on the typical feeds, by racer."""
    sessions: dict[str, Session] = {"fp32": opened.session}
    sessions |= {name: attempt.session for name, attempt in racers.items()}
    feeds = typical_feeds(timing_feeds(opened))
    timings = [race(sessions, feed, seconds=seconds / len(feeds)) for _, feed in feeds]
    return {name: min(t.speedup[name] for t in timings) for name in racers}


def timing_feeds(opened: Opened) -> list[Feed]:
    """Held-out feeds, or the stand-in where there is no data."""
    if opened.samples is None:
        return [opened.feed]
    return list(opened.samples.held_out())


def _middle(opened: Opened) -> Feed:
    return typical_feeds(timing_feeds(opened))[0][1]
