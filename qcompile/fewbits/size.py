"""What a result takes on disk before there is one: the bytes of each matrix, and of all the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from passes.lower_nbits import Form, LowerNbits
from qcompile.algo.blocks import Blocked
from qcompile.errors import PassError
from qcompile.fewbits.assign import Scheme
from qcompile.graph import io
from qcompile.graph.edit import attribute, is_op
from qcompile.graph.linear import Linear
from qcompile.quant.nbits import Layout
from qcompile.solve.payload import Deferred
from qcompile.step import run_pass

_SLACK = 512  # bytes of what is added later: where the model comes from, with which versions
_HEAD = 8  # bytes that a tensor's sizes may take more than those of an empty one


def stored_bytes(readers: Sequence[Linear], scheme: Scheme, form: Form = "nbits") -> int:
    """Bytes of the codes, scales and zero points of a matrix, as often as `passes.lower_nbits` stores them.

    Args:
        readers: the nodes that read it.
        scheme: bits and blocks.
        form: of the result. The portable one stores a matrix for each product.
    """
    layout = Layout(*readers[0].shape, scheme.bits, scheme.block, scheme.symmetric)
    products = [item for item in readers if item.kind != "gather"]
    kinds = {(item.weight.dtype, _alpha(item)) for item in products if item.weight is not None}
    if form == "portable":
        copies = [(item, "product") for item in products]
    else:
        copies = [(item, "product") for item in products[:1]] * len(kinds)
    tables = [item for item in readers if item.kind == "gather"]
    if tables and (form == "portable" or not any(alpha == 1 for _, alpha in kinds)):
        copies.append((tables[0], "table"))
    return sum(_payload(item, layout, style, form) for item, style in copies)


def _payload(item: Linear, layout: Layout, style: str, form: Form) -> int:
    assert item.weight is not None
    params = layout.rows * layout.groups
    if form == "nbits":
        codes = math.prod(layout.product_shape if style == "product" else layout.table_shape)
        zeros = math.prod(layout.zeros_shape)
    else:
        wide = layout.depth if style == "product" else layout.groups * layout.size
        codes = -(-layout.rows * wide * layout.stored // 8)
        zeros = -(-params * layout.stored // 8)
    scales = 2 * params if item.weight.dtype == ir.DataType.FLOAT16 else 4 * params
    return codes + scales + (0 if layout.symmetric else zeros)


def other_bytes(
    prepared: ir.Model, chosen: Sequence[tuple[Linear, Scheme]], form: Form = "nbits"
) -> int:
    """Bytes of the file but for what `stored_bytes` counts: the graph, and the weights that stay float.

    At most a few kilobytes too many. No weight is read.

    Args:
        prepared: the float graph; not changed.
        chosen: matrices with any schemes, the same for readers of one.
        form: of the result.
    """
    given: dict[object, Deferred] = {}
    weights = {}
    for item, scheme in chosen:
        assert item.weight is not None
        made = Deferred(scheme.bits, scheme.block, scheme.symmetric, _unread)
        weights[item.name] = given.setdefault(item.weight.key, made)
    model = prepared.clone()
    run_pass(LowerNbits(weights, form), model)
    total = _SLACK
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            total += _HEAD
            if not isinstance(tensor, ir.LazyTensor):
                total += tensor.nbytes
            value.const_value = ir.Tensor(np.zeros(0, np.uint8), name=value.name)
    return total + len(io.to_bytes(model))


def _unread() -> Blocked:
    raise PassError("a weight was read only to find out how large it is.")


def _alpha(item: Linear) -> float:
    return float(attribute(item.node, "alpha", 1.0)) if is_op(item.node, "Gemm") else 1.0
