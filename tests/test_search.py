"""Which attempts are tried, and which of them is kept; speeds are given, errors are real."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from networks import from_text
from workbench import PAD, QUICK, Bench, images, plant, small_cnn, weight, workbench

from qcompile import referee, search
from qcompile.errors import ModelError
from qcompile.plan.make import Request
from qcompile.plan.plan import Form, Plan
from qcompile.recipe import Recipe
from qcompile.run.profile import Profile
from qcompile.search import History, find_best
from qcompile.verify.latency import Timing
from qcompile.workshop import Attempt, Workshop


class Race:
    """Speeds by racer's name, or by a function of the attempt's operators, in place of timing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **speeds: float) -> None:
        self.speeds, self.feeds = speeds, []  # type: ignore[var-annotated]
        for module in (search, referee):
            monkeypatch.setattr(module, "race", self)

    def __call__(self, sessions: Mapping[str, Any], feed: Any, *, seconds: float) -> Timing:
        self.feeds.append(feed)
        found = {name: self.speeds.get(name, 2.0) for name in sessions} | {"fp32": 1.0}
        return Timing({name: 2 / speed for name, speed in found.items()}, found, 3)


def best_of(bench: Bench) -> tuple[Attempt, History]:
    _, best, history = find_best(bench.shop, bench.request, bench.draft, bench.opened)
    return best, history


def recipe(**more: Any) -> Recipe:
    return dataclasses.replace(QUICK, **more)


# ---- ranges


def test_the_range_method_of_least_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extremes far out, in one sample: least squared error, and a choice by tensor, do not care."""
    Race(monkeypatch)
    monkeypatch.setattr(search, "_FINE_DB", -1.0)  # no tuning of single tensors
    bench = workbench(small_cnn(), images(20), recipe(sqnr_goal=0.0))
    for name in ("m", "c", "y"):
        plant(bench.shop.stats[name], 30)
    best, history = best_of(bench)
    assert best.ranging.method == "mse"
    assert best.db > 25
    note = history.notes[0]
    assert note.startswith("Ranges on held-out samples, worst output slice: mean ")
    told = dict(
        part.split()[:2] for part in note.split(": ")[1].replace("by tensor", "by").split(", ")
    )
    assert list(told) == ["mean", "minmax", "mse", "by"]
    assert max(told, key=lambda name: float(told[name])) in ("mse", "by")
    assert float(told["mse"]) > float(told["minmax"]) + 10


def test_one_method_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    Race(monkeypatch)
    best, history = best_of(workbench(small_cnn(), images(), recipe(ranges="percentile")))
    assert best.ranging.method == "percentile"
    assert not best.ranging.single
    assert not any(note.startswith("Ranges") for note in history.notes)


def test_corrections_are_kept_only_if_they_help(monkeypatch: pytest.MonkeyPatch) -> None:
    Race(monkeypatch)
    """Whichever ranges win: their biases were judged as they are and corrected, and the better ones taken."""
    bench = workbench(small_cnn(), images(), recipe(sqnr_goal=0.0, rounding=False))
    judged: list[Attempt] = []
    true_judge = bench.shop.judge

    def judge(attempt: Attempt, limit: int | None = None) -> Any:
        if limit == search._JUDGES:
            judged.append(attempt)
        return true_judge(attempt, limit)

    monkeypatch.setattr(bench.shop, "judge", judge)
    best, _ = best_of(bench)

    def noise(shift: bool) -> float:
        wanted = dataclasses.replace(best.ranging, shift=shift)
        (found,) = {a.noise for a in judged if a.ranging == wanted}
        return found

    assert best.ranging.shift == (noise(shift=True) < noise(shift=False))


# ---- formats


@pytest.mark.parametrize(
    ("fused", "qdq", "taken"), [(2.0, 1.5, "fused"), (1.5, 2.0, "qdq"), (2.0, 2.0, "fused")]
)
def test_the_faster_format(
    fused: float, qdq: float, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Race(monkeypatch, fused=fused, qdq=qdq)
    best, history = best_of(workbench(small_cnn(), images()))
    assert best.form == taken
    assert best.speedup == max(fused, qdq)
    assert history.notes[-1] == f"Formats: fused {fused:.2f}x, qdq {qdq:.2f}x; {taken} was taken."


@pytest.mark.parametrize("form", ["fused", "qdq"])
def test_the_format_that_was_asked_for(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Race(monkeypatch)
    best, history = best_of(workbench(small_cnn(), images(), recipe(format=form)))
    assert best.form == form
    assert not any(note.startswith("Formats") for note in history.notes)


def test_a_portable_form_that_ort_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    Race(monkeypatch)
    bench = workbench(small_cnn(), images())
    true_attempt = bench.shop.attempt

    def attempt(plan: Any, ranging: Any, form: Any) -> Attempt:
        if form == "qdq":
            raise ModelError("no such opset.")
        return true_attempt(plan, ranging, form)

    monkeypatch.setattr(bench.shop, "attempt", attempt)
    best, history = best_of(bench)
    assert best.form == "fused"
    assert "The portable format was not taken: no such opset." in history.notes


# ---- speed


def test_the_slowest_of_the_typical_feeds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large and small samples are timed; the least speed-up is the result's."""
    model = from_text(
        "g (float[N,256] x) => (float[N,64] y) { [one] y = MatMul(x, w) }", w=weight(256, 64)
    )
    rng = np.random.default_rng(0)
    # the sixth and the twelfth are held out
    samples = [
        {"x": rng.normal(size=(rows, 256)).astype(np.float32)} for rows in [32] * 5 + [1] + [32] * 6
    ]

    def race(sessions: Mapping[str, Any], feed: Any, *, seconds: float) -> Timing:
        speed = 3.0 if len(feed["x"]) == 32 else 1.1
        found = dict.fromkeys(sessions, speed) | {"fp32": 1.0}
        return Timing(found, found, 3)

    for module in (search, referee):
        monkeypatch.setattr(module, "race", race)
    bench = workbench(model, samples)
    assert {len(feed["x"]) for feed in search.timing_feeds(bench.opened)} == {1, 32}
    best, _ = best_of(bench)
    assert best.speedup == 1.1


