from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import assert_close, parse, run

from passes.fold_shapes import FoldShapes
from passes.group_heads import GroupHeads
from qcompile.graph.edit import drop_unread
from qcompile.run.session import Options, Session
from qcompile.step import run_pass
from qcompile.verify.kernels import optimized

REPEAT = """su{0} = Shape({0}) zb{0} = Slice(su{0}, zero, one) zs{0} = Slice(su{0}, two, three)
    e{0} = Concat<axis = 0>(zb{0}, heads, copies, zs{0}, size) r{0} = Concat<axis = 0>(zb{0}, all, zs{0}, size)
    n{0} = Unsqueeze({0}, two) x{0} = Expand(n{0}, e{0}) [repeat{0}] w{0} = Reshape(x{0}, r{0})"""
NUMBERS = (
    "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[1] heads = {2}, "
    "int64[1] copies = {3}, int64[1] all = {6}, int64[1] size = {4}, float scale = {0.5}"
)
ATTENTION = f"""{REPEAT.format("k")} {REPEAT.format("v")}
    kt = Transpose<perm = [0, 1, 3, 2]>(wk) [scores] a = MatMul(q, kt) m = Mul(a, scale) p = Softmax<axis = 3>(m) [context] y = MatMul(p, wv)"""
HEAD = "g (float[b,6,t,4] q, float[b,2,s,4] k, float[b,2,s,4] v) => (float[b,6,t,4] y)"


def feed(batch: int = 2, t: int = 3, s: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"q": (batch, 6, t, 4), "k": (batch, 2, s, 4), "v": (batch, 2, s, 4)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def rewritten(text: str) -> tuple[ir.Model, list[str]]:
    model = parse(text)
    outcome = run_pass(GroupHeads(), model)
    drop_unread(model)
    return model, outcome.changed


def test_attention_reads_its_heads_once() -> None:
    text = f"{HEAD} <{NUMBERS}> {{ {ATTENTION} }}"
    model, changed = rewritten(text)
    assert changed == ["scores", "context"]
    assert Counter(node.op_type for node in model.graph) == {
        "Reshape": 4, "Transpose": 1, "MatMul": 2, "Mul": 3, "Softmax": 1, "Shape": 2, "Gather": 2, "Concat": 4,
    }  # fmt: skip
    for sizes in ((2, 3, 5), (1, 1, 9), (1, 4, 1), (0, 3, 5), (2, 0, 5)):
        assert_close(run(model, feed(*sizes)), run(parse(text), feed(*sizes)))
    assert run_pass(GroupHeads(), model).changed == []


def test_no_keys_at_all() -> None:
    """Sums of nothing are 0; -1 in the shape of what is empty would end the run."""
    repeat = REPEAT.replace(
        "r{0} = Concat<axis = 0>(zb{0}, all, zs{0}, size)",
        "r{0} = Concat<axis = 0>(zb{0}, all, minus, size)",
    )
    body = ATTENTION
    for name in ("k", "v"):
        body = body.replace(REPEAT.format(name), repeat.format(name))
    text = f"{HEAD} <{NUMBERS}, int64[1] minus = {{-1}}> {{ {body} }}"
    model, changed = rewritten(text)
    assert changed == ["scores", "context"]
    assert_close(run(model, feed()), run(parse(text), feed()))
    assert_close(run(model, feed(s=0)), run(parse(text), feed(s=0)))


def test_ort_still_merges_scale_and_transpose_with_the_product() -> None:
    model, _ = rewritten(f"{HEAD} <{NUMBERS}> {{ {ATTENTION} }}")
    run_pass(FoldShapes(), model)
    kinds = Counter(node.op_type for node in optimized(model, Options("all")).graph)
    assert kinds["FusedMatMul"] == 1
    assert kinds["Transpose"] == kinds["Mul"] == 0


def test_caches_as_a_decoder_has_them() -> None:
    """The heads are a cache and what is new; the sizes that are repeated come from what it returns."""
    text = f"""g (float[b,6,t,4] q, float[b,2,c,4] past, float[b,2,t,4] new, float[b,2,s,4] v) => (float[b,6,t,4] y, float[b,2,s,4] k)
        <{NUMBERS}> {{ k = Concat<axis = 2>(past, new) {ATTENTION} }}"""
    model, changed = rewritten(text)
    assert changed == ["scores", "context"]
    given = feed(t=3, s=8)
    given |= {"past": given["k"][:, :, :5], "new": given.pop("k")[:, :, 5:]}
    assert_close(run(model, given), run(parse(text), given))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x{0} = Expand(n{0}, e{0})", "x{0} = Expand(n{0}, e{0}) o{0} = Identity(x{0})"),
        ("n{0} = Unsqueeze({0}, two)", "n{0} = Unsqueeze({0}, one)"),  # copies of all heads, one set after the other
    ],
)  # fmt: skip
def test_other_orders_of_copies(old: str, new: str) -> None:
    repeat = REPEAT.replace(old, new)
    if "Identity" in new:
        repeat = repeat.replace("Reshape(x{0}", "Reshape(o{0}")
    else:
        repeat = repeat.replace("heads, copies", "copies, heads")
    body = ATTENTION.replace(REPEAT.format("k"), repeat.format("k")).replace(
        REPEAT.format("v"), repeat.format("v")
    )
    text = f"{HEAD} <{NUMBERS}> {{ {body} }}"
    model, changed = rewritten(text)
    assert changed == []
    assert_close(run(model, feed()), run(parse(text), feed()))


def test_rows_of_unknown_heads() -> None:
    text = f"{HEAD.replace('float[b,6,t,4] q', 'float[b,n,t,4] q')} <{NUMBERS}> {{ {ATTENTION} }}"
    model = parse(text)
    outcome = run_pass(GroupHeads(), model)
    assert outcome.skipped["scores"] == "its queries are not known to have as many heads"
    one = feed() | {"q": feed()["q"][:, :1]}  # one head of queries for all: it is broadcast
    assert_close(run(model, one), run(parse(text), one))


def test_copies_that_are_read_elsewhere_too() -> None:
    text = f"{HEAD[:-1]}, float[b,6,s,4] z) <{NUMBERS}> {{ {ATTENTION} z = Neg(wk) }}"
    model, changed = rewritten(text)
    assert changed == ["scores", "context"]
    assert Counter(node.op_type for node in model.graph)["Expand"] == 1
    assert_close(run(model, feed()), run(parse(text), feed()))


def test_a_product_that_is_returned() -> None:
    text = f"""g (float[b,6,t,4] q, float[b,2,s,4] k) => (float[b,6,t,s] a) <{NUMBERS}> {{ {REPEAT.format("k")}
        kt = Transpose<perm = [0, 1, 3, 2]>(wk) [scores] a = MatMul(q, kt) }}"""
    model, changed = rewritten(text)
    assert changed == ["scores"]
    assert [value.name for value in model.graph.outputs] == ["a"]
    given = {name: value for name, value in feed().items() if name != "v"}
    assert_close(run(model, given), run(parse(text), given))
    assert Session(model, Options("off")).outputs[0].shape == ("b", 6, "t", "s")
