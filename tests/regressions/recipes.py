"""Every recipe that a case runs through, and the rule for what comes out."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from unittest import mock

import onnx
from lowering import eager
from regressions.case import Case, Done, Truth, feeds, nodes_of

import qcompile.commands
import qcompile.compiler  # what is patched below must have been imported
import qcompile.fewbits.assign
import qcompile.opened
from qcompile import QcompileError, compile_model
from qcompile.recipe import BUILT_IN, Recipe
from qcompile.report import INACCURATE, NOT_FASTER
from qcompile.targets.schema import Boundary, Cost, Target
from qcompile.verify import latency

if TYPE_CHECKING:
    from pathlib import Path

SAMPLES, FRESH = 12, 5
_COMMON: dict[str, Any] = {"bench_seconds": 0.01, "threads": 1, "sqnr_goal": 0.0}


@dataclasses.dataclass(frozen=True)
class Way:
    """A way through the compiler.

    Attributes:
        recipe: with which options; nothing is left float because it was measured to be harmful.
        data: whether there are samples.
    """

    recipe: Recipe
    data: bool = True


RECIPES: Mapping[str, Way] = {
    name: Way(dataclasses.replace(BUILT_IN[base], **_COMMON, **more), data)
    for name, base, data, more in (
        ("static qdq", "int8-static", True, {"format": "qdq"}),
        ("static fused", "int8-static", True, {"format": "fused"}),
        ("dynamic", "int8-dynamic", True, {}),
        ("int8", "int8", True, {}),
        ("no data", "int8", False, {}),
        ("int4", "int4", True, {}),
        ("int4, no data", "int4", False, {}),
        ("int8 weights", "int8-weights", True, {}),
    )
}
FEW = tuple(name for name, way in RECIPES.items() if way.recipe.bits)
_HEAVY = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "LSTM", "GRU", "RNN")


@contextlib.contextmanager
def small_models_pay() -> Iterator[None]:
    """Kernels and borders cost nothing and no weight is too small: all that can be integer is, and nothing is timed."""

    def free(name: str) -> Target:
        found = eager()
        rows = tuple(dataclasses.replace(row, int8=Cost()) for row in found.op)
        return dataclasses.replace(found, op=rows, boundary=Boundary(0, 0, 0, 0))

    def race(sessions: Mapping[str, Any], feed: object, **_: object) -> latency.Timing:
        first, *others = sessions
        speeds = {first: 1.0} | dict.fromkeys(others, 2.0)
        return latency.Timing({n: 2.0 / s for n, s in speeds.items()}, speeds, 3)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(qcompile.opened, "load_target", free))
        stack.enter_context(mock.patch.object(qcompile.fewbits.assign, "_LEAST", 0))
        stack.enter_context(
            mock.patch("qcompile.workshop.Workshop.timed", lambda shop, request: request)
        )
        for name, module in list(sys.modules.items()):
            if name.startswith("qcompile") and hasattr(module, "race"):
                stack.enter_context(mock.patch.object(module, "race", race))
        yield


def made(case: Case, name: str, folder: Path) -> Done | QcompileError:
    """What became of the case: a result and its file, or the sentence that refuses it and no file.

    Raises:
        AssertionError: the model given was changed, or a half-written file was left.
    """
    way, path = RECIPES[name], folder / "result.onnx"
    before = case.model.SerializeToString(deterministic=True)
    data = feeds(case, SAMPLES, 0) if way.data else None
    try:
        few = case.options if way.recipe.bits else {}
        recipe = dataclasses.replace(way.recipe, **few)
        result = compile_model(case.model, data, output=path, recipe=recipe)
    except QcompileError as error:
        assert not list(folder.iterdir()), "a file was left behind"
        return error
    finally:
        after = case.model.SerializeToString(deterministic=True)
        assert before == after, "the input was changed"
    quantized = {v["node"] for v in result.kernels["nodes"] if v["verdict"] == "integer"}
    return Done(name, result, onnx.load(path), frozenset(quantized))


def assert_answered(case: Case, truth: Truth | None, name: str, folder: Path) -> None:
    """The rule for every case and recipe: a right answer, or a sentence that says what is in the way."""
    done = made(case, name, folder)
    words = case.refused.get(name) or case.refused.get("")
    if isinstance(done, QcompileError):
        assert words, f"refused: {done}"
        assert words in str(done)
        return
    assert not words, "it was to be refused"
    assert truth is not None
    onnx.checker.check_model(done.model)
    least = bound(case, name)
    low = {part: db for part, db in truth.errors(done.model).items() if db < least}
    assert not low, (low, done.result.notes)
    assert not [v for v in done.result.kernels["nodes"] if v["verdict"] == "leftover"]
    assert done.result.exit_code != INACCURATE
    assert len(done.quantized) >= expected(case, name), (done.quantized, done.result.kept_float)
    assert_nothing_is_silent(case, done)
    case.check(done)


def bound(case: Case, name: str) -> float:
    """Decibels that every part of every output must have."""
    usual = {"int4": case.least4, "int4, no data": case.least4, "int8 weights": case.least8}
    return case.bounds.get(name, usual.get(name, case.least))


def expected(case: Case, name: str) -> int:
    """How many nodes run on integer kernels, or on weights of few bits, at least."""
    if name.startswith("static"):
        return case.static
    if name in ("dynamic", "no data"):
        return case.dynamic
    return case.static + case.dynamic if name == "int8" else case.bits


def assert_nothing_is_silent(case: Case, done: Done) -> None:
    """Where nothing was quantized the result says so and why; every product left float has a reason."""
    known = {node.name for node in nodes_of(done.model.graph) if node.name}
    if not done.quantized:
        assert done.result.exit_code == NOT_FASTER
        reason = done.result.warnings[0]
        assert reason.startswith("nothing was quantized: ")
        assert case.nothing.get(done.recipe, "") in reason
        assert reason.endswith(GENERAL) or any(name in reason for name in known), reason
    told = {row["node"]: row["why"] for row in done.result.kept_float}
    assert all(told.values())
    silent = [node.name for node in float_products(done.model) if node.name not in told]
    assert not silent, (silent, told)


GENERAL = (
    "the model has no node with an integer kernel.",
    "the model has no product with constant weights.",
)


def float_products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Products with a float constant, in all graphs, as they are in the file."""
    nodes = nodes_of(model.graph)
    constants = {tensor.name for tensor in model.graph.initializer}
    codes = {out for node in nodes if node.op_type == "DequantizeLinear" for out in node.output}
    return [
        node
        for node in nodes
        if node.op_type in _HEAVY
        and not codes & set(node.input)
        and constants & set(node.input[:2])
    ]
