"""Signals that end the program become an exception, so that what it began is cleaned up. No heavy imports."""

from __future__ import annotations

import signal
import time
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last
_PATIENCE = 5.0  # seconds that a clean-up may take before another signal ends it


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end.

    Attributes:
        code: the exit code that shells expect: 128 and the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


def catch() -> None:
    """From now on the signals raise `Interrupted` in the main thread; those that are ignored stay so (`nohup`).

    One that comes within some seconds of another is ignored: it would end the clean-up after the first.
    """
    last = -_PATIENCE

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        del frame
        now = time.monotonic()
        if now - last >= _PATIENCE:
            last = now
            raise Interrupted(number)

    for number in _numbers():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def ignore() -> None:
    """From now on the signals do nothing: all is done but to leave."""
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)


def _numbers() -> list[signal.Signals]:
    return [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
