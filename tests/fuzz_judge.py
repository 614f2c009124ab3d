"""Compiles a random model and judges what came out, apart from the compiler: by the checker and ONNX Runtime alone."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Literal
from unittest import mock

import numpy as np
import onnx
import onnxruntime as ort
from fuzz_graphs import Drawn, Feed, draw
from regressions.case import LEVELS, session

from qcompile import compile_model
from qcompile.errors import PassError, QcompileError
from qcompile.recipe import Recipe
from qcompile.report import Result
from qcompile.verify.latency import Timing

WAYS = ("auto", "fused", "qdq", "dynamic", "no data", "int4", "int4 no data", "int8-weights")
INTEGER = (
    "QuantizeLinear", "DequantizeLinear", "QLinearConv", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM", "QLinearMatMul", "QGemm", "MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeLinear",
)  # fmt: skip
SAMPLES, FRESH = 16, 4
# Every output must have so much, or the result has to say that it is inaccurate. It is little: of samples that differ a
# thousandfold in size ranges clip some, and the few that are held out may be others.
LEAST_DB = 2.0
_TINY = 1e-30  # what flushes to zero in one kernel and not in another


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a model: `compiled`, `unchanged` (nothing pays), `refused`, `odd` (ORT itself cannot), `failed`."""

    kind: Literal["compiled", "unchanged", "refused", "odd", "failed"]
    why: str = ""


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Meanwhile all that can be integer is, and every result counts as twice as fast: nothing is timed."""
    from workbench import costless

    def race(sessions: Any, feed: object, **_: object) -> Timing:
        first, *others = sessions
        speeds = {first: 1.0} | dict.fromkeys(others, 2.0)
        return Timing({name: 2.0 / speed for name, speed in speeds.items()}, speeds, 3)

    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("qcompile") and hasattr(module, "race"):
                stack.enter_context(mock.patch.object(module, "race", race))
        stack.enter_context(
            mock.patch("qcompile.workshop.Workshop.timed", lambda shop, request: request)
        )
        stack.enter_context(mock.patch("qcompile.opened.load_target", return_value=costless()))
        yield


def recipe_of(way: str) -> Recipe:
    """The recipe of one of `WAYS`."""
    quick: dict[str, Any] = {"threads": 1, "bench_seconds": 0.01}
    match way.removesuffix(" no data"):
        case "fused" | "qdq" as form:
            return Recipe(format=form, **quick)
        case "dynamic":
            return Recipe(static=False, **quick)
        case "int4":
            return Recipe(bits=4, block=16, **quick)
        case "int8-weights":
            return Recipe(bits=8, **quick)
    return Recipe(**quick)


def judge(drawn: Drawn, way: str) -> Verdict:
    """What becomes of a model in one of `WAYS`."""
    try:
        onnx.checker.check_model(drawn.model)
        plain = session(drawn.model, "off")
        data = drawn.feeds(SAMPLES, 0)
        fresh = data + drawn.feeds(FRESH, 1)
        wanted = [plain.run(None, feed) for feed in fresh]
        session(drawn.model, "all").run(None, fresh[0])
    except Exception as error:  # noqa: BLE001 - ORT's own limits, which are not what is tested
        return Verdict("odd", str(error).splitlines()[0][:200])
    given = None if way.endswith("no data") else data
    before = drawn.model.SerializeToString()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        path = Path(folder) / "out.onnx"
        try:
            with eager():
                result = compile_model(drawn.model, given, output=path, recipe=recipe_of(way))
        except PassError:
            raise
        except QcompileError as error:
            if path.exists():
                return Verdict("failed", "refused, and wrote a file")
            return Verdict("refused", str(error))
        if drawn.model.SerializeToString() != before:
            return Verdict("failed", "the input was changed")
        return _compare(drawn, plain, fresh, wanted, result, onnx.load(path))


def _compare(
    drawn: Drawn, plain: ort.InferenceSession, fresh: list[Feed], wanted: list[list[Any]], result: Result,
    made: onnx.ModelProto,
) -> Verdict:  # fmt: skip
    onnx.checker.check_model(made)
    integer = any(node.op_type in INTEGER for node in made.graph.node)
    # that few samples judge is said of every result here
    warned = any(not w.startswith("Only ") for w in result.warnings)
    said = warned or result.goal_missed is not None or result.exit_code == 3
    for level in LEVELS:
        ours = session(made, level)
        if _face(ours) != _face(plain):
            return Verdict("failed", f"the interface changed: {_face(plain)} became {_face(ours)}")
        got = [ours.run(None, feed) for feed in fresh]
        for i, output in enumerate(plain.get_outputs()):
            y, z = (np.concatenate([np.ravel(v[i]) for v in found]) for found in (wanted, got))
            if [v[i].shape for v in wanted] != [v[i].shape for v in got]:
                return Verdict(
                    "failed", f"output {output.name!r} has another shape at level {level}"
                )
            known = np.isfinite(y)
            if not np.isfinite(z[known]).all() and not said:
                return Verdict("failed", f"output {output.name!r} is not finite at level {level}")
            if said or drawn.extreme:
                continue
            decibels = _decibels(wanted, got, i)
            if decibels < LEAST_DB:
                told = "equal" if result.worst_db is None else f"{result.worst_db:.1f} dB"
                return Verdict(
                    "failed",
                    f"output {output.name!r} has {decibels:.1f} dB at level {level}, and the result says {told}",
                )
    return Verdict("compiled" if integer else "unchanged")


def _decibels(wanted: list[list[Any]], got: list[list[Any]], i: int) -> float:
    """SQNR of an output on the samples that calibrated and judged it, all together; others may be far beyond these."""
    y, z = (
        np.concatenate([np.ravel(v[i]) for v in found[:SAMPLES]]).astype(np.float64)
        for found in (wanted, got)
    )
    known = np.isfinite(y)
    power, noise = np.square(y[known]).sum(), np.square(z[known] - y[known]).sum()
    same = noise <= _TINY * known.sum()
    return float(np.inf if same else 10 * np.log10(max(power, 1e-300) / noise))


def _face(loaded: ort.InferenceSession) -> list[Any]:
    return [
        [(v.name, v.type, len(v.shape)) for v in values]
        for values in (loaded.get_inputs(), loaded.get_outputs())
    ]


def drawn_of(seed: int) -> Drawn:
    """The model of a seed; every fifth is an extreme one."""
    return draw(Random(seed), extreme=seed % 5 == 4, wide=is_wide(WAYS[seed % len(WAYS)]))


def is_wide(way: str) -> bool:
    """Whether one of `WAYS` wants large matrices."""
    return way.startswith(("int4", "int8-"))


def run(start: int, count: int) -> list[tuple[int, str, str, str]]:
    """Seed, way, kind of verdict and why, for the models of these seeds: what `tools/fuzz.py` asks for."""
    found = []
    for seed in range(start, start + count):
        way = WAYS[seed % len(WAYS)]
        try:
            verdict = judge(drawn_of(seed), way)
        except Exception:  # noqa: BLE001 - the finding
            verdict = Verdict("failed", traceback.format_exc(limit=-5))
        found.append((seed, way, verdict.kind, verdict.why))
    return found
