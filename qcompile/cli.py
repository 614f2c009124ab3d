"""The command line: options in, tables or JSON out. No logic of its own; heavy imports wait."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.errors import QcompileError
from qcompile.version import __version__

if TYPE_CHECKING:
    from qcompile.recipe import Recipe

_COMMANDS = ("plan", "inspect", "verify", "bench", "targets")
_EPILOG = """commands:
  qcompile MODEL            quantize, verify, time and write MODEL.int8.onnx
  qcompile plan MODEL       what would become of each node, and why; -o FILE writes an editable plan
  qcompile inspect MODEL    what the model is: inputs, operators, weights, quantization
  qcompile verify FP32 Q    the error of any quantized model, per output and slice
  qcompile bench FP32 Q     the speed of any two models, run in turn
  qcompile targets          the targets, and which one this machine is

calibration data (--data): a folder of .npz (arrays named by model input), one .npz or .npy, a folder of
images, a .txt with --tokenizer tokenizer.json, or module:function yielding feeds.

exit codes: 0 good; 2 the input or the command is wrong; 3 an accuracy limit is missed;
4 the result is not faster, or not fused as planned (it is still written)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = (
        words.pop(0)
        if words and words[0] in _COMMANDS and not Path(words[0]).is_file()
        else "compile"
    )
    parser = _PARSERS[command]()
    args = parser.parse_args(words)
    try:
        return int(_RUN[command](args))
    except QcompileError as error:
        if os.environ.get("QCOMPILE_DEBUG"):
            raise
        sys.stderr.write(f"qcompile: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("qcompile: interrupted, nothing was written.\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def entry() -> None:
    """The console script."""
    sys.exit(main())


def _parser(name: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qcompile {__version__}")
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="SOURCE", help="calibration samples, see below")
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help="int8 (default), int8-static, int8-dynamic, or a .toml file",
    )
    parser.add_argument(
        "--target", metavar="NAME", help="see `qcompile targets`; default: this machine"
    )
    parser.add_argument(
        "--ranges",
        choices=("auto", "mean", "minmax", "percentile", "mse", "kl"),
        help="how activation ranges are chosen; auto tries several",
    )
    parser.add_argument(
        "--keep-float",
        metavar="PATTERN",
        action="append",
        default=[],
        help="node name, prefix, glob, re:REGEX or operator type that stays float; repeatable",
    )
    parser.add_argument(
        "--threads", type=_at_least(0), metavar="N", help="intra-op threads; default: ORT's choice"
    )
    data = parser.add_argument_group("how data is read")
    data.add_argument("--samples", type=_at_least(1), metavar="N", help="use the first N samples")
    data.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json, for text")
    data.add_argument(
        "--max-tokens", type=_at_least(1), metavar="N", help="longest text sample (128)"
    )
    data.add_argument("--size", type=_size, metavar="HxW", help="image size, 224x224")
    data.add_argument("--resize", type=_at_least(1), metavar="N", help="short side before the crop")
    data.add_argument("--crop", choices=("center", "none"))
    data.add_argument("--mean", type=_numbers, metavar="R,G,B")
    data.add_argument("--std", type=_numbers, metavar="R,G,B")
    data.add_argument("--scale", type=float, metavar="X", help="pixel multiplier, such as 0.00392")
    data.add_argument("--layout", choices=("nchw", "nhwc"))
    data.add_argument("--color", choices=("rgb", "bgr", "gray"))


def _compile_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "qcompile",
        "Quantizes an ONNX model for ONNX Runtime, verifies and times the result.",
        _EPILOG,
    )
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT.onnx",
        help="default: MODEL.int8.onnx beside the model",
    )
    _add_model_options(parser)
    parser.add_argument(
        "--format",
        choices=("auto", "qdq", "fused"),
        help="portable Q/DQ, ORT's integer operators, or the faster",
    )
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="an edited plan from `qcompile plan -o`"
    )
    parser.add_argument(
        "--sqnr-goal",
        type=float,
        metavar="DB",
        help="leave harmful nodes float to reach this on every output slice (20; 0: never)",
    )
    parser.add_argument(
        "--min-sqnr", type=float, metavar="DB", help="exit 3 if any output slice has less"
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="folder for report.md, report.json, plan.json"
    )
    _add_output_options(parser)
    return parser


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")


def _plan_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "qcompile plan",
        "Prints what would become of each node, and why. Runs no calibration.",
        _EPILOG,
    )
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write the plan as JSON, to edit and feed back",
    )
    _add_model_options(parser)
    _add_output_options(parser)
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = _parser("qcompile inspect", "Says what a model is.")
    parser.add_argument("model", metavar="MODEL.onnx")
    _add_output_options(parser)
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "qcompile verify", "Measures the error of a quantized model, made by any tool.", _EPILOG
    )
    parser.add_argument("fp32", metavar="FP32.onnx")
    parser.add_argument("quantized", metavar="QUANT.onnx")
    _add_model_options(parser)
    parser.add_argument(
        "--min-sqnr", type=float, metavar="DB", help="exit 3 if any output slice has less"
    )
    _add_output_options(parser)
    return parser


