"""LowerDynamic, through `build`, against numpy and ONNX Runtime."""

import re

import numpy as np
import pytest
from lowering import Compiled, assert_lowered, compiled, constant, integer_ops, op_types
from rewrites import run

from qcompile.graph.edit import graphs

HEAD = "g (float[5,8] x) => (float[5,6] y)"
W = constant("w", 8, 6)
PORTABLE = ["DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul"]


def stored(made: Compiled, suffix: str = "_q") -> list[str]:
    """The initializers of the fused form whose names end so, in every graph."""
    names = [name for graph in graphs(made.fused) for name in graph.initializers]
    return [name for name in names if re.sub(r"_\d+$", "", name).endswith(suffix)]


MATMUL = {
    "alone": ("y = MatMul(x, w)", ""),
    "bias": ("t = MatMul(x, w) y = Add(t, b)", constant("b", 6)),
    "bias first": ("t = MatMul(x, w) y = Add(b, t)", constant("b", 6)),
    "bias (1, N)": ("t = MatMul(x, w) y = Add(t, b)", constant("b", 1, 6)),
    "relu behind": ("t = MatMul(x, w) u = Add(t, b) y = Relu(u)", constant("b", 6)),
}


@pytest.mark.parametrize("case", MATMUL)
def test_matmul(case: str) -> None:
    nodes, bias = MATMUL[case]
    made = compiled(f"{HEAD} <{', '.join(filter(None, (W, bias)))}> {{ {nodes} }}")
    assert_lowered(made)
    head = integer_ops(made.fused)[0]
    assert head == "DynamicQuantizeMatMul"
    assert "Add" not in op_types(made.fused)
    assert op_types(made.qdq)[:5] == PORTABLE[:2] + PORTABLE[2:]


GEMM = {
    "alone": ("Gemm(x, w)", W, ""),
    "transB": ("Gemm<transB = 1>(x, w)", constant("w", 6, 8), ""),
    "alpha": ("Gemm<alpha = 0.3>(x, w)", W, ""),
    "bias (N,)": ("Gemm(x, w, b)", W, constant("b", 6)),
    "bias (1, N)": ("Gemm(x, w, b)", W, constant("b", 1, 6)),
    "bias (M, N)": ("Gemm(x, w, b)", W, constant("b", 5, 6)),
    "bias (M, 1)": ("Gemm(x, w, b)", W, constant("b", 5, 1)),
    "bias ()": ("Gemm(x, w, b)", W, "float b = {3.5}"),
    "bias (1,)": ("Gemm(x, w, b)", W, "float[1] b = {3.5}"),
    "bias (1, 1)": ("Gemm(x, w, b)", W, "float[1,1] b = {3.5}"),
    "beta": ("Gemm<beta = 0.5>(x, w, b)", W, constant("b", 6)),
    "beta of (M, N)": ("Gemm<beta = -2.0>(x, w, b)", W, constant("b", 5, 6)),
    "beta 0": ("Gemm<beta = 0.0>(x, w, b)", W, constant("b", 6)),
    "beta 0 of (M, N)": ("Gemm<beta = 0.0>(x, w, b)", W, constant("b", 5, 6)),
    "all": ("Gemm<alpha = 2.0, beta = 0.5, transB = 1>(x, w, b)", constant("w", 6, 8), constant("b", 6)),
    "missing bias": ('Gemm<beta = 0.5>(x, w, "")', W, ""),
}  # fmt: skip


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("case", GEMM)
def test_gemm(case: str, inner: bool) -> None:
    op, weight, bias = GEMM[case]
    nodes = f"t = {op} y = Tanh(t)" if inner else f"y = {op}"
    made = compiled(f"{HEAD} <{', '.join(filter(None, (weight, bias)))}> {{ {nodes} }}", scale=0.1)
    assert_lowered(made)
    assert integer_ops(made.fused)[0] == "DynamicQuantizeMatMul"
    assert ("Add" in op_types(made.fused)) == (
        case in ("bias (M, N)", "bias (M, 1)", "beta of (M, N)")
    )
    assert "Gemm" not in op_types(made.qdq)


def test_a_gemm_that_is_returned_and_read() -> None:
    text = f"g (float[5,8] x) => (float[5,6] t, float[5,6] y) <{W}, {constant('b', 5, 6)}> {{ t = Gemm(x, w, b) y = Neg(t) }}"
    assert_lowered(compiled(text))


