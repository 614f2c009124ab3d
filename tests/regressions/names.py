"""Names, scopes and shared tensors (section 4.1 of the regression cases)."""

from __future__ import annotations

import numpy as np
import onnx
from networks import from_text
from onnx import TensorProto, helper, numpy_helper
from regressions.case import (
    PAD,
    Case,
    Done,
    Suite,
    floats,
    initializers,
    no_floats,
    nodes_of,
    normal,
    offset,
    one_payload,
)

case = Suite()
IMAGE = floats(x=(1, 4, 8, 8))
IMAGES = "g (float[N,4,8,8] x) => (float[N,4,8,8] y)"


@case("N01 nodes without names")
def _() -> Case:
    model = from_text(
        "g (float[N,16] x) => (float[N,8] y) { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }",
        a=normal(16, 32), b=normal(32, 8, seed=1),
    )  # fmt: skip
    assert not any(node.name for node in model.graph.node)
    return Case(model, floats(x=(5, 16)), dynamic=2, bits=2)


@case("N02 the activation is called as the shared bias would be")
def _() -> Case:
    model = from_text(
        f"{IMAGES} {{ b0 = Conv<{PAD}>(x, v, b) y = Conv<{PAD}>(b0, w, b) }}",
        v=normal(4, 4, 3, 3), w=normal(4, 4, 3, 3, seed=1, scale=0.01), b=offset(4),
    )  # fmt: skip
    return Case(model, IMAGE, static=2)


@case("N02b one bias, two weight scales")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y, float[N,4,8,8] z) "
        f"{{ y = Conv<{PAD}>(x, v, b) z = Conv<{PAD}>(x, w, b) }}",
        v=normal(4, 4, 3, 3), w=normal(4, 4, 3, 3, seed=1, scale=0.01), b=offset(4, scale=2),
    )  # fmt: skip
    return Case(model, IMAGE, static=2)


@case("N03 one weight, two products")
def _() -> Case:
    model = from_text(
        "g (float[N,16] x) => (float[N,16] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }",
        w=normal(16, 16),
    )  # fmt: skip
    return Case(model, floats(x=(5, 16)), dynamic=2, bits=2, check=one_payload(256))


@case("N04 a table that is looked up and multiplied by")
def _() -> Case:
    model = from_text(
        "g (int64[N] i, float[N,72] x) => (float[N,256] y, float[N,72] e) "
        "{ e = Gather(w, i) t = Transpose<perm = [1, 0]>(w) s = Add(e, x) y = MatMul(s, t) }",
        w=normal(256, 72, scale=8),
    )  # fmt: skip

    def check(done: Done) -> None:
        if done.result.format == "nbits":
            one_payload(256 * 72)(done)  # large enough to be stored once
        elif not done.recipe.startswith("static"):  # rows and columns have scales of their own
            no_floats(256)(done)

    return Case(
        model,
        lambda rng: {
            "i": rng.integers(0, 256, 6),
            "x": rng.normal(size=(6, 72)).astype(np.float32),
        },
        dynamic=1,
        bits=2,
        check=check,
    )


@case("N05 a table per channel, tied to the output product")
def _() -> Case:
    model = from_text(
        "g (int64[N] i) => (float[N,64] y, float[N,32] e) { e = Gather(w, i) y = Gemm<transB = 1>(e, w) }",
        w=normal(64, 32) * np.geomspace(0.1, 10, 64, dtype=np.float32)[:, None],
    )  # fmt: skip
    return Case(model, lambda rng: {"i": rng.integers(0, 64, 6)}, dynamic=1, bits=2)


@case("N06 names that ORT's tool would invent")
def _() -> Case:
    model = from_text(
        "g (float[N,16] x) => (float[N,16] w_scale) { [x_QuantizeLinear] w_zero_point = MatMul(x, w) "
        "[mm_quant] w_quantized = Relu(w_zero_point) [w_quantized_quant] w_scale = MatMul(w_quantized, v_zero_point) }",
        w=normal(16, 16), v_zero_point=normal(16, 16, seed=1),
    )  # fmt: skip
    return Case(model, floats(x=(5, 16)), dynamic=2, bits=2)


