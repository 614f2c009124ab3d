"""InlineIf: before and after, refusals, and that declared shapes are not believed."""

import numpy as np
import pytest
from lowering import constant
from rewrites import assert_close, assert_refuses, assert_rewrites, parse, random_feed, run

from passes.inline_if import InlineIf
from qcompile.graph import io
from qcompile.step import run_pass

HEAD = "g (float[N,4] x) => (float[N,4] y)"


def an_if(
    condition: str,
    then: str = "t = Relu(x)",
    other: str = "e = Neg(x)",
    shape: str = "N,4",
    names: str = "te",
) -> str:
    """If with a branch that makes `t` and one that makes `e`."""
    return (
        f"If <then_branch = one () => (float[{shape}] {names[0]}) {{ {then} }}, "
        f"else_branch = two () => (float[{shape}] {names[1]}) {{ {other} }}> ({condition})"
    )


@pytest.mark.parametrize(("value", "op"), [(1, "Relu"), (0, "Neg")])
@pytest.mark.parametrize("kind", ["bool", "bool[1]"])
def test_a_constant_condition(value: int, op: str, kind: str) -> None:
    outcome = assert_rewrites(
        InlineIf(),
        before=f"{HEAD} <{kind} c = {{{value}}}> {{ [pick] s = {an_if('c')} y = Abs(s) }}",
        after=f"{HEAD} <{kind} c = {{{value}}}> {{ s = {op}(x) y = Abs(s) }}",
    )
    assert outcome.changed == ["pick"]


def test_an_output_keeps_its_name_and_shape() -> None:
    assert_rewrites(
        InlineIf(),
        before=f"{HEAD} <bool c = {{1}}> {{ y = {an_if('c')} }}",
        after=f"{HEAD} <bool c = {{1}}> {{ y = Relu(x) }}",
    )


def test_weights_move_with_the_branch() -> None:
    then = "<float[4] w = {1, 2, 3, 4}> { t = Mul(x, w) }"
    branch = f"If <then_branch = one () => (float[N,4] t) {then}, else_branch = two () => (float[N,4] e) {{ e = Neg(x) }}> (c)"
    assert_rewrites(
        InlineIf(),
        before=f"{HEAD} <bool c = {{1}}> {{ y = {branch} }}",
        after=f"{HEAD} <bool c = {{1}}, float[4] w = {{1, 2, 3, 4}}> {{ y = Mul(x, w) }}",
    )


def test_nested_ifs_and_names_that_repeat_in_bodies() -> None:
    """Both outer bodies define `t` and `e`, and so do two Ifs: every name is unique afterwards."""
    text = f"""{HEAD} <bool c = {{1}}, bool d = {{0}}> {{
        p = {an_if("d", "t = Neg(x)", f"q = {an_if('c', 'u = Exp(x)', 'v = Abs(x)', names='uv')} e = Sqrt(q)")}
        r = {an_if("c", "t = Relu(p)", "e = Neg(p)")}
        y = Add(p, r) }}"""
    outcome = assert_rewrites(
        InlineIf(),
        before=text,
        after=f"""{HEAD} <bool c = {{1}}, bool d = {{0}}> {{
            q = Exp(x) p = Sqrt(q) r = Relu(p) y = Add(p, r) }}""",
    )
    assert len(outcome.changed) == 3


def test_a_branch_that_returns_what_is_not_its_own() -> None:
    """A constant, an outer value, and one value twice become outputs: as copies."""
    text = """g (float[N] x) => (float[N] y, float[N] z, float[2] w) <bool c = {1}> {
        o = Relu(x)
        y, z, w = If <
            then_branch = one () => (float[N] t, float[N] t, float[2] k) <float[2] k = {1, 2}> { t = Neg(o) },
            else_branch = two () => (float[N] e, float[N] f, float[2] h) { e = Abs(o) f = Exp(o) h = Constant<value = float[2] {3, 4}>() }
        > (c) }"""
    model = parse(text)
    feed = random_feed(model)
    assert run_pass(InlineIf(), model).changed
    assert io.check(model) is None
    y, z, w = run(model, feed)
    np.testing.assert_array_equal(y, -np.maximum(feed["x"], 0))
    np.testing.assert_array_equal(y, z)
    np.testing.assert_array_equal(w, np.array([1, 2], np.float32))


