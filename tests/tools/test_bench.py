"""The benchmark: what it measures of a process, what it says of failures, and the table."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from bench import names, recipes
from bench_process import measured, reason
from bench_table import markdown

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench.py"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_that_ends_well() -> None:
    done = measured(python("import os; print('out'); os.write(2, b'err')"), limit=30)
    assert (done.code, done.out, done.err) == (0, "out\n", "err")
    assert done.seconds > 0


def test_peak_memory_is_that_of_the_process() -> None:
    # At least what this process has: Linux counts the memory from before the program is loaded.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = own + 300_000_000
    peak = measured(python(f"b = bytearray({size}); del b"), limit=30).peak_mb
    assert size / 1e6 < peak < size / 1e6 + 100


def test_the_last_json_object_counts() -> None:
    done = measured(python("print('{not json'); print('{\\n \"a\": {\\n\"b\": 1}}')"), limit=30)
    assert done.json() == {"a": {"b": 1}}
    assert measured(python("print('nothing')"), limit=30).json() == {}


def test_the_time_limit_ends_a_command_and_its_children() -> None:
    nested = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    done = measured(python(nested), limit=0.5)
    assert done.code is None
    assert done.seconds < 20
    assert done.why().startswith("not done after")


def test_a_crash_is_told_in_a_line() -> None:
    done = measured(python("import json; json.loads('{')"), limit=30)
    assert done.why().startswith("crashes: JSONDecodeError: Expecting property name")
    done = measured(python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), limit=30)
    assert done.why() == "crashes: killed by SIGSEGV"
    assert measured(python("raise SystemExit(7)"), limit=30).why() == "crashes: exit code 7"


def test_reasons_hold_no_folders_and_no_prefix() -> None:
    text = """Traceback (most recent call last):
      File "/home/someone/tool.py", line 3, in <module>
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph: [ONNXRuntimeError] : 10 : INVALID_GRAPH : Load model from /some/where/y.onnx failed:This is an invalid model. See /some/where/log.txt
    """
    assert reason(text) == "InvalidGraph: This is an invalid model. See log.txt"
    assert reason("") == ""
    assert len(reason("ValueError: " + "x" * 500)) == 160


def test_recipes_fall_back() -> None:
    assert recipes("ort", "imagenet") == ["static-default"]
    assert recipes("ort", "stsb") == ["dynamic-default"]
    assert recipes("ort-best", "coco") == ["static-best", "static-best-raw", "static-best-tensor"]
    assert recipes("ort-best", "vad") == ["dynamic-best", "dynamic-best-raw"]
    assert recipes("nncf", "books") == ["nncf-transformer", "nncf"]
    assert recipes("nncf", "coco") == ["nncf"]


def test_lists_of_names_are_checked() -> None:
    parse = names(("a", "b"))
    assert parse("b, a") == ["b", "a"]
    with pytest.raises(argparse.ArgumentTypeError, match="'c' is none of a, b"):
        parse("a,c")


def test_the_table() -> None:
    good = {
        "tool": "qcompile", "name": "CER %", "value": 2.5, "change": -0.1, "change_sigma": 0.2, "sqnr_db": None,
        "agreement %": None, "mb": 1.0, "seconds": 2.0, "peak_rss_mb": 300.0,
        "latency": {"short": {"speedup": 2.0, "ms": 1.0}, "long": {"speedup": 1.5, "ms": 2.0}},
    }  # fmt: skip
    fp32 = {
        "tool": "FP32",
        "name": "CER %",
        "value": 2.6,
        "mb": 4.0,
        "latency": {"short": {"speedup": 1.0, "ms": 2.0}},
    }
    bad = {"tool": "nncf", "why": "crashes: a|b", "seconds": 1.0, "peak_rss_mb": 100.0}
    report = {
        "machine": {"cpu": "A CPU", "versions": {"onnxruntime": "1.0"}}, "threads": 2, "limit": 5,
        "skipped": {"ort": "no reason"},
        "tasks": {"ocr": {"rows": [fp32, good, bad], "latency": {"short": {"fp32 again": {"speedup": 1.2}}}}},
    }  # fmt: skip
    lines = markdown(report).splitlines()
    rows = [line for line in lines if line.startswith("| ocr")]
    assert rows[0].startswith("| ocr | FP32 | 2.60 CER % ↓ |  |  |  | 2.00 ms (short) | 4.00 |")
    assert "| -0.10 ± 0.20 | equal |  | 2.00x (short), 1.50x (long) | 1.00 | 2.0 | 300 |" in rows[1]
    assert rows[2] == r"| ocr | nncf | crashes: a\|b |  |  |  |  |  | 1.0 | 100 |"
    assert {line.count("|") - line.count(r"\|") for line in lines if line.startswith("|")} == {11}
    assert "* ort: skipped, no reason." in lines
    assert lines[-1].endswith("Not to be trusted: ocr, short: 1.20.")


def run_bench(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), *options], capture_output=True, text=True, check=False
    )


def test_without_the_kit_one_sentence_says_how_to_point_to_it(tmp_path: Path) -> None:
    done = run_bench("--eval", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "--eval DIR or the environment variable QCOMPILE_EVAL" in line


KIT = """
import argparse, json, sys
from pathlib import Path
import numpy as np, onnxruntime as ort

