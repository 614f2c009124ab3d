"""The ONNX backend suite through every recipe: `python tools/backend_suite.py [--case 'node/test_conv*'] [--recipe int4]`.

The cases are those that the `onnx` package brings and makes; `backend_cases` says which variants there are. Calibration
data is made from a case's own input. Models as `given` are compiled as a user would. In the other variants, and in
the given ones once more, everything that can be integer is made so, however small (`eager`): the target's costs say
that integer is free, and no product is too small; ranges are `minmax`, as the others may clip what is rare, and no node
is left float for accuracy. Where that finds nothing to quantize, the usual way has nothing either, and is not run again.
Nothing is timed: each result is said to be twice as fast.

| column | meaning |
|---|---|
| right | has integer nodes, is valid, has the same inputs and outputs, and an error below the bound of `backend_judge` |
| nothing | nothing to quantize: the result says so with a reason, and equals the float model |
| refused | an error of one sentence, and no file; without data also if the operator does not take the made-up input |
| wrong | an output is off by more than the bound, or another one |
| crashed | any other exception, a warning out of our code, no answer in time, or the process died |
| invalid | the checker or ONNX Runtime refuses the result, or its inputs or outputs are others |
| not ORT | ONNX Runtime does not run the float model, so nothing can be judged; a crash of qcompile still counts as one |

The aim is 0 in the columns wrong, crashed and invalid; with another number the exit code is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import multiprocessing
import multiprocessing.connection
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import backend_cases
from backend_judge import Judge, Runner, Verdict, usable
from backend_settings import SETTINGS, Setting, eager_target, recipe_of, untimed

OUTCOMES = ("right", "nothing", "refused", "wrong", "crashed", "invalid", "not ORT")
BAD = ("wrong", "crashed", "invalid")
SECONDS = 300.0  # for a case and recipe: the light models have up to 138 million weights
MADE_UP = "a made-up input (give real ones with --data) does not run: "
_INTEGER = ("static", "dynamic", "weight")


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one variant of one case under one setting."""

    case: str
    setting: str
    eager: bool
    outcome: str
    why: str
    seconds: float


def answer(case: backend_cases.Case, settings: Sequence[Setting], folder: Path) -> Iterator[Row]:
    """The rows of one variant of a case: of each setting, as a user would compile it and eagerly.

    Args:
        case: the variant.
        settings: that are run.
        folder: for files; `eager.toml` and results are written there.
    """
    calibrating, judging = backend_cases.samples(case)
    reason, repeats = "", True
    try:
        runner = Runner(case.model)
        calibrating, judging, repeats = usable(runner, calibrating, judging)
    except Exception as problem:  # noqa: BLE001 - ORT raises a dozen classes
        reason = str(problem).splitlines()[0][:200] if str(problem) else type(problem).__name__
    judge = None if reason else Judge(case.model, calibrating, judging, repeats=repeats)
    eager = eager_target(folder)
    for setting in settings:
        verdict = Verdict("")
        for target in (eager, None) if "+" not in case.name else (eager,):
            start = time.perf_counter()
            if verdict.outcome != "nothing":
                recipe = recipe_of(setting, target)
                verdict = _compiled(case, recipe, calibrating if setting.data else None, folder / "result.onnx", judge)  # fmt: skip
            if reason and verdict.outcome != "crashed":
                verdict = Verdict("not ORT", reason)
            seconds = time.perf_counter() - start
            yield Row(case.name, setting.name, target is not None, verdict.outcome, verdict.why, seconds)  # fmt: skip


