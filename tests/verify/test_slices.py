"""The parts of an output that are judged on their own."""

from __future__ import annotations

import numpy as np
import pytest
from rewrites import parse, random_feed

from qcompile.run.probe import probe
from qcompile.verify.compare import Comparison
from qcompile.verify.metrics import Error, Part
from qcompile.verify.slices import concat_behind, parts_of

ONES = ", ".join(["1"] * 240)
HEAD = f"g (float[1,4,5,6] a, float[1,2,5,6] b) => (float[SHAPE] y) <float two = {{2}}, float[1,8,5,6] wide = {{{ONES}}}>"


def parts(
    nodes: str, shape: str = "1,6,5,6", head: str = HEAD
) -> list[tuple[str, int | None, int, int]]:
    """Of the output `y`: name, axis, start, stop."""
    model = parse(f"{head.replace('SHAPE', shape)} {{ {nodes} }}")
    facts = probe(model, random_feed(model))
    (output,) = (value for value in model.graph.outputs if value.name == "y")
    return [(p.name, p.axis, p.start, p.stop) for p in parts_of(output, facts)]


WHOLE = ("all", None, 0, 0)
BOTH = [WHOLE, ("[0:4] a", 1, 0, 4), ("[4:6] b", 1, 4, 6)]


@pytest.mark.parametrize("axis", [1, -3])
def test_a_concat(axis: int) -> None:
    assert parts(f"y = Concat<axis = {axis}>(a, b)") == BOTH


@pytest.mark.parametrize(
    "last",
    [
        "Identity(c)",
        "Sigmoid(c)",
        "Mul(c, two)",
        "Mul(two, c)",
        "Add(c, two)",
        "Cast<to = 1>(c)",
        "Div(c, two)",
    ],
)
def test_behind_what_keeps_places(last: str) -> None:
    assert parts(f"c = Concat<axis = 1>(a, b) y = {last}") == BOTH


def test_a_product_of_a_value_with_itself_gated() -> None:
    assert parts("c = Concat<axis = 1>(a, b) s = Sigmoid(c) y = Mul(c, s)") == BOTH


def test_two_concats_take_the_last() -> None:
    assert parts("c = Concat<axis = 1>(a, b) y = Concat<axis = 1>(c, b)", "1,8,5,6") == [
        WHOLE, ("[0:6] c", 1, 0, 6), ("[6:8] b", 1, 6, 8),
    ]  # fmt: skip


@pytest.mark.parametrize("perm", [(0, 2, 3, 1), (0, 1, 2, 3), (1, 0, 3, 2), (3, 2, 1, 0)])
def test_through_a_transpose(perm: tuple[int, ...]) -> None:
    shape = ",".join(str((1, 6, 5, 6)[p]) for p in perm)
    place = perm.index(1)
    wanted = [(name, None if axis is None else place, *rest) for name, axis, *rest in BOTH]
    assert (
        parts(f"c = Concat<axis = 1>(a, b) y = Transpose<perm = {list(perm)}>(c)", shape) == wanted
    )
    if perm == (3, 2, 1, 0):
        assert parts("c = Concat<axis = 1>(a, b) y = Transpose(c)", shape) == wanted


def test_through_two_transposes() -> None:
    """The slices are those of the values: checked against the values themselves."""
    first, second = (0, 2, 3, 1), (3, 0, 1, 2)
    nodes = f"c = Concat<axis = 1>(a, b) t = Transpose<perm = {list(first)}>(c) y = Transpose<perm = {list(second)}>(t)"
    model = parse(f"{HEAD.replace('SHAPE', '6,1,5,6')} {{ {nodes} }}")
    found = parts_of(model.graph.outputs[0], probe(model, random_feed(model)))
    a, b = np.zeros((1, 4, 5, 6)), np.ones((1, 2, 5, 6))
    y = np.concatenate([a, b], axis=1).transpose(first).transpose(second)
    assert (found[1].of(y) == 0).all()
    assert (found[2].of(y) == 1).all()


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [("y = Neg(a)", "1,4,5,6"), ("y = Concat<axis = 1>(a)", "1,4,5,6"), ("c = Concat<axis = 1>(a, b) y = Softmax(c)", "1,6,5,6"),
     ("c = Concat<axis = 1>(a, b) y = Flatten(c)", "1,180")],
)  # fmt: skip
def test_the_whole_only(nodes: str, shape: str) -> None:
    assert parts(nodes, shape) == [WHOLE]


def test_an_operand_that_is_broadcast_has_other_places() -> None:
    """Of `sum` only the wide operand has the output's places, wherever it stands."""
    head = HEAD.replace(
        "float[1,2,5,6] b)", "float[1,2,5,6] b, float[1,6,1,1] s, float[3,6,5,6] w)"
    )
    both = "c = Concat<axis = 1>(a, b)"
    assert parts(f"{both} y = Mul(s, c)", head=head) == BOTH
    assert parts(f"{both} y = Add(c, w)", "3,6,5,6", head=head) == [WHOLE]
    narrow = "p = GlobalAveragePool(a) q = GlobalAveragePool(b) c = Concat<axis = 1>(p, q) d = Concat<axis = 1>(a, b)"
    assert parts(f"{narrow} y = Mul(c, d)", head=head) == BOTH
    assert parts(f"{both} n = Neg(w) y = Mul(c, n)", "3,6,5,6", head=head) == [WHOLE]


