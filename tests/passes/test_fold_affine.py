import re

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import assert_refuses, assert_rewrites, parse

from passes.fold_affine import FoldAffine

# A 1x1 Conv of one input channel and two output channels: weights and biases are legible.
CONV = "g (float[1,1,2,2] x) => (float[1,2,2,2] y)"
W = "float[2,1,1,1] w = {2, 4}"


@pytest.mark.parametrize(
    ("constant", "op", "w", "b"),
    [
        ("float c = {3}", "Mul(t, c)", "6, 12", None),
        ("float c = {3}", "Mul(c, t)", "6, 12", None),
        ("float[1] c = {3}", "Mul(t, c)", "6, 12", None),
        ("float[1,1,1,1] c = {3}", "Mul(t, c)", "6, 12", None),
        ("float[2,1,1] c = {3, 5}", "Mul(t, c)", "6, 20", None),
        ("float[1,2,1,1] c = {3, 5}", "Mul(c, t)", "6, 20", None),
        ("float[2,1,1] c = {2, 8}", "Div(t, c)", "1, 0.5", None),
        ("float[2,1,1] c = {3, 5}", "Add(t, c)", None, "3, 5"),
        ("float[2,1,1] c = {3, 5}", "Add(c, t)", None, "3, 5"),
        ("float[2,1,1] c = {3, 5}", "Sub(t, c)", None, "-3, -5"),
        ("float[2,1,1] c = {3, 5}", "Sub(c, t)", "-2, -4", "3, 5"),
    ],
)
def test_after_conv(constant: str, op: str, w: str | None, b: str | None) -> None:
    w2 = W if w is None else f"float[2,1,1,1] w = {{{w}}}"
    after = f"<{w2}> {{ t = Conv(x, w) y = Relu(t) }}"
    if b is not None:
        after = f"<{w2}, float[2] b = {{{b}}}> {{ t = Conv(x, w, b) y = Relu(t) }}"
    assert_rewrites(
        FoldAffine(),
        before=f"{CONV} <{W}, {constant}> {{ t = Conv(x, w) u = {op} y = Relu(u) }}",
        after=f"{CONV} {after}",
    )


def test_a_chain_with_a_bias() -> None:
    outcome = assert_rewrites(
        FoldAffine(),
        before=f"""{CONV} <{W}, float[2] b = {{1, 2}}, float[2,1,1] f = {{3, 5}}, float d = {{7}}> {{
            t = Conv(x, w, b) [mul] u = Mul(t, f) [add] v = Add(u, d) y = Relu(v) }}""",
        after=f"""{CONV} <float[2,1,1,1] w = {{6, 20}}, float[2] b = {{10, 17}}> {{
            t = Conv(x, w, b) y = Relu(t) }}""",
    )
    assert outcome.changed == ["mul", "add"]


def test_the_graph_output() -> None:
    assert_rewrites(
        FoldAffine(),
        before=f"{CONV} <{W}, float c = {{3}}> {{ t = Conv(x, w) y = Mul(t, c) }}",
        after=f"{CONV} <float[2,1,1,1] w = {{6, 12}}> {{ y = Conv(x, w) }}",
    )


def test_group_convolution_and_a_missing_bias() -> None:
    assert_rewrites(
        FoldAffine(),
        before="""g (float[1,2,2,2] x) => (float[1,2,2,2] y)
            <float[2,1,1,1] w = {2, 4}, float[2,1,1] c = {3, 5}> {
            t = Conv<group = 2>(x, w, "") u = Sub(t, c) y = Relu(u) }""",
        after="""g (float[1,2,2,2] x) => (float[1,2,2,2] y)
            <float[2,1,1,1] w = {2, 4}, float[2] b = {-3, -5}> {
            t = Conv<group = 2>(x, w, b) y = Relu(t) }""",
    )