class Task:
    model = Path(__file__).with_name("tiny.onnx")
    def latency_feeds(self, session):
        return {"one": {"x": np.ones((1, 4, 8, 8), np.float32)}}

TASKS = {"imagenet": Task()}

def open_session(path, threads=2):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

def run(session, feed):
    return session.run(None, feed)

if __name__ == "__main__":
    if sys.argv[1] == "calib":
        out = Path(sys.argv[3]); out.mkdir()
        for i in range(3):
            np.savez(out / f"{i:04d}.npz", x=np.full((1, 4, 8, 8), i - 1, np.float32))
    else:
        open_session(sys.argv[3])
        answer = {"name": "top1 %", "value": 50.0, "sigma": 1.0, "n": 2}
        if "--fp32" in sys.argv:
            answer |= {"fp32": 50.0, "change": 0.0, "change_sigma": 0.1, "sqnr_db": 30.0, "agreement %": 99.0}
        print(json.dumps(answer))
"""


@pytest.mark.slow
def test_from_one_command_to_the_table(tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    kit.mkdir()
    (kit / "evaluate.py").write_text(textwrap.dedent(KIT), "utf-8")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((1, 4, 8, 8)))
    values = np.random.default_rng(0).standard_normal((4, 4, 1, 1)).astype(np.float32)
    w = ir.Value(name="w", const_value=ir.Tensor(values), shape=ir.Shape((4, 4, 1, 1)))
    node = ir.node("Conv", [x, w])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", x.type, x.shape
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 17}, name="g"
    )
    ir.save(ir.Model(graph, ir_version=8), kit / "tiny.onnx")

    done = run_bench(
        "--eval", str(kit), "--tasks", "imagenet", "--tools", "ort,nncf", "--nncf-python", sys.executable,
        "--seconds", "0.1", "--json", str(tmp_path / "b.json"), "--out", str(tmp_path / "b.md"),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b.md").read_text("utf-8") == done.stdout
    assert "| imagenet | ort | 50.00 top1 % | +0.00 ± 0.10 | 30.0 | 99.00 |" in done.stdout
    assert "* nncf: skipped, the interpreter given does not have it" in done.stdout
    assert str(tmp_path) not in done.stdout
    report = json.loads((tmp_path / "b.json").read_text("utf-8"))
    ort = report["tasks"]["imagenet"]["rows"][1]
    assert ort["peak_rss_mb"] > 20
    assert ort["latency"]["one"]["speedup"] > 0
