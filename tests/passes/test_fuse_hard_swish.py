import numpy as np
import pytest
from rewrites import assert_refuses, assert_rewrites, parse

from passes.fuse_hard_swish import FuseHardSwish

HEAD = "g (float[N,4] x) => (float[N,4] y)"
C = "float zero = {0}, float three = {3}, float six = {6}, float sixth = {0.16666667}, float one = {1}"
GATE = "HardSigmoid<alpha = 0.16666667, beta = 0.5>(x)"


@pytest.mark.parametrize(
    "tail",
    [
        "m = Mul(x, c) y = Div(m, six)",
        "m = Mul(c, x) y = Div(m, six)",
        "d = Div(c, six) y = Mul(x, d)",
        "d = Div(c, six) y = Mul(d, x)",
        "m = Mul(x, c) y = Mul(m, sixth)",
        "d = Mul(sixth, c) y = Mul(x, d)",
    ],
)
@pytest.mark.parametrize("shift", ["Add(x, three)", "Add(three, x)"])
def test_hard_swish(shift: str, tail: str) -> None:
    assert_rewrites(
        FuseHardSwish(),
        before=f"{HEAD} <{C}> {{ a = {shift} c = Clip(a, zero, six) {tail} }}",
        after=f"{HEAD} {{ g = {GATE} y = Mul(x, g) }}",
    )


@pytest.mark.parametrize("division", ["Div(c, six)", "Mul(c, sixth)"])
def test_hard_sigmoid(division: str) -> None:
    assert_rewrites(
        FuseHardSwish(),
        before=f"{HEAD} <{C}> {{ a = Add(x, three) c = Clip(a, zero, six) d = {division} y = Neg(d) }}",
        after=f"{HEAD} {{ d = {GATE} y = Neg(d) }}",
    )


def test_hard_sigmoid_that_two_nodes_read() -> None:
    assert_rewrites(
        FuseHardSwish(),
        before=f"""{HEAD} <{C}> {{
            a = Add(x, three) c = Clip(a, zero, six) d = Div(c, six) m = Mul(x, d) y = Add(m, d) }}""",
        after=f"{HEAD} {{ d = {GATE} m = Mul(x, d) y = Add(m, d) }}",
    )


def test_other_numbers() -> None:
    assert_rewrites(
        FuseHardSwish(),
        before=f"""{HEAD} <float zero = {{0}}, float one = {{1}}, float[1] four = {{4}}> {{
            a = Add(x, one) c = Clip(a, zero, four) d = Div(c, four) y = Neg(d) }}""".replace(
            "float[1] four", "float four"
        ),
        after=f"{HEAD} {{ d = HardSigmoid<alpha = 0.25, beta = 0.25>(x) y = Neg(d) }}",
    )


def test_numbers_with_dimensions() -> None:
    assert_rewrites(
        FuseHardSwish(),
        before=f"""{HEAD} <float zero = {{0}}, float[1,1] three = {{3}}, float six = {{6}}, float[1] v = {{6}}> {{
            a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, v) }}""",
        after=f"{HEAD} {{ g = {GATE} y = Mul(x, g) }}",
    )


