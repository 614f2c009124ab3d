"""The command line: options in, a table or JSON out. No logic of its own; heavy imports wait."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.errors import (
    LimitError,
    OutputError,
    PassError,
    QcompileError,
    RecipeError,
    printable,
)
from qcompile.option_groups import SWITCHES
from qcompile.options import COMMANDS, parser_of, recipe_of

if TYPE_CHECKING:
    from qcompile.progress import Progress

SUFFIX = ".stats"  # of statistics, as `qcompile.calib.statistics` has it


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command found out: its exit code, a JSON-able table, and how people see it."""

    code: int
    table: dict[str, Any]
    show: Callable[[], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code. Prints the answer, or one sentence on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.getLogger("onnx_ir").addHandler(logging.NullHandler())  # it warns of what ORT refuses
    try:
        return _run(words)
    except (PassError, BrokenPipeError):
        raise  # a defect of ours, whose traceback is wanted; a reader that has seen enough
    except SystemExit as error:
        if error.code in (0, 2) or not isinstance(error.code, int):
            raise  # --help, or an option that argparse refuses
        return _fail(2, f"a data function ended the program with exit code {error.code}.")
    except LimitError as error:
        return _fail(3, str(error))
    except (QcompileError, OSError) as error:
        if os.environ.get("QCOMPILE_DEBUG"):
            raise
        if isinstance(error, FileNotFoundError):
            return _fail(
                2, f"{Path(str(error.filename))} does not exist, or was removed meanwhile."
            )
        return _fail(2, str(error))
    except ImportError as error:
        if os.environ.get("QCOMPILE_DEBUG"):
            raise
        return _fail(2, _not_installed(error))
    except MemoryError as error:
        if os.environ.get("QCOMPILE_DEBUG"):
            raise
        return _fail(
            2,
            f"there is not enough memory{_said(error)}: free some, or give a smaller model or fewer samples.",
        )
    except RecursionError:
        if os.environ.get("QCOMPILE_DEBUG"):
            raise
        return _fail(2, "the model is nested too deeply: export it with fewer bodies in bodies.")
    except KeyboardInterrupt as error:
        return _fail(getattr(error, "code", 130), "interrupted.")


def run() -> int:
    """`main` for a process of its own: whatever becomes of its streams, the exit code tells how it went."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for good
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is no error
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    try:
        return main()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _drop()
        return 0


def _drop() -> None:
    """What still waits for stdout goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: list[str]) -> int:
    command = words[0] if words and words[0] in COMMANDS else "compile"
    rest = words if command == "compile" else words[1:]
    late = next((word for word in rest[1:] if word in COMMANDS), None)
    parser = parser_of(command)
    try:
        args = parser.read(rest)
        args.words = rest
    except RecipeError as error:
        if late is None or command != "compile":
            raise
        raise RecipeError(f"the command comes first: qcompile {late} ...") from error
    with contextlib.redirect_stdout(sys.stderr):  # a user's data function may print
        answer = _RUN[command](args)
    try:
        if args.json:
            print(json.dumps(answer.table, indent=1, allow_nan=False))  # noqa: T201 - what stdout is for
        else:
            answer.show()
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop()
        raise OutputError(
            f"the answer could not be printed: {error.strerror}. The files asked for are written."
        ) from error
    return answer.code


def _fail(code: int, sentence: str) -> int:
    with contextlib.suppress(OSError):  # then the exit code has to tell it
        sys.stderr.write(f"qcompile: {printable(sentence)}\n")
    return code


def _said(error: BaseException) -> str:
    text = str(error).rstrip(".")
    return f" ({text})" if text else ""


def _not_installed(error: ImportError) -> str:
    if (error.name or "").partition(".")[0] == "onnxruntime":
        return (
            "ONNX Runtime is not installed: run `pip install qcompile-onnx[cpu]`, or [cuda] instead"
            " of [cpu]."
        )
    return f"a package that qcompile needs cannot be imported ({error}): install qcompile-onnx[cpu] anew."


def _progress(args: argparse.Namespace) -> Progress:
    from qcompile.progress import Bar, Silent  # noqa: PLC0415

    return Silent() if args.quiet else Bar()


def _run_compile(args: argparse.Namespace) -> Answer:
    from qcompile.compiler import compile_model  # noqa: PLC0415
    from qcompile.graph.publish import check_apart  # noqa: PLC0415
    from qcompile.plan.plan import load_plan  # noqa: PLC0415
    from qcompile.show import show_result  # noqa: PLC0415

    if args.plan is not None and args.output is not None:
        check_apart(args.output, {"the plan": args.plan})
    result = compile_model(
        args.model, args.data, output=args.output, recipe=recipe_of(args),
        plan=None if args.plan is None else load_plan(args.plan), report=args.report,
        progress=_progress(args), stats=args.stats, force=args.force,
    )  # fmt: skip
    if (
        result.exit_code in (0, 4) and (args.data or args.stats) is not None
    ):  # what was given stays given
        if args.report is None:
            command = f"qcompile {shlex.join([*args.words, '--report', 'report/'])}   # every node, its kernel and its reason"
        else:
            command = f"read {args.report / 'report.md'}: every node, its kernel and its reason"
        result = dataclasses.replace(result, next_command=command)
    return Answer(result.exit_code, dataclasses.asdict(result), lambda: show_result(result))


