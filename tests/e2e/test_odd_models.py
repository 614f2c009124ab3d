"""Control flow, functions, types and odd values (section 4.3 of the regression cases)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from networks import from_text
from onnx import TensorProto, helper, numpy_helper
from torture import (
    PAD,
    Case,
    Suite,
    assert_right,
    compile_case,
    errors,
    feeds,
    floats,
    initializers,
    normal,
    offset,
)

from qcompile import QcompileError, Recipe, compile_model
from qcompile.recipe import Format
from qcompile.report import Result

pytestmark = pytest.mark.usefixtures("clock", "eager_target")
case = Suite()
IMAGE = floats(x=(1, 4, 8, 8))
IMAGES = "g (float[N,4,8,8] x) => (float[N,4,8,8] y)"


def payloads(model: onnx.ModelProto, size: int) -> int:
    """How many constants of the main graph have as many numbers."""
    return sum(values.size == size for values in initializers(model).values())


@case("C01 an If whose branches share a weight")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x, bool p) => (float[5,16] y) { h = If <"
        "then_branch = one () => (float[5,16] t) { t = MatMul(x, w) }, "
        "else_branch = two () => (float[5,16] e) { a = MatMul(x, w) e = Neg(a) }> (p) y = MatMul(h, w) }",
        w=normal(16, 16),
    )  # fmt: skip

    def check(result: Result, made: onnx.ModelProto) -> None:
        assert payloads(made, 256) == 1

    def feed(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"x": rng.normal(size=(5, 16)).astype(np.float32), "p": np.array(rng.random() < 0.5)}

    return Case(model, feed, check=check)


@case("C02 a Loop that shares a weight with the outside")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x) => (float[5,16] y, float[5,16] z) { y = Loop <body = step (int64 i, bool c, float[5,16] s) => "
        "(bool d, float[5,16] r) { d = Identity(c) m = MatMul(s, w) r = Tanh(m) }> (n, t, x) z = MatMul(x, w) }",
        w=normal(16, 16), n=np.array(3, np.int64), t=np.array(True),
    )  # fmt: skip

    def check(result: Result, made: onnx.ModelProto) -> None:
        assert payloads(made, 256) == 1

    return Case(model, floats(x=(5, 16)), check=check)


@case("C03 two calls of a function")
def _() -> Case:
    graph = """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
        g (float[5,16] x) => (float[5,16] y) { h = local.Lin(x, v) y = local.Lin(h, w) }
        <domain: "local", opset_import: ["" : 17]> Lin (a, b) => (c) { m = MatMul(a, b) c = Relu(m) }"""
    model = onnx.parser.parse_model(graph)
    for name, seed in (("v", 0), ("w", 1)):
        model.graph.initializer.append(numpy_helper.from_array(normal(16, 16, seed=seed), name))
    return Case(model, floats(x=(5, 16)), integer=2)


@case("C04 an operator of another domain, without shapes")
def _() -> Case:
    model = from_text(
        "g (float[N,16] x) => (float[N,16] y) { h = MatMul(x, v) e = com.microsoft.Gelu(h) m = MatMul(e, w) y = Add(m, b) }",
        v=normal(16, 32), w=normal(32, 16, seed=1), b=offset(16),
    )  # fmt: skip
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return Case(model, floats(x=(5, 16)), integer=2)


@case("C05 an LSTM without optional outputs, then a GRU")
def _() -> Case:
    model = from_text(
        "g (float[6,1,8] x) => (float[6,1,1,8] y) "
        '{ o, "", "" = LSTM<hidden_size = 16>(x, w, r, b) s = Squeeze(o, one) y, h = GRU<hidden_size = 8>(s, v, u) }',
        w=normal(1, 64, 8), r=normal(1, 64, 16), b=offset(128)[None], v=normal(1, 24, 16), u=normal(1, 24, 8),
        one=np.array([1], np.int64),
    )  # fmt: skip
    return Case(model, floats(x=(6, 1, 8)), integer=0)


@case("C06 an empty slice")
def _() -> Case:
    model = from_text(
        "g (float[N,16] x) => (float[N,8] y) "
        "{ e = Slice(x, zero, zero, axis) c = Concat<axis = 1>(x, e) y = MatMul(c, w) }",
        w=normal(16, 8), zero=np.array([0], np.int64), axis=np.array([1], np.int64),
    )  # fmt: skip
    return Case(model, floats(x=(4, 16)))


@case("C06 an empty slice of codes")
def _() -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,4,8,8] y) "
        f"{{ a = Conv<{PAD}>(x, w) e = Slice(a, zero, zero, axis) c = Concat<axis = 1>(a, e) y = Conv<{PAD}>(c, w) }}",
        w=normal(4, 4, 3, 3), zero=np.array([0], np.int64), axis=np.array([1], np.int64),
    )  # fmt: skip
    return Case(model, IMAGE, integer=2)


@case("C09 boxes and scores in one output")
def _() -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,6,8,8] y) "
        f"{{ c = Conv<{PAD}>(x, v) b = Mul(c, many) d = Conv<{PAD}>(x, w) s = Sigmoid(d) y = Concat<axis = 1>(b, s) }}",
        v=normal(4, 4, 3, 3), w=normal(2, 4, 3, 3, seed=1), many=np.float32(200),
    )  # fmt: skip
    return Case(model, IMAGE, integer=2, parts=(("y", 1, 0, 4), ("y", 1, 4, 6)))


@case("C10 TopK and ArgMax")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x) => (float[5,3] v, int64[5,3] i, int64[5] a) "
        "{ h = MatMul(x, w) v, i = TopK(h, k) a = ArgMax<axis = 1, keepdims = 0>(h) }",
        w=normal(16, 32), k=np.array([3], np.int64),
    )  # fmt: skip

    def check(result: Result, made: onnx.ModelProto) -> None:
        (row,) = (o["slices"][0] for o in result.outputs if o["name"] == "a")
        assert 0.5 < row["agreement"] <= 1

    return Case(model, floats(x=(5, 16)), check=check)


@case("C11 BatchNormalization, LeakyRelu, MaxPool, average, Flatten")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,8] y) "
        f"{{ c = Conv<{PAD}>(x, w) n = BatchNormalization(c, gamma, beta, mean, var) l = LeakyRelu(n) "
        "m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(l) p = GlobalAveragePool(m) y = Flatten(p) }",
        w=normal(8, 4, 3, 3), gamma=1 + offset(8, 1), beta=offset(8, 2), mean=offset(8, 3), var=1 + offset(8, 4) ** 2,
    )  # fmt: skip

    def check(result: Result, made: onnx.ModelProto) -> None:
        assert not any(node.op_type == "BatchNormalization" for node in made.graph.node)

    return Case(model, IMAGE, integer=2, check=check)


@case("C12 LayerNormalization with one large gamma")
def _() -> Case:
    gamma = np.ones(32, np.float32)
    gamma[0] = 50
    model = from_text(
        "g (float[5,32] x) => (float[5,32] y) { n = LayerNormalization(x, gamma, beta) m = MatMul(n, w) y = Add(m, x) }",
        gamma=gamma, beta=offset(32), w=normal(32, 32),
    )  # fmt: skip
    return Case(model, floats(x=(5, 32)), least=20)


def masked(softmax: str) -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,4,8,8] y) "
        f"{{ c = Conv<{PAD}>(x, w) p = Greater(c, zero) m = Where(p, c, never) y = {softmax} }}",
        w=normal(4, 4, 3, 3, scale=2), zero=np.float32(0), never=np.float32(-1e9),
    )  # fmt: skip
    return Case(model, IMAGE)


case("C13 Where with -1e9, then Softmax")(lambda: masked("Softmax<axis = -1>(m)"))
case("C13 Where with -1e9, then Relu")(lambda: masked("Relu(m)"))


@case("C14 Einsum with a constant")
def _() -> Case:
    model = from_text(
        'g (float[5,16] x) => (float[5,2,8] y) { h = MatMul(x, v) y = Einsum<equation = "bk,khd->bhd">(h, w) }',
        v=normal(16, 16), w=normal(16, 16, seed=1).reshape(16, 2, 8),
    )  # fmt: skip

    def check(result: Result, made: onnx.ModelProto) -> None:
        assert [row["op"] for row in result.kept_float] == ["Einsum"]

    return Case(model, floats(x=(5, 16)), check=check)


@case("C15 Split, Conv, Slice, Concat")
def _() -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,3,8,8] y) "
        f"{{ r = Conv<{PAD}>(x, v) a, b = Split<axis = 1>(r) c = Conv<{PAD}>(a, w) s = Slice(b, zero, one, one) "
        "y = Concat<axis = 1>(c, s) }",
        v=normal(4, 4, 3, 3), w=normal(2, 2, 3, 3, seed=1, scale=20), zero=np.array([0], np.int64), one=np.array([1], np.int64),
    )  # fmt: skip
    return Case(model, IMAGE, integer=2, parts=(("y", 1, 0, 2), ("y", 1, 2, 3)))


@case("C16 a Conv whose weight is an input")
def _() -> Case:
    model = from_text(
        f"g (float[1,4,8,8] x, float[4,4,3,3] v) => (float[1,4,8,8] y) {{ c = Conv<{PAD}>(x, v) y = Conv<{PAD}>(c, w) }}",
        w=normal(4, 4, 3, 3),
    )  # fmt: skip
    return Case(model, floats(x=(1, 4, 8, 8), v=(4, 4, 3, 3)))


@case("C17 sequences around a product")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x) => (float[5,16] y) { s = SequenceConstruct(x, x) e = SequenceAt(s, one) "
        "h = MatMul(e, w) r = SequenceConstruct(h) y = SequenceAt(r, zero) }",
        w=normal(16, 16), one=np.array(1, np.int64), zero=np.array(0, np.int64),
    )  # fmt: skip
    return Case(model, floats(x=(5, 16)))


@case("C18 what nobody reads")
def _() -> Case:
    model = from_text(
        f"{IMAGES} {{ y = Conv<{PAD}>(x, w) d = Conv<{PAD}>(x, u) }}",
        w=normal(4, 4, 3, 3), u=normal(4, 4, 3, 3), unused=normal(64, 64),
    )  # fmt: skip
    return Case(model, IMAGE)


@case("C19 boxes for NonMaxSuppression")
def _() -> Case:
    model = from_text(
        "g (float[1,4,4,4] x) => (int64[M,3] i, float[1,16,4] boxes, float[1,2,16] scores) "
        f"{{ c = Conv<{PAD}>(x, v) f = Reshape(c, bs) a = Mul(f, many) boxes = Transpose<perm = [0, 2, 1]>(a) "
        f"d = Conv<{PAD}>(x, w) t = Reshape(d, ss) scores = Sigmoid(t) i = NonMaxSuppression(boxes, scores, most, iou, least) }}",
        v=normal(4, 4, 3, 3), w=normal(2, 4, 3, 3, seed=1), bs=np.array([1, 4, 16], np.int64), ss=np.array([1, 2, 16], np.int64),
        many=np.float32(50), most=np.array([1], np.int64), iou=np.array([0.5], np.float32), least=np.array([0.0], np.float32),
    )  # fmt: skip

    def check(result: Result, made: onnx.ModelProto) -> None:
        assert "NonMaxSuppression" in [node.op_type for node in made.graph.node]

    return Case(model, floats(x=(1, 4, 4, 4)), integer=2, check=check)


@case("T03 opset 10")
def _() -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,8] y) "
        f"{{ c = Conv<{PAD}>(x, w, b) r = Relu(c) m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r) "
        "p = GlobalAveragePool(m) y = Flatten(p) }",
        opset=10, w=normal(8, 4, 3, 3) * np.geomspace(0.1, 10, 8, dtype=np.float32)[:, None, None, None], b=offset(8),
    )  # fmt: skip
    return Case(model, IMAGE)


@case("T05 pixels of 8 bits")
def _() -> Case:
    model = from_text(
        "g (uint8[1,3,8,8] x) => (float[1,4,8,8] y) "
        f"{{ f = Cast<to = 1>(x) s = Div(f, most) y = Conv<{PAD}>(s, w) }}",
        w=normal(4, 3, 3, 3), most=np.float32(255),
    )  # fmt: skip
    return Case(model, lambda rng: {"x": rng.integers(0, 256, (1, 3, 8, 8)).astype(np.uint8)})


@case("T06 samples of many sizes")
def _() -> Case:
    model = from_text(
        "g (float[b,s,16] x) => (float[b,s,16] y) { h = MatMul(x, v) r = Sigmoid(h) a = Mul(r, h) y = MatMul(a, w) }",
        v=normal(16, 16), w=normal(16, 16, seed=1),
    )  # fmt: skip

    def feed(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {
            "x": rng.normal(size=(rng.integers(1, 4), rng.integers(1, 9), 16)).astype(np.float32)
        }

    return Case(model, feed, integer=4)


@case("T07 a weight of zeros")
def _() -> Case:
    model = from_text(
        f"{IMAGES} {{ c = Conv<{PAD}>(x, w) r = Relu(c) d = Conv<{PAD}>(r, v) y = Add(d, x) }}",
        w=np.zeros((4, 4, 3, 3), np.float32), v=normal(4, 4, 3, 3),
    )  # fmt: skip
    return Case(model, IMAGE, integer=3)


@case("T07 an activation of zeros")
def _() -> Case:
    model = from_text(f"{IMAGES} {{ y = Conv<{PAD}>(x, w, b) }}", w=normal(4, 4, 3, 3), b=offset(4))
    return Case(model, lambda rng: {"x": np.zeros((1, 4, 8, 8), np.float32)})


@case("T08 the logarithm of 0")
def _() -> Case:
    model = from_text(
        f"{IMAGES} {{ p = Relu(x) l = Log(p) r = Relu(l) y = Conv<{PAD}>(r, w) }}",
        w=normal(4, 4, 3, 3),
    )

    def check(result: Result, made: onnx.ModelProto) -> None:
        (_row,) = (
            row for row in result.plan if row["op"] == "Relu" and "'l' is infinite" in row["why"]
        )

    return Case(model, IMAGE, check=check)


@case("T11 weights in float_data")
def _() -> Case:
    model = from_text(f"{IMAGES} {{ y = Conv<{PAD}>(x, w) }}")
    values = normal(4, 4, 3, 3)
    model.graph.initializer.append(
        helper.make_tensor("w", TensorProto.FLOAT, values.shape, values.ravel().tolist())
    )
    return Case(model, IMAGE)


def sparse(flat: bool) -> Case:
    """Where most of a weight is zero only the rest is stored: flat positions, or one row of indices each."""
    model = from_text("g (float[5,16] x) => (float[5,16] y) { y = MatMul(x, w) }")
    w = normal(16, 16)
    w[np.abs(w) < 0.2] = 0
    places = np.flatnonzero(w) if flat else np.argwhere(w)
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(w[w != 0], "w"),
            numpy_helper.from_array(places, "places"),
            [16, 16],
        )
    )
    return Case(model, floats(x=(5, 16)))


case("T12 a sparse weight, flat")(lambda: sparse(flat=True))
case("T12 a sparse weight, by index")(lambda: sparse(flat=False))


@case("T13 AveragePool behind a Conv")
def _() -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,4,1,1] y) "
        f"{{ c = Conv<{PAD}>(x, w) p = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(c) y = GlobalAveragePool(p) }}",
        w=normal(4, 4, 3, 3),
    )  # fmt: skip
    return Case(model, IMAGE)


@case("T14 strings that pass through")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x, string[2] s) => (float[5,16] y, string[2] t) { y = MatMul(x, w) t = Identity(s) }",
        w=normal(16, 16),
    )  # fmt: skip
    return Case(
        model,
        lambda rng: {
            "x": rng.normal(size=(5, 16)).astype(np.float32),
            "s": np.array(["a", "b"], object),
        },
    )


@case("T17 properties and documentation")
def _() -> Case:
    model = from_text(f"{IMAGES} {{ y = Conv<{PAD}>(x, w) }}", w=normal(4, 4, 3, 3))
    model.doc_string = "about"
    model.metadata_props.add(key="labels", value="cat,dog")

    def check(result: Result, made: onnx.ModelProto) -> None:
        props = {p.key: p.value for p in made.metadata_props}
        assert props["labels"] == "cat,dog"
        assert props["qcompile.format"] == result.format
        assert made.doc_string == "about"

    return Case(model, IMAGE, check=check)


@pytest.mark.parametrize("form", ["fused", "qdq"])
@pytest.mark.parametrize("name", case.makers)
def test_odd_models(name: str, form: Format, tmp_path: Path) -> None:
    assert_right(case.makers[name](), tmp_path, form)


def test_float64_is_refused_or_left_alone(tmp_path: Path) -> None:
    """T02: no integer kernel takes float64, and the result must not pretend."""
    model = from_text(
        "g (double[5,16] x) => (double[5,16] y) { y = MatMul(x, w) }",
        w=normal(16, 16).astype(np.float64),
    )
    made = Case(model, lambda rng: {"x": rng.normal(size=(5, 16))}, integer=0)
    result, _ = compile_case(made, tmp_path)
    assert result.exit_code == 4
    assert "works on float64" in result.warnings[0]


def test_a_single_nan_in_a_weight(tmp_path: Path) -> None:
    """T09."""
    w = normal(4, 4, 3, 3)
    w[1, 2, 0, 1] = np.nan
    made = Case(from_text(f"{IMAGES} {{ y = Conv<{PAD}>(x, w) }}", w=w), IMAGE)
    with pytest.raises(QcompileError, match=r"weight 'w' holds nan at index \(1, 2, 0, 1\)"):
        compile_model(made.model, feeds(made, 3, 0), output=tmp_path / "y.onnx")
    assert not (tmp_path / "y.onnx").exists()


def test_a_sparse_weight_in_a_file(tmp_path: Path) -> None:
    made = sparse(flat=True)
    onnx.save(made.model, tmp_path / "m.onnx")
    result = compile_model(
        tmp_path / "m.onnx", feeds(made, 6, 0), recipe=Recipe(threads=1, bench_seconds=0.01)
    )
    assert result.exit_code == 0
    assert min(errors(made, onnx.load(tmp_path / "m.int8.onnx")).values()) > 25
