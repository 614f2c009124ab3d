"""Weights for tests of block quantization, and slow, obvious versions of what is tested."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from qcompile.algo.blocks import Blocked

Array = NDArray[Any]
KINDS = ("normal", "zeros", "constant", "huge", "denormal", "mixed", "positive", "spike")


def weights(seed: int, n: int, k: int, kind: str = "normal") -> Array:
    """Float32 (n, k)."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(n, k))
    if kind == "zeros":
        w[0] = 0
        w[:, : k // 2] = 0
    elif kind == "constant":
        w[:] = w[:, :1]
    elif kind == "huge":
        w = w / np.abs(w).max() * 3e38
    elif kind == "denormal":
        w *= 1e-42
    elif kind == "mixed":
        w *= 10.0 ** rng.integers(-40, 37, size=(n, k))
    elif kind == "positive":
        w = np.abs(w) + 3
    elif kind == "spike":
        w[:, rng.integers(k)] *= 30
    return w.astype(np.float32)


@st.composite
def any_weights(draw: st.DrawFn) -> Array:
    n, k = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    return weights(draw(st.integers(0, 10**6)), n, k, draw(st.sampled_from(KINDS)))


@st.composite
def any_scheme(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "bits": draw(st.sampled_from((2, 3, 4, 8))),
        "block": draw(st.sampled_from((None, 0, 1, 3, 8, 16, 64))),
        "symmetric": draw(st.booleans()),
        "scales": draw(st.sampled_from(("float32", "float16", "bfloat16"))),
    }


def inputs(seed: int, rows: int, k: int, *, rank: int | None = None, mix: int = 0) -> Array:
    """Rows that correlate, from `rank` sources and a little noise; `mix` fixes how they do."""
    shape = np.random.default_rng([7, mix])
    sources = rank or max(k // 4, 1)
    spread = shape.normal(size=(sources, k)) * np.exp(0.5 * shape.normal(size=k))
    rng = np.random.default_rng([8, seed])
    made: Array = rng.normal(size=(rows, sources)) @ spread + 0.2 * rng.normal(size=(rows, k))
    return made


def moment(x: Array) -> Array:
    made: Array = x.T @ x / len(x)
    return made


def slow_dequantize(b: Blocked) -> Array:
    n, k = b.codes.shape
    size = b.block or k
    w = np.empty((n, k), np.float32)
    for i in range(n):
        for j in range(k):
            code, zero = int(b.codes[i, j]), int(b.zero[i, j // size])
            w[i, j] = np.float32(code - zero) * b.scale[i, j // size]
    return w


def block_errors(W: Array, b: Blocked, power: Array | None = None) -> Array:
    """The weighted squared error of each block in units of its largest weight, float64 (N, G)."""
    size = b.block or W.shape[1]
    off = np.square(W.astype(np.float64) - b.dequantize())
    if power is not None:
        off = off * power
    errors = np.empty(b.scale.shape)
    for g in range(len(b.scale.T)):
        part = slice(g * size, (g + 1) * size)
        largest = np.abs(W[:, part].astype(np.float64)).max(axis=1)
        errors[:, g] = off[:, part].sum(axis=1) / np.where(largest > 0, largest, 1) ** 2
    return errors