@case("N06 names that we would invent")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] x_q, float[N,4] x_dq) "
        f"{{ [x_quantize] x_quantize = Conv<{PAD}>(x, w, qc_scale) [qc_scale] w_scale = Relu(x_quantize) "
        f"[w_q] x_q = Conv<{PAD}>(w_scale, w_q, x_quantize_bias_q) [x_q_quantize] qc_zero_point = GlobalAveragePool(x_q) "
        "[d] w_dq = Flatten(qc_zero_point) [e] x_dq = MatMul(w_dq, x_quantized) }",
        w=normal(4, 4, 3, 3), w_q=normal(4, 4, 3, 3, seed=1), qc_scale=offset(4), x_quantize_bias_q=offset(4, 8),
        x_quantized=normal(4, 4),
    )  # fmt: skip
    return Case(model, IMAGE, static=3)


@case("N07 opset 11, IR 3, every initializer an input as well")
def _() -> Case:
    weights = {
        "w": normal(4, 4, 3, 3), "b": offset(4), "s": np.array([1, 256], np.int64), "m": normal(256, 8),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Reshape", ["r", "s"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])] + [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(w.dtype), w.shape)
        for name, w in weights.items()
    ]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])],
        [numpy_helper.from_array(w, name) for name, w in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=3)
    onnx.checker.check_model(model)
    return Case(model, IMAGE, static=1, dynamic=1, bits=1)


@case("N08 weights from Constant nodes")
def _() -> Case:
    model = from_text(
        f"{IMAGES} {{ c = Conv<{PAD}>(x, w, b) r = Relu(c) y = Conv<{PAD}>(r, w, b) }}"
    )
    for name, values in (("w", normal(4, 4, 3, 3)), ("b", offset(4))):
        node = helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values))
        model.graph.node.insert(0, node)
    return Case(model, IMAGE, static=2, check=no_floats(16))


@case("N09 a weight and its Identity")
def _() -> Case:
    model = from_text(
        "g (float[N,16] x) => (float[N,16] y) { h = MatMul(x, w) v = Identity(w) y = MatMul(h, v) }",
        w=normal(16, 16),
    )  # fmt: skip
    return Case(model, floats(x=(5, 16)), dynamic=2, bits=2, check=one_payload(256))


@case("N10 float16 weights behind Casts")
def _() -> Case:
    model = from_text(
        f"{IMAGES} {{ InsertedCast_w = Cast<to = 1>(w) InsertedCast_b = Cast<to = 1>(b) "
        f"y = Conv<{PAD}>(x, InsertedCast_w, InsertedCast_b) }}",
        w=normal(4, 4, 3, 3).astype(np.float16), b=offset(4).astype(np.float16),
    )  # fmt: skip

    def check(done: Done) -> None:
        assert not any(v.dtype == np.float16 for v in initializers(done.model).values())

    return Case(model, IMAGE, static=1, check=check)


@case("N11 a transposed weight")
def _() -> Case:
    model = from_text(
        "g (float[N,16] x) => (float[N,24] y) { t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }",
        w=normal(24, 16),
    )  # fmt: skip
    return Case(model, floats(x=(5, 16)), dynamic=1, bits=1, check=no_floats(24))


@case("N12 an output that a Relu reads")
def _() -> Case:
    model = from_text(
        f"g (float[N,4,8,8] x) => (float[N,4,8,8] c, float[N,4,8,8] y) {{ c = Conv<{PAD}>(x, w) y = Relu(c) }}",
        w=normal(4, 4, 3, 3),
    )  # fmt: skip
    return Case(model, IMAGE, static=1)


@case("N13 an input that is an output too")
def _() -> Case:
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y, float[N,4,8,8] z) "
        f"{{ r = Relu(x) y = Conv<{PAD}>(r, w) z = Identity(x) }}",
        w=normal(4, 4, 3, 3),
    )  # fmt: skip
    return Case(model, IMAGE, static=1)


@case("N14 a weight that is an output")
def _() -> Case:
    def check(done: Done) -> None:
        assert initializers(done.model)["w"].dtype == np.float32

    model = from_text(
        "g (float[N,16] x) => (float[N,16] y, float[16,16] w) { y = MatMul(x, w) }",
        w=normal(16, 16),
    )
    return Case(model, floats(x=(5, 16)), dynamic=1, bits=1, check=check)


@case("N15, N16 a Concat of one, and of the same twice and zeros")
def _() -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,12,8,8] y) "
        f"{{ a = Conv<{PAD}>(x, w) c = Concat<axis = 1>(a) y = Concat<axis = 1>(c, c, z) }}",
        w=normal(4, 4, 3, 3), z=np.zeros((1, 4, 8, 8), np.float32),
    )  # fmt: skip
    return Case(model, IMAGE, static=1)


