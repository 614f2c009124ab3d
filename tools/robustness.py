"""The regression cases of tests/regressions, through ONNX Runtime's own tools and through every recipe, as a table.

    python tools/robustness.py -o docs/robustness.md      # all cases; a few minutes
    python tools/robustness.py N02 O06 T                  # those whose names begin so, printed

A result is judged by ORT alone, with optimizations and without, on samples that calibrated nothing, each part of an
output for itself, against the bound of the case.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from onnxruntime import quantization as tool
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from regressions.all_cases import CASES
from regressions.case import Case, Truth, feeds, nodes_of
from regressions.recipes import FRESH, RECIPES, SAMPLES, bound, made, small_models_pay

from qcompile import QcompileError
from qcompile.targets.schema import detect
from qcompile.version import __version__

_QUANTIZED = (
    "QLinear", "ConvInteger", "MatMulInteger", "DynamicQuantize", "QGemm", "QAttention", "MatMulNBits",
    "GatherBlockQuantized", "DequantizeLinear", "EmbedLayer",
)  # fmt: skip
_LEGEND = {
    "right": "quantized, and under the bound of the case; after it, how many nodes",
    "nothing": "a model with nothing quantized in it; by ORT's tools without a word, by qcompile with exit code 4 and a reason",
    "refused": "no file, and a sentence that says what is in the way",
    "wrong": "a valid model above the bound, with the decibels of its worst part; or values lost",
    "crash": "an exception that is no sentence",
    "invalid": "a model that the checker rejects, or that ORT does not load or run",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One outcome: a word of the legend, what stands behind it in the table, and a reason."""

    word: str
    detail: str = ""
    reason: str = ""

    def __str__(self) -> str:
        text = f"**{self.word}**" if self.word in ("wrong", "crash", "invalid") else self.word
        return f"{text} {self.detail}".strip()


class _Reader(tool.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, samples: Sequence[Mapping[str, Any]]) -> None:
        self._left = iter(samples)

    def get_next(self) -> Any:
        return next(self._left, None)


def _static(source: Path, to: Path, case: Case, **more: Any) -> None:
    types = {"activation_type": tool.QuantType.QUInt8, "weight_type": tool.QuantType.QInt8}
    reader = _Reader(feeds(case, SAMPLES, 0))
    tool.quantize_static(source, to, reader, per_channel=True, **types, **more)


def _qdq(source: Path, to: Path, case: Case) -> None:
    _static(source, to, case, quant_format=tool.QuantFormat.QDQ)


def _qoperator(source: Path, to: Path, case: Case) -> None:
    _static(source, to, case, quant_format=tool.QuantFormat.QOperator)


def _percentile(source: Path, to: Path, case: Case) -> None:
    _static(source, to, case, calibrate_method=tool.CalibrationMethod.Percentile)


def _dynamic(source: Path, to: Path, case: Case) -> None:  # noqa: ARG001
    tool.quantize_dynamic(source, to, per_channel=True, weight_type=tool.QuantType.QInt8)


def _nbits(source: Path, to: Path, case: Case) -> None:
    block = case.options.get("block", 32)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=block, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(to))


PEERS: Mapping[str, Callable[[Path, Path, Case], None]] = {
    "static QDQ": _qdq, "QOperator": _qoperator, "percentile": _percentile, "dynamic": _dynamic, "MatMulNBits": _nbits,
}  # fmt: skip


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing is printed by Python, nor by the libraries below it."""
    sys.stderr.flush()
    saved = os.dup(2)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def by_peer(case: Case, truth: Truth | None, name: str) -> Cell:
    """What one of ORT's tools makes of a case."""
    with tempfile.TemporaryDirectory() as folder:
        source, to = Path(folder) / "model.onnx", Path(folder) / "result.onnx"
        onnx.save(case.model, source)
        try:
            PEERS[name](source, to, case)
            model = onnx.load(to)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what a user would see
            return Cell("crash", type(error).__name__)
    count = sum(node.op_type.startswith(_QUANTIZED) for node in nodes_of(model.graph))
    before = sum(node.op_type.startswith(_QUANTIZED) for node in nodes_of(case.model.graph))
    if count <= before:
        return Cell("nothing")
    least = bound(case, "int4" if name == "MatMulNBits" else "int8")
    found = _judged(truth, model, least)
    return dataclasses.replace(found, detail="") if found.word == "right" else found


def _judged(truth: Truth | None, model: onnx.ModelProto, least: float) -> Cell:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError:
        return Cell("invalid", "(checker)")
    if truth is None:
        return Cell("right")
    try:
        worst = min(truth.errors(model).values())
    except AssertionError as error:
        return Cell("wrong", str(error).splitlines()[0] if str(error) else "other values")
    except Exception:  # noqa: BLE001 - ORT has many
        return Cell("invalid")
    return Cell("right" if worst >= least else "wrong", f"{worst:.0f} dB")


