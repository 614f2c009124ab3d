"""Damaged files through every reader: an answer or a `QcompileError`, in bounded time and memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_files import READERS
from sandbox import Sandbox

if sys.platform != "linux":
    pytest.skip("limits of processes are those of Linux", allow_module_level=True)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(seconds=60) as made:
        yield made


@pytest.fixture(scope="module")
def whole(box: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files that are not damaged yet."""
    folder = tmp_path_factory.mktemp("whole")
    done = box.call("fuzz_files:build", str(folder), cwd=folder)
    assert done.code == 0, done
    return folder


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files(kind: str, box: Sandbox, whole: Path) -> None:
    count = 15 if kind.endswith("used") else 60
    done = box.call("fuzz_files:run", str(whole), kind, 0, count, cwd=whole)
    assert done.code == 0, done
    tried = json.loads(done.out.splitlines()[-1])
    assert tried["failures"] == []
    assert tried["read"] + tried["refused"] == count
    assert tried["refused"]
