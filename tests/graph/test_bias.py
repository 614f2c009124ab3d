"""Which addends a kernel takes. How they are computed is in `passes/test_lower_nbits.py`."""

import numpy as np
import pytest
from lowering import constant
from rewrites import parse

from qcompile.graph.bias import Bias, find_bias
from qcompile.graph.edit import Names, array
from qcompile.graph.linear import find_linears
from qcompile.graph.place import Steps

W = constant("w", 16, 4)


def found(body: str, c: str, x: str = "float[3,16] x", y: str = "float[3,4] y") -> Bias:
    model = parse(f"g ({x}) => ({y}) <{W}, {c}> {{ {body} }}")
    (item,) = find_linears(model)
    return find_bias(item, Steps(Names(model), item))


@pytest.mark.parametrize(
    "body",
    ["y = Gemm(x, w, c)", "p = MatMul(x, w) y = Add(p, c)", "p = MatMul(x, w) y = Add(c, p)"],
)
def test_a_row_is_taken_as_it_is(body: str) -> None:
    bias = found(body, constant("c", 4))
    assert bias.flat is not None
    assert (bias.flat.name, bias.other) == ("c", None)
    assert (bias.node is None) == ("Gemm" in body)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4,), (1, 4)])
def test_what_is_broadcast_to_a_row_becomes_one(shape: tuple[int, ...]) -> None:
    bias = found("y = Gemm<beta = 0.5>(x, w, c)", constant("c", *shape))
    plain = found("y = Gemm(x, w, c)", constant("c", *shape))
    assert (bias.other, plain.other) == (None, None)
    ours, theirs = array(bias.flat), array(plain.flat)
    assert ours is not None
    assert theirs is not None
    assert ours.shape == theirs.shape == (4,)
    np.testing.assert_allclose(ours, theirs / 2)


@pytest.mark.parametrize("shape", [(3, 4), (3, 1)])
def test_what_differs_by_row_needs_an_add(shape: tuple[int, ...]) -> None:
    bias = found("y = Gemm(x, w, c)", constant("c", *shape))
    assert bias.flat is None
    assert bias.other is not None
    assert bias.other.name == "c"


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("p = MatMul(x, w) y = Add(p, c)", ()), ("p = MatMul(x, w) y = Add(p, c)", (3, 4)),
        ("p = MatMul(x, w) y = Add(p, p)", (4,)), ("p = MatMul(x, w) y = Mul(p, c)", (4,)),
        ("p = MatMul(x, w) q = Neg(p) y = Add(p, c)", (4,)), ("y = Gemm<beta = 0.0>(x, w, c)", (4,)),
        ("y = Gemm(x, w)", (4,)),
    ],
)  # fmt: skip
def test_no_addend(body: str, shape: tuple[int, ...]) -> None:
    assert found(body, constant("c", *shape)) == Bias()
