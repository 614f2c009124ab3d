"""Codes and scales of weights, and the integer biases that belong to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.algo.bias_correction import input_shift, weight_shift
from qcompile.algo.blocks import Blocked
from qcompile.graph.edit import array, attribute
from qcompile.plan.candidates import Candidate
from qcompile.plan.plan import Form, Plan
from qcompile.quant.affine import dequantize, quantize
from qcompile.quant.granularity import PerBlock
from qcompile.quant.ranges import weight_params, weight_params_mse
from qcompile.quant.scheme import QParams, Scheme

Array = npt.NDArray[Any]
_BIAS_LIMIT = float(2**30)  # of an int32 bias: room for the sum of products beside it


@dataclasses.dataclass(frozen=True)
class Weight:
    """One quantized weight.

    Attributes:
        codes: int8, in the layout that the lowered operator reads: that of the node for Conv,
            (K, N) for MatMul and Gemm, (rows, width) for embeddings.
        params: scale and zero point, per output channel, per row, or by blocks of K.
        bias: float32 (channels,), corrected; None if there is none and none is needed.
    """

    codes: Array
    params: QParams
    bias: Array | None = None


@dataclasses.dataclass(frozen=True)
class InputMoments:
    """What bias correction knows of a Conv's input: float64 (channels,) each.

    Attributes:
        mean: of the float values.
        error: mean of quantized minus float value.
    """

    mean: Array
    error: Array | None = None


def solve_weights(
    plan: Plan, found: Mapping[str, Candidate | str], params: Mapping[str, QParams],
    moments: Mapping[str, InputMoments], *, saturating: bool, search: bool = True,
    rounded: Mapping[str, Weight] | None = None,
) -> dict[str, Weight]:  # fmt: skip
    """A weight for each planned node that has one, by node name.

    Args:
        plan: the forms.
        found: the candidates.
        params: of the coded tensors.
        moments: by name of the Conv's input tensor; where it is missing, biases stay as they are.
        saturating: the target's kernels saturate in 16 bits.
        search: look for the scale of least squared weight error, in place of the full range.
        rounded: codes and parameters found by a search, by node name; only biases are made anew.
    """
    done = rounded or {}
    weights: dict[str, Weight] = {}
    for entry in plan.of(Form.STATIC, Form.DYNAMIC, Form.WEIGHT):
        item = found[entry.node]
        assert isinstance(item, Candidate)
        if item.role == "conv":
            weights[entry.node] = _conv(
                item.node, entry.weight, params, moments, saturating, search, done.get(entry.node)
            )
        elif item.role == "dynamic":
            weights[entry.node] = done.get(entry.node) or _linear(
                item.node, entry.weight, saturating, search
            )
        elif item.role == "embedding":
            table = array(item.node.inputs[0])
            assert table is not None
            own = weight_params(table, Scheme.parse(entry.weight))
            weights[entry.node] = Weight(quantize(table, own), own)
    return weights


def _scales(w: Array, scheme: Scheme, *, saturating: bool, search: bool) -> QParams:
    choose = weight_params_mse if search else weight_params
    own = choose(w, scheme)
    if saturating and scheme.bits is None and can_saturate(quantize(w, own)):
        return choose(w, dataclasses.replace(scheme, bits=7))
    return own


def _conv(
    node: ir.Node, spelling: str, params: Mapping[str, QParams], moments: Mapping[str, InputMoments],
    saturating: bool, search: bool, rounded: Weight | None = None,
) -> Weight:  # fmt: skip
    w = array(node.inputs[1])
    x = node.inputs[0]
    assert w is not None and x is not None and x.name is not None
    scheme = Scheme.parse(spelling)
    bias_value = array(node.inputs[2]) if len(node.inputs) > 2 else None
    bias = np.zeros(w.shape[0]) if bias_value is None else bias_value.reshape(-1).astype(np.float64)
    if rounded is None:
        own = _scales(w, scheme, saturating=saturating, search=search)
        own = _wide_enough(own, bias, float(params[x.name].scale))
        codes = quantize(w, own)
    else:
        codes, own = rounded.codes, rounded.params
    known = moments.get(x.name)
    if known is not None:
        group = attribute(node, "group", 1)
        back = dequantize(codes, own)
        bias = bias - weight_shift(back - w, known.mean, group)
        if known.error is not None:
            bias = bias - input_shift(back, known.error, group)
        wide = _wide_enough(own, bias, float(params[x.name].scale))
        if not np.array_equal(wide.scale, own.scale):
            own, codes = wide, quantize(w, wide)
    needed = bias_value is not None or bool(np.any(bias))
    return Weight(codes, own, bias.astype(np.float32) if needed else None)


def _wide_enough(own: QParams, bias: Array, input_scale: float) -> QParams:
    """Parameters whose int32 bias does not overflow: channels of tiny weights get a larger scale."""
    least = np.abs(bias) / (input_scale * _BIAS_LIMIT)
    if own.scale.shape == ():
        least = np.asarray(least.max(initial=0.0))
    scale = np.maximum(own.scale, least.astype(np.float32))
    return QParams(np.asarray(scale, np.float32), own.zero, own.scheme)


def _linear(node: ir.Node, spelling: str, saturating: bool, search: bool) -> Weight:
    w = array(node.inputs[1])
    assert w is not None
    if node.op_type == "Gemm":
        w = w * np.float32(attribute(node, "alpha", 1.0))
        if attribute(node, "transB", 0):
            w = np.ascontiguousarray(w.T)  # (N, K) -> (K, N)
    # a target spells the scheme of output channels for Conv; blocks are those of (K, N) already
    blocks = "/" in spelling
    scheme = Scheme.parse(spelling if blocks else spelling.replace("axis0", "axis1"))
    own = _scales(w, scheme, saturating=saturating and not blocks, search=search)
    return Weight(quantize(w, own), own, gemm_bias(node, w.shape[1]))


def blocked(node: ir.Node, weight: Weight) -> Blocked:
    """The weight of a product, int8 (K, N) with scales (G, N), as MatMulNBits has it; what alpha multiplies, without it."""
    codes = (weight.codes.T.astype(np.int16) + 128).astype(np.uint8)  # (N, K)
    alpha = np.float32(attribute(node, "alpha", 1.0)) if node.op_type == "Gemm" else np.float32(1)
    scale = np.ascontiguousarray(weight.params.scale.T / alpha, np.float32)  # (N, G)
    granularity = weight.params.scheme.granularity
    assert isinstance(granularity, PerBlock)
    zero = np.full(scale.shape, 128, np.uint8)
    return Blocked(codes, scale, zero, 8, granularity.size)


def gemm_bias(node: ir.Node, width: int) -> Array | None:
    """The bias of a Gemm as float32 (width,), beta applied; None if there is none or it is (M, N)."""
    if node.op_type != "Gemm" or len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    bias, beta = array(node.inputs[2]), attribute(node, "beta", 1.0)
    if bias is None or beta == 0.0:
        return None
    if bias.size not in (1, width) or (bias.ndim == 2 and bias.shape[0] != 1):
        return None
    return np.broadcast_to(bias.reshape(-1) * np.float32(beta), (width,)).astype(np.float32)


def can_saturate(codes: Array) -> bool:
    """Whether two neighbouring products 255 * w can leave int16, in any order a kernel reads them.

    Neighbours are taken along the reduced axes: channels (NHWC kernels) and the last axis (NCHW).
    """
    wide = codes.astype(np.int32)
    rows = [wide.T] if wide.ndim == 2 else [np.moveaxis(wide, 1, -1), wide]
    for row in rows:
        flat = row.reshape(row.shape[0], -1)
        pairs = flat[:, : flat.shape[1] // 2 * 2].reshape(flat.shape[0], -1, 2).sum(axis=2)
        if pairs.size and np.abs(pairs).max() * 255 > 32767:
            return True
    return False
