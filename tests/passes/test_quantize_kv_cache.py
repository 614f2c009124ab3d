"""QuantizeKvCache: graphs before and after, refusals, and the same numbers as the codes of `quant.cache`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from decoders import ATTENTION, ATTENTION_TEXT, FACE, GROUPED, attention, grouped
from rewrites import assert_refuses, assert_same_picture, parse, run

from passes.quantize_kv_cache import QuantizeKvCache
from qcompile.graph import io
from qcompile.quant.cache import KINDS, CacheParams, Kind, Packing, decode, encode
from qcompile.step import run_pass

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

SCALE = np.array([[0.01, 0.02, 0.03, 0.04], [0.05, 0.06, 0.07, 0.08]], np.float32)
NUMBERS = "0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08"
PAST = ("past_k", "past_v")


def params(kind: Kind = "int8", *, offset: bool = False, wide: float = 1) -> CacheParams:
    scale = (SCALE * np.float32(wide)).astype(np.float32)
    return CacheParams(kind, scale, scale * 3 if offset else None)


def step(kind: Kind = "int8", *, offset: bool = False, wide: float = 1) -> QuantizeKvCache:
    return QuantizeKvCache(dict.fromkeys(PAST, params(kind, offset=offset, wide=wide)))


LONG = f"{NUMBERS}, {NUMBERS}"


def both(kind: Kind, *, offset: bool = False, wide: float = 1) -> QuantizeKvCache:
    """For `grouped`, whose heads are wider."""
    scale = (np.tile(SCALE.reshape(1, -1), (2, 1)) * np.float32(wide)).astype(np.float32)
    return QuantizeKvCache(dict.fromkeys(PAST, CacheParams(kind, scale, scale if offset else None)))


def cached(shape: str, body: str, kind: str = "int8", width: int = 4, constants: str = "") -> str:
    return (
        f"g (float[1,2,S,4] k, {kind}[1,2,P,{width}] past_k) => ({shape} y, {kind}[1,2,T,{width}] present_k) "
        f"<float[1,2,1,4] s = {{{NUMBERS}}}, float one = {{1}}{constants}> {{ {body} }}"
    )


BEFORE = """g (float[1,2,S,4] k, float[1,2,P,4] past_k) => (float[1,2,T,4] y, float[1,2,T,4] present_k) {
    present_k = Concat<axis = 2>(past_k, k) y = Neg(present_k) }"""


@pytest.mark.parametrize(("kind", "zero"), [("int8", 0), ("uint8", 128)])
def test_eight_bits(kind: Kind, zero: int) -> None:
    after = cached(
        "float[1,2,T,4]",
        """d = Div(k, s) q = QuantizeLinear(d, one, z) present_k = Concat<axis = 2>(past_k, q)
           x = DequantizeLinear(present_k, one, z2) f = Mul(x, s) y = Neg(f)""",
        kind, constants=f", {kind} z = {{{zero}}}, {kind} z2 = {{{zero}}}",
    )  # fmt: skip
    made = parse(BEFORE)
    assert run_pass(step(kind), made).changed == ["past_k"]
    check_picture(made, after)


def test_an_offset() -> None:
    made = parse(BEFORE)
    run_pass(step(offset=True), made)
    after = cached(
        "float[1,2,T,4]",
        """c = Sub(k, o) d = Div(c, s) q = QuantizeLinear(d, one, z) present_k = Concat<axis = 2>(past_k, q)
           x = DequantizeLinear(present_k, one, z2) u = Mul(x, s) f = Add(u, o) y = Neg(f)""",
        constants=", int8 z = {0}, int8 z2 = {0}, "
        "float[1,2,1,4] o = {0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.21, 0.24}",
    )  # fmt: skip
    check_picture(made, after)


def test_int4_shares_bytes() -> None:
    made = parse(BEFORE)
    run_pass(step("int4"), made)
    body = """d = Div(k, s) c = Clip(d, low, high) r = Round(c)
        l = Slice(r, i0, i2, a3) h = Slice(r, j2, i4, b3) u = Mul(h, sixteen) b = Add(l, u)
        q = QuantizeLinear(b, one, z) present_k = Concat<axis = 2>(past_k, q)
        up = BitShift<direction = "LEFT">(present_k, four) lo = BitShift<direction = "RIGHT">(up, four)
        hi = BitShift<direction = "RIGHT">(present_k, four) w = Concat<axis = 3>(lo, hi)
        x = DequantizeLinear(w, one, z2) f = Mul(x, s) y = Neg(f)"""
    constants = """, float low = {-8}, float high = {7}, int64[1] i0 = {0}, int64[1] i2 = {2}, int64[1] a3 = {3},
        int64[1] j2 = {2}, int64[1] i4 = {4}, int64[1] b3 = {3}, float sixteen = {16}, uint8 z = {136},
        uint8 four = {4}, uint8 z2 = {8}"""
    check_picture(made, cached("float[1,2,T,4]", body, "uint8", 2, constants))


def check_picture(made: ir.Model, after: str) -> None:
    """The graph is `after`, valid, and a second run leaves it alone."""
    assert_same_picture(made, parse(after))
    assert io.check(made) is None
    text = ir.to_onnx_text(made)
    again = run_pass(step(), made)
    assert again.changed == []
    assert all("not float32" in reason for reason in again.skipped.values())
    assert ir.to_onnx_text(made) == text


def test_group_query_attention_gets_attributes_and_scales() -> None:
    made = grouped()
    outcome = run_pass(both("int8"), made)
    assert outcome.changed == list(PAST)
    after = GROUPED.replace("float[B,2", "int8[B,2").replace(
        ") {", f") <float[2,8] ks = {{{LONG}}}, float[2,8] vs = {{{LONG}}}> {{"
    )
    extra = ', k_quant_type = "PER_CHANNEL", v_quant_type = "PER_CHANNEL", kv_cache_bit_width = 8>'
    after = after.replace("= 2>", "= 2" + extra).replace("total) }", "total, , , , , , ks, vs) }")
    check_picture(made, after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["off", "all"])
@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("offset", [False, True])
def test_ort_computes_what_the_codes_say(kind: Kind, level: str, past: int, offset: bool) -> None:
    rng = np.random.default_rng(0)
    use = params(kind, offset=offset, wide=20 if kind == "int4" else 1)
    new = {x: rng.normal(size=(2, 2, 5, 4)).astype(np.float32) for x in "qkv"}
    new["k"][0, 0, 0, 0] = 1e4  # saturates
    old = {f"past_{x}": rng.normal(size=(2, 2, past, 4)).astype(np.float32) for x in "kv"}
    made = attention()
    assert run_pass(QuantizeKvCache(dict.fromkeys(PAST, use)), made).changed == list(PAST)
    codes = {name: encode(values, use) for name, values in old.items()}
    y, *presents = run(made, {**new, **codes}, level)
    rounded = {x: decode(encode(new[x], use), use) for x in "kv"}
    stored = {name: decode(values, use) for name, values in codes.items()}
    wanted = run(attention(), {"q": new["q"], **rounded, **stored})
    np.testing.assert_allclose(y, wanted[0], rtol=1e-4, atol=1e-5)
    for got, name, x in zip(presents, PAST, "kv", strict=True):
        np.testing.assert_array_equal(got[:, :, :past], codes[name])  # never rounded again
        np.testing.assert_array_equal(got[:, :, past:], encode(new[x], use))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_ort_fills_the_cache_of_group_query_attention_as_we_do(kind: Kind) -> None:
    rng = np.random.default_rng(1)
    step = both(kind, wide=20 if kind == "int4" else 1)
    use, made = step.params["past_k"], grouped()
    run_pass(step, made)
    new = {
        x: rng.normal(size=(1, 5, n)).astype(np.float32)
        for x, n in (("q", 32), ("k", 16), ("v", 16))
    }
    ends = {"last": np.array([4], np.int32), "total": np.array(5, np.int32)}
    empty = {name: np.zeros((1, 2, 0, use.stored_width), use.dtype) for name in PAST}
    y, *presents = run(made, {**new, **ends, **empty}, "all")
    floats = {name: np.zeros((1, 2, 0, 8), np.float32) for name in PAST}
    for got, x in zip(presents, "kv", strict=True):
        heads = new[x].reshape(1, 5, 2, 8).transpose(0, 2, 1, 3)  # (batch, heads, tokens, width)
        np.testing.assert_array_equal(got, encode(heads, use, Packing.PAIRS))
        new[x] = decode(got, use, Packing.PAIRS).transpose(0, 2, 1, 3).reshape(1, 5, 16)
    wanted = run(grouped(), {**new, **ends, **floats}, "all")
    np.testing.assert_allclose(y, wanted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_who_asks_for_a_shape_gets_that_of_the_float_cache(kind: Kind) -> None:
    text = """g (float[1,2,S,4] k, float[1,2,P,4] past_k) => (int64[4] a, int64[2] b, float[1,2,T,4] present_k) {
        present_k = Concat<axis = 2>(past_k, k) s = Shape(past_k) a = Neg(s)
        t = Shape<start = 2, end = 4>(present_k) b = Neg(t) }"""
    made = parse(text)
    run_pass(step(kind), made)
    width = params(kind).stored_width
    feed: dict[str, Array] = {
        "k": np.ones((1, 2, 1, 4), np.float32),
        "past_k": np.zeros((1, 2, 3, width), params(kind).dtype),
    }
    a, b, present = run(made, feed)
    assert a.tolist() == [-1, -2, -3, -4]
    assert b.tolist() == [-4, -4]
    assert present.shape == (1, 2, 4, width)


def test_a_shape_that_is_an_output_is_that_of_the_float_cache() -> None:
    text = """g (float[1,2,S,4] k, float[1,2,P,4] past_k) => (int64[4] a, float[1,2,T,4] present_k) {
        present_k = Concat<axis = 2>(past_k, k) a = Shape(present_k) }"""
    made = parse(text)
    run_pass(step("int4"), made)
    feed: dict[str, Array] = {
        "k": np.ones((1, 2, 1, 4), np.float32),
        "past_k": np.zeros((1, 2, 3, 2), np.uint8),
    }
    assert run(made, feed, "all")[0].tolist() == [1, 2, 4, 4]


def test_a_body_that_reads_the_cache_reads_floats() -> None:
    text = """g (float[1,2,S,4] k, float[1,2,P,4] past_k, bool on) => (float[1,2,T,4] y, float[1,2,T,4] present_k) {
        present_k = Concat<axis = 2>(past_k, k)
        y = If(on) <then_branch = a () => (float[1,2,T,4] t) { t = Neg(present_k) },
                    else_branch = b () => (float[1,2,T,4] e) { e = Exp(present_k) }> }"""
    made = parse(text)
    run_pass(step(), made)
    feed: dict[str, Array] = {
        "k": np.full((1, 2, 1, 4), 0.04, np.float32),
        "past_k": np.zeros((1, 2, 0, 4), np.int8),
    }
    y, codes = run(made, {**feed, "on": np.array(True)}, "all")
    np.testing.assert_allclose(y, -codes * SCALE[None, :, None, :], rtol=1e-6)


HALF = ATTENTION_TEXT.replace("float[", "float16[")
OPEN = ATTENTION_TEXT.replace("float[B,2,P,4] past_k", "float[B,H,P,4] past_k")
ODD = """g (float[1,2,S,3] k, float[1,2,P,3] past_k) => (float[1,2,T,3] present_k) {
    present_k = Concat<axis = 2>(past_k, k) }"""
READ = GROUPED.replace("present_v) {", "present_v, float[B,2,T,8] z) {").replace(
    "total) }", "total) z = Neg(present_k) }"
)


@pytest.mark.parametrize(
    ("text", "use", "reason"),
    [
        (HALF, step(), "holds FLOAT16, not float32"),
        (ATTENTION_TEXT, QuantizeKvCache({}), "no parameters were calibrated"),
        (OPEN.replace("past_v", "pv").replace("(pv, v)", "(v, v)"), step(), "does not fix the 2 heads"),
        (ODD, QuantizeKvCache({"past_k": CacheParams("int4", SCALE[:, :3])}), "width 3 is odd"),
        (f"g ({FACE}) {{ {ATTENTION.replace('(past_k, k)', '(k, past_k)').replace('(past_v, v)', '(v, past_v)')} }}", step(), "do not stand behind it"),
        (READ, both("int8"), "nodes besides GroupQueryAttention read"),
        (READ, both("int8"), "the other cache of its GroupQueryAttention stays float"),
    ],
)  # fmt: skip
def test_refusals(text: str, use: QuantizeKvCache, reason: str) -> None:
    assert_refuses(use, text, reason)


def test_refusals_of_group_query_attention() -> None:
    assert_refuses(both("uint8"), grouped(), "stores int8 or int4, not uint8")
    assert_refuses(both("int4", offset=True), grouped(), "has no offsets")
    of_8, of_4 = both("int8").params["past_k"], both("int4").params["past_k"]
    for some in ({"past_k": of_8}, {"past_k": of_8, "past_v": of_4}):
        assert_refuses(QuantizeKvCache(some), grouped(), "stores keys and values alike")


def test_an_old_opset_is_refused() -> None:
    assert_refuses(step(), BEFORE, "opset 10 is below 11", opset=10)