SHAPES = {
    "a dimension": "s = Shape(v) d = Gather(s, one) c = Equal(d, two)",
    "from the end": "s = Shape(v) d = Gather(s, back) c = Equal(d, two)",
    "part of a shape": "s = Shape<start = 1, end = 2>(v) c = Equal(s, two)",
    "sliced": "s = Shape(v) d = Slice(s, one_1, two_1) c = Equal(d, two)",
    "a rank": "s = Shape(v) d = Size(s) c = Equal(d, three)",
    "less": "s = Shape(v) d = Gather(s, one) c = Less(d, three)",
    "cast": "s = Shape(v) d = Gather(s, one) p = Equal(d, three) q = Not(p) c = Cast<to = 9>(q)",
    "arithmetic": "s = Shape(v) d = Gather(s, one) p = Mul(d, two) q = Sub(p, one) c = Equal(q, three)",
    "axes": "s = Shape(v) d = Gather(s, one_1) p = Squeeze(d, zero_1) q = Unsqueeze(p, zero_1) c = Equal(q, two)",
}
NUMBERS = (
    "int64 one = {1}, int64 two = {2}, int64 three = {3}, int64 back = {-2}, int64[1] one_1 = {1}, "
    "int64[1] two_1 = {2}, int64[1] zero_1 = {0}, float[2,3,1] k = {1, 2, 3, 4, 5, 6}"
)


@pytest.mark.parametrize("case", SHAPES)
def test_what_follows_from_the_channels_of_a_conv(case: str) -> None:
    """v is (N, 2, L), whatever N and L are."""
    branches = an_if("c", "t = Relu(v)", "e = Neg(v)", "N,2,L")
    text = f"""g (float[N,3,L] x) => (float[N,2,L] y) <{NUMBERS}> {{ v = Conv(x, k) {SHAPES[case]} y = {branches} }}"""
    model = parse(text)
    feed = random_feed(model)
    wanted = run(model, feed)
    assert len(run_pass(InlineIf(), model).changed) == 1
    assert io.check(model) is None
    assert_close(run(model, feed), wanted, rtol=0)
    assert not any(node.op_type == "If" for node in model.graph)


def test_in_the_body_of_a_loop() -> None:
    text = f"""g (float[N,4] x, int64 n) => (float[N,4] y) <bool go = {{1}}, bool c = {{1}}> {{
        y = Loop <body = b (int64 i, bool g, float[N,4] a) => (bool h, float[N,4] o) {{
            h = Identity(g) p = {an_if("c", "t = Relu(a)", "e = Neg(a)")} o = Add(p, a) }}> (n, go, x) }}"""
    model = parse(text)
    feed = random_feed(model, given={"n": np.array(3, np.int64)})
    wanted = run(model, feed)
    assert len(run_pass(InlineIf(), model).changed) == 1
    assert io.check(model) is None
    assert_close(run(model, feed), wanted, rtol=0)


RANK = f"""g (float[A,B,4] x) => (float[1,B,2] h) <{constant("W", 1, 8, 4)}, {constant("R", 1, 8, 2)},
    int64[1] zero = {{0}}, int64 first = {{0}}, int64 one = {{1}}, int64 two = {{2}}> {{
    s = Shape(x) d = Gather(s, first) c = Equal(d, one)
    p = If <then_branch = one () => (float[B,4] t) {{ t = Squeeze(x, zero) }},
            else_branch = two () => (float[A,B,4] e) {{ e = Identity(x) }}> (c)
    q = Unsqueeze(p, zero)
    y, h = LSTM <hidden_size = 2> (q, W, R) }}"""


