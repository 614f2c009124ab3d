"""A store of measurements on disk: what this machine's kernels take need not be measured twice.

One JSON file for each version of ONNX Runtime, CPU, set of instructions and number of threads, for times
hold for nothing else. It holds hashes and numbers only. A file that is broken, or of another machine, counts
as empty; a folder that cannot be written is no error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qcompile.run.session import version
from qcompile.targets.schema import cpu_flags

logger = logging.getLogger(__name__)

FORMAT = 1  # of the file, and of what the numbers in it mean
_MOST = 20_000  # entries that are kept, the newest
Numbers = tuple[float, ...]


def cache_folder() -> Path | None:
    """Where measurements are kept; None where `QCOMPILE_CACHE` is empty or `off`, or there is no home."""
    own = os.environ.get("QCOMPILE_CACHE")
    if own is not None:
        return None if own.strip().lower() in ("", "off") else Path(own)
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    if base:
        return Path(base) / "qcompile"
    try:
        return Path.home() / ".cache" / "qcompile"
    except RuntimeError:
        return None


@dataclasses.dataclass
class Cache:
    """Numbers by signature, in a file that other processes may write too.

    Attributes:
        path: the file; None keeps nothing.
        machine: what the file must say that it is of.
    """

    path: Path | None
    machine: str
    _known: dict[str, Numbers] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Reads the file, if it can be."""
        self._known = self._read()

    def get(self, key: str) -> Numbers | None:
        """The numbers under a signature, if they are known."""
        return self._known.get(key)

    def add(self, entries: Mapping[str, Numbers]) -> None:
        """Keeps these too, beside what others wrote meanwhile. The file is replaced at once, or not at all."""
        self._known = {**self._known, **self._read(), **entries}
        self._known = dict(list(self._known.items())[-_MOST:])
        if self.path is None or not entries:
            return
        text = json.dumps({"format": FORMAT, "machine": self.machine, "times": self._known})
        try:
            _replace(self.path, text)
        except OSError as error:
            logger.info("measured times are not kept: %s", error.strerror or error)

    def _read(self) -> dict[str, Numbers]:
        if self.path is None:
            return {}
        try:
            table = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            logger.info("measured times that cannot be read are ignored: %s", error)
            return {}
        if not isinstance(table, dict) or table.get("format") != FORMAT:
            return {}
        times = table.get("times")
        if table.get("machine") != self.machine or not isinstance(times, dict):
            return {}
        return {key: tuple(map(float, row)) for key, row in times.items() if _is_row(row)}


def open_cache(threads: int) -> Cache:
    """The store of this machine for sessions with so many threads."""
    folder, machine = cache_folder(), _machine(threads)
    name = f"times-{FORMAT}-ort-{version()}-threads-{threads}-{machine}.json"
    return Cache(None if folder is None else folder / name, machine)


def _machine(threads: int) -> str:
    cores = os.cpu_count() if threads == 0 else threads  # 0: ORT takes them all
    words = [str(FORMAT), version(), _cpu(), " ".join(sorted(cpu_flags())), str(cores)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _cpu() -> str:
    """The name of the CPU's model."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return f"{platform.machine()} {platform.processor()}"


def _is_row(row: object) -> bool:
    return isinstance(row, list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < math.inf for x in row
    )


def _replace(path: Path, text: str) -> None:
    """Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)  # noqa: PTH105 - the name is not a Path
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