def slow(
    monkeypatch: pytest.MonkeyPatch, bench: Bench, nodes: dict[str, float], floats: dict[str, float]
) -> None:
    """Profiles with these times: the first is that of the float model."""
    profiles = iter([Profile(floats, {})])
    monkeypatch.setattr(search, "profile", lambda *_, **__: next(profiles))
    monkeypatch.setattr("qcompile.faster.profile", lambda *_, **__: Profile(nodes, {}))


TIMES = {"stem": 100.0, "gate": 100.0, "mul": 100.0, "body": 100.0, "add": 100.0}


def by_forms(monkeypatch: pytest.MonkeyPatch, bench: Bench, speed: Any) -> None:
    """The speed of an attempt is a function of its plan's forms."""
    made: list[Attempt] = []
    true_attempt = bench.shop.attempt

    def attempt(*words: Any) -> Attempt:
        made.append(true_attempt(*words))
        return made[-1]

    def race(sessions: Mapping[str, Any], feed: Any, *, seconds: float) -> Timing:
        found = {"fp32": 1.0}
        for name, session in sessions.items():
            for one in made:
                if one.session is session:
                    found[name] = speed(bench.forms(one.plan))
        return Timing(found, found, 3)

    monkeypatch.setattr(bench.shop, "attempt", attempt)
    for module in (search, referee):
        monkeypatch.setattr(module, "race", race)


