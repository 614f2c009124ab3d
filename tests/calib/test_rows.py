"""Rows that weights are multiplied with: their products are the node's outputs, their sums those of NumPy."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import constant
from numpy.typing import NDArray
from rewrites import parse, random_feed, run

from qcompile.calib.rows import (
    Gatherer,
    Gram,
    Window,
    columns,
    gather,
    spread,
    window,
    windows_within,
)
from qcompile.graph.edit import array
from qcompile.run.probe import probe

Array = NDArray[Any]
ALL = 1 << 30


def conv(
    out: int, channels: int, kernel: list[int], sides: list[int], attributes: str, n: int = 2
) -> str:
    group = 1
    if "group = " in attributes:
        group = int(re.findall(r"group = (\d+)", attributes)[0])
    dims = ",".join(map(str, [n, channels, *sides]))
    weight = constant("w", out, channels // group, *kernel)
    return f"g (float[{dims}] x) => (float[A,B] y) <{weight}> {{ y = Conv{attributes}(x, w) }}"


def shape_of(model: ir.Model) -> Window:
    found = window(model.graph[0])
    assert isinstance(found, Window)
    return found


CONVS = [
    conv(3, 2, [3, 3], [7, 6], ""),
    conv(3, 2, [3, 3], [7, 6], "<pads = [1, 1, 1, 1]>"),
    conv(3, 2, [3, 2], [7, 6], "<pads = [0, 1, 2, 1], strides = [2, 3]>"),
    conv(3, 2, [3, 3], [9, 8], "<dilations = [2, 3], pads = [2, 3, 2, 3]>"),
    conv(3, 2, [2, 3], [9, 8], "<dilations = [3, 1], strides = [2, 1], pads = [1, 0, 0, 2]>"),
    conv(3, 2, [1, 1], [4, 5], ""),
    conv(3, 2, [1, 1], [4, 5], "<strides = [2, 2]>"),
    conv(4, 4, [3, 3], [5, 5], "<group = 4, pads = [1, 1, 1, 1]>"),
    conv(8, 4, [3, 3], [5, 5], "<group = 4>"),
    conv(6, 4, [3, 3], [5, 5], "<group = 2, strides = [2, 2], pads = [1, 1, 1, 1]>"),
    conv(3, 2, [4, 4], [7, 6], '<auto_pad = "SAME_UPPER", strides = [2, 2]>'),
    conv(3, 2, [4, 4], [7, 6], '<auto_pad = "SAME_LOWER", strides = [2, 2]>'),
    conv(3, 2, [4, 3], [7, 6], '<auto_pad = "SAME_LOWER">'),
    conv(3, 2, [1, 1], [7, 6], '<auto_pad = "SAME_UPPER", strides = [3, 3]>'),
    conv(3, 2, [3, 3], [7, 6], '<auto_pad = "VALID", strides = [2, 1]>'),
    conv(3, 2, [3], [9], "<pads = [1, 2], strides = [2]>"),
    conv(4, 4, [5], [9], '<group = 4, auto_pad = "SAME_UPPER">'),
    conv(2, 2, [2, 3, 2], [4, 5, 3], "<pads = [1, 0, 1, 0, 1, 0], strides = [1, 2, 1]>"),
    conv(3, 2, [3, 3], [7, 6], "<pads = [1, 1, 1, 1]>", n=1),
]


@pytest.mark.parametrize("text", CONVS)
def test_all_rows_times_the_weight_are_the_output_of_a_conv(text: str) -> None:
    model = parse(text)
    feed = random_feed(model)
    shape, w = shape_of(model), array(model.graph[0].inputs[1])
    assert w is not None
    y = run(model, feed)[0]
    x = columns(shape, feed["x"], ALL)
    made = np.matmul(w.reshape(shape.groups, -1, shape.depth), x)  # (groups, out / group, rows)
    wanted = np.moveaxis(y, 1, 0).reshape(shape.groups, len(w) // shape.groups, -1)
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", CONVS)
def test_some_rows_are_rows_of_the_output_in_order(text: str) -> None:
    model = parse(text)
    feed = random_feed(model)
    shape = shape_of(model)
    everything = columns(shape, feed["x"], ALL)
    some = columns(shape, feed["x"], 3)
    places = spread(everything.shape[2], 3)
    np.testing.assert_array_equal(some, everything[:, :, places])
    assert len(places) == min(3, everything.shape[2])


@pytest.mark.parametrize(
    ("node", "size", "weight"),
    [
        ("MatMul(x, w)", "2,5,4", (4, 3)),
        ("MatMul(x, w)", "4", (4, 3)),
        ("MatMul(x, w)", "6,4", (4, 3)),
        ("Gemm(x, w)", "6,4", (4, 3)),
        ("Gemm<transB = 1>(x, w)", "6,4", (3, 4)),
    ],
)
def test_all_rows_times_the_weight_are_the_output_of_a_product(
    node: str, size: str, weight: tuple[int, int]
) -> None:
    model = parse(
        f"g (float[{size}] x) => (float[A,B] y) <{constant('w', *weight)}> {{ y = {node} }}"
    )
    feed = random_feed(model)
    shape = shape_of(model)
    w = array(model.graph[0].inputs[1])
    assert w is not None
    assert (shape.groups, shape.depth) == (1, 4)
    x = columns(shape, feed["x"], ALL)[0]
    made = x.T @ (w.T if "transB" in node else w)
    np.testing.assert_allclose(made, run(model, feed)[0].reshape(-1, 3), rtol=1e-5, atol=1e-5)
    assert columns(shape, feed["x"], 2).shape == (1, 4, min(2, x.shape[1]))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = Gemm<transA = 1>(x, w)", "transA is set"),
        ("y = MatMul(x, v)", "its weight has 3 dimensions, not 2"),
        ("y = MatMul(x, x)", "its weight is not constant"),
        ("y = Relu(x)", "Relu multiplies no rows with a weight"),
    ],
)
def test_what_has_no_rows_is_told_why(body: str, why: str) -> None:
    weights = f"{constant('w', 4, 4)}, {constant('v', 1, 4, 4)}"
    model = parse(f"g (float[4,4] x) => (float[A,B] y) <{weights}> {{ {body} }}")
    assert window(model.graph[0]) == why


@given(st.integers(0, 3000), st.integers(1, 300))
def test_places_are_spread_evenly(total: int, most: int) -> None:
    places = spread(total, most)
    assert len(places) == min(total, most)
    assert (np.diff(places) > 0).all()
    if len(places):
        assert places[0] >= 0
        assert places[-1] < total
        parts = (places * len(places)) // total
        assert np.abs(parts - np.arange(len(places))).max() <= 1
    np.testing.assert_array_equal(places, spread(total, most))


@pytest.mark.parametrize("width", [8, 10, 16, 20, 40])
def test_places_are_not_all_in_few_columns_of_an_image(width: int) -> None:
    """A fixed step of a multiple of the width would see one column."""
    seen = np.unique(spread(2 * width * 64, 64) % width)
    assert len(seen) > width * 0.7


def slow_gram(rows: Array, low: float, high: float) -> Gram:
    """One row at a time: (groups, k, rows)."""
    groups, depth, _ = rows.shape
    made = Gram(np.zeros((groups, depth, depth)), np.zeros((groups, depth)), np.zeros(groups, int))
    for g in range(groups):
        for x in rows[g].T.astype(np.float64):
            if (x >= low).all() and (x <= high).all():
                made.matrix[g] += np.outer(x, x)
                made.sums[g] += x
                made.count[g] += 1
    return made


def assert_same(made: Gram, wanted: Gram) -> None:
    np.testing.assert_array_equal(made.count, wanted.count)
    np.testing.assert_allclose(made.matrix, wanted.matrix, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(made.sums, wanted.sums, rtol=1e-4, atol=1e-3)
    assert made.matrix.dtype == made.sums.dtype == np.float64


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 5), st.lists(st.integers(0, 9), max_size=5),
    st.sampled_from([math.inf, 2.0, 0.5, 0.0]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_sums_against_one_row_at_a_time(
    groups: int, depth: int, counts: list[int], limit: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal((groups, depth, n)).astype(np.float32) for n in counts]
    gatherer = Gatherer(Window(groups, depth), -limit, limit)
    for part in parts:
        gatherer.add(part)
    everything = np.concatenate([np.zeros((groups, depth, 0), np.float32), *parts], axis=2)
    assert_same(gatherer.finish(), slow_gram(everything, -limit, limit))


def test_many_samples_do_not_wait_for_the_last() -> None:
    """What was multiplied already is not multiplied again."""
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((1, 4, 1 << 17)).astype(np.float32) for _ in range(5)]
    gatherer = Gatherer(Window(1, 4))
    for part in parts:
        gatherer.add(part)
    found = gatherer.finish()
    everything = np.concatenate(parts, axis=2)[0].astype(np.float64)
    np.testing.assert_allclose(found.matrix[0], everything @ everything.T, rtol=1e-4, atol=50)
    assert found.count.tolist() == [5 << 17]


@pytest.mark.parametrize("about", [0.0, 0.7])
def test_moments_about_any_point(about: float) -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(1.0, 2.0, (3, 4, 50)).astype(np.float32)
    gatherer = Gatherer(Window(3, 4))
    gatherer.add(rows)
    point = about + np.arange(12.0).reshape(3, 4) * (about > 0)
    found = gatherer.finish().moment(point)
    off = rows.astype(np.float64) - point[..., None]
    np.testing.assert_allclose(found, np.matmul(off, off.transpose(0, 2, 1)) / 50, rtol=1e-4)


def test_without_rows_all_moments_are_0() -> None:
    empty = Gatherer(Window(2, 3)).finish()
    assert not empty.moment(np.ones((2, 3))).any()
    assert empty.count.tolist() == [0, 0]


def test_values_that_are_no_numbers_are_left_out() -> None:
    x = np.ones((1, 2, 3), np.float32)
    x[0, 1, 1] = np.nan
    gatherer = Gatherer(Window(1, 2), -5, 5)
    gatherer.add(x)
    found = gatherer.finish()
    assert found.count.tolist() == [2]
    np.testing.assert_array_equal(found.matrix, np.full((1, 2, 2), 2.0))


NET = (
    "g (float[N,3,H,6] x) => (float[N,A,B,C] y, float[N,D] z) "
    f"<{constant('k', 4, 3, 3, 3)}, {constant('l', 4, 1, 3, 3)}, {constant('m', 6, 2)}> {{ "
    "[one] a = Conv<pads = [1, 1, 1, 1]>(x, k) r = Relu(a) [two] y = Conv<group = 4>(r, l) "
    "[three] z = MatMul(a, m) }"
)


def feeds(count: int) -> list[dict[str, Array]]:
    rng = np.random.default_rng(3)
    return [
        {"x": rng.standard_normal((1 + i % 2, 3, 5 + i, 6)).astype(np.float32)}
        for i in range(count)
    ]


def test_gathered_over_samples_of_any_size() -> None:
    model = parse(NET)
    nodes = {node.name: node for node in model.graph}
    wanted: dict[str, list[Window]] = {}
    for name in ("one", "two", "three", "one"):
        shape = window(nodes[name])
        assert isinstance(shape, Window)
        wanted.setdefault(nodes[name].inputs[0].name, []).append(shape)
    ticks: list[int] = []
    samples = feeds(4)
    found = gather(
        model, wanted, iter(samples), {"r": (-1.0, 2.0)}, most=7, threads=1,
        tick=lambda: ticks.append(1),
    )  # fmt: skip
    assert len(found) == 3
    assert len(ticks) == 4
    k = array(nodes["one"].inputs[1])
    a = [
        run(parse(NET.replace("float[N,D] z", "float[N,D] z, float[N,E,F,G] a")), f)[2]
        for f in samples
    ]
    assert k is not None
    values = {"x": [f["x"] for f in samples], "a": a, "r": [np.maximum(v, 0) for v in a]}
    for (name, shape), gram in found.items():
        rows = np.concatenate([columns(shape, x, 7) for x in values[name]], axis=2)
        limits = (-1.0, 2.0) if name == "r" else (-math.inf, math.inf)
        assert_same(gram, slow_gram(rows, *limits))
    kept = {name: gram.count for (name, _), gram in found.items()}
    assert kept["x"].tolist() == [28]
    assert (kept["r"] < 28).any()


@pytest.mark.parametrize(("memory", "groups"), [(1 << 30, 1), (1, 3)])
def test_groups_within_memory(memory: int, groups: int) -> None:
    model = parse(NET)
    wanted = {"x": [Window(1, 27), Window(1, 27)], "r": [Window(4, 9)], "a": [Window(1, 6)]}
    made = windows_within(wanted, probe(model, feeds(1)[0]), memory)
    assert len(made) == groups
    assert [name for group in made for name in group] == ["x", "r", "a"]
    assert made[0]["x"] == (Window(1, 27),)
