"""LowerAttention: three integer products and the attention behind them as ORT's integer attention."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from lowering import compiled, constant, op_types
from rewrites import assert_close, assert_same_interface, parse, run

from passes.lower_attention import LowerAttention
from qcompile.graph import io
from qcompile.run.probe import probe
from qcompile.step import Outcome, run_pass

HEADS, SIZE = 2, 4
WIDTH = HEADS * SIZE
PRODUCT = "com.microsoft.MatMulIntegerToFloat"
KEEP = "n = Cast<to = 1>(m) o = Sub(one, n) a = Mul(o, low) z = Unsqueeze(a, ones)"
MASKS = {
    "none": "g = Softmax<axis = -1>(s)",
    "added": f"{KEEP} t = Add(s, z) g = Softmax<axis = -1>(t)",
    "added first": f"{KEEP} t = Add(z, s) g = Softmax<axis = -1>(t)",
    "Where": "b = Cast<to = 9>(m) w = Unsqueeze(b, ones) z = Where(w, zero, lowest) t = Add(s, z) g = Softmax<axis = -1>(t)",
    "whole": "b = Cast<to = 9>(m) w = Unsqueeze(b, ones) e = Expand(w, square) z = Where(e, zero, lowest) t = Add(s, z) g = Softmax<axis = -1>(t)",
    "hidden": "b = Cast<to = 9>(m) c = Not(b) w = Unsqueeze(c, ones) t = Where(w, lowest, s) g = Softmax<axis = -1>(t)",
    "open": "b = Cast<to = 9>(m) w = Unsqueeze(b, ones) t = Where(w, s, lowest) g = Softmax<axis = -1>(t)",
}
SCALES = {
    "Mul": "r = MatMul(qt, kt) s = Mul(r, root)",
    "Div": "r = MatMul(qt, kt) s = Div(r, two)",
    "queries": "qs = Mul(qt, root) s = MatMul(qs, kt)",
    "both": "qs = Mul(qt, part) ks = Mul(kt, part) s = MatMul(qs, ks)",
    "another": "r = MatMul(qt, kt) s = Mul(r, part)",
    "nothing": "s = MatMul(qt, kt)",
}
KEYS = {
    "once": "kt = Transpose<perm = [0, 2, 3, 1]>(kr)",
    "twice": "ku = Transpose<perm = [0, 2, 1, 3]>(kr) kt = Transpose<perm = [0, 1, 3, 2]>(ku)",
}


def weights(rng: np.random.Generator, name: str, *, bias: bool, single: bool) -> str:
    codes = ", ".join(str(v) for v in rng.integers(-100, 100, WIDTH * WIDTH))
    scales = ", ".join(f"{v:.5f}" for v in rng.uniform(0.002, 0.01, 1 if single else WIDTH))
    zeros = ", ".join(["0"] * (1 if single else WIDTH))
    shape = "" if single else f"[{WIDTH}]"
    text = f"int8[{WIDTH},{WIDTH}] w{name} = {{{codes}}}, float{shape} f{name} = {{{scales}}}, int8{shape} z{name} = {{{zeros}}}"
    if bias:
        values = ", ".join(f"{v:.3f}" for v in rng.standard_normal(WIDTH))
        text += f", float[{WIDTH}] b{name} = {{{values}}}"
    return text


def text(
    mask: str = MASKS["none"], scale: str = SCALES["Mul"], keys: str = KEYS["once"], *, bias: bool = True, single: bool = False,
    after: str = "", outputs: str = "float[B,L,W] y", split: str = "[0, 0, 2, 4]", values: str = "vr",
) -> str:  # fmt: skip
    """One layer of self-attention behind a tensor that is quantized at run time."""
    rng = np.random.default_rng(3)
    declared = ", ".join(weights(rng, n, bias=bias, single=single) for n in "qkv")
    products = " ".join(
        f"{n}p = {PRODUCT}(xq, w{n}, xs, f{n}, xz, z{n}{f', b{n}' if bias else ''}) {n}r = Reshape({n}p, heads)" for n in "qkv"
    )  # fmt: skip
    body = (
        f"xq, xs, xz = DynamicQuantizeLinear(x) {products} qt = Transpose<perm = [0, 2, 1, 3]>(qr) {keys} "
        f"vt = Transpose<perm = [0, 2, 1, 3]>({values}) {scale} {mask} h = MatMul(g, vt) i = Transpose<perm = [0, 2, 1, 3]>(h) "
        f"y = Reshape(i, joined) {after}"
    )
    return (
        f"g (float[B,L,{WIDTH}] x, int64[B,L] m) => ({outputs}) <{declared}, "
        f"int64[4] heads = {{{split.strip('[]')}}}, int64[3] joined = {{0, 0, {WIDTH}}}, int64[2] ones = {{1, 2}}, int64[4] square = {{1, 1, 5, 1}}, "
        f"float root = {{0.5}}, float two = {{2}}, float part = {{0.7071}}, float one = {{1}}, float zero = {{0}}, "
        f"float low = {{-10000}}, float lowest = {{-3.4e38}}> {{ {body} }}"
    )


def feed(batch: int = 1, length: int = 5, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (batch, length))
    mask[:, 0] = 1
    x = rng.standard_normal((batch, length, WIDTH)).astype(np.float32)
    return {"x": x, "m": mask.astype(np.int64)}


def lowered(model: ir.Model) -> Outcome:
    return run_pass(LowerAttention(probe(model, feed())), model)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def check(source: str) -> ir.Model:
    """The pass finds the attention, and changes no number, for other batches and lengths as well; and is idempotent."""
    model = parse(source)
    before = model.clone()
    outcome = lowered(model)
    assert len(outcome.changed) == 1
    assert io.check(model) is None
    assert_same_interface(before, model)
    assert operators(model).count("QAttention") == 1
    assert not {"Softmax", "Transpose", "MatMul", "MatMulIntegerToFloat"} & set(operators(model))
    for given in (
        feed(),
        feed(1, 5, 1),
        *([] if "square" in source.partition("{ xq")[2] else [feed(3, 7), feed(2, 1)]),
    ):
        for level in ("off", "all"):
            assert_close(run(model, given, level), run(before, given), rtol=1e-4, atol=1e-5)
    again = ir.to_onnx_text(model)
    assert lowered(model).changed == []
    assert ir.to_onnx_text(model) == again
    return model


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks(mask: str) -> None:
    model = check(text(mask))
    node = next(n for n in model.graph if n.op_type == "QAttention")
    assert (node.inputs[5] is not None) == (mask != MASKS["none"])


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_scales(scale: str) -> None:
    model = check(text(MASKS["added"], scale))
    node = next(n for n in model.graph if n.op_type == "QAttention")
    assert ("scale" in node.attributes) == (
        scale in (SCALES["another"], SCALES["nothing"], SCALES["both"])
    )


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_weights(keys: str, *, bias: bool, single: bool) -> None:
    check(text(keys=keys, bias=bias, single=single))


def test_the_mask_of_two_layers_is_read_once() -> None:
    head, _, body = text(MASKS["added"]).partition("> { ")
    body = body.rpartition("}")[0]
    made = r"xq|xs|xz|[qkv][prt]|[rstghi]"
    second = re.sub(rf"\b({made})\b", r"\g<1>2", body.replace(KEEP, ""))
    second = second.replace("y =", "y2 =").replace("Linear(x)", "Linear(y)")
    model = parse(f"{head.replace('[B,L,W] y', '[B,L,W] y2')}> {{ {body} {second} }}")
    before = model.clone()
    assert len(lowered(model).changed) == 2
    assert operators(model).count("QAttention") == 2
    assert operators(model).count("Greater") == 1
    given = feed(2, 6)
    assert_close(run(model, given), run(before, given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (text(values="kr"), None),  # values that keys are made of: read twice
        (text(outputs="float[B,L,W] y, float[B,H,L,S] g"), None),
        (text(outputs="float[B,L,W] y, float[B,L,H,S] kr"), None),  # a cache
        (text(after="y2 = Relu(h)", outputs="float[B,L,W] y, float[B,H,L,S] y2"), "its result is not turned back"),
        (text("g = Softmax<axis = 1>(s)"), "the Softmax is not over keys"),
        (text("t = Add(s, root) g = Softmax<axis = -1>(t)"), None),
        (text(MASKS["added"].replace("low)", "two)")), None),  # no mask
        (text(MASKS["Where"].replace("zero, lowest", "one, lowest")), None),
        (text(MASKS["hidden"].replace("lowest", "low")), None),  # what is added to so small a number is seen
        (text(scale="r = MatMul(qt, kt) n1 = Neg(r) s = Mul(n1, root)"), None),
        (text(keys="kt = Transpose<perm = [0, 2, 3, 1]>(qr)"), None),
    ],
)  # fmt: skip
def test_refusals(source: str, reason: str | None) -> None:
    model = parse(source)
    before = ir.to_onnx_text(model)
    outcome = lowered(model)
    assert outcome.changed == []
    assert ir.to_onnx_text(model) == before
    assert list(outcome.skipped.values()) == ([] if reason is None else [reason])


def test_heads_of_another_size() -> None:
    check(text(split="[0, 0, 4, 2]", scale=SCALES["another"]))


def test_products_of_other_tensors() -> None:
    source = text().replace(
        "xq, xs, xz = Dyn",
        "x2 = Relu(x) xq2, xs2, xz2 = DynamicQuantizeLinear(x2) xq, xs, xz = Dyn",
    )
    source = source.replace("(xq, wk, xs, fk, xz", "(xq2, wk, xs2, fk, xz2")
    outcome = lowered(parse(source))
    assert list(outcome.skipped.values()) == ["queries, keys and values are not made of one tensor"]


@pytest.mark.parametrize("mask", ["none", "added", "whole"])
def test_an_empty_batch(mask: str) -> None:
    """QAttention ends the process for one, so that this runs in another."""
    source = text(MASKS[mask])
    code = (
        "import sys; sys.path[:0] = %r\n"
        "import numpy as np, test_lower_attention as t\n"
        "model = t.parse(%r); assert t.lowered(model).changed\n"
        "for level in ('off', 'all'):\n"
        "    given = {'x': np.zeros((0, 5, 8), np.float32), 'm': np.ones((0, 5), np.int64)}\n"
        "    assert t.run(model, given, level)[0].shape == (0, 5, 8)\n"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", code % (paths, source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("split", "joined"),
    [("[1, -1, 2, 4]", "0, 0"), ("[0, 5, 2, 4]", "0, 0"), ("[0, 0, 2, 4]", "1, -1")],
)
def test_a_batch_that_is_fixed_behind(split: str, joined: str) -> None:
    """Two samples of five are one of ten there: not what QAttention makes."""
    source = text(split=split).replace("joined = {0, 0", f"joined = {{{joined}")
    assert lowered(parse(source)).changed == []


def test_layers_side_by_side_share_nothing() -> None:
    """Of two encoders, each may have a batch of its own; the mask is one of all."""
    head, _, body = text(MASKS["hidden"]).partition("> { ")
    body = body.rpartition("}")[0]
    made = r"xq|xs|xz|[qkv][prt]|[rstgh]"
    second = re.sub(
        rf"\b({made})\b",
        r"\g<1>2",
        body.replace("b = Cast<to = 9>(m) c = Not(b) w = Unsqueeze(c, ones)", ""),
    )
    second = (
        re.sub(r"\bi\b", "i2", second).replace("y =", "y2 =").replace("Linear(x)", "Linear(x2)")
    )
    head = head.replace(
        f"float[B,L,{WIDTH}] x,", f"float[B,L,{WIDTH}] x, float[D,L,{WIDTH}] x2,"
    ).replace("[B,L,W] y", "[B,L,W] y, float[D,L,W] y2")
    model = parse(f"{head}> {{ {body} {second} }}")
    before = model.clone()
    given = {**feed(), "x2": feed(seed=4)["x"]}
    assert len(run_pass(LowerAttention(probe(model, given)), model).changed) == 2
    for sizes in ((1, 3), (3, 1)):
        given = {**feed(1), "x": feed(sizes[0])["x"], "x2": feed(sizes[1], seed=4)["x"]}
        for got, wanted in zip(run(model, given), run(before, given), strict=True):
            assert_close([got], [wanted], rtol=1e-4, atol=1e-5)


def test_a_whole_layer() -> None:
    """From the float model on: the codes of all three products in one kernel, and ORT runs it."""
    declared = ", ".join(constant(n, 64, 64, scale=0.1) for n in ("wq", "wk", "wv"))
    heads = " ".join(f"[{n}] {n}p = MatMul(x, w{n}) {n}r = Reshape({n}p, heads)" for n in "qkv")
    made = compiled(
        f"g (float[1,32,64] x) => (float[A,B,C] y) <{declared}, int64[4] heads = {{0, 0, 4, 16}}, int64[3] joined = {{0, 0, 64}}, "
        f"float root = {{0.25}}> {{ {heads} qt = Transpose<perm = [0, 2, 1, 3]>(qr) kt = Transpose<perm = [0, 2, 3, 1]>(kr) "
        "vt = Transpose<perm = [0, 2, 1, 3]>(vr) r = MatMul(qt, kt) s = Mul(r, root) g = Softmax<axis = -1>(s) h = MatMul(g, vt) "
        "i = Transpose<perm = [0, 2, 1, 3]>(h) y = Reshape(i, joined) }"
    )  # fmt: skip
    assert "QAttention" in op_types(made.fused)
    assert "QAttention" not in op_types(made.qdq)
    assert "MatMulIntegerToFloat" not in op_types(made.fused)
    given = made.feeds[0]
    wanted = run(made.prepared, given)[0]

    def wrong(model: ir.Model) -> float:
        return float(np.linalg.norm(run(model, given, "all")[0] - wanted) / np.linalg.norm(wanted))

    assert 0 < wrong(made.fused) <= wrong(made.qdq) < 0.1