def test_a_slow_result_is_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that takes longer as integer is left float, if that makes the whole faster."""
    bench = workbench(small_cnn(), images())
    by_forms(monkeypatch, bench, lambda forms: 0.8 if forms["mul"] == "static" else 1.7)
    slow(monkeypatch, bench, {**TIMES, "mul": 9000.0}, dict.fromkeys(TIMES, 300.0))
    best, history = best_of(bench)
    assert bench.forms(best.plan)["mul"] == "float"
    assert bench.forms(best.plan)["body"] == "static"
    assert best.speedup == 1.7
    assert "Planned again with measured costs: 0.80x -> 1.70x." in history.notes


def test_another_plan_that_is_not_faster_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = workbench(small_cnn(), images())
    by_forms(monkeypatch, bench, lambda forms: 0.8)
    slow(monkeypatch, bench, {**TIMES, "mul": 9000.0}, dict.fromkeys(TIMES, 300.0))
    best, history = best_of(bench)
    assert bench.forms(best.plan)["mul"] == "static"
    assert not any(note.startswith("Planned again") for note in history.notes)


def test_a_fast_result_is_not_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Race(monkeypatch)

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(search, "profile", never)
    assert best_of(workbench(small_cnn(), images()))[0].speedup == 2.0


# ---- accuracy


def planted(goal: float = 18.0, **more: Any) -> Bench:
    """`sum` adds a tensor whose first channel is a thousand times as large; `pick` drops that channel."""
    k = weight(4, 4, 3, 3)
    k[0] *= 1000
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y) "
        f"{{ [wide] a = Conv<{PAD}>(x, k) [sum] b = Add(a, a) [pick] c = Slice(b, one, four, one) [body] y = Conv<{PAD}>(c, l) }}",
        k=k, l=weight(4, 3, 3, 3, seed=1), one=np.array([1], np.int64), four=np.array([4], np.int64),
    )  # fmt: skip
    return workbench(model, images(20), recipe(sqnr_goal=goal, **more))


def test_a_planted_bad_layer_is_left_float(monkeypatch: pytest.MonkeyPatch) -> None:
    Race(monkeypatch)
    bench = planted()
    assert set(bench.forms().values()) == {"static"}
    best, history = best_of(bench)
    assert bench.forms(best.plan)["sum"] == "float"
    assert bench.forms(best.plan)["body"] == "static"
    assert best.db >= 18
    assert any("more left float for accuracy" in note for note in history.notes)


def test_not_if_nobody_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Race(monkeypatch)
    bench = planted(goal=0.0)
    best, history = best_of(bench)
    assert bench.forms(best.plan) == bench.forms()
    assert not any("left float" in note for note in history.notes)


@pytest.mark.parametrize(("demanded", "form"), [(None, "static"), (18.0, "float")])
def test_not_if_it_costs_the_speed_unless_it_is_demanded(
    demanded: float | None, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A goal is worth a little speed, a limit is worth all of it."""
    bench = planted(min_sqnr=demanded)
    by_forms(monkeypatch, bench, lambda forms: 3.0 if forms["sum"] == "static" else 1.01)
    best, _ = best_of(bench)
    assert bench.forms(best.plan)["sum"] == form


def test_a_good_result_needs_no_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above so many decibels nothing is measured."""
    Race(monkeypatch)
    bench = workbench(small_cnn(), images())
    monkeypatch.setattr(search, "_FINE_DB", 5.0)

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(search.tune, "sensitivity", never)
    assert best_of(bench)[0].db > 20


def test_without_data_there_is_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(monkeypatch)
    model = from_text(
        "g (float[N,256] x) => (float[N,64] y) { [one] y = MatMul(x, w) }", w=weight(256, 64)
    )
    bench = workbench(model, None)
    best, history = best_of(bench)
    assert bench.forms(best.plan) == {"one": "dynamic"}
    assert best.ranging.method == "none"
    assert history.notes == ["Formats: fused 2.00x, qdq 2.00x; fused was taken."]
    assert all(feed is bench.opened.feed for feed in race.feeds)


def test_nothing_to_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    Race(monkeypatch)
    model = from_text("g (float[N,4] x) => (float[N,4] y) { y = Neg(x) }")
    bench = workbench(model, [{"x": np.ones((1, 4), np.float32)}] * 3)
    best, history = best_of(bench)
    assert not best.plan.quantizes
    assert best.plan.of(Form.FLOAT)
    assert history.notes == []


def test_no_plan_is_solved_for_once_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large graph each plan takes seconds: the first one here is none, and the others are not tried."""
    Race(monkeypatch)
    solved: list[float] = []
    true = Workshop.plan

    def plan(shop: Workshop, request: Request) -> Plan:
        if math.isfinite(request.most_noise):
            solved.append(request.most_noise)
        return true(shop, request)

    monkeypatch.setattr(Workshop, "plan", plan)
    monkeypatch.setattr(referee.Referee, "expired", property(lambda _: bool(solved)))
    best_of(workbench(small_cnn(), images(20), recipe(min_sqnr=400.0)))
    assert len(solved) == 1
