"""GuardFloat: what stands in the way of ORT's slow integer kernels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from lowering import constant
from rewrites import assert_refuses, assert_rewrites, parse

from passes.guard_float import GuardFloat
from qcompile.plan.plan import Form, NodePlan, Plan
from qcompile.run.session import Options, Session
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


# ---- weights that ORT quantizes by itself

WEIGHTS = f"{constant('f', 4, 4, 3, 3)}, {constant('b', 4)}, {constant('m', 4, 4)}"
CONV = "Conv<pads = [1, 1, 1, 1]>"
BOUNDS = "float low = {0}, float high = {6}"


def between(middle: str, last: str = "t") -> str:
    """Float nodes between a DequantizeLinear and a QuantizeLinear."""
    return (
        f"g (float[1,4,8,8] x) => (float[A,B,C,D] y) <{WEIGHTS}, {NUMBERS}, {BOUNDS}> {{ c = QuantizeLinear(x, s, z) "
        f"d = DequantizeLinear(c, s, z) {middle} q = QuantizeLinear({last}, s, z) y = DequantizeLinear(q, s, z) }}"
    )


def eight_bits(model: ir.Model) -> bool:
    """Whether ORT gives something an 8-bit weight."""
    values = optimized(model, Options("all", threads=1)).graph.initializers.values()
    return any(value.dtype is ir.DataType.INT8 for value in values)


@pytest.mark.parametrize(
    "middle",
    [f"t = {CONV}(d, f)", f"t = {CONV}(d, f, b)", f"p = {CONV}(d, f, b) t = Relu(p)", f"p = {CONV}(d, f) t = Clip(p, low, high)",
     "t = ConvTranspose<pads = [1, 1, 1, 1]>(d, f, b)"],
)  # fmt: skip
def test_a_float_product_keeps_its_weight(middle: str) -> None:
    """ORT gave it an 8-bit weight with one scale, whatever the error."""
    assert_rewrites(GuardFloat(), between(middle), between(f"{middle} g = Max(t)", "g"))
    model = parse(between(middle))
    assert eight_bits(model), "ORT has changed: is the guard still needed?"
    run_pass(GuardFloat(), model)
    assert not eight_bits(model)


@pytest.mark.parametrize("activation", ["", "Relu(p)", "Clip(p, low, high)", "Clip(p, , high)"])
def test_the_fused_form_needs_no_further_node(activation: str) -> None:
    name = activation.partition("(")[0]
    middle = f"p = {CONV}(d, f, b) t = {activation}" if activation else f"t = {CONV}(d, f, b)"
    model = parse(between(middle))
    before = model.clone()
    assert run_pass(GuardFloat(fused=True), model).changed
    assert not run_pass(GuardFloat(fused=True), model).changed
    node = next(node for node in model.graph if node.op_type == "FusedConv")
    assert node.domain == "com.microsoft"
    assert ("activation" in node.attributes) == bool(name)
    assert name not in [n.op_type for n in model.graph]
    assert not eight_bits(model)
    feed = {"x": np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)}
    exact = Options("off", threads=1)
    results = [Session(m, exact).run(feed)[0] for m in (before, model)]
    assert np.array_equal(*results)


@pytest.mark.parametrize(
    "middle",
    [f"n = Neg(d) t = {CONV}(n, f)", f"p = {CONV}(d, f) t = Neg(p)", f"k = {CONV}(d, f) t = Add(k, k)", "t = Relu(d)",
     f"k = Mul(f, s) t = {CONV}(d, k)"],
)  # fmt: skip
def test_products_that_ort_leaves_alone(middle: str) -> None:
    for fused in (False, True):
        assert_refuses(GuardFloat(fused=fused), between(middle))


def test_a_result_that_is_an_output_as_well() -> None:
    text = between(f"p = {CONV}(d, f) t = Relu(p)").replace("y) <", "y, float[E,F,G,H] t) <", 1)
    model = parse(text)
    run_pass(GuardFloat(fused=True), model)
    assert [value.name for value in model.graph.outputs] == ["y", "t"]
    assert sum(node.op_type == "FusedConv" for node in model.graph) == 1