def test_a_bias_that_is_read_elsewhere() -> None:
    text = f"{HEAD} <{W}, {constant('b', 6)}> {{ t = MatMul(x, w) u = Add(t, b) y = Mul(u, b) }}"
    assert_lowered(compiled(text))


def test_a_product_that_is_read_beside_its_bias() -> None:
    text = f"{HEAD} <{W}, {constant('b', 6)}> {{ t = MatMul(x, w) u = Add(t, b) y = Add(u, t) }}"
    made = compiled(text)
    assert "Add" in op_types(made.fused)
    assert_lowered(made)


def test_more_dimensions() -> None:
    text = f"g (float[2,3,5,8] x) => (float[2,3,5,6] y) <{W}, {constant('b', 6)}> {{ t = MatMul(x, w) y = Add(t, b) }}"
    assert_lowered(compiled(text))


def test_names_of_tensors_stay() -> None:
    made = compiled(
        f"{HEAD} <{W}, {constant('b', 6)}> {{ t = MatMul(x, w) [add] u = Add(t, b) y = Tanh(u) }}"
    )
    for model in (made.qdq, made.fused):
        assert "u" in [value.name for node in model.graph for value in node.outputs]


def test_the_fused_node_keeps_the_name() -> None:
    made = compiled(f"{HEAD} <{W}> {{ [mine] y = MatMul(x, w) }}")
    assert [node.name for node in made.fused.graph] == ["mine"]


def test_three_products_of_one_input_quantize_it_once() -> None:
    text = f"""g (float[5,8] x) => (float[5,6] y) <{constant("q", 8, 6)}, {constant("k", 8, 6)}, {constant("v", 8, 6)}, {constant("b", 6)}> {{
        s = Sigmoid(x) q1 = MatMul(s, q) q2 = Add(q1, b) k1 = MatMul(s, k) v1 = MatMul(s, v)
        t = Mul(q2, k1) y = Add(t, v1) }}"""
    made = compiled(text, keep={})
    ops = integer_ops(made.fused)
    assert ops.count("DynamicQuantizeLinear") == 1
    assert ops.count("MatMulIntegerToFloat") == 3
    assert op_types(made.qdq).count("DynamicQuantizeLinear") == 1
    assert_lowered(made, fused=2.01)


def test_two_nodes_share_a_weight() -> None:
    text = f"g (float[5,8] x, float[5,8] z) => (float[5,6] y, float[5,6] u) <{W}> {{ y = MatMul(x, w) u = MatMul(z, w) }}"
    made = compiled(text)
    assert stored(made) == ["w_q"]
    assert_lowered(made)


def test_a_shared_weight_in_two_layouts() -> None:
    text = f"g (float[5,6] x) => (float[5,6] y) <{constant('w', 6, 6)}> {{ t = Gemm(x, w) y = Gemm<transB = 1>(t, w) }}"
    made = compiled(text)
    assert len(stored(made)) == 2
    assert_lowered(made, fused=2.01)


@pytest.mark.parametrize("order", [("1.0", "3.0"), ("3.0", "1.0"), ("3.0", "2.0")])
def test_a_shared_weight_with_different_factors(order: tuple[str, str]) -> None:
    """Codes are the same where alpha only scales; scales are not."""
    text = f"""g (float[5,8] x, float[5,8] z) => (float[5,6] y, float[5,6] u, float[5,6] v) <{W}> {{
        y = Gemm<alpha = {order[0]}>(x, w) u = Gemm<alpha = {order[1]}>(z, w) v = MatMul(z, w) }}"""
    assert_lowered(compiled(text))


def test_equal_codes_with_different_biases() -> None:
    text = f"""g (float[5,8] x, float[5,8] z) => (float[5,6] y, float[5,6] u) <{W}, {constant("b", 6)}, {constant("c", 6)}> {{
        y = Gemm(x, w, b) u = Gemm(z, w, c) }}"""
    made = compiled(text)
    assert stored(made) == ["w_q"]
    assert_lowered(made)


BODY = """g (float[5,8] x, bool c) => (float[5,6] y FACE) <{w}> {{ NODES
    y = If(c) <then_branch = a () => (float[5,6] p) STORED {{ THEN }},
               else_branch = b () => (float[5,6] q) {{ ELSE }}> }}"""


