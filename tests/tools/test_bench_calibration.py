"""The benchmark of calibration: its options, its tables, what it skips, and the parts that need no kit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import bench_calibration
import bench_calibration_peers as peers
import numpy as np
import pytest
from bench_calibration import arguments, available, finite, lacking, row
from bench_calibration_table import markdown, table
from bench_process import Finished
from networks import conv_net, samples, save
from PIL import Image

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench_calibration.py"


def run(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH.with_name(script)), *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(bench_calibration.ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_options() -> None:
    args = arguments([])
    assert args.tables == ["A", "B", "C", "D", "E"]
    assert (args.repeat, args.threads, args.quick, args.nncf_python) == (3, 2, False, None)
    assert arguments(["--tables", "B, A"]).tables == ["B", "A"]
    assert arguments(["--quick"]).quick


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tables", "A,F"], "'F' is none of A, B, C, D, E"),
        (["--repeat", "0"], "--repeat is 0"),
        (["--threads", "-1"], "--threads is -1"),
    ],
)
def test_wrong_options(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        arguments(words)
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_without_the_kit_one_sentence_says_how_to_point_to_it(tmp_path: Path) -> None:
    done = run("bench_calibration.py", "--eval", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "--eval DIR or the environment variable QCOMPILE_EVAL" in line


def test_what_ort_would_keep_is_skipped_where_it_does_not_fit() -> None:
    assert lacking(200, None) == ""
    assert lacking(200, 17 * 10**9) == ""
    assert lacking(200, 15 * 10**9) == "skipped: needs up to 16 GB of memory, and 15 GB are free"
    assert lacking(16, 15 * 10**9) == ""
    free = available()
    assert free is None or free > 0


def test_without_an_interpreter_nncf_is_skipped() -> None:
    bench: Any = bench_calibration.Bench.__new__(bench_calibration.Bench)
    bench.args = arguments([])
    assert "--nncf-python" in bench.nncf(Path("m.onnx"), Path())["why"]


def test_rows_hold_medians_and_reasons() -> None:
    good = [Finished(0, "", "", seconds, peak) for seconds, peak in ((3, 5), (1, 9), (2, 7))]
    found = row("a", good, more=1)
    assert found == {"tool": "a", "seconds": 2, "peak_rss_mb": 9, "runs": [3, 1, 2], "more": 1}
    bad = Finished(1, "", "ValueError: no\n", 1.0, 1.0)
    assert row("a", [*good, bad])["why"] == "crashes: ValueError: no"


def test_ranges_that_are_not_finite_are_named() -> None:
    tensors = [
        {"name": "good", "ranges": {"minmax": [0.0, 1.0], "kl": [0.0, 1.0]}},
        {"name": "endless", "ranges": {"minmax": [0.0, float("inf")], "kl": [0.0, 1.0]}},
        {"name": "short", "ranges": {"minmax": [0.0, 1.0]}},
    ]
    found = finite({"methods": ["minmax", "kl"], "tensors": tensors})
    assert found["not_finite"] == ["endless", "short"]
    assert (found["tensors"], finite({})["tensors"]) == (3, 0)


def test_cells_may_hold_bars() -> None:
    assert list(table(("a", "b", "remark"), [("1", "2", "x|y")])) == [
        "| a | b | remark |", "|---|---:|---|", r"| 1 | 2 | x\|y |",
    ]  # fmt: skip


def report() -> dict[str, Any]:
    plain = {"tool": "FP32 inference", "seconds": 2.0, "ratio": 1.0, "peak_rss_mb": 100.0}
    mine = {
        "tool": "qcompile calibrate", "seconds": 3.0, "ratio": 1.4, "peak_rss_mb": 300.0, "tensors": 64,
        "methods": ["minmax", "kl"], "not_finite": [], "passes": 1,
    }  # fmt: skip
    ort = {
        "tool": "ORT MinMax", "seconds": 9.0, "ratio": 4.5, "peak_rss_mb": 250.4, "collect": 5.0, "compute": 1.0,
        "tensors": 170,
    }  # fmt: skip
    bad = {"tool": "ORT Percentile", "seconds": 9.0, "ratio": 4.5, "peak_rss_mb": 250.0, "why": "crashes: a|b"}  # fmt: skip
    nncf = {"tool": "NNCF quantize", "seconds": 8.0, "ratio": 4.0, "peak_rss_mb": 1.0, "version": "3", "statistics": 2.0}  # fmt: skip
    memory = {"fp32": 1.0, "gather": 1.5, "start": 0.2, "ratio": 1.5, "ratios": [1.4, 1.6]}
    return {
        "machine": {"cpu": "A CPU", "versions": {"onnxruntime": "1.0"}}, "threads": 2, "repeat": 3, "quick": False,
        "skipped": {"silero_vad": "its FP32 model is not there"},
        "tables": {
            "A": {
                "samples": 200, "difference": {"bench": 0.0, "qcompile": 7e-7}, "memory": memory,
                "rows": [plain, mine, ort, bad, nncf, {"tool": "ORT Entropy", "why": "skipped: needs memory"}],
            },
            "B": {"rows": [{"tool": "m", "samples": 100, "peak_rss_mb": 200.0, "growth": 1.25, "seconds": 4.0}]},
            "C": {"samples": 512, "rows": [plain, mine], "memory": {"why": "crashes"}},
            "D": {"cases": [{"title": "a case", "samples": 5, "rows": [plain, mine, ort, bad], "memory": memory}]},
            "E": {"samples": 200, "tensors": 64, "seconds": {"kl": 1.25}, "ort": [ort, bad]},
        },
    }  # fmt: skip


def test_the_tables() -> None:
    lines = markdown(report()).splitlines()
    assert "| FP32 inference | 2.00 | 1.00 | 100 |  |" in lines
    assert (
        "| qcompile calibrate | 3.00 | 1.40 | 300 | ranges by 2 methods, all finite; 64 tensors; 1 pass |"
        in lines
    )
    assert (
        "| ORT MinMax | 9.00 | 4.50 | 250 | collecting 5.00 s, computing 1.00 s; 170 tensors |"
        in lines
    )
    assert r"| ORT Percentile | 9.00 |  | 250 | crashes: a\|b |" in lines
    assert "| ORT Entropy |  |  |  | skipped: needs memory |" in lines
    assert any("gathering statistics took 2.00 s of it; version 3 |" in line for line in lines)
    assert any("ratio 1.50 (1.40 to 1.60)." in line for line in lines)
    assert "| m | 100 | 200.0 | +1.2 | 4.0 |  |" in lines
    assert "In memory: crashes." in lines
    assert (
        r"| a case | 5 | 64 | 1 | 2.00 | 3.00 | 1.40 | 1.50 (0.20 of 1.50 s) | 100 | 300 | 9.00 s, 250 MB | crashes: a\|b |"
        in lines
    )
    assert "| qcompile kl | 64 | 1.250 |" in lines
    assert "| ORT MinMax, `compute_data` | 170 | 1.000 |" in lines
    assert lines[-1] == "* silero_vad: skipped, its FP32 model is not there."


def test_samples_are_read_in_order(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 300, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    np.savez(tmp_path / "a.npz", x=np.arange(3))
    assert [file.name for file in peers.files(tmp_path)] == ["a.npz", "b.png"]
    reader = peers.Reader(tmp_path)
    first, second = reader.get_next(), reader.get_next()
    assert reader.get_next() is None
    assert first is not None and second is not None
    assert first["x"].tolist() == [0, 1, 2]
    assert second["input"].shape == (1, 3, 224, 224) and second["input"].dtype == np.float32
    blue = (pixels[16, 38, 2] / 255 - 0.406) / 0.225
    assert second["input"][0, 2, 0, 0] == pytest.approx(blue, abs=1e-5)


@pytest.mark.slow
def test_every_measurement_that_needs_no_kit(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    model = save(conv_net(), tmp_path / "model.onnx")
    for i in range(4):
        np.savez(data / f"{i}.npz", x=samples(4)[i : i + 1])
    stats = tmp_path / "model.stats"

    def ask(*words: object) -> dict[str, Any]:
        done = run("bench_calibration_peers.py", "--threads", 1, *words)
        assert done.returncode == 0, done.stderr
        answer = Finished(0, done.stdout, "", 0.0, 0.0).json()
        assert answer
        return answer

    assert ask("fp32", model, data) == {"samples": 4}
    words = ("--data", data, "-o", stats, "--held-out", 0, "--json", "--quiet")
    survey = ask("qcompile", "calibrate", model, *words)
    assert (survey["samples"], finite(survey)["not_finite"]) == (4, [])
    again = ask("repeated", model, data, 9, tmp_path / "more.stats")
    assert again == {"samples": 9, "passes": 1}
    assert ask("ort", "Percentile", model, data)["tensors"] > 0
    held = ask("memory", model, data, 2)
    assert (held["samples"], len(held["ratios"])) == (4, 2)
    assert set(ask("ranges", stats)["seconds"]) == set(survey["methods"])


KIT = """
from pathlib import Path
import numpy as np

