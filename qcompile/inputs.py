"""What the model takes, whether it may be compiled at all, and stand-in feeds for timing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompile.calib.data import Feed, InputSpec
from qcompile.errors import DataError, ModelError
from qcompile.graph.edit import attribute, graphs
from qcompile.run.session import Session

_QUANTIZED = (
    "QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
    "DynamicQuantizeLinear", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearAdd",
)  # fmt: skip
_WEIGHING = (
    "Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "LSTM", "GRU", "RNN", "Attention",
    "BatchNormalization", "LayerNormalization",
)  # fmt: skip
_MOVING = ("Identity", "Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
MADE_UP = "a made-up input (give real ones with --data)"
_MOST_MADE_UP = 1 << 28  # elements of an input
_LENGTH = 64  # for dynamic dimensions other than the first, when there is no data


def input_specs(session: Session, model: ir.Model) -> list[InputSpec]:
    """The inputs as ORT declares them; those with a default value need not be fed.

    Raises:
        ModelError: an input is no tensor, or of a type that NumPy cannot hold.
    """
    defaults = set(model.graph.initializers)
    specs = []
    for info in session.inputs:
        if info.dtype is None:
            raise ModelError(
                f"input {info.name!r} is no tensor of numbers or strings, so it cannot be fed: give a "
                "model whose inputs are."
            )
        specs.append(
            InputSpec(info.name, info.dtype, info.shape or None, info.name not in defaults)
        )
    return specs


@contextlib.contextmanager
def running(feed: str) -> Iterator[None]:
    """What fails to run in the body is told of `feed`, the words for the sample that was fed.

    Raises:
        DataError: the body raised a ModelError.
    """
    try:
        yield
    except ModelError as error:
        raise DataError(f"{feed} does not run: {error}") from error


def check_compilable(model: ir.Model) -> None:
    """Nothing, if the model is float and its weights are numbers.

    Raises:
        ModelError: it is quantized already, a weight holds NaN or an infinity, a convolution works on float64, for
            which ORT has no kernel, or a function is for another opset; names node, tensor or function.
    """
    for (domain, title, _), function in model.functions.items():
        for other, opset in function.opset_imports.items():
            if model.opset_imports.get(other, opset) != opset:
                raise ModelError(
                    f"function {f'{domain}.{title}'!r} is for opset {opset} of domain {other!r} and the model for "
                    f"{model.opset_imports[other]}, so that it cannot be expanded: export the model for one opset."
                )
    for graph in graphs(model):
        for node in graph:
            name = node.name or node.outputs[0].name
            if node.op_type in _QUANTIZED or _has_codes(node):
                caches = " with integer caches" if _has_codes(node) else ""
                raise ModelError(
                    f"the model is already quantized: node {name!r} is a {node.op_type}{caches}. Give the float "
                    "model that it was made from."
                )
            if node.op_type in ("Conv", "ConvTranspose") and _is_double(node):
                raise ModelError(
                    f"node {name!r} is a {node.op_type} on float64, for which ONNX Runtime has no kernel: "
                    "export the model in float32."
                )
            for attr in node.attributes.values():
                if node.op_type == "Constant" and attr.type == ir.AttributeType.TENSOR:
                    _check_numbers(node.outputs[0], attr.as_tensor())
        for value in graph.initializers.values():
            if value.const_value is not None:
                _check_numbers(value, value.const_value)


def _has_codes(node: ir.Node) -> bool:
    """Whether a GroupQueryAttention keeps keys or values as codes."""
    return any(attribute(node, f"{x}_quant_type", "NONE") not in ("NONE", b"NONE") for x in "kv")


def _is_double(node: ir.Node) -> bool:
    return any(value is not None and value.dtype == ir.DataType.DOUBLE for value in node.inputs)


def _check_numbers(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Masks may be infinite, a single NaN may mark what is missing; neither is true of weights."""
    if not tensor.dtype.is_floating_point() or not tensor.size or not value.uses():
        return
    weighs = _weighs(value)
    if tensor.size == 1 and not weighs:
        return
    values = tensor.numpy()
    with np.errstate(invalid="ignore"):  # bfloat16 warns of NaN
        low, high = values.min(), values.max()
    if np.isfinite(low) and np.isfinite(high):  # as NaN is both; makes no copy
        return
    wrong = ~np.isfinite(values) if weighs else np.isnan(values)
    if not wrong.any():
        return
    index = tuple(map(int, np.argwhere(wrong)[0]))
    raise ModelError(
        f"weight {value.name!r} holds {values[index]} at index {index}: mend or export the model again."
    )


def _weighs(value: ir.Value) -> bool:
    """Whether a node multiplies by the tensor, as it is or moved about."""
    return any(
        use.node.op_type in _WEIGHING
        or (use.node.op_type in _MOVING and use.idx == 0 and _weighs(use.node.outputs[0]))
        for use in value.uses()
    )


def stand_in(specs: list[InputSpec]) -> Feed:
    """A feed of plausible shapes for timing when there is no data: never used to calibrate.

    Dynamic leading dimensions are 1, others 64; integers are 1 (a valid token and mask), floats small noise.

    Raises:
        DataError: an input is declared too large to be made up.
    """
    rng = np.random.default_rng(0)
    feed: Feed = {}
    for spec in specs:
        if not spec.required:
            continue
        dims = [
            d if isinstance(d, int) and d >= 0 else (1 if axis == 0 else _dynamic(spec.name))
            for axis, d in enumerate(spec.shape or ())
        ]
        if math.prod(dims) > _MOST_MADE_UP:
            raise DataError(
                f"input {spec.name!r} of shape {dims} is too large to be made up: give samples with --data."
            )
        if spec.dtype.kind == "f":
            feed[spec.name] = rng.standard_normal(dims).astype(spec.dtype)
        elif spec.dtype.kind in "iub":
            feed[spec.name] = np.ones(dims, spec.dtype)
        else:
            feed[spec.name] = np.full(dims, "", np.object_)
    return feed


def _dynamic(name: str) -> int:
    return 0 if "past" in name else _LENGTH
