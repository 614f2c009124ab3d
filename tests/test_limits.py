"""Whole compilations within limits, and what is kept of rewrites that help; speeds are given, errors are real."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import from_text
from workbench import PAD, QUICK, costless, weight, workbench

import qcompile.workshop
from qcompile import compile_model
from qcompile.improve import improve
from qcompile.report import INACCURATE
from qcompile.search import History
from qcompile.workshop import Ranging

FEEDS = [
    {"x": np.random.default_rng([1, i]).normal(size=(1, 16, 16, 16)).astype(np.float32)}
    for i in range(20)
]


def net(factor: float = 1.0, layers: int = 4) -> Any:
    """`x` -> Conv, Relu ... -> pooled scores `y`; a channel of the second Conv is `factor` times as large, and undone after."""
    constants = {f"k{i}": weight(16, 16, 3, 3, seed=i, scale=1.4) for i in range(layers)}
    constants["k1"] = constants["k1"] * np.where(np.arange(16) == 3, factor, 1)[
        :, None, None, None
    ].astype(np.float32)
    constants["k2"] = constants["k2"] / np.where(np.arange(16) == 3, factor, 1)[
        None, :, None, None
    ].astype(np.float32)
    steps, value = "", "x"
    for i in range(layers):
        steps += f"[c{i}] a{i} = Conv<{PAD}>({value}, k{i}) [r{i}] r{i} = Relu(a{i}) "
        value = f"r{i}"
    text = f"g (float[N,16,16,16] x) => (float[N,10] y) {{ {steps}p = GlobalAveragePool({value}) f = Flatten(p) y = MatMul(f, h) }}"
    return from_text(text, **constants, h=weight(16, 10, scale=4))


def recipe(**more: Any) -> Any:
    return dataclasses.replace(QUICK, target="auto", search_time=5.0, **more)


def score(session: Any) -> Any:
    """Agreement with labels that the float model gives, a sample each."""
    return [float(np.argmax(session.run(None, feed)[0]) == label) for feed, label in LABELLED]


LABELLED: list[tuple[Any, int]] = []


@pytest.fixture(autouse=True)
def _labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.opened.load_target", lambda name: costless())
    if not LABELLED:
        from qcompile.graph import io
        from qcompile.run.session import Session

        session = Session(io.load(net()))
        LABELLED.extend((feed, int(session.run(feed)[0].argmax())) for feed in FEEDS)


def test_a_metric_within_its_drop(tmp_path: Path) -> None:
    result = compile_model(
        net(), FEEDS, recipe=recipe(metric=score, max_drop="20%"), report=tmp_path / "r"
    )
    assert result.search is not None
    last = result.search["points"][-1]
    assert (last["metric"] >= 0.8) == (not last["misses"])
    assert result.exit_code != INACCURATE
    assert result.search["limits"]["max_drop"] == pytest.approx(0.2)
    assert (tmp_path / "r" / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "r" / "report.json").read_text())["search"]["points"]
    assert "## What was measured" in (tmp_path / "r" / "report.md").read_text()


def test_a_metric_that_nothing_keeps_names_what_is_to_blame() -> None:
    calls: list[Any] = []

    def float_only(session: Any) -> float:
        calls.append(session)  # the float model is scored first
        return float(len(calls) == 1)

    result = compile_model(net(), FEEDS, recipe=recipe(metric=float_only, max_drop="0.1"))
    assert result.exit_code == INACCURATE
    assert result.verdict().startswith("NOT within the limits: the metric is 0, worse by 1")
    assert "Most of the error comes from" in result.warnings[0]


def test_decibels_are_reached_by_leaving_nodes_float() -> None:
    loose = compile_model(net(), FEEDS, recipe=recipe(min_sqnr=1.0))
    assert loose.worst_db is not None
    wanted = loose.worst_db + 6
    strict = compile_model(net(), FEEDS, recipe=recipe(min_sqnr=wanted))
    assert strict.search is not None
    kept = [p for p in strict.search["points"] if not p["misses"]]
    assert all(p["sqnr_db"] is None or p["sqnr_db"] >= wanted for p in kept)
    assert bool(kept) == (strict.exit_code != INACCURATE)


def test_a_size_that_cannot_be() -> None:
    result = compile_model(net(), FEEDS, recipe=recipe(max_size="1%"))
    assert result.exit_code == INACCURATE
    assert "the size is" in result.warnings[0]
    assert "Most of the error" not in result.warnings[0]


def test_without_limits_nothing_is_searched() -> None:
    result = compile_model(net(), FEEDS, recipe=recipe())
    assert result.search is None


def test_float_nodes_keep_their_reasons() -> None:
    """What a search fixes on the way is not called somebody's plan."""
    result = compile_model(net(100.0), FEEDS, recipe=recipe(min_sqnr=30.0))
    assert not [row for row in result.plan if row["why"] == "set in the plan"]


def test_a_planted_channel_is_repaired_in_few_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel reaches 100 times as far as the others: its scale moves to the next layer."""
    bench = workbench(net(100.0, layers=6), FEEDS, recipe())
    best = bench.shop.attempt(bench.draft, Ranging("minmax"), "fused")
    bench.shop.judge(best, 4)
    judged: list[Any] = []
    true_judge = qcompile.workshop.Workshop.judge

    def judge(shop: Any, attempt: Any, limit: int | None = None) -> Any:
        judged.append(attempt)
        return true_judge(shop, attempt, limit)

    monkeypatch.setattr(qcompile.workshop.Workshop, "judge", judge)
    log = History()
    _, _, better = improve(bench.shop, bench.request, best, bench.opened, log)
    assert better.db > best.db + 10
    assert len(judged) <= 2 * math.log2(len(bench.draft.nodes)) + 5
    assert "channel scales folded into weights" in log.notes[0]
