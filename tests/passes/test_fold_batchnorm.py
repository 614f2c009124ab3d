import numpy as np
import onnx_ir as ir
import pytest
from rewrites import assert_refuses, assert_rewrites, parse

from passes.fold_affine import FoldAffine
from passes.fold_batchnorm import FoldBatchnorm

# With epsilon 0: f = gamma / sqrt(var) = 3, 10 and g = beta - mean * f = 4 - 3, 5 - 20 = 1, -15.
STATS = "float[2] gamma = {6, 20}, float[2] beta = {4, 5}, float[2] mean = {1, 2}, float[2] var = {4, 4}"
BN = "BatchNormalization<epsilon = 0.0>(t, gamma, beta, mean, var)"
HEAD = "g (float[1,1,2,2] x) => (float[1,2,2,2] y)"
W = "float[2,1,1,1] w = {2, 4}"


def test_after_conv() -> None:
    outcome = assert_rewrites(
        FoldBatchnorm(),
        before=f"{HEAD} <{W}, {STATS}> {{ t = Conv(x, w) [bn] u = {BN} y = Relu(u) }}",
        after=f"""{HEAD} <float[2,1,1,1] w = {{6, 40}}, float[2] b = {{1, -15}}> {{
            t = Conv(x, w, b) y = Relu(t) }}""",
    )
    assert outcome.changed == ["bn"]


def test_after_conv_with_a_bias_and_as_output() -> None:
    assert_rewrites(
        FoldBatchnorm(),
        before=f"{HEAD} <{W}, {STATS}, float[2] b = {{1, 2}}> {{ t = Conv(x, w, b) y = {BN} }}",
        after=f"""{HEAD} <float[2,1,1,1] w = {{6, 40}}, float[2] b = {{4, 5}}> {{
            y = Conv(x, w, b) }}""",
    )


def test_as_wide_as_it_has_channels() -> None:
    # The statistics are (C,), and mean the channel; a constant of this shape would mean the width.
    assert_rewrites(
        FoldBatchnorm(),
        before=f"{HEAD} <{W}, {STATS}> {{ t = Conv(x, w) y = {BN} }}",
        after=f"{HEAD} <float[2,1,1,1] w = {{6, 40}}, float[2] b = {{1, -15}}> {{ y = Conv(x, w, b) }}",
    )


def test_after_gemm() -> None:
    assert_rewrites(
        FoldBatchnorm(),
        before=f"""g (float[3,1] x) => (float[3,2] y) <float[2,1] w = {{2, 4}}, {STATS}> {{
            t = Gemm<transB = 1>(x, w) y = {BN} }}""",
        after="""g (float[3,1] x) => (float[3,2] y) <float[2,1] w = {6, 40}, float[2] b = {1, -15}> {
            y = Gemm<transB = 1>(x, w, b) }""",
    )


def test_after_conv_transpose_with_groups() -> None:
    assert_rewrites(
        FoldBatchnorm(),
        before=f"""g (float[1,2,3] x) => (float[1,2,3] y) <float[2,1,1] w = {{2, 4}}, {STATS}> {{
            t = ConvTranspose<group = 2>(x, w) y = {BN} }}""",
        after="""g (float[1,2,3] x) => (float[1,2,3] y)
            <float[2,1,1] w = {6, 40}, float[2] b = {1, -15}> {
            y = ConvTranspose<group = 2>(x, w, b) }""",
    )


@pytest.mark.parametrize(
    ("shape", "constant"),
    [("1,2,2,2", "2,1,1"), ("1,2,5", "2,1"), ("4,2", "2"), ("1,2,2,1,3", "2,1,1,1")],
)
def test_elsewhere_it_becomes_mul_and_add(shape: str, constant: str) -> None:
    head = f"g (float[{shape}] x) => (float[{shape}] y)"
    assert_rewrites(
        FoldBatchnorm(),
        before=f"{head} <{STATS}> {{ t = Relu(x) y = {BN} }}",
        after=f"""{head} <float[{constant}] f = {{3, 10}}, float[{constant}] g = {{1, -15}}> {{
            t = Relu(x) u = Mul(t, f) y = Add(u, g) }}""",
    )


