"""Which nodes are linear layers, and what is said of them. Rewrites of each are in `passes/test_lower_nbits.py`."""

import numpy as np
import onnx_ir as ir
import pytest
from lowering import constant
from rewrites import parse, random_feed, run

from passes.name_nodes import NameNodes
from qcompile.graph.linear import Linear, find_linears
from qcompile.step import run_pass

W = constant("w", 32, 24)  # (K, N)
E = constant("e", 24, 32)  # (N, K)


def found(text: str, opset: int = 17) -> list[Linear]:
    model = parse(text, opset)
    run_pass(NameNodes(), model)
    return find_linears(model)


def only(text: str) -> Linear:
    (item,) = found(text)
    return item


FORMS = {
    "matmul": (f"(float[2,3,32] x) => (float[2,3,24] y) <{W}>", "y = MatMul(x, w)", "bsk,nk->bsn"),
    "first": (f"(float[32,3] x) => (float[24,3] y) <{E}>", "y = MatMul(e, x)", "km,nk->nm"),
    "gemm": (f"(float[3,32] x) => (float[3,24] y) <{W}>", "y = Gemm(x, w)", "mk,nk->mn"),
    "gemm_b": (f"(float[3,32] x) => (float[3,24] y) <{E}>", "y = Gemm<transB = 1>(x, e)", "mk,nk->mn"),
    "einsum": (f"(float[2,3,32] x) => (float[2,3,24] y) <{W}>", 'y = Einsum<equation = "bsk,kn->bsn">(x, w)', "bsk,nk->bsn"),
    "conv": (f"(float[1,32,5] x) => (float[1,24,5] y) <{constant('w', 24, 32, 1)}>", "y = Conv(x, w)", "bkl,nk->bnl"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMS)
def test_the_matrix_is_read_as_outputs_by_inputs(case: str) -> None:
    face, body, equation = FORMS[case]
    model = parse(f"g {face} {{ {body} }}")
    (item,) = find_linears(model)
    assert (item.kind, item.reason) == (
        case.split("_", maxsplit=1)[0].replace("first", "matmul"),
        None,
    )
    assert item.shape == item.read().shape == (24, 32)
    assert item.nbytes == 24 * 32 * 4
    assert item.rarely_pays == (case in ("first", "conv"))
    feed = random_feed(model)
    np.testing.assert_allclose(
        np.einsum(equation, feed["x"], item.read()), run(model, feed)[0], rtol=1e-3, atol=1e-4
    )


def test_a_table_and_its_head_share_the_matrix() -> None:
    items = found(f"""g (int64[2] i, float[3,32] x) => (float[2,32] u, float[3,24] y, float[3,24] z) <{E}> {{
        u = Gather(e, i) t = Transpose(e) y = MatMul(x, t) z = Gemm<transB = 1>(x, e) }}""")
    assert [item.kind for item in items] == ["gather", "matmul", "gemm"]
    assert items[0].shared == ("MatMul:y", "Gemm:z")
    assert items[1].shared == ("Gather:u", "Gemm:z")
    for item in items:
        np.testing.assert_array_equal(item.read(), items[0].read())


def test_a_matrix_and_its_transpose_are_not_the_same() -> None:
    items = found(f"""g (float[3,16] x) => (float[3,16] y, float[3,16] z) <{constant("w", 16, 16)}> {{
        y = Gemm(x, w) z = Gemm<transB = 1>(x, w) }}""")
    assert [item.shared for item in items] == [(), ()]


@pytest.mark.parametrize(
    "text",
    [
        "(float[3,16] x, float[16,3] w) => (float[3,3] y) { y = MatMul(x, w) }",
        f"(float[3] x) => (float[32,32] y) <{W}, {E}> {{ y = MatMul(w, e) }}",
        "(float[3,16] x, float[16,3] w, float[3] c) => (float[3,3] y) { y = Gemm(x, w, c) }",
        f"(float[1,16,4] x) => (float[1,8,2] y) <{constant('w', 8, 16, 3)}> {{ y = Conv(x, w) }}",
        f"(float[1,16,4] x) => (float[1,8,2] y) <{constant('w', 8, 16, 1)}> {{ y = Conv<strides = [2]>(x, w) }}",
        f"(float[1,16,4] x) => (float[1,8,6] y) <{constant('w', 8, 16, 1)}> {{ y = Conv<pads = [1, 1]>(x, w) }}",
        f"(float[1,32,4] x) => (float[1,8,4] y) <{constant('w', 8, 16, 1)}> {{ y = Conv<group = 2>(x, w) }}",
        "(int64[2] i) => (float[2] y) <float[3] e = {1, 2, 3}> { y = Gather(e, i) }",
        "(int64[2] i) => (int64[2,1] y) <int64[3,1] e = {1, 2, 3}> { y = Gather(e, i) }",
        f"(float[3] x) => (float[1,32] y) <{E}, int64[1] i = {{1}}> {{ y = Gather(e, i) }}",
        f"(float[3,32] x) => (float[3,24] y) <{W}> {{ y = com.microsoft.MatMul(x, w) }}",
    ],
)
def test_what_is_no_linear(text: str) -> None:
    assert found(f"g {text}") == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"(float[1,32,4] x, {constant('w', 8, 32, 1)}) => (float[1,8,4] y) {{ y = Conv<kernel_shape = [1]>(x, w) }}", "also a graph input"),
        ("(float[3,16] x) => (float[3,0] y) <float[16,0] w = {}> { y = MatMul(x, w) }", "empty"),
        (f"(float[3,32] x) => (float[3,24] y) <{W}> {{ v = Cast<to = 11>(w) y = MatMul(x, v) }}", "cast from FLOAT to DOUBLE"),
        (f"(float[3,2,32] x) => (float[3,24] y) <{constant('w', 2, 32, 24)}> {{ y = Gemm(x, w) }}", "3 axes"),
        (f'(float[3,32] x) => (float[3,24] y) <{W}> {{ y = Einsum<equation = "bk,khd->bhd">(x, w) }}', "does not fit"),
    ],
)  # fmt: skip
def test_reasons(text: str, reason: str) -> None:
    item = only(f"g {text}")
    assert item.reason is not None
    assert reason in item.reason
    assert item.shared == ()


