"""Real models of the shared folder: compiled with default choices, judged by their own data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from shared import calibration, model_path, needed

from qcompile import Recipe, Result, compile_model
from qcompile.report import GOOD, NOT_FASTER

pytestmark = [
    needed,
    pytest.mark.slow,
    pytest.mark.usefixtures("clock"),
]
RECIPE = Recipe(threads=2, bench_seconds=0.05)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, its task in the kit, and what its result must have.

    Attributes:
        path: below `shared/models`.
        task: of `shared/eval/evaluate.py`.
        samples: for calibration.
        least: decibels of the worst output slice.
        forms: that some nodes have.
    """

    path: str
    task: str
    samples: int
    least: float
    forms: frozenset[str]


MODELS = {
    "mobilenet_v2": Model("mobilenet_v2.onnx", "imagenet", 12, 16, frozenset({"static"})),
    "cifar10_resnet20": Model("cifar10_resnet20.onnx", "cifar10", 30, 20, frozenset({"static"})),
    "all-MiniLM-L6-v2": Model("all-MiniLM-L6-v2/model.onnx", "stsb", 8, 15, frozenset({"dynamic"})),
    "silero_vad": Model("silero_vad.onnx", "vad", 2, 10, frozenset()),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_real_model(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    path = model_path(model.path)
    feeds = calibration(model.task, model.samples)
    result: Result = compile_model(path, feeds, output=tmp_path / "o.onnx", recipe=RECIPE)
    assert result.exit_code in (GOOD, NOT_FASTER if not model.forms else GOOD)
    assert result.worst_db is None or result.worst_db >= model.least
    assert model.forms <= {row["form"] for row in result.plan}
    assert not [v for v in result.kernels["nodes"] if v["verdict"] == "leftover"]
    if model.forms:
        assert result.size_mb["after"] < 0.4 * result.size_mb["before"]
