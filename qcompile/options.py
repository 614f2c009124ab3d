"""The options of each command, read strictly: what is wrong is one sentence. No heavy imports."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.option_groups import (
    SWITCHES,
    add_cache,
    add_calibration,
    add_choices,
    add_data,
    add_few_bits,
    add_limits,
    add_manners,
)
from qcompile.words import Parser, above_zero, at_least, number

if TYPE_CHECKING:
    from qcompile.recipe import Recipe

_IMAGE = ("size", "resize", "crop", "mean", "std", "scale", "layout", "color")
_DATA = ("samples", "tokenizer", "max_tokens", "pack")
_OWN = (
    "ranges", "target", "threads", "format", "sqnr_goal", "min_sqnr", "memory", "skip_bad", "max_drop", "metric",
    "lower_is_better", "max_size", "max_latency", "objective", "search_time", *SWITCHES,
    "kv_cache", "bits", "bits_per_weight", "block", "symmetric", "algorithm", "accuracy_level",
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
  3  a limit is missed (nothing was written if none could be kept), or an output has lost its information
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
    add_data(parser, "calibration data; without it only what needs none is quantized")
    add_calibration(parser)
    group = parser.add_argument_group("statistics")
    group.add_argument(
        "--stats", type=Path, metavar="FILE",
        help="statistics of `qcompile calibrate`, in place of data; with --data that only judges",
    )  # fmt: skip
    group.add_argument(
        "--force", action="store_true",
        help="use them even if they are of another model, other data or another version",
    )  # fmt: skip
    add_choices(parser)
    add_few_bits(parser)
    add_cache(parser)
    group = parser.add_argument_group("what is accepted")
    group.add_argument(
        "--sqnr-goal", type=number, metavar="DB",
        help="leave the most harmful nodes float until every output has this many decibels between"
        " signal and error (18; 0: never)",
    )  # fmt: skip
    add_limits(parser)
    group = parser.add_argument_group("what is told")
    group.add_argument(
        "--report", type=Path, metavar="DIR",
        help="write report.md, report.json and plan.json into this folder",
    )  # fmt: skip
    add_manners(group)
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
    add_data(parser, "samples to gather statistics of")
    add_calibration(parser)
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
    add_manners(parser.add_argument_group("what is told"))
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
    add_data(parser, "samples; the first one tells the shapes")
    add_choices(parser)
    add_manners(parser.add_argument_group("what is told"))
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
    add_data(parser, "samples to measure errors on; without it only times are told")
    add_calibration(parser)
    add_choices(parser)
    add_manners(parser.add_argument_group("what is told"))
    return parser


def _verify() -> Parser:
    parser = Parser(
        "qcompile verify", "FP32.onnx QUANT.onnx [--data SOURCE] [options]",
        "Measures the error of a quantized model, made by any tool, per output and slice of it.",
        _EPILOG,
    )  # fmt: skip
    _add_pair(parser)
    add_data(parser, "samples to compare on; without it one made-up input")
    parser.add_argument(
        "--min-sqnr", type=number, metavar="DB", help="exit with 3 if an output has less"
    )
    add_manners(parser)
    return parser


def _bench() -> Parser:
    parser = Parser(
        "qcompile bench", "FP32.onnx QUANT.onnx [--data SOURCE] [options]",
        "Times two models in turn, so that a change of the machine's speed meets both alike.",
        _EPILOG,
    )  # fmt: skip
    _add_pair(parser)
    add_data(parser, "samples to run; without it one made-up input")
    parser.add_argument(
        "--seconds", type=above_zero, default=3.0, metavar="S", help="how long it takes (3)"
    )
    add_manners(parser)
    return parser


def _targets() -> Parser:
    parser = Parser(
        "qcompile targets", "[options]", "Lists the targets, and says which one this is."
    )
    add_manners(parser)
    return parser


_MAKERS: dict[str, Callable[[], Parser]] = {
    "compile": _compile, "calibrate": _calibrate, "plan": _plan, "inspect": _inspect, "verify": _verify, "bench": _bench,
    "targets": _targets,
}  # fmt: skip
COMMANDS = tuple(name for name in _MAKERS if name != "compile")


def _add_pair(parser: Parser) -> None:
    parser.add_argument("fp32", metavar="FP32.onnx", help="the float model")
    parser.add_argument("quantized", metavar="QUANT.onnx", help="what was made of it")
