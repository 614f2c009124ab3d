"""Scales of inputs that codes are made for, taken from the constants before.

The codes of a product are those of W diag(s); so what it reads has to be x / s. A normalization or a product with a constant
vector gives that when its constants are divided by s. So does a matrix of a few bits when the scales of its rows are: its
codes stay as they are, and nothing is rounded again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from passes.smooth_linear import MARK, SmoothLinear
from qcompile.errors import PassError
from qcompile.fewbits.sequential import Found
from qcompile.graph.edit import is_op
from qcompile.solve.smoothing import Smoothing, find_path, takers
from qcompile.step import run_pass


def fold_scales(model: ir.Model, found: Found, scales: Mapping[str, Smoothing]) -> Found:
    """Divide constants of the float graph by `scales`, in place, and return the codes with the rows that are divided.

    Args:
        model: the float graph that `found` was made for; the weights of products that are in `found`, which codes will
            replace, stay as they are.
        found: codes by node name.
        scales: by the tensor that is divided.
    """
    if not scales:
        return found
    for node in model.graph:  # left by whatever made the model
        node.metadata_props.pop(MARK, None)
    factors: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
    values = {value.name: value for node in model.graph for value in node.outputs}
    for tensor, one in scales.items():
        path = [] if one.place is None else find_path(values[tensor], one.place)
        for taker in takers(path[-1]) if path else ():
            name = taker.node.name or ""
            if name in found and is_op(taker.node, "MatMul", "Gemm") and taker.index == 1:
                assert one.place is not None
                factor = factors.setdefault(name, np.ones(taker.width))
                factor[list(one.place.channels)] /= one.scale
    skipped = run_pass(SmoothLinear(scales, found.keys()), model).skipped
    if skipped:
        raise PassError(f"a scale that codes are made for was not applied: {skipped}.")
    made = dict(found)
    for name, factor in factors.items():
        blocked, tally = found[name]
        scale = (blocked.scale * factor[:, None]).astype(np.float32)
        made[name] = dataclasses.replace(blocked, scale=scale), tally
    return made
