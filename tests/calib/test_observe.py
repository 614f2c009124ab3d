"""Statistics of a model's tensors against ONNX Runtime and NumPy, in one pass and in several."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from rewrites import parse, run

from qcompile.calib.observe import Stats, Want, groups_within, observe, with_outputs
from qcompile.calib.stats import TensorStats, count_bins
from qcompile.errors import DataError
from qcompile.run.probe import Fact, probe

Feed = dict[str, NDArray[Any]]
NET = parse(
    "g (float[N,3,H,W] x) => (float[N,3,H,W] y) <float two = {2}> "
    "{ a = Relu(x) b = Mul(a, two) c = Sigmoid(b) d = Sub(c, a) y = Tanh(d) }"
)
NAMES = ("x", "a", "b", "c", "d", "y")


def feeds(count: int = 5, *, ragged: bool = False, side: int = 6) -> list[Feed]:
    rng = np.random.default_rng(0)
    sizes = [(1 + i % 2, 3, 2 + i, 7 - i) if ragged else (1, 3, side, side) for i in range(count)]
    return [
        {"x": (rng.normal(size=size) * (i + 1)).astype(np.float32)} for i, size in enumerate(sizes)
    ]


def by_hand(x: NDArray[Any]) -> dict[str, NDArray[Any]]:
    a = np.maximum(x, 0)
    b = a * np.float32(2)
    c = (1 / (1 + np.exp(-b.astype(np.float64)))).astype(np.float32)
    return {"x": x, "a": a, "b": b, "c": c, "d": c - a, "y": np.tanh(c - a)}


def watch(
    samples: list[Feed], *, histogram: bool = True, channels: bool = True, memory: int = 1 << 30
) -> Stats:
    wanted = dict.fromkeys(NAMES, Want(histogram, channels))
    facts = probe(NET, samples[0])
    return observe(NET, wanted, lambda: enumerate(samples), facts, memory=memory, threads=1)


@pytest.mark.parametrize("ragged", [False, True])
def test_against_numpy(ragged: bool) -> None:
    samples = feeds(ragged=ragged)
    found = watch(samples)
    assert (found.samples, found.passes) == (5, 1)
    assert list(found.tensors) == list(NAMES)
    for name, stats in found.tensors.items():
        values = [by_hand(feed["x"])[name] for feed in samples]
        np.testing.assert_allclose(stats.lows, [v.min() for v in values], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.highs, [v.max() for v in values], rtol=1e-5, atol=1e-6)
        assert stats.count == sum(v.size for v in values)
        per_channel = np.concatenate(
            [v.transpose(1, 0, 2, 3).reshape(3, -1) for v in values], axis=1
        )
        np.testing.assert_allclose(
            stats.mean(), per_channel.mean(axis=1, dtype=np.float64), rtol=1e-5, atol=1e-6
        )
    exact = [v for feed in samples for v in by_hand(feed["x"])["b"].ravel()]
    np.testing.assert_array_equal(found.tensors["b"].counts, count_bins(np.array(exact)))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("memory", "passes"), [(1, 6), (2 * 432, 3), (4 * 432, 2), (6 * 432, 1)])
def test_little_memory_takes_more_passes_and_finds_the_same(
    memory: int, passes: int, ragged: bool
) -> None:
    """A tensor of the first sample has 108 numbers, 432 bytes; ragged ones 2 x 3 x 2 x 7 or so."""
    samples = feeds(ragged=ragged)
    whole, parts = watch(samples), watch(samples, memory=memory if not ragged else memory * 7 // 18)
    assert parts.passes == passes
    assert parts.samples == whole.samples == 5
    for name in NAMES:
        ours, theirs = (dataclasses.asdict(made.tensors[name]) for made in (parts, whole))
        for key, values in theirs.items():
            np.testing.assert_array_equal(ours[key], values, err_msg=f"{name} {key}")


def test_only_what_is_asked_for() -> None:
    samples = feeds(2)
    wanted = {"b": Want(), "c": Want(histogram=True), "d": Want(channels=True)}
    found = observe(NET, wanted, lambda: enumerate(samples), {}, threads=1).tensors
    assert set(found) == {"b", "c", "d"}
    assert [found[n].counts is None for n in "bcd"] == [True, False, True]
    assert [found[n].sums is None for n in "bcd"] == [True, True, False]


def test_the_model_is_not_changed() -> None:
    before = ir.to_onnx_text(NET)
    watch(feeds(2), memory=1)
    assert ir.to_onnx_text(NET) == before


def test_nan_names_tensor_and_sample() -> None:
    model = parse("g (float[N] x) => (float[N] y) { a = Neg(x) b = Log(x) y = Add(a, b) }")
    samples: list[tuple[int, Feed]] = [
        (number, {"x": np.array(values, np.float32)})
        for number, values in ((3, [1, 2]), (7, [0.5, -1]), (9, [-1, -1]))
    ]
    wanted = {"a": Want(), "b": Want()}
    with pytest.raises(DataError, match="tensor 'b' is NaN for sample 7 of the calibration data"):
        observe(model, wanted, lambda: samples, {}, threads=1)


def test_infinities_are_seen() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Log(x) }")
    samples: list[Feed] = [{"x": np.array([0, 1], np.float32)}]
    found = observe(model, {"y": Want(histogram=True)}, lambda: enumerate(samples), {}, threads=1)
    assert (found.tensors["y"].low, found.tensors["y"].high) == (-np.inf, 0)
    assert not found.tensors["y"].bounded


def test_empty_tensors_count_as_nothing() -> None:
    samples = [{"x": np.zeros((1, 3, 0, 4), np.float32)}, *feeds(1)]
    assert watch(samples).tensors["a"].lows == [0.0]


def test_progress() -> None:
    """After each sample, the number of the pass and how many there are."""
    ticks: list[tuple[int, int]] = []
    samples = feeds(3)
    facts = probe(NET, samples[0])
    observe(
        NET, dict.fromkeys("abc", Want()), lambda: enumerate(samples), facts, memory=900, threads=1,
        tick=lambda number, passes: ticks.append((number, passes)),
    )  # fmt: skip
    assert ticks == [(0, 2)] * 3 + [(1, 2)] * 3


def peak(count: int) -> int:
    """Bytes that were held at once, above what there was, when so many samples of 0.75 MB are observed."""
    one = np.random.default_rng(0).normal(size=(1, 3, 256, 256)).astype(np.float32)

    def samples() -> Iterator[tuple[int, Feed]]:
        yield from ((i, {"x": one}) for i in range(count))

    facts = probe(NET, {"x": one})
    tracemalloc.start()
    try:
        observe(NET, dict.fromkeys(NAMES, Want(True, True)), samples, facts, threads=1)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_samples() -> None:
    few, many = peak(2), peak(12)
    assert few > 5 * 3 * 65536 * 4  # NumPy's arrays are counted at all
    assert many < few + 2 * 3 * 65536 * 4


# ---- its parts


def sized(**elements: int) -> dict[str, Fact]:
    return {name: Fact(np.dtype(np.float32), (size,)) for name, size in elements.items()}


def test_groups() -> None:
    facts = sized(a=10, b=20, c=30, d=100, e=1)
    assert groups_within("abcde", facts, 240) == [["a", "b", "c"], ["d"], ["e"]]
    assert groups_within("abcde", facts, 10_000) == [list("abcde")]
    assert groups_within("abcde", facts, 0) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert groups_within("ad", {}, 0) == [["a", "d"]]  # of unknown size
    assert groups_within("", facts, 100) == []


def test_any_value_can_be_an_output() -> None:
    """An inner one, an input, a constant; the outputs there were are gone, the model is as it was."""
    model = parse(
        "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { a = Add(x, w) y = Neg(a) }"
    )
    before = ir.to_onnx_text(model)
    shown = with_outputs(model, ["a", "x", "w"])
    values = run(shown, {"x": np.array([3, 4], np.float32)})
    assert [v.tolist() for v in values] == [[4, 6], [3, 4], [1, 2]]
    assert ir.to_onnx_text(model) == before


def test_what_no_output_needs_is_not_computed() -> None:
    model = parse(
        "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { a = Neg(x) b = Log(a) y = Add(b, w) }"
    )
    shown = with_outputs(model, ["a"])
    assert [node.op_type for node in shown.graph] == ["Neg"]
    assert not shown.graph.initializers
    assert [value.name for value in shown.graph.inputs] == ["x"]


def test_statistics_without_samples() -> None:
    found = observe(NET, {"a": Want(True, True)}, lambda: iter(()), {}, threads=1)
    assert found.samples == 0
    assert found.tensors["a"] == TensorStats()
