"""Which errors that qcompile explains are raised by a test, and whose sentence a test looks at.

    PYTHONPATH=. python tools/raises.py [--sentences] [--json FILE] [-- PYTEST ARGUMENTS]

Runs the tests in this process and notes where each `QcompileError`, and each error of an option, is made. What only a
process of its own reaches is not seen. With `--sentences` the tests that reach one run again, with "?" for each sentence:
who looks at it fails. Where such a test reaches several, it runs once more for each of these, which alone says "?".
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from qcompile import errors
from qcompile.errors import QcompileError

ROOT = Path(__file__).parents[1]
TOPS = ("qcompile", "passes")
KINDS = frozenset(
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, QcompileError)
) | {"no_room", "argparse.ArgumentTypeError"}
Place = tuple[str, int]  # path from the root of the checkout, line


def _errors(root: Path) -> Iterator[tuple[str, ast.Raise, ast.Call]]:
    """Each `raise` of an error with a sentence: its file, itself, and what makes the error."""
    for top in TOPS:
        for path in sorted((root / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                    continue
                if ast.unparse(node.exc.func) in KINDS:
                    yield path.relative_to(root).as_posix(), node, node.exc


def raises(root: Path = ROOT) -> Iterator[tuple[Place, str, str]]:
    """Where each `raise` stands, its class, and the source of its message."""
    for file, node, made in _errors(root):
        text = ", ".join(map(ast.unparse, made.args))
        yield (file, node.lineno), ast.unparse(made.func), text


def _lines() -> dict[Place, int]:
    """Each line of a `raise` -> the line where it starts."""
    return {
        (file, line): node.lineno
        for file, node, _ in _errors(ROOT)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


class Watch:
    """A plugin of pytest that notes which test makes an error at which place of this checkout, and which tests fail.

    Errors made at a place in `hidden` say "?".
    """

    def __init__(self, lines: Mapping[Place, int], hidden: Collection[Place] = ()) -> None:
        self._lines, self._hidden = lines, hidden
        self.reached: dict[Place, set[str]] = defaultdict(set)
        self.failed: set[str] = set()
        self._test = ""
        self._true = {kind: kind.__init__ for kind in (QcompileError, argparse.ArgumentTypeError)}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._test = nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def _place(self) -> Place | None:
        """The `raise` nearest to what makes an error, which `no_room` may."""
        frame = sys._getframe(2)  # noqa: SLF001 - where the error is made
        if Path(frame.f_code.co_filename).name == "errors.py" and frame.f_back is not None:
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(ROOT):
            return None
        file = path.relative_to(ROOT).as_posix()
        start = self._lines.get((file, frame.f_lineno))
        return None if start is None else (file, start)

    def __enter__(self) -> Self:
        for kind, true in self._true.items():

            def note(error: Exception, *args: object, true: Any = true) -> None:
                place = self._place()
                if place is not None:
                    self.reached[place].add(self._test)
                true(error, *(["?"] if place in self._hidden else args))

            setattr(kind, "__init__", note)  # noqa: B010 - mypy forbids the plain form
        return self

    def __exit__(self, *_: object) -> None:
        for kind, true in self._true.items():
            setattr(kind, "__init__", true)  # noqa: B010


def watched(
    lines: Mapping[Place, int], words: Sequence[str], hidden: Collection[Place] = (), *, quiet: bool
) -> Watch:
    """A run of tests."""
    with Watch(lines, hidden) as watch, contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        pytest.main(["-q", "-p", "no:cacheprovider", *words], plugins=[watch])
    return watch


def looked_at(lines: Mapping[Place, int], first: Watch) -> set[Place]:
    """The places whose sentence a test looks at, which fails without it."""
    tests = sorted(set().union(*first.reached.values()) - first.failed - {""})
    places = set(first.reached)
    failed = watched(lines, tests, places, quiet=True).failed - first.failed if tests else set()
    by_test: dict[str, set[Place]] = defaultdict(set)
    for place, found in first.reached.items():
        for test in found & failed:
            by_test[test].add(place)
    sure = {place for found in by_test.values() if len(found) == 1 for place in found}
    for place in sorted(set().union(*by_test.values()) - sure):
        candidates = sorted(first.reached[place] & failed)
        if watched(lines, candidates, {place}, quiet=True).failed:
            sure.add(place)
    return sure


def main() -> int:
    """Prints a line a `raise` that no test reached, or looks at, and the counts."""
    parser = argparse.ArgumentParser(description="List the errors that no test raises.")
    parser.add_argument("--sentences", action="store_true", help="whose sentence no test looks at")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all places here as well")
    parser.add_argument("words", nargs="*", help="arguments of pytest, after --")
    args = parser.parse_args()
    lines = _lines()
    watch = watched(lines, args.words or [str(ROOT / "tests")], quiet=False)
    seen = looked_at(lines, watch) if args.sentences else set(watch.reached)
    found = list(raises())
    for (path, line), kind, text in found:
        place = (path, line)
        if place not in seen:
            what = "sentence not looked at" if place in watch.reached else "not reached"
            print(f"{path}:{line}: {what}: {kind}({text})")
    reached = sum(row[0] in watch.reached for row in found)
    told = f", the sentence of {sum(row[0] in seen for row in found)} looked at"
    print(f"{reached} of {len(found)} reached by a test{told if args.sentences else ''}")
    if args.json:
        rows = [
            {"file": place[0], "line": place[1], "kind": kind, "message": text,
             "reached": sorted(watch.reached.get(place, ())), "looked_at": place in seen}
            for place, kind, text in found
        ]  # fmt: skip
        args.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return int(bool(watch.failed))


if __name__ == "__main__":
    sys.exit(main())
