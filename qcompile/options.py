"""The options of each command, read strictly: what is wrong is one sentence. No heavy imports."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qcompile.errors import RecipeError, nearest
from qcompile.version import __version__

if TYPE_CHECKING:
    from qcompile.recipe import Recipe

_IMAGE = ("size", "resize", "crop", "mean", "std", "scale", "layout", "color")
_DATA = ("samples", "tokenizer", "max_tokens")
_OWN = ("ranges", "target", "threads", "format", "sqnr_goal", "min_sqnr", "memory", "skip_bad")

_RANGES = ("auto", "minmax", "mean", "moving-average", "percentile", "mse", "kl")

_TEXT = """Makes a quantized (INT8) copy of an ONNX model that is smaller and runs faster in ONNX Runtime
on a CPU, compares it with the original on your data, times both, and says what it found."""
_EPILOG = """SOURCE, real input of the model, 50 to 200 samples of it, is one of
  a folder of .npz files (arrays named as the inputs of the model), one .npz or .npy file
  a folder of images (how they are read is guessed and printed; the options above correct it)
  a .txt file with one text a line, and --tokenizer tokenizer.json
  module:function, a Python function that returns feeds (dicts of arrays by input name)
"""
_EXAMPLES = """
examples:
  qcompile model.onnx --data samples/      writes model.int8.onnx, scales taken from the samples
  qcompile model.onnx                      without data only MatMul, Gemm, LSTM and GRU are quantized
  qcompile model.onnx --data photos/ --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225

other commands, each with --help:
  qcompile calibrate MODEL      statistics of the samples, to keep, join, and compile from with --stats
  qcompile plan MODEL           what would become of each node, and why; -o writes it, to edit
  qcompile inspect MODEL        inputs, outputs, operators and weights of a model
  qcompile verify FP32 QUANT    the error of a quantized model, made by any tool
  qcompile bench FP32 QUANT     the speed of two models, run in turn
  qcompile targets              the machines to compile for, and which one this is

exit codes:
  0  good
  2  the input or the command is wrong; nothing was written
  3  an output is less accurate than --min-sqnr, or has lost its information
  4  the result is not faster, or not fused as planned; it is still written"""


class Parser(argparse.ArgumentParser):
    """A parser that raises one sentence where argparse ends the process."""

    def __init__(self, prog: str, words: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=prog, usage=f"{prog} {words}".rstrip(), description=description, epilog=epilog,
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        self.add_argument("--version", action="version", version=f"qcompile {__version__}")

    def error(self, message: str) -> NoReturn:
        """Raises: RecipeError, always."""
        text = message.removeprefix("argument ").replace(
            ": expected one argument", " needs a value"
        )
        missing = text.removeprefix("the following arguments are required: ")
        if missing != text:
            text = f"{missing.replace(', ', ' and ')} is missing"
        raise RecipeError(f"{text}: see `{self.prog} --help`.")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The values that `words` give.

        Raises:
            RecipeError: a word is unknown, missing, or no value of its option.
        """
        args, unknown = self.parse_known_args(words)
        if not unknown:
            return args
        option = unknown[0].partition("=")[0]
        if option.startswith("-"):
            hint = nearest(option, self._option_string_actions)
            raise RecipeError(f"there is no option {option}: see `{self.prog} --help`.{hint}")
        raise RecipeError(f"{unknown[0]!r} is one word too many: see `{self.prog} --help`.")


