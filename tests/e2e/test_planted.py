"""A fault planted in a real model: one channel of a residual stream reaches 100 times as far, and its readers undo it.

The float function stays the same. The fault is repaired by scales of channels, or, where these are off, isolated by the
search; either takes at most 2 log2(sites) + 5 whole evaluations.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from shared import calibration, model_path, needed

import qcompile.workshop
from qcompile import Recipe, Result, compile_model
from qcompile.report import GOOD

pytestmark = [needed, pytest.mark.slow, pytest.mark.usefixtures("clock")]
RECIPE = Recipe(threads=2, bench_seconds=0.05, search_time=300.0)
FACTOR = 100.0
LOST = 4.0  # decibels that a repaired model may have less than the one without the fault
LIMIT = 20.0
CULPRIT = "/features/features.7/conv/conv.2/Conv"  # the first Conv that writes the stream


@dataclasses.dataclass(frozen=True)
class Run:
    """A compilation, and the decibels of every attempt that it judged, in order."""

    result: Result
    judged: list[float]

    def until(self, decibels: float) -> int:
        """Evaluations until one had so many."""
        return next(i for i, db in enumerate(self.judged, 1) if db >= decibels)

    @property
    def allowed(self) -> float:
        sites = sum(row["form"] in ("static", "free") for row in self.result.plan)
        return 2 * math.log2(sites) + 5


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compiles a model, and counts."""
    judged: list[float] = []
    true_judge = qcompile.workshop.Workshop.judge

    def judge(shop: Any, attempt: Any, limit: int | None = None) -> Any:
        found = true_judge(shop, attempt, limit)
        judged.append(attempt.db)
        return found

    monkeypatch.setattr(qcompile.workshop.Workshop, "judge", judge)
    feeds = calibration("imagenet", 20)

    def compiled(model: onnx.ModelProto, **options: Any) -> Run:
        judged.clear()
        recipe = dataclasses.replace(RECIPE, **options)
        return Run(compile_model(model, feeds, recipe=recipe), list(judged))

    return compiled


def stream(model: onnx.ModelProto) -> tuple[list[Any], list[Any]]:
    """The Convs that write the residual stream of CULPRIT, and those that read it."""
    nodes = model.graph.node
    values = {next(node for node in nodes if node.name == CULPRIT).output[0]}
    size = 0
    while len(values) > size:
        size = len(values)
        for node in nodes:
            if node.op_type == "Add" and values & {*node.input, *node.output}:
                values |= {*node.input, *node.output}
    convs = [node for node in nodes if node.op_type == "Conv"]
    writers = [node for node in convs if node.output[0] in values]
    return writers, [node for node in convs if node.input[0] in values]


def planted() -> tuple[onnx.ModelProto, int, list[str]]:
    """The model with the fault, its channel (the one of the largest weights), and the Convs around the stream."""
    model = onnx.load(model_path("mobilenet_v2.onnx"))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    writers, readers = stream(model)
    first = numpy_helper.to_array(tensors[writers[0].input[1]])
    channel = int(np.square(first).sum(axis=(1, 2, 3)).argmax())

    def scale(name: str, axis: int, factor: float) -> None:
        values = np.moveaxis(numpy_helper.to_array(tensors[name]).copy(), axis, 0)
        values[channel] *= factor
        tensors[name].CopyFrom(numpy_helper.from_array(np.moveaxis(values, 0, axis), name))

    for node in writers:
        for name in node.input[1:]:
            scale(name, 0, FACTOR)
    for node in readers:
        scale(node.input[1], 1, 1 / FACTOR)
    return model, channel, [node.name for node in (*writers, *readers)]


def test_the_fault_is_found_and_repaired(run: Any) -> None:
    clean = run(onnx.load(model_path("mobilenet_v2.onnx"))).result
    model, channel, _ = planted()
    done = run(model)
    assert min(done.judged[:3]) < clean.worst_db - 15  # there is a fault to find
    assert done.result.exit_code == GOOD
    assert done.result.worst_db > clean.worst_db - LOST
    assert done.until(clean.worst_db - LOST) <= done.allowed
    assert any(f"Channel {channel} of {CULPRIT}_output_0 " in note for note in done.result.notes)


def test_the_fault_is_found_and_isolated(run: Any) -> None:
    model, _, around = planted()
    done = run(model, equalize=False, min_sqnr=LIMIT)
    assert max(done.judged[:3]) < LIMIT - 10
    assert done.result.exit_code == GOOD
    assert done.result.worst_db >= LIMIT
    assert done.until(LIMIT) <= done.allowed
    left = {row["node"] for row in done.result.kept_float}
    assert set(around) <= left
    convs = [row for row in done.result.plan if row["op"] == "Conv"]
    assert len(left) < len(convs) / 2  # the rest of the model is integer still
    assert any("Most of the error comes from" in n and CULPRIT in n for n in done.result.notes)
