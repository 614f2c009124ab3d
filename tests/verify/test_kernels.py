"""Verdicts on hand-made optimized graphs, and on what ORT makes of real ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from lowering import Compiled, compiled, constant, eager
from rewrites import parse

from qcompile.graph import io
from qcompile.plan.make import find_candidates
from qcompile.plan.plan import Form, NodePlan, Plan
from qcompile.run.probe import Fact
from qcompile.run.session import Options
from qcompile.verify.kernels import Kernels, Verdict, optimized, verdicts

K = constant("k", 4, 4, 3, 3)
NET = parse(
    f"g (float[1,4,6,6] x, int64[3] i) => (float[1,4,6,6] y, float[3,6] z) <{K}, {constant('m', 16, 6)}, {constant('t', 600, 16)}> "
    "{ [conv] a = Conv<pads = [1, 1, 1, 1]>(x, k) [gate] y = Sigmoid(a) [rows] r = Gather(t, i) [product] z = MatMul(r, m) }"
)


def plan(**forms: Form) -> Plan:
    ops = {node.name or "": node.op_type for node in NET.graph}
    return Plan("t", "a", tuple(NodePlan(n, op, forms.get(n, Form.FLOAT)) for n, op in ops.items()))


def judged(
    optimized_nodes: str, built_nodes: str = "y = Neg(x)", constants: str = "", **forms: Form
) -> Kernels:
    """What is said of a graph that ORT is pretended to run."""
    facts = {name: Fact(np.dtype(np.float32), None) for name in "xayrz"}
    found = find_candidates(NET, eager(), facts)
    head = f"g (float[1,4,6,6] x) => (float[1,4,6,6] y) <float s = {{1}}, uint8 p = {{0}}, int8[4,4,3,3] k_q = {{{', '.join(['1'] * 144)}}}, int8[16,6] m_q = {{{', '.join(['1'] * 96)}}} {constants}>"
    graph = parse(f"{head} {{ {optimized_nodes} }}")
    built = parse(f"{head} {{ {built_nodes} }}")
    return verdicts(graph, built, plan(**forms), found)


QLINEAR = "com.microsoft.QLinearConv"
TABLE = {
    "by name": (f"[conv] c = {QLINEAR}(x, s, p, w, s, p, s, p) y = DequantizeLinear(c, s, p)", "integer", "QLinearConv"),
    "by the name that ORT appends to": (f"[conv_nchwc] y = {QLINEAR}(x, s, p, w, s, p, s, p)", "integer", "QLinearConv"),
    "by the token that ORT appends": (f"[conv_token_12] y = {QLINEAR}(x, s, p, w, s, p, s, p)", "integer", "QLinearConv"),
    "by its codes": (f"[other] y = {QLINEAR}(x, s, p, k_q, s, p, s, p)", "integer", "QLinearConv"),
    "float": ("[conv] y = Conv(x, w)", "float", "Conv"),
    "fused, but float": ("[conv] y = com.microsoft.FusedConv(x, w)", "float", "FusedConv"),
    "its input is dequantized": ("d = DequantizeLinear(x, s, p) [conv] y = Conv(d, w)", "leftover", "Conv"),
    "its weight is dequantized": ("d = DequantizeLinear(k_q, s, p) [other] y = Conv(x, d)", "leftover", "DequantizeLinear"),
    "gone": ("y = Neg(x)", "integer", "merged"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_convolution(name: str) -> None:
    nodes, verdict, kernel = TABLE[name]
    weight = f", {constant('w', 4, 4, 3, 3)}"
    found = judged(nodes, constants=weight, conv=Form.STATIC)
    (row,) = found.nodes
    assert (row.node, row.op, row.form) == ("conv", "Conv", "static")
    assert (row.verdict, row.kernel) == (verdict, kernel)
    assert bool(row.why) == (verdict != "integer" or kernel == "merged")
    assert found.missed == ([] if verdict == "integer" else [row])


def test_what_was_planned_float_is_not_judged() -> None:
    assert judged("[conv] y = Conv(x, x)").nodes == ()


def test_counts_over_the_whole_graph() -> None:
    found = judged(
        f"a = QuantizeLinear(x, s, p) b = {QLINEAR}(a, s, p, a, s, p, s, p) c = DequantizeLinear(b, s, p) "
        "d, e, f = DynamicQuantizeLinear(c) g = com.microsoft.FusedConv(c, c) h = MatMul(g, g) "
        "i = com.microsoft.MatMulIntegerToFloat(d, a, e, s) y = com.microsoft.QLinearAdd(i, s, p, h, s, p, s, p)"
    )
    assert (found.integer, found.float, found.leftover_qdq) == (3, 2, 3)
    assert found.operators["QuantizeLinear"] == 1
    assert sum(found.operators.values()) == 8


def test_bodies_count_too() -> None:
    found = judged(
        "c = Cast<to = 9>(s) y = If <then_branch = one () => (float[1,4,6,6] t) { [conv] t = Conv(x, x) }, "
        "else_branch = two () => (float[1,4,6,6] e) { e = MatMul(x, x) }> (c)", conv=Form.STATIC,
    )  # fmt: skip
    assert found.float == 2
    assert [row.verdict for row in found.nodes] == ["float"]


def test_a_lookup_of_rows() -> None:
    (row,) = judged("d = DequantizeLinear(x, s, p) [rows] y = Mul(d, s)", rows=Form.WEIGHT).nodes
    assert row.verdict == "leftover"
    (row,) = judged("[rows] y = Mul(x, s)", rows=Form.WEIGHT).nodes
    assert (row.verdict, row.why) == ("integer", "8-bit rows")
    (row,) = judged(
        "[rows] y = com.microsoft.GatherBlockQuantized(x, x, s)", rows=Form.WEIGHT
    ).nodes
    assert (row.verdict, row.kernel) == ("integer", "GatherBlockQuantized")


def test_codes_that_two_nodes_share_tell_nothing() -> None:
    """One of them runs as integer, the other does not."""
    model = parse(
        f"g (float[1,4,6,6] x) => (float[1,4,6,6] y) <{K}> {{ [conv] a = Conv(x, k) [next] y = Conv(a, k) }}"
    )
    facts = {name: Fact(np.dtype(np.float32), None) for name in "xay"}
    found = find_candidates(model, eager(), facts)
    entries = tuple(NodePlan(name, "Conv", Form.STATIC) for name in ("conv", "next"))
    head = f"g (float[1,4,6,6] x) => (float[1,4,6,6] y) <float s = {{1}}, uint8 p = {{0}}, {K}, int8[4,4,3,3] k_q = {{{', '.join(['1'] * 144)}}}>"
    ran = parse(
        f"{head} {{ [conv] a = {QLINEAR}(x, s, p, k_q, s, p, s, p) [next] y = Conv(a, k) }}"
    )
    rows = verdicts(ran, ran, Plan("t", "a", entries), found).nodes
    assert [(row.node, row.verdict) for row in rows] == [("conv", "integer"), ("next", "float")]


# ---- real ones


REAL = f"""g (float[1,4,6,6] x, float[5,16] v) => (float[1,4,6,6] y, float[5,6] z) <{K}, {constant("b", 4)}, {constant("m", 16, 6)}> {{
    [conv] a = Conv<pads = [1, 1, 1, 1]>(x, k, b) [relu] r = Relu(a) [gate] g = Sigmoid(r) [mul] y = Mul(r, g)
    [product] z = MatMul(v, m) }}"""


@pytest.fixture(scope="module")
def made() -> Compiled:
    return compiled(REAL)


def seen(made: Compiled, form: str, level: str) -> Kernels:
    found = find_candidates(made.prepared, made.target, made.facts)
    model = made.fused if form == "fused" else made.qdq
    return verdicts(optimized(model, Options(level, threads=1)), model, made.plan, found)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["fused", "qdq"])
def test_all_of_it_is_integer(made: Compiled, form: str) -> None:
    found = seen(made, form, "all")
    assert found.missed == []
    assert {row.node: row.kernel for row in found.nodes} == {
        "conv": "QLinearConv", "gate": "QLinearSigmoid", "mul": "QLinearMul", "product": "DynamicQuantizeMatMul",
    }  # fmt: skip
    assert (found.float, found.leftover_qdq) == (0, 2)  # one at the input, one at the output


def test_without_fusion_the_portable_form_is_left_over(made: Compiled) -> None:
    """At `basic` ORT runs Q and DQ around float kernels: the verdicts say so."""
    found = seen(made, "qdq", "basic")
    assert {row.node: row.verdict for row in found.missed} == dict.fromkeys(
        ["conv", "gate", "mul"], "leftover"
    )
    assert found.leftover_qdq > 6
    assert all(isinstance(row, Verdict) and row.why for row in found.missed)


def test_a_weight_that_two_nodes_share() -> None:
    """Its codes cannot tell them apart; their names do."""
    shared = compiled(
        f"g (float[1,4,6,6] x) => (float[1,4,6,6] y) <{K}> "
        "{ [one] a = Conv<pads = [1, 1, 1, 1]>(x, k) [two] y = Conv<pads = [1, 1, 1, 1]>(a, k) }"
    )
    for form in ("fused", "qdq"):
        found = seen(shared, form, "all")
        assert [(row.node, row.kernel) for row in found.nodes] == [
            ("one", "QLinearConv"),
            ("two", "QLinearConv"),
        ]


def test_the_optimized_graph_stays_when_its_file_is_gone(made: Compiled) -> None:
    graph = optimized(made.fused, Options("all", threads=1))
    assert isinstance(graph, ir.Model)
    assert len(io.to_bytes(graph)) > 1000
