"""Models in ONNX Runtime as the backend suite runs them, and what is asked of their outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

Array = npt.NDArray[Any]
LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


class Runner:
    """A model in ONNX Runtime, optimized (`all`) and as it is written (`off`)."""

    def __init__(
        self, model: onnx.ModelProto | Path, levels: Sequence[str] = tuple(LEVELS)
    ) -> None:
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        self.sessions = {name: session(source, LEVELS[name]) for name in levels}

    def run(self, feed: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The outputs by level."""
        return {name: session.run(None, dict(feed)) for name, session in self.sessions.items()}

    @property
    def signature(self) -> list[tuple[str, str, int]]:
        """Name, type and rank of the inputs, then of the outputs."""
        session = self.sessions["all"]
        values = (*session.get_inputs(), *session.get_outputs())
        return [(value.name, value.type, len(value.shape or ())) for value in values]


def session(source: bytes | str, level: ort.GraphOptimizationLevel) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = level
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def ends(output: Any) -> tuple[float, float]:
    """The least and the largest finite value of an output of floats, 0 where there is none."""
    if not isinstance(output, np.ndarray) or not is_float(output):
        return 0.0, 0.0
    values = widened(output)
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def is_float(array: Array) -> bool:
    return "float" in array.dtype.name


def widened(array: Array) -> Array:
    return array.astype(np.float64)
