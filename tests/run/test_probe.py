"""Facts: of the main graph from a session, of bodies by inference and by handing types on."""

import logging

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import parse, random_feed

from qcompile.errors import ModelError
from qcompile.run.probe import Fact, inferred, probe

F32, I64, BOOL = (np.dtype(kind) for kind in (np.float32, np.int64, np.bool_))
HEAD = "g (float[N,4] x, bool p) => (float[N,M] y)"


def body(then: str, other: str = "e = Neg(x)", weights: str = "") -> ir.Model:
    return parse(
        f"{HEAD} {{ v = Relu(x) y = If <then_branch = one () => (float[A,B] t) {weights} {{ {then} }}, "
        f"else_branch = two () => (float[A,B] e) {{ {other} }}> (p) }}"
    )


def test_the_main_graph() -> None:
    model = parse(
        "g (float[N,4] x, int64[2] s) => (int64[K] i, float[A,B] y) "
        "{ i = Shape(x) c = Cast<to = 1>(s) y = Reshape(x, s) }"
    )
    feed = {"x": np.zeros((3, 4), np.float32), "s": np.array([2, 6])}
    facts = probe(model, feed)
    assert facts["x"] == Fact(F32, (3, 4))
    assert facts["i"] == Fact(I64, (2,))
    assert facts["y"] == Fact(F32, (2, 6))
    assert facts["y"].elements == 12
    assert probe(model, None)["y"] == Fact(F32, None)


def test_types_and_shapes_in_both_branches() -> None:
    model = body("a = MatMul(v, w) t = Relu(a)", "i = Shape(v) f = Cast<to = 1>(i) e = Add(v, v)",
                 "<float[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}>")  # fmt: skip
    facts = probe(model, random_feed(model))
    assert facts["a"] == facts["t"] == Fact(F32, (3, 2))
    assert facts["i"] == Fact(I64, (2,))
    assert facts["f"] == Fact(F32, (2,))
    assert facts["e"] == Fact(F32, (3, 4))
    assert probe(model, None)["a"] == Fact(F32, None)
    assert probe(model, None)["i"] == Fact(I64, (2,))


def test_large_weights_of_a_body_are_not_copied() -> None:
    """Their shapes count all the same."""
    numbers = ", ".join("1" for _ in range(4 * 200))
    model = body("t = MatMul(v, w)", weights=f"<float[4,200] w = {{{numbers}}}>")
    assert probe(model, random_feed(model))["t"] == Fact(F32, (3, 200))
    clone = inferred(model, {})
    assert all(len(graph.initializers) == 0 for graph in clone.graphs())
    assert [len(graph.initializers) for graph in model.graphs()] == [0, 1, 0]


def test_names_that_repeat_tell_only_what_holds_for_all() -> None:
    model = body("m = Neg(v) n = Shape(v) o = Shape(v) t = Identity(m)",
                 "m = Abs(x) n = Neg(x) o = Shape<start = 1>(v) e = Identity(m)")  # fmt: skip
    facts = probe(model, random_feed(model))
    assert facts["m"] == Fact(F32, (3, 4))
    assert facts["n"] == Fact(None, None)
    assert facts["o"] == Fact(I64, None)


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("FastGelu(v)", F32),
        ("Gelu(v)", F32),
        ("FusedMatMul(v, v)", F32),
        ("Other(v)", None),
    ],
)
def test_types_past_operators_of_ort(op: str, kind: np.dtype[np.float32] | None) -> None:
    """onnx's inference does not know them: those of one type are, and others are not guessed."""
    model = parse(f"""{HEAD} {{ v = Relu(x) y = If <
        then_branch = one () => (float[A,B] t) {{
            a = com.microsoft.{op} b = Mul(a, a) c = Less(b, v) d = Shape(b) f = Where(c, b, b)
            h = Cast<to = 7>(a) s, r = Split(b) q = Transpose(r) t = Identity(f) }},
        else_branch = two () => (float[A,B] e) {{ e = Neg(x) }}> (p) }}""")
    facts = probe(model, None)
    assert [facts[name].dtype for name in "abfsrq"] == [kind] * 6
    assert (facts["c"].dtype, facts["d"].dtype, facts["h"].dtype) == (BOOL, I64, I64)


