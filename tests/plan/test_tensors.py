"""Which tensors share codes, and what the codes mean."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lowering import constant, eager
from rewrites import parse

from qcompile.plan.make import Request, find_candidates, make_plan
from qcompile.plan.plan import Form
from qcompile.plan.tensors import Coding, coding
from qcompile.run.probe import Fact
from qcompile.targets.schema import Boundary, Cost

FREE = dataclasses.replace(
    eager(), boundary=Boundary(0, 0, 0, 0), op=tuple(dataclasses.replace(row, int8=Cost()) for row in eager().op)
)  # fmt: skip
K = constant("k", 4, 4, 1, 1)
NUMBERS = "float two = {2}, float three = {3}, float five = {5}, float minus = {-1.5}, int64[1] i = {1}, int64[1] j = {3}, int64[2] s = {4, 9}"


def coded(nodes: str, keep: tuple[str, ...] = ()) -> Coding:
    model = parse(f"g (float[1,4,3,3] x) => (float[O] y) <{K}, {NUMBERS}> {{ {nodes} }}", opset=13)
    facts = {"x": Fact(np.dtype(np.float32), (1, 4, 3, 3))}
    facts |= {
        v.name or "": Fact(np.dtype(np.float32), (1, 4, 3, 3))
        for n in model.graph
        for v in n.outputs
    }
    found = find_candidates(model, FREE, facts)
    forms = {
        name: Form.FREE if item.role == "free" else Form.STATIC
        for name, item in found.items()
        if not isinstance(item, str) and name not in keep
    }
    plan = make_plan(
        model, FREE, facts, Request(forms=forms, keep_float=dict.fromkeys(keep, "so")), found
    )
    return coding(model, plan, found)


def shown(made: Coding) -> dict[str, tuple[str, float, float]]:
    """Name -> root, factor, offset."""
    return {
        value.name or "": (item.root.name or "", item.factor, item.offset)
        for value, item in made.tensors.items()
    }


def alone(*names: str) -> dict[str, tuple[str, float, float]]:
    return {name: (name, 1.0, 0.0) for name in names}


def test_kernels_code_what_they_read_and_make() -> None:
    made = coded("[m] a = Conv(x, k) [n] b = Sigmoid(a) [o] y = Mul(a, b)")
    assert shown(made) == alone("x", "a", "b", "y")
    assert [value.name for value in made.roots] == ["x", "a", "b", "y"]


def test_float_nodes_code_nothing() -> None:
    made = coded("[m] a = Conv(x, k) [f] b = Neg(a) [n] c = Neg(b) [o] y = Conv(c, k)")
    assert shown(made) == alone("x", "a", "c", "y")
    assert shown(coded("[m] a = Conv(x, k) [n] y = Sigmoid(a)", keep=("n",))) == alone("x", "a")


def test_the_tensor_before_what_is_absorbed_has_no_codes() -> None:
    assert shown(coded("[m] a = Conv(x, k) [r] b = Relu(a) [o] y = Conv(b, k)")) == alone(
        "x", "b", "y"
    )


def test_moves_share_codes() -> None:
    made = coded(
        "[m] a = Conv(x, k) [t] b = Transpose(a) [r] c = Reshape(b, s) [u] d = Unsqueeze(c, i) [o] y = Sigmoid(d)"
    )
    assert shown(made) == alone("x", "a", "y") | dict.fromkeys("bcd", ("a", 1.0, 0.0))
    assert {root.name: [m.value.name for m in members] for root, members in made.members().items()} == {
        "x": ["x"], "a": ["a", "b", "c", "d"], "y": ["y"],
    }  # fmt: skip


def test_a_move_of_an_input_makes_it_a_root() -> None:
    assert shown(coded("[t] a = Transpose(x) [o] y = Sigmoid(a)")) == alone("x", "y") | {
        "a": ("x", 1.0, 0.0)
    }


def test_every_output_of_a_split() -> None:
    made = coded("[t] a, b = Split<axis = 1>(x) [m] c = Sigmoid(a) [o] y = Mul(c, b)")
    assert shown(made) == alone("x", "c", "y") | dict.fromkeys("ab", ("x", 1.0, 0.0))


def test_products_and_sums_with_numbers() -> None:
    made = coded(
        "[m] a = Conv(x, k) [p] b = Mul(a, two) [q] c = Add(three, b) [r] d = Mul(five, c) [s] e = Add(d, minus) [o] y = Sigmoid(e)"
    )
    assert shown(made) == alone("x", "a", "y") | {
        "b": ("a", 2.0, 0.0), "c": ("a", 2.0, 3.0), "d": ("a", 10.0, 15.0), "e": ("a", 10.0, 13.5),
    }  # fmt: skip


def test_moves_in_between() -> None:
    made = coded(
        "[m] a = Conv(x, k) [p] b = Add(a, three) [t] c = Transpose(b) [q] d = Mul(c, two) [o] y = Sigmoid(d)"
    )
    assert shown(made)["c"] == ("a", 1.0, 3.0)
    assert shown(made)["d"] == ("a", 2.0, 6.0)


def test_a_free_node_that_stays_float_ends_the_chain() -> None:
    made = coded("[m] a = Conv(x, k) [p] b = Mul(a, two) [o] y = Sigmoid(b)", keep=("p",))
    assert shown(made) == alone("x", "a", "b", "y")


numbers = st.floats(0.01, 100).map(lambda v: float(np.float32(v)))


@given(
    steps=st.lists(st.tuples(st.sampled_from(["Mul", "Add"]), numbers), min_size=1, max_size=6),
    x=st.floats(-9, 9),
)
def test_any_chain_is_what_it_computes(steps: list[tuple[str, float]], x: float) -> None:
    """v = factor * root + offset, whatever the order of products and sums."""
    constants = ", ".join(f"float c{i} = {{{number!r}}}" for i, (_, number) in enumerate(steps))
    lines = [f"[f{i}] v{i + 1} = {op}(v{i}, c{i})" for i, (op, _) in enumerate(steps)]
    model = parse(
        f"g (float[4] x) => (float[4] y) <{constants}> {{ [m] v0 = LeakyRelu(x) n = Neg(x) {' '.join(lines)} [o] y = Mul(v{len(steps)}, n) }}"
    )
    facts = {v.name or "": Fact(np.dtype(np.float32), (4,)) for n in model.graph for v in n.outputs}
    facts["x"] = facts["y"]
    found = find_candidates(model, FREE, facts)
    forms = {f"f{i}": Form.FREE for i in range(len(steps))} | {"o": Form.STATIC}
    plan = make_plan(model, FREE, facts, Request(forms=forms), found)
    value = x
    for i, (op, number) in enumerate(steps):
        value = value * number if op == "Mul" else value + number
        assert plan[f"f{i}"].form is Form.FREE
    (item,) = (
        c for v, c in coding(model, plan, found).tensors.items() if v.name == f"v{len(steps)}"
    )
    assert item.root.name == "v0"
    assert item.factor * x + item.offset == pytest.approx(value, rel=1e-9, abs=1e-9)
