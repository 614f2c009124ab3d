"""PadChannels: channels of zeros, so that ORT's blocked layout has whole blocks."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from lowering import constant
from rewrites import assert_close, assert_refuses, assert_rewrites, parse, random_feed, run

from passes.pad_channels import PadChannels
from qcompile.graph import io
from qcompile.run.session import Options
from qcompile.step import run_pass
from qcompile.targets.schema import load_target
from qcompile.verify.kernels import optimized

IN = "g (float[1,2,8,8] x) => (float[A,B,C,D] y)"
POOL = "MaxPool<kernel_shape = [2, 2], strides = [2, 2]>"
STEM = f"{constant('w', 3, 2, 1, 1)}, {constant('b', 3)}"
DENSE = constant("v", 2, 3, 1, 1)
DEPTHWISE = f"{constant('k', 3, 1, 3, 3)}, {constant('c', 3)}"
NUMBERS = "float s = {0.05}, uint8 z = {0}, float r = {0.01}, int8 o = {0}"
CODES = f"{NUMBERS}, int8[2,3,1,1] q = {{91, -20, 93, -40, 95, 60}}"


def zeros(text: str, shape: str, place: int, count: int) -> str:
    """A declaration with a new shape, and `count` zeros put in behind each `place` of its numbers."""
    head, _, tail = text.partition("] ")
    name, _, numbers = tail.partition(" = ")
    values = numbers.strip("{}").split(", ")
    rows = [values[i : i + place] for i in range(0, len(values), place)]
    flat = ", ".join(", ".join([*row, *["0"] * count]) for row in rows)
    return f"{head.partition('[')[0]}{shape} {name} = {{{flat}}}"


def test_a_stem() -> None:
    graph = f"{{ a = Conv(x, w, b) p = Relu(a) m = {POOL}(p) y = Conv(m, v) }}"
    wide = ", ".join(
        [zeros(constant("w", 3, 2, 1, 1), "[4,2,1,1]", 6, 2), zeros(constant("b", 3), "[4]", 3, 1),
         zeros(DENSE, "[2,4,1,1]", 3, 1)]
    )  # fmt: skip
    assert_rewrites(PadChannels(4), f"{IN} <{STEM}, {DENSE}> {graph}", f"{IN} <{wide}> {graph}")


@pytest.mark.parametrize(
    "middle",
    [f"p = Relu(a) m = {POOL}(p) y = Conv(m, v)", f"p = Clip(a, s, t) m = {POOL}(p) y = Conv(m, v)",
     f"m = {POOL}(a) d = Conv<group = 3>(m, k, c) e = Relu(d) y = Conv(e, v)", f"m = {POOL}(a) d = Conv<group = 3>(m, k) y = Conv(d, v)",
     f"m = {POOL}(a) d = Conv<group = 3>(m, k, c) p = Conv(d, v) e = Conv(m, l) y = Sub(p, e)",
     f"m = {POOL}(a) n = Max(m) q1 = QuantizeLinear(n, s, z) d = DequantizeLinear(q1, s, z) y = Conv(d, v)",
     f'm = {POOL}(a) y = com.microsoft.FusedConv<activation = "Relu">(m, v)'],
)  # fmt: skip
def test_no_number_changes(middle: str) -> None:
    text = (
        f"{IN} <{STEM}, {DENSE}, {DEPTHWISE}, {constant('l', 2, 3, 3, 3)}, float s = {{0.05}}, float t = {{0.9}}, uint8 z = {{3}}> "
        f"{{ a = Conv(x, w, b) {middle} }}"
    )
    model = parse(text)
    before = model.clone()
    assert run_pass(PadChannels(4), model).changed
    assert io.check(model) is None
    feed = random_feed(before)
    assert_close(run(model, feed), run(before, feed), rtol=1e-6, atol=1e-6)
    for level in ("basic", "all"):
        assert_close(run(model, feed, level), run(before, feed), rtol=1e-4, atol=1e-4)
    again = ir.to_onnx_text(model)
    assert run_pass(PadChannels(4), model).changed == []
    assert ir.to_onnx_text(model) == again


@pytest.mark.parametrize(
    "middle",
    ["o1 = QLinearConv(c1, s, z, q, r, o, s, z) y = DequantizeLinear(o1, s, z)",
     "o1 = QLinearConv<group = 3>(c1, s, z, dw, rr, oo, s, z, bb) o2 = QLinearConv(o1, s, z, q, r, o, s, z) y = DequantizeLinear(o2, s, z)",
     "d = DequantizeLinear(c1, s, z) u = DequantizeLinear(q, r, o) f = Conv(d, u) o1 = QuantizeLinear(f, s, z) y = DequantizeLinear(o1, s, z)"],
)  # fmt: skip
def test_integer_readers(middle: str) -> None:
    dw = ", ".join(str(i % 5) for i in range(27))
    text = (
        f"{IN} <{STEM}, {CODES}, int8[3,1,3,3] dw = {{{dw}}}, float[3] rr = {{0.01, 0.02, 0.03}}, int8[3] oo = {{0, 0, 0}}, "
        f"int32[3] bb = {{5, -6, 7}}> {{ a = Conv(x, w, b) p = Relu(a) m = {POOL}(p) c1 = QuantizeLinear(m, s, z) {middle} }}"
    )
    model = parse(text)
    before = model.clone()
    assert run_pass(PadChannels(4), model).changed
    assert io.check(model) is None
    feed = random_feed(before)
    assert np.array_equal(run(model, feed)[0], run(before, feed)[0])
    assert np.abs(run(before, feed)[0]).max() > 0
    assert run_pass(PadChannels(4), model).changed == []


@pytest.mark.parametrize(
    ("middle", "reason"),
    [(f"m = {POOL}(a) y = Add(m, m)", "read by Add"), (f"y = {POOL}(a)", "are an output"),
     (f"m = {POOL}(a) f = Flatten(m) y = Reshape(f, i)", "read by Flatten"),
     (f"m = {POOL}(a) y = Conv(m, e)", "read by Conv"), (f"m = {POOL}(a) y = Conv<group = 3>(m, g)", "read by Conv"),
     (f"m = {POOL}(a) c1 = QuantizeLinear<axis = 1>(m, h, u) y = DequantizeLinear<axis = 1>(c1, h, u)", "read by QuantizeLinear"),
     (f"m = {POOL}(a) n = Relu(x) y = Conv(n, m)", "read by Conv"),
     ("n = MaxPool<kernel_shape = [2, 2]>(a) m, j = MaxPool<kernel_shape = [2, 2]>(a) y = Conv(m, v)", "read by MaxPool"),
     ("p = Relu(a) y = Conv(p, v)", None)],
)  # fmt: skip
def test_refusals(middle: str, reason: str | None) -> None:
    text = (
        f"{IN} <{STEM}, {DENSE}, {constant('g', 6, 1, 1, 1)}, float[3] h = {{0.1, 0.2, 0.3}}, uint8[3] u = {{0, 0, 0}}, "
        f"int64[2] i = {{1, -1}}, {constant('v2', 2, 3, 1, 1)}> {{ a = Conv(x, w, b) {{MADE}}{middle} }}"
    )
    made = "e = Neg(v2) " if "(m, e)" in middle else ""
    assert_refuses(PadChannels(4), text.replace("{MADE}", made), reason)


def test_too_many_channels() -> None:
    text = f"{IN} <{STEM}, {DENSE}> {{ a = Conv(x, w, b) m = {POOL}(a) y = Conv(m, v) }}"
    assert_refuses(PadChannels(16), text, "3 channels would become 16")
    assert_refuses(PadChannels(3), text)
    assert_refuses(PadChannels(1), text)


def test_ort_pools_in_blocks() -> None:
    """What it is for: no copy of the tensor around the pool."""
    block = load_target("ort-cpu-x64-vnni").channel_block
    wide, narrow = block * 3 // 2, block // 2
    text = (
        f"g (float[1,3,32,32] x) => (float[A,B,C,D] y) <{constant('w', wide, 3, 3, 3)}, {constant('v', narrow, wide, 1, 1)}> "
        f"{{ a = Conv<pads = [1, 1, 1, 1]>(x, w) p = Relu(a) m = {POOL}(p) y = Conv(m, v) }}"
    )
    model = parse(text)

    def copies() -> int:
        found = [node.op_type for node in optimized(model, Options("all", threads=1)).graph]
        return sum(op in ("ReorderInput", "ReorderOutput") for op in found)

    before = copies()
    if before <= 1:
        pytest.skip("ORT has no blocked layout here")
    run_pass(PadChannels(block), model)
    assert copies() == 1 < before
