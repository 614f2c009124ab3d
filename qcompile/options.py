"""The options of each command, read strictly: what is wrong is one sentence. No heavy imports."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.words import (
    RANGES,
    Parser,
    above_zero,
    add_choice,
    at_least,
    byte_count,
    image_size,
    limit,
    number,
    number_list,
    range_method,
)  # fmt: skip

if TYPE_CHECKING:
    from qcompile.recipe import Recipe

# as `qcompile.algo.choose` has them, which would take a second to import
ALGORITHMS = ("rtn", "search", "kquant", "hqq", "gptq", "gptq-order", "gptq-polish", "gptq-firm")

_IMAGE = ("size", "resize", "crop", "mean", "std", "scale", "layout", "color")
_DATA = ("samples", "tokenizer", "max_tokens")
_OWN = (
    "ranges", "target", "threads", "format", "sqnr_goal", "min_sqnr", "memory", "skip_bad", "max_drop", "metric",
    "lower_is_better", "max_size", "max_latency", "objective", "search_time", "equalize", "smooth",
    "rounding", "bits", "block", "symmetric", "algorithm", "accuracy_level",
)  # fmt: skip


_TEXT = """Makes a quantized (INT8) copy of an ONNX model that is smaller and runs faster in ONNX Runtime
on a CPU, compares it with the original on your data, times both, and says what it found."""
_EPILOG = """SOURCE, real input of the model, 50 to 200 samples of it, is one of
  a folder of .npz files (arrays named as the inputs of the model), one .npz or .npy file
  a folder of images (how they are read is guessed and printed; the options above correct it)
  a .txt file with one text a line, and --tokenizer tokenizer.json
  module:function, a Python function that returns feeds (dicts of arrays by input name)
"""
_LAYERS_EPILOG = """The columns of --layers, for the fastest plan, before anything is left float for accuracy:
  share      of the error of the outputs, of that slice of them which the layer hurts most
  own        decibels between the layer's result and the error that it alone adds: rounding of its weight and
             of its result (of its input, if that is quantized at run time), its inputs being float
  inherited  the same for the error that comes with its inputs when all is quantized
  gained     time of its float kernel less that of its integer one, each measured alone on this machine, and less
             than that by what makes its result float again, if some node reads it so; of a border (a float tensor
             that integer nodes read) what quantizing it takes, below zero

"""
_EXAMPLES = """
examples:
  qcompile model.onnx --data samples/      writes model.int8.onnx, scales taken from the samples
  qcompile model.onnx                      without data only MatMul, Gemm, LSTM and GRU are quantized
  qcompile model.onnx --data samples/ --max-drop 0.5% --metric my_eval:accuracy
  qcompile model.onnx --data photos/ --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225

other commands, each with --help:
  qcompile calibrate MODEL      statistics of the samples, to keep, join, and compile from with --stats
  qcompile plan MODEL           what would become of each node, and why; -o writes it, to edit
  qcompile inspect MODEL        inputs, outputs, operators and weights of a model; --layers: what costs accuracy
  qcompile verify FP32 QUANT    the error of a quantized model, made by any tool
  qcompile bench FP32 QUANT     the speed of two models, run in turn
  qcompile targets              the machines to compile for, and which one this is

