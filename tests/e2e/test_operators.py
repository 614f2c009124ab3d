"""Operators with their rarer attributes, ranks and values (section 4.2 of the regression cases)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from networks import from_text
from torture import PAD, Case, Suite, assert_right, floats, normal, offset

from qcompile.recipe import Format
from qcompile.report import Result

pytestmark = pytest.mark.usefixtures("clock", "eager_target")
case = Suite()
IMAGE = floats(x=(1, 4, 8, 8))


@case("O01 ConvTranspose in groups")
def _() -> Case:
    def check(result: Result, model: onnx.ModelProto) -> None:
        (row,) = (row for row in result.kept_float if row["op"] == "ConvTranspose")
        assert row["why"] == "no integer kernel"

    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,6,8,8] y) "
        f"{{ c = Conv<{PAD}>(x, v) y = ConvTranspose<group = 2, {PAD}>(c, w, b) }}",
        v=normal(4, 4, 3, 3), w=normal(4, 3, 3, 3), b=offset(6),
    )  # fmt: skip
    return Case(model, IMAGE, check=check)


@case("O02 depthwise channels of 0, 1e-30, 1e-8 and 100")
def _() -> Case:
    w = normal(8, 1, 3, 3)
    w[:4] *= np.array([0, 1e-30, 1e-8, 100], np.float32)[:, None, None, None]
    model = from_text(
        "g (float[N,8,8,8] x) => (float[N,4,8,8] y) "
        f"{{ c = Conv<group = 8, {PAD}>(x, w, b) d = Clip(c, low, high) y = Conv(d, v) }}",
        w=w, b=offset(8), v=normal(4, 8, 1, 1), low=np.float32(0), high=np.float32(6),
    )  # fmt: skip
    return Case(model, floats(x=(1, 8, 8, 8)), integer=2)


@case("O03 tiny weights, large biases")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,2,8,8] y) { y = Conv(x, w, b) }",
        w=normal(2, 4, 1, 1, scale=1e-7), b=np.array([5, -4.5], np.float32),
    )  # fmt: skip
    return Case(model, IMAGE)


@case("O04 1-D convolution")
def _() -> Case:
    model = from_text(
        "g (float[N,4,16] x) => (float[N,6,16] y) { y = Conv<pads = [1, 1]>(x, w, b) }",
        w=normal(6, 4, 3), b=offset(6),
    )  # fmt: skip
    return Case(model, floats(x=(1, 4, 16)))


@case("O05 3-D convolution")
def _() -> Case:
    model = from_text(
        "g (float[N,2,5,5,5] x) => (float[N,3,5,5,5] y) { y = Conv<pads = [1, 1, 1, 1, 1, 1]>(x, w, b) }",
        w=normal(3, 2, 3, 3, 3), b=offset(3),
    )  # fmt: skip
    return Case(model, floats(x=(1, 2, 5, 5, 5)))


def gemm(text: str, **kinds: float) -> Case:
    trans = "transB = 1" in text
    bias = kinds.pop("bias", 24)
    c = offset(24, scale=1) if bias == 24 else offset(1, scale=1) if bias == 1 else normal(5, 24)
    model = from_text(
        f"g (float[5,16] x) => (float[5,24] y) {{ y = Gemm<{text}>(x, w, c) }}",
        w=normal(24, 16).copy() if trans else normal(16, 24), c=c,
    )  # fmt: skip
    return Case(model, floats(x=(5, 16)))


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
    return Case(model, floats(x=(16, 5)), integer=0)


@case("O09 Gemm of inputs")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x, float[16,8] w, float[8] c) => (float[5,8] y) { h = Gemm(x, w, c) y = MatMul(h, v) }",
        v=normal(8, 8),
    )  # fmt: skip
    return Case(model, floats(x=(5, 16), w=(16, 8), c=(8,)))


@case("O10 a batch of weights")
def _() -> Case:
    model = from_text(
        "g (float[2,4,16] x) => (float[2,4,8] y) { h = MatMul(x, w) y = MatMul(h, v) }",
        w=np.stack([normal(16, 8), normal(16, 8, seed=1)]), v=normal(8, 8),
    )  # fmt: skip
    return Case(model, floats(x=(2, 4, 16)))


@case("O11 the weight comes first")
def _() -> Case:
    model = from_text(
        "g (float[16,5] x) => (float[8,6] y) { h = MatMul(w, x) y = MatMul(h, v) }",
        w=normal(8, 16), v=normal(5, 6),
    )  # fmt: skip
    return Case(model, floats(x=(16, 5)))


@case("O12 a weight of one dimension")
def _() -> Case:
    model = from_text(
        "g (float[5,16] x) => (float[5] y) { h = MatMul(x, v) y = MatMul(h, w) }",
        w=normal(16, 1)[:, 0].copy(), v=normal(16, 16),
    )  # fmt: skip
    return Case(model, floats(x=(5, 16)))


@case("O13 Relu and Sigmoid of one Conv")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y) "
        f"{{ c = Conv<{PAD}>(x, w) r = Relu(c) s = Sigmoid(c) y = Mul(r, s) }}",
        w=normal(4, 4, 3, 3),
    )  # fmt: skip
    return Case(model, IMAGE, integer=3)


@case("O14 SiLU between convolutions")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y) "
        f"{{ c = Conv<{PAD}>(x, w) s = Sigmoid(c) m = Mul(c, s) y = Conv<{PAD}>(m, v) }}",
        w=normal(4, 4, 3, 3, scale=2), v=normal(4, 4, 3, 3, seed=1),
    )  # fmt: skip
    return Case(model, IMAGE, integer=4)


@case("O14b a residual")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y) "
        f"{{ r = Relu(x) c = Conv<{PAD}>(r, w) a = Add(c, r) y = Relu(a) }}",
        w=normal(4, 4, 3, 3),
    )  # fmt: skip
    return Case(model, IMAGE, integer=2)


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
    return Case(model, floats(x=(1, 4, 16)), integer=4, least=22)


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
    return Case(model, IMAGE)


@pytest.mark.parametrize("form", ["fused", "qdq"])
@pytest.mark.parametrize("name", case.makers)
def test_operators(name: str, form: Format, tmp_path: Path) -> None:
    assert_right(case.makers[name](), tmp_path, form)