@case("N17 a Concat with nothing")
def _() -> Case:
    model = from_text(
        f"g (float[1,4,8,8] x) => (float[1,4,8,8] y) {{ a = Conv<{PAD}>(x, w) y = Concat<axis = 1>(a, z) }}",
        w=normal(4, 4, 3, 3), z=np.zeros((1, 0, 8, 8), np.float32),
    )  # fmt: skip
    return Case(model, IMAGE, static=1)


@case("N18 two Pads")
def _() -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,4,12,12] y) "
        f'{{ c = Conv<{PAD}>(x, w) d = Pad(c, p, "") e = Pad<mode = "reflect">(d, p, "") y = Conv<{PAD}>(e, w) }}',
        w=normal(4, 4, 3, 3), p=np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
    )  # fmt: skip
    return Case(model, IMAGE, static=2)


@case("N19, N20 a Clip and a Resize with inputs left out")
def _() -> Case:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,4,13,13] y) "
        f'{{ c = Conv<{PAD}>(x, w) d = Clip(c, "", most) e = Resize<mode = "linear">(d, "", "", size) y = Conv<{PAD}>(e, w) }}',
        w=normal(4, 4, 3, 3), most=np.float32(0.7), size=np.array([1, 4, 13, 13], np.int64),
    )  # fmt: skip
    return Case(model, IMAGE, static=2)


@case("N20 a Resize between layouts")
def _() -> Case:
    model = from_text(
        "g (float[1,8,8,4] x) => (float[1,13,13,4] y) "
        f"{{ t = Transpose<perm = [0, 3, 1, 2]>(x) c = Conv<{PAD}>(t, w) u = Transpose<perm = [0, 2, 3, 1]>(c) "
        'd = Resize<mode = "linear">(u, "", "", size) e = Transpose<perm = [0, 3, 1, 2]>(d) f = Conv<pads = [1, 1, 1, 1]>(e, w) '
        "y = Transpose<perm = [0, 2, 3, 1]>(f) }",
        w=normal(4, 4, 3, 3), size=np.array([1, 13, 13, 4], np.int64),
    )  # fmt: skip
    return Case(model, floats(x=(1, 8, 8, 4)), static=2)


@case("N21 integers that make a shape")
def _() -> Case:
    model = from_text(
        "g (float[b,s,16] x) => (float[d,24] y) { p = Shape(x) b = Gather(p, zero) s = Gather(p, one) n = Mul(b, s) "
        "m = Add(n, more) o = Sub(m, more) u = Unsqueeze(o, axis) t = Concat<axis = 0>(u, rest) r = Reshape(x, t) "
        "y = MatMul(r, w) }",
        zero=np.array(0, np.int64), one=np.array(1, np.int64), more=np.array(3, np.int64), axis=np.array([0], np.int64),
        rest=np.array([-1], np.int64), w=normal(16, 24),
    )  # fmt: skip
    return Case(model, floats(x=(2, 3, 16)), dynamic=1, bits=1)


@case("N22 two Scans that read weights of the outer graph")
def _() -> Case:
    def scan(name: str, weight: str) -> str:
        return (
            f"Scan <num_scan_inputs = 1, body = {name} (float[1,16] s, float[1,16] e) => (float[1,16] n, float[1,16] o) "
            f"{{ a = Add(s, e) m = MatMul(a, {weight}) n = Tanh(m) o = Identity(n) }}>"
        )

    model = from_text(
        "g (float[6,1,16] x) => (float[6,1,16] y, float[1,16] t) "
        f"{{ r, p = {scan('one', 'v')}(zero, x) q, y = {scan('two', 'w')}(r, p) t = MatMul(q, w) }}",
        v=normal(16, 16), w=normal(16, 16, seed=1), zero=np.zeros((1, 16), np.float32),
    )  # fmt: skip

    def check(done: Done) -> None:
        bodies = [node for node in nodes_of(done.model.graph) if node.op_type == "Scan"]
        assert len(bodies) == 2
        large = [k for k, w in initializers(done.model).items() if w.nbytes >= 128]
        assert len(large) == 2, large

    return Case(model, floats(x=(6, 1, 16)), dynamic=1, bits=3, check=check)
