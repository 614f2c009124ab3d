"""`quantize` and `dequantize` against the kernels of ONNX Runtime, bit for bit."""

from __future__ import annotations

import functools
import platform
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import parser

from qcompile.quant.affine import dequantize, quantize
from qcompile.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor
from qcompile.quant.scheme import INT32, QTYPES, QParams, Scheme

CODED = [name for name in QTYPES if name != "int32"]  # QuantizeLinear gives no int32
WHERE = ["tensor", "axis0", "axis1", "axis0/2", "axis1/4", "axis1/5"]
SHAPE = (6, 19)  # blocks of 4 and 5 end in a shorter one; an odd number of int4 in a row

# NaN is open in ONNX; only what the x86 kernels do is ours.
X86 = platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def _session(op: str, scheme: Scheme) -> Any:
    """A model of one `op` in its own types, all else int32 or float; skips if ORT lacks it.

    Scales and zeros are inputs, so that one session serves all values. Casts to and from the type
    are exact, and numpy has no int4 to feed or fetch.
    """
    qtype, granularity = scheme.qtype, scheme.granularity
    match granularity:
        case PerTensor():
            dims, attributes = "", ""
        case PerAxis(axis):
            dims, attributes = "[C]", f"<axis={axis}>"
        case PerBlock(axis, size):
            dims, attributes = "[A, B]", f"<axis={axis}, block_size={size}>"
    to_type = f"Cast<to={qtype.onnx_type}>"
    if op == "QuantizeLinear":
        x, y = "float", "int32"
        body = f"c = QuantizeLinear{attributes} (x, scale, z) y = Cast<to={INT32.onnx_type}> (c)"
    else:
        x, y = "int32", "float"
        body = f"c = {to_type} (x) y = DequantizeLinear{attributes} (c, scale, z)"
    text = f"""<ir_version: 10, opset_import: ["" : {25 if qtype.bits == 2 else 21}]>
    g ({x}[N, M] x, float{dims} scale, int32{dims} zero) => ({y}[N, M] y)
    {{ z = {to_type} (zero) {body} }}"""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    model = parser.parse_model(text).SerializeToString()
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if qtype.bits != 2:
            raise
        pytest.skip(f"onnxruntime {ort.__version__} has no {op} of {qtype}: {error}")


def _run(op: str, x: npt.NDArray[Any], params: QParams) -> npt.NDArray[Any]:
    feeds = {"x": x, "scale": params.scale, "zero": params.zero.astype(np.int32)}
    result: npt.NDArray[Any] = _session(op, params.scheme).run(None, feeds)[0]
    return result


def ort_quantize(x: npt.NDArray[np.float32], params: QParams) -> npt.NDArray[Any]:
    return _run("QuantizeLinear", x, params).astype(params.zero.dtype)


def ort_dequantize(codes: npt.NDArray[Any], params: QParams) -> npt.NDArray[Any]:
    return _run("DequantizeLinear", codes.astype(np.int32), params)


def some_params(scheme: Scheme, rng: np.random.Generator) -> QParams:
    """Scales from 2**-8 to 2**8, some of them powers of two; any zero point of the type."""
    shape = scheme.granularity.params_shape(SHAPE)
    scale = np.exp2(rng.uniform(-8, 8, shape))
    scale = np.where(rng.random(shape) < 0.5, scale, np.exp2(np.rint(np.log2(scale))))
    lo, hi = (0, 0) if scheme.qtype == INT32 else (scheme.qtype.qmin, scheme.qtype.qmax)
    zero = rng.integers(lo, hi, shape, endpoint=True)
    return QParams(scale.astype(np.float32), np.asarray(zero, scheme.qtype.dtype), scheme)


def _spread(values: npt.NDArray[Any], granularity: Granularity) -> npt.NDArray[Any]:
    return np.broadcast_to(granularity.spread(values, SHAPE), SHAPE)