def test_an_input_with_a_default_is_an_activation() -> None:
    item = only(f"g ({constant('x', 3, 32)}) => (float[3,24] y) <{W}> {{ y = MatMul(x, w) }}")
    assert (item.reason, item.x) == (None, 0)


def test_bodies_and_functions_are_searched() -> None:
    model = ir.from_onnx_text(f"""<ir_version: 8, opset_import: ["":17, "l":1]>
        g (float[3,32] x, bool c) => (float[3,24] y, float[3,1] z) <{W}> {{
            y = If(c) <then_branch = a () => (float[3,24] p) {{ [m] p = MatMul(x, w) }},
                       else_branch = b () => (float[3,24] q) {{ n = Neg(x) [k] q = MatMul(n, w) }}>
            z = l.f(x) }}
        <domain: "l", opset_import: ["":17]> f (x) => (y) {{
            w = Constant<value = float[32,1] {{{", ".join("1" * 32)}}}>() [f] y = MatMul(x, w) }}""")
    items = {item.name: item for item in find_linears(model)}
    assert list(items) == ["m", "k", "f"]
    assert items["m"].shared == ("k",)
    assert "inline it" in (items["f"].reason or "")
    assert items["f"].shared == ()


def test_nothing_is_read() -> None:
    def read() -> ir.TensorProtocol:
        raise AssertionError

    model = parse(
        f"g (float[3,32] x) => (float[3,24] y) <{W}> {{ t = Transpose(w) u = Transpose(t) y = MatMul(x, u) }}"
    )
    w = model.graph.initializers["w"]
    w.const_value = ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape([32, 24]), name="w")
    (item,) = find_linears(model)
    assert (item.shape, item.nbytes) == ((24, 32), 3072)
    with pytest.raises(AssertionError):
        item.read()
