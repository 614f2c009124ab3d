"""One command, run to its end or to a time limit, with its wall time and its peak memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ERROR = re.compile(
    r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Fail|Exit|Interrupt|NotImplemented|InvalidGraph)\w*)\b:? ?(.*)"
)
_ORT = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from \S+ failed:)?")
_PATH = re.compile(r"(?:/[\w.+@%=-]+)+/([\w.+@%=-]+)")


@dataclasses.dataclass(frozen=True)
class Finished:
    """A command that ended.

    Attributes:
        code: its exit code, negative for a signal; None if the time limit stopped it.
        out, err: what it wrote.
        seconds: wall time.
        peak_mb: greatest resident memory, in MB of 1e6 bytes, of it or of any one of its children.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    peak_mb: float

    def json(self) -> dict[str, Any]:
        """The last JSON object printed, {} if there is none: libraries print lines of their own before it."""
        lines = self.out.splitlines(keepends=True)
        for start in range(len(lines) - 1, -1, -1):
            if lines[start].startswith("{"):
                with contextlib.suppress(ValueError):
                    answer: dict[str, Any] = json.loads("".join(lines[start:]))
                    return answer
        return {}

    def why(self) -> str:
        """Why it failed, in a line without paths of this machine."""
        if self.code is None:
            return f"not done after {self.seconds:.0f} s"
        if self.code < 0:
            return f"crashes: killed by {signal.Signals(-self.code).name}"
        return f"crashes: {reason(self.err) or f'exit code {self.code}'}"


def measured(
    command: Sequence[str],
    *,
    limit: float,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Finished:
    """The command's end; it and its children are killed after `limit` seconds.

    The caller should be small: Linux counts what a process has before its own program is loaded, which is
    its parent's memory, towards its peak.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=folder,
            env={**os.environ, **(env or {})}, start_new_session=True,
        )  # fmt: skip
        late = threading.Event()

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # interrupted: no child may outlive us
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        code = None if late.is_set() else process.returncode
        return Finished(code, out.read(), err.read(), seconds, usage.ru_maxrss * 1024 / 1e6)


def reason(text: str) -> str:
    """The last error message in the text of a traceback, else its last line; short, without folders."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = next((m for line in reversed(lines) if (m := _ERROR.match(line))), None)
    if found is not None:
        line = f"{found[1]}: {found[2]}" if found[2] else found[1]
    else:
        line = lines[-1] if lines else ""
    line = _ORT.sub("", _PATH.sub(r"\1", line))
    return line if len(line) <= 160 else line[:157] + "..."
