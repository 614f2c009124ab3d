"""Fixtures for the tests of whole commands."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from networks import conv_net, samples, save

from qcompile.cli import main

# The same examples on every machine, however slow it is.
settings.register_profile("qcompile", database=None, deadline=None, derandomize=True)
settings.load_profile("qcompile")


@dataclass(frozen=True)
class Run:
    """What a command did: its exit code, what it printed, and the files that appeared meanwhile."""

    code: int
    out: str
    err: str
    new: list[str]


class Desk:
    """A working folder with `m.onnx` and `d.npz`, where commands run in this process."""

    def __init__(self, folder: Path, temp: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._temp, self._capsys = folder, temp, capsys

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def files(self) -> list[str]:
        """Everything in the working folder and the folder for temporary files."""
        if any(self._temp.iterdir()):
            gc.collect()
        places = [*self.folder.rglob("*"), *self._temp.rglob("*")]
        return sorted(str(place.relative_to(self.folder.parent)) for place in places)

    def run(self, *words: str | Path) -> Run:
        """The command, without progress."""
        before = set(self.files())
        self._capsys.readouterr()
        code = main([*map(str, words), "-q"])
        out, err = self._capsys.readouterr()
        return Run(code, out, err, [name for name in self.files() if name not in before])

    def compiled(self, *words: str | Path, code: int = 0) -> dict[str, Any]:
        """What `qcompile m.onnx --data d.npz` and more words print as JSON."""
        done = self.run("m.onnx", "--data", "d.npz", "--json", *words)
        assert done.code == code, done
        assert done.err == ""
        table: dict[str, Any] = json.loads(done.out)
        assert table["exit_code"] == code
        return table

    def refused(self, *words: str | Path) -> str:
        """The sentence with which the command ends, having written nothing."""
        done = self.run(*words)
        assert done.code == 2, done
        assert done.new == []
        assert done.out == ""
        assert done.err.startswith("qcompile: ")
        assert done.err.count("\n") == 1
        assert "Traceback" not in done.err
        return done.err.removeprefix("qcompile: ").rstrip()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured times of tests are kept in a folder of the tests."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _costs_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans follow from the target's costs: times measured on a busy machine would decide otherwise now and then.

    `test_timing` measures; what it tests, the method that this replaces among it, was imported before.
    """
    monkeypatch.setattr("qcompile.workshop.Workshop.timed", lambda shop, request: request)


@pytest.fixture
def desk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Desk:
    """A working folder: the current one, with a small model, its samples, and nothing else."""
    folder, temp = tmp_path / "work", tmp_path / "temp"
    folder.mkdir()
    temp.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    save(conv_net(), folder / "m.onnx")
    np.savez(folder / "d.npz", x=samples())
    return Desk(folder, temp, capsys)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Instead of timing, each result is twice as fast as the float model, or so much as one says."""
    import qcompile.commands
    import qcompile.compiler
    from qcompile.verify import latency

    true_race = latency.race

    def set_speed(speedup: float) -> None:
        def race(sessions: Mapping[str, Any], feed: object, **_: object) -> latency.Timing:
            first, *others = sessions
            speeds = {first: 1.0} | dict.fromkeys(others, speedup)
            return latency.Timing({n: 2.0 / s for n, s in speeds.items()}, speeds, 3)

        for name, module in list(sys.modules.items()):
            if name.startswith("qcompile") and hasattr(module, "race"):
                monkeypatch.setattr(module, "race", race)

    assert vars(qcompile.commands)["race"] is true_race
    set_speed(2.0)
    return set_speed
