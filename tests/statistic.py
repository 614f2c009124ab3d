"""Statistics of small graphs, and their comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from rewrites import parse

from qcompile.calib.histogram import Histogram
from qcompile.calib.observe import Observed, Settings, observe
from qcompile.calib.statistics import Key, Statistics
from qcompile.calib.stats import TensorStats
from qcompile.run.probe import probe
from qcompile.step import Need

Feed = dict[str, NDArray[Any]]
NET = parse(
    "g (float[N,3,H,W] x) => (float[N,3,H,W] y) <float two = {2}> "
    "{ a = Relu(x) b = Mul(a, two) c = Sigmoid(b) d = Sub(c, a) y = Tanh(d) }"
)
NAMES = ("x", "a", "b", "c", "d", "y")
F32 = np.float32


def feeds(count: int = 5, *, ragged: bool = False, side: int = 6) -> list[Feed]:
    rng = np.random.default_rng(0)
    sizes = [(1 + i % 2, 3, 2 + i, 7 - i) if ragged else (1, 3, side, side) for i in range(count)]
    return [{"x": (rng.normal(size=size) * (i + 1)).astype(F32)} for i, size in enumerate(sizes)]


def by_hand(x: NDArray[Any]) -> Feed:
    a = np.maximum(x, 0)
    b = a * F32(2)
    c = (1 / (1 + np.exp(-b.astype(np.float64)))).astype(F32)
    return {"x": x, "a": a, "b": b, "c": c, "d": c - a, "y": np.tanh(c - a)}


def needs(*names: str, **what: bool) -> dict[str, Need]:
    what = what or {"histogram": True, "channels": True}
    return {name: Need(name, **what) for name in names}


def watch(
    samples: list[Feed], model: ir.Model = NET, names: Iterable[str] = NAMES, **settings: Any
) -> Observed:
    facts = probe(model, samples[0])
    return observe(
        model,
        needs(*names),
        lambda: enumerate(samples),
        facts,
        Settings(**{"workers": 1, **settings}),
    )


def counts(made: Histogram | None) -> tuple[int, dict[int, int], dict[int, int]]:
    assert made is not None
    sides = []
    for window in (made.positive, made.negative):
        filled = np.flatnonzero(window.counts)
        sides.append(
            dict(zip((filled + window.start).tolist(), window.counts[filled].tolist(), strict=True))
        )
    return made.zeros, sides[0], sides[1]


def assert_same(
    ours: Mapping[str, TensorStats], theirs: Mapping[str, TensorStats], rtol: float = 0
) -> None:
    assert list(ours) == list(theirs)
    for name, mine in ours.items():
        other = theirs[name]
        assert (mine.count, mine.low, mine.high) == (other.count, other.low, other.high), name
        np.testing.assert_array_equal(mine.extremes.lows, other.extremes.lows)
        np.testing.assert_array_equal(mine.extremes.highs, other.extremes.highs)
        assert counts(mine.histogram) == counts(other.histogram)
        assert (mine.channels is None) == (other.channels is None)
        if mine.channels is not None and other.channels is not None:
            np.testing.assert_allclose(mine.channels.sums, other.channels.sums, rtol=rtol)
            np.testing.assert_allclose(mine.channels.squares, other.channels.squares, rtol=rtol)
            np.testing.assert_array_equal(mine.channels.highs, other.channels.highs)


def tiny() -> Statistics:
    """Statistics of one tensor."""
    made = TensorStats(5, -1.5, 2.0)
    made.histogram = Histogram()
    made.histogram.count(np.array([-1.5, 2.0], F32))
    return Statistics(Key("a" * 64, "m.onnx", (), {}), {"t": made}, 1)