def hard_values(params: QParams, rng: np.random.Generator) -> list[npt.NDArray[np.float32]]:
    """Arrays of `SHAPE`: exact ties, their neighbours, and values of every magnitude."""
    scale = _spread(params.scale, params.scheme.granularity)
    span = params.scheme.qtype.qmax - params.scheme.qtype.qmin
    ties = ((rng.integers(-span, span, SHAPE) + 0.5) * scale).astype(np.float32)
    down, up = np.nextafter(ties, np.float32(-np.inf)), np.nextafter(ties, np.float32(np.inf))
    special = [0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-38, 3.4e38, -3.4e38, np.inf, -np.inf]
    special += [2.0**31, -(2.0**31), 2147483520.0, 2.0**63, -(2.0**63), 65535.5, 1e30, -1e30]
    spread = np.exp2(rng.uniform(-140, 127, SHAPE)) * rng.choice([-1, 1], SHAPE)
    inside = rng.uniform(-span, span, SHAPE) * scale
    values = [rng.choice(special, SHAPE), spread, inside]
    return [ties, down, up, *(v.astype(np.float32) for v in values)]


def assert_same_bits(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> None:
    """Equal type, shape and bits: -0.0 is not 0.0."""
    np.testing.assert_array_equal(
        ours.view(f"u{ours.itemsize}"), theirs.view(f"u{theirs.itemsize}"), strict=True
    )


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("qtype", CODED)
def test_quantize_is_quantize_linear(qtype: str, where: str) -> None:
    rng = np.random.default_rng(0)
    scheme = Scheme.parse(f"{qtype}.{where}.asym")
    for _ in range(10):
        params = some_params(scheme, rng)
        for x in hard_values(params, rng):
            assert_same_bits(quantize(x, params), ort_quantize(x, params))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("qtype", QTYPES)
def test_dequantize_is_dequantize_linear(qtype: str, where: str) -> None:
    rng = np.random.default_rng(1)
    scheme = Scheme.parse(f"{qtype}.{where}.{'sym' if qtype == 'int32' else 'asym'}")
    for _ in range(10):
        params = some_params(scheme, rng)
        low, high = scheme.qtype.qmin, scheme.qtype.qmax
        codes = rng.integers(low, high, SHAPE, endpoint=True).astype(scheme.qtype.dtype)
        codes[0, :2] = low, high
        assert_same_bits(dequantize(codes, params), ort_dequantize(codes, params))


@settings(database=None, deadline=None, derandomize=True, max_examples=200)
@given(
    st.sampled_from(CODED),
    st.sampled_from(WHERE),
    hnp.arrays(np.float32, SHAPE, elements=st.floats(width=32, allow_nan=X86)),
    st.floats(2.0**-149, 2.0**127, width=32),
    st.randoms(use_true_random=False),
)
def test_any_value_over_any_scale(
    qtype: str, where: str, x: npt.NDArray[np.float32], scale: float, random: Any
) -> None:
    scheme = Scheme.parse(f"{qtype}.{where}.asym")
    shape = scheme.granularity.params_shape(SHAPE)
    zero = random.randint(scheme.qtype.qmin, scheme.qtype.qmax)
    params = QParams(
        np.full(shape, scale, np.float32), np.full(shape, zero, scheme.qtype.dtype), scheme
    )
    codes = quantize(x, params)
    assert_same_bits(codes, ort_quantize(x, params))
    assert_same_bits(dequantize(codes, params), ort_dequantize(codes, params))


@pytest.mark.skipif(
    not X86, reason=f"what NaN becomes was measured on x86, not on {platform.machine()}"
)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("qtype", CODED)
def test_nan_is_the_lowest_code(qtype: str, where: str) -> None:
    scheme = Scheme.parse(f"{qtype}.{where}.asym")
    params = some_params(scheme, np.random.default_rng(2))
    x = np.full(SHAPE, np.nan, np.float32)
    assert_same_bits(quantize(x, params), ort_quantize(x, params))


def test_many_values_over_an_awkward_scale() -> None:
    """A tenth has no short binary form: here x * (1 / scale) would differ from x / scale."""
    rng = np.random.default_rng(3)
    x = (rng.integers(-140, 140, (1000, 500)) + 0.5).astype(np.float32) * np.float32(0.1)
    x = np.nextafter(x, rng.choice(np.array([-np.inf, np.inf], np.float32), x.shape))
    scheme = Scheme.parse("int8.tensor.sym")
    params = QParams(np.asarray(0.1, np.float32), np.asarray(0, np.int8), scheme)
    codes = quantize(x, params)
    assert_same_bits(codes, ort_quantize(x, params))
    assert_same_bits(dequantize(codes, params), ort_dequantize(codes, params))
    inverse = np.clip(np.rint(x * (np.float32(1) / params.scale)), -128, 127)
    assert (inverse != codes).any()
