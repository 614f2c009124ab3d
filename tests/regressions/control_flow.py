"""Control flow, functions, odd structures (section 4.3 of the regression cases)."""

from __future__ import annotations

import numpy as np
import onnx
from networks import from_text
from onnx import helper, numpy_helper
from regressions.case import PAD, Case, Done, Suite, floats, normal, offset, one_payload

case = Suite()
IMAGE = floats(x=(1, 4, 8, 8))
IMAGES = "g (float[N,4,8,8] x) => (float[N,4,8,8] y)"


@case("C01 an If whose branches share a weight")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x, bool p) => (float[5,16] y) { h = If <"
        "then_branch = one () => (float[5,16] t) { t = MatMul(x, w) }, "
        "else_branch = two () => (float[5,16] e) { a = MatMul(x, w) e = Neg(a) }> (p) y = MatMul(h, w) }",
        w=normal(16, 16),
    )  # fmt: skip

    def feed(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"x": rng.normal(size=(5, 16)).astype(np.float32), "p": np.array(rng.random() < 0.5)}

    return Case(model, feed, dynamic=1, bits=3, check=one_payload(256))


@case("C02 a Loop that shares a weight with the outside")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x) => (float[5,16] y, float[5,16] z) { y = Loop <body = step (int64 i, bool c, float[5,16] s) => "
        "(bool d, float[5,16] r) { d = Identity(c) m = MatMul(s, w) r = Tanh(m) }> (n, t, x) z = MatMul(x, w) }",
        w=normal(16, 16), n=np.array(3, np.int64), t=np.array(True),
    )  # fmt: skip

    return Case(model, floats(x=(5, 16)), dynamic=1, bits=2, check=one_payload(256))


@case("C03 two calls of a function")
def _() -> Case:
    graph = """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
        g (float[5,16] x) => (float[5,16] y) { h = local.Lin(x, v) y = local.Lin(h, w) }
        <domain: "local", opset_import: ["" : 17]> Lin (a, b) => (c) { m = MatMul(a, b) c = Relu(m) }"""
    model = onnx.parser.parse_model(graph)
    for name, seed in (("v", 0), ("w", 1)):
        model.graph.initializer.append(numpy_helper.from_array(normal(16, 16, seed=seed), name))
    return Case(model, floats(x=(5, 16)), dynamic=2, bits=2)


@case("C04 an operator of another domain, without shapes")
def _() -> Case:
    model = from_text(
        "g (float[N,16] x) => (float[N,16] y) { h = MatMul(x, v) e = com.microsoft.Gelu(h) m = MatMul(e, w) y = Add(m, b) }",
        v=normal(16, 32), w=normal(32, 16, seed=1), b=offset(16),
    )  # fmt: skip
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return Case(model, floats(x=(5, 16)), dynamic=2, bits=2)


@case("C05 an LSTM without optional outputs, then a GRU")
def _() -> Case:
    model = from_text(
        "g (float[6,1,8] x) => (float[6,1,1,8] y) "
        '{ o, "", "" = LSTM<hidden_size = 16>(x, w, r, b) s = Squeeze(o, one) y, h = GRU<hidden_size = 8>(s, v, u) }',
        w=normal(1, 64, 8), r=normal(1, 64, 16), b=offset(128)[None], v=normal(1, 24, 16), u=normal(1, 24, 8),
        one=np.array([1], np.int64),
    )  # fmt: skip

    def check(done: Done) -> None:
        assert "GRU" in [row["op"] for row in done.result.kept_float]

    return Case(model, floats(x=(6, 1, 8)), dynamic=1, check=check)


@case("C06 an empty slice")
def _() -> Case:
    model = from_text(
        "g (float[N,16] x) => (float[N,8] y) "
        "{ e = Slice(x, zero, zero, axis) c = Concat<axis = 1>(x, e) y = MatMul(c, w) }",
        w=normal(16, 8), zero=np.array([0], np.int64), axis=np.array([1], np.int64),
    )  # fmt: skip
    return Case(model, floats(x=(4, 16)), dynamic=1, bits=1)


