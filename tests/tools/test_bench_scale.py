"""Large graphs: calls grow as nodes do, and no depth of a graph becomes depth of the stack."""

from __future__ import annotations

import cProfile
import dataclasses
import inspect
import pstats
import sys
from typing import Any

import numpy as np
import pytest
from bench_scale import CHANNELS, SHAPES, SIDE, row, stages
from workbench import costless

from qcompile import compile_model
from qcompile.recipe import Recipe
from qcompile.report import Result
from qcompile.run.session import Session

RECIPE = Recipe(timing=False, bench_seconds=0.01, threads=1, sqnr_goal=0.0, format="fused")
ROOM = 150  # frames for libraries


@pytest.fixture(autouse=True)
def _as_large_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few nodes go the way of many, and all of them are worth it."""
    monkeypatch.setattr("qcompile.opened.load_target", costless)
    for module in ("workshop", "search", "improve"):
        monkeypatch.setattr(f"qcompile.{module}.LARGE", 10)


def compiled(shape: str, nodes: int, **more: Any) -> Result:
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.standard_normal((1, CHANNELS, SIDE, SIDE), np.float32)} for _ in range(6)]
    recipe = dataclasses.replace(RECIPE, **more)
    return compile_model(SHAPES[shape](nodes), feeds, recipe=recipe)


def calls(shape: str, nodes: int) -> int:
    profile = cProfile.Profile()
    profile.runcall(compiled, shape, nodes)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", SHAPES)
def test_calls_grow_as_nodes_do(shape: str) -> None:
    """With three times the nodes there are three times the calls; a quadratic step that is a fifth would make it 4.2."""
    compiled(shape, 30)  # what is done once
    few, many = calls(shape, 150), calls(shape, 450)
    assert many / few < 3.1


@pytest.mark.parametrize("shape", ["chain", "residual"])
def test_a_deep_graph_needs_no_deep_stack(shape: str) -> None:
    compiled(shape, 30)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + ROOM)
    try:
        result = compiled(shape, 3 * ROOM)
    finally:
        sys.setrecursionlimit(limit)
    assert result.kernels["integer"] >= ROOM


@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_have_values_of_one_size(shape: str) -> None:
    """However deep: else calibration would meet infinities."""
    model = SHAPES[shape](600)
    assert 590 <= len(model.graph) <= 610
    rng = np.random.default_rng(1)
    (y,) = Session(model).run({"x": rng.standard_normal((1, CHANNELS, SIDE, SIDE), np.float32)})
    assert 0.1 < np.abs(y).max() < 1e4


def test_rows() -> None:
    report = {
        "shape": "chain", "nodes": 2000, "seconds": 30.0, "cpu_seconds": 40.0, "stages": {"loading": 2.0},
        "outside_stages": 1.0, "ort_load_seconds": 0.5, "kernels": {"integer": 1000}, "peak_rss_mb": 480.4,
    }  # fmt: skip
    assert row(report) == "| chain | 2000 | 30 | 15.00 | 20.00 | 0.25 | 480 |"
    assert row({"shape": "wide", "nodes": 9, "failed": -11}).startswith(
        "| wide | 9 | exit code -11 |"
    )
    assert any("1000 us a node" in line for line in stages(report))
