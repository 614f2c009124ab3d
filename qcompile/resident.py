"""Anonymous memory of this process: what it must hold, beside pages of files that the system may drop and read again."""

from __future__ import annotations

import contextlib
import re
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS = Path("/proc/self/status")
_LINE = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)


def anonymous_bytes() -> int | None:
    """Anonymous memory that is resident now; None where the system does not tell (Linux does)."""
    with contextlib.suppress(OSError):
        found = _LINE.search(_STATUS.read_text("ascii", "replace"))
        return None if found is None else int(found[1]) * 1024
    return None


class Peak:
    """Within `with`, a thread looks at the anonymous memory again and again.

    Attributes:
        start: bytes at the beginning; None where the system does not tell.
        most: the most that was seen.
    """

    def __init__(self, every: float = 0.02) -> None:
        """`every` so many seconds it looks; peaks that are shorter may be missed."""
        self.start = self.most = anonymous_bytes()
        self._every, self._done = every, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        """Begins."""
        if self.start is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        """Ends, with a last look."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            self._look()

    def _look(self) -> None:
        now = anonymous_bytes()
        if now is not None and self.most is not None:
            self.most = max(self.most, now)
