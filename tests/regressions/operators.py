"""Operators with their rarer attributes, ranks and values (section 4.2 of the regression cases)."""

from __future__ import annotations

import numpy as np
from networks import from_text
from onnx import TensorProto, helper
from regressions.case import (
    PAD,
    Case,
    Done,
    Suite,
    floats,
    initializers,
    no_floats,
    normal,
    offset,
    random,
)

case = Suite()
IMAGE = floats(x=(1, 4, 8, 8))


@case("O01 ConvTranspose in groups")
def _() -> Case:
    def check(done: Done) -> None:
        (row,) = (row for row in done.result.kept_float if row["op"] == "ConvTranspose")
        assert row["why"] in (
            "no integer kernel",
            "kernels for weights of few bits take no ConvTranspose",
        )

    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,6,8,8] y) "
        f"{{ c = Conv<{PAD}>(x, v) y = ConvTranspose<group = 2, {PAD}>(c, w, b) }}",
        v=normal(4, 4, 3, 3), w=normal(4, 3, 3, 3), b=offset(6),
    )  # fmt: skip
    return Case(model, IMAGE, static=1, check=check)


@case("O02 depthwise channels of 0, 1e-30, 1e-8 and 100")
def _() -> Case:
    w = normal(8, 1, 3, 3)
    w[:4] *= np.array([0, 1e-30, 1e-8, 100], np.float32)[:, None, None, None]
    model = from_text(
        "g (float[N,8,8,8] x) => (float[N,4,8,8] y) "
        f"{{ c = Conv<group = 8, {PAD}>(x, w, b) d = Clip(c, low, high) y = Conv(d, v) }}",
        w=w, b=offset(8), v=normal(4, 8, 1, 1), low=np.float32(0), high=np.float32(6),
    )  # fmt: skip
    return Case(model, floats(x=(1, 8, 8, 8)), static=2)


@case("O03 tiny weights, large biases")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,2,8,8] y) { y = Conv(x, w, b) }",
        w=normal(2, 4, 1, 1, scale=1e-7), b=np.array([5, -4.5], np.float32),
    )  # fmt: skip
    return Case(model, IMAGE, static=1)


@case("O04 1-D convolution")
def _() -> Case:
    model = from_text(
        "g (float[N,4,16] x) => (float[N,6,16] y) { y = Conv<pads = [1, 1]>(x, w, b) }",
        w=normal(6, 4, 3), b=offset(6),
    )  # fmt: skip
    return Case(model, floats(x=(1, 4, 16)), static=1)


@case("O05 3-D convolution")
def _() -> Case:
    model = from_text(
        "g (float[N,2,5,5,5] x) => (float[N,3,5,5,5] y) { y = Conv<pads = [1, 1, 1, 1, 1, 1]>(x, w, b) }",
        w=normal(3, 2, 3, 3, 3), b=offset(3),
    )  # fmt: skip
    return Case(model, floats(x=(1, 2, 5, 5, 5)), static=1)


def gemm(text: str, **kinds: float) -> Case:
    trans = "transB = 1" in text
    bias = kinds.pop("bias", 24)
    c = offset(24, scale=1) if bias == 24 else offset(1, scale=1) if bias == 1 else normal(5, 24)
    model = from_text(
        f"g (float[5,16] x) => (float[5,24] y) {{ y = Gemm<{text}>(x, w, c) }}",
        w=normal(24, 16).copy() if trans else normal(16, 24), c=c,
    )  # fmt: skip
    return Case(model, floats(x=(5, 16)), dynamic=1, bits=1)


case("O06 Gemm: alpha, beta, transB")(lambda: gemm("alpha = 0.5, beta = 2.0, transB = 1"))
case("O06 Gemm: beta 2")(lambda: gemm("beta = 2.0"))
case("O06 Gemm: beta a half")(lambda: gemm("beta = 0.5, transB = 1"))
case("O06b Gemm: beta 0")(lambda: gemm("beta = 0.0"))
case("O07 Gemm: one bias")(lambda: gemm("transB = 1", bias=1))
case("O08 Gemm: a bias a row")(lambda: gemm("transB = 0", bias=2))


@case("O06 Gemm: transA")
def _() -> Case:
    model = from_text(
        "g (float[16,5] x) => (float[5,24] y) "
        "{ y = Gemm<alpha = 0.5, beta = 2.0, transA = 1, transB = 1>(x, w, c) }",
        w=normal(24, 16), c=offset(24),
    )  # fmt: skip
    return Case(model, floats(x=(16, 5)), bits=1)


@case("O09 Gemm of inputs")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x, float[16,16] w, float[16] c) => (float[5,8] y) { h = Gemm(x, w, c) y = MatMul(h, v) }",
        v=normal(16, 8),
    )  # fmt: skip
    return Case(model, floats(x=(5, 16), w=(16, 16), c=(16,)), dynamic=1, bits=1)