def _bench_parser() -> argparse.ArgumentParser:
    parser = _parser("qcompile bench", "Times two models in turn.", _EPILOG)
    parser.add_argument("fp32", metavar="FP32.onnx")
    parser.add_argument("quantized", metavar="QUANT.onnx")
    _add_model_options(parser)
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="how long (3)")
    _add_output_options(parser)
    return parser


def _targets_parser() -> argparse.ArgumentParser:
    parser = _parser("qcompile targets", "Lists the targets.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    number.__name__ = "integer"
    return number


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 224x224")
    return int(parts[0]), int(parts[-1])


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers such as 0.485,0.456,0.406"
        ) from error


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the options describe: those given replace what the named recipe says."""
    import dataclasses  # noqa: PLC0415

    from qcompile.recipe import load_recipe  # noqa: PLC0415

    recipe = load_recipe(args.recipe)

    def given(*names: str) -> dict[str, Any]:
        found = {name: getattr(args, name, None) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    image = dataclasses.replace(
        recipe.data.image,
        **given("size", "resize", "crop", "mean", "std", "scale", "layout", "color"),
    )
    data = dataclasses.replace(
        recipe.data, image=image, **given("samples", "tokenizer", "max_tokens")
    )
    own = given("ranges", "target", "threads", "format", "sqnr_goal", "min_sqnr")
    return dataclasses.replace(
        recipe, data=data, keep_float=(*recipe.keep_float, *args.keep_float), **own
    )


def _progress(args: argparse.Namespace) -> Any:
    from qcompile.progress import Bar, Silent  # noqa: PLC0415

    return Silent() if args.quiet else Bar()


def _run_compile(args: argparse.Namespace) -> int:
    from qcompile.compiler import compile_model  # noqa: PLC0415
    from qcompile.plan.plan import load_plan  # noqa: PLC0415
    from qcompile.show import show_result  # noqa: PLC0415

    recipe = recipe_of(args)
    plan = None if args.plan is None else load_plan(args.plan)
    result = compile_model(
        args.model, args.data, output=args.output, recipe=recipe, plan=plan, report=args.report,
        progress=_progress(args),
    )  # fmt: skip
    if args.json:
        print(result.to_json())  # noqa: T201 - the result is what stdout is for
    else:
        show_result(result)
    return result.exit_code


def _run_plan(args: argparse.Namespace) -> int:
    from qcompile.commands import plan_of  # noqa: PLC0415

    plan = plan_of(args.model, args.data, recipe_of(args), _progress(args))
    if args.output is not None:
        from qcompile.graph.io import atomic  # noqa: PLC0415

        with atomic(args.output) as path:
            path.write_text(plan.to_json(), "utf-8")
    print(plan.to_json() if args.json else plan.show())  # noqa: T201
    return 0


def _run_inspect(args: argparse.Namespace) -> int:
    from qcompile.commands import inspect_model  # noqa: PLC0415
    from qcompile.show import show_table  # noqa: PLC0415

    facts = inspect_model(args.model)
    if args.json:
        print(json.dumps(facts, indent=1))  # noqa: T201
    else:
        show_table(facts)
    return 0


def _run_verify(args: argparse.Namespace) -> int:
    from qcompile.commands import verify_models  # noqa: PLC0415
    from qcompile.show import show_outputs  # noqa: PLC0415

    facts, code = verify_models(
        args.fp32, args.quantized, args.data, recipe_of(args), _progress(args)
    )
    if args.json:
        print(json.dumps(facts, indent=1, allow_nan=False))  # noqa: T201
    else:
        show_outputs(facts)
    return code


def _run_bench(args: argparse.Namespace) -> int:
    from qcompile.commands import bench_models  # noqa: PLC0415
    from qcompile.show import show_table  # noqa: PLC0415

    facts = bench_models(
        args.fp32, args.quantized, args.data, recipe_of(args), args.seconds, _progress(args)
    )
    if args.json:
        print(json.dumps(facts, indent=1, allow_nan=False))  # noqa: T201
    else:
        show_table(facts)
    return 0


def _run_targets(args: argparse.Namespace) -> int:
    from qcompile.errors import RecipeError  # noqa: PLC0415
    from qcompile.targets.schema import detect, load_target, target_names  # noqa: PLC0415

    try:
        here = detect().name
    except RecipeError:
        here = ""
    rows = [
        {"name": n, "title": load_target(n).title, "this_machine": n == here}
        for n in target_names()
    ]
    if args.json:
        print(json.dumps({"targets": rows}, indent=1))  # noqa: T201
    else:
        for row in rows:
            print(f"{'*' if row['this_machine'] else ' '} {row['name']:<20} {row['title']}")  # noqa: T201
        print("* this machine: what --target auto takes")  # noqa: T201
    return 0


_PARSERS = {
    "compile": _compile_parser, "plan": _plan_parser, "inspect": _inspect_parser, "verify": _verify_parser,
    "bench": _bench_parser, "targets": _targets_parser,
}  # fmt: skip
_RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "compile": _run_compile, "plan": _run_plan, "inspect": _run_inspect, "verify": _run_verify,
    "bench": _run_bench, "targets": _run_targets,
}  # fmt: skip
