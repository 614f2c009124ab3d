"""PoolToConv: average pooling as a depthwise convolution, zero padding as part of a convolution."""

from __future__ import annotations

import numpy as np
import pytest
from lowering import constant
from rewrites import assert_close, assert_refuses, assert_rewrites, parse, random_feed, run

from passes.pool_to_conv import PoolToConv
from qcompile.step import run_pass

IN = "g (float[N,2,8,8] x) => (float[N,2,H,W] y)"
QUARTERS = "float[2,1,2,2] w = {0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25}"


@pytest.mark.parametrize(
    "attributes",
    ["kernel_shape = [2, 2]", "kernel_shape = [2, 2], strides = [2, 2]", "kernel_shape = [2, 2], strides = [1, 2], pads = [0, 0, 0, 0]",
     "kernel_shape = [2, 2], pads = [1, 0, 0, 1], count_include_pad = 1"],
)  # fmt: skip
def test_average_pool(attributes: str) -> None:
    kept = attributes.replace(", count_include_pad = 1", "")
    assert_rewrites(
        PoolToConv(),
        f"{IN} {{ y = AveragePool<{attributes}>(x) }}",
        f"{IN} <{QUARTERS}> {{ y = Conv<group = 2, {kept}>(x, w) }}",
    )


def test_kernels_that_are_not_square() -> None:
    model = parse(f"{IN} {{ y = AveragePool<kernel_shape = [3, 5], strides = [2, 1]>(x) }}")
    before = model.clone()
    assert run_pass(PoolToConv(), model).changed
    feed = random_feed(model)
    assert_close(run(model, feed), run(before, feed))


def test_dilations() -> None:
    assert_rewrites(
        PoolToConv(),
        f"{IN} {{ y = AveragePool<kernel_shape = [2, 2], dilations = [2, 3]>(x) }}",
        f"{IN} <{QUARTERS}> {{ y = Conv<group = 2, kernel_shape = [2, 2], dilations = [2, 3]>(x, w) }}",
        opset=19,
    )


POOL = "AveragePool<kernel_shape = [2, 2]>"


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [("kernel_shape = [2, 2], pads = [1, 1, 1, 1]", "its borders average fewer values"),
     ("kernel_shape = [2, 2], ceil_mode = 1", "auto_pad or ceil_mode"),
     ('kernel_shape = [2, 2], auto_pad = "SAME_UPPER"', "auto_pad or ceil_mode")],
)  # fmt: skip
def test_other_averages(attributes: str, reason: str) -> None:
    assert_refuses(PoolToConv(), f"{IN} {{ y = AveragePool<{attributes}>(x) }}", reason)


def test_other_ranks_and_types() -> None:
    line = "g (float[N,2,8] x) => (float[N,2,W] y) { y = AveragePool<kernel_shape = [2]>(x) }"
    assert_refuses(PoolToConv(), line, "")
    half = "g (float16[N,2,8,8] x) => (float16[N,2,H,W] y) { y = AveragePool<kernel_shape = [2, 2]>(x) }"
    assert_refuses(PoolToConv(), half, "its type is not known to be float32")


# ---- the number of channels

K = constant("k", 3, 2, 1, 1)
OPEN = "g (float[N,2,A,B] x, float[1,3,1,1] s, float[N,C,A,B] u) => (float[N,D,H,W] y)"
SIZES = "int64[8] p = {0, 0, 1, 1, 0, 0, 1, 1}, int64[8] q = {0, 1, 0, 0, 0, 0, 0, 0}, float[4] r = {1, 1, 2, 2}, float[4] t = {1, 2, 1, 1}, float two = {2}"


@pytest.mark.parametrize(
    "nodes",
    ["c = Conv(x, k)", "d = Conv(x, k) c = Relu(d)", "d = Conv(x, k) e = Sigmoid(d) c = Mul(d, e)", "d = Conv(x, k) c = Mul(d, two)",
     "d = Conv(x, k) c = Pad(d, p)", 'd = Conv(x, k) c = Resize(d, "", r)', "d = Conv(x, k) c = Mul(s, d)"],
)  # fmt: skip
def test_three_channels(nodes: str) -> None:
    model = parse(f"{OPEN} <{K}, {SIZES}> {{ {nodes} y = {POOL}(c) }}")
    before = model.clone()
    assert run_pass(PoolToConv(), model).changed
    (conv,) = (
        node for node in model.graph if node.op_type == "Conv" and "group" in node.attributes
    )
    weight = conv.inputs[1]
    assert weight is not None and weight.const_value is not None
    assert list(weight.const_value.shape) == [3, 1, 2, 2]
    feed = random_feed(
        model,
        given={"x": np.ones((2, 2, 6, 6), np.float32), "u": np.ones((2, 3, 6, 6), np.float32)},
    )
    assert_close(run(model, feed), run(before, feed))


