"""The user's own metric: a Python function that scores a session on labelled data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.calib.spool import load_function
from qcompile.errors import DataError
from qcompile.run.session import Session

Function = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric of one model: its value, and the scores of single samples where the function gives them."""

    value: float
    samples: npt.NDArray[np.float64] | None = None

    def drop(self, other: Score, *, lower_is_better: bool) -> float:
        """By how much `other` is worse than this one, in the metric's unit; negative if it is better."""
        worse = self.value - other.value
        return -worse if lower_is_better else worse

    def sigma(self, other: Score) -> float | None:
        """Sampling noise of the difference: the standard error of the paired scores; None without them."""
        if self.samples is None or other.samples is None:
            return None
        if self.samples.shape != other.samples.shape or self.samples.size < 2:
            return None
        return float((other.samples - self.samples).std(ddof=1) / math.sqrt(self.samples.size))


@dataclasses.dataclass(frozen=True)
class Metric:
    """A function of an `onnxruntime.InferenceSession` that returns a number, or a score a sample.

    Attributes:
        function: called with the session of a model; an array that it returns is averaged.
        name: for messages.
        lower_is_better: as for perplexity, or error rates.
        reference: of the float model, once it was scored.
    """

    function: Function
    name: str
    lower_is_better: bool = False
    reference: Score | None = None

    def of(self, session: Session) -> Score:
        """The metric of a model.

        Raises:
            DataError: the function fails, or returns no finite number.
        """
        try:
            found = self.function(session.native)
            values = np.asarray(found, np.float64)
        except Exception as error:  # the user's own code
            raise DataError(
                f"the metric {self.name} raised {type(error).__name__}: {error}; correct it."
            ) from error
        if not values.size or not np.isfinite(values).all():
            raise DataError(
                f"the metric {self.name} returned {found!r}: it should return a finite number, or an array"
                " with one a sample."
            )
        return Score(float(values.mean()), values.reshape(-1) if values.size > 1 else None)


def scored(metric: Metric, session: Session) -> Metric:
    """The metric with the float model's score, so that a function that fails does so before anything else is done.

    Raises:
        DataError: as `Metric.of`.
    """
    return dataclasses.replace(metric, reference=metric.of(session))


def load_metric(source: str | Function, *, lower_is_better: bool) -> Metric:
    """The metric at `module:function`, or the function itself.

    Raises:
        DataError: there is no such function.
    """
    if callable(source):
        return Metric(source, getattr(source, "__name__", "given"), lower_is_better)
    return Metric(
        load_function(source, "takes a session and returns a number"), source, lower_is_better
    )
