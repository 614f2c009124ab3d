"""The graphs that `probe_target.py` runs: for each row of a target file at least one realistic shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from probe_graph import Case, Graph

from qcompile.targets.schema import OpRow

Maker = Callable[[OpRow], Iterator[Case]]


def cases(row: OpRow) -> list[Case]:
    """The graphs for a row; empty if this tool does not know the operator yet."""
    maker = _MAKERS.get((row.type, row.variant)) or _MAKERS.get((row.type, ""))
    return [] if maker is None else list(maker(row))


def _conv_case(
    row: OpRow, x: Sequence[int], w: Sequence[int], stride: int = 1, group: int = 1
) -> Case:
    graph = Graph()
    pad = w[2] // 2
    value = graph.op(
        "Conv", graph.input(*x), graph.weight(*w), graph.weight(w[0]),
        kernel_shape=list(w[2:]), pads=[pad] * 4, strides=[stride] * 2, group=group,
    )  # fmt: skip
    side = -(-x[2] // stride)
    name = f"{w[2]}x{w[3]} s{stride} {x[1]}->{w[0]} @{x[2]}" + (f" g{group}" if group > 1 else "")
    return graph.case(row, name, value, float(w[0] * side * side * np.prod(w[1:])))


def _conv(row: OpRow) -> Iterator[Case]:
    for channels, side in ((64, 56), (128, 28), (256, 14)):
        yield _conv_case(row, (1, channels, side, side), (channels, channels, 3, 3))
    for inputs, outputs, side in (
        (256, 64, 56),
        (64, 256, 56),
        (24, 144, 56),
        (144, 24, 56),
        (512, 512, 14),
    ):
        yield _conv_case(row, (1, inputs, side, side), (outputs, inputs, 1, 1))


def _stem(row: OpRow) -> Iterator[Case]:
    yield _conv_case(row, (1, 3, 224, 224), (32, 3, 3, 3), stride=2)
    yield _conv_case(row, (1, 3, 224, 224), (64, 3, 7, 7), stride=2)
    yield _conv_case(row, (1, 3, 32, 32), (16, 3, 3, 3))


def _depthwise(row: OpRow) -> Iterator[Case]:
    for channels, side, kernel, stride in (
        (144, 56, 3, 1),
        (144, 56, 3, 2),
        (960, 7, 3, 1),
        (240, 28, 5, 1),
    ):
        yield _conv_case(
            row, (1, channels, side, side), (channels, 1, kernel, kernel), stride, channels
        )


def _grouped(row: OpRow) -> Iterator[Case]:
    for group in (32,) if row.variant == "narrow_groups" else (2, 8):
        yield _conv_case(row, (1, 256, 28, 28), (256, 256 // group, 3, 3), group=group)


def _matmul(row: OpRow) -> Iterator[Case]:
    for m, k, n in (
        (128, 384, 1536),
        (128, 1536, 384),
        (16, 768, 768),
        (1, 768, 768),
        (1, 768, 3072),
    ):
        graph = Graph()
        x = graph.input(1, m, k) if row.type == "MatMul" else graph.input(m, k)
        extra = (graph.weight(n),) if row.type == "Gemm" else ()
        value = graph.op(
            row.type, x, graph.constant(graph.rng.standard_normal((k, n)) / np.sqrt(k)), *extra
        )
        yield graph.case(row, f"{m}x{k}x{n}", value, float(m * k * n))


def _lstm(row: OpRow) -> Iterator[Case]:
    for steps, width, hidden in ((1, 128, 128), (50, 128, 128), (20, 512, 512)):
        graph = Graph()
        x = graph.input(steps, 1, width)
        w, r = (
            graph.constant(graph.rng.standard_normal((1, 4 * hidden, n)) / np.sqrt(n))
            for n in (width, hidden)
        )
        bias = graph.constant(np.zeros((1, 8 * hidden)))
        values = graph.op("LSTM", x, w, r, bias, outputs=3, hidden_size=hidden)
        name = f"{steps} steps, {width}->{hidden}"
        yield graph.case(row, name, values, float(steps * 4 * hidden * (width + hidden)))


def _embedding(row: OpRow) -> Iterator[Case]:
    for rows, width, ids in ((30522, 384, 128), (30522, 384, 1)):
        graph = Graph()
        value = graph.op("Gather", graph.weight(rows, width), graph.ids(ids, rows))
        yield graph.case(row, f"{ids} of {rows}x{width}", value)


_SHAPES = ((1, 256, 28, 28), (1, 64, 14, 14), (1, 128, 768))


def _name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _binary(row: OpRow) -> Iterator[Case]:
    for shape in _SHAPES:
        graph = Graph()
        yield graph.case(
            row, _name(shape), graph.op(row.type, graph.input(*shape), graph.input(*shape))
        )
    graph = Graph()
    x, gate = graph.input(1, 256, 28, 28), graph.input(1, 256, 1, 1)
    yield graph.case(row, "1x256x28x28 by channel", graph.op(row.type, x, gate))


def _unary(row: OpRow) -> Iterator[Case]:
    for shape in _SHAPES:
        graph = Graph()
        bounds = (graph.constant(-1.0), graph.constant(1.0)) if row.type == "Clip" else ()
        attributes: dict[str, Any] = {"alpha": 0.1} if row.type == "LeakyRelu" else {}
        yield graph.case(
            row, _name(shape), graph.op(row.type, graph.input(*shape), *bounds, **attributes)
        )


def _image(
    row: OpRow, channels: int, side: int, attributes: dict[str, Any], *constants: tuple[Any, Any],
    places: Sequence[str] = ("", "after Conv"),
) -> Iterator[Case]:  # fmt: skip
    """The operator alone, and beside a Conv, where ORT may use its NHWC form."""
    for place in places:
        graph = Graph()
        shape = (1, channels, side, side)
        x = graph.behind_conv(*shape) if place == "after Conv" else graph.input(*shape)
        extra = [
            graph.constant(values, dtype) if values is not None else None
            for values, dtype in constants
        ]
        values = graph.op(row.type, x, *extra, **attributes)
        if place == "before Conv":
            values = [graph.before_conv(values[0], channels)]
        yield graph.case(row, f"{_name(shape)} {place}".strip(), values)


def _pool(row: OpRow) -> Iterator[Case]:
    yield from _image(row, 256, 28, {})
    yield from _image(row, 960, 7, {})


def _max_pool(row: OpRow) -> Iterator[Case]:
    places = ("after Conv",)  # elsewhere the 8-bit kernel does not pay and is not planned
    first, second = (24, 40) if row.variant == "unblocked" else (64, 128)
    large = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    small = {"kernel_shape": [2, 2], "strides": [2, 2]}
    yield from _image(row, first, 56, large, places=places)
    yield from _image(row, second, 28, small, places=places)


def _concat(row: OpRow) -> Iterator[Case]:
    for channels, side in ((128, 28), (32, 14)):
        graph = Graph()
        parts = [graph.input(1, channels, side, side) for _ in range(2)]
        yield graph.case(
            row, f"2 of 1x{channels}x{side}x{side}", graph.op("Concat", *parts, axis=1)
        )


def _resize(row: OpRow) -> Iterator[Case]:
    attributes = {
        "mode": "nearest",
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    }
    yield from _image(row, 96, 28, attributes, (None, None), ([1, 1, 2, 2], np.float32))


def _depth_to_space(row: OpRow) -> Iterator[Case]:
    yield from _image(row, 64, 56, {"blocksize": 2})


def _slice(row: OpRow) -> Iterator[Case]:
    constants = (([0], np.int64), ([64], np.int64), ([1], np.int64))
    yield from _image(row, 128, 56, {}, *constants)


def _split(row: OpRow) -> Iterator[Case]:
    for context in (False, True):
        graph = Graph()
        x = graph.behind_conv(1, 128, 56, 56) if context else graph.input(1, 128, 56, 56)
        values = graph.op("Split", x, outputs=2, axis=1)
        yield graph.case(row, "1x128x56x56 in 2" + (" after Conv" if context else ""), values)


def _select(row: OpRow) -> Iterator[Case]:
    yield from _image(row, 128, 56, {"axis": 1}, (np.arange(0, 128, 2), np.int64))


def _transpose(row: OpRow) -> Iterator[Case]:
    graph = Graph()
    yield graph.case(
        row, "1x128x12x64", graph.op("Transpose", graph.input(1, 128, 12, 64), perm=[0, 2, 1, 3])
    )
    graph = Graph()
    yield graph.case(
        row,
        "1x256x28x28 to NHWC",
        graph.op("Transpose", graph.input(1, 256, 28, 28), perm=[0, 2, 3, 1]),
    )


def _reshape(row: OpRow) -> Iterator[Case]:
    graph = Graph()
    x = graph.input(1, 128, 28, 28)
    shapes: dict[str, list[Any]] = {
        "Reshape": [[1, 128, 784]],
        "Unsqueeze": [[0]],
        "Squeeze": [[0]],
        "Flatten": [],
    }
    extra = [graph.constant(values, np.int64) for values in shapes[row.type]]
    yield graph.case(row, "1x128x28x28", graph.op(row.type, x, *extra))


_MAKERS: dict[tuple[str, str], Maker] = {
    ("Conv", ""): _conv, ("Conv", "few_inputs"): _stem, ("Conv", "depthwise"): _depthwise,
    ("Conv", "grouped"): _grouped, ("Conv", "narrow_groups"): _grouped, ("MatMul", ""): _matmul, ("Gemm", ""): _matmul, ("LSTM", ""): _lstm,
    ("Gather", ""): _embedding, ("Gather", "select"): _select, ("Add", ""): _binary, ("Mul", ""): _binary,
    ("Sigmoid", ""): _unary, ("HardSigmoid", ""): _unary, ("LeakyRelu", ""): _unary, ("Relu", ""): _unary,
    ("Clip", ""): _unary, ("GlobalAveragePool", ""): _pool, ("Concat", ""): _concat,
    ("MaxPool", ""): _max_pool, ("Resize", ""): _resize, ("Transpose", ""): _transpose,
    ("Slice", ""): _slice, ("Split", ""): _split, ("DepthToSpace", ""): _depth_to_space,
    ("Reshape", ""): _reshape, ("Flatten", ""): _reshape, ("Squeeze", ""): _reshape, ("Unsqueeze", ""): _reshape,
}  # fmt: skip
