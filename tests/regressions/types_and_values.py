"""Types, values and what else a file can hold (the T cases of section 4.3)."""

from __future__ import annotations

import numpy as np
from networks import from_text
from onnx import TensorProto, helper, numpy_helper
from regressions.case import PAD, Case, Done, Suite, floats, normal, offset, one_payload

case = Suite()
IMAGE = floats(x=(1, 4, 8, 8))
IMAGES = "g (float[N,4,8,8] x) => (float[N,4,8,8] y)"


@case("T01 float16")
def _() -> Case:
    model = from_text(
        "g (float16[N,64] x) => (float16[N,16] y) { h = MatMul(x, w) y = Add(h, b) }",
        opset=21, w=normal(64, 16).astype(np.float16), b=offset(16).astype(np.float16),
    )  # fmt: skip
    model.ir_version = 10
    words = "works on float16"
    return Case(
        model,
        lambda rng: {"x": rng.normal(size=(5, 64)).astype(np.float16)},
        bits=1,
        nothing=dict.fromkeys(("static qdq", "static fused", "dynamic", "int8", "no data"), words),
        check=one_payload(64 * 16),
    )


@case("T02 float64")
def _() -> Case:
    model = from_text(
        "g (double[5,16] x) => (double[5,16] y) { y = MatMul(x, w) }",
        w=normal(16, 16).astype(np.float64),
    )
    words = "works on float64"
    return Case(
        model,
        lambda rng: {"x": rng.normal(size=(5, 16))},
        nothing=dict.fromkeys(("static qdq", "static fused", "dynamic", "int8", "no data"), words)
        | dict.fromkeys(("int4", "int4, no data", "int8 weights"), "its weight is DOUBLE"),
    )


@case("T02 a convolution of float64")
def _() -> Case:
    model = from_text(
        f"g (double[1,4,8,8] x) => (double[1,4,8,8] y) {{ [c] y = Conv<{PAD}>(x, w) }}",
        w=normal(4, 4, 3, 3).astype(np.float64),
    )
    feed = lambda rng: {"x": rng.normal(size=(1, 4, 8, 8))}  # noqa: E731 - one line
    return Case(model, feed, refused={"": "node 'c' is a Conv on float64"})


@case("T03 opset 10")
def _() -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,8] y) "
        f"{{ c = Conv<{PAD}>(x, w, b) r = Relu(c) m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r) "
        "p = GlobalAveragePool(m) y = Flatten(p) }",
        opset=10, w=normal(8, 4, 3, 3) * np.geomspace(0.1, 10, 8, dtype=np.float32)[:, None, None, None], b=offset(8),
    )  # fmt: skip
    return Case(model, IMAGE, static=1)


@case("T04 opset 23: RMSNormalization and Attention")
def _() -> Case:
    model = from_text(
        "g (float[1,5,32] x) => (float[1,5,32] y) { n = RMSNormalization(x, g) q = MatMul(n, v) "
        "a = Attention<q_num_heads = 2, kv_num_heads = 2>(q, n, n) y = MatMul(a, w) }",
        opset=23, g=1 + offset(32), v=normal(32, 32), w=normal(32, 32, seed=1),
    )  # fmt: skip
    model.ir_version = 11
    return Case(model, floats(x=(1, 5, 32)), dynamic=2, bits=2, least=22)


@case("T05 pixels of 8 bits")
def _() -> Case:
    model = from_text(
        "g (uint8[1,3,8,8] x) => (float[1,4,8,8] y) "
        f"{{ f = Cast<to = 1>(x) s = Div(f, most) y = Conv<{PAD}>(s, w) }}",
        w=normal(4, 3, 3, 3), most=np.float32(255),
    )  # fmt: skip
    return Case(
        model, lambda rng: {"x": rng.integers(0, 256, (1, 3, 8, 8)).astype(np.uint8)}, static=1
    )


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

    return Case(model, feed, dynamic=2, bits=2, static=2)


@case("T07 a weight of zeros")
def _() -> Case:
    model = from_text(
        f"{IMAGES} {{ c = Conv<{PAD}>(x, w) r = Relu(c) d = Conv<{PAD}>(r, v) y = Add(d, x) }}",
        w=np.zeros((4, 4, 3, 3), np.float32), v=normal(4, 4, 3, 3),
    )  # fmt: skip
    return Case(model, IMAGE, static=3)


@case("T07 an activation of zeros")
def _() -> Case:
    model = from_text(f"{IMAGES} {{ y = Conv<{PAD}>(x, w, b) }}", w=normal(4, 4, 3, 3), b=offset(4))
    return Case(model, lambda rng: {"x": np.zeros((1, 4, 8, 8), np.float32)}, static=1)


