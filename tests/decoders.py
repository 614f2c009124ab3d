"""Small decoders with a cache, as graph text and as models that can be decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from rewrites import parse

if TYPE_CHECKING:
    import numpy.typing as npt

HEADS, WIDTH, VOCABULARY = 2, 4, 11
FACE = (
    "float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v, float[B,2,P,4] past_k, float[B,2,P,4] past_v) => "
    "(float[B,2,S,4] y, float[B,2,T,4] present_k, float[B,2,T,4] present_v"
)
ATTENTION = """
    present_k = Concat<axis = 2>(past_k, k) present_v = Concat<axis = -2>(past_v, v)
    turned = Transpose<perm = [0, 1, 3, 2]>(present_k) scores = MatMul(q, turned)
    shares = Softmax<axis = -1>(scores) y = MatMul(shares, present_v)"""
ATTENTION_TEXT = f"g ({FACE}) {{ {ATTENTION} }}"


def attention() -> ir.Model:
    """Attention over a cache: two heads of width 4."""
    return parse(ATTENTION_TEXT)


_FACE = """g (int64[B,S] input_ids, int64[B,T] attention_mask, float[B,{h},P,{w}] past_k, float[B,{h},P,{w}] past_v)
        => (float[B,S,{v}] logits, float[B,{h},T,{w}] present_k, float[B,{h},T,{w}] present_v)"""
_PLAIN = """
        dims = Shape(past_k) past = Gather(dims, two)
        present_k = Concat<axis = 2>(past_k, k) present_v = Concat<axis = 2>(past_v, v)
        all = Shape(attention_mask) total = Gather(all, one)
        rows = Range(past, total, one) columns = Range(zero, total, one)
        row = Unsqueeze(rows, back) column = Unsqueeze(columns, lead)
        later = Greater(column, row) mask = Where(later, low, none)
        turned = Transpose<perm = [0, 1, 3, 2]>(present_k) raw = MatMul(q, turned) scores = Add(raw, mask)
        shares = Softmax<axis = -1>(scores) mixed = MatMul(shares, present_v)
        back_to = Transpose<perm = [0, 2, 1, 3]>(mixed) joined = Reshape(back_to, join)"""
_GQA = """
        counts = ReduceSum(attention_mask, back) least = Sub(counts, one) flat = Reshape(least, flatten)
        last = Cast<to = 6>(flat) all = Shape(attention_mask) length = Gather(all, one) total = Cast<to = 6>(length)
        joined, present_k, present_v = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 2>
            (pq, pk, pv, past_k, past_v, last, total)"""


def decoder(
    seed: int = 0, *, width: int = WIDTH, vocabulary: int = VOCABULARY, grouped: bool = False
) -> ir.Model:
    """One layer of attention over an embedding, causal; `input_ids`, `attention_mask`, one cache pair of two heads.

    `grouped`: the attention is a GroupQueryAttention, for which ORT wants a `width` that is a multiple of 8.
    """
    rng = np.random.default_rng(seed)

    def constant(name: str, *shape: int, scale: float = 1.0) -> str:
        numbers = ", ".join(f"{x:.6f}" for x in rng.normal(0, scale, int(np.prod(shape))))
        return f"float[{','.join(map(str, shape))}] {name} = {{{numbers}}}"

    size = HEADS * width
    weights = [constant("table", vocabulary, size), constant("wo", size, vocabulary, scale=0.4)]
    weights += [constant(name, size, size, scale=1.7 / size**0.5) for name in ("wq", "wk", "wv")]
    heads = "".join(
        f"[{x}_proj] p{x} = MatMul(e, w{x}) "
        + ("" if grouped else f"r{x} = Reshape(p{x}, split) {x} = Transpose<perm = [0, 2, 1, 3]>(r{x}) ")
        for x in "qkv"
    )  # fmt: skip
    return parse(f"""{_FACE.format(h=HEADS, w=width, v=vocabulary)}
        <{", ".join(weights)}, int64[4] split = {{0, 0, {HEADS}, {width}}}, int64[3] join = {{0, 0, {size}}},
         int64 zero = {{0}}, int64 one = {{1}}, int64 two = {{2}}, int64[1] lead = {{0}}, int64[1] back = {{1}},
         int64[1] flatten = {{-1}}, float low = {{-10000}}, float none = {{0}}> {{
        e = Gather(table, input_ids) {heads} {_GQA if grouped else _PLAIN}
        summed = Add(joined, e) [head] logits = MatMul(summed, wo) }}""")


def text_feed(ids: npt.NDArray[np.int64] | list[int], width: int = WIDTH) -> dict[str, Any]:
    """A text for `decoder`, with an empty cache."""
    empty = np.zeros((1, HEADS, 0, width), np.float32)
    return {
        "input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64),
        "past_k": empty, "past_v": empty,
    }  # fmt: skip


GROUPED = """g (float[B,S,32] q, float[B,S,16] k, float[B,S,16] v, float[B,2,P,8] past_k, float[B,2,P,8] past_v,
        int32[B] last, int32 total)
    => (float[B,S,32] y, float[B,2,T,8] present_k, float[B,2,T,8] present_v) {
    y, present_k, present_v = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>
        (q, k, v, past_k, past_v, last, total) }"""


def grouped() -> ir.Model:
    """GroupQueryAttention: four query heads of width 8 (ORT wants a multiple of that) on two cached heads."""
    return parse(GROUPED)
