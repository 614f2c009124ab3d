from __future__ import annotations

import numpy as np
from rewrites import assert_refuses, assert_rewrites

from passes.smooth_linear import SmoothLinear
from qcompile.solve.smoothing import LinearGroup, Smoothing

S = np.array([2, 4], np.float32)


def step(tensor: str, *nodes: str, fold: str = "", scale: np.ndarray = S) -> SmoothLinear:
    return SmoothLinear({tensor: Smoothing(LinearGroup(tensor, nodes, fold), scale)})


HEAD = "g (float[N,2] x) => (float[N,2] y)"
W = "float[2,2] w = {1, 2, 3, 4}"


def test_a_mul_where_others_read_the_tensor() -> None:
    assert_rewrites(
        step("x", "p"),
        before=f"{HEAD} <{W}> {{ [p] y = MatMul(x, w) }}",
        after=f"{HEAD} <float[2] c = {{0.5, 0.25}}, float[2,2] w = {{2, 4, 12, 16}}> {{ t = Mul(x, c) y = MatMul(t, w) }}",
    )


def test_into_a_normalization() -> None:
    outcome = assert_rewrites(
        step("t", "p", fold="n"),
        before=f"{HEAD} <{W}, float[2] a = {{2, 2}}, float[2] b = {{4, 8}}> {{ [n] t = LayerNormalization(x, a, b) [p] y = MatMul(t, w) }}",
        after=f"{HEAD} <float[2,2] w = {{2, 4, 12, 16}}, float[2] a = {{1, 0.5}}, float[2] b = {{2, 2}}> {{ t = LayerNormalization(x, a, b) y = MatMul(t, w) }}",
    )
    assert outcome.rescaled == {"t"}


def test_into_a_linear_layer_and_its_bias() -> None:
    assert_rewrites(
        step("t", "p", fold="b"),
        before=f"{HEAD} <{W}, float[2,2] v = {{2, 4, 6, 8}}, float[2] c = {{2, 8}}> {{ u = MatMul(x, v) [b] t = Add(u, c) [p] y = MatMul(t, w) }}",
        after=f"{HEAD} <float[2,2] v = {{1, 1, 3, 2}}, float[2] c = {{1, 2}}, float[2,2] w = {{2, 4, 12, 16}}> {{ u = MatMul(x, v) t = Add(u, c) y = MatMul(t, w) }}",
    )


def test_refusals() -> None:
    model = f"{HEAD} <{W}> {{ [p] y = MatMul(x, w) }}"
    assert_refuses(step("x", "q"), model, "it is not in the graph")
    assert_refuses(step("z", "p"), model, "it does not read z")
    assert_refuses(
        step("x", "p", scale=np.ones(3, np.float32)), model, "its weight has 2 rows, the scale 3"
    )
    assert_refuses(
        step("x", "p", scale=np.array([1, 0], np.float32)), model, "its scale is not positive"
    )
