"""Anonymous memory, as Linux tells it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qcompile import resident
from qcompile.resident import Peak, anonymous_bytes

linux = pytest.mark.skipif(anonymous_bytes() is None, reason="this system does not tell it")


# More than malloc ever serves from memory that was freed before (32 MiB with glibc): it must come from the system.
SIZE = 64_000_000


@linux
def test_memory_that_was_given_back_counts() -> None:
    with Peak() as peak:
        held = np.ones(SIZE, np.uint8)
        peak._look()
        del held
    assert peak.start is not None
    assert peak.most is not None
    assert SIZE <= peak.most - peak.start < 2 * SIZE


_WATCHED = """
import numpy as np
from qcompile.resident import Peak
with Peak(every=0.001) as peak:
    held = np.ones(64_000_000, np.uint8)
    for _ in range(3000):  # enough for a thread that looks every millisecond; an end for one that does not
        if peak.most - peak.start >= len(held) / 2:
            break
        held[0] += peak._done.wait(0.01)
    seen = peak.most
print(seen - peak.start, peak._thread.is_alive())
"""


@linux
def test_the_thread_looks_by_itself_and_ends() -> None:
    # a process of its own: what other tests have left might be given back meanwhile
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED], capture_output=True, text=True, check=True, timeout=120
    )
    grown, alive = done.stdout.split()
    assert int(grown) >= SIZE / 2
    assert alive == "False"


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for text in (None, "VmRSS: 12 kB\n"):
        if text is not None:
            (tmp_path / "status").write_text(text)
        monkeypatch.setattr(resident, "_STATUS", tmp_path / "status")
        with Peak() as peak:
            pass
        assert (peak.start, peak.most) == (None, None)


def test_the_line_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "status").write_text("VmRSS:\t 99 kB\nRssAnon:\t   1234 kB\nRssFile:\t 5 kB\n")
    monkeypatch.setattr(resident, "_STATUS", tmp_path / "status")
    assert anonymous_bytes() == 1234 * 1024
