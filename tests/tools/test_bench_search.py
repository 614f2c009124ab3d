"""The comparison of the search with all plans: its rows and its table; that the search is near is tested beside it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from bench_search import Entry, Row, show, toy
from onnx import numpy_helper


@pytest.mark.parametrize("chain", [False, True])
def test_toys_differ_by_seed_and_are_valid(*, chain: bool) -> None:
    first, again, other = (toy(4, chain=chain, seed=seed) for seed in (1, 1, 2))
    onnx.checker.check_model(first, full_check=True)
    assert first == again
    assert first != other
    convs = [node for node in first.graph.node if node.op_type == "Conv"]
    assert [node.name for node in convs] == ["c0", "c1", "c2", "c3"]


def test_groups_differ_in_size_and_in_outliers() -> None:
    model = toy(12, chain=True)
    weights = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    assert len({w.shape for w in weights}) > 3
    spread = [float(np.abs(w).max() / np.sqrt(np.mean(w**2))) for w in weights]
    assert max(spread) > 3 * min(spread)


def test_an_answer_beyond_the_limit_is_infinitely_slow() -> None:
    best = Entry((), 100.0, 20.0)
    assert Row(19.0, best, Entry(("c0",), 110.0, 19.0), 3).gap == pytest.approx(0.1)
    assert Row(19.0, best, Entry((), 90.0, 18.9), 3).gap == math.inf


def test_the_table() -> None:
    bench: Any = SimpleNamespace(float_ns=200_000.0)
    best, found = Entry(("c1",), 100_000.0, 20.0), Entry(("c0", "c1"), 102_000.0, 21.0)
    lines = show("title", bench, [Row(19.0, best, found, 4)]).splitlines()
    assert lines[0] == "### title"
    assert lines[4] == "| 19.0 | 100.00 | 20.0 | 102.00 | 21.0 | 2.00% | 4 | c1 / c0 c1 |"
    assert lines[6] == "All float: 200.00 us."