@pytest.mark.parametrize(
    "nodes",
    ["c = Neg(u)", "d = Conv(x, k) c = Pad(d, q)", 'd = Conv(x, k) c = Resize(d, "", t)', "d = Conv(x, k) c = Concat<axis = 1>(d, d)",
     "d = Conv(x, k) c = Add(d, u)"],
)  # fmt: skip
def test_channels_that_are_not_known(nodes: str) -> None:
    """Padded, enlarged or joined along the channels; of unknown operands."""
    model = parse(f"{OPEN} <{K}, {SIZES}> {{ {nodes} y = {POOL}(c) }}")
    outcome = run_pass(PoolToConv(), model)
    assert outcome.changed == []
    assert list(outcome.skipped.values())[-1] in (
        "its channels are not known",
        "its type is not known to be float32",
    )


# ---- padding

W = constant("w", 3, 2, 3, 3)
HEAD = "g (float[N,2,8,8] x) => (float[N,3,H,W] y)"


def padded(amounts: str, pad: str = "Pad(x, a)", conv: str = "Conv(p, w)", more: str = "") -> str:
    return f"{HEAD} <{W}, int64[8] a = {{{amounts}}}{more}> {{ p = {pad} y = {conv} }}"


@pytest.mark.parametrize(
    ("amounts", "conv", "pads"),
    [("0, 0, 1, 2, 0, 0, 3, 4", "Conv(p, w)", [1, 2, 3, 4]),
     ("0, 0, 1, 2, 0, 0, 3, 4", "Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(p, w)", [2, 3, 4, 5]),
     ("0, 0, 1, 1, 0, 0, 1, 1", 'Conv<auto_pad = "VALID">(p, w)', [1, 1, 1, 1]),
     ("0, 0, 0, 1, 0, 0, 0, 0", 'Conv<auto_pad = "NOTSET">(p, w)', [0, 1, 0, 0])],
)  # fmt: skip
def test_zero_padding(amounts: str, conv: str, pads: list[int]) -> None:
    strides = "strides = [2, 2], " if "strides" in conv else ""
    assert_rewrites(
        PoolToConv(),
        padded(amounts, conv=conv),
        f"{HEAD} <{W}> {{ y = Conv<{strides}pads = {pads}>(x, w) }}",
    )


def test_zero_padding_with_a_value() -> None:
    assert_rewrites(
        PoolToConv(), padded("0, 0, 1, 1, 0, 0, 1, 1", "Pad(x, a, v)", more=", float v = {0}"),
        f"{HEAD} <{W}> {{ y = Conv<pads = [1, 1, 1, 1]>(x, w) }}",
    )  # fmt: skip


ONES = "0, 0, 1, 1, 0, 0, 1, 1"


@pytest.mark.parametrize(
    "text",
    [padded(ONES, "Pad(x, a, v)", more=", float v = {1}"), padded(ONES, 'Pad<mode = "reflect">(x, a)'), padded(ONES, 'Pad<mode = "edge">(x, a)'),
     padded("0, 0, -1, 0, 0, 0, 1, 1"), padded("1, 0, 1, 1, 0, 0, 1, 1"), padded(ONES, conv='Conv<auto_pad = "SAME_UPPER">(p, w)'),
     padded(ONES, conv="Relu(p)").replace("float[N,3,H,W]", "float[N,2,H,W]"),
     padded(ONES).replace("=> (float[N,3,H,W] y)", "=> (float[N,3,H,W] y, float[N,2,I,J] p)"),
     padded(ONES, conv="Conv(p, w) z = Neg(p)").replace("=> (float[N,3,H,W] y)", "=> (float[N,3,H,W] y, float[N,2,I,J] z)"),
     padded(ONES, "Pad(x, n)", more=", int64[8] m = {0, 0, 1, 1, 0, 0, 1, 1}").replace("{ p =", "{ n = Neg(m) p =")],
    ids=["another value", "reflect", "edge", "crop", "batch", "auto_pad", "no Conv", "an output", "two readers", "computed"],
)  # fmt: skip
def test_padding_that_stays(text: str) -> None:
    assert_refuses(PoolToConv(), text)


def test_padding_of_an_axis_list_stays() -> None:
    text = f'{HEAD} <{W}, int64[4] a = {{1, 1, 1, 1}}, int64[2] axes = {{2, 3}}> {{ p = Pad(x, a, "", axes) y = Conv(p, w) }}'
    assert_refuses(PoolToConv(), text, opset=18)


@pytest.mark.parametrize(("value", "changed"), [(0.0, True), (1.0, False)])
def test_padding_before_opset_11(value: float, changed: bool) -> None:
    model = parse(
        f"{HEAD} <{W}> {{ p = Pad<pads = [0, 0, 1, 1, 0, 0, 1, 1], value = {value}>(x) y = Conv(p, w) }}",
        opset=10,
    )
    before = model.clone()
    assert bool(run_pass(PoolToConv(), model).changed) == changed
    feed = random_feed(before)
    assert_close(run(model, feed), run(before, feed))


def test_a_pool_behind_padding_and_padding_behind_it() -> None:
    """Both at once: the pool becomes a Conv that takes the padding in."""
    model = parse(f"{IN} <int64[8] a = {{{ONES}}}> {{ p = Pad(x, a) y = {POOL}(p) }}")
    before = model.clone()
    assert len(run_pass(PoolToConv(), model).changed) == 2
    assert [node.op_type for node in model.graph] == ["Conv"]
    feed = random_feed(before)
    assert_close(run(model, feed), run(before, feed))