exit codes:
  0  good
  2  the input or the command is wrong; nothing was written
  3  a limit is missed, or an output has lost its information
  4  the result is not faster, or not fused as planned; it is still written"""


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
    bits_for = (*recipe.bits_for, *(getattr(args, "bits_for", None) or ()))
    return dataclasses.replace(recipe, data=data, keep_float=keep, bits_for=bits_for, **given(_OWN))


def _compile() -> Parser:
    parser = Parser("qcompile", "MODEL.onnx [--data SOURCE] [options]", _TEXT, _EPILOG + _EXAMPLES)
    parser.add_argument("model", metavar="MODEL.onnx", help="the float model; it is not changed")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="OUT.onnx",
        help="where the result goes (MODEL.int8.onnx, or .int4.onnx, beside the model)",
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
    _add_few_bits(parser)
    group = parser.add_argument_group("what is accepted")
    group.add_argument(
        "--sqnr-goal", type=number, metavar="DB",
        help="leave the most harmful nodes float until every output has this many decibels between"
        " signal and error (18; 0: never)",
    )  # fmt: skip
    _add_limits(parser)
    group = parser.add_argument_group("what is told")
    group.add_argument(
        "--report", type=Path, metavar="DIR",
        help="write report.md, report.json and plan.json into this folder",
    )  # fmt: skip
    _add_manners(group)
    return parser


def _add_limits(parser: Parser) -> None:
    group = parser.add_argument_group(
        "limits",
        "The fastest result within them is searched for; if there is none, the nearest one, and exit code 3.",
    )
    group.add_argument(
        "--max-drop", type=limit("--max-drop"), metavar="X",
        help="how much worse than the float model it may be: 0.5%% of its metric, or a number in the metric's"
        " unit; without --metric the share of decisions that change (of the cosine that is lost, where an"
        " output holds no scores of classes)",
    )  # fmt: skip
    group.add_argument(
        "--metric", metavar="MODULE:FUNCTION",
        help="your metric: a function of an onnxruntime.InferenceSession that returns a number, or one a sample",
    )  # fmt: skip
    group.add_argument(
        "--lower-is-better", action="store_true", default=None, help="of that metric"
    )
    group.add_argument(
        "--min-sqnr", type=number, metavar="DB", help="decibels that every output slice must have"
    )
    group.add_argument(
        "--max-size", type=limit("--max-size", "MB"), metavar="MB|P%", help="size of the file"
    )
    group.add_argument(
        "--max-latency", type=limit("--max-latency", "ms"), metavar="MS|P%", help="time of one run"
    )
    add_choice(group, "--objective", ("fastest", "smallest"), "what is best within the limits")
    group.add_argument(
        "--search-time", type=above_zero, metavar="S", help="seconds that the search may take (60)"
    )


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
        "--held-out", type=at_least(0), metavar="N",
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
        "qcompile inspect", "MODEL.onnx|FILE.stats [--layers [--data SOURCE]] [options]",
        "Says what a model is: inputs, outputs, operators, weights, whether it is quantized. With --layers:\n"
        "which layers of a float model would cost accuracy if it were quantized, and what time they save.",
        _LAYERS_EPILOG + _EPILOG,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL.onnx", help="any ONNX model, or statistics")
    group = parser.add_argument_group("layers")
    group.add_argument(
        "--layers", action="store_true",
        help="rank what would be quantized by its share of the error of the outputs; the options below"
        " are for this",
    )  # fmt: skip
    group.add_argument(
        "--limit", type=at_least(1), metavar="N", help="lines shown (20; with --json all)"
    )
    group.add_argument(
        "--stats", type=Path, metavar="FILE", help="statistics of `qcompile calibrate`, for --data"
    )
    _add_data(parser, "samples to measure errors on; without it only times are told")
    _add_calibration(parser)
    _add_choices(parser)
    _add_manners(parser.add_argument_group("what is told"))
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
        "--min-sqnr", type=number, metavar="DB", help="exit with 3 if an output has less"
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
        "--seconds", type=above_zero, default=3.0, metavar="S", help="how long it takes (3)"
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
        help="int8 (default), int8-static, int8-dynamic, int4, int8-weights, or a .toml file with any of these options",
    )  # fmt: skip
    group.add_argument(
        "--target", metavar="NAME|FILE", help="machine to compile for (auto: this one)"
    )
    group.add_argument(
        "--ranges", type=range_method, metavar="|".join(RANGES),
        help="how ranges of activations are chosen (auto: several are tried on held-out samples;"
        " percentile:99.9 keeps so many percent of the values)",
    )  # fmt: skip
    add_choice(
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
    for name, what in (
        ("equalize", "do not fold scales of channels into the weights of convolutions"),
        ("smooth", "do not move scales of the inputs of products to their weights (SmoothQuant)"),
        ("rounding", "round weights to the nearest code, do not search"),
    ):
        group.add_argument(f"--no-{name}", dest=name, action="store_false", default=None, help=what)


def _add_few_bits(parser: Parser) -> None:
    group = parser.add_argument_group("weights of few bits and float activations (--recipe int4)")
    add_choice(group, "--bits", (2, 4, 8), "of weights, for MatMulNBits")
    add_choice(group, "--block", (16, 32, 64, 128, 256), "weights that share a scale (32)")
    group.add_argument(
        "--symmetric", action="store_true", default=None, help="no zero points: smaller, less exact"
    )
    add_choice(
        group, "--algorithm", ("auto", "all", *ALGORITHMS),
        "how weights round (auto: the best of three for each matrix, on held-out data; all: of all)",
    )  # fmt: skip
    add_choice(
        group, "--accuracy-level", (0, 1, 2, 3, 4),
        "of MatMulNBits: 4 (default) rounds activations to 8 bits and is fast, 0 does not",
    )  # fmt: skip
    group.add_argument(
        "--bits-for", metavar="PATTERN=BITS", action="append", default=[],
        help="other bits for these nodes, as lm_head=8; may be repeated",
    )  # fmt: skip


def _add_data(parser: Parser, what: str) -> None:
    parser.add_argument("--data", metavar="SOURCE", help=f"{what}; see below")
    parser.add_argument(
        "--threads", type=at_least(0), metavar="N", help="threads of a run (0: ORT's choice)"
    )
    group = parser.add_argument_group("how data is read")
    group.add_argument("--samples", type=at_least(1), metavar="N", help="only the first N samples")
    group.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json, for text")
    group.add_argument(
        "--max-tokens", type=at_least(1), metavar="N", help="longest text, in tokens (128)"
    )
    group.add_argument("--size", type=image_size, metavar="HxW", help="size of images, as 224x224")
    group.add_argument(
        "--resize", type=at_least(1), metavar="N", help="short side of images before the crop"
    )
    add_choice(group, "--crop", ("center", "none"), "cut to the size, or stretch to it")
    numbers = "subtracted from the scaled pixels", "divides them after that"
    for name, help_text in zip(("--mean", "--std"), numbers, strict=True):
        group.add_argument(name, type=number_list, metavar="R,G,B", help=help_text)
    group.add_argument(
        "--scale", type=number, metavar="X", help="multiplies pixels 0..255, as 0.00392"
    )
    add_choice(group, "--layout", ("nchw", "nhwc"), "where the channels of the input are")
    add_choice(group, "--color", ("rgb", "bgr", "gray"), "order of the channels")


def _add_calibration(parser: Parser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--memory", type=byte_count, metavar="SIZE",
        help="what observed tensors may take, as 512MB; with less the data is read more often (256MB)",
    )  # fmt: skip
    group.add_argument(
        "--skip-bad", action="store_true", default=None,
        help="leave out samples for which the float model makes NaN or infinities",
    )  # fmt: skip
