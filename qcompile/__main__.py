"""The console script, and `python -m qcompile`. Signals first: the rest takes a moment to import."""

from __future__ import annotations

import sys

from qcompile.interrupt import catch, ignore


def entry() -> None:
    """Runs the command line; ends the process with its exit code."""
    try:
        catch()
        from qcompile.cli import run  # noqa: PLC0415

        code = run()
    except KeyboardInterrupt as error:
        sys.stderr.write("qcompile: interrupted.\n")
        code = getattr(error, "code", 130)
    ignore()
    sys.exit(code)


if __name__ == "__main__":
    entry()
