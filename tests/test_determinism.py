"""The same model, data and recipe give the same bytes: in another process, with other hashes, with other threads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import conv_net, linear_net, rows, samples, save
from twice import jobs

from qcompile import RecipeError, compile_model
from qcompile.calibrate import calibrate_model
from qcompile.cli import main
from qcompile.plan.plan import load_plan
from qcompile.recipe import Recipe

ROOT = Path(__file__).parents[1]
UNTIMED = Recipe(timing=False, bench_seconds=0.01, threads=1)
FEEDS = [{"x": image[None]} for image in samples(12)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Hashes of files by job, of three processes: another order of sets, and other threads beside that."""
    found = {}
    for title, seed, threads in (("first", "1", 1), ("again", "2", 1), ("threads", "3", 2)):
        folder = tmp_path_factory.mktemp(title)
        cache = folder / "cache"
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        more = {"PYTHONHASHSEED": seed, "QCOMPILE_CACHE": str(cache), "PYTHONPATH": paths}
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "twice.py"), str(folder), str(threads)],
            env={**os.environ, **more}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[title] = json.loads(done.stdout)
        assert not cache.exists(), "a kernel was timed"
    return found


@pytest.mark.parametrize("job", jobs())
def test_same_bytes(job: str, runs: dict[str, dict[str, str]]) -> None:
    first, again, threads = (runs[title][job] for title in ("first", "again", "threads"))
    assert again == first, "another process wrote other bytes"
    assert threads == first, "two threads wrote other bytes than one"


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("a clock was asked")


@pytest.mark.parametrize("more", [{}, {"min_sqnr": 56.0}, {"max_size": "90%"}])
def test_without_timing_no_clock_decides(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever could be timed to decide fails here; the time of the search is over before it begins."""
    for place in ("search.race", "search.profile", "referee.race"):
        monkeypatch.setattr(f"qcompile.{place}", forbidden)
    recipe = dataclasses.replace(UNTIMED, search_time=1e-9, **more)
    result = compile_model(conv_net(), FEEDS, output=tmp_path / "a.onnx", recipe=recipe)
    slow = dataclasses.replace(recipe, search_time=1e9)
    compile_model(conv_net(), FEEDS, output=tmp_path / "b.onnx", recipe=slow)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert any("no time that was measured" in note for note in result.notes)
    assert result.kernels["integer"] > 0
    if "min_sqnr" in more:
        assert result.search is not None
        assert len(result.search["points"]) > 2


def test_a_true_clock_is_asked_by_default(
    monkeypatch: pytest.MonkeyPatch, clock: Any, tmp_path: Path
) -> None:
    del clock
    monkeypatch.setattr("qcompile.search.race", forbidden)
    with pytest.raises(AssertionError, match="a clock was asked"):
        compile_model(conv_net(), FEEDS, recipe=dataclasses.replace(UNTIMED, timing=True))


def test_a_limit_of_time_needs_a_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match="max_latency is a limit of time, and timing is off"):
        Recipe(timing=False, max_latency="50%")
    save(conv_net(), tmp_path / "m.onnx")
    assert main([str(tmp_path / "m.onnx"), "--no-timing", "--max-latency", "5", "-q"]) == 2
    assert "leave out one of them" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_the_plan_of_a_timed_compilation_can_be_compiled_again(clock: Any, tmp_path: Path) -> None:
    """What clocks decided stands in the plan of the report: from it, no clock decides any more."""
    clock(1.5)
    timed = dataclasses.replace(UNTIMED, timing=True, format="fused")
    compile_model(
        linear_net(), [{"x": row[None]} for row in rows(12)], output=tmp_path / "a.onnx",
        recipe=timed, report=tmp_path / "report",
    )  # fmt: skip
    for name in "bc":
        compile_model(
            linear_net(), [{"x": row[None]} for row in rows(12)], output=tmp_path / f"{name}.onnx",
            recipe=UNTIMED, plan=load_plan(tmp_path / "report" / "plan.json"),
        )  # fmt: skip
    a, b, c = (onnx.load(tmp_path / f"{name}.onnx") for name in "abc")
    assert b.SerializeToString(deterministic=True) == c.SerializeToString(deterministic=True)
    assert [node.op_type for node in a.graph.node] == [node.op_type for node in b.graph.node]


def test_statistics_are_the_same_bytes(tmp_path: Path) -> None:
    path = save(conv_net(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=samples(12))
    found = set()
    for name, threads in (("a", 1), ("b", 1), ("c", 2)):
        made = tmp_path / f"{name}.stats"
        calibrate_model(path, tmp_path / "d.npz", output=made, recipe=Recipe(threads=threads))
        found.add(hashlib.sha256(made.read_bytes()).hexdigest())
    assert len(found) == 1
