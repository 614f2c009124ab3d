"""Sizes as symbols: what is said to be equal is equal in every run, and what is said to be a number is that one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import parse

from qcompile.graph.dims import dims
from qcompile.graph.symbols import Known, Numbers, Symbol
from qcompile.run.session import Options, Session

Array = np.ndarray[Any, Any]


def named(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name or "": value for node in model.graph for value in node.outputs}


def check(text: str, *feeds: dict[str, Array]) -> Known:
    """Run a model, all values of it: sizes and contents are as they are said to be."""
    model = parse(text)
    known = dims(model)
    values = {name: value for name, value in named(model).items() if name}
    every = parse(text)
    inner = named(every)
    returned = {value.name for value in every.graph.outputs}
    every.graph.outputs.extend(inner[name] for name in values if name not in returned)
    session = Session(every, Options("off"))
    for feed in feeds:
        names = [item.name for item in session.outputs]
        found = dict(zip(names, session.run(feed), strict=True))
        sizes: dict[Symbol, int] = {}
        for name, value in values.items():
            rows = [(known.shape(value), found[name].shape)]
            numbers = known.contents(value)
            if numbers is not None:
                assert numbers.scalar == (found[name].ndim == 0)
                assert numbers.kind.numpy() == found[name].dtype
                rows.append((numbers.sizes, tuple(found[name].reshape(-1))))
            for said, are in rows:
                if said is None:
                    continue
                assert len(said) == len(are), name
                for one, other in zip(said, are, strict=True):
                    if isinstance(one, Symbol):
                        assert sizes.setdefault(one, int(other)) == other, name
                        assert other >= 0 or not one.natural
                    else:
                        assert one == other, name
    return known


def contents(text: str, value: str) -> Numbers | None:
    model = parse(text)
    return dims(model).contents(named(model)[value])


HEAD = "g (float[b,t,6] x, float[c,6] k) => (int64[n] y)"
NUMBERS = """int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[1] axis = {0}, int64[1] three = {3}, int64[2] both = {0, 2},
    int64[1] minus = {-1}, int64[1] last = {9}, int64[1] step = {2}, int64[3] given = {0, -1, 3}"""


@pytest.mark.parametrize(
    "body",
    [
        "y = Shape(x)",
        "y = Shape<start = 1, end = -1>(x)",
        "s = Shape(x) y = Gather(s, both)",
        "s = Shape(x) b = Gather(s, one) u = Unsqueeze(b, axis) y = Concat<axis = 0>(u, three, u)",
        "s = Shape(x) y = Slice(s, axis, last, axis, step)",
        "s = Shape(x) y = Slice(s, minus, axis)",
        "s = Shape(x) m = Mul(s, three) a = Add(m, s) d = Div(a, three) y = Sub(d, three)",
        "s = Shape(x) c = Cast<to = 6>(s) e = Cast<to = 7>(c) y = Reshape(e, minus)",
        "s = Shape(x) e = Equal(s, minus) f = ConstantOfShape<value = int64[1] {1}>(three) y = Where(e, f, s)",
        "r = Relu(x) p = Transpose<perm = [2, 0, 1]>(r) y = Shape(p)",
        "r = Reshape(x, given) y = Shape(r)",
        "p = Transpose(k) m = MatMul(x, p) y = Shape(m)",
        "u = Unsqueeze(k, minus) v = Squeeze(u, minus) m = Mul(x, v) y = Shape(m)",
        "m = ReduceMean<axes = [1]>(x) n = ReduceMean<axes = [-1], keepdims = 0>(m) y = Shape(n)",
        "m = Concat<axis = 1>(x, x, x) a, d = Split<axis = 2>(m) o = Softmax(a) y = Shape(o)",
        "w = Where(on, x, k) y = Shape(w)",
        "m = Gather(k, both) e = Slice(m, axis, three, axis) y = Shape(e)",
        "s = Shape(x) e = Expand(k, s) y = Shape(e)",
        "s = Shape(x) b = Gather(s, two) v = Range(zero, b, one) y = Add(v, one)",
    ],
)
def test_each_operator(body: str) -> None:
    text = f"{HEAD.replace('c,6', 't,6')} <{NUMBERS}, bool on = {{1}}> {{ {body} }}"
    rng = np.random.default_rng(0)
    check(text, *({"x": rng.normal(size=(b, t, 6)).astype(np.float32), "k": rng.normal(size=(t, 6)).astype(np.float32)}
                  for b, t in ((2, 3), (1, 4), (5, 5), (3, 3))))  # fmt: skip


def test_products_say_what_is_equal_and_concatenations_do_not() -> None:
    """ORT leaves out what is empty when it concatenates, whatever its other sizes are: an empty cache may have another batch."""
    text = """g (float[a,b] x, float[c,d] y, float[e,f] z) => (int64[2] s, int64[2] o) {
        m = MatMul(x, y) n = Concat<axis = 1>(x, z) s = Shape(m) o = Shape(n) }"""
    model = parse(text)
    known = dims(model)
    x, y, z = (known.shape(value) for value in model.graph.inputs)
    assert x is not None and y is not None and z is not None
    assert x[1] is y[0]
    assert len({x[0], y[1], z[0], x[1], z[1]}) == 5
    feed = {"x": np.ones((2, 3)), "y": np.ones((3, 4)), "z": np.ones((5, 0))}
    check(text, {name: value.astype(np.float32) for name, value in feed.items()})
    fixed = "g (float[1,c] p, float[b,t] n) => (int64[1] y) { k = Concat<axis = 1>(p, n) s = Shape<start = 0, end = 1>(k) y = Neg(s) }"
    check(fixed, {"p": np.ones((1, 0), np.float32), "n": np.ones((3, 2), np.float32)})


def ones(**shapes: tuple[int, ...]) -> dict[str, Array]:
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


def test_a_size_of_0_copies_the_one_that_is_there() -> None:
    text = f"g (float[3,4] x, float[n] k, float[b,t] z) => (int64[2] y) <{NUMBERS}> {{ s = Shape(k) BODY }}"
    check(text.replace("BODY", "h = Div(s, step) r = Concat<axis = 0>(h, minus) v = Reshape(x, r) y = Shape(v)"),
          ones(x=(3, 4), k=(1,), z=(1, 1)), ones(x=(3, 4), k=(8,), z=(1, 1)))  # fmt: skip
    check(text.replace("BODY", "r = Concat<axis = 0>(s, minus) v = Reshape(z, r) y = Shape(v)"),
          ones(x=(3, 4), k=(0,), z=(2, 3)), ones(x=(3, 4), k=(3,), z=(2, 3)))  # fmt: skip
    # beside the other one, or what stands for it, it is that
    check(text.replace("BODY", "o = Shape(z) v = Reshape(x, o) a = Add(v, z) y = Shape(a)"),
          ones(x=(3, 4), k=(1,), z=(4, 3)), ones(x=(3, 4), k=(1,), z=(12, 1)))  # fmt: skip


def test_slices_from_the_end_are_not_followed() -> None:
    text = f"g (float[5,n] x) => (int64[m] y) <{NUMBERS}, int64[1] far = {{9223372036854775807}}, int64[1] low = {{-10}}> {{ BODY }}"
    for body in (
        "s = Shape(x) y = Slice(s, minus, far, axis, minus)", "f = Slice(x, minus, far, axis, minus) y = Shape(f)",
        "f = Slice(x, low, low, axis, minus) y = Shape(f)",
    ):  # fmt: skip
        check(text.replace("BODY", body), ones(x=(5, 2)), ones(x=(5, 3)))


def test_a_scalar_may_be_fed_anything() -> None:
    check("g (float x) => (int64[m] y) { y = Shape(x) }", ones(x=(4,)), ones(x=()))


def test_integers_that_wrap() -> None:
    text = """g (float[n] x) => (int64[1] y, int64[1] z) <int32[1] k = {65536}, int64[1] kk = {65536}, int64[1] big = {4294967296}> {
        s = Shape(x) d = Mul(s, kk) c = Cast<to = 6>(s) m = Mul(c, k) y = Cast<to = 7>(m)
        e = Mul(s, big) f = Cast<to = 6>(e) z = Cast<to = 7>(f) }"""
    check(text, ones(x=(40000,)), ones(x=(3,)))
    large = """g (float[n] x) => (int64[1] y) <int64[1] k = {4611686018427387904}, int64[1] l = {-9223372036854775808}, int64[1] a = {1}, int64[1] b = {2}> {
        s = Shape(x) m = Mul(s, k) e = Equal(m, l) y = Where(e, a, b) }"""
    check(large, ones(x=(2,)), ones(x=(1,)))


@pytest.mark.parametrize(
    "body",
    [
        "y = Identity(given)",  # fed
        "f = Cast<to = 1>(s) y = Cast<to = 7>(f)",
        "y = NonZero(s)",
        "h = Gather(s, places) y = Reshape(h, minus)",
    ],
)
def test_what_is_not_known(body: str) -> None:
    text = f"g (float[b,t] x, int64[2] given, int64[n] places) => (int64[m] y) <int64[1] minus = {{-1}}> {{ s = Shape(x) {body} }}"
    assert contents(text, "y") is None


def test_a_division_by_zero_says_nothing() -> None:
    text = "g (float[b] x) => (int64[1] y) <int64[1] a = {3}, int64[1] z = {0}> { y = Div(a, z) }"
    found = contents(text, "y")
    assert found is not None
    assert isinstance(found.sizes[0], Symbol)
    assert not found.sizes[0].natural


def test_numbers_beyond_their_type_are_not_reckoned() -> None:
    text = "g (float[b] x) => (int32[1] y) <int32[1] a = {2000000000}> { y = Add(a, a) }"
    assert contents(text, "y") is None


def test_sizes_that_a_file_declares_inside_are_not_believed() -> None:
    model = parse("g (float[b,t] x) => (int64[2] y) { r = NonZero(x) y = Shape(r) }")
    model.graph[0].outputs[0].shape = ir.Shape([7, 7])
    assert dims(model).shape(model.graph[0].outputs[0]) is None


@given(st.lists(st.sampled_from([1, 1, 2, 3, "a", "b"]), min_size=1, max_size=4),
       st.lists(st.sampled_from([1, 1, 2, 3, "a", "b"]), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 3))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_broadcasting_is_that_of_numpy(one: list[Any], other: list[Any], a: int, b: int) -> None:
    known, symbols = Known(), {"a": Symbol(), "b": Symbol()}
    numbers = {"a": a, "b": b}
    shapes = [[numbers.get(size, size) for size in sizes] for sizes in (one, other)]
    try:
        real = np.broadcast_shapes(*map(tuple, shapes))
    except ValueError:
        return  # no run has these
    made = known.broadcast([tuple(symbols.get(s, s) for s in sizes) for sizes in (one, other)])
    assert len(made) == len(real)
    for said, size in zip(made, real, strict=True):
        for name, symbol in symbols.items():
            assert said is not symbol or size == numbers[name]
        assert isinstance(said, Symbol) or said == size