@case("C06 an empty slice of codes")
def _() -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,4,8,8] y) "
        f"{{ a = Conv<{PAD}>(x, w) e = Slice(a, zero, zero, axis) c = Concat<axis = 1>(a, e) y = Conv<{PAD}>(c, w) }}",
        w=normal(4, 4, 3, 3), zero=np.array([0], np.int64), axis=np.array([1], np.int64),
    )  # fmt: skip
    return Case(model, IMAGE, static=2)


def codes(text: str, **weights: np.ndarray) -> Case:
    """A model that is quantized in part."""
    model = from_text(
        f"g (float[5,16] x) => (float[5,16] y) {{ {text} y = MatMul(h, v) }}",
        w=np.arange(256, dtype=np.int8).reshape(16, 16), s=np.float32(0.01), v=normal(16, 16), **weights,
    )  # fmt: skip
    return Case(model, floats(x=(5, 16)), refused={"": "already quantized"})


case("C07 a product of codes before a float one")(
    lambda: codes(
        "q = QuantizeLinear(x, t, z) a = DequantizeLinear(q, t, z) b = DequantizeLinear(w, s) h = MatMul(a, b)",
        t=np.array(0.02, np.float32),
        z=np.array(128, np.uint8),
    )  # fmt: skip
)
case("C08 codes of a weight behind a Reshape")(
    lambda: codes(
        "b = DequantizeLinear(w, s) r = Reshape(b, n) h = MatMul(x, r)",
        n=np.array([16, 16], np.int64),
    )
)


@case("C09 boxes and scores in one output")
def _() -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,6,8,8] y) "
        f"{{ c = Conv<{PAD}>(x, v) b = Mul(c, many) d = Conv<{PAD}>(x, w) s = Sigmoid(d) y = Concat<axis = 1>(b, s) }}",
        v=normal(4, 4, 3, 3), w=normal(2, 4, 3, 3, seed=1), many=np.float32(200),
    )  # fmt: skip
    return Case(model, IMAGE, static=2, parts=(("y", 1, 0, 4), ("y", 1, 4, 6)))


@case("C10 TopK and ArgMax")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x) => (float[5,3] v, int64[5,3] i, int64[5] a) "
        "{ h = MatMul(x, w) v, i = TopK(h, k) a = ArgMax<axis = 1, keepdims = 0>(h) }",
        w=normal(16, 32), k=np.array([3], np.int64),
    )  # fmt: skip

    def check(done: Done) -> None:
        (row,) = (o["slices"][0] for o in done.result.outputs if o["name"] == "a")
        assert 0.5 < row["agreement"] <= 1

    return Case(model, floats(x=(5, 16)), dynamic=1, bits=1, check=check)


@case("C11 BatchNormalization, LeakyRelu, MaxPool, average, Flatten")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,8] y) "
        f"{{ c = Conv<{PAD}>(x, w) n = BatchNormalization(c, gamma, beta, mean, var) l = LeakyRelu(n) "
        "m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(l) p = GlobalAveragePool(m) y = Flatten(p) }",
        w=normal(8, 4, 3, 3), gamma=1 + offset(8, 1), beta=offset(8, 2), mean=offset(8, 3), var=1 + offset(8, 4) ** 2,
    )  # fmt: skip

    def check(done: Done) -> None:
        assert not any(node.op_type == "BatchNormalization" for node in done.model.graph.node)

    return Case(model, IMAGE, static=2, check=check)


@case("C12 LayerNormalization with one large gamma")
def _() -> Case:
    gamma = np.ones(32, np.float32)
    gamma[0] = 50
    model = from_text(
        "g (float[5,32] x) => (float[5,32] y) { n = LayerNormalization(x, gamma, beta) m = MatMul(n, w) y = Add(m, x) }",
        gamma=gamma, beta=offset(32), w=normal(32, 32),
    )  # fmt: skip
    return Case(model, floats(x=(5, 32)), dynamic=1, bits=1, least=20)


def masked(softmax: str) -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,4,8,8] y) "
        f"{{ c = Conv<{PAD}>(x, w) p = Greater(c, zero) m = Where(p, c, never) y = {softmax} }}",
        w=normal(4, 4, 3, 3, scale=2), zero=np.float32(0), never=np.float32(-1e9),
    )  # fmt: skip
    return Case(model, IMAGE, static=1)


