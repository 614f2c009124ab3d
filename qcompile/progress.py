"""Progress on stderr: stage, count and time left. Silent where nobody watches."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

Step = Callable[[int, int | None], None]


class Progress(Protocol):
    """Shows how far a compilation is."""

    def stage(
        self, title: str, total: int | None = None
    ) -> contextlib.AbstractContextManager[Step]:
        """A stage of `total` steps; the value it yields is called with (steps done, new total or None)."""


class Silent:
    """Shows nothing."""

    @contextlib.contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Step]:
        """See `Progress`."""
        del title, total
        yield lambda done, new_total: None


class Bar:
    """A bar with count and time left on a terminal; one line a stage elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()

    @contextlib.contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Step]:
        """See `Progress`."""
        if not self._terminal:
            start = time.perf_counter()
            yield lambda done, new_total: None
            with contextlib.suppress(OSError):  # a log that is full is no reason to stop
                sys.stderr.write(f"{title}: {time.perf_counter() - start:.1f} s\n")
            return
        from rich.console import Console  # noqa: PLC0415 - keeps `qcompile --help` quick
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415
        from rich.progress import Progress as RichProgress  # noqa: PLC0415

        columns = [
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        ]
        with RichProgress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(title, total=total)

            def step(done: int, new_total: int | None) -> None:
                if new_total is not None:
                    bars.update(task, total=new_total)
                bars.advance(task, done)

            yield step