def test_many_inputs_are_no_parts() -> None:
    assert len(parts(f"y = Concat<axis = 1>({', '.join(['a'] * 62)})", "1,K,5,6")) == 63
    assert parts(f"y = Concat<axis = 1>({', '.join(['a'] * 70)})", "1,K,5,6") == [WHOLE]


# ---- sizes that depend on the data


CACHE = "g (float[1,2,P,4] past, float[1,2,N,4] new) => (float[1,2,SHAPE,4] y) <float two = {2}>"


@pytest.mark.parametrize("shape", ["T", "P_N", "unk__1"])
def test_a_cache_that_grows_has_no_parts(shape: str) -> None:
    """The first sample's past is no longer than the second's: its place would hold new tokens."""
    assert parts("y = Concat<axis = 2>(past, new)", shape, CACHE) == [WHOLE]
    assert parts("c = Concat<axis = 2>(past, new) y = Mul(c, two)", shape, CACHE) == [WHOLE]


def test_a_dynamic_batch_does_not_matter() -> None:
    head = "g (float[N,4,H,W] a, float[N,2,H,W] b) => (float[N,6,H,W] y)"
    assert parts("y = Concat<axis = 1>(a, b)", head=head) == BOTH
    head = "g (float[N,4,H,W] a, float[N,2,H,W] b) => (float[N,C,H,W] y)"
    assert (
        parts("y = Concat<axis = 1>(a, b)", head=head) == BOTH
    )  # those of both inputs are declared
    head = "g (float[N,4,H,W] a, float[N,D,H,W] b) => (float[N,C,H,W] y)"
    assert parts("y = Concat<axis = 1>(a, b)", head=head) == [WHOLE]


def test_the_output_says_it_whatever_its_inputs_say() -> None:
    head = "g (float[1,4,5,6] a, float[1,2,5,6] b) => (float[1,6,5,6] y) <float two = {2}>"
    assert parts("c = Sigmoid(a) d = Mul(b, two) y = Concat<axis = 1>(c, d)", head=head) == [
        WHOLE, ("[0:4] c", 1, 0, 4), ("[4:6] d", 1, 4, 6),
    ]  # fmt: skip
    open_head = head.replace("1,6,5,6", "1,C,5,6")
    assert parts("c = Sigmoid(a) d = Mul(b, two) y = Concat<axis = 1>(c, d)", head=open_head) == [
        WHOLE
    ]


def test_the_output_s_own_axis_counts_behind_a_transpose() -> None:
    nodes = "c = Sigmoid(a) d = Sigmoid(b) e = Concat<axis = 1>(c, d) y = Transpose<perm = [0, 2, 3, 1]>(e)"
    assert len(parts(nodes, "1,H,W,6")) == 3
    assert parts(nodes, "1,5,6,C") == [WHOLE]


def test_a_constant_operand_has_its_own_size() -> None:
    assert parts("y = Concat<axis = 1>(a, wide)", "1,K,5,6") == [
        WHOLE, ("[0:4] a", 1, 0, 4), ("[4:12] wide", 1, 4, 12),
    ]  # fmt: skip


def test_which_concat() -> None:
    model = parse(
        f"{HEAD.replace('SHAPE', '1,6,5,6')} {{ c = Concat<axis = 1>(a, b) y = Sigmoid(c) }}"
    )
    facts = probe(model, random_feed(model))
    found = concat_behind(model.graph.outputs[0], facts)
    assert found is not None
    assert found[0].op_type == "Concat"
    assert found[1] == (0, 1, 2, 3)
    assert concat_behind(model.graph.inputs[0], facts) is None
    assert concat_behind(model.graph.outputs[0], {}) is None


def test_a_head_of_boxes_and_scores() -> None:
    """Errors that are small for the whole show in the slice of the scores: case C09."""
    model = parse(
        "g (float[1,4,8] box, float[1,2,8] score) => (float[1,6,8] y) <float many = {200}> { b = Mul(box, many) s = Sigmoid(score) y = Concat<axis = 1>(b, s) }"
    )
    feed = random_feed(model)
    found = parts_of(model.graph.outputs[0], probe(model, feed))
    y = np.concatenate([feed["box"] * 200, 1 / (1 + np.exp(-feed["score"]))], axis=1)
    step = np.abs(y).max() / 127
    errors = [Error(part) for part in found]
    for error in errors:
        error.add(y, np.round(y / step) * step)
    whole, boxes, scores = errors
    assert whole.sqnr_db > 30
    assert boxes.sqnr_db > 30
    assert scores.sqnr_db < 3
    assert scores.dead
    compared = Comparison({"y": errors}, 1)
    assert compared.worst_db == scores.sqnr_db
    assert compared.problems() == [
        "output 'y', slice [4:6] s is constant: all its information is lost."
    ]
    assert next(error.part for error in errors) == Part("all")


@pytest.mark.parametrize(
    ("nodes", "chance"),
    [
        ("y = Neg(a)", False),
        ("r = RandomNormalLike(a) s = Add(a, r) y = Neg(s)", True),
        ("y = Dropout(a)", False),
        ("y = Dropout(a, , yes)", True),
    ],
)
def test_whether_an_output_is_random(nodes: str, chance: bool) -> None:
    text = f"g (float[4] a) => (float[4] y) <bool yes = {{1}}> {{ {nodes} }}"
    model = parse(text)
    assert [p.chance for p in parts_of(model.graph.outputs[0], {})] == [chance]
