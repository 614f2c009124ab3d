"""LowerEmbedding, through `build`, against numpy and ONNX Runtime."""

import numpy as np
import pytest
from lowering import assert_lowered, compiled, constant, integer_ops, op_types
from rewrites import run

from qcompile.graph.edit import graphs

IDS = np.array([[3, 0, 1], [9, 9, 2]])


def table(width: int = 16) -> str:
    return constant("e", 10, width)


@pytest.mark.parametrize("kind", [np.int64, np.int32])
@pytest.mark.parametrize("width", [4, 16, 17, 32, 48, 100, 384])
def test_a_lookup(width: int, kind: type[np.signedinteger]) -> None:
    name = np.dtype(kind).name
    text = f"g ({name}[2,3] i) => (float[2,3,{width}] y) <{table(width)}> {{ [look] y = Gather(e, i) }}"
    made = compiled(text, given={"i": IDS.astype(kind)})
    assert made.forms() == {"look": "weight"}
    assert_lowered(made, fused=1e-3, deployed=1e-3)
    assert op_types(made.fused) == ["GatherBlockQuantized"]
    assert op_types(made.qdq) == ["Gather", "Cast", "Gather", "Mul"]
    assert [node.name for node in made.fused.graph] == ["look"]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 2)])
def test_indices_of_any_rank(shape: tuple[int, ...]) -> None:
    dims = ",".join(map(str, (*shape, 16)))
    text = f"g (int64{list(shape) if shape else ''} i) => (float[{dims}] y) <{table()}> {{ y = Gather(e, i) }}"
    made = compiled(text, given={"i": np.full(shape, 7)})
    assert_lowered(made, fused=1e-3, deployed=1e-3)


def test_indices_from_the_end() -> None:
    text = f"g (int64[2,3] i) => (float[2,3,16] y) <{table()}> {{ y = Gather(e, i) }}"
    made = compiled(text, given={"i": IDS - 10})
    assert_lowered(made, fused=1e-3, deployed=1e-3)


def test_the_extremes_of_a_row() -> None:
    """Codes of -127 and 127 are 1 and 255 of the unsigned form; a row of zeros stays zero."""
    rows = (
        "float[3,16] e = {"
        + ", ".join(["-1.27"] * 8 + ["1.27"] * 8 + ["0"] * 16 + ["0.01"] * 16)
        + "}"
    )
    text = f"g (int64[3] i) => (float[3,16] y) <{rows}> {{ y = Gather(e, i) }}"
    made = compiled(text, given={"i": np.arange(3)})
    assert_lowered(made, fused=1e-3, deployed=1e-3, accuracy=1e-5)


def test_two_lookups_share_the_rows() -> None:
    text = f"g (int64[2,3] i, int64[4] j) => (float[2,3,16] y, float[4,16] z) <{table()}> {{ y = Gather(e, i) z = Gather(e, j) }}"
    made = compiled(text, given={"i": IDS, "j": IDS[0, :1].repeat(4)})
    assert_lowered(made, fused=1e-3, deployed=1e-3)
    assert list(made.fused.graph.initializers) == ["e_q", "e_scale"]
    assert list(made.qdq.graph.initializers) == ["e_q", "e_scale"]


def test_a_table_tied_to_a_projection() -> None:
    text = f"""g (int64[2,3] i, float[5,16] x) => (float[2,3,16] y, float[5,10] z, float[5,10] u) <{table()}> {{
        y = Gather(e, i) z = Gemm<transB = 1>(x, e) t = Transpose(e) u = MatMul(x, t) }}"""
    made = compiled(text, given={"i": IDS})
    assert set(made.forms().values()) == {"weight", "dynamic"}
    assert_lowered(made)
    assert "e" not in made.fused.graph.initializers


def test_a_float_reader_keeps_the_table() -> None:
    text = f"g (int64[2,3] i) => (float[2,3,16] y, float[10,16] z) <{table()}> {{ y = Gather(e, i) r = Exp(e) z = Identity(r) }}"
    made = compiled(text, given={"i": IDS})
    assert_lowered(made, fused=1e-3, deployed=1e-3)


def test_an_integer_kernel_that_reads_the_rows() -> None:
    text = f"""g (int64[1,8] i) => (float[1,4,16] y) <{table()}, {constant("k", 4, 8, 1)}> {{
        t = Gather(e, i) y = Conv(t, k) }}"""
    made = compiled(text, given={"i": np.arange(8).reshape(1, 8)})
    assert_lowered(made)
    assert integer_ops(made.fused) == ["GatherBlockQuantized", "QLinearConv"]


def test_a_product_that_reads_the_rows() -> None:
    text = f"g (int64[2,3] i) => (float[2,3,6] y) <{table()}, {constant('w', 16, 6)}> {{ t = Gather(e, i) y = MatMul(t, w) }}"
    made = compiled(text, given={"i": IDS})
    assert_lowered(made)
    assert integer_ops(made.fused) == ["GatherBlockQuantized", "DynamicQuantizeMatMul"]


@pytest.mark.parametrize("home", ["outer", "body"])
def test_a_lookup_in_a_body(home: str) -> None:
    outer, inner = (f"<{table()}>", "") if home == "outer" else ("", f"<{table()}>")
    text = f"""g (int64[2,3] i, bool c) => (float[2,3,16] y) {outer} {{
        y = If(c) <then_branch = a () => (float[2,3,16] p) {inner} {{ p = Gather(e, i) }},
                   else_branch = b () => (float[2,3,16] q) {{ z = Cast<to = 1>(i) s = Constant<value_ints = [0, 1, 2]>() q = Expand(z, n) }}> }}"""
    text = text.replace(
        "z = Cast<to = 1>(i) s = Constant<value_ints = [0, 1, 2]>() q = Expand(z, n)",
        "q = ConstantOfShape(n)",
    )
    size = "int64[3] n = {2, 3, 16}"
    text = (
        text.replace(outer, f"<{table()}, {size}>")
        if outer
        else text.replace("y) ", f"y) <{size}>", 1)
    )
    made = compiled(text, given={"i": IDS, "c": np.array(True)})
    assert made.forms()["Gather:p"] == "weight"
    for feed in made.feeds:
        (exact,) = run(made.qdq, feed)
        (plain,) = run(made.prepared, feed)
        assert np.abs(exact - plain).max() < 0.02 * np.abs(plain).max()
        for model, level in ((made.fused, "off"), (made.fused, "all"), (made.qdq, "all")):
            np.testing.assert_allclose(run(model, feed, level)[0], exact, rtol=1e-5)
    stored = [name for graph in graphs(made.fused) for name in graph.initializers]
    assert "e" not in stored
    assert ("e_q" in made.fused.graph.initializers) == (home == "outer")