case("C13 Where with -1e9, then Softmax")(lambda: masked("Softmax<axis = -1>(m)"))
case("C13 Where with -1e9, then Relu")(lambda: masked("Relu(m)"))


@case("C14 Einsum with a constant")
def _() -> Case:
    model = from_text(
        'g (float[5,16] x) => (float[5,2,8] y) { h = MatMul(x, v) y = Einsum<equation = "bk,khd->bhd">(h, w) }',
        v=normal(16, 16), w=normal(16, 16, seed=1).reshape(16, 2, 8),
    )  # fmt: skip

    def check(done: Done) -> None:
        einsum = [node for node in done.model.graph.node if node.op_type == "Einsum"]
        assert bool(einsum) == ("Einsum" in [row["op"] for row in done.result.kept_float])

    return Case(model, floats(x=(5, 16)), dynamic=1, bits=1, check=check)


@case("C15 Split, Conv, Slice, Concat")
def _() -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,3,8,8] y) "
        f"{{ r = Conv<{PAD}>(x, v) a, b = Split<axis = 1>(r) c = Conv<{PAD}>(a, w) s = Slice(b, zero, one, one) "
        "y = Concat<axis = 1>(c, s) }",
        v=normal(4, 4, 3, 3), w=normal(2, 2, 3, 3, seed=1, scale=20), zero=np.array([0], np.int64), one=np.array([1], np.int64),
    )  # fmt: skip
    return Case(model, IMAGE, static=2, parts=(("y", 1, 0, 2), ("y", 1, 2, 3)))


@case("C16 a Conv whose weight is an input")
def _() -> Case:
    model = from_text(
        f"g (float[1,4,8,8] x, float[4,4,3,3] v) => (float[1,4,8,8] y) {{ c = Conv<{PAD}>(x, v) y = Conv<{PAD}>(c, w) }}",
        w=normal(4, 4, 3, 3),
    )  # fmt: skip
    return Case(model, floats(x=(1, 4, 8, 8), v=(4, 4, 3, 3)), static=1)


@case("C17 sequences around a product")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x) => (float[5,16] y) { s = SequenceConstruct(x, x) e = SequenceAt(s, one) "
        "h = MatMul(e, w) r = SequenceConstruct(h) y = SequenceAt(r, zero) }",
        w=normal(16, 16), one=np.array(1, np.int64), zero=np.array(0, np.int64),
    )  # fmt: skip
    return Case(model, floats(x=(5, 16)), dynamic=1, bits=1)


@case("C18 what nobody reads")
def _() -> Case:
    model = from_text(
        f"{IMAGES} {{ y = Conv<{PAD}>(x, w) d = Conv<{PAD}>(x, u) }}",
        w=normal(4, 4, 3, 3), u=normal(4, 4, 3, 3), unused=normal(64, 64),
    )  # fmt: skip
    return Case(model, IMAGE, static=1)


@case("C19 boxes for NonMaxSuppression")
def _() -> Case:
    model = from_text(
        "g (float[1,4,4,4] x) => (int64[M,3] i, float[1,16,4] boxes, float[1,2,16] scores) "
        f"{{ c = Conv<{PAD}>(x, v) f = Reshape(c, bs) a = Mul(f, many) boxes = Transpose<perm = [0, 2, 1]>(a) "
        f"d = Conv<{PAD}>(x, w) t = Reshape(d, ss) scores = Sigmoid(t) i = NonMaxSuppression(boxes, scores, most, iou, least) }}",
        v=normal(4, 4, 3, 3), w=normal(2, 4, 3, 3, seed=1), bs=np.array([1, 4, 16], np.int64), ss=np.array([1, 2, 16], np.int64),
        many=np.float32(50), most=np.array([1], np.int64), iou=np.array([0.5], np.float32), least=np.array([0.0], np.float32),
    )  # fmt: skip

    def check(done: Done) -> None:
        assert "NonMaxSuppression" in [node.op_type for node in done.model.graph.node]

    return Case(model, floats(x=(1, 4, 4, 4)), static=2, check=check)
