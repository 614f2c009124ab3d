"""Groups of options that several commands share. No heavy imports."""

from __future__ import annotations

import argparse
from pathlib import Path

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

# as `qcompile.algo.choose` has them, which would take a second to import
KINDS = ("int8", "uint8", "int4")  # as `qcompile.quant.cache` has them
ALGORITHMS = ("rtn", "search", "kquant", "hqq", "gptq", "gptq-order", "gptq-polish", "gptq-firm")

# what is on, and what --no-NAME does
SWITCHES = {
    "equalize": "do not fold scales of channels into the weights of convolutions",
    "absorb": "do not move high biases of convolutions behind their activations",
    "smooth": "do not move scales of the inputs of products to their weights (SmoothQuant)",
    "masks": "leave masks before a Softmax as they are, and what adds them float",
    "rounding": "round weights to the nearest code, do not search",
    "timing": "decide by the target's costs, not by times measured here: the same bytes every time",
}


def add_limits(parser: Parser) -> None:
    """Accuracy, size and time that a result must have."""
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
        "--max-size",
        type=limit("--max-size", "MB"),
        metavar="MB|P%",
        help="size of the file; with weights of few bits these are shared out to fit it",
    )
    group.add_argument(
        "--max-latency", type=limit("--max-latency", "ms"), metavar="MS|P%", help="time of one run"
    )
    add_choice(group, "--objective", ("fastest", "smallest"), "what is best within the limits")
    group.add_argument(
        "--search-time", type=above_zero, metavar="S", help="seconds that the search may take (60)"
    )


def add_manners(parser: argparse._ActionsContainer) -> None:
    """How results are told."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def add_choices(parser: Parser) -> None:
    """Recipe, target, and what stays float."""
    group = parser.add_argument_group("what is done")
    group.add_argument(
        "--recipe", metavar="NAME|FILE",
        help="int8 (default), int8-static, int8-dynamic, int4, int8-weights, kv-cache, or a .toml file with any of these options",
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
    for name, what in SWITCHES.items():
        group.add_argument(f"--no-{name}", dest=name, action="store_false", default=None, help=what)


def add_few_bits(parser: Parser) -> None:
    """Weights of few bits."""
    group = parser.add_argument_group("weights of few bits and float activations (--recipe int4)")
    add_choice(group, "--bits", (2, 4, 8), "of weights, for MatMulNBits")
    group.add_argument(
        "--bits-per-weight", type=number, metavar="X",
        help="on average, scales and zero points included: each matrix gets the bits (2, 4, 8) and the block that cost"
        " least accuracy; --max-size does the same for the whole file",
    )  # fmt: skip
    add_choice(
        group, "--block", (16, 32, 64, 128, 256),
        "weights that share a scale (32; with --bits-per-weight or --max-size what fits)",
    )  # fmt: skip
    group.add_argument(
        "--symmetric", action="store_true", default=None, help="no zero points: smaller, less exact"
    )
    add_choice(
        group, "--algorithm", ("auto", "all", *ALGORITHMS, "awq"),
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


def add_cache(parser: Parser) -> None:
    """Keys and values of decoders."""
    group = parser.add_argument_group("cache of keys and values of a decoder")
    add_choice(
        group, "--kv-cache", KINDS,
        "past inputs and present outputs hold such codes, with scales from the samples, whatever the recipe;"
        " --recipe kv-cache leaves all else float",
    )  # fmt: skip


def add_data(parser: Parser, what: str) -> None:
    """Where samples come from and how they are read."""
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
    group.add_argument(
        "--pack", action="store_true", default=None,
        help="all lines of a text as one, cut into samples of --max-tokens: for models that continue texts",
    )  # fmt: skip
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


def add_calibration(parser: Parser) -> None:
    """How samples are observed."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--memory", type=byte_count, metavar="SIZE",
        help="what observed tensors may take, as 512MB; with less the data is read more often (256MB)",
    )  # fmt: skip
    group.add_argument(
        "--skip-bad", action="store_true", default=None,
        help="leave out samples for which the float model makes NaN or infinities",
    )  # fmt: skip