def check_bodies(made: Compiled) -> None:
    """The reference does not enter bodies: here the forms are compared with float."""
    for taken in (True, False):
        for feed in made.feeds:
            given = feed | {"c": np.array(taken)}
            wanted = run(made.prepared, given)
            exact = run(made.qdq, given)
            for model, level in (
                (made.qdq, "off"),
                (made.qdq, "all"),
                (made.fused, "off"),
                (made.fused, "all"),
            ):
                for got, want, plain in zip(run(model, given, level), exact, wanted, strict=True):
                    assert got.dtype == plain.dtype
                    assert np.abs(got - want).max() <= 0.01 * np.abs(plain).max()
                    accuracy = 0.06 if made.narrow else 0.03
                    assert np.abs(got - plain).max() <= accuracy * np.abs(plain).max()


def body(
    face: str = "",
    nodes: str = "",
    stored: str = "",
    then: str = "",
    other: str = "q = MatMul(x, w)",
) -> str:
    text = BODY.format(w=W).replace("FACE", face).replace("NODES", nodes).replace("STORED", stored)
    return text.replace("THEN", then).replace("ELSE", other)


TYPED = "float[5,8] s = {}"


def test_a_weight_of_the_outer_graph_in_both_bodies_and_outside() -> None:
    text = body(", float[5,6] z", "z = MatMul(x, w)", then="p = MatMul(x, w)")
    made = compiled(text)
    assert made.forms().keys() >= {"MatMul:p", "MatMul:q", "MatMul:z"}
    assert {made.forms()[name] for name in ("MatMul:p", "MatMul:q", "MatMul:z")} == {"dynamic"}
    assert stored(made) == ["w_q"]
    assert "w_q" in made.fused.graph.initializers
    check_bodies(made)


def test_a_weight_of_a_body() -> None:
    made = compiled(
        body(stored=f"<{constant('v', 8, 6)}>", then="p = MatMul(x, v)", other="q = MatMul(x, w)")
    )
    assert stored(made) == ["w_q", "v_q"]
    assert "v_q" not in made.fused.graph.initializers
    check_bodies(made)


def test_a_bias_in_a_body() -> None:
    made = compiled(
        body(
            stored=f"<{constant('b', 5, 6)}>",
            then="p = Gemm<beta = 0.5>(x, w, b)",
            other="q = Gemm<alpha = 2.0>(x, w)",
        )
    )
    check_bodies(made)


def test_two_products_in_a_body_quantize_their_input_there() -> None:
    made = compiled(body(then="h = MatMul(x, w) k = MatMul(x, w) p = Mul(h, k)"))
    inner = [
        node.op_type
        for graph in graphs(made.fused)
        if graph is not made.fused.graph
        for node in graph
    ]
    assert inner.count("DynamicQuantizeLinear") == 1
    assert inner.count("MatMulIntegerToFloat") == 2
    assert inner.count("DynamicQuantizeMatMul") == 1
    check_bodies(made)


@pytest.mark.parametrize("form", ["static", "dynamic"])
def test_an_integer_kernel_that_reads_the_result(form: str) -> None:
    """The result is a new value; who reads it, as codes or as an input to quantize, must know."""
    second = {
        "static": (constant("k", 4, 5, 1), "y = Conv(t, k)", "float[1,4,6]"),
        "dynamic": (constant("k", 6, 3), "y = MatMul(t, k)", "float[1,5,3]"),
    }[form]
    text = f"g (float[1,5,8] x) => ({second[2]} y) <{W}, {second[0]}> {{ t = MatMul(x, w) {second[1]} }}"
    made = compiled(text)
    assert_lowered(made, fused=2.01)
    assert "QLinearConv" in op_types(made.fused) or form == "dynamic"


def test_an_integer_kernel_that_makes_the_input() -> None:
    text = f"g (float[1,5,8] x) => (float[1,4,6] y) <{W}, {constant('k', 4, 5, 1)}> {{ t = Conv(x, k) y = MatMul(t, w) }}"
    made = compiled(text)
    assert_lowered(made, fused=2.01)
    assert integer_ops(made.fused) == ["QLinearConv", "DynamicQuantizeMatMul"]


def test_a_bias_that_raises_the_rank() -> None:
    """ORT 1.32 merges the Add into MatMulIntegerToFloat, and its result lacks a dimension."""
    text = f"g (float[5,8] x) => (float[1,5,6] y) <{W}, {constant('b', 1, 1, 6)}> {{ [mm] t = MatMul(x, w) y = Add(t, b) }}"
    made = compiled(text)
    assert made.forms()["mm"] == "float"
    assert_lowered(made)


def test_a_vector_times_a_matrix() -> None:
    text = f"g (float[8] x) => (float[6] y) <{W}> {{ y = MatMul(x, w) }}"
    assert_lowered(compiled(text))
