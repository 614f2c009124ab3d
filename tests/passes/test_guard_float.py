"""GuardFloat: what stands in the way of ORT's slow integer kernels."""

from __future__ import annotations

import pytest
from lowering import constant
from rewrites import assert_refuses, assert_rewrites, parse

from passes.guard_float import GuardFloat
from qcompile.plan.plan import Form, NodePlan, Plan
from qcompile.run.session import Options
from qcompile.step import run_pass
from qcompile.verify.kernels import optimized

NUMBERS = "float s = {0.1}, uint8 z = {128}"
POOL = "kernel_shape = [2, 2], strides = [2, 2]"


def text(before: str, quantized: str = "t") -> str:
    """Nodes that make `quantized`, which is quantized then."""
    return (
        f"g (float[1,4,8,8] x) => (uint8[A,B,C,D] y) <{NUMBERS}, int64[4] shape = {{1, 4, 2, 8}}> "
        f"{{ {before} y = QuantizeLinear({quantized}, s, z) }}"
    )


@pytest.mark.parametrize(
    "node",
    [f"MaxPool<{POOL}>(x)", f"AveragePool<{POOL}>(x)", "Softmax(x)", "LogSoftmax<axis = 1>(x)"],
)
def test_slow_operators(node: str) -> None:
    assert_rewrites(GuardFloat(), text(f"t = {node}"), text(f"t = {node} m = Max(t)", "m"))


@pytest.mark.parametrize("move", ["Reshape(p, shape)", "Transpose(p)", "Slice(p, shape, shape)"])
def test_behind_moves(move: str) -> None:
    """ORT brings the QuantizeLinear before them, then before the pool."""
    before = f"p = MaxPool<{POOL}>(x) t = {move}"
    if "Slice" in move:
        before = before.replace("Slice(p, shape, shape)", "Slice(p, zero, four)")
        wide = text(before).replace(
            "<float s", "<int64[1] zero = {0}, int64[1] four = {1}, float s"
        )
        guarded = text(f"{before} m = Max(t)", "m").replace(
            "<float s", "<int64[1] zero = {0}, int64[1] four = {1}, float s"
        )
        assert_rewrites(GuardFloat(), wide, guarded)
        return
    assert_rewrites(GuardFloat(), text(before), text(f"{before} m = Max(t)", "m"))


def test_each_quantizer_has_its_guard() -> None:
    two = "g (float[1,4,8,8] x) => (uint8[A,B,C,D] y, uint8[E,F,G,H] w) <float s = {0.1}, float r = {0.2}, uint8 z = {128}> "
    assert_rewrites(
        GuardFloat(),
        two + "{ t = Softmax(x) y = QuantizeLinear(t, s, z) w = QuantizeLinear(t, r, z) }",
        two
        + "{ t = Softmax(x) m = Max(t) y = QuantizeLinear(m, s, z) n = Max(t) w = QuantizeLinear(n, r, z) }",
    )


@pytest.mark.parametrize("node", ["Relu(x)", "Max(x)", "Add(x, x)", "GlobalAveragePool(x)"])
def test_what_needs_no_guard(node: str) -> None:
    assert_refuses(GuardFloat(), text(f"t = {node}"))


def test_an_input_that_is_quantized() -> None:
    assert_refuses(GuardFloat(), text("", "x"))
    assert_refuses(GuardFloat(), text("t = Transpose(x)"))


@pytest.mark.parametrize(
    ("form", "guarded"), [(Form.STATIC, False), (Form.FLOAT, True), (None, True)]
)
def test_what_the_plan_makes_integer_needs_no_guard(form: Form | None, guarded: bool) -> None:
    entries = () if form is None else (NodePlan("pool", "MaxPool", form),)
    for move in ("t = Identity(p)", "t = Transpose(p)"):
        model = parse(
            text(
                f"[pool] p = MaxPool<{POOL}>(x) {move}"
                if "Transpose" in move
                else f"[pool] t = MaxPool<{POOL}>(x)"
            )
        )
        assert bool(run_pass(GuardFloat(Plan("t", "a", entries)), model).changed) == guarded


def test_a_pool_that_nobody_quantizes() -> None:
    assert_refuses(
        GuardFloat(),
        f"g (float[1,4,8,8] x) => (float[A,B,C,D] y) {{ p = MaxPool<{POOL}>(x) y = Relu(p) }}",
    )


# ---- against ORT


def island(middle: str) -> str:
    """Float nodes before an integer Conv."""
    codes = ", ".join(["3"] * 144)
    return (
        f"g (float[1,4,8,8] x) => (float[A,B,C,D] y) <{constant('k', 4, 4, 3, 3)}, {NUMBERS}, float sy = {{0.3}}, "
        f"int8[4,4,3,3] kq = {{{codes}}}, int8 kz = {{0}}, int64[4] shape = {{1, 4, -1, 2}}> "
        f"{{ c = QuantizeLinear(x, s, z) d = DequantizeLinear(c, s, z) {middle} q = QuantizeLinear(t, s, z) "
        "e = DequantizeLinear(q, s, z) w = DequantizeLinear(kq, s, kz) v = Conv<pads = [1, 1, 1, 1]>(e, w) "
        "o = QuantizeLinear(v, sy, z) y = DequantizeLinear(o, sy, z) }"
    )


@pytest.mark.parametrize(
    ("middle", "slow"),
    [(f"n = Neg(d) t = MaxPool<{POOL}>(n)", None), (f"n = Neg(d) p = MaxPool<{POOL}>(n) t = Reshape(p, shape)", None),
     (f"n = Neg(d) p = MaxPool<{POOL}>(n) t = Transpose(p)", None), (f"t = AveragePool<{POOL}>(d)", "QLinearAveragePool"),
     ("t = Softmax(d)", "QLinearSoftmax"), ("p = Softmax(d) t = Transpose(p)", "QLinearSoftmax")],
)  # fmt: skip
def test_ort_takes_the_float_kernel_only_behind_a_guard(middle: str, slow: str | None) -> None:
    model = parse(island(middle))

    def kernels() -> list[str]:
        return [node.op_type for node in optimized(model, Options("all", threads=1)).graph]

    def integer_pool(ops: list[str]) -> bool:
        """A QuantizeLinear stands before the pool, or there is the slow operator."""
        if slow is not None:
            return slow in ops
        pool = ops.index("MaxPool")
        return "QuantizeLinear" in ops[ops.index("Neg") : pool]

    assert integer_pool(kernels()), "ORT has changed: is the guard still needed?"
    run_pass(GuardFloat(), model)
    assert not integer_pool(kernels())