def _compiled(
    case: backend_cases.Case, recipe: Any, feeds: Sequence[Any] | None, place: Path, judge: Judge | None
) -> Verdict:  # fmt: skip
    from qcompile import PassError, QcompileError, compile_model

    place.unlink(missing_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = compile_model(
                case.model, None if feeds is None else list(feeds), output=place, recipe=recipe
            )
    except PassError as problem:
        return Verdict("crashed", f"PassError: {problem}")
    except QcompileError as problem:
        return _refusal(str(problem), place, works=judge is not None)
    except BaseException as problem:  # noqa: BLE001 - whatever it is, it is what is looked for
        import traceback

        frame = traceback.extract_tb(problem.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return Verdict("crashed", f"{type(problem).__name__} at {where}: {str(problem)[:200]}")
    if judge is None:
        return Verdict("right")
    integer = sum(entry["form"] in _INTEGER for entry in result.plan)
    told = any(text.startswith("nothing was quantized: ") for text in result.warnings)
    if not integer and not told:
        return Verdict("wrong", f"nothing was quantized, and this is said: {result.verdict()}")
    calibrated = feeds is not None and recipe.static
    verdict = judge(place, integer, recipe.bits, calibrated=calibrated)
    if verdict.outcome == "nothing":
        return Verdict("nothing", result.warnings[0])
    return verdict


def _refusal(text: str, place: Path, *, works: bool) -> Verdict:
    if place.exists():
        return Verdict("crashed", f"refused, and a file was written: {text}")
    if not works or text.startswith(MADE_UP):  # whose end are words of ONNX Runtime
        return Verdict("refused", text)
    if "\n" in text or not text.endswith(".") or "defect of qcompile" in text:
        return Verdict("crashed", f"no sentence for a user: {text!r}")
    if "ONNX Runtime refuses" in text or "cannot run the model" in text:
        return Verdict("crashed", f"ONNX Runtime runs the float model, but: {text}")
    return Verdict("refused", text)


def _serve(pipe: Any, settings: Sequence[Setting]) -> None:
    """Answers the names of cases with their rows."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QCOMPILE_CACHE"] = str(Path(folder) / "cache")
        untimed()
        while (name := _next(pipe)) is not None:
            rows = []
            for case in backend_cases.variants(name):
                rows += answer(case, settings, Path(folder))
            pipe.send(rows)


def _next(pipe: Any) -> str | None:
    """The next name; None at the end, and where the parent died, whose end of the pipe others hold as well."""
    parent = os.getppid()
    while not pipe.poll(5):
        if os.getppid() != parent:
            return None
    name: str | None = pipe.recv()
    return name


@dataclasses.dataclass
class _Worker:
    """A process, the pipe to it, what it works on, and until when it has time."""

    process: Any
    pipe: Any
    name: str = ""
    deadline: float = 0.0

    @classmethod
    def start(cls, settings: Sequence[Setting]) -> _Worker:
        context = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def give(self, name: str, seconds: float) -> None:
        self.name, self.deadline = name, time.monotonic() + seconds
        self.pipe.send(name)

    def collect(self, settings: Sequence[Setting], limit: float) -> list[Row]:
        """The rows of the case; where there are none, the process has ended."""
        why = f"no answer after {limit:g} s"
        if self.pipe.poll():
            try:
                found: list[Row] = self.pipe.recv()
            except EOFError:
                self.process.join()
                why = f"the process died (exit code {self.process.exitcode})"
            else:
                return found
        self.process.kill()
        self.process.join()
        return [Row(self.name, s.name, True, "crashed", why, limit) for s in settings]


def run(
    names: Sequence[str], settings: Sequence[Setting], processes: int = 2,
    tick: Callable[[int, Sequence[Row]], None] = lambda done, rows: None,
    seconds: float = SECONDS,
) -> list[Row]:  # fmt: skip
    """The rows of all cases. A process that dies or takes too long costs only the case that it worked on.

    Args:
        names: of the cases.
        settings: that each is run with.
        processes: that work side by side.
        tick: is called with the number of cases done, and the rows of the last one.
        seconds: that a case may take with one setting.
    """
    todo, done = list(reversed(names)), 0
    rows: list[Row] = []
    limit = seconds * len(settings)
    workers = [_Worker.start(settings) for _ in range(min(processes, len(todo)))]
    for worker in workers:
        worker.give(todo.pop(), limit)
    while workers:
        ready = multiprocessing.connection.wait([worker.pipe for worker in workers], timeout=1)
        for worker in list(workers):
            if worker.pipe not in ready and time.monotonic() < worker.deadline:
                continue
            found = worker.collect(settings, limit)
            rows += found
            done += 1
            tick(done, found)
            if not worker.process.is_alive():
                workers.remove(worker)
                if todo:
                    workers.append(worker := _Worker.start(settings))
            if todo:
                worker.give(todo.pop(), limit)
            elif worker in workers:
                workers.remove(worker)
                worker.pipe.send(None)
                worker.process.join()
    order = {name: i for i, name in enumerate(names)}
    return sorted(rows, key=lambda row: (order[row.case.partition("+")[0]], row.case))


def counts(rows: Iterable[Row]) -> dict[tuple[str, str], Counter[str]]:
    """How many variants came out how, by setting and way."""
    table: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        way = "eager" if row.eager else "usual"
        table.setdefault((row.setting, way), Counter())[row.outcome] += 1
    return table


def markdown(rows: Sequence[Row]) -> str:
    """The table, and what is bad."""
    lines = [
        f"| recipe | way | models | {' | '.join(OUTCOMES)} |",
        f"|---|---|---:|{'---:|' * len(OUTCOMES)}",
    ]
    for (setting, way), found in counts(rows).items():
        cells = " | ".join(str(found[outcome]) for outcome in OUTCOMES)
        lines.append(f"| {setting} | {way} | {found.total()} | {cells} |")
    return "\n".join(lines) + "\n"


def bad(rows: Iterable[Row]) -> list[str]:
    """A line for each row that must not be."""
    return [
        f"{row.outcome}: {row.case}, {row.setting}{', eager' if row.eager else ''}: {row.why}"
        for row in rows
        if row.outcome in BAD
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", action="append", metavar="GLOB", help="of kind/name; all without it"
    )
    known = [setting.name for setting in SETTINGS]
    parser.add_argument(
        "--not", action="append", default=[], dest="out", metavar="GLOB", help="leaves out"
    )
    parser.add_argument("--recipe", action="append", choices=known, help="all without it")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="that a case may take with one recipe"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="every row; written again every 100 cases"
    )
    parser.add_argument(
        "--merge",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="rows of an earlier run, for cases and recipes that this one does not run; later files before earlier ones",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table as a page")
    given = parser.parse_args()
    globs = given.case or ["*"]

    def fits(name: str, globs: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs)

    names = [n for n in backend_cases.names() if fits(n, globs) and not fits(n, given.out)]
    settings = [s for s in SETTINGS if not given.recipe or s.name in given.recipe]
    if not names and not given.merge:
        parser.error(f"no case is like {' or '.join(globs)}")
    start = time.perf_counter()
    made: list[Row] = []

    def tick(done: int, found: Sequence[Row]) -> None:
        made.extend(found)
        for line in bad(found):
            print(line, file=sys.stderr, flush=True)
        if done % 100 == 0 or done == len(names):
            if given.json:
                write(given.json, made)
            seconds = time.perf_counter() - start
            print(f"{done} of {len(names)} cases, {seconds:.0f} s", file=sys.stderr)

    rows = run(names, settings, given.processes, tick, given.seconds)
    parts = [rows, *map(read, given.merge)]
    rows = merged(parts)
    wrong = bad(rows)
    print(markdown(rows), *wrong, sep="\n")
    if given.json:
        write(given.json, rows)
    if given.markdown:
        given.markdown.write_text(page(rows, sys.argv[1:]))
    return int(bool(wrong))


def write(file: Path, rows: Iterable[Row]) -> None:
    """The rows as JSON."""
    file.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=0))


def read(file: Path) -> list[Row]:
    """What `write` wrote."""
    return [Row(**row) for row in json.loads(file.read_text("utf-8"))]


def merged(parts: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of several runs in the order of the whole suite; a case and setting that several ran is the first one's."""
    owner: dict[tuple[str, str], int] = {}
    for number, rows in enumerate(parts):
        for row in rows:
            owner.setdefault((row.case.partition("+")[0], row.setting), number)
    cases = {name: i for i, name in enumerate(backend_cases.names())}
    settings = {setting.name: i for i, setting in enumerate(SETTINGS)}
    found = [
        row
        for number, rows in enumerate(parts)
        for row in rows
        if owner[row.case.partition("+")[0], row.setting] == number
    ]
    return sorted(
        found,
        key=lambda row: (
            cases.get(row.case.partition("+")[0], 0), row.case, settings[row.setting], not row.eager,
        ),
    )  # fmt: skip


def page(rows: Sequence[Row], words: Sequence[str]) -> str:
    """The table as a page of `docs/`."""
    import onnx
    import onnxruntime

    command = " ".join(["python tools/backend_suite.py", *map(shlex.quote, words)])
    cases = len({row.case.partition("+")[0] for row in rows})
    hours = sum(row.seconds for row in rows) / 3600
    wrong = bad(rows)
    return "\n".join(
        [
            "# The ONNX backend suite", "",
            f"Printed by `{command}`: {cases} cases of onnx {onnx.__version__}, in {len({row.case for row in rows})} "
            f"variants, with onnxruntime {onnxruntime.__version__}; {hours:.1f} hours of two busy cores.", "",
            markdown(rows), *(__doc__ or "").split("\n\n", 1)[1:],
            f"## What is wrong, crashed or invalid: {len(wrong)}", "", *(f"* {line}" for line in wrong),
        ]
    ).rstrip() + "\n"  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
