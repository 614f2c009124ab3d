"""What rounding makes of a float model: the noise that no compiler can avoid."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from backend_runner import LEVELS, Array, Runner, ends, session, widened
from onnx import numpy_helper

Ranges = Mapping[str, tuple[float, float]]  # the least and the largest value by tensor


def rounded(values: Array, bits: int) -> Array:
    """The nearest of 2^bits values that are spread evenly over the range with zero in it."""
    known = np.isfinite(widened(values)) if values.size else np.zeros(0, bool)
    if not known.any():
        return values
    wide = widened(values)
    low, high = min(wide[known].min(), 0.0), max(wide[known].max(), 0.0)
    step = (high - low) / (2**bits - 1)
    if step == 0 or not np.isfinite(step):
        return values
    made = np.where(known, np.round(wide / step) * step, wide)
    return made.astype(values.dtype)


def _in_blocks(values: Array, bits: int, axis: int) -> Array:
    """The same for each 32 values along an axis by themselves."""
    made = np.moveaxis(values.copy(), axis, -1)
    rows = made.reshape(-1, made.shape[-1])
    for row in rows:
        for start in range(0, len(row), 32):
            row[start : start + 32] = rounded(row[start : start + 32], bits)
    return np.moveaxis(rows.reshape(made.shape), -1, axis)


def _constants(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        if node.op_type == "Constant":
            yield from (item.t for item in node.attribute if item.name == "value")


def ranges_of(
    model: onnx.ModelProto, feeds: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[float, float]]:
    """The range of each float32 tensor that a node of the main graph makes, where ORT gives all of them."""
    inferred = onnx.shape_inference.infer_shapes(model)
    known = {value.name: value for value in (*inferred.graph.value_info, *inferred.graph.output)}
    made = [name for node in model.graph.node for name in node.output]
    floats = [
        name for name in made
        if name in known and known[name].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    ]  # fmt: skip
    copied = copy.deepcopy(model)
    del copied.graph.output[:]
    copied.graph.output.extend(known[name] for name in floats)
    try:
        runner = session(copied.SerializeToString(), LEVELS["off"])
        runs = [runner.run(floats, dict(feed)) for feed in feeds] if floats else []
    except Exception:  # noqa: BLE001 - then only what goes in is rounded
        return {}
    extremes = [[ends(value) for value in values] for values in zip(*runs, strict=True)]
    return {
        name: (min(low for low, _ in pairs), max(high for _, high in pairs))
        for name, pairs in zip(floats, extremes, strict=True)
    }


def _round_results(model: onnx.ModelProto, ranges: Ranges) -> None:
    """`node -> v` becomes `node -> raw -> Quantize -> Dequantize -> v`, in ORT's domain, which has no opset to fit."""
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            low, high = ranges.get(name, (0.0, 0.0))
            step = (max(high, 0.0) - min(low, 0.0)) / 255
            if not 1e-30 < step < 1e30:
                continue
            zero = round(-min(low, 0.0) / step)
            raw, scale, point, codes = (
                f"{name}__{part}" for part in ("raw", "scale", "zero", "codes")
            )
            node.output[i] = raw
            model.graph.initializer.append(
                numpy_helper.from_array(np.array(step, np.float32), scale)
            )
            model.graph.initializer.append(numpy_helper.from_array(np.array(zero, np.uint8), point))
            for op, source, result in (
                ("QuantizeLinear", raw, codes),
                ("DequantizeLinear", codes, name),
            ):
                nodes.append(onnx.helper.make_node(op, [source, scale, point], [result], domain="com.microsoft"))  # fmt: skip
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if all(item.domain != "com.microsoft" for item in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    model.ir_version = max(model.ir_version, 4)


def _roundings(bits: int | None) -> list[Callable[[Array], Array]]:
    """How constants may be rounded: as a whole to 8 bits, or by blocks along either of the last two axes."""
    if bits is None:
        return [lambda values: rounded(values, 8)]

    def along(axis: int) -> Callable[[Array], Array]:
        return lambda values: _in_blocks(values, bits, axis) if values.ndim > 1 else values

    return [along(-1), along(-2)]


def noisy(model: onnx.ModelProto, bits: int | None, ranges: Ranges) -> list[Runner]:
    """The model with rounded constants, once for each way, and with what has a range rounded and cut to it."""
    runners = []
    for way in _roundings(bits):
        copied = copy.deepcopy(model)
        _round_results(copied, ranges)
        for tensor in _constants(copied):
            values = numpy_helper.to_array(tensor)
            if values.dtype == np.float32 and values.size > 1:
                name = tensor.name
                tensor.CopyFrom(numpy_helper.from_array(way(values), name))
        runners.append(Runner(copied, ["off"]))  # ORT would make integer kernels of what is here
    return runners