@pytest.mark.parametrize("group", [1, 2, 3])
def test_after_conv_transpose(group: int) -> None:
    rng = np.random.default_rng(group)
    out = 2 * group  # weight: (in, out/group, k)
    w = rng.integers(-4, 5, (6, 2, 2)).astype(np.float32)
    f, d = rng.integers(1, 9, out), rng.integers(-9, 9, out)
    spread = f.reshape(group, 2).repeat(6 // group, axis=0)[:, :, None]  # (in, out/group, 1)

    def constants(weight: np.ndarray, **more: np.ndarray) -> str:
        shown = {"w": weight, **more}
        return ", ".join(
            f"float[{','.join(map(str, v.shape))}] {k} = {{{', '.join(map(str, v.reshape(-1)))}}}"
            for k, v in shown.items()
        )

    head = f"g (float[1,6,4] x) => (float[1,{out},5] y)"
    assert_rewrites(
        FoldAffine(),
        before=f"""{head} <{constants(w, f=f[:, None], d=d[:, None])}> {{
            t = ConvTranspose<group = {group}>(x, w) u = Mul(t, f) y = Add(u, d) }}""",
        after=f"""{head} <{constants(w * spread, b=d)}> {{
            y = ConvTranspose<group = {group}>(x, w, b) }}""",
    )


GEMM = "g (float[2,2] x) => (float[2,2] y)"


@pytest.mark.parametrize(
    ("attributes", "bias", "w", "folded"),
    [
        ("", "", "3, 10, 9, 20", "7, 7"),
        ("<transB = 1>", "", "3, 6, 15, 20", "7, 7"),
        ("<alpha = 0.5>", "", "3, 10, 9, 20", "7, 7"),
        ("", "float[2] b = {1, 2}", "3, 10, 9, 20", "10, 17"),
        ("", "float[1,2] b = {1, 2}", "3, 10, 9, 20", "10, 17"),
        ("", "float b = {1}", "3, 10, 9, 20", "10, 12"),
        ("<alpha = 0.5, beta = 2.0>", "float[2] b = {1, 2}", "3, 10, 9, 20", "13, 27"),
        ("<beta = 0.0>", "float[2] b = {1, 2}", "3, 10, 9, 20", "7, 7"),
        ("<beta = 3.0>", "", "3, 10, 9, 20", "7, 7"),
    ],
)
def test_after_gemm(attributes: str, bias: str, w: str, folded: str) -> None:
    constants = "float[2,2] w = {1, 2, 3, 4}, float[2] f = {3, 5}, float[1,2] d = {7, 7}"
    gemm = f"Gemm{attributes}(x, w{', b' if bias else ''})"
    kept = re.sub(r"(, )?beta = [\d.]+", "", attributes).replace("<>", "")
    assert_rewrites(
        FoldAffine(),
        before=f"""{GEMM} <{constants}{", " + bias if bias else ""}> {{
            t = {gemm} u = Mul(t, f) y = Add(u, d) }}""",
        after=f"""{GEMM} <float[2,2] w = {{{w}}}, float[2] b = {{{folded}}}> {{
            y = Gemm{kept}(x, w, b) }}""",
    )


@pytest.mark.parametrize("bias", ["float[2,1] b = {1, 2}", "float[2,2] b = {1, 2, 3, 4}"])
def test_a_gemm_bias_that_varies_along_rows(bias: str) -> None:
    # (M, 1) has as many elements as there are columns: the size alone would mislead.
    text = f"""{GEMM} <float[2,2] w = {{1, 2, 3, 4}}, {bias}, float c = {{2}}> {{
        t = Gemm(x, w, b) y = Mul(t, c) }}"""
    assert_refuses(FoldAffine(), text, "the bias varies along other axes")


SQUARE = "g (float[1,1,2,2] x) => (float[1,2,2,2] y)"


@pytest.mark.parametrize(
    ("constant", "op", "reason"),
    [
        # (C,) runs along the last axis, here as long as the channel axis.
        ("float[2] c = {3, 5}", "Mul(t, c)", "not one number, or one a channel"),
        ("float[1,2] c = {3, 5}", "Add(t, c)", "not one number, or one a channel"),
        ("float[2,1] c = {3, 5}", "Add(t, c)", "not one number, or one a channel"),
        ("float[2,2,1] c = {3, 5, 7, 9}", "Mul(t, c)", "not one number, or one a channel"),
        ("float[1,1,2,1] c = {3, 5}", "Mul(t, c)", "not one number, or one a channel"),
        ("float[1,1,1,1,1] c = {3}", "Mul(t, c)", "not one number, or one a channel"),
        ("float[2,1,1] c = {3, 0}", "Div(t, c)", "it divides by zero"),
        ("float c = {3}", "Div(c, t)", "it divides a constant"),
        ("float c = {3e38}", "Mul(t, c)", "would not be finite"),
        ("float c = {1e-45}", "Div(t, c)", "would not be finite"),
    ],
)
def test_constants_that_are_refused(constant: str, op: str, reason: str) -> None:
    rank = 5 if constant.count(",") == 4 else 4
    head = "g (float[1,1,2,2] x) => (float[1,1,2,2,2] y)" if rank == 5 else SQUARE
    assert_refuses(FoldAffine(), f"{head} <{W}, {constant}> {{ t = Conv(x, w) y = {op} }}", reason)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_constant_that_is_not_finite(number: float) -> None:
    model = parse(f"{CONV} <{W}, float c = {{1}}> {{ t = Conv(x, w) y = Mul(t, c) }}")
    model.graph.initializers["c"].const_value = ir.tensor(np.float32(number))
    assert_refuses(FoldAffine(), model, "would not be finite")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{CONV} <{W}, float c = {{3}}> {{ t = Conv(x, w) u = Mul(t, c) y = Add(t, u) }}", "is read elsewhere"),
        (
            f"g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] t) <{W}, float c = {{3}}> "
            "{ t = Conv(x, w) y = Mul(t, c) }",
            "is read elsewhere",
        ),
        (
            "g (float[1,1,2,2] x, float[2,1,1,1] w) => (float[1,2,2,2] y) <float c = {3}> "
            "{ t = Conv(x, w) y = Mul(t, c) }",
            "the weight is not constant",
        ),
        (
            f"g (float[1,1,2,2] x, float[2] b) => (float[1,2,2,2] y) <{W}, float c = {{3}}> "
            "{ t = Conv(x, w, b) y = Mul(t, c) }",
            "the bias is not constant",
        ),
        (
            f"""g (float[1,1,2,2] x, bool p) => (float[1,2,2,2] y) <{W}, float c = {{3}}> {{
            t = Conv(x, w)
            y = If(p) <then_branch = a () => (float[1,2,2,2] u) {{ u = Mul(t, c) }},
                       else_branch = b () => (float[1,2,2,2] v) {{ k = Constant<value_float = 1.0>()
                                                                 v = Expand(k, s) }}> }}""".replace(
                f"<{W}", f"<int64[4] s = {{1, 2, 2, 2}}, {W}"
            ),
            "is read elsewhere",
        ),
    ],
)  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    assert_refuses(FoldAffine(), text, reason)


