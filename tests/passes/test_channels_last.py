"""ChannelsLast: integer regions in the layout of their kernels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from lowering import compiled, constant, op_types
from rewrites import assert_same_interface, parse, random_feed, run

from passes.channels_last import ChannelsLast
from qcompile.graph import io
from qcompile.run.probe import probe
from qcompile.run.session import Options
from qcompile.step import Outcome, run_pass
from qcompile.verify.kernels import optimized

SHAPE = "1,4,6,8"
IN = f"g (uint8[{SHAPE}] x_q) => (uint8[A,B,C,D] y_q)"
CODES = ", ".join(str(i % 23 - 11) for i in range(144))
NUMBERS = f"float s = {{0.1}}, uint8 z = {{128}}, float r = {{0.01}}, int8 o = {{0}}, int8[4,4,3,3] k = {{{CODES}}}"
BLOCK = "QLinearConv<pads = [1, 1, 1, 1]>({}, s, z, k, r, o, s, z)"
ADD = "com.microsoft.QLinearAdd({}, s, z, {}, s, z, s, z)"


def conv(x: str) -> str:
    return BLOCK.format(x)


def add(a: str, b: str) -> str:
    return ADD.format(a, b)


def text(body: str, head: str = IN, more: str = "") -> str:
    return f"{head} <{NUMBERS}{more}> {{ {body} }}"


def lowered(model: ir.Model) -> Outcome:
    facts = dict(probe(model, random_feed(model)))
    facts |= {name.removesuffix("_q"): fact for name, fact in facts.items()}
    return run_pass(ChannelsLast(facts), model)


def turns(model: ir.Model) -> int:
    return op_types(model).count("Transpose")


RESIDUAL = f"a_q = {conv('x_q')} b_q = {conv('a_q')} c_q = {add('b_q', 'x_q')} d_q = {conv('c_q')} y_q = {add('d_q', 'c_q')}"


@pytest.mark.parametrize(
    ("body", "convs", "count"),
    [
        (RESIDUAL, 3, 2),
        (f"l_q = com.microsoft.QLinearLeakyRelu<alpha = 0.5>(x_q, s, z, s, z) {RESIDUAL.replace('x_q', 'l_q')}", 3, 2),
        (f"w_q = com.microsoft.QLinearSigmoid(x_q, s, z, s, z) {RESIDUAL.replace('x_q', 'w_q')}", 3, 2),
        # what is read in both layouts is turned once
        (f"{RESIDUAL.replace('y_q', 'e_q')} m_q = MaxPool<kernel_shape = [1, 1]>(e_q) y_q = {add('m_q', 'e_q')}", 3, 2),
        (f"{RESIDUAL.replace('y_q', 'e_q')} m_q = MaxPool<kernel_shape = [1, 1]>(e_q) n_q = {conv('e_q')} y_q = {add('m_q', 'n_q')}", 4, 3),
    ],
)  # fmt: skip
def test_regions(body: str, convs: int, count: int) -> None:
    model = parse(text(body))
    before = model.clone()
    outcome = lowered(model)
    assert len(outcome.changed) == convs
    model.graph.sort()
    assert io.check(model) is None
    assert_same_interface(before, model)
    assert turns(model) == count
    found = [node for node in model.graph if node.op_type == "QLinearConv"]
    assert {node.domain for node in found} == {"com.microsoft"}
    for seed in range(3):
        feed = random_feed(before, seed)
        feed["x_q"] = (
            np.random.default_rng(seed).integers(0, 256, feed["x_q"].shape).astype(np.uint8)
        )
        for level in ("off", "all"):
            for got, wanted in zip(run(model, feed, level), run(before, feed), strict=True):
                assert np.array_equal(got, wanted)
    again = ir.to_onnx_text(model)
    assert lowered(model).changed == []
    assert ir.to_onnx_text(model) == again


@pytest.mark.parametrize(
    "body",
    [
        f"a_q = {conv('x_q')} y_q = {conv('a_q')}",  # ORT does as well
        f"a_q = {conv('x_q')} b_q = {conv('a_q')} y_q = {add('a_q', 'b_q')}",
        f"a_q = {conv('x_q')} b_q = MaxPool<kernel_shape = [1, 1]>(a_q) y_q = {add('b_q', 'x_q')}",  # nothing near
        f"y_q = {add('x_q', 'x_q')}",
        f"a_q = {conv('x_q')} y_q = com.microsoft.QLinearMul(a_q, s, z, gate, s, z, s, z)",
    ],
)
def test_what_stays(body: str) -> None:
    model = parse(text(body, more=", uint8[1,4,1,1] gate = {1, 2, 3, 4}"))
    before = ir.to_onnx_text(model)
    assert lowered(model).changed == []
    assert ir.to_onnx_text(model) == before


def test_images_of_another_shape() -> None:
    """A gate of one number a channel would not meet its channel."""
    head = f"g (uint8[{SHAPE}] x_q, uint8[1,4,1,1] w_q) => (uint8[A,B,C,D] y_q)"
    model = parse(
        text(
            f"a_q = {conv('x_q')} y_q = com.microsoft.QLinearMul(a_q, s, z, w_q, s, z, s, z)", head
        )
    )
    assert lowered(model).changed == []


def test_an_output_between() -> None:
    head = f"g (uint8[{SHAPE}] x_q) => (uint8[A,B,C,D] y_q, uint8[E,F,G,H] c_q)"
    model = parse(text(RESIDUAL, head))
    before = model.clone()
    assert lowered(model).changed
    model.graph.sort()
    assert_same_interface(before, model)
    feed = random_feed(before)
    for got, wanted in zip(run(model, feed), run(before, feed), strict=True):
        assert np.array_equal(got, wanted)


def test_a_stage_behind_a_float_stem() -> None:
    """What it is for: ORT alone turns tensors back and forth around each Add."""
    blocks, last = "", "r"
    for i in range(3):
        blocks += (
            f"[one{i}] a{i} = Conv<pads = [1, 1, 1, 1]>({last}, k{i}) b{i} = Relu(a{i}) [two{i}] c{i} = Conv<pads = [1, 1, 1, 1]>(b{i}, l{i}) "
            f"[add{i}] d{i} = Add(c{i}, {last}) e{i} = Relu(d{i}) "
        )
        last = f"e{i}"
    weights = ", ".join(
        constant(f"{n}{i}", 16, 16, 3, 3, scale=0.1) for i in range(3) for n in "kl"
    )
    made = compiled(
        f"g (float[1,3,32,32] x) => (float[1,16,32,32] y) <{constant('w', 16, 3, 3, 3)}, {weights}> "
        f"{{ [stem] s = Conv<pads = [1, 1, 1, 1]>(x, w) r = Relu(s) {blocks} y = Neg({last}) }}",
        keep={"stem": "so"},
    )  # fmt: skip
    options = Options("all", threads=1)
    fused, portable = (turns(optimized(model, options)) for model in (made.fused, made.qdq))
    assert fused <= 2 < portable