def test_the_clip_of_opset_6() -> None:
    assert_rewrites(
        FuseHardSwish(),
        before=f"""{HEAD} <{C}> {{
            a = Add(x, three) c = Clip<min = 0.0, max = 6.0>(a) m = Mul(x, c) y = Div(m, six) }}""",
        after=f"{HEAD} {{ g = {GATE} y = Mul(x, g) }}",
        opset=10,
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, three)", "not divided"),
        ("a = Add(x, three) c = Clip(a, zero, six) y = Mul(x, c)", "not divided"),
        ("a = Add(x, three) c = Clip(a, zero, six) y = Div(six, c)", "not divided"),
        ("a = Add(x, three) c = Clip(a, zero, six) d = Div(c, six) y = Add(d, c)", "is read elsewhere"),
        ("a = Add(x, three) c = Clip(a, zero, six) d = Div(c, six) y = Add(d, a)", "the sum is read elsewhere"),
        ("a = Add(x, zero) c = Clip(a, zero, six) y = Div(c, six)", "not inside the bounds"),
        ("a = Add(x, six) c = Clip(a, zero, six) y = Div(c, six)", "not inside the bounds"),
    ],
)  # fmt: skip
def test_refusals(body: str, reason: str) -> None:
    assert_refuses(FuseHardSwish(), f"{HEAD} <{C}> {{ {body} }}", reason)


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, three) c = Clip(a, , six) y = Div(c, six)",
        "a = Add(x, three) c = Clip(a, zero) y = Div(c, six)",
        "a = Add(x, three) c = Clip(a) y = Div(c, six)",
        "a = Add(x, three) c = Clip(a, one, six) y = Div(c, six)",
        "a = Sub(x, three) c = Clip(a, zero, six) y = Div(c, six)",
        "a = Add(x, x) c = Clip(a, zero, six) y = Div(c, six)",
        "c = Clip(x, zero, six) y = Div(c, six)",
    ],
)
def test_other_clips(body: str) -> None:
    assert_refuses(FuseHardSwish(), f"{HEAD} <{C}> {{ {body} }}")


def test_a_sum_that_raises_the_rank() -> None:
    text = """g (float[4] x) => (float[1,4] y) <float zero = {0}, float[1,1] three = {3}, float six = {6}> {
        a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six) }"""
    assert_refuses(FuseHardSwish(), text)


@pytest.mark.parametrize("kind", ["double", "int32"])
def test_other_types(kind: str) -> None:
    text = f"""g ({kind}[N,4] x) => ({kind}[N,4] y) <{kind} zero = {{0}}, {kind} three = {{3}}, {kind} six = {{6}}> {{
        a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six) }}"""
    assert_refuses(FuseHardSwish(), text, "takes float32")


def test_a_division_inside_a_body() -> None:
    text = f"""g (float[N,4] x, bool p) => (float[N,4] y) <{C}> {{ a = Add(x, three) c = Clip(a, zero, six)
        y = If(p) <then_branch = t () => (float[N,4] u) {{ u = Div(c, six) }},
                   else_branch = e () => (float[N,4] v) {{ v = Neg(x) }}> }}"""
    assert_refuses(FuseHardSwish(), text, "not divided")


def test_a_sum_outside_of_the_body() -> None:
    text = f"""g (float[N,4] x, bool p) => (float[N,4] y) <{C}> {{ a = Add(x, three)
        y = If(p) <then_branch = t () => (float[N,4] u) {{ c = Clip(a, zero, six) u = Div(c, six) }},
                   else_branch = e () => (float[N,4] v) {{ v = Neg(x) }}> }}"""
    assert_refuses(FuseHardSwish(), text, "the sum is read elsewhere")


def test_all_of_it_inside_a_body() -> None:
    text = """g (float[N,4] x, bool p) => (float[N,4] y) CONSTANTS {
        y = If(p) <then_branch = t () => (float[N,4] u) { BODY },
                   else_branch = e () => (float[N,4] v) { v = Neg(x) }> }"""
    assert_rewrites(
        FuseHardSwish(),
        before=text.replace("CONSTANTS", f"<{C}>").replace(
            "BODY", "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) u = Div(m, six)"
        ),
        after=text.replace("CONSTANTS", "").replace("BODY", f"g = {GATE} u = Mul(x, g)"),
        feed={"p": np.array(True)},
    )


def test_without_a_declared_type_the_constants_tell() -> None:
    model = parse(
        f"""{HEAD} <{C}> {{ s = Sigmoid(x) a = Add(s, three) c = Clip(a, zero, six)
            d = Div(c, six) y = Neg(d) }}"""
    )
    assert FuseHardSwish().apply(model).changed