def test_a_convolution_that_is_read_elsewhere() -> None:
    assert_rewrites(
        FoldBatchnorm(),
        before=f"{HEAD} <{W}, {STATS}> {{ t = Conv(x, w) u = {BN} y = Sub(u, t) }}",
        after=f"""{HEAD} <{W}, float[2,1,1] f = {{3, 10}}, float[2,1,1] g = {{1, -15}}> {{
            t = Conv(x, w) v = Mul(t, f) u = Add(v, g) y = Sub(u, t) }}""",
    )


def test_before_the_convolution_after_an_unknown_shape() -> None:
    # Pre-activation networks: the rank follows from a convolution further up.
    head = "g (float[1,1,2,2] x) => (float[1,2,2,2] y)"
    assert_rewrites(
        FoldBatchnorm(),
        before=f"{head} <{W}, {STATS}> {{ s = Conv(x, w) r = Sigmoid(s) t = Concat<axis = 0>(r) y = {BN} }}",
        after=f"""{head} <{W}, float[2,1,1] f = {{3, 10}}, float[2,1,1] g = {{1, -15}}> {{
            s = Conv(x, w) r = Sigmoid(s) t = Concat<axis = 0>(r) u = Mul(t, f) y = Add(u, g) }}""",
    )


def test_half_precision_with_wide_statistics() -> None:
    text = f"""g (float16[1,2,2] x) => (float16[1,2,2] y) <{STATS}> {{ t = Relu(x) y = {BN} }}"""
    model = parse(text)
    FoldBatchnorm().apply(model)
    kinds = [v.dtype for v in model.graph.initializers.values() if v.uses()]
    assert kinds == [ir.DataType.FLOAT16] * 2


def test_its_halves_fold_into_a_gemm_later() -> None:
    model = parse(
        f"""g (float[3,1] x) => (float[3,2] y) <float[1,2] w = {{2, 4}}, {STATS}> {{
            t = Gemm(x, w) u = {BN} y = Relu(u) }}"""
    )
    FoldBatchnorm().apply(model)
    assert FoldAffine().apply(model).changed == []
    assert [node.op_type for node in model.graph] == ["Gemm", "Relu"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            f"{HEAD} <{W}, {STATS}> {{ t = Conv(x, w) "
            "y, a, b = BatchNormalization<training_mode = 1>(t, gamma, beta, mean, var) }",
            "training mode",
        ),
        (
            "g (float[1,1,2,2] x, float[2] mean) => (float[1,2,2,2] y) "
            f"<{W}, {STATS.replace('float[2] mean = {1, 2}, ', '')}> {{ t = Conv(x, w) y = {BN} }}",
            "its statistics are not constant",
        ),
    ],
)
def test_refusals(body: str, reason: str) -> None:
    assert_refuses(FoldBatchnorm(), body, reason)


def test_an_unknown_rank() -> None:
    text = f"""g (float[1,2,2,2] x, int64[4] s) => (float[1,2,2,2] y) <{STATS}> {{
        t = Reshape(x, s) u = {BN} r = Shape(u) y = Reshape(u, r) }}"""
    assert_refuses(FoldBatchnorm(), text, "the rank of its input is unknown")


def test_running_statistics_that_are_read() -> None:
    text = f"""g (float[1,2,2,2] x) => (float[1,2,2,2] y, float[2] m) <{STATS}> {{
        t = Relu(x) y, m, v, p, q = BatchNormalization(t, gamma, beta, mean, var) }}"""
    assert_refuses(FoldBatchnorm(), parse(text, opset=9), "its running statistics are read")


def test_statistics_of_every_element() -> None:
    model = parse(f"{HEAD} <{W}, {STATS}> {{ t = Conv(x, w) y = {BN} }}", opset=8)
    for name in ("gamma", "beta", "mean", "var"):
        model.graph.initializers[name].const_value = ir.tensor(np.ones((2, 2, 2), np.float32))
    assert_refuses(FoldBatchnorm(), model, "its statistics are not per channel")


def test_a_variance_of_zero() -> None:
    model = parse(f"{HEAD} <{W}, {STATS}> {{ t = Conv(x, w) y = {BN} }}")
    model.graph.initializers["var"].const_value = ir.tensor(np.array([4, 0], np.float32))
    assert_refuses(FoldBatchnorm(), model, "factors that are not finite")