def parser_of(command: str) -> Parser:
    """The parser of a command; "compile" is the one that is not named on the command line."""
    return _MAKERS[command]()


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the options describe: those given replace what the named recipe says.

    Raises:
        RecipeError: the recipe, or a value, is wrong.
    """
    from qcompile.recipe import load_recipe  # noqa: PLC0415 - keeps `qcompile --help` quick

    recipe = load_recipe(getattr(args, "recipe", None))

    def given(names: Sequence[str]) -> dict[str, Any]:
        found = {name: getattr(args, name, None) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    image = dataclasses.replace(recipe.data.image, **given(_IMAGE))
    data = dataclasses.replace(recipe.data, image=image, **given(_DATA))
    keep = (*recipe.keep_float, *getattr(args, "keep_float", ()))
    return dataclasses.replace(recipe, data=data, keep_float=keep, **given(_OWN))


def _compile() -> Parser:
    parser = Parser("qcompile", "MODEL.onnx [--data SOURCE] [options]", _TEXT, _EPILOG + _EXAMPLES)
    parser.add_argument("model", metavar="MODEL.onnx", help="the float model; it is not changed")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="OUT.onnx",
        help="where the result goes (MODEL.int8.onnx beside the model)",
    )  # fmt: skip
    _add_data(parser, "calibration data; without it only what needs none is quantized")
    _add_calibration(parser)
    group = parser.add_argument_group("statistics")
    group.add_argument(
        "--stats", type=Path, metavar="FILE",
        help="statistics of `qcompile calibrate`, in place of data; with --data that only judges",
    )  # fmt: skip
    group.add_argument(
        "--force", action="store_true",
        help="use them even if they are of another model, other data or another version",
    )  # fmt: skip
    _add_choices(parser)
    group = parser.add_argument_group("what is accepted")
    group.add_argument(
        "--sqnr-goal", type=_number, metavar="DB",
        help="leave the most harmful nodes float until every output has this many decibels between"
        " signal and error (18; 0: never)",
    )  # fmt: skip
    group.add_argument(
        "--min-sqnr", type=_number, metavar="DB", help="exit with 3 if an output has less"
    )
    group = parser.add_argument_group("what is told")
    group.add_argument(
        "--report", type=Path, metavar="DIR",
        help="write report.md, report.json and plan.json into this folder",
    )  # fmt: skip
    _add_manners(group)
    return parser


def _calibrate() -> Parser:
    parser = Parser(
        "qcompile calibrate", "MODEL.onnx --data SOURCE [-o FILE] [options]",
        "Gathers statistics of the model's tensors in one streaming pass: ranges of every sample, histograms,\n"
        "moments and ranges of channels. Every range method works from them later:\n"
        "qcompile MODEL.onnx --stats MODEL.stats", _EPILOG,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL.onnx", help="the float model")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where they go (MODEL.stats beside it)"
    )
    _add_data(parser, "samples to gather statistics of")
    _add_calibration(parser)
    parser.add_argument(
        "--merge", type=Path, nargs="+", action="extend", metavar="FILE", default=[],
        help="statistics of other samples of the same model, to be joined in this order, before --data",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", type=_at_least(0), metavar="N",
        help="samples that are kept out of the statistics and stored with them, to judge results on (every"
        " fifth, 24 at most; at most half if given; 0: all calibrate, --stats then needs other --data)",
    )  # fmt: skip
    parser.add_argument(
        "--gram", action="store_true",
        help="also gather X'X of what weights are multiplied with, as GPTQ needs it: large, and slower",
    )  # fmt: skip
    parser.add_argument(
        "--target", metavar="NAME|FILE", help="machine to compile for (auto: this one)"
    )
    parser.add_argument(
        "--force", action="store_true", help="merge in spite of mismatches, which is recorded"
    )
    _add_manners(parser.add_argument_group("what is told"))
    return parser


def _plan() -> Parser:
    parser = Parser(
        "qcompile plan", "MODEL.onnx [-o FILE] [options]",
        "Prints what would become of each node, and why. Nothing is calibrated, so data is optional:\n"
        "its first sample tells the shapes.", _EPILOG,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL.onnx", help="the float model")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help="write the plan as JSON; edit it, then: qcompile MODEL.onnx --plan FILE",
    )  # fmt: skip
    _add_data(parser, "samples; the first one tells the shapes")
    _add_choices(parser)
    _add_manners(parser.add_argument_group("what is told"))
    return parser


def _inspect() -> Parser:
    parser = Parser(
        "qcompile inspect", "MODEL.onnx|FILE.stats [options]",
        "Says what a model is: inputs, outputs, operators, weights, whether it is quantized.",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL.onnx", help="any ONNX model, or statistics")
    _add_manners(parser)
    return parser


def _verify() -> Parser:
    parser = Parser(
        "qcompile verify", "FP32.onnx QUANT.onnx [--data SOURCE] [options]",
        "Measures the error of a quantized model, made by any tool, per output and slice of it.",
        _EPILOG,
    )  # fmt: skip
    _add_pair(parser)
    _add_data(parser, "samples to compare on; without it one made-up input")
    parser.add_argument(
        "--min-sqnr", type=_number, metavar="DB", help="exit with 3 if an output has less"
    )
    _add_manners(parser)
    return parser


def _bench() -> Parser:
    parser = Parser(
        "qcompile bench", "FP32.onnx QUANT.onnx [--data SOURCE] [options]",
        "Times two models in turn, so that a change of the machine's speed meets both alike.",
        _EPILOG,
    )  # fmt: skip
    _add_pair(parser)
    _add_data(parser, "samples to run; without it one made-up input")
    parser.add_argument(
        "--seconds", type=_above_zero, default=3.0, metavar="S", help="how long it takes (3)"
    )
    _add_manners(parser)
    return parser


def _targets() -> Parser:
    parser = Parser(
        "qcompile targets", "[options]", "Lists the targets, and says which one this is."
    )
    _add_manners(parser)
    return parser


_MAKERS: dict[str, Callable[[], Parser]] = {
    "compile": _compile, "calibrate": _calibrate, "plan": _plan, "inspect": _inspect, "verify": _verify, "bench": _bench,
    "targets": _targets,
}  # fmt: skip
COMMANDS = tuple(name for name in _MAKERS if name != "compile")


def _add_pair(parser: Parser) -> None:
    parser.add_argument("fp32", metavar="FP32.onnx", help="the float model")
    parser.add_argument("quantized", metavar="QUANT.onnx", help="what was made of it")


def _add_manners(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def _add_choices(parser: Parser) -> None:
    group = parser.add_argument_group("what is done")
    group.add_argument(
        "--recipe", metavar="NAME|FILE",
        help="int8 (default), int8-static, int8-dynamic, or a .toml file with any of these options",
    )  # fmt: skip
    group.add_argument(
        "--target", metavar="NAME|FILE", help="machine to compile for (auto: this one)"
    )
    group.add_argument(
        "--ranges", type=_ranges, metavar="|".join(_RANGES),
        help="how ranges of activations are chosen (auto: several are tried on held-out samples;"
        " percentile:99.9 keeps so many percent of the values)",
    )  # fmt: skip
    _add_choice(
        group, "--format", ("auto", "qdq", "fused"),
        "qdq runs in every ONNX runtime, fused only in ONNX Runtime (auto: the faster)",
    )  # fmt: skip
    group.add_argument(
        "--keep-float", metavar="PATTERN", action="append", default=[],
        help="leave these nodes as they are: a node or output name, the part of it before a /, a glob,"
        " re:REGEX or an operator type; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--plan", type=Path, metavar="FILE", help="an edited plan of `qcompile plan -o FILE`"
    )


def _add_data(parser: Parser, what: str) -> None:
    parser.add_argument("--data", metavar="SOURCE", help=f"{what}; see below")
    parser.add_argument(
        "--threads", type=_at_least(0), metavar="N", help="threads of a run (0: ORT's choice)"
    )
    group = parser.add_argument_group("how data is read")
    group.add_argument("--samples", type=_at_least(1), metavar="N", help="only the first N samples")
    group.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json, for text")
    group.add_argument(
        "--max-tokens", type=_at_least(1), metavar="N", help="longest text, in tokens (128)"
    )
    group.add_argument("--size", type=_size, metavar="HxW", help="size of images, as 224x224")
    group.add_argument(
        "--resize", type=_at_least(1), metavar="N", help="short side of images before the crop"
    )
    _add_choice(group, "--crop", ("center", "none"), "cut to the size, or stretch to it")
    numbers = "subtracted from the scaled pixels", "divides them after that"
    for name, help_text in zip(("--mean", "--std"), numbers, strict=True):
        group.add_argument(name, type=_numbers, metavar="R,G,B", help=help_text)
    group.add_argument(
        "--scale", type=_number, metavar="X", help="multiplies pixels 0..255, as 0.00392"
    )
    _add_choice(group, "--layout", ("nchw", "nhwc"), "where the channels of the input are")
    _add_choice(group, "--color", ("rgb", "bgr", "gray"), "order of the channels")


def _add_calibration(parser: Parser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--memory", type=_bytes, metavar="SIZE",
        help="what observed tensors may take, as 512MB; with less the data is read more often (256MB)",
    )  # fmt: skip
    group.add_argument(
        "--skip-bad", action="store_true", default=None,
        help="leave out samples for which the float model makes NaN or infinities",
    )  # fmt: skip


def _ranges(text: str) -> str:
    if text not in _RANGES and not text.startswith("percentile:"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(_RANGES)}")
    return text


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    size = 0 if match is None else int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MB or 2GB")
    return size


def _add_choice(
    parser: argparse._ActionsContainer, name: str, known: Sequence[str], help_text: str
) -> None:
    def choice(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
        return text

    parser.add_argument(name, type=choice, metavar="|".join(known), help=help_text)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return number


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def _above_zero(text: str) -> float:
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 224x224")
    return int(parts[0]), int(parts[-1])


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(_number, text.split(",")))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers such as 0.485,0.456,0.406"
        ) from error
