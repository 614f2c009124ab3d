"""Small float models for the tests of whole commands, wide enough that integer kernels pay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

SIDE = 16


def conv_net(
    *, convs: int = 3, channels: int = 32, norm: bool = False, dtype: Any = np.float32
) -> onnx.ModelProto:
    """`x (N, 3, 16, 16)` -> Conv, Relu ... -> average -> MatMul -> `y (N, 10)`.

    Nodes are named as PyTorch names them: `/conv0/Conv`, `/conv0/Relu`, `/pool`, `/flat`, `/head/MatMul`.
    With `norm` a BatchNormalization `/norm0` follows the first Conv, and an Identity `/same` the average.
    """
    rng = np.random.default_rng(0)
    nodes, weights, value, inner = [], {}, "x", 3
    for i in range(convs):
        weights[f"w{i}"] = rng.normal(0, (2 / 9 / inner) ** 0.5, (channels, inner, 3, 3))
        weights[f"b{i}"] = rng.normal(0, 0.1, channels)
        name, pads = f"/conv{i}/Conv", [1, 1, 1, 1]
        nodes.append(
            helper.make_node("Conv", [value, f"w{i}", f"b{i}"], [f"c{i}"], name, pads=pads)
        )
        made = f"c{i}"
        if norm and i == 0:
            weights["gamma"] = rng.uniform(0.5, 2, channels)
            weights["beta"] = rng.normal(0, 1, channels)
            weights["mean"] = rng.normal(0, 1, channels)
            weights["var"] = rng.uniform(0.5, 2, channels)
            names = [made, "gamma", "beta", "mean", "var"]
            nodes.append(helper.make_node("BatchNormalization", names, ["n0"], "/norm0"))
            made = "n0"
        nodes.append(helper.make_node("Relu", [made], [f"r{i}"], f"/conv{i}/Relu"))
        value, inner = f"r{i}", channels
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["g"], "/pool"))
    if norm:
        nodes.append(helper.make_node("Identity", ["g"], ["same"], "/same"))
    nodes.append(helper.make_node("Flatten", ["same" if norm else "g"], ["f"], "/flat"))
    weights["head"] = rng.normal(0, 0.3, (channels, 10))
    nodes.append(helper.make_node("MatMul", ["f", "head"], ["y"], "/head/MatMul"))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", kind, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", kind, ["N", 10])],
        [numpy_helper.from_array(values.astype(dtype), name) for name, values in weights.items()],
    )  # fmt: skip
    return made_model(graph)


def linear_net() -> onnx.ModelProto:
    """`x (N, 256)` -> MatMul -> Relu -> MatMul -> `y (N, 256)`: quantized without data."""
    rng = np.random.default_rng(0)
    return from_text(
        "g (float[N,256] x) => (float[N,256] y) { h = MatMul(x, w0) r = Relu(h) y = MatMul(r, w1) }",
        w0=rng.normal(0, 0.06, (256, 256)).astype(np.float32),
        w1=rng.normal(0, 0.06, (256, 256)).astype(np.float32),
    )


def from_text(graph: str, *, opset: int = 17, **weights: NDArray[Any]) -> onnx.ModelProto:
    """The model of a graph in ONNX's text form, with these initializers."""
    head = f'<ir_version: 8, opset_import: ["" : {opset}]>\n'
    model = onnx.parser.parse_model(head + graph)
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def made_model(graph: onnx.GraphProto) -> onnx.ModelProto:
    """A valid model with this graph, at opset 17."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def set_weight(model: onnx.ModelProto, name: str, value: float) -> None:
    """The first number of the weight `name` is `value` now."""
    (weight,) = (w for w in model.graph.initializer if w.name == name)
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = value
    weight.CopyFrom(numpy_helper.from_array(values, name))


def samples(count: int = 10, *, dtype: Any = np.float32) -> NDArray[Any]:
    """Inputs of `conv_net`, (count, 3, 16, 16)."""
    return np.random.default_rng(1).normal(size=(count, 3, SIDE, SIDE)).astype(dtype)


def rows(count: int = 10) -> NDArray[np.float32]:
    """Inputs of `linear_net`, (count, 256)."""
    return np.random.default_rng(1).normal(size=(count, 256)).astype(np.float32)


def save(model: onnx.ModelProto, path: Path, *, data: str | None = None) -> Path:
    """The model in a file, its weights in the file `data` beside it if that is given."""
    if data is None:
        onnx.save(model, path)
    else:
        onnx.save_model(model, path, save_as_external_data=True, location=data, size_threshold=0)
    return path
