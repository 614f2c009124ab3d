"""The command in a process of its own: what it imports, its streams, its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from networks import conv_net, linear_net, samples, save

from qcompile.options import COMMANDS

HEAVY = (
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "rich",
    "scipy",
    "PIL",
    "tokenizers",
    "ml_dtypes",
)


def python(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python that imports qcompile from this checkout, warnings being errors."""
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, **environment}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True,
        encoding="utf-8", timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model and its samples."""
    save(conv_net(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=samples())
    return tmp_path


@pytest.mark.parametrize("words", [[], ["--help"], *([c, "--help"] for c in COMMANDS), ["--foo"]])
def test_help_is_light(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, contextlib, io\n"
        "import qcompile.cli\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        f"    qcompile.cli.main({words!r})\n"
        f"print(sorted(set(sys.modules) & set({HEAVY!r})))\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout == "[]\n", done


def test_package_is_light(tmp_path: Path) -> None:
    code = f"import sys, qcompile; dir(qcompile); print(sorted(set(sys.modules) & set({HEAVY!r})))"
    assert python("-c", code, cwd=tmp_path).stdout == "[]\n"


def test_compile_and_json(folder: Path) -> None:
    done = python(
        "-W", "error", "-m", "qcompile", "m.onnx", "--data", "d.npz", "--json", cwd=folder
    )
    assert done.returncode in (0, 4), done  # this machine may be too busy to tell which is faster
    table = json.loads(done.stdout)
    assert table["output"] == "m.int8.onnx"
    assert done.stderr.startswith("loading: ")
    assert {path.name for path in folder.iterdir()} == {"m.onnx", "d.npz", "m.int8.onnx"}


def test_wrong_input(folder: Path) -> None:
    done = python("-m", "qcompile", "m.onnx", "--data", "none.npz", cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(
        "qcompile: there is no calibration data at 'none.npz'"
    )
    assert "Traceback" not in done.stderr
    assert {path.name for path in folder.iterdir()} == {"m.onnx", "d.npz"}


@pytest.mark.parametrize("words", [["m.onnx"], ["plan", "m.onnx"], ["inspect", "m.onnx"]])
def test_without_onnxruntime(folder: Path, words: list[str]) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        f"from qcompile.cli import main; sys.exit(main({words!r}))"
    )
    done = python("-c", code, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "qcompile: ONNX Runtime is not installed: run `pip install qcompile-onnx[cpu]`, or [cuda] instead of [cpu].\n"
    )


def test_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    save(linear_net(), tmp_path / "größe.onnx")
    words = ["-m", "qcompile", "plan", "größe.onnx", "-q", "-o", "plän.json"]
    done = python(*words, cwd=tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done
    assert "pl\\xe4n.json" in done.stdout
    done = python("-m", "qcompile", "nö.onnx", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.stderr.startswith("qcompile: n\\xf6.onnx does not exist")


def test_reader_that_leaves_early(folder: Path) -> None:
    words = f"{sys.executable} -m qcompile plan m.onnx --json -q"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} | true; echo $?"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "0\n"
    assert done.stderr == ""