def test_types_of_an_if_inside_and_of_loops() -> None:
    model = parse("""g (float[N,4] x, bool p, int64 n) => (float[N,4] y) {
        y = If <then_branch = one () => (float[N,4] t) {
                    a = com.microsoft.FastGelu(x)
                    b = If <then_branch = three () => (c) { c = com.microsoft.Gelu(a) },
                            else_branch = four () => (d) { d = com.microsoft.FastGelu(a) }> (p)
                    u = Neg(b)
                    w, z = Loop <body = five (i, g, k) => (h, o, q) {
                        h = Identity(g) o = com.microsoft.QuickGelu(k) q = Shape(o) }> (n, p, u)
                    t = Abs(w) },
                else_branch = two () => (float[N,4] e) { e = Neg(x) }> (p) }""")
    facts = probe(model, None)
    assert all(facts[name].dtype == F32 for name in "abcdukowt")
    assert (facts["i"].dtype, facts["g"].dtype, facts["z"].dtype) == (I64, BOOL, I64)


def test_declared_shapes_inside_are_not_believed() -> None:
    """But those of the inputs are, and what follows from weights."""
    model = parse("""g (float[2,N] x) => (float[A,B] y) <float[7,7] v, float[5,2] w = {1,2,3,4,5,6,7,8,9,0}> {
        v = Neg(x) y = MatMul(w, v) }""")
    clone = inferred(model, {})
    shapes = {v.name: v.shape for node in clone.graph for v in node.outputs}
    assert shapes["v"] is not None and shapes["v"][0] == 2
    assert not isinstance(shapes["v"][1], int)
    assert shapes["y"] is not None and shapes["y"][0] == 5


def test_an_initializer_that_a_caller_can_override_is_no_constant() -> None:
    model = parse("""g (float[6] x, int64[2] s) => (float[A,B] y) <int64[2] s = {2, 3}> {
        y = Reshape(x, s) }""")
    shape = next(iter(inferred(model, {}).graph)).outputs[0].shape
    assert shape is None or not any(isinstance(dim, int) for dim in shape)


def test_a_failing_inference_is_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("onnx.shape_inference.infer_shapes", fail)
    model = body("a = FastGelu(v) b = Neg(v) t = Identity(b)")
    with caplog.at_level(logging.INFO):
        facts = probe(model, None)
    assert caplog.records == []
    assert facts["b"] == Fact(F32, None)


def test_sequences_have_no_facts() -> None:
    model = parse("""g (float[N,4] x) => (float[N,4] y) {
        s = SequenceConstruct(x, x) i = Constant<value = int64 {0}>() y = SequenceAt(s, i) }""")
    facts = probe(model, random_feed(model))
    assert "s" not in facts
    assert facts["y"] == Fact(F32, (3, 4))


def test_a_model_of_nothing_but_sequences() -> None:
    """An If tells only in ORT that it makes a sequence."""
    model = parse(
        "g (bool p) => (seq(float[N]) y) <float[2] w = {1, 2}> { y = If(p) "
        "<then_branch = one () => (seq(float[N]) t) { t = SequenceConstruct(w) }, "
        "else_branch = two () => (seq(float[N]) e) { e = SequenceConstruct(w, w) }> }"
    )
    facts = probe(model, {"p": np.array(True)})
    assert facts["p"] == Fact(BOOL, ())
    assert "y" not in facts
    with pytest.raises(ModelError, match="cannot run the model"):
        probe(model, {"p": np.zeros(3, bool)})


def test_the_model_is_left_alone() -> None:
    model = body(
        "a = MatMul(v, w) t = Relu(a)", weights="<float[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}>"
    )
    before = ir.to_onnx_text(model)
    probe(model, random_feed(model))
    assert ir.to_onnx_text(model) == before
