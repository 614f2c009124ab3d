"""The result: its verdict, JSON, Markdown and table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from qcompile.errors import OutputError
from qcompile.plan.plan import Form, NodePlan, Plan
from qcompile.report import (
    GOOD,
    INACCURATE,
    NOT_FASTER,
    Result,
    check_folder,
    grouped_float,
    to_markdown,
    write_report,
)
from qcompile.show import show_plan, show_result, show_table


def part(name: str, sqnr: float | None, agreement: float | None = None) -> dict[str, Any]:
    return {
        "slice": name, "sqnr_db": sqnr, "cosine": 0.999, "max_abs_error": 0.1, "agreement": agreement,
        "dead": False,
    }  # fmt: skip


def result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "model": "m [v2].onnx", "output": "q [v2].onnx", "target": "ort-cpu-x64-vnni", "recipe": "int8",
        "format": "fused", "ranges": "mean", "seconds": 1.25, "peak_rss_mb": 100.4,
        "size_mb": {"before": 10.0, "after": 2.5},
        "latency": {
            "fp32_ms": 4.0, "result_ms": 2.0, "speedup": 2.0,
            "feeds": [{"feed": "1x3", "fp32_ms": 4.0, "result_ms": 2.0, "speedup": 2.0, "rounds": 9}],
        },
        "outputs": [
            {"name": "y[0]", "slices": [part("all", 31.04, 0.985), part("[0:4] boxes", 12.0)],
             "exact": [part("all", 33.0)]},
            {"name": "z", "slices": [part("all", None)], "exact": [part("all", None)]},
        ],
        "kernels": {
            "integer": 5, "float": 1, "leftover_qdq": 2, "operators": {"QLinearConv": 5},
            "nodes": [{"node": "/c[1]", "op": "Conv", "form": "static", "verdict": "integer",
                       "kernel": "QLinearConv", "why": ""}],
        },
        "kept_float": [{"node": f"/m[{i}]", "op": "MatMul", "why": "too small"} for i in range(3)]
        + [{"node": "/c[0]", "op": "Conv", "why": "an island"}],
        "samples": {"calibration": 8, "held_out": 2}, "warnings": [], "notes": ["size [3] guessed."],
        "next_command": "qcompile m.onnx --report report/", "exit_code": GOOD,
    }  # fmt: skip
    return Result(**{**values, **changes})


def test_json_round_trip() -> None:
    assert json.loads(result().to_json()) == dataclasses.asdict(result())


def test_worst_db() -> None:
    assert result().worst_db == 12.0
    assert result(outputs=[]).worst_db is None
    assert result(outputs=result().outputs[1:]).worst_db is None


def test_verdicts() -> None:
    assert result().verdict() == "2.00x as fast, 4.0x smaller"
    slow = result(exit_code=NOT_FASTER, warnings=["not faster: 0.90x.", "more"])
    assert slow.verdict() == "NOT a success: not faster: 0.90x."
    assert result(exit_code=NOT_FASTER).verdict() == "NOT a success: the result is not faster."
    bad = result(exit_code=INACCURATE, warnings=["output 'y' is constant."])
    assert bad.verdict() == "NOT accurate enough: output 'y' is constant."


def test_grouped_float() -> None:
    assert grouped_float(result().kept_float) == [
        ("MatMul", "too small", 3, "/m[0]"), ("Conv", "an island", 1, "/c[0]"),
    ]  # fmt: skip
    assert len(grouped_float(result().kept_float, most=1)) == 1


def test_markdown() -> None:
    text = to_markdown(result(warnings=["careful."]))
    for line in (
        "# q [v2].onnx: 2.00x as fast, 4.0x smaller",
        "| size, MB | 10.00 | 2.50 | 4.00x smaller |",
        "| latency, ms (1x3) | 4.00 | 2.00 | 2.00x |",
        "| y[0] | all | 31.0 | 0.99900 | 98.50% | 33.0 |",
        "| z | all | equal | 0.99900 |  | equal |",
        "| /c[1] | Conv | static | QLinearConv | integer |",
        "| MatMul | too small | 3 | /m[0] |",
        "- careful.",
        "- size [3] guessed.",
    ):
        assert line in text.splitlines()


def test_markdown_of_odd_names() -> None:
    kept = [{"node": "a|b", "op": "Conv", "why": "kept float by 're:a|b'"}]
    text = to_markdown(result(model=None, output=None, kept_float=kept))
    assert "| Conv | kept float by 're:a\\|b' | 1 | a\\|b |" in text.splitlines()
    assert text.startswith("# result: 2.00x as fast")
    assert "Compiled from a model in memory for" in text


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    show_result(result(warnings=["tensor [b] is odd."]))
    out = capsys.readouterr().out
    for text in (
        "2.00x as fast, 4.0x smaller", "wrote q [v2].onnx", "4.00x smaller", "latency 1x3", "31.0 dB",
        "y[0] [0:4] boxes", "12.0 dB", "98.50%", "equal", "kernels: 5 integer, 1 float",
        "3 MatMul           too small  (/m[0])", "warning: tensor [b] is odd.", "note: size [3] guessed.",
        "8 calibration and 2 held-out samples, 1.2 s, 100 MB", "next: qcompile m.onnx --report report/",
    ):  # fmt: skip
        assert text in out


def test_table_of_many_slices(capsys: pytest.CaptureFixture[str]) -> None:
    slices = [part(f"[{i}:{i + 1}] s{i}", float(i)) for i in range(20)]
    show_result(result(outputs=[{"name": "y", "slices": slices, "exact": []}], kept_float=[]))
    out = capsys.readouterr().out
    assert "5.0 dB" in out
    assert "6.0 dB" not in out
    assert "... and 14 slices with less error" in out
    assert "left float" not in out


def test_table_of_facts(capsys: pytest.CaptureFixture[str]) -> None:
    show_table({"model": "a[b].onnx", "inputs": {"x[0]": "float32[N, 3]"}, "latency": [{"ms": 1}]})
    assert capsys.readouterr().out.splitlines() == [
        "model                    a[b].onnx", "inputs:", "  x[0]                   float32[N, 3]",
        "latency: ms 1",
    ]  # fmt: skip


def test_table_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(
        "t", "a", (NodePlan("/c[0]", "Conv", Form.STATIC, "int8.axis0.sym", "because [1]"),)
    )
    show_plan(plan, "my model.onnx", Path("p.json"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["/c[0]", "Conv", "static", "int8.axis0.sym", "because", "[1]"]
    assert lines[2] == (
        "wrote p.json: set nodes to \"float\", then: qcompile 'my model.onnx' --plan p.json"
    )


def test_folder_of_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    check_folder(tmp_path)
    check_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    for place in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(
            OutputError, match=r"the report cannot be written to .+: .+file is a file\."
        ):
            check_folder(place)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(OutputError, match=r"check permissions, or change --report\."):
        check_folder(tmp_path / "a")


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # where a folder was, before the model was compiled
    with pytest.raises(
        OutputError,
        match=r"the report could not be written to .+report: .+\. The model is whole: q \[v2\]\.onnx\.",
    ):
        write_report(tmp_path / "file" / "report", result())