def by_recipe(case: Case, truth: Truth | None, name: str) -> Cell:
    """What a recipe makes of a case."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = made(case, name, Path(folder))
        except Exception as error:  # noqa: BLE001 - a defect, which the table must show
            return Cell("crash", type(error).__name__)
    if isinstance(done, QcompileError):
        return Cell("refused", reason=str(done))
    found = _judged(truth, done.model, bound(case, name))
    if found.word != "right":
        return found
    if not done.quantized:
        return Cell(
            "nothing", reason=done.result.warnings[0].removeprefix("nothing was quantized: ")
        )
    told = f" ({found.detail})" if name in case.bounds else ""
    return Cell("right", f"{len(done.quantized)}{told}")


def row(name: str) -> tuple[dict[str, Cell], dict[str, Cell]]:
    """What ORT's tools, and what the recipes make of a case."""
    case = CASES[name]()
    with silence():
        try:
            truth = Truth(case, FRESH)
        except Exception:  # noqa: BLE001 - ORT cannot run it, which is why it is refused
            truth = None
        peers = {peer: by_peer(case, truth, peer) for peer in PEERS}
        ours = {recipe: by_recipe(case, truth, recipe) for recipe in RECIPES}
    return peers, ours


def document(rows: Mapping[str, tuple[dict[str, Cell], dict[str, Cell]]]) -> str:
    """The page, Markdown."""
    lines = [
        "# Robustness",
        "",
        "Small graphs from users' reports that broke quantizers, each through ONNX Runtime's own tools and through every",
        "recipe of qcompile. Printed by `python tools/robustness.py -o docs/robustness.md` from the cases of",
        f"`tests/regressions`, where the same is a test. qcompile {__version__}, onnxruntime {ort.__version__}, target",
        f"{detect().name}. Nothing was left float for being small, and nothing was timed.",
        "",
        *(f"* **{word}**: {text}." for word, text in _LEGEND.items()),
        "",
        "The bound is 25 dB between signal and error with 8 bits, 13 dB with weights of 4 bits and 30 dB with weights of 8,",
        "20 or 22 dB in a few cases (masks, one large gamma), and lower where decibels stand behind the number of nodes.",
        "",
        "ORT's tools: `quantize_static` with U8S8 per channel (QDQ, QOperator, QDQ with percentile ranges),",
        "`quantize_dynamic` per channel, `MatMulNBitsQuantizer` with 4 bits.",
        "",
        "## Counts",
        "",
    ]
    lines += _table(["", *_LEGEND], [*_counts("ORT", 0, rows), *_counts("qcompile", 1, rows)])
    lines += ["", "## Cases", ""]
    head = ["case", *(f"ORT {peer}" for peer in PEERS), *RECIPES]
    cells = [[name, *map(str, (*a.values(), *b.values()))] for name, (a, b) in rows.items()]
    lines += _table(head, cells)
    lines += [
        "",
        "## Reasons",
        "",
        "Why a recipe of qcompile refused a case, or found nothing to quantize in it.",
        "",
    ]
    for name, (_, ours) in rows.items():
        told: dict[str, list[str]] = {}
        for recipe, cell in ours.items():
            if cell.reason:
                told.setdefault(f"{cell.word}: {cell.reason}", []).append(recipe)
        if told:
            lines.append(f"* {name}")
            lines += [f"    * {'; '.join(recipes)}: {text}" for text, recipes in told.items()]
    return "\n".join(lines) + "\n"


def _counts(who: str, side: int, rows: Mapping[str, Any]) -> list[list[str]]:
    found: dict[str, Counter[str]] = {}
    for pair in rows.values():
        for column, cell in pair[side].items():
            found.setdefault(column, Counter())[cell.word] += 1
    return [[f"{who} {k}", *(str(v[word]) for word in _LEGEND)] for k, v in found.items()]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("cases", nargs="*", help="beginnings of names; all if none is given")
    parser.add_argument("-o", "--output", type=Path, help="where the page goes, else printed")
    args = parser.parse_args(words)
    chosen = [n for n in CASES if not args.cases or n.startswith(tuple(args.cases))]
    logging.disable(logging.WARNING)
    rows = {}
    with small_models_pay():
        for number, name in enumerate(chosen, 1):
            rows[name] = row(name)
            print(f"{number} of {len(chosen)}: {name}", file=sys.stderr)
    page = document(rows)
    if args.output is None:
        print(page, end="")
    else:
        args.output.write_text(page, encoding="utf-8")
    bad = {"wrong", "crash", "invalid"}
    return int(any(cell.word in bad for _, ours in rows.values() for cell in ours.values()))


if __name__ == "__main__":
    sys.exit(main())
