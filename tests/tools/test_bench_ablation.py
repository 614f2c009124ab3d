"""The ablations: what each variant switches, and the table."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_ablation import BARE, FULL, OF_TIME, Ablation, chosen, markdown, variants
from networks import conv_net, samples, save

from qcompile import search
from qcompile.recipe import Recipe
from qcompile.workshop import Workshop

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_ablation.py"


def test_each_variant_differs_from_the_full_one() -> None:
    full, *others = variants()
    assert full.recipe(0) == Recipe()
    assert full.patches == ()
    assert len({v.name for v in others}) == len(others)
    assert all(v.patches or v.recipe(0) != Recipe() for v in others)
    assert others[-1].name == BARE
    assert {"equalize", "absorb", "smooth", "masks", "rounding", "bias_correction"} <= {
        v.name for v in others
    }


def test_stages_are_off_inside_and_on_again_after() -> None:
    tune, timed = search._tune, Workshop.timed
    with variants()[-1].patched():
        best: Any = object()
        assert search._tune(None, best, None, None) is best  # type: ignore[arg-type]
        assert Workshop.timed(None, "request") == "request"  # type: ignore[arg-type]
    assert search._tune is tune
    assert Workshop.timed is timed


def test_without_clocks_all_else_is_as_it_is() -> None:
    """The same plan and the same search of ranges, and what the row names stays off."""
    full, *others = variants()
    bare = full.untimed()
    assert bare.recipe(1) == Recipe(threads=1, sqnr_goal=0.0, bench_seconds=0.01, timing=False)
    smooth = next(v for v in others if v.name == "smooth").untimed()
    assert smooth.recipe(1) == dataclasses.replace(bare.recipe(1), smooth=False)
    assert set(OF_TIME) < {v.name for v in others}


def test_words_choose_rows_and_the_full_one_stays() -> None:
    assert [v.name for v in chosen(["equalize", "smooth"])] == [FULL, "equalize", "smooth"]
    assert len(chosen(None)) == len(variants())


def test_changes_are_against_the_first_row() -> None:
    rows = [
        (FULL, {"db": 25.0, "agreement": 98.0, "speed": 2.0, "seconds": 9.4}),
        ("a", {"db": 23.5, "agreement": 98.5, "speed": 1.9, "seconds": 8.0}),
        ("b", {"db": None, "agreement": None, "speed": None, "seconds": 7.0}),
    ]
    lines = markdown("t", rows).splitlines()
    assert lines[4] == f"| {FULL} | 25.0 |  | 98.00 |  | 2.00x | 9 |"
    assert lines[5] == "| a | 23.5 | -1.5 | 98.50 | +0.50 | 1.90x | 8 |"
    assert lines[6] == "| b |  |  |  |  |  | 7 |"


def test_a_table_of_a_kit(tmp_path: Path, clock: Any) -> None:
    """A kit of one task, whose scores are made up, compiles for real."""
    model = save(conv_net(), tmp_path / "m.onnx")
    seen = []

    def compare(task: Any, out: Path, fp32: Path, limit: int, threads: int) -> dict[str, Any]:
        seen.append((out.exists(), fp32, limit, threads))
        return {"sqnr_db": 20.0, "agreement %": None, "latency": {"a": {"speedup": 3.0}, "b": {"speedup": 2.0}}}  # fmt: skip

    feeds = [{"x": row[None]} for row in samples()]
    task = SimpleNamespace(model=model, calibration=lambda: iter(feeds))
    kit = SimpleNamespace(
        TASKS={"t": task, "gone": SimpleNamespace(model=tmp_path / "no")}, compare=compare
    )
    args: Any = SimpleNamespace(samples=8, threads=1, limit=5, only=["smooth"], untimed=False)
    text = Ablation(args, kit).table("t")
    assert seen == [(True, model, 5, 1)] * 2
    assert text.count("| 20.0 |") == 2
    assert text.count("2.00x") == 2
    assert "its FP32 model is not there" in Ablation(args, kit).table("gone")


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--eval", "nowhere"], "there is no evaluate.py"), (["--tasks", "poems"], "'poems' is no task")],
)  # fmt: skip
def test_what_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "evaluate.py").write_text("TASKS = {'t': None}\n", "utf-8")
    command = [sys.executable, str(TOOL), "--eval", str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