@case("O10 a batch of weights")
def _() -> Case:
    model = from_text(
        "g (float[2,4,16] x) => (float[2,4,8] y) { h = MatMul(x, w) y = MatMul(h, v) }",
        w=np.stack([normal(16, 24), normal(16, 24, seed=1)]), v=normal(24, 8),
    )  # fmt: skip
    return Case(model, floats(x=(2, 4, 16)), dynamic=1, bits=1)


@case("O11 the weight comes first")
def _() -> Case:
    model = from_text(
        "g (float[16,20] x) => (float[8,6] y) { h = MatMul(w, x) y = MatMul(h, v) }",
        w=normal(8, 16), v=normal(20, 6),
    )  # fmt: skip
    return Case(model, floats(x=(16, 20)), dynamic=1, bits=1)


@case("O12 a weight of one dimension")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x) => (float[5] y) { h = MatMul(x, v) y = MatMul(h, w) }",
        w=normal(16, 1)[:, 0].copy(), v=normal(16, 16),
    )  # fmt: skip
    return Case(model, floats(x=(5, 16)), dynamic=1, bits=1)


@case("O13 Relu and Sigmoid of one Conv")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y) "
        f"{{ c = Conv<{PAD}>(x, w) r = Relu(c) s = Sigmoid(c) y = Mul(r, s) }}",
        w=normal(4, 4, 3, 3),
    )  # fmt: skip
    return Case(model, IMAGE, static=3, least=22)  # a product reaches beyond what calibrated


@case("O14 SiLU between convolutions")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y) "
        f"{{ c = Conv<{PAD}>(x, w) s = Sigmoid(c) m = Mul(c, s) y = Conv<{PAD}>(m, v) }}",
        w=normal(4, 4, 3, 3, scale=2), v=normal(4, 4, 3, 3, seed=1),
    )  # fmt: skip
    return Case(model, IMAGE, static=4)


@case("O14b a residual")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y) "
        f"{{ r = Relu(x) c = Conv<{PAD}>(r, w) a = Add(c, r) y = Relu(a) }}",
        w=normal(4, 4, 3, 3),
    )  # fmt: skip
    return Case(model, IMAGE, static=2)


def attention(masked: float) -> Case:
    """Four tokens; the second half of the keys is masked for the first two."""
    mask = np.zeros((1, 4, 4), np.float32)
    mask[:, :2, 2:] = masked
    model = from_text(
        "g (float[1,4,16] x) => (float[1,4,16] y) { q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) "
        "t = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, t) m = Add(s, mask) p = Softmax<axis = -1>(m) "
        "c = MatMul(p, v) y = MatMul(c, wo) }",
        wq=normal(16, 16), wk=normal(16, 16, seed=1), wv=normal(16, 16, seed=2), wo=normal(16, 16, seed=3), mask=mask,
    )  # fmt: skip
    return Case(model, floats(x=(1, 4, 16)), dynamic=4, bits=4, least=22)


case("O15 an attention mask of -FLT_MAX")(lambda: attention(float(np.finfo(np.float32).min)))
case("O16 an attention mask of -inf")(lambda: attention(-np.inf))
case("an attention mask of -1e9")(lambda: attention(-1e9))


@case("O15 a mask in an image")
def _() -> Case:
    """Here the Add could be an integer kernel: its range would be that of the mask."""
    mask = np.zeros((1, 1, 8, 8), np.float32)
    mask[..., 5:] = np.finfo(np.float32).min
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,4,8,8] y) "
        f"{{ c = Conv<{PAD}>(x, w) z = Mul(x, zero) n = Add(z, mask) m = Add(c, n) y = Softmax<axis = -1>(m) }}",
        w=normal(4, 4, 3, 3), mask=mask, zero=np.zeros(1, np.float32),
    )  # fmt: skip
    return Case(model, IMAGE, static=1)


@case("O17 Softmax between convolutions")
def _() -> Case:
    def check(done: Done) -> None:
        kinds = done.result.kernels["operators"]
        assert "QLinearSoftmax" not in kinds  # several times slower than float
        assert kinds["Softmax"] == 1

    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,4,8,8] y) "
        f"{{ c = Conv<{PAD}>(x, v) s = Softmax<axis = -1>(c) y = Conv<{PAD}>(s, w) }}",
        v=normal(4, 4, 3, 3, scale=3), w=normal(4, 4, 3, 3, seed=1),
    )  # fmt: skip
    return Case(model, IMAGE, static=2, check=check)


@case("O18 global average of codes")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,4,1,1] y) "
        f"{{ c = Conv<{PAD}>(x, w, b) r = Relu(c) y = GlobalAveragePool(r) }}",
        w=normal(4, 4, 3, 3), b=offset(4),
    )  # fmt: skip
    return Case(model, IMAGE, static=2)


