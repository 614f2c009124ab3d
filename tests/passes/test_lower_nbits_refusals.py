"""What LowerNbits leaves alone, and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from few_bits import blocked, named
from lowering import constant
from rewrites import parse

from passes.lower_nbits import Form, LowerNbits
from qcompile.errors import PassError
from qcompile.graph.linear import find_linears
from qcompile.step import run_pass

W = constant("w", 32, 24)  # (K, N)
E = constant("e", 24, 32)  # (N, K)


REFUSED = {
    "an overridable weight": (f"(float[3,32] x, {W}) => (float[3,24] y)", "y = MatMul(x, w)", "also a graph input"),
    "a batched weight": (f"(float[2,3,16] x) => (float[2,3,8] y) <{constant('w', 2, 16, 8)}>", "y = MatMul(x, w)", "has 3 axes"),
    "a vector": (f"(float[3,32] x) => (float[3] y) <{constant('w', 32)}>", "y = MatMul(x, w)", "has one axis"),
    "integers": ("(int32[3,16] x) => (int32[3,1] y) <int32[16,1] w = {1,2,3,4,5,6,7,8,1,2,3,4,5,6,7,8}>", "y = MatMul(x, w)", "INT32"),
    "doubles": (f"(double[3,32] x) => (double[3,24] y) <{W.replace('float[', 'double[')}>", "y = MatMul(x, w)", "DOUBLE"),
    "a short row": (f"(float[3,8] x) => (float[3,24] y) <{constant('w', 8, 24)}>", "y = MatMul(x, w)", "depth 8"),
    "an input of one axis": (f"(float[32] x) => (float[24] y) <{W}>", "y = MatMul(x, w)", "one axis"),
    "a first operand": (f"(float[2,32,3] x) => (float[2,24,3] y) <{E}>", "y = MatMul(e, x)", "first operand"),
    "a first operand of Gemm": (f"(float[32,3] x) => (float[24,3] y) <{E}>", "y = Gemm(e, x)", "first operand"),
    "alpha 0": (f"(float[3,32] x) => (float[3,24] y) <{W}>", "y = Gemm<alpha = 0.0>(x, w)", "alpha is 0"),
    "an outer product": (f"(float[3,32] x) => (float[3,32,24] y) <{W}>", 'y = Einsum<equation = "bk,kn->bkn">(x, w)', "no product"),
    "columns of a table": (f"(int64[2] i) => (float[24,2] y) <{E}>", "y = Gather<axis = 1>(e, i)", "columns"),
    "a table of three axes": (f"(int64[2] i) => (float[2,2,16] y) <{constant('e', 3, 2, 16)}>", "y = Gather(e, i)", "3 axes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_by_the_graph(case: str) -> None:
    face, body, reason = REFUSED[case]
    model = named(f"g {face} {{ {body} }}")
    before = ir.to_onnx_text(model)
    (node,) = model.graph
    outcome = run_pass(LowerNbits({node.name or "": blocked(np.ones((24, 32)))}), model)
    assert outcome.changed == []
    assert reason in outcome.skipped[node.name or ""]
    assert ir.to_onnx_text(model) == before


def refused(text: str, form: Form, *, opset: int = 21, **scheme: Any) -> str:
    model = named(text, opset)
    (item,) = find_linears(model)
    before = ir.to_onnx_text(model)
    outcome = run_pass(LowerNbits({item.name: blocked(item.read(), **scheme)}, form), model)
    assert ir.to_onnx_text(model) == before
    assert outcome.changed == []
    return outcome.skipped[item.name]


def test_refusals_by_the_form() -> None:
    product = f"g (float[3,32] x) => (float[3,24] y) <{W}> {{ y = MatMul(x, w) }}"
    lookup = f"g (int64[2] i) => (float[2,32] y) <{E}> {{ y = Gather(e, i) }}"
    assert "raise it to 21" in refused(product, "portable", opset=17)
    assert "raise it to 25" in refused(product, "portable", bits=2)
    odd = f"g (float[3,32] x) => (float[3,6] y) <{constant('w', 32, 6)}> {{ y = MatMul(x, w) }}"
    assert "multiple of 4" in refused(odd, "portable", opset=25, bits=2)
    assert "Gather takes no 4-bit codes" in refused(lookup, "portable")
    assert "how many axes" in refused(
        "g (float f) => (float y) <{}> {{ i = com.x.Op(f) r = Gather(e, i) y = com.x.Op(r) }}".format(E),  # noqa: UP032
        "portable", bits=8,
    )  # fmt: skip
    assert "blocks of 8" in refused(product, "nbits", block=8)


def test_names_that_are_not_there_and_names_of_several() -> None:
    text = f"g (float[3,32] x) => (float[3,24] y) <{W}> {{ [a] p = MatMul(x, w) [a] q = MatMul(x, w) y = Add(p, q) }}"
    model = parse(text, 21, 10)
    outcome = run_pass(
        LowerNbits({"a": blocked(np.ones((24, 32))), "b": blocked(np.ones((24, 32)))}), model
    )
    assert outcome.skipped == {
        "a": "several nodes have its name",
        "b": "no product with a constant matrix has this name",
    }


def test_a_function_must_be_inlined() -> None:
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["":21, "l":1]>
        g (float[3,16] x) => (float[3,1] y) {{ y = l.f(x) }}
        <domain: "l", opset_import: ["":21]> f (x) => (y) {{
            w = Constant<value = float[16,1] {{{", ".join("1" * 16)}}}>() [m] y = MatMul(x, w) }}""")
    outcome = run_pass(LowerNbits({"m": blocked(np.ones((1, 16)))}), model)
    assert outcome.changed == []
    assert "inline it" in outcome.skipped["m"]


def test_weights_of_another_shape() -> None:
    model = named(f"g (float[3,32] x) => (float[3,24] y) <{W}> {{ y = MatMul(x, w) }}")
    (item,) = find_linears(model)
    with pytest.raises(PassError, match=r"\(32, 24\), its weight is \(24, 32\)"):
        run_pass(LowerNbits({item.name: blocked(item.read().T)}), model)
