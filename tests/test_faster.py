"""Plans from measured times: which time belongs to which node."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from lowering import eager
from workbench import Bench, images, small_cnn, workbench

from qcompile import faster
from qcompile.plan.make import border_costs, node_costs
from qcompile.plan.plan import Form
from qcompile.run.profile import Profile
from qcompile.targets.schema import Boundary
from qcompile.workshop import Attempt, Ranging


@pytest.fixture(scope="module")
def bench() -> Bench:
    return workbench(small_cnn(), images(6))


@pytest.fixture(scope="module")
def made(bench: Bench) -> Attempt:
    return bench.shop.attempt(bench.draft, Ranging("minmax"), "fused")


INTEGER = {"stem": 900.0, "gate": 300.0, "mul": 200.0, "body": 800.0, "add": 100.0}
FLOAT = {"stem": 3000.0, "act": 500.0, "gate": 400.0, "mul": 150.0, "body": 4000.0, "add": 250.0}


def told(
    bench: Bench, made: Attempt, monkeypatch: pytest.MonkeyPatch, *, nodes: dict[str, float] | None = None,
    operators: dict[str, float] | None = None, floats: dict[str, float] | None = None,
) -> Any:  # fmt: skip
    """The request after a profile with these times."""
    seen = Profile(INTEGER if nodes is None else nodes, operators or {})
    monkeypatch.setattr(faster, "profile", lambda *_, **__: seen)
    return faster.measured_request(
        bench.shop, bench.request, made, {}, Profile(floats or FLOAT, {})
    )


def test_both_times_of_every_integer_node(
    bench: Bench, made: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float Conv with the Relu that the integer one absorbs."""
    request = told(bench, made, monkeypatch)
    assert {name: request.measured[name] for name in INTEGER} == {
        "stem": (3500.0, 900.0), "gate": (400.0, 300.0), "mul": (150.0, 200.0), "body": (4000.0, 800.0), "add": (250.0, 100.0),
    }  # fmt: skip
    assert request.keep_float == bench.request.keep_float


@pytest.mark.parametrize("name", ["stem", "a", "r"])
def test_a_fused_conv_has_the_name_of_any_of_its_values(
    name: str, bench: Bench, made: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the node, of its output, or of the Relu's."""
    request = told(bench, made, monkeypatch, floats={name: 2000.0})
    assert request.measured["stem"] == (2000.0, 900.0)


def test_layout_changes_are_shared_out(
    bench: Bench, made: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the float nodes, by their times: the integer model has none of them."""
    monkeypatch.setattr(faster, "profile", lambda *_, **__: Profile(INTEGER, {}))
    operators = {"Conv": 7000.0, "Relu": 1000.0, "ReorderInput": 1500.0, "ReorderOutput": 500.0}
    request = faster.measured_request(
        bench.shop, bench.request, made, {}, Profile(FLOAT, operators)
    )
    assert request.measured["stem"] == (pytest.approx(3500 * 1.25), 900.0)
    assert request.measured["gate"] == (pytest.approx(400 * 1.25), 300.0)


def test_what_was_not_seen_keeps_its_cost(
    bench: Bench, made: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = told(bench, made, monkeypatch, nodes={"stem": 900.0}, floats={"stem": 3000.0})
    assert set(request.measured) == {"stem"}
    request = told(bench, made, monkeypatch, nodes={"stem": 900.0}, floats={"gate": 400.0})
    assert "stem" not in request.measured


def test_nodes_that_were_float_are_expected_at_this_machine_s_pace(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integer kernels that ran took three times their cost: so will those that did not run yet."""
    shop = bench.shop
    kept, shop.target = shop.target, eager()
    shop.found, found = {}, shop.found
    try:
        from qcompile.plan.make import find_candidates

        shop.found = find_candidates(shop.prepared, shop.target, shop.facts)
        plan = shop.plan(
            dataclasses.replace(
                bench.request,
                forms={
                    **dict.fromkeys(bench.forms(), Form.FLOAT),
                    "body": Form.STATIC,
                    "add": Form.STATIC,
                },
            )
        )
        assert [e.node for e in plan.of(Form.STATIC)] == ["body", "add"]
        cost = {
            name: node_costs(item, shop.facts)[1]
            for name, item in shop.found.items()
            if not isinstance(item, str)
        }
        attempt = shop.attempt(plan, Ranging("minmax"), "fused")
        request = told(
            bench, attempt, monkeypatch, nodes={name: 3 * cost[name] for name in ("body", "add")}
        )
        assert request.measured["body"] == (4000.0, pytest.approx(3 * cost["body"]))
        assert request.measured["stem"] == (3500.0, pytest.approx(3 * cost["stem"]))
        assert request.measured["mul"] == (150.0, pytest.approx(3 * cost["mul"]))
        only = dataclasses.replace(
            bench,
            request=dataclasses.replace(bench.request, only=frozenset({"mul", "body", "add"})),
        )
        request = told(only, attempt, monkeypatch)
        assert set(request.measured) == {"body", "add", "mul"}
    finally:
        shop.target, shop.found = kept, found


def test_borders_are_rescaled_to_what_they_took(
    bench: Bench, made: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One QuantizeLinear at the input, one DequantizeLinear at the output."""
    kept, bench.shop.target = (
        bench.shop.target,
        dataclasses.replace(bench.shop.target, boundary=Boundary(10, 20, 5, 100)),
    )
    try:
        values = {value.name: value for value in bench.shop.coding(bench.draft).tensors}
        expected = border_costs(values["x"], bench.shop.target, bench.shop.facts)[0]
        expected += border_costs(values["y"], bench.shop.target, bench.shop.facts)[1]
        for factor, wanted in ((2.0, 2.0), (0.1, 0.5), (100.0, 8.0)):
            operators = {
                "QuantizeLinear": expected * factor / 2,
                "DequantizeLinear": expected * factor / 4,
                "Transpose": expected * factor / 4,
                "QLinearConv": 1e9,
            }
            assert told(bench, made, monkeypatch, operators=operators).border == pytest.approx(
                wanted
            )
    finally:
        bench.shop.target = kept


def test_no_borders_are_as_expected(
    bench: Bench, made: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        told(bench, made, monkeypatch, operators={"QuantizeLinear": 5.0}).border == 1.0
    )  # they cost nothing here


def test_another_plan_or_none(bench: Bench, made: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a node is slower as integer the plan changes; where none is, there is no other plan."""
    assert (
        faster.plan_again(
            bench.shop, told(bench, made, monkeypatch, floats={**FLOAT, "mul": 250.0}), made
        )
        is None
    )
    slow = told(bench, made, monkeypatch, nodes={**INTEGER, "stem": 90_000.0})
    plan = faster.plan_again(bench.shop, slow, made)
    assert plan is not None
    assert bench.forms(plan)["stem"] == "float"
    assert bench.forms(plan)["body"] == "static"
    nothing = told(bench, made, monkeypatch, nodes=dict.fromkeys(INTEGER, 1e6))
    assert faster.plan_again(bench.shop, nothing, made) is None


def test_for_real(bench: Bench, made: Attempt) -> None:
    """Times of this machine, whatever they are, for every node that both models name."""
    from qcompile.run.profile import profile

    feed = images(1)[0]
    floats = profile(bench.shop.prepared, feed, threads=1, runs=2)
    request = faster.measured_request(bench.shop, bench.request, made, feed, floats)
    assert {"stem", "body", "add"} <= request.measured.keys()
    assert all(a > 0 and b >= 0 for a, b in request.measured.values())
