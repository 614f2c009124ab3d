"""Predicted noise: its terms, how measured plans correct it, and the shares of rounded weights."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from networks import from_text
from workbench import PAD, Bench, images, weight, workbench

from qcompile.plan.plan import Form, Plan
from qcompile.predict import Estimate, weight_shares
from qcompile.verify.sensitivity import Noise
from qcompile.workshop import Ranging

MINMAX = Ranging("minmax")
SITES = {"x": 1e-4, "a": 2e-4, "t": 3e-4, "y": 4e-4}


@pytest.fixture(scope="module")
def bench() -> Bench:
    """`x` -> `one` Conv -> `a` -> Tanh -> `t` -> `two` Conv -> `y`; the second weight has one number far out."""
    far = weight(4, 4, 3, 3, seed=1)
    far[:, 0, 0, 0] = 40 * np.abs(far).max()
    text = (
        f"g (float[N,4,8,8] x) => (float[N,4,8,8] y) "
        f"{{ [one] a = Conv<{PAD}>(x, k) [between] t = Tanh(a) [two] y = Conv<{PAD}>(t, l) }}"
    )
    return workbench(from_text(text, k=weight(4, 4, 3, 3), l=far), images())


def estimate(bench: Bench, weights: float = 2e-4) -> Estimate:
    noise = Noise(dict(SITES), [0, 1, 2, 3], weights, sum(SITES.values()) + weights)
    return Estimate(bench.shop, bench.draft, MINMAX, noise)


def without(bench: Bench, *names: str) -> Plan:
    forms = dict.fromkeys(names, Form.FLOAT)
    return bench.shop.plan(dataclasses.replace(bench.request, forms=forms))


def test_terms_of_a_plan_add_up(bench: Bench) -> None:
    made = estimate(bench)
    shares = weight_shares(bench.shop, bench.draft, MINMAX)
    assert sum(shares.values()) == pytest.approx(1)
    assert made.of(bench.draft) == pytest.approx(sum(SITES.values()) + 2e-4)
    only_one = SITES["x"] + SITES["a"] + 2e-4 * shares["one"]
    assert made.of(without(bench, "two")) == pytest.approx(only_one)
    assert made.of(without(bench, "one", "two")) == 0


def test_shares_follow_the_rounding_of_weights(bench: Bench) -> None:
    """Against a slow count: the mean square of the step over 12, and of the rounded weight."""
    slow = {}
    for name, found in bench.shop.solve(bench.draft, MINMAX).weights.items():
        power, steps = 0.0, 0.0
        for channel, scale in zip(found.codes, found.params.scale, strict=True):
            power += sum((float(code) * float(scale)) ** 2 for code in channel.ravel())
            steps += channel.size * float(scale) ** 2 / 12
        slow[name] = steps / power
    shares = weight_shares(bench.shop, bench.draft, MINMAX)
    assert shares["two"] > shares["one"]
    assert shares["one"] / shares["two"] == pytest.approx(slow["one"] / slow["two"], rel=1e-5)


def test_a_measured_plan_is_believed(bench: Bench) -> None:
    made = estimate(bench)
    rest = without(bench, "two")
    for noise in (3e-3, 3e-3):
        made.learn(bench.draft, noise)
    assert made.of(bench.draft) == pytest.approx(3e-3, rel=0.05)
    assert made.of(rest) > 1.2 * estimate(bench).of(rest)  # what is common to all terms was too low


def test_what_differs_is_learned_of_the_difference(bench: Bench) -> None:
    """`one` alone is as quiet as it was thought; all that is too much belongs to `two`."""
    made = estimate(bench)
    one, two = without(bench, "two"), without(bench, "one")
    before = made.of(one)
    for _ in range(3):
        made.learn(one, before)
        made.learn(bench.draft, 5e-3)
    assert made.of(one) == pytest.approx(before, rel=0.1)
    assert made.of(two) == pytest.approx(5e-3 - before, rel=0.15)


def test_less_than_nothing_is_nothing(bench: Bench) -> None:
    made = estimate(bench)
    made.learn(bench.draft, 0.0)
    made.learn(without(bench, "two"), 1e-3)
    assert made.of(without(bench, "one")) >= 0
    request = made.request(bench.request, 1.0)
    assert min((*request.noise.values(), *request.weights.values())) >= 0


def test_a_request_holds_the_terms_and_the_limit(bench: Bench) -> None:
    request = estimate(bench).request(bench.request, 7e-4)
    assert request.most_noise == 7e-4
    assert request.noise == pytest.approx(SITES)
    assert sum(request.weights.values()) == pytest.approx(2e-4)
    assert bench.request.most_noise == math.inf
    plan = bench.shop.plan(request)
    assert plan.of(Form.STATIC)
    assert estimate(bench).of(plan) <= 7e-4


def test_nothing_known_changes_nothing(bench: Bench) -> None:
    made = Estimate(bench.shop, bench.draft, MINMAX, Noise({}, [], 0.0, 0.0))
    made.learn(bench.draft, 0.0)
    assert made.of(bench.draft) == 0
