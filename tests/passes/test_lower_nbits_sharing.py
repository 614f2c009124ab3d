"""Payloads that several nodes and graphs read, and weights that are made late."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from few_bits import blocked, lowered, named, ops, snapped, stored
from lowering import constant
from rewrites import assert_close, random_feed, run

from passes.lower_nbits import Form, LowerNbits
from qcompile.errors import PassError
from qcompile.graph.linear import find_linears
from qcompile.solve.payload import Deferred
from qcompile.step import run_pass

FORMS: tuple[Form, ...] = ("nbits", "portable")
W = constant("w", 32, 24)  # (K, N)
E = constant("e", 24, 32)  # (N, K)


TIED = "g (int64[2] i, float[3,{k}] x) => (float[2,{k}] u, float[3,24] y) <{e}> {{ u = Gather(e, i) {head} }}"


@pytest.mark.parametrize(
    "head", ["t = Transpose<perm = [1, 0]>(e) y = MatMul(x, t)", "y = Gemm<transB = 1>(x, e)"]
)
@pytest.mark.parametrize(("depth", "bits"), [(32, 4), (40, 4), (33, 2), (48, 8)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tied_table_is_stored_once(head: str, depth: int, bits: int, *, symmetric: bool) -> None:
    text = TIED.format(k=depth, e=constant("e", 24, depth), head=head)
    model, _ = lowered(text, bits=bits, symmetric=symmetric)
    payload = {"e_q", "e_scale"} | (set() if symmetric else {"e_zero_point"})
    assert {name for name in stored(model) if name.startswith("e_")} - {"e_q_shape"} == payload
    assert ops(model).count("Reshape") == 1
    assert ("Slice" in ops(model)) == (depth % 16 != 0)


def test_a_tied_table_with_a_scaled_head_is_stored_twice() -> None:
    text = TIED.format(k=32, e=E, head="y = Gemm<transB = 1, alpha = 2.0>(x, e)")
    model, _ = lowered(text)
    assert sorted(stored(model)) == ["e_q", "e_q_1", "e_scale", "e_scale_1"]


def test_a_tied_table_in_the_portable_form_is_stored_twice() -> None:
    model, _ = lowered(
        TIED.format(k=32, e=E, head="y = Gemm<transB = 1>(x, e)"), "portable", bits=8
    )
    assert {"e_q", "e_q_1"} <= stored(model)
    assert "e" not in stored(model)


@pytest.mark.parametrize("form", FORMS)
def test_several_readers_share_a_payload(form: Form) -> None:
    text = f"""g (float[3,32] x, float[2,32] z) => (float[3,24] y, float[2,24] u, float[2,24] v) <{W}> {{
        y = MatMul(x, w) i = Identity(w) u = MatMul(z, i) v = Gemm(z, w) }}"""
    model, outcome = lowered(text, form)
    assert len(outcome.changed) == 3
    # ORT fuses only what nobody else reads, in the graph where it is read.
    copies = 1 if form == "nbits" else 3
    assert len(stored(model)) == 2 * copies
    assert "w" not in stored(model)


def test_equal_numbers_share_a_payload_and_others_do_not() -> None:
    text = f"g (float[3,32] x) => (float[3,24] y, float[3,24] z) <{W}> {{ y = MatMul(x, w) z = MatMul(x, w) }}"
    model = named(text)
    (first, second) = find_linears(model)
    equal = {item.name: blocked(item.read()) for item in (first, second)}
    run_pass(LowerNbits(equal), copied := model.clone())
    assert stored(copied) == {"w_q", "w_scale"}
    other = {first.name: blocked(first.read()), second.name: blocked(second.read(), 8)}
    run_pass(LowerNbits(other), model)
    assert stored(model) == {"w_q", "w_scale", "w_q_1", "w_scale_1"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("taken", [True, False])
def test_bodies(form: Form, *, taken: bool) -> None:
    """C01: both branches and the main graph read one outer weight."""
    text = f"""g (float[3,32] x, bool c) => (float[3,24] y, float[3,24] z) <{W}> {{
        y = If(c) <then_branch = a () => (float[3,24] p) {{ p = MatMul(x, w) }},
                   else_branch = b () => (float[3,24] q) {{ n = Neg(x) q = MatMul(n, w) }}>
        z = MatMul(x, w) }}"""
    model, outcome = lowered(text, form, given={"c": np.array(taken)})
    assert len(outcome.changed) == 3
    # ORT fuses only what nobody else reads, in the graph where it is read.
    copies = 1 if form == "nbits" else 3
    assert len(stored(model)) == 2 * copies
    assert "w" not in stored(model)


def test_a_weight_that_a_body_holds() -> None:
    text = f"""g (float[3,32] x, bool c) => (float[3,24] y) {{
        y = If(c) <then_branch = a () => (float[3,24] p) <{W}> {{ p = MatMul(x, w) }},
                   else_branch = b () => (float[3,24] q) <{constant("v", 32, 24)}> {{ q = MatMul(x, v) }}> }}"""
    model, _ = lowered(text, given={"c": np.array(True)})
    assert not model.graph.initializers
    assert stored(model) == {"w_q", "w_scale", "v_q", "v_scale"}


def test_a_tied_table_read_in_a_body() -> None:
    text = f"""g (int64[2] i, float[3,32] x, bool c) => (float[2,32] u, float[3,24] y) <{E}> {{
        u = If(c) <then_branch = a () => (float[2,32] p) {{ p = Gather(e, i) }},
                   else_branch = b () => (float[2,32] q) {{ j = Neg(i) q = Gather(e, j) }}>
        y = Gemm<transB = 1>(x, e) }}"""
    for taken in (True, False):
        model, _ = lowered(text, given={"c": np.array(taken)})
        assert ops(model).count("Reshape") == 1


KEPT = {
    "a float reader": ("float z", "r = Exp(w) z = ReduceSum<keepdims = 0>(r)", "w"),
    "an output": ("float[32,24] w", "", "w"),
}


@pytest.mark.parametrize("case", KEPT)
def test_float_weights_that_are_read_stay(case: str) -> None:
    out, body, name = KEPT[case]
    model, _ = lowered(
        f"g (float[3,32] x) => (float[3,24] y, {out}) <{W}> {{ y = MatMul(x, w) {body} }}"
    )
    assert name in stored(model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plain", [True, False])
def test_deferred_weights(form: Form, *, plain: bool) -> None:
    model = named(TIED.format(k=32, e=E, head="y = Gemm<transB = 1>(x, e)"))
    weights = snapped(model, 8)
    feed = random_feed(model)
    wanted = run(model, feed)
    made, calls = next(iter(weights.values())), []

    def make() -> Any:
        calls.append(1)
        return made

    given = make if plain else Deferred(8, 16, symmetric=True, make=make)
    run_pass(LowerNbits(dict.fromkeys(weights, given), form, 1), model)
    assert len(calls) == (2 if plain else 0)
    calls.clear()
    assert_close(run(model, feed), wanted, rtol=1e-5, atol=1e-6)
    assert len(calls) == (1 if form == "nbits" else 2)


def test_deferred_weights_that_are_not_as_said() -> None:
    model = named(f"g (float[3,32] x) => (float[3,24] y) <{W}> {{ y = MatMul(x, w) }}")
    (item,) = find_linears(model)
    made = blocked(item.read(), symmetric=False)
    run_pass(LowerNbits({item.name: Deferred(4, 16, symmetric=True, make=lambda: made)}), model)
    held = model.graph.initializers["w_q"].const_value
    assert held is not None
    with pytest.raises(PassError, match="said to be"):
        held.numpy()


def test_a_loop_and_the_graph_around_it() -> None:
    """C02: a body and the main graph read one weight."""
    text = f"""g (float[3,32] x) => (float[3,32] y, float[3,32] z) <{constant("w", 32, 32)}, int64 n = {{2}}, bool t = {{1}}> {{
        y = Loop(n, t, x) <body = b (int64 i, bool c, float[3,32] s) => (bool d, float[3,32] u) {{
            d = Identity(c) m = MatMul(s, w) u = Tanh(m) }}>
        z = MatMul(x, w) }}"""
    for form in FORMS:
        model, outcome = lowered(text, form)
        assert len(outcome.changed) == 2
        assert stored(model) >= {"w_q", "w_scale"}
        assert "w" not in stored(model)