def _run_calibrate(args: argparse.Namespace) -> Answer:
    from qcompile.calib.ranges import METHODS  # noqa: PLC0415
    from qcompile.calibrate import calibrate_model  # noqa: PLC0415
    from qcompile.show import SHOWN, show_calibration  # noqa: PLC0415
    from qcompile.survey import survey  # noqa: PLC0415

    made = calibrate_model(
        args.model, args.data, output=args.output, merged=args.merge, recipe=recipe_of(args),
        target=args.target, held_out=args.held_out, gram=args.gram, force=args.force,
        progress=_progress(args),
    )  # fmt: skip
    table = survey(made.statistics, METHODS if args.json else (SHOWN,))
    table |= {
        "output": str(made.output), "passes": made.passes, "together": made.together,
        "notes": list(made.notes),
    }  # fmt: skip
    return Answer(0, table, lambda: show_calibration(table, args.model))


def _run_plan(args: argparse.Namespace) -> Answer:
    from qcompile.commands import plan_model  # noqa: PLC0415
    from qcompile.show import show_plan  # noqa: PLC0415

    plan = plan_model(
        args.model, args.data, recipe_of(args), _progress(args), forms=args.plan, output=args.output
    )
    return Answer(0, json.loads(plan.to_json()), lambda: show_plan(plan, args.model, args.output))


def _run_inspect(args: argparse.Namespace) -> Answer:
    from qcompile.commands import inspect_model  # noqa: PLC0415
    from qcompile.show import show_table  # noqa: PLC0415

    if args.layers:
        return _run_layers(args)
    known = ("model", "json", "quiet", "layers", "words")
    more = [k for k, v in vars(args).items() if k not in known and v is not None and v != []]
    if more:
        option = f"no-{more[0]}" if more[0] in SWITCHES else more[0]
        raise RecipeError(
            f"--{option.replace('_', '-')} is for --layers: add that, or leave it out."
        )
    if args.model.endswith(SUFFIX):
        from qcompile.calib.store import load  # noqa: PLC0415
        from qcompile.show import show_calibration  # noqa: PLC0415
        from qcompile.survey import survey  # noqa: PLC0415

        found = survey(load(Path(args.model)))
        return Answer(0, found, lambda: show_calibration(found, ""))
    table = inspect_model(args.model)
    return Answer(0, table, lambda: show_table(table))


def _run_layers(args: argparse.Namespace) -> Answer:
    from qcompile.layers import inspect_layers  # noqa: PLC0415
    from qcompile.plan.plan import load_plan  # noqa: PLC0415
    from qcompile.show import show_layers  # noqa: PLC0415

    if args.model.endswith(SUFFIX):
        raise RecipeError(
            f"{args.model} holds statistics: qcompile inspect MODEL.onnx --layers --stats {args.model}"
        )
    found = inspect_layers(
        args.model, args.data, recipe_of(args), _progress(args), stats=args.stats,
        forms=None if args.plan is None else load_plan(args.plan),
    )  # fmt: skip
    return Answer(0, found.to_dict(args.limit), lambda: show_layers(found, args.limit))


def _run_verify(args: argparse.Namespace) -> Answer:
    from qcompile.commands import verify_models  # noqa: PLC0415
    from qcompile.show import show_outputs  # noqa: PLC0415

    table, code = verify_models(
        args.fp32, args.quantized, args.data, recipe_of(args), _progress(args)
    )
    return Answer(code, table, lambda: show_outputs(table))


def _run_bench(args: argparse.Namespace) -> Answer:
    from qcompile.commands import bench_models  # noqa: PLC0415
    from qcompile.show import show_table  # noqa: PLC0415

    table = bench_models(
        args.fp32, args.quantized, args.data, recipe_of(args), args.seconds, _progress(args)
    )
    return Answer(0, table, lambda: show_table(table))


def _run_targets(args: argparse.Namespace) -> Answer:
    from qcompile.commands import list_targets  # noqa: PLC0415
    from qcompile.show import show_targets  # noqa: PLC0415

    del args
    table = list_targets()
    return Answer(0, table, lambda: show_targets(table))


_RUN: dict[str, Callable[[argparse.Namespace], Answer]] = {
    "compile": _run_compile, "calibrate": _run_calibrate, "plan": _run_plan, "inspect": _run_inspect, "verify": _run_verify,
    "bench": _run_bench, "targets": _run_targets,
}  # fmt: skip
