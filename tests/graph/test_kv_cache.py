"""Which inputs are caches, and why others are none."""

from __future__ import annotations

import pytest
from decoders import ATTENTION_TEXT, FACE, GROUPED, attention, decoder, grouped
from rewrites import parse

from qcompile.graph.kv_cache import find_caches


def test_concat_along_the_tokens_is_a_cache() -> None:
    model = attention()
    caches, reasons = find_caches(model)
    assert reasons == {}
    assert [cache.name for cache in caches] == ["past_k", "past_v"]
    assert [cache.present.name for cache in caches] == ["present_k", "present_v"]
    assert [cache.new.name for cache in caches if cache.new] == ["k", "v"]
    assert [(cache.heads, cache.width, cache.form) for cache in caches] == [(2, 4, "concat")] * 2
    assert [cache.is_key for cache in caches] == [True, False]


def test_shapes_of_the_cache_do_not_count_as_readers() -> None:
    caches, reasons = find_caches(decoder())
    assert [cache.is_key for cache in caches] == [True, False]
    assert reasons == {}


def test_group_query_attention_has_two() -> None:
    caches, reasons = find_caches(grouped())
    assert reasons == {}
    assert [(cache.name, cache.present.name, cache.is_key) for cache in caches] == [
        ("past_k", "present_k", True), ("past_v", "present_v", False),
    ]  # fmt: skip
    assert [cache.form for cache in caches] == ["gqa"] * 2


def test_repeated_heads_are_looked_through() -> None:
    model = parse("""g (float[1,4,S,4] q, float[1,2,S,4] k, float[1,2,P,4] past_k) => (float[1,4,S,T] y, float[1,2,T,4] present_k)
        <int64[1] two = {2}, int64[5] more = {1, 2, 2, 1, 4}, int64[4] flat = {1, 4, -1, 4}, float scale = {0.5}> {
        present_k = Concat<axis = 2>(past_k, k) a = Unsqueeze(present_k, two) b = Expand(a, more) c = Reshape(b, flat)
        d = Transpose<perm = [0, 1, 3, 2]>(c) e = MatMul(q, d) f = Mul(e, scale) y = Softmax<axis = -1>(f) }""")
    assert [cache.is_key for cache in find_caches(model)[0]] == [True]


def test_what_nobody_multiplies_counts_as_keys() -> None:
    model = parse(
        "g (float[1,2,S,4] k, float[1,2,P,4] past) => (float[1,2,T,4] present) { present = Concat<axis = 2>(past, k) }"
    )
    assert [cache.is_key for cache in find_caches(model)[0]] == [True]


def one(
    body: str,
    past: str = "float[1,2,P,4] past",
    out: str = "float[1,2,T,4] present",
    more: str = "",
) -> str:
    return f"g (float[1,2,S,4] k, {past}{more}) => ({out}) {{ {body} }}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (one("present = Concat<axis = 3>(past, k)"), "along axis 3, not 2"),
        (one("n = Neg(k) present = Concat<axis = 2>(n, past)"), "do not stand behind it"),
        (one("present = Concat<axis = 2>(past, k, k)"), "a Concat of two tensors"),
        (one("c = Concat<axis = 2>(past, k) present = Neg(c)"), "is no output of the graph"),
        (one("a = Neg(past) present = Concat<axis = 2>(past, a)"), "2 nodes read it (Concat, Neg)"),
        (one("present = Neg(past)"), "Neg reads it, not a Concat"),
        (one("present = Shape(past)", out="int64[4] present"), "nothing but Shape reads it"),
        (
            one("present = Concat<axis = 1>(past, k)", "float[1,P,4] past").replace("[1,2,S,4] k", "[1,S,4] k"),
            "it has 3 dimensions",
        ),
        (
            one("present = Concat<axis = 2>(past, k)", "float[1,2,1,4] past = {1, 2, 3, 4, 5, 6, 7, 8}"),
            "a default value",
        ),
        (
            one(
                "present = If(c) <then_branch = a () => (float[1,2,T,4] t) { t = Concat<axis = 2>(past, k) }, "
                "else_branch = b () => (float[1,2,S,4] e) { e = Neg(k) }>",
                more=", bool c",
            ),
            "a body of If, Loop or Scan reads it",
        ),
        (
            f"g ({FACE}) {{ y, present_k, present_v = com.microsoft.MultiHeadAttention<num_heads = 2>"
            "(q, k, v, , , , past_k, past_v) }",
            "MultiHeadAttention reads it, which has no integer cache",
        ),
    ],
)  # fmt: skip
def test_others_are_told_with_a_reason(text: str, reason: str) -> None:
    caches, reasons = find_caches(parse(text))
    assert caches == []
    assert [found for found in reasons.values() if reason in found], reasons


def test_a_gqa_whose_cache_is_no_output() -> None:
    text = GROUPED.replace(", float[B,2,T,8] present_v)", ")").replace("present_v", "unread")
    caches, reasons = find_caches(parse(text))
    assert [cache.name for cache in caches] == ["past_k"]
    assert "no output of the graph" in reasons["past_v"]


def test_inputs_that_are_not_called_past_are_passed_over() -> None:
    assert find_caches(parse(ATTENTION_TEXT))[1] == {}
    assert find_caches(parse("g (float[1,2] x) => (float[1,2] y) { y = Neg(x) }")) == ([], {})
