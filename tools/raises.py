"""Which errors that qcompile explains are raised by a test, and which by none.

    PYTHONPATH=. python tools/raises.py [--json FILE] [-- PYTEST ARGUMENTS]

Runs the tests in this process and notes where each `QcompileError` is made. What only a process of its own reaches is not
seen.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from qcompile.errors import QcompileError

ROOT = Path(__file__).parents[1]
TOPS = ("qcompile", "passes")
KINDS = frozenset(
    {"QcompileError", "ModelError", "DataError", "RecipeError", "OutputError", "PassError"}
)
Place = tuple[str, int]  # path from the root of the checkout, line


def raises(root: Path = ROOT) -> Iterator[tuple[Place, str, str]]:
    """Where each `raise` stands, its class, and the source of its message."""
    for top in TOPS:
        for path in sorted((root / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                    continue
                kind = ast.unparse(node.exc.func)
                if kind in KINDS:
                    text = ", ".join(map(ast.unparse, node.exc.args))
                    yield (path.relative_to(root).as_posix(), node.lineno), kind, text


class Watch:
    """Notes the lines of this checkout's modules at which an error of qcompile was made."""

    def __init__(self, lines: dict[Place, int]) -> None:
        self._lines, self.reached = lines, set[Place]()
        self._true = QcompileError.__init__

    def __enter__(self) -> Self:
        def note(error: QcompileError, *args: object) -> None:
            frame = sys._getframe(1)  # noqa: SLF001 - where the error is made
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                place = path.relative_to(ROOT).as_posix()
                start = self._lines.get((place, frame.f_lineno))
                if start is not None:
                    self.reached.add((place, start))
            self._true(error, *args)

        setattr(QcompileError, "__init__", note)  # noqa: B010 - mypy forbids the plain form
        return self

    def __exit__(self, *_: object) -> None:
        setattr(QcompileError, "__init__", self._true)  # noqa: B010


def _lines() -> dict[Place, int]:
    """Each line of a `raise` -> the line where it starts."""
    found = {}
    for top in TOPS:
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Raise):
                    for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                        found[path.relative_to(ROOT).as_posix(), line] = node.lineno
    return found


def main() -> int:
    """Prints a line a `raise` that no test reached, and the counts."""
    parser = argparse.ArgumentParser(description="List the errors that no test raises.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all places here as well")
    parser.add_argument("words", nargs="*", help="arguments of pytest, after --")
    args = parser.parse_args()
    with Watch(_lines()) as watch:
        code = pytest.main(["-q", *(args.words or [str(ROOT / "tests")])])
    found = list(raises())
    missed = [row for row in found if row[0] not in watch.reached]
    for (path, line), kind, text in missed:
        print(f"{path}:{line}: {kind}({text})")
    print(f"{len(found) - len(missed)} of {len(found)} reached by a test")
    if args.json:
        rows = [
            {"file": path, "line": line, "kind": kind, "message": text,
             "reached": (path, line) in watch.reached}
            for (path, line), kind, text in found
        ]  # fmt: skip
        args.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
