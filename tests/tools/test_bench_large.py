"""The benchmark of large models, on small ones."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import bench_large
import pytest
from make_llama import SIZES, Shape, make_chain


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    true = make_chain
    monkeypatch.setattr(bench_large, "make_chain", lambda path, count, width: true(path, 2, 64))
    monkeypatch.setitem(SIZES, "7B", Shape(1, 64, 96, 80))


def test_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lines.json"
    words = [
        "bench_large.py",
        "--cases",
        "7B",
        "--folder",
        str(tmp_path),
        "--peer",
        "60",
        "--json",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", words)
    bench_large.main()
    ours, peer = json.loads(out.read_text())
    assert (ours["by"], ours["bits"], ours["block"], ours["checks"]) == ("qcompile", 4, 32, 8)
    assert ours["after"] < ours["before"]
    assert ours["peak"] > ours["growth"] >= 0
    assert peer["by"] == "onnxruntime"
    assert "failed" not in peer
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["lines.json"]


def test_a_run_that_fails_or_takes_too_long(tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    assert "ZeroDivisionError" in bench_large.run("1 / 0", source, 4, 32, 60)["failed"]
    slow = bench_large.run("import time; time.sleep(60)", source, 4, 32, 0.2)
    assert slow["failed"].startswith("not done after")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def usage(_: Any) -> Any:
        return shutil._ntuple_diskusage(10, 9, 1)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(sys, "argv", ["bench_large.py", "--folder", str(tmp_path)])
    bench_large.main()
    assert capsys.readouterr().out.count("left out: 0.0 GiB are free, 6 needed") == 2
