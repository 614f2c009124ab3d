import numpy as np
import pytest
from rewrites import assert_refuses, assert_rewrites, parse

from passes.drop_identity import DropIdentity

HEAD = "g (float[N,4] x) => (float[N,4] y)"


@pytest.mark.parametrize(
    "op",
    [
        "Identity(x)",
        "Dropout(x)",
        "Dropout(x, ratio)",
        "Dropout(x, ratio, never)",
        "Dropout(x, , never)",
        "Concat<axis = 1>(x)",
        "Mul(x, one)",
        "Mul(one, x)",
        "Mul(x, one_1)",
        "Div(x, one)",
        "Add(x, zero)",
        "Add(zero, x)",
        "Sub(x, zero)",
    ],
)
def test_what_returns_its_input_goes(op: str) -> None:
    constants = (
        "<float one = {1.0}, float[1] one_1 = {1.0}, float zero = {0.0}, float ratio = {0.5}, "
        "bool never = {0}>"
    )
    assert_rewrites(
        DropIdentity(),
        before=f"{HEAD} {constants} {{ t = {op} y = Relu(t) }}",
        after=f"{HEAD} {{ y = Relu(x) }}",
    )


def test_a_chain_goes_in_one_run() -> None:
    outcome = assert_rewrites(
        DropIdentity(),
        before=f"{HEAD} {{ [a] t = Identity(x) [b] u = Dropout(t) [c] v = Identity(u) y = Relu(v) }}",
        after=f"{HEAD} {{ y = Relu(x) }}",
    )
    assert outcome.changed == ["a", "b", "c"]


def test_an_output_keeps_its_name() -> None:
    assert_rewrites(
        DropIdentity(),
        before=f"{HEAD} {{ t = Relu(x) y = Identity(t) }}",
        after=f"{HEAD} {{ y = Relu(x) }}",
    )


def test_a_value_that_is_read_and_returned() -> None:
    head = "g (float[N,4] x) => (float[N,4] y, float[N,4] z)"
    assert_rewrites(
        DropIdentity(),
        before=f"{head} {{ t = Relu(x) y = Identity(t) z = Neg(t) }}",
        after=f"{head} {{ y = Relu(x) z = Neg(y) }}",
    )


def test_of_two_copies_that_are_returned_one_stays() -> None:
    head = "g (float[N,4] x) => (float[N,4] y, float[N,4] z)"
    outcome = assert_rewrites(
        DropIdentity(),
        before=f"{head} {{ t = Relu(x) y = Identity(t) [copy] z = Identity(t) }}",
        after=f"{head} {{ y = Relu(x) z = Identity(y) }}",
    )
    assert outcome.skipped == {
        "copy": "the graph returns a copy of an input, an initializer or another output"
    }


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{ y = Identity(x) }", "a copy of an input"),
        ("<float[1,4] w = {1, 2, 3, 4}> { u = Relu(x) y = Identity(w) }", "an initializer"),
        ("<float r = {0.5}, bool on = {1}> { t = Dropout(x, r, on) y = Relu(t) }", "training mode"),
    ],
)
def test_refusals(body: str, reason: str) -> None:
    assert_refuses(DropIdentity(), f"{HEAD} {body}", reason)


def test_training_mode_that_is_an_input() -> None:
    text = "g (float[N,4] x, bool on) => (float[N,4] y) <float r = {0.5}> { t = Dropout(x, r, on) y = Relu(t) }"
    assert_refuses(DropIdentity(), text, "training mode")


def test_a_mask_that_is_read() -> None:
    text = "g (float[N,4] x) => (float[N,4] y, bool[N,4] mask) { t, mask = Dropout(x) y = Relu(t) }"
    assert_refuses(DropIdentity(), text, "its mask is read")


@pytest.mark.parametrize(
    "body",
    [
        "<float two = {2.0}> { t = Mul(x, two) y = Relu(t) }",
        "<float one = {1.0}> { t = Div(one, x) y = Relu(t) }",
        "<float zero = {0.0}> { t = Sub(zero, x) y = Relu(t) }",
        "<float zero = {0.0}> { t = Mul(x, zero) y = Relu(t) }",
        "<float[4] ones = {1, 1, 1, 1}> { t = Mul(x, ones) y = Relu(t) }",  # no number: N is open
        "{ t = Concat<axis = 0>(x, x) u = Mul(t, t) y = Relu(x) }",
    ],
)
def test_what_is_no_identity_stays(body: str) -> None:
    assert_refuses(DropIdentity(), f"{HEAD} {body}")


@pytest.mark.parametrize("constant", ["float[1] one = {1}", "float[1,1,1] one = {1}"])
def test_a_number_that_raises_the_rank_stays(constant: str) -> None:
    scalar = (
        "g (float x) => (float[N] y)" if "[1]" in constant else "g (float x) => (float[A,B,C] y)"
    )
    assert_refuses(DropIdentity(), f"{scalar} <{constant}> {{ y = Mul(x, one) }}")


def test_a_number_behind_a_value_of_unknown_rank() -> None:
    # Gather of one element has rank 0, and the product rank 1: Concat needs that.
    text = """g (int64[3] x) => (int64[2] y) <int64 i = {1}, int64[1] one = {1}, int64[1] two = {2}> {
        t = Gather(x, i) u = Mul(t, one) y = Concat<axis = 0>(u, two) }"""
    assert_refuses(DropIdentity(), text)


def test_the_rank_is_found_behind_a_convolution() -> None:
    head = "g (float[1,2,3,3] x) => (float[1,2,3,3] y) <float[2,2,1,1] w = {1, 2, 3, 4}, float[1] one = {1}>"
    assert_rewrites(
        DropIdentity(),
        before=f"{head} {{ t = Conv(x, w) s = Sigmoid(t) u = Mul(s, one) y = Relu(u) }}",
        after=f"{head} {{ t = Conv(x, w) s = Sigmoid(t) y = Relu(s) }}",
    )


def test_a_body_does_not_return_what_the_outer_graph_made() -> None:
    text = """g (float[N,4] x, bool c) => (float[N,4] y) { t = Relu(x)
        y = If(c) <then_branch = a () => (float[N,4] p) { p = Identity(t) },
                   else_branch = b () => (float[N,4] q) { q = Neg(t) }> }"""
    assert_refuses(DropIdentity(), text, "a body returns a value of the outer graph")


def test_a_value_that_a_body_reads() -> None:
    head = "g (float[N,4] x, bool c) => (float[N,4] y)"
    body = """y = If(c) <then_branch = a () => (float[N,4] p) { p = Neg(VALUE) },
                         else_branch = b () => (float[N,4] q) { q = Relu(VALUE) }>"""
    assert_rewrites(
        DropIdentity(),
        before=f"{head} {{ t = Sigmoid(x) s = Identity(t) {body.replace('VALUE', 's')} }}",
        after=f"{head} {{ t = Sigmoid(x) {body.replace('VALUE', 't')} }}",
        feed={"c": np.array(True)},
    )


def test_types_are_kept() -> None:
    model = parse("g (float[N,4] x) => (float[N,4] y) { t = Sigmoid(x) y = Identity(t) }")
    DropIdentity().apply(model)
    (y,) = model.graph.outputs
    assert y.shape == model.graph.inputs[0].shape