@pytest.mark.parametrize(
    "text",
    [
        f"{CONV} <{W}> {{ t = Conv(x, w) y = Mul(t, t) }}",
        "g (float[2,2] x) => (float[2,2] y) <float c = {3}> { t = Relu(x) y = Mul(t, c) }",
        "g (float[2,2] x) => (float[2,2] y) <float c = {3}> { y = Mul(x, c) }",
        f"g (float[1,1,2,2] x, float c) => (float[1,2,2,2] y) <{W}> {{ t = Conv(x, w) y = Mul(t, c) }}",
    ],
)
def test_what_is_no_affine_map_of_a_linear_operator(text: str) -> None:
    assert_refuses(FoldAffine(), text)


def test_the_broadcasting_of_opset_6() -> None:
    model = parse(f"{CONV} <{W}, float[2] c = {{3, 5}}> {{ t = Conv(x, w) y = Mul<axis = 1, broadcast = 1>(t, c) }}", 6)  # fmt: skip
    assert_refuses(FoldAffine(), model, "in the manner of opset 6")


def test_a_weight_that_two_nodes_share_is_copied() -> None:
    assert_rewrites(
        FoldAffine(),
        before=f"""{CONV} <{W}, float c = {{3}}> {{
            t = Conv(x, w) u = Mul(t, c) v = Conv(x, w) y = Sub(u, v) }}""",
        after=f"""{CONV} <float[2,1,1,1] w1 = {{6, 12}}, {W}> {{
            t = Conv(x, w1) v = Conv(x, w) y = Sub(t, v) }}""",
    )


def test_half_precision_stays_half() -> None:
    # The text form writes float16 as its bits.
    w, c, d = ("float16[2,1,1,1] w = {16384, 17408}", "float16 c = {16896}", "float16 d = {15360}")
    head = "g (float16[1,1,2,2] x) => (float16[1,2,2,2] y)"
    assert_rewrites(
        FoldAffine(),
        before=f"{head} <{w}, {c}, {d}> {{ t = Conv(x, w) u = Mul(t, c) y = Add(u, d) }}",
        after=f"{head} <float16[2,1,1,1] w = {{17920, 18944}}, float16[2] b = {{15360, 15360}}> {{ y = Conv(x, w, b) }}",
        rtol=5e-3,
        atol=5e-3,
    )