def test_the_branch_that_the_reader_can_read() -> None:
    """An LSTM reads three dimensions, so that of the branches only Squeeze can be meant."""
    model = parse(RANK)
    feed = random_feed(model, given={"x": np.ones((1, 3, 4), np.float32)})
    wanted = run(model, feed)
    assert len(run_pass(InlineIf(), model).changed) == 1
    assert [node.op_type for node in model.graph][-3:] == ["Squeeze", "Unsqueeze", "LSTM"]
    assert_close(run(model, feed), wanted, rtol=0)


def test_ranks_of_an_if_behind_an_if() -> None:
    """As PyTorch exports an LSTM cell: is there a time axis to remove, is there a batch axis to add?"""
    behind = """i = Shape(p) j = Size(i) k = Equal(j, two) l = Not(k)
        o = If <then_branch = three () => (float[C,B,4] f) { f = Unsqueeze(p, zero) },
                else_branch = four () => (float[B,4] g) { g = Identity(p) }> (l)
        q = Unsqueeze(o, zero)"""
    model = parse(RANK.replace("q = Unsqueeze(p, zero)", behind))
    feed = random_feed(model, given={"x": np.ones((1, 3, 4), np.float32)})
    wanted = run(model, feed)
    assert len(run_pass(InlineIf(), model).changed) == 2
    assert_close(run(model, feed), wanted, rtol=0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("e = Identity(x)", "u = Relu(x) e = ReduceSum<keepdims = 0>(u, zero)"),  # both fit
        ("y, h = LSTM <hidden_size = 2> (q, W, R)", "h = Relu(q)"),  # nothing asks for a rank
    ],
)
def test_a_rank_that_decides_nothing(old: str, new: str) -> None:
    text = RANK.replace(old, new)
    assert text != RANK
    assert_refuses(InlineIf(), text, "depends on the model's inputs")


REFUSED = {
    "an input": f"g (float[N,4] x, bool c) => (float[N,4] y) {{ y = {an_if('c')} }}",
    "a constant that a caller can override": (
        f"g (float[N,4] x, bool c) => (float[N,4] y) <bool c = {{1}}> {{ y = {an_if('c')} }}"
    ),
    "an open dimension": (
        f"{HEAD} <int64 i = {{0}}, int64 one = {{1}}> {{ "
        f"s = Shape(x) d = Gather(s, i) c = Equal(d, one) y = {an_if('c')} }}"
    ),
    "a value": f"{HEAD} <float o = {{1}}> {{ r = ReduceMax<keepdims = 0>(x) c = Less(r, o) y = {an_if('c')} }}",
    "not a number": f"{HEAD} {{ n = ReduceSum<keepdims = 0>(x) c = IsNaN(n) y = {an_if('c')} }}",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_depends_on_the_inputs_stays(case: str) -> None:
    assert_refuses(InlineIf(), REFUSED[case], "depends on the model's inputs")


def test_shapes_that_are_only_declared_are_not_believed() -> None:
    """The graph says that v is (1, 4), which nobody checks; x is (N, 4)."""
    text = f"""{HEAD} <int64 i = {{0}}, int64 one = {{1}}, float[1,4] v> {{ v = Abs(x)
        s = Shape(v) d = Gather(s, i) c = Equal(d, one) y = {an_if("c", "t = Relu(v)", "e = Neg(v)")} }}"""
    assert_refuses(InlineIf(), text, "depends on the model's inputs")


def test_a_branch_that_goes_leaves_no_readers() -> None:
    """What only it read is unread, so that weights can go and nodes can be fused."""
    then = an_if("c", "t = Relu(x)", "e = Mul(x, w)")
    model = parse(f"{HEAD} <bool c = {{1}}, float[4] w = {{1, 2, 3, 4}}> {{ y = {then} }}")
    run_pass(InlineIf(), model)
    assert not model.graph.initializers["w"].uses()


def test_a_model_without_ifs_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passes.inline_if.inferred", None)
    assert run_pass(InlineIf(), parse(f"{HEAD} {{ y = Relu(x) }}")).changed == []
