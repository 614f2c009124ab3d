"""`kit_metric.py`: a metric of the kit as one number a sample."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from shared import SHARED, model_path, needed

# the kit is looked for when the module is imported
TOOLS = Path(__file__).parents[2] / "tools"


@needed
def test_the_mean_is_the_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_EVAL", str(SHARED / "eval"))
    monkeypatch.setenv("QCOMPILE_TASK", "cifar10")
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    monkeypatch.delitem(sys.modules, "kit_metric", raising=False)
    import kit_metric
    from evaluate import TASKS

    session = ort.InferenceSession(
        model_path("cifar10_resnet20.onnx"), providers=["CPUExecutionProvider"]
    )
    found = kit_metric.score(session)
    task = TASKS[os.environ["QCOMPILE_TASK"]]
    right = [
        task.reduce(task.infer(session, feed), label)[0]
        for feed, label in (task.load(item) for item in task.items("calib"))
    ]
    np.testing.assert_allclose(found, 100.0 * np.array(right), atol=1e-6)  # top 1 is a mean already
