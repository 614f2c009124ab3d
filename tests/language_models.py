"""A small language model, and texts for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from networks import from_text
from workbench import weight

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    Array = NDArray[Any]


def language(width: int = 64, words: int = 512, layers: int = 2) -> onnx.ModelProto:
    """`ids` (b, s) -> a lookup, layers of two products, a head that is the table transposed -> `logits`."""
    text, weights, x = "e = Gather(table, ids) ", {"table": weight(words, width, scale=8.0)}, "e"
    weights |= {"one": np.ones(width, np.float32), "none": np.zeros(width, np.float32)}
    for i in range(layers):
        weights[f"u{i}"] = weight(width, 4 * width, seed=2 * i + 1)
        weights[f"d{i}"] = weight(4 * width, width, seed=2 * i + 2)
        text += (
            f"n{i} = LayerNormalization({x}, one, none) [up{i}] a{i} = MatMul(n{i}, u{i}) r{i} = Relu(a{i}) "
            f"[down{i}] b{i} = MatMul(r{i}, d{i}) x{i} = Add({x}, b{i}) "
        )
        x = f"x{i}"
    text += f"h = LayerNormalization({x}, one, none) t = Transpose<perm = [1, 0]>(table) [head] logits = MatMul(h, t)"
    return from_text(f"g (int64[b,s] ids) => (float[b,s,{words}] logits) {{ {text} }}", **weights)


def texts(count: int = 30, words: int = 512) -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    # few words are frequent, as in texts: inputs correlate
    rows = (rng.pareto(1.0, size=(count, 1, 24)) * 8).astype(np.int64) % words
    return [{"ids": row} for row in rows]
