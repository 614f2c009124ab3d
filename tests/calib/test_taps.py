"""Large feature maps, which the graph itself reduces, and how grids and axes are chosen."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewrites import parse, run
from statistic import F32, Feed, assert_same, watch

from qcompile.calib.fold import COUNTED
from qcompile.calib.histogram import UNIT
from qcompile.calib.maps import places
from qcompile.calib.taps import (
    channel_axis,
    grid_steps,
    known_bounds,
    tapped,
    with_outputs,
)
from qcompile.errors import DataError
from qcompile.run.probe import probe
from qcompile.step import Need


def large(count: int = 4, side: int = 40) -> list[Feed]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(i - 1, 1 + i, (1, 8, side, side)).astype(F32)} for i in range(count)]


CONVS = parse(
    "g (float[N,8,H,W] x) => (float[N,8,H,W] y) <float[8,1,1,1] w = {1, 2, 3, 4, 5, 6, 7, 8}> "
    "{ a = Conv<group = 8>(x, w) b = Relu(a) y = Conv<group = 8>(b, w) }"
)


@pytest.mark.parametrize("counted", [64, 4096, 1 << 20])
def test_reduced_in_the_graph_or_not(counted: int) -> None:
    """Ranges and means are those of all values; histograms are close, and exact if all is counted."""
    samples = large()
    found = watch(samples, CONVS, ("a", "b", "y"), counted=counted).tensors
    w = np.arange(1, 9, dtype=F32).reshape(1, 8, 1, 1)
    for name, values in {
        "a": [f["x"] * w for f in samples],
        "b": [np.maximum(f["x"] * w, 0) for f in samples],
    }.items():
        stats = found[name]
        assert stats.low == min(v.min() for v in values)
        assert stats.high == max(v.max() for v in values)
        np.testing.assert_array_equal(stats.extremes.highs, [v.max() for v in values])
        together = np.concatenate(values)
        assert stats.channels is not None
        np.testing.assert_allclose(
            stats.channels.mean(),
            together.mean(axis=(0, 2, 3), dtype=np.float64),
            rtol=1e-4,
            atol=1e-4,
        )
        np.testing.assert_array_equal(stats.channels.highs, together.max(axis=(0, 2, 3)))
        np.testing.assert_array_equal(stats.channels.lows, together.min(axis=(0, 2, 3)))
        moment = np.square(together).mean(axis=(0, 2, 3))
        off = 0.6  # the grid has every ninth place
        np.testing.assert_allclose(stats.channels.second_moment(), moment, rtol=off)
        assert stats.histogram is not None
        assert stats.histogram.total == pytest.approx(UNIT * together.size, rel=0.01)
        if counted == 64:
            continue
        middle = stats.histogram.bins().clipped(stats.low, stats.high).quantile(0.9)
        assert middle == pytest.approx(np.quantile(together, 0.9), abs=0.03 * stats.span)


def test_reduced_maps_of_all_sizes() -> None:
    """Also of such as are too small for the grid that was laid out for the first sample."""
    samples = [*large(1), *large(1, side=3), *large(1, side=1), *large(1, side=90)]
    made = watch(samples, CONVS, ("b", "y"))
    assert made.samples == 4
    assert made.tensors["b"].count == 8 * (40 * 40 + 9 + 1 + 90 * 90)
    assert made.tensors["b"].high == max(
        np.max(f["x"] * np.arange(1, 9).reshape(1, 8, 1, 1)) for f in samples
    )


def test_nan_in_a_reduced_map_is_found() -> None:
    samples = large(3)
    samples[2]["x"][0, 5, 7, 9] = np.nan
    with pytest.raises(DataError, match=r"tensor 'a' is NaN at index \[0, 5, 7, 9\] for sample 2"):
        watch(samples, CONVS, ("a", "b"))


def test_the_shards_of_a_reduced_map_make_the_whole() -> None:
    samples = large(7)
    whole = watch(samples, CONVS, ("a", "b", "y")).tensors
    joined = watch(samples[:3], CONVS, ("a", "b", "y")).tensors
    for name, part in watch(samples[3:], CONVS, ("a", "b", "y")).tensors.items():
        joined[name].add(part)
    assert_same(joined, whole, rtol=1e-12)


# ---- its parts


@given(st.integers(1, 2000), st.lists(st.integers(1, 3000), min_size=1, max_size=3))
def test_grids(channels: int, sides: list[int]) -> None:
    """Odd steps, in small maps all places; no more values than are useful, unless few places would be left."""
    steps = grid_steps((1, channels, *sides))
    found = [places(side, step) for side, step in zip(sides, steps, strict=True)]
    assert all(step % 2 == 1 for step in steps)
    assert all(step == 1 or count >= 3 for step, count in zip(steps, found, strict=True))
    fewest = all(places(side, step + 2) < 6 for side, step in zip(sides, steps, strict=True))
    assert fewest or channels * math.prod(found) <= 2 * COUNTED


def values_of(text: str) -> dict[str, ir.Value]:
    model = parse(text)
    return {
        v.name or "": v for v in [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]
    }


def test_axes() -> None:
    found = values_of(
        "g (float[N,4,6,6] x, float[N,5,8] t) => (float[N,4,6,6] y, float[N,5,8] z) "
        "<float[4,4,1,1] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float[8,8] m> "
        "{ a = Conv(x, w) b = Sigmoid(a) c = Mul(a, b) y = Conv(c, w) u = Relu(t) v = MatMul(u, m) z = Add(v, t) }"
    )  # fmt: skip
    assert [channel_axis(found[name]) for name in "xabcy"] == [1] * 5
    assert [channel_axis(found[name]) for name in "tuvz"] == [-1] * 4


def test_bounds() -> None:
    found = values_of(
        "g (float[4] x) => (float[4] y) <float low = {0}, float six = {6}> "
        "{ a = Relu(x) b = Sigmoid(x) c = Softmax(x) d = Clip(x, low, six) e = Abs(x) f = Tanh(x) y = Sum(a, b, c, d, e, f) }"
    )
    inf = math.inf
    wanted = {
        "x": (-inf, inf),
        "a": (0, inf),
        "b": (0, 1),
        "c": (0, 1),
        "d": (0, 6),
        "e": (0, inf),
        "f": (-inf, inf),
    }
    assert {name: known_bounds(found[name]) for name in wanted} == wanted


def test_what_a_large_map_needs_is_computed_behind_it() -> None:
    facts = probe(CONVS, large(1)[0])
    made, taps = tapped(CONVS, [Need("a", histogram=True), Need("b", histogram=True)], facts)
    (group,) = taps.maps
    assert not taps.wholes
    assert list(group.outputs) == ["shapes", "peaks", "means", "bottoms", "grids"]
    assert [item.has_bottoms for item in group.maps] == [
        True,
        False,
    ]  # a Relu's least value is known
    plain, known = tapped(CONVS, [Need("a"), Need("b")], facts, shapes=False)
    assert list(known.maps[0].outputs) == ["peaks", "means", "bottoms", "grids"]
    assert "Shape" not in [node.op_type for node in plain.graph]
    after = [node.op_type for node in made.graph]
    assert after.index("GlobalMaxPool") < after.index("Relu")
    assert sum(taps.bytes.values()) < 4 * 2 * facts["a"].elements / 3
    assert "y" not in {value.name for value in made.graph.outputs}


def test_small_tensors_and_gram_come_out_whole() -> None:
    facts = probe(CONVS, large(1, side=8)[0])
    assert not tapped(CONVS, [Need("a")], facts)[1].maps
    facts = probe(CONVS, large(1)[0])
    assert not tapped(CONVS, [Need("a", gram=True)], facts)[1].maps
    assert not tapped(CONVS, [Need("a")], facts, whole=True)[1].maps


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


def test_what_reads_a_tensor_decides_its_axis() -> None:
    """Whichever reader comes first."""
    for first, second in (
        ("b = Conv(a, w)", "r = Reshape(a, s)"),
        ("r = Reshape(a, s)", "b = Conv(a, w)"),
    ):
        found = values_of(
            "g (float[1,2,4,4] x) => (float[1,2,4,4] b, float[32] r) <float[2,2,1,1] w = {1, 2, 3, 4}, int64[1] s = {32}> "
            f"{{ a = Relu(x) {first} {second} }}"
        )
        assert channel_axis(found["a"]) == 1


def test_maps_whose_size_is_an_input() -> None:
    """The shape of the input does not tell that of what Resize makes of it."""
    model = parse(
        "g (float[1,8,H,W] x, int64[4] sizes) => (float[1,8,A,B] y) <float[8,1,1,1] w = {1, 2, 3, 4, 5, 6, 7, 8}> "
        '{ a = Resize<mode = "nearest">(x, "", "", sizes) y = Conv<group = 8>(a, w) }'
    )
    samples = [
        {"x": large(1)[0]["x"], "sizes": np.array([1, 8, side, side], np.int64)}
        for side in (48, 60, 70)
    ]
    made = watch(samples, model, ("a", "y")).tensors
    assert made["y"].count == 8 * (48 * 48 + 60 * 60 + 70 * 70)


def test_maps_of_batches_that_vary_apart() -> None:
    model = parse(
        "g (float[N,8,H,W] x, float[M,8,H,W] z) => (float[N,8,H,W] y, float[M,8,H,W] v) "
        "<float[8,1,1,1] w = {1, 2, 3, 4, 5, 6, 7, 8}> { y = Conv<group = 8>(x, w) v = Conv<group = 8>(z, w) }"
    )
    one = large(1)[0]["x"]
    samples = [{"x": one, "z": one}, {"x": np.concatenate([one, one]), "z": one}]
    made = watch(samples, model, ("y", "v")).tensors
    assert (made["y"].count, made["v"].count) == (3 * one.size, 2 * one.size)


def test_a_bad_sample_does_not_change_how_others_are_counted() -> None:
    samples = large(6)
    bad = {"x": samples[0]["x"].copy()}
    bad["x"][0, 0, 0, 0] = np.nan
    alone = watch(samples, CONVS, ("a", "b")).tensors
    mixed = watch([*samples[:3], bad, *samples[3:]], CONVS, ("a", "b"), skip_bad=True).tensors
    assert_same(mixed, alone, rtol=1e-12)
