"""The user's metric: numbers and scores a sample, and what is said of functions that fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from networks import linear_net, rows, save

from qcompile.errors import DataError
from qcompile.run.session import Session
from qcompile.verify.metric import Score, load_metric


@pytest.fixture
def session(tmp_path: Any) -> Session:
    return Session(save(linear_net(), tmp_path / "m.onnx"))


def test_a_function_gets_the_session_of_onnxruntime(session: Session) -> None:
    def positive(given: ort.InferenceSession) -> float:
        return float((given.run(None, {"x": rows()})[0] > 0).mean())

    score = load_metric(positive, lower_is_better=False).of(session)
    assert score.value == pytest.approx((session.run({"x": rows()})[0] > 0).mean())
    assert score.samples is None


def test_scores_a_sample_are_averaged_and_paired(session: Session) -> None:
    first = load_metric(lambda given: [1, 0, 1, 1], lower_is_better=False).of(session)
    second = load_metric(lambda given: np.array([1, 0, 0, 1]), lower_is_better=False).of(session)
    assert (first.value, second.value) == (0.75, 0.5)
    assert first.drop(second, lower_is_better=False) == 0.25
    assert first.drop(second, lower_is_better=True) == -0.25
    assert first.sigma(second) == pytest.approx(np.std([0, 0, -1, 0], ddof=1) / 2)
    assert first.sigma(Score(0.5)) is None


@pytest.mark.parametrize("value", [float("nan"), [], [1, float("inf")], "good", None])
def test_no_number(value: Any, session: Session) -> None:
    with pytest.raises(DataError, match="the metric"):
        load_metric(lambda given: value, lower_is_better=False).of(session)


def test_a_function_that_fails(session: Session) -> None:
    def broken(given: Any) -> float:
        raise KeyError("label")

    with pytest.raises(DataError, match="the metric broken raised KeyError: 'label'; correct it"):
        load_metric(broken, lower_is_better=False).of(session)


def test_there_is_no_such_function() -> None:
    with pytest.raises(DataError, match=r"has no function 'sqrtt'.*Did you mean 'sqrt'"):
        load_metric("math:sqrtt", lower_is_better=False)