@case("T08 the logarithm of 0")
def _() -> Case:
    model = from_text(
        f"{IMAGES} {{ p = Relu(x) l = Log(p) r = Relu(l) y = Conv<{PAD}>(r, w) }}",
        w=normal(4, 4, 3, 3),
    )

    def check(done: Done) -> None:
        told = [row["why"] for row in done.result.plan if row["op"] == "Relu"]
        if done.result.samples["calibration"] and done.recipe in (
            "int8",
            "static qdq",
            "static fused",
        ):
            assert any("'l' is infinite" in why for why in told)

    return Case(model, IMAGE, static=1, check=check)


def with_nan(text: str, w: np.ndarray) -> Case:
    w.flat[-2] = np.nan
    made = from_text(f"g {text}", w=w)
    shape = tuple(d.dim_value or 1 for d in made.graph.input[0].type.tensor_type.shape.dim)
    index = tuple(int(i) for i in np.argwhere(np.isnan(w))[0])
    return Case(made, floats(x=shape), refused={"": f"weight 'w' holds nan at index {index}"})


case("T09 NaN in a kernel")(
    lambda: with_nan(
        f"(float[1,4,8,8] x) => (float[1,4,8,8] y) {{ y = Conv<{PAD}>(x, w) }}", normal(4, 4, 3, 3)
    )
)
case("T09 NaN in a matrix")(
    lambda: with_nan("(float[5,16] x) => (float[5,16] y) { y = MatMul(x, w) }", normal(16, 16))
)


@case("T10 one channel of an activation is 200 times as large")
def _() -> Case:
    feed = floats(x=(8, 32))

    def check(done: Done) -> None:
        if done.result.samples["held_out"] and done.recipe in ("int4", "int8 weights"):
            assert done.result.worst_db is not None
            assert done.result.worst_db < 18  # it is told

    model = from_text(
        "g (float[N,32] x) => (float[N,32] y) { n = LayerNormalization(x, g, b) h = Mul(n, k) y = MatMul(h, w) }",
        g=np.ones(32, np.float32), b=np.zeros(32, np.float32), k=np.where(np.arange(32) == 3, 200, 1).astype(np.float32),
        w=normal(32, 32) * np.where(np.arange(32) == 3, 0.005, 1).astype(np.float32)[:, None],
    )  # fmt: skip
    # without data nobody knows of the channel; in a block of few bits its small weights vanish
    bounds = {"no data": 2.0, "int4": 5.0, "int4, no data": 5.0, "int8 weights": 5.0}
    return Case(model, feed, dynamic=1, bits=1, bounds=bounds, check=check)


@case("T11 weights in float_data")
def _() -> Case:
    model = from_text(f"{IMAGES} {{ y = Conv<{PAD}>(x, w) }}")
    values = normal(4, 4, 3, 3)
    model.graph.initializer.append(
        helper.make_tensor("w", TensorProto.FLOAT, values.shape, values.ravel().tolist())
    )
    return Case(model, IMAGE, static=1)


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
    return Case(model, floats(x=(5, 16)), dynamic=1, bits=1, check=one_payload(256))


case("T12 a sparse weight, flat")(lambda: sparse(flat=True))
case("T12 a sparse weight, by index")(lambda: sparse(flat=False))


@case("T13 AveragePool behind a Conv")
def _() -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,4,1,1] y) "
        f"{{ c = Conv<{PAD}>(x, w) p = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(c) y = GlobalAveragePool(p) }}",
        w=normal(4, 4, 3, 3),
    )  # fmt: skip
    return Case(model, IMAGE, static=1)


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
        dynamic=1,
        bits=1,
    )


@case("T16 bfloat16 weights behind Casts")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x) => (float[5,16] y) { v = Cast<to = 1>(w) h = MatMul(x, v) c = Cast<to = 1>(b) y = Add(h, c) }"
    )
    for name, values in (("w", normal(16, 16)), ("b", offset(16))):
        tensor = helper.make_tensor(
            name, TensorProto.BFLOAT16, values.shape, values.ravel().tolist()
        )
        model.graph.initializer.append(tensor)
    return Case(model, floats(x=(5, 16)), dynamic=1, bits=1, check=one_payload(256))


@case("T16 float16 constants in a float32 graph")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x) => (float[5,16] y) { h = Cast<to = 10>(x) m = MatMul(h, w) f = Cast<to = 1>(m) y = MatMul(f, v) }",
        w=normal(16, 16).astype(np.float16), v=normal(16, 16, seed=1),
    )  # fmt: skip
    return Case(model, floats(x=(5, 16)), dynamic=1, bits=2)


@case("T17 properties and documentation")
def _() -> Case:
    model = from_text(f"{IMAGES} {{ y = Conv<{PAD}>(x, w) }}", w=normal(4, 4, 3, 3))
    model.doc_string = "about"
    model.metadata_props.add(key="labels", value="cat,dog")

    def check(done: Done) -> None:
        props = {p.key: p.value for p in done.model.metadata_props}
        assert props["labels"] == "cat,dog"
        assert props["qcompile.recipe"] == done.result.recipe
        assert done.model.doc_string == "about"

    return Case(model, IMAGE, static=1, check=check)
