"""What bits and blocks of a matrix are expected to cost: the error of some of its rows, rounded in each way.

Rows of a matrix are rounded independently of each other, by GPTQ as well, once the moment of the inputs is known. So some of them,
spread evenly, stand for all, and are really rounded in each way that there is. (The error that theory predicts for GPTQ, that of
rounding to nearest weighted by what no later input makes up for, is within 8 % for 4 bits, but for 2 bits up to eight times too
small: measured on a decoder of 4 layers.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.algo.blocks import Blocked, row_errors, some
from qcompile.algo.choose import Factors
from qcompile.algo.gptq import gptq
from qcompile.algo.rtn import rtn, search
from qcompile.fewbits.assign import Scheme
from qcompile.fewbits.share import Matrix
from qcompile.graph.linear import Linear
from qcompile.recipe import Recipe

Array = npt.NDArray[Any]

REFERENCE = Scheme(4, 32, symmetric=False)
"""How matrices are rounded, to nearest, when what their errors do to the model is measured."""

_ROWS = 128  # of a matrix that stand for all
_FINE = 8  # bits at which GPTQ does not run, see `qcompile.algo.choose`
_NO_GPTQ = ("rtn", "search", "kquant", "hqq", "awq")


def places(count: int) -> Array:
    """Numbers of the rows that stand for so many, int64."""
    return some(count, _ROWS)


def some_rows(item: Linear) -> Array:
    """Rows of a matrix, spread evenly, float32 (n, K), in memory of their own."""
    assert item.weight is not None
    taken = places(item.shape[0])
    return np.array(item.weight.cast(item.weight.moved()[taken]), np.float32)


def errors(
    W: Array, schemes: Sequence[Scheme], algorithm: str, H: Factors | None = None, judge: Array | None = None
) -> list[float]:  # fmt: skip
    """Return what each scheme leaves at the outputs of the rows, together.

    Args:
        W: rows of a matrix, float32 (n, K).
        schemes: ways to round it.
        algorithm: that will round it, as the recipe names it; "auto" and those with scales of inputs are taken to do as well as the one
            that they mostly are.
        H: E[x x'], (K, K), for the rounding; None: by the weights alone.
        judge: the same of other data, for the error; None: the error is that of the weights.
    """
    found = []
    for scheme in schemes:
        off = W - rounded(W, scheme, algorithm, H).dequantize()
        plain = float(np.square(off).sum(dtype=np.float64))
        found.append(plain if judge is None else output_error(off, judge))
    return found


def output_error(off: Array, judge: Array) -> float:
    """The sum over rows of e H e', for e of `off`, (n, K), and H = `judge`, (K, K)."""
    return max(float(row_errors(np.asarray(off, np.float64), judge).sum()), 0.0)


def reference_errors(W: Array, judge: Array | None) -> tuple[float, float]:
    """The error of the rounding to nearest that is measured in the model: at the outputs of the rows, and of the weights alone."""
    off = W - reference(W).dequantize()
    weights = float(np.square(off).sum(dtype=np.float64))
    return (weights if judge is None else output_error(off, judge)), weights


def reference(W: Array) -> Blocked:
    """The whole matrix rounded as `REFERENCE` says."""
    return rtn(W, bits=REFERENCE.bits, block=REFERENCE.block, symmetric=REFERENCE.symmetric)


def costs_of_weights(found: Sequence[Matrix], recipe: Recipe) -> list[list[float]]:
    """The error of the weights relative to their size, squared, for each scheme of each matrix: where there is no data.

    Of a matrix that several nodes read, for each of them.
    """
    made = []
    for one in found:
        W = some_rows(one.readers[0])
        size = float(np.square(W).sum(dtype=np.float64)) or 1.0
        unit = len(one.readers) / size
        made.append([unit * e for e in errors(W, one.schemes, recipe.algorithm)])
    return made


def rounded(W: Array, scheme: Scheme, algorithm: str, H: Factors | None) -> Blocked:
    """Some rows of a matrix, or all, as `errors` takes the algorithm to round them."""
    bits, block, symmetric = scheme.bits, scheme.block, scheme.symmetric
    if algorithm == "rtn":
        return rtn(W, bits=bits, block=block, symmetric=symmetric)
    if H is None or algorithm in _NO_GPTQ or bits >= _FINE:
        power = None if H is None else np.diag(H.H)
        return search(W, bits=bits, block=block, symmetric=symmetric, power=power)
    return gptq(W, H.get(order=False), bits=bits, block=block, symmetric=symmetric)
