"""Runs calls in forked processes with limits, so that a crash, a loop or a huge allocation is an answer, too.

Run as a program it serves requests, one JSON object a line. It imports qcompile once and forks for each request:
a fork costs milliseconds where a fresh Python with its imports costs seconds. No session of ORT is ever made in
the server itself, so no thread is lost in a fork.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
MEMORY, SECONDS = 1 << 30, 20  # address space beyond what the server has; seconds of CPU time


@dataclasses.dataclass(frozen=True)
class Done:
    """What became of a call.

    Attributes:
        code: its exit code; the negative number of the signal that ended it.
        out, err: what it printed; a traceback is part of `err`.
        peak: most resident bytes beyond those of the server.
        seconds: of CPU time.
    """

    code: int
    out: str
    err: str
    peak: int
    seconds: float

    @property
    def crashed(self) -> bool:
        """Whether it ended otherwise than with an answer or a sentence."""
        return self.code not in (0, 2, 3, 4) or "Traceback" in self.err


class Sandbox:
    """The server, as a context."""

    def __init__(self, *, memory: int = MEMORY, seconds: int = SECONDS) -> None:
        self._memory, self._seconds = memory, seconds
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1",
                 "MALLOC_ARENA_MAX": "2"},
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.communicate()

    def command(self, *words: str | Path, cwd: Path, memory: int | None = None) -> Done:
        """`qcompile` with these words, quietly, in a folder."""
        return self._ask(
            {"words": [*map(str, words), "-q"], "cwd": str(cwd), "memory": memory or self._memory}
        )

    def call(self, function: str, *args: Any, cwd: Path, memory: int | None = None) -> Done:
        """`module:function` of the tests, with arguments that JSON can hold; what it returns is printed as JSON."""
        return self._ask(
            {
                "call": function,
                "args": list(args),
                "cwd": str(cwd),
                "memory": memory or self._memory,
            }
        )

    def _ask(self, request: dict[str, Any]) -> Done:
        assert self._server is not None and self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps({**request, "seconds": self._seconds}) + "\n")
        self._server.stdin.flush()
        return Done(**json.loads(self._server.stdout.readline()))


def _serve() -> None:
    import qcompile.commands
    import qcompile.compiler
    import qcompile.layers  # noqa: F401 - all that is heavy, once

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in sys.stdin:
        answers.write(json.dumps(dataclasses.asdict(_forked(json.loads(line)))) + "\n")
        answers.flush()


def _forked(request: dict[str, Any]) -> Done:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(_child(request))
        _, status, used = os.wait4(child, 0)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read(1 << 20).decode("utf-8", "replace"))
        return Done(
            os.waitstatus_to_exitcode(status), *texts, max(0, used.ru_maxrss - before) << 10,
            used.ru_utime + used.ru_stime,
        )  # fmt: skip


def _child(request: dict[str, Any]) -> int:
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + request["memory"])
        _limit(resource.RLIMIT_CPU, request["seconds"])
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_FSIZE, 1 << 30)
        code = _run(request)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - what else it raises is the finding
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _limit(kind: int, most: int) -> None:
    resource.setrlimit(kind, (most, most))


def _run(request: dict[str, Any]) -> int:
    if "words" in request:
        from qcompile.cli import main

        return main(request["words"])
    import importlib

    module, _, name = request["call"].partition(":")
    json.dump(getattr(importlib.import_module(module), name)(*request["args"]), sys.stdout)
    return 0


if __name__ == "__main__":
    _serve()