def blocks(depth: int, width: int, block: int) -> Case:
    """A product whose depth or width is no multiple of what kernels like."""
    model = from_text(
        f"g (float[5,{depth}] x) => (float[5,{width}] y) {{ y = MatMul(x, w) }}",
        w=normal(depth, width),
    )
    few = ("int4", "int4, no data", "int8 weights")
    refused = dict.fromkeys(few, f"block is {block}") if block > 256 else {}
    options = {"block": block}
    feed = floats(x=(5, depth))
    return Case(model, feed, dynamic=1, bits=1, refused=refused, options=options)


case("O19 blocks of 16 of a depth of 64, 7 columns")(lambda: blocks(64, 7, 16))
case("O19 blocks of 16 of a depth of 72")(lambda: blocks(72, 8, 16))
case("O19 blocks of 32 of a depth of 40, 3 columns")(lambda: blocks(40, 3, 32))
case("O19 blocks of 256 of a depth of 1024")(lambda: blocks(1024, 4, 256))
case("O19 blocks of 512")(lambda: blocks(1024, 4, 512))


@case("O20 a product with dequantized 4-bit codes")
def _() -> Case:
    model = from_text(
        "g (float[5,32] x) => (float[5,8] y) { d = DequantizeLinear<axis = 0, block_size = 16>(w, s) y = MatMul(x, d) }",
        opset=21, s=np.full((2, 8), 0.1, np.float32),
    )  # fmt: skip
    codes = random(0).integers(-8, 8, 256).tolist()
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.INT4, [32, 8], codes))
    model.ir_version = 10
    return Case(model, floats(x=(5, 32)), refused={"": "is a DequantizeLinear"})


@case("O21 a table whose rows are no multiple of a block")
def _() -> Case:
    model = from_text(
        "g (int64[N] i) => (float[N,72] y) { y = Gather(w, i) }", w=normal(64, 72, scale=8)
    )
    return Case(model, lambda rng: {"i": rng.integers(0, 64, 6)}, dynamic=1, bits=1)


@case("O22 codes without a zero point")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x) => (float[5,8] y) { d = DequantizeLinear(w, s) f = Reshape(d, n) y = MatMul(x, f) }",
        w=random(0).integers(-128, 128, (8, 16)).astype(np.int8), s=np.float32(0.01), n=np.array([16, 8], np.int64),
    )  # fmt: skip
    return Case(model, floats(x=(5, 16)), refused={"": "is a DequantizeLinear"})


@case("O23 scales of output channels say their axis")
def _() -> Case:
    def check(done: Done) -> None:
        weights = {
            k for k, v in initializers(done.model).items() if v.ndim == 4 and v.dtype == np.int8
        }
        found = [
            n
            for n in done.model.graph.node
            if n.op_type == "DequantizeLinear" and n.input[0] in weights
        ]
        axes = [[a.i for a in node.attribute if a.name == "axis"] for node in found]
        assert all(axis == [0] for axis in axes)
        assert len(axes) == (done.recipe == "static qdq")

    model = from_text(
        f"g (float[N,4,8,8] x) => (float[N,8,8,8] y) {{ y = Conv<{PAD}>(x, w, b) }}",
        w=normal(8, 4, 3, 3) * np.geomspace(0.1, 10, 8, dtype=np.float32)[:, None, None, None], b=offset(8),
    )  # fmt: skip
    return Case(model, IMAGE, static=1, check=check)


@case("O24 a transposed kernel")
def _() -> Case:
    model = from_text(
        f"g (float[N,4,8,8] x) => (float[N,6,8,8] y) {{ t = Transpose<perm = [1, 0, 2, 3]>(w) y = Conv<{PAD}>(x, t) }}",
        w=np.ascontiguousarray(normal(6, 4, 3, 3).transpose(1, 0, 2, 3)) * np.geomspace(0.1, 10, 6, dtype=np.float32)[:, None, None],
    )  # fmt: skip
    return Case(model, IMAGE, static=1, check=no_floats(16))


@case("O24 a transposed kernel of codes")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,6,8,8] y) "
        f"{{ d = DequantizeLinear<axis = 0>(w, s) t = Transpose<perm = [1, 0, 2, 3]>(d) y = Conv<{PAD}>(x, t) }}",
        w=random(0).integers(-128, 128, (4, 6, 3, 3)).astype(np.int8), s=np.float32([0.01, 0.02, 0.03, 0.04]),
    )  # fmt: skip
    return Case(model, IMAGE, refused={"": "is a DequantizeLinear"})


@case("O25 convolutions without attributes")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,4,6,6] y) { c = Conv(x, v) y = Conv(c, w, b) }",
        v=normal(4, 4, 1, 1), w=normal(4, 4, 3, 3), b=offset(4),
    )  # fmt: skip
    return Case(model, IMAGE, static=2)
