"""Spending measured sensitivity: ranges of single tensors, and nodes that are left float."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from lowering import SATURATES
from networks import from_text
from rewrites import parse
from workbench import PAD, Bench, images, plant, small_cnn, weight, workbench

from qcompile import tune
from qcompile.errors import ModelError
from qcompile.plan.plan import Form, Plan
from qcompile.predict import Estimate
from qcompile.verify.sensitivity import Noise
from qcompile.workshop import Attempt, Ranging


@pytest.fixture(scope="module")
def bench() -> Bench:
    return workbench(small_cnn(), images())


def attempt(bench: Bench, method: str = "minmax", **more: Any) -> Attempt:
    made = bench.shop.attempt(bench.draft, Ranging(method, **more), "fused")
    bench.shop.judge(made)
    return made


# ---- sensitivity


def test_a_noise_for_every_site(bench: Bench) -> None:
    found = tune.sensitivity(bench.shop, bench.draft, Ranging("minmax"))
    assert found is not None
    assert set(found.noise.sites) == {"x", "r", "s", "m", "c", "y"}
    unseen = {"s"} if SATURATES else set()  # 1e-7, beside 4e-5 of weights of 7 bits
    assert all(value > 0 for name, value in found.noise.sites.items() if name not in unseen)
    assert all(found.noise.sites[name] < 0.01 * found.noise.total for name in unseen)
    assert 0 < found.noise.weights < found.noise.total
    assert 0.25 < found.noise.total / attempt(bench).noise < 4  # on other samples


def test_nothing_to_measure(bench: Bench) -> None:
    nothing = dataclasses.replace(bench.draft, nodes=())
    assert tune.sensitivity(bench.shop, nothing, Ranging("minmax")) is None


def test_a_model_that_ort_refuses_is_not_measured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelError("no")

    monkeypatch.setattr(tune, "Meter", refuse)
    assert tune.sensitivity(bench.shop, bench.draft, Ranging("minmax")) is None


def test_large_graphs_are_measured_in_groups_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "_LARGE", 3)
    found = tune.sensitivity(bench.shop, bench.draft, Ranging("minmax"))
    assert found is not None
    assert found.noise.measured == []
    assert set(found.noise.sites) == {"x", "r", "s", "m", "c", "y"}


@pytest.mark.parametrize(
    ("last", "judged"),
    [("y = Softmax(a)", ["a"]), ("y = Sigmoid(a)", ["a"]), ("y = LogSoftmax(a)", ["a"]), ("y = Relu(a)", ["y"]), ("y = Softmax(x)", ["y"])],
)  # fmt: skip
def test_what_goes_into_the_last_softmax_is_judged(last: str, judged: list[str]) -> None:
    model = parse(f"g (float[2] x) => (float[2] y) {{ a = Neg(x) {last} }}")
    assert tune.scores(model) == judged


def test_each_output_once() -> None:
    model = parse(
        "g (float[2] x) => (float[2] y, float[2] z, float[2] a) { a = Neg(x) y = Softmax(a) z = Sigmoid(a) }"
    )
    assert tune.scores(model) == ["a"]


# ---- ranges of single tensors


def test_a_planted_bad_range_gets_another_method(bench: Bench) -> None:
    """One value in one sample, a hundred times as large: minmax wastes its codes."""
    samples = images(20)
    made = workbench(small_cnn(), samples)
    plant(made.shop.stats["m"], 100)
    best = attempt(made)
    found = tune.sensitivity(made.shop, made.draft, Ranging("minmax"))
    assert found is not None
    assert max(found.noise.sites, key=lambda name: found.noise.sites[name]) == "m"
    chosen = tune.tune_ranges(made.shop, best, found)
    assert chosen["m"] in ("mean", "mse")
    assert attempt(made, single=chosen).db > best.db + 10


def test_good_ranges_are_left_alone() -> None:
    made = workbench(small_cnn(), images())
    made.shop.methods = ("minmax",)
    found = tune.sensitivity(made.shop, made.draft, Ranging("minmax"))
    assert found is not None
    assert tune.tune_ranges(made.shop, attempt(made), found) == {}


# ---- left float


def planted() -> Bench:
    """`bad` adds a tensor whose first channel is a thousand times as large, and `pick` drops that channel."""
    k = weight(4, 4, 3, 3)
    k[0] *= 1000
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y) "
        f"{{ [wide] a = Conv<{PAD}>(x, k) [bad] b = Add(a, a) [pick] c = Slice(b, one, four, one) [body] y = Conv<{PAD}>(c, l) }}",
        k=k, l=weight(4, 3, 3, 3, seed=1), one=np.array([1], np.int64), four=np.array([4], np.int64),
    )  # fmt: skip
    return workbench(model, images(20))


def test_a_planted_bad_tensor_is_found_and_left_float() -> None:
    made = planted()
    assert set(made.forms().values()) == {"static"}
    best = attempt(made)
    assert best.db <= 0
    found = tune.sensitivity(made.shop, made.draft, Ranging("minmax"))
    assert found is not None
    worst = sorted(found.noise.sites, key=lambda name: -found.noise.sites[name])[:2]
    assert set(worst) == {"a", "b"}
    quiet = within(made, found.noise, best.plan, 0.01)
    assert {made.forms(quiet)[name] for name in ("wide", "bad", "pick")} == {"float"}
    assert made.forms(quiet)["body"] == "static"
    better = made.shop.attempt(quiet, Ranging("minmax"), "fused")
    made.shop.judge(better)
    assert better.db > 20


def within(made: Bench, noise: Noise, plan: Plan, most: float) -> Plan:
    """The fastest plan that is predicted to have no more than this noise."""
    estimate = Estimate(made.shop, plan, Ranging("minmax"), noise)
    return made.shop.plan(estimate.request(made.request, most))


def test_plans_of_falling_noise(bench: Bench) -> None:
    """Each predicted to be within its limit; fewer and fewer nodes are integer."""
    best = attempt(bench)
    found = tune.sensitivity(bench.shop, bench.draft, Ranging("minmax"))
    assert found is not None
    estimate = Estimate(bench.shop, best.plan, Ranging("minmax"), found.noise)
    total = estimate.of(best.plan)
    limits = [total * share for share in (1.001, 0.5, 0.1, 0.01)]
    plans = [within(bench, found.noise, best.plan, most) for most in limits]
    assert plans[0].nodes == best.plan.nodes
    assert all(estimate.of(p) <= most for p, most in zip(plans, limits, strict=True))
    static = [len(plan.of(Form.STATIC)) for plan in plans]
    assert static == sorted(static, reverse=True)
    assert static[-1] < static[0]


def test_the_least_that_reaches_the_goal() -> None:
    """Of nodes with known noise, only the noisiest goes."""
    made = workbench(small_cnn(), images())
    noise = Noise(dict.fromkeys(["x", "r", "s", "m", "c", "y"], 1e-5), [], weights=0.0, total=1e-3)
    noise.sites["y"] = 1e-2
    plan = within(made, noise, made.draft, 1e-3)
    assert [name for name, form in made.forms(plan).items() if form == "float"] == ["add"]


def test_samples_that_tell() -> None:
    """The one of most error is among them, whatever its place; and no held-out one."""
    feeds = images(20)
    feeds[7] = {name: 40 * value for name, value in feeds[7].items()}
    made = workbench(small_cnn(), feeds)
    attempt = made.shop.attempt(made.draft, Ranging("mean"), "fused")
    told = tune.telling(made.shop, attempt, 3)
    assert len(told) == 3
    few = made.shop.samples.few(16)
    assert all(any(feed is one for one in few) for feed in told)
    noise = [
        made.shop.reference.on(lambda feed=feed: iter([feed]))
        .compare(attempt.session)
        .noise_to_signal
        for feed in few
    ]
    assert told[0] is few[int(np.argmax(noise))]
    assert len(tune.telling(made.shop, attempt, 1)) == 1
