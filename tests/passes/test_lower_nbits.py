"""LowerNbits: graphs before and after, refusals, sharing, and results in ONNX Runtime.

Models have float weights that are exactly those of few bits (`snapped`), so that both compute the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from few_bits import blocked, lowered, named, narrow, ops, snapped, stored
from lowering import constant
from rewrites import assert_close, random_feed, run

from passes.lower_nbits import Form, LowerNbits
from qcompile.errors import ModelError
from qcompile.graph import io
from qcompile.graph.edit import nodes
from qcompile.graph.linear import find_linears
from qcompile.run.session import Options, Session
from qcompile.solve.payload import Deferred
from qcompile.step import run_pass

FORMS: tuple[Form, ...] = ("nbits", "portable")
W = constant("w", 32, 24)  # (K, N)
E = constant("e", 24, 32)  # (N, K)


PRODUCTS = {
    "matmul": (f"(float[2,3,32] x) => (float[2,3,24] y) <{W}>", "y = MatMul(x, w)", ["MatMulNBits"]),
    "constant_node": ("(float[3,16] x) => (float[3,2] y)", f"w = Constant<value = {constant('', 16, 2).replace(' =', '')}>() y = MatMul(x, w)", ["MatMulNBits"]),
    "identity": (f"(float[3,32] x) => (float[3,24] y) <{W}>", "v = Identity(w) y = MatMul(x, v)", ["MatMulNBits"]),
    "transpose": (f"(float[3,32] x) => (float[3,24] y) <{E}>", "v = Transpose<perm = [1, 0]>(e) y = MatMul(x, v)", ["MatMulNBits"]),
    "reshape": (f"(float[3,32] x) => (float[3,24] y) <{constant('w', 2, 16, 24)}, int64[2] s = {{-1, 24}}>", "v = Reshape(w, s) y = MatMul(x, v)", ["MatMulNBits"]),
    "matmul_add": (f"(float[3,32] x) => (float[3,24] y) <{W}, {constant('b', 24)}>", "p = MatMul(x, w) y = Add(b, p)", ["MatMulNBits"]),
    "matmul_add_row": (f"(float[3,32] x) => (float[3,24] y) <{W}, {constant('b', 1, 24)}>", "p = MatMul(x, w) y = Add(p, b)", ["MatMulNBits", "Add"]),
    "matmul_add_number": (f"(float[3,32] x) => (float[3,24] y) <{W}, {constant('b')}>", "p = MatMul(x, w) y = Add(p, b)", ["MatMulNBits", "Add"]),
    "matmul_add_input": (f"(float[3,32] x, float[24] b) => (float[3,24] y) <{W}>", "p = MatMul(x, w) y = Add(p, b)", ["MatMulNBits", "Add"]),
    "first_operand": (f"(float[32,3] x) => (float[24,3] y) <{E}>", "y = MatMul(e, x)", ["Transpose", "MatMulNBits", "Transpose"]),
    "gemm": (f"(float[3,32] x) => (float[3,24] y) <{W}>", "y = Gemm(x, w)", ["MatMulNBits"]),
    "gemm_all": (f"(float[32,3] x) => (float[3,24] y) <{E}, {constant('c', 24)}>", "y = Gemm<alpha = 0.5, beta = 2.0, transA = 1, transB = 1>(x, e, c)", ["Transpose", "MatMulNBits"]),
    "gemm_beta_0": (f"(float[3,32] x) => (float[3,24] y) <{W}, {constant('c', 24)}>", "y = Gemm<beta = 0.0>(x, w, c)", ["MatMulNBits"]),
    "gemm_bias_1": (f"(float[3,32] x) => (float[3,24] y) <{E}, {constant('c', 1)}>", "y = Gemm<transB = 1>(x, e, c)", ["MatMulNBits"]),
    "gemm_bias_number": (f"(float[3,32] x) => (float[3,24] y) <{E}, {constant('c')}>", "y = Gemm<transB = 1, beta = 3.0>(x, e, c)", ["MatMulNBits"]),
    "gemm_bias_mn": (f"(float[3,32] x) => (float[3,24] y) <{W}, {constant('c', 3, 24)}>", "y = Gemm<beta = 0.5>(x, w, c)", ["MatMulNBits", "Add"]),
    "gemm_bias_m1": (f"(float[3,32] x) => (float[3,24] y) <{W}, {constant('c', 3, 1)}>", "y = Gemm(x, w, c)", ["MatMulNBits", "Add"]),
    "gemm_no_bias": (f"(float[3,32] x) => (float[3,24] y) <{W}>", 'y = Gemm(x, w, "")', ["MatMulNBits"]),
    "conv_no_bias": (f"(float[1,32,5] x) => (float[1,24,5] y) <{constant('w', 24, 32, 1)}>", 'y = Conv(x, w, "")', ["Transpose", "MatMulNBits", "Transpose"]),
    "conv_bias_input": (f"(float[1,32,5] x, float[24] b) => (float[1,24,5] y) <{constant('w', 24, 32, 1)}>", "y = Conv(x, w, b)", ["Transpose", "MatMulNBits", "Add", "Transpose"]),
    "gemm_bias_input": (f"(float[3,32] x, float[24] c) => (float[3,24] y) <{W}>", "y = Gemm<beta = 2.0>(x, w, c)", ["Mul", "MatMulNBits", "Add"]),
    "einsum": (f"(float[2,3,32] x) => (float[2,3,24] y) <{W}>", 'y = Einsum<equation = "bsk,kn->bsn">(x, w)', ["MatMulNBits"]),
    "einsum_first": (f"(float[2,3,32] x) => (float[2,3,24] y) <{E}>", 'y = Einsum<equation = "nk, ...k -> ...n">(e, x)', ["MatMulNBits"]),
    "einsum_heads": (f"(float[2,32] x) => (float[2,6,4] y) <{constant('w', 32, 4, 6)}>", 'y = Einsum<equation = "bk,khd->bdh">(x, w)', ["MatMulNBits", "Reshape"]),
    "einsum_out": (f"(float[2,3,4,8] x) => (float[2,3,24] y) <{constant('w', 4, 8, 24)}>", 'y = Einsum<equation = "bshd,hdn->bsn">(x, w)', ["Reshape", "MatMulNBits"]),
    "conv": (f"(float[2,32,3,5] x) => (float[2,24,3,5] y) <{constant('w', 24, 32, 1, 1)}, {constant('b', 24)}>", "y = Conv(x, w, b)", ["Transpose", "MatMulNBits", "Transpose"]),
    "conv_1d": (f"(float[2,32,5] x) => (float[2,24,5] y) <{constant('w', 24, 32, 1)}>", "y = Conv(x, w)", ["Transpose", "MatMulNBits", "Transpose"]),
    "gather": (f"(int64[2,3] i) => (float[2,3,32] y) <{E}>", "y = Gather(e, i)", ["GatherBlockQuantized"]),
}  # fmt: skip


def portable(kinds: list[str]) -> list[str]:
    return [kind for kind in kinds if kind not in ("MatMulNBits", "GatherBlockQuantized")]


@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_nbits(case: str, *, symmetric: bool) -> None:
    face, body, wanted = PRODUCTS[case]
    model, outcome = lowered(f"g {face} {{ {body} }}", symmetric=symmetric)
    assert ops(model) == wanted
    assert len(outcome.changed) == 1
    assert not stored(model) & {"w", "e", "s"}
    assert model.graph.opset_imports["com.microsoft"] == 1


@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_portable(case: str, *, symmetric: bool) -> None:
    face, body, wanted = PRODUCTS[case]
    model, _ = lowered(f"g {face} {{ {body} }}", "portable", bits=8, symmetric=symmetric)
    if "gather" not in case:
        core = wanted.index("MatMulNBits")
        found = ops(model)
        assert found[: core + 2] == [*wanted[:core], "DequantizeLinear", "MatMul"]
    assert not stored(model) & {"w", "e", "s"}
    assert {node.domain for node in nodes(model)} == {""}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 48, 256, 0])
@pytest.mark.parametrize(("depth", "rows"), [(32, 5), (72, 1), (17, 3)])
def test_bits_and_blocks(form: Form, bits: int, block: int, depth: int, rows: int) -> None:
    rows *= 4 if form == "portable" and bits == 2 else 1  # or it is refused
    text = f"g (float[3,{depth}] x) => (float[3,{rows}] y) <{constant('w', depth, rows)}> {{ y = MatMul(x, w) }}"
    for symmetric in (True, False):
        lowered(
            text,
            form,
            bits=bits,
            block=block,
            symmetric=symmetric,
            opset=25 if form == "portable" else 21,
        )


@pytest.mark.parametrize(("bits", "depth"), [(2, 32), (4, 40), (4, 33), (8, 33), (3, 17), (2, 17)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_lookups_of_any_width(bits: int, depth: int, *, symmetric: bool) -> None:
    text = f"g (int64[2,3] i) => (float[2,3,{depth}] y) <{constant('e', 9, depth)}> {{ y = Gather(e, i) }}"
    model, _ = lowered(text, bits=bits, symmetric=symmetric)
    whole = depth * (4 if bits == 3 else bits) % 8 == 0
    assert ops(model) == ["GatherBlockQuantized"] if whole else ["GatherBlockQuantized", "Slice"]


@pytest.mark.parametrize("ids", ["int64 i", "int32[4] i", "int64[2,1,3] i"])
@pytest.mark.parametrize("depth", [32, 40])
def test_portable_lookups(ids: str, depth: int) -> None:
    dims = ids.partition("[")[2].partition("]")[0]
    text = f"g ({ids}) => (float[{f'{dims},' if dims else ''}{depth}] y) <{constant('e', 9, depth)}> {{ y = Gather(e, i) }}"
    for symmetric in (True, False):
        lowered(text, "portable", bits=8, symmetric=symmetric)


HALF = f"g (float[3,32] x) => (float[3,24] y) <{W}, {constant('b', 24)}> {{ p = MatMul(x, w) y = Add(p, b) }}"


@pytest.mark.parametrize("form", FORMS)
def test_half_floats(form: Form) -> None:
    model = narrow(HALF, ir.DataType.FLOAT16, "x", "w", "b", "y")
    lowered(
        model, form, rtol=4e-3, atol=4e-3
    )  # float16 has 11 digits, and some kernels round partial sums to it
    assert model.graph.initializers["w_scale"].dtype == ir.DataType.FLOAT16
    assert ("Add" in ops(model)) == (form == "portable")


@pytest.mark.parametrize("kind", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_weights_cast_from_a_narrower_type(kind: ir.DataType) -> None:
    text = f"g (float[3,32] x) => (float[3,24] y) <{W}> {{ v = Cast<to = 1>(w) y = MatMul(x, v) }}"
    model, _ = lowered(narrow(text, kind, "w"))
    assert ops(model) == ["MatMulNBits"]
    assert stored(model) == {"w_q", "w_scale"}


def test_bfloat16_activations_are_refused() -> None:
    model = narrow(HALF, ir.DataType.BFLOAT16, "x", "w", "b", "y")
    (item,) = find_linears(model)
    assert item.reason is not None
    assert "BFLOAT16" in item.reason


def test_a_scale_that_float16_cannot_hold() -> None:
    model = narrow(HALF, ir.DataType.FLOAT16, "x", "w", "b", "y")
    (item,) = find_linears(model)
    tiny = blocked(item.read())
    tiny.scale[2, 0] = 1e-12
    outcome = run_pass(LowerNbits({item.name: tiny}), model)
    assert outcome.changed == []
    assert "float16" in outcome.skipped[item.name]
    run_pass(LowerNbits({item.name: Deferred(4, 16, symmetric=True, make=lambda: tiny)}), model)
    with pytest.raises(ModelError, match="float16"):
        tensor(model, "w_scale")


def tensor(model: ir.Model, name: str) -> np.ndarray:
    held = model.graph.initializers[name].const_value
    assert held is not None
    return held.numpy()


def test_lookups_from_the_end() -> None:
    text = f"g (int64[3] i) => (float[3,32] y) <{E}> {{ y = Gather(e, i) }}"
    for form in FORMS:
        lowered(text, form, bits=8, given={"i": np.array([-1, -24, 3])})


def test_a_product_that_is_an_output_keeps_its_add() -> None:
    text = f"""g (float[3,32] x) => (float[3,24] p, float[3,24] y) <{W}, {constant("b", 24)}>
        {{ p = MatMul(x, w) y = Add(p, b) }}"""
    model, _ = lowered(text)
    assert ops(model) == ["MatMulNBits", "Add"]


def test_an_add_in_another_graph_stays() -> None:
    text = f"""g (float[3,32] x, bool c) => (float[3,24] y) <{W}, {constant("b", 24)}> {{ p = MatMul(x, w)
        y = If(c) <then_branch = a () => (float[3,24] s) {{ s = Add(p, b) }},
                   else_branch = d () => (float[3,24] t) {{ t = Neg(b2) }}> }}""".replace(
        "Neg(b2)", "Expand(b, n)"
    )
    text = text.replace(constant("b", 24), f"{constant('b', 24)}, int64[2] n = {{3, 24}}")
    model, _ = lowered(text, given={"c": np.array(True)})
    assert ops(model)[0] == "MatMulNBits"
    assert "Add" in ops(model)


def test_a_bias_that_may_add_axes_stays() -> None:
    text = f"g (float[3,32] x) => (float[1,3,24] y) <{W}, {constant('b', 1, 1, 24)}> {{ p = MatMul(x, w) y = Add(p, b) }}"
    model, _ = lowered(text)
    assert ops(model) == ["MatMulNBits", "Add"]


def test_nodes_without_weights_are_left_alone() -> None:
    text = f"g (float[3,32] x) => (float[3,24] y, float[3,24] z) <{W}> {{ y = MatMul(x, w) z = MatMul(x, w) }}"
    model = named(text)
    first, second = find_linears(model)
    outcome = run_pass(LowerNbits({first.name: blocked(first.read())}), model)
    assert (outcome.changed, outcome.skipped) == ([first.name], {})
    assert ops(model) == ["MatMulNBits", "MatMul"]
    assert second.node.inputs[1] is model.graph.initializers["w"]


@pytest.mark.parametrize("form", FORMS)
def test_eight_bit_activations_come_close(form: Form) -> None:
    """Accuracy level 4, which ORT chooses for the portable form by itself: 1 part in 254 of the greatest of a block."""
    text = (
        f"g (float[16,128] x) => (float[16,64] y) <{constant('w', 128, 64)}> {{ y = MatMul(x, w) }}"
    )
    model = named(text)
    weights = snapped(model, block=32)
    feed = random_feed(model)
    (wanted,) = run(model, feed)
    run_pass(LowerNbits(weights, form), model)
    (got,) = run(model, feed, "all")
    noise = np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))
    assert 1e-4 < noise < 1e-2


@pytest.mark.parametrize(
    ("depth", "rows", "block"), [(64, 7, 16), (72, 8, 16), (40, 3, 32), (1024, 4, 512)]
)
@pytest.mark.parametrize("form", FORMS)
def test_odd_shapes(form: Form, depth: int, rows: int, block: int) -> None:
    """O19: with and without optimization."""
    text = f"g (float[3,{depth}] x) => (float[3,{rows}] y) <{constant('w', depth, rows)}> {{ y = MatMul(x, w) }}"
    lowered(text, form, block=block)


@pytest.mark.parametrize("bits", [4, 8])
def test_ort_fuses_the_portable_form(tmp_path: Path, bits: int) -> None:
    """Also where two nodes read one payload, and with a bias; accuracy level 1 keeps the floats."""
    text = f"""g (float[3,32] x, float[2,32] z) => (float[3,24] y, float[2,24] u) <{W}, {constant("b", 24)}> {{
        p = MatMul(x, w) y = Add(p, b) u = MatMul(z, w) }}"""
    model = named(text)
    weights, feed = snapped(model, bits, 32), random_feed(model)
    wanted = run(model, feed)
    run_pass(LowerNbits(weights, "portable"), model)
    path = tmp_path / "optimized.onnx"
    config = (("session.qdq_matmulnbits_accuracy_level", "1"),)
    session = Session(model, Options("extended", threads=1, optimized=path, config=config))
    assert [node.op_type for node in io.load(path).graph] == ["MatMulNBits", "MatMulNBits"]
    assert_close(session.run(feed), wanted, rtol=1e-5, atol=1e-6)
