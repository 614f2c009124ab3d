"""What statistics say of each tensor, as a table: against NumPy, and in JSON whatever was seen."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from qcompile.calib.histogram import Histogram
from qcompile.calib.ranges import GRID, METHODS
from qcompile.calib.statistics import Key, Shard, Statistics
from qcompile.calib.stats import Channels, Extremes, TensorStats
from qcompile.survey import survey

F32 = np.float32
MAX = float(np.finfo(F32).max)
VALUES = np.random.default_rng(0).normal(size=(6, 5000)).astype(F32)
ROW = {
    "name", "count", "min", "max", "infinite", "mean", "deviation", "spread", "zeros", "saturated", "outliers",
    "ranges",
}  # fmt: skip


def stats(samples: NDArray[Any], *, histogram: bool = True, channels: bool = True) -> TensorStats:
    """Of samples of one channel each: (samples, values)."""
    exact = samples.astype(np.float64)
    lows, highs = samples.min(axis=1), samples.max(axis=1)
    seen = Extremes(len(samples), float(exact.min(axis=1).sum()), float(exact.max(axis=1).sum()), lows, highs)  # fmt: skip
    made = TensorStats(samples.size, float(lows.min()), float(highs.max()), seen)
    if histogram:
        made.histogram = Histogram()
        made.histogram.count(samples.reshape(-1))
    if channels:
        made.channels = Channels(
            -1, samples.size, exact.sum(keepdims=True).reshape(1), lows.min(keepdims=True), highs.max(keepdims=True),
            samples.size, np.square(exact).sum(keepdims=True).reshape(1),
        )  # fmt: skip
    return made


def surveyed(*methods: str, **tensors: TensorStats) -> dict[str, Any]:
    """The table, through JSON and back."""
    key = Key(
        "a" * 64,
        "m.onnx",
        (Shard("one", "b" * 64, 3), Shard("two", "c" * 64, 4)),
        {"qcompile": "1"},
    )
    found = Statistics(
        key, tensors, 7, 2, {"n": "why"}, [{"x": np.ones(1)}], [{"x": np.ones(1)}] * 2, ("forced.",)
    )
    table = survey(found, methods) if methods else survey(found)
    again: dict[str, Any] = json.loads(json.dumps(table, allow_nan=False))
    return again


def row(made: TensorStats) -> dict[str, Any]:
    (found,) = surveyed(t=made)["tensors"]
    assert set(found) == ROW
    assert found["name"] == "t"
    return dict(found)


def test_the_head() -> None:
    assert surveyed() == {
        "model": "m.onnx", "model_digest": "a" * 64, "versions": {"qcompile": "1"}, "samples": 7, "skipped": 2,
        "data": [
            {"description": "one", "digest": "b" * 64, "samples": 3},
            {"description": "two", "digest": "c" * 64, "samples": 4},
        ],
        "held_out": 1, "forced": ["forced."], "unobserved": {"n": "why"}, "methods": list(METHODS), "tensors": [],
    }  # fmt: skip


def test_tensors_keep_their_order() -> None:
    found = surveyed(b=stats(VALUES), a=TensorStats(), c=stats(VALUES))
    assert [line["name"] for line in found["tensors"]] == ["b", "a", "c"]


def test_against_numpy() -> None:
    found = row(stats(VALUES))
    assert (found["count"], found["infinite"]) == (VALUES.size, 0)
    assert (found["min"], found["max"]) == (VALUES.min(), VALUES.max())
    assert found["mean"] == pytest.approx(VALUES.mean(), abs=1e-6)
    assert found["deviation"] == pytest.approx(VALUES.std(), rel=1e-5)
    assert found["spread"] == pytest.approx(np.ptp(VALUES) / VALUES.std(), rel=1e-5)
    assert found["zeros"] == found["outliers"] == 0
    assert 0 < found["saturated"] < 0.001


def test_ranges_are_those_of_the_methods() -> None:
    made = stats(VALUES)
    found = row(made)["ranges"]
    assert found == {name: list(METHODS[name](made, GRID)) for name in METHODS}
    assert found["minmax"] == [VALUES.min(), VALUES.max()]
    assert found["mean"] == pytest.approx([VALUES.min(axis=1).mean(), VALUES.max(axis=1).mean()])
    chosen = surveyed("mse", t=made)
    assert chosen["methods"] == ["mse"]
    assert chosen["tensors"][0]["ranges"] == {"mse": found["mse"]}


def test_shares() -> None:
    clipped = VALUES.clip(0, 1)
    found = row(stats(clipped))
    assert found["zeros"] == pytest.approx((clipped == 0).mean())
    assert found["saturated"] == pytest.approx((clipped > 1 - 1 / 128).mean(), abs=0.002)
    far = VALUES.copy()
    far[0, :3] = 50
    assert row(stats(far))["outliers"] == pytest.approx(3 / far.size)


def test_what_was_not_asked_for_is_null() -> None:
    found = row(stats(VALUES, histogram=False))
    assert found["zeros"] is found["saturated"] is found["outliers"] is None
    assert found["ranges"]["mse"] == found["ranges"]["kl"] == found["ranges"]["minmax"]
    found = row(stats(VALUES, channels=False))
    assert found["mean"] is found["deviation"] is found["spread"] is found["outliers"] is None
    assert found["zeros"] == 0


def test_a_tensor_that_held_nothing() -> None:
    found = row(TensorStats())
    assert (found["count"], found["min"], found["max"]) == (0, 0, 0)
    assert set(map(tuple, found["ranges"].values())) == {(0, 0)}
    assert row(TensorStats(histogram=Histogram(), infinite=9))["infinite"] == 9


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, MAX, -MAX, 1e-45])
def test_a_constant(value: float) -> None:
    found = row(stats(np.full((3, 7), value, F32)))
    assert found["min"] == found["max"] == pytest.approx(value)
    assert found["zeros"] == (abs(value) < 1e-40)


@given(
    samples=npst.arrays(
        F32, npst.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)  # fmt: skip
def test_any_finite_numbers_can_be_shown(samples: NDArray[Any]) -> None:
    found = row(stats(samples))
    for low, high in found["ranges"].values():
        assert low <= high


def test_sums_that_have_overflowed() -> None:
    """A mask of -FLT_MAX squared is beyond float32: whatever was gathered, the table is JSON."""
    made = stats(np.full((3, 7), -MAX, F32))
    assert made.channels is not None
    made.channels.squares = np.array([np.inf])
    assert row(made)["deviation"] is None
    made.channels.sums = np.array([-np.inf])
    found = row(made)
    assert found["mean"] is found["spread"] is None
