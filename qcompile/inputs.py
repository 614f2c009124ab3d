"""What the model takes, whether it may be compiled at all, and stand-in feeds for timing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.calib.data import Feed, InputSpec
from qcompile.errors import ModelError
from qcompile.graph.edit import graphs
from qcompile.run.session import Session

_QUANTIZED = (
    "QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
    "DynamicQuantizeLinear", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearAdd",
)  # fmt: skip
_STAND_IN = {"batch": 1}
_LENGTH = 64  # for dynamic dimensions other than the first, when there is no data


def input_specs(session: Session, model: ir.Model) -> list[InputSpec]:
    """The inputs as ORT declares them; those with a default value need not be fed."""
    defaults = set(model.graph.initializers)
    return [
        InputSpec(
            info.name, np.dtype(np.object_) if info.dtype is None else info.dtype, info.shape or None,
            info.name not in defaults,
        )
        for info in session.inputs
    ]  # fmt: skip


def check_compilable(model: ir.Model) -> None:
    """Nothing, if the model is float and its weights are numbers.

    Raises:
        ModelError: it is quantized already, or a weight holds NaN or an infinity; names node or tensor.
    """
    for graph in graphs(model):
        for node in graph:
            if node.op_type in _QUANTIZED:
                raise ModelError(
                    f"the model is already quantized: node {node.name or node.outputs[0].name!r} is a "
                    f"{node.op_type}. Give the float model that it was made from."
                )
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point() or not value.uses():
                continue
            if not any(
                use.node.op_type in ("Conv", "MatMul", "Gemm", "ConvTranspose", "LSTM", "GRU")
                for use in value.uses()
            ):
                continue
            values = tensor.numpy()
            if values.dtype == np.float32 and not np.isfinite(values).all():
                index = tuple(map(int, np.argwhere(~np.isfinite(values))[0]))
                raise ModelError(
                    f"weight {name!r} holds {values[index]} at index {index}: mend or export the model again."
                )


def stand_in(specs: list[InputSpec]) -> Feed:
    """A feed of plausible shapes for timing when there is no data: never used to calibrate.

    Dynamic leading dimensions are 1, others 64; integers are 1 (a valid token and mask), floats small noise.
    """
    rng = np.random.default_rng(0)
    feed: Feed = {}
    for spec in specs:
        if not spec.required:
            continue
        dims = [
            d if isinstance(d, int) and d > 0 else (1 if axis == 0 else _dynamic(spec.name))
            for axis, d in enumerate(spec.shape or ())
        ]
        if spec.dtype.kind == "f":
            feed[spec.name] = rng.standard_normal(dims).astype(spec.dtype)
        elif spec.dtype.kind in "iub":
            feed[spec.name] = np.ones(dims, spec.dtype)
        else:
            feed[spec.name] = np.full(dims, "", np.object_)
    return feed


def _dynamic(name: str) -> int:
    return 0 if "past" in name else _LENGTH