class Task:
    model = Path(__file__).with_name("tiny.onnx")
    def calibration(self):
        rng = np.random.default_rng(0)
        while True:
            yield {"x": rng.standard_normal(SHAPE, np.float32)}

class Missing:
    model = Path(__file__).with_name("missing.onnx")

TASKS = {"cifar10": Task(), "imagenet": Missing()}
"""


@pytest.mark.slow
def test_from_one_command_to_the_tables(tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    kit.mkdir()
    code = textwrap.dedent(KIT).replace("SHAPE", str(samples(1).shape))
    (kit / "evaluate.py").write_text(code, "utf-8")
    save(conv_net(), kit / "tiny.onnx")
    out, full = tmp_path / "b.md", tmp_path / "b.json"

    done = run(
        "bench_calibration.py", "--eval", kit, "--tables", "A,B", "--quick", "--out", out, "--json", full,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert out.read_text("utf-8") == done.stdout
    lines = done.stdout.splitlines()
    assert "* table A: skipped, its FP32 model is not there." in lines
    assert "* imagenet of table B: skipped, its FP32 model is not there." in lines
    assert len([line for line in lines if line.startswith("| tiny |")]) == 2
    assert str(tmp_path) not in done.stdout
    rows = json.loads(full.read_text("utf-8"))["tables"]["B"]["rows"]
    assert [found["samples"] for found in rows] == [10, 100]
    assert all(found["peak_rss_mb"] > 20 for found in rows)
