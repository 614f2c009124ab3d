"""InsertQdq and LowerInteger, through `build`, against numpy and ONNX Runtime."""

import numpy as np
import pytest
from lowering import assert_lowered, compiled, constant, integer_ops, op_types
from rewrites import run

from qcompile.graph.edit import array

MAP = "g (float[1,4,6,6] x) => (float[1,4,6,6] y)"
K = constant("k", 4, 4, 3, 3)
SOFT = constant("k", 4, 4, 3, 3, scale=0.1)  # for functions that magnify an error around 0
B = constant("b", 4)
PAD = "pads = [1, 1, 1, 1]"


# name: graph, integer operators of the fused form
CASES = {
    "conv": (f"{MAP} <{K}, {B}> {{ [a] y = Conv<{PAD}>(x, k, b) }}", ["QLinearConv"]),
    "conv without bias": (f"{MAP} <{K}> {{ [a] y = Conv<{PAD}>(x, k) }}", ["QLinearConv"]),
    "conv missing bias": (f'{MAP} <{K}> {{ [a] y = Conv<{PAD}>(x, k, "") }}', ["QLinearConv"]),
    "conv relu": (f"{MAP} <{K}, {B}> {{ [a] t = Conv<{PAD}>(x, k, b) [r] y = Relu(t) }}", ["QLinearConv"]),
    "conv clip": (
        f"{MAP} <{K}, {B}, float low = {{0}}, float high = {{6}}> {{ t = Conv<{PAD}>(x, k, b) y = Clip(t, low, high) }}",
        ["QLinearConv"],
    ),
    "conv clip below": (
        f"{MAP} <{K}, float low = {{-2}}> {{ t = Conv<{PAD}>(x, k) y = Clip(t, low) }}", ["QLinearConv"],
    ),
    "two convs": (
        f"{MAP} <{K}, {B}, {constant('k2', 4, 4, 1, 1)}> {{ t = Conv<{PAD}>(x, k, b) u = Relu(t) y = Conv(u, k2, b) }}",
        ["QLinearConv", "QLinearConv"],
    ),
    "depthwise": (f"{MAP} <{constant('k', 4, 1, 3, 3)}, {B}> {{ y = Conv<group = 4, {PAD}>(x, k, b) }}", ["QLinearConv"]),
    "grouped": (f"{MAP} <{constant('k', 4, 2, 3, 3)}, {B}> {{ y = Conv<group = 2, {PAD}>(x, k, b) }}", ["QLinearConv"]),
    "1-d": (
        f"g (float[1,4,9] x) => (float[1,3,9] y) <{constant('k', 3, 4, 3)}, {constant('b', 3)}> {{ t = Conv<pads = [1, 1]>(x, k, b) y = Relu(t) }}",
        ["QLinearConv"],
    ),
    "strided, dilated": (
        f"g (float[1,4,9,9] x) => (float[1,4,3,3] y) <{K}> {{ y = Conv<strides = [2, 2], dilations = [2, 2]>(x, k) }}",
        ["QLinearConv"],
    ),
    "add": (f"{MAP} <{K}> {{ t = Conv<{PAD}>(x, k) y = Add(t, x) }}", ["QLinearConv", "QLinearAdd"]),
    "add relu": (f"{MAP} <{K}> {{ t = Conv<{PAD}>(x, k) u = Add(t, x) y = Relu(u) }}", ["QLinearConv", "QLinearAdd"]),
    "mul": (f"{MAP} <{K}> {{ t = Conv<{PAD}>(x, k) y = Mul(t, x) }}", ["QLinearConv", "QLinearMul"]),
    "mul by one a channel": (
        "g (float[1,4,6,6] x, float[1,4,1,1] z) => (float[1,4,6,6] y) { y = Mul(x, z) }", ["QLinearMul"],
    ),
    "add to itself": ("g (float[2,6] x) => (float[2,6] y) { y = Add(x, x) }", ["QLinearAdd"]),
    "concat of different scales": (
        f"g (float[1,4,6,6] x, float[1,2,6,6] z) => (float[1,10,6,6] y) <{K}> {{ t = Conv<{PAD}>(x, k) y = Concat<axis = 1>(t, z, x) }}",
        ["QLinearConv", "QLinearConcat"],
    ),
    "concat along a negative axis": (
        "g (float[2,3] x, float[2,2] z) => (float[2,5] y) { y = Concat<axis = -1>(x, z) }", ["QLinearConcat"],
    ),
    "max pool": (
        f"g (float[1,4,6,6] x) => (float[1,4,3,3] y) <{K}> {{ t = Conv<{PAD}>(x, k) y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(t) }}",
        ["QLinearConv", "MaxPool"],
    ),
    "transpose": (f"g (float[1,4,6,6] x) => (float[1,6,6,4] y) <{K}> {{ t = Conv<{PAD}>(x, k) y = Transpose<perm = [0, 2, 3, 1]>(t) }}", ["QLinearConv", "Transpose"]),
    "reshape": (
        f"g (float[1,4,6,6] x) => (float[4,36] y) <{K}, int64[2] s = {{4, 36}}> {{ t = Conv<{PAD}>(x, k) y = Reshape(t, s) }}",
        ["QLinearConv", "Reshape"],
    ),
    "flatten": (f"g (float[1,4,6,6] x) => (float[1,144] y) <{K}> {{ t = Conv<{PAD}>(x, k) y = Flatten(t) }}", ["QLinearConv", "Flatten"]),
    "unsqueeze, squeeze": (
        f"{MAP} <{K}, int64[1] a = {{2}}> {{ t = Conv<{PAD}>(x, k) u = Unsqueeze(t, a) y = Squeeze(u, a) }}",
        ["QLinearConv", "Unsqueeze", "Squeeze"],
    ),
    "slice": (
        f"g (float[1,4,6,6] x) => (float[1,2,6,6] y) <{K}, int64[1] s = {{1}}, int64[1] e = {{3}}, int64[1] a = {{1}}> {{ t = Conv<{PAD}>(x, k) y = Slice(t, s, e, a) }}",
        ["QLinearConv", "Slice"],
    ),
    "split": (
        f"g (float[1,4,6,6] x) => (float[1,1,6,6] y, float[1,2,6,6] z) <{K}, int64[3] s = {{1, 1, 2}}> {{ t = Conv<{PAD}>(x, k) y, u, z = Split<axis = 1>(t, s) }}",
        ["QLinearConv", "Split"],
    ),
    "gather of channels": (
        f"g (float[1,4,6,6] x) => (float[1,2,6,6] y) <{K}, int64[2] i = {{3, 0}}> {{ t = Conv<{PAD}>(x, k) y = Gather<axis = 1>(t, i) }}",
        ["QLinearConv", "Gather"],
    ),
    "resize": (
        f'g (float[1,4,6,6] x) => (float[1,4,12,12] y) <{K}, float[4] s = {{1, 1, 2, 2}}> {{ t = Conv<{PAD}>(x, k) y = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">(t, "", s) }}',
        ["QLinearConv", "Resize"],
    ),
    "depth to space": (f"g (float[1,4,6,6] x) => (float[1,1,12,12] y) <{K}> {{ t = Conv<{PAD}>(x, k) y = DepthToSpace<blocksize = 2>(t) }}", ["QLinearConv", "DepthToSpace"]),
    "global average pool": (f"g (float[1,4,6,6] x) => (float[1,4,1,1] y) <{K}> {{ t = Conv<{PAD}>(x, k) y = GlobalAveragePool(t) }}", ["QLinearConv", "QLinearGlobalAveragePool"]),
    "sigmoid": (f"{MAP} <{SOFT}> {{ t = Conv<{PAD}>(x, k) y = Sigmoid(t) }}", ["QLinearConv", "QLinearSigmoid"]),
    "swish": (f"{MAP} <{SOFT}> {{ t = Conv<{PAD}>(x, k) s = Sigmoid(t) y = Mul(t, s) }}", ["QLinearConv", "QLinearSigmoid", "QLinearMul"]),
    "leaky relu": (f"{MAP} <{K}> {{ t = Conv<{PAD}>(x, k) y = LeakyRelu<alpha = 0.1>(t) }}", ["QLinearConv", "QLinearLeakyRelu"]),
    "hard sigmoid": (f"{MAP} <{K}> {{ t = Conv<{PAD}>(x, k) y = HardSigmoid<alpha = 0.16666667, beta = 0.5>(t) }}", ["QLinearConv", "QLinearLeakyRelu"]),
    "hard swish": (
        f"{MAP} <{K}> {{ t = Conv<{PAD}>(x, k) s = HardSigmoid<alpha = 0.16666667, beta = 0.5>(t) y = Mul(t, s) }}",
        ["QLinearConv", "QLinearLeakyRelu", "QLinearMul"],
    ),
    "standalone relu": ("g (float[2,8] x) => (float[2,8] y) { t = Add(x, x) [r] y = Relu(x) z = Mul(t, y) }", ["QLinearLeakyRelu"]),
    "standalone clip": (
        f"{MAP} <{K}, float low = {{0}}, float high = {{6}}> {{ t = Conv<{PAD}>(x, k) u = Clip(t, low, high) y = Add(u, t) }}",
        ["QLinearConv", "QLinearLeakyRelu", "QLinearAdd"],
    ),
    "residual": (
        f"{MAP} <{K}, {constant('k2', 4, 4, 3, 3, scale=0.2)}, {B}> {{ s = Conv<{PAD}>(x, k, b) r = Relu(s) "
        f"t = Conv<{PAD}>(r, k2, b) u = Relu(t) v = Conv<{PAD}>(u, k2) w = Add(v, r) y = Relu(w) }}",
        ["QLinearConv", "QLinearConv", "QLinearConv", "QLinearAdd"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_against_numpy_and_each_other(case: str) -> None:
    text, wanted = CASES[case]
    made = compiled(text)
    assert set(made.forms().values()) <= {"static", "absorbed"}
    # A code that differs by one is multiplied by the kernels behind it.
    assert_lowered(made, fused=1.01 if len(wanted) < 3 else 2.01)
    assert integer_ops(made.fused) == wanted


def test_signed_activations() -> None:
    """The target for ARM has int8 activations: every rule again, with zero points below 0."""
    for case in (
        "conv relu",
        "add relu",
        "mul",
        "swish",
        "hard swish",
        "standalone clip",
        "concat of different scales",
    ):
        made = compiled(CASES[case][0], target="ort-cpu-arm64")
        assert_lowered(made, fused=2.01)
        assert integer_ops(made.fused) == CASES[case][1]


# Products and sums with a number change what codes mean, and cost nothing.
FREE = {
    "product before a convolution": (
        f"{MAP} <{K}, float c = {{0.5}}> {{ [free] t = Mul(x, c) y = Conv<{PAD}>(t, k) }}", ["QLinearConv"],
    ),
    "sum before a convolution": (
        f"{MAP} <{K}, float c = {{2.5}}> {{ [free] t = Add(x, c) y = Conv<{PAD}>(t, k) }}",
        ["QLinearConv"],
    ),
    "after a convolution that is read twice": (
        f"{MAP} <{K}, float c = {{3.7}}> {{ t = Conv<{PAD}>(x, k) [free] u = Mul(c, t) y = Add(u, t) }}",
        ["QLinearConv", "QLinearAdd"],
    ),
    "a chain": (
        f"{MAP} <{K}, float a = {{2}}, float b = {{-1}}> {{ [one] t = Mul(x, a) [free] u = Add(b, t) y = Conv<{PAD}>(u, k) }}",
        ["QLinearConv"],
    ),
    "as the output": (
        f"{MAP} <{K}, float c = {{3.7}}> {{ t = Conv<{PAD}>(x, k) u = Add(t, x) [free] y = Mul(u, c) }}",
        ["QLinearConv", "QLinearAdd"],
    ),
    "as the output, and its operand": (
        f"g (float[1,4,6,6] x) => (float[1,4,6,6] y, float[1,4,6,6] u) <{K}, float c = {{3.7}}> {{ t = Conv<{PAD}>(x, k) u = Add(t, x) [free] y = Mul(u, c) }}",
        ["QLinearConv", "QLinearAdd"],
    ),
    "two outputs of one meaning": (
        f"g (float[1,4,6,6] x) => (float[1,4,6,6] y, float[1,4,6,6] z) <{K}, float c = {{3.7}}> {{ t = Conv<{PAD}>(x, k) u = Add(t, x) [free] y = Mul(u, c) [more] z = Mul(c, u) }}",
        ["QLinearConv", "QLinearAdd"],
    ),
    "behind what only moves": (
        f"g (float[1,4,6,6] x) => (float[1,6,6,4] y) <{K}, float c = {{-3}}> {{ t = Conv<{PAD}>(x, k) u = Transpose<perm = [0, 2, 3, 1]>(t) [free] y = Add(u, c) }}",
        ["QLinearConv", "Transpose"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FREE)
def test_products_and_sums_with_a_number(case: str) -> None:
    text, wanted = FREE[case]
    made = compiled(text)
    assert made.forms()["free"] == "free"
    assert_lowered(made)
    assert integer_ops(made.fused) == wanted


@pytest.mark.parametrize("offset", [-40.0, -3.0, -0.3, 0.02, 1.0, 17.0, 300.0])
def test_an_offset_moves_the_zero_point(offset: float) -> None:
    """Zero of both, sum and operand, must be a code: of the padding, and of the saturation."""
    text = f"{MAP} <{K}, float c = {{{offset}}}> {{ [free] t = Add(x, c) s = Conv<{PAD}>(t, k) y = Add(s, x) }}"
    made = compiled(text)
    assert_lowered(made, accuracy=0.2)
    x, t = made.solution.params["x"], made.solution.params["t"]
    assert x.scale == t.scale
    moved = int(x.zero) - int(t.zero)
    assert abs(moved * float(x.scale) - offset) <= 0.51 * float(x.scale)


def test_a_convolution_that_the_graph_returns_keeps_its_negatives() -> None:
    text = f"g (float[1,4,6,6] x) => (float[1,4,6,6] y, float[1,4,6,6] t) <{K}> {{ [conv] t = Conv<{PAD}>(x, k) [relu] y = Relu(t) }}"
    made = compiled(text)
    assert made.forms() == {"conv": "static", "relu": "static"}
    assert_lowered(made)
    assert run(made.fused, made.feeds[0])[1].min() < -1


def test_a_convolution_that_a_body_reads_keeps_its_negatives() -> None:
    text = f"""g (float[1,4,6,6] x, bool c) => (float[1,4,6,6] y, float[1,4,6,6] z) <{K}> {{
        [conv] t = Conv<{PAD}>(x, k) [relu] y = Relu(t)
        z = If(c) <then_branch = a () => (float[1,4,6,6] u) {{ u = Neg(t) }},
                   else_branch = b () => (float[1,4,6,6] v) {{ v = Neg(y) }}> }}"""
    for taken in (True, False):
        made = compiled(text, given={"c": np.array(taken)})
        assert made.forms()["relu"] == "static"
        for feed in made.feeds:
            _, z = run(made.qdq, feed)
            t = -run(made.prepared, feed)[1]
            assert np.abs(-z - t).max() < 0.03 * np.abs(t).max()
            assert np.array_equal(run(made.fused, feed)[1], z)


@pytest.mark.parametrize(("number", "kept"), [(3.0, True), (-3.0, False), (0.5, True)])
def test_a_relu_whose_codes_reach_below_zero_stays(number: float, kept: bool) -> None:
    """Relu(x) + 3 wants a code for -3: saturation then is no Relu any more."""
    text = f"{MAP} <{K}, float c = {{{number}}}> {{ s = Conv<{PAD}>(x, k) [relu] t = Relu(s) [free] u = Add(t, c) y = Mul(u, x) }}"
    made = compiled(text)
    if made.forms()["free"] != "free":
        pytest.skip("the plan has found out")
    assert made.forms()["relu"] == "absorbed"
    assert_lowered(made)
    kinds = op_types(made.fused)
    assert ("Relu" in kinds or "QLinearLeakyRelu" in kinds) == kept
    assert ("Relu" in op_types(made.qdq)) == kept


def test_a_hard_sigmoid_of_other_codes_stays() -> None:
    text = f"{MAP} <{K}> {{ t = Conv<{PAD}>(x, k) [gate] y = HardSigmoid(t) }}"
    made = compiled(text)
    params = made.solution.params
    half = params["y"].__class__(
        params["y"].scale / np.float32(2), params["y"].zero, params["y"].scheme
    )
    made.solution.params["y"] = half  # type: ignore[index]
    assert integer_ops(made.rebuilt("fused")) == ["QLinearConv", "HardSigmoid"]


def test_a_clip_that_is_tighter_than_its_codes_stays() -> None:
    text = f"{MAP} <{K}, float low = {{-1}}, float high = {{1}}> {{ s = Conv<{PAD}>(x, k) t = Clip(s, low, high) [q] u = Add(t, s) y = Mul(u, x) }}"
    made = compiled(text)
    params = made.solution.params
    wide = params["t"].__class__(
        params["t"].scale * np.float32(3), params["t"].zero, params["t"].scheme
    )
    made.solution.params["t"] = wide  # type: ignore[index]
    assert "Clip" in integer_ops(made.rebuilt("fused"))


def test_float_nodes_between_integer_ones() -> None:
    text = f"{MAP} <{SOFT}> {{ s = Conv<{PAD}>(x, k) t = Erf(s) y = Conv<{PAD}>(t, k) }}"
    made = compiled(text)
    assert_lowered(made)
    assert integer_ops(made.fused) == ["QLinearConv", "Erf", "QLinearConv"]


def test_one_quantize_and_one_dequantize_for_all_readers() -> None:
    text = f"{MAP} <{K}, {constant('k2', 4, 4, 3, 3)}> {{ s = Conv<{PAD}>(x, k) t = Conv<{PAD}>(x, k2) y = Add(s, t) }}"
    made = compiled(text)
    assert op_types(made.qdq).count("QuantizeLinear") == 4  # x, s, t, y
    assert op_types(made.qdq).count("DequantizeLinear") == 2 + 4
    assert op_types(made.fused).count("QuantizeLinear") == 1


def test_shapes_and_types_of_outputs_stay() -> None:
    text = (
        f"g (float[N,4,H,W] x) => (float[N,4,H,W] y) <{K}> {{ t = Conv<{PAD}>(x, k) y = Relu(t) }}"
    )
    made = compiled(text)
    for model in (made.qdq, made.fused):
        assert model.graph.outputs[0].shape == made.prepared.graph.outputs[0].shape


def test_node_names_stay() -> None:
    text = f"{MAP} <{K}> {{ [first] t = Conv<{PAD}>(x, k) [second] y = Sigmoid(t) }}"
    made = compiled(text)
    for model in (made.qdq, made.fused):
        named = {node.name: node.op_type for node in model.graph}
        assert named["first"].endswith("Conv")
        assert named["second"].endswith("Sigmoid")


def test_parameters_of_one_value_are_stored_once() -> None:
    text = f"{MAP} <{K}> {{ s = Conv<{PAD}>(x, k) t = MaxPool<kernel_shape = [3, 3], {PAD}>(s) y = Add(t, s) }}"
    made = compiled(text)
    scales = [
        array(v) for name, v in made.qdq.graph.initializers.items() if name.startswith("qc_scale")
    ]
    assert len({float(s) for s in scales if s is not None}) == len(scales) == 3  # x, s and t, y


def test_a_plan_in_another_order() -> None:
    import dataclasses

    made = compiled(CASES["residual"][0])
    plan = dataclasses.replace(made.plan, nodes=tuple(reversed(made.plan.nodes)))
    again = dataclasses.replace(made, plan=plan).rebuilt("fused")
    feed = made.feeds[0]
    assert np.array_equal(run(again, feed)[0], run(made.fused, feed)[0])
    assert op_types(again) == op_types(made.fused)


@pytest.mark.parametrize("gate", ["Sigmoid", "HardSigmoid"])
@pytest.mark.parametrize("number", [1.0, -0.5, -7.0])
def test_a_sum_behind_a_function_of_known_range(gate: str, number: float) -> None:
    """The range of the function is fixed, but codes for the sum's zero lie outside of it."""
    text = f"g (float[1,4,6,6] x) => (float[1,6,6,4] y) <{SOFT}, float c = {{{number}}}> {{ t = Conv<{PAD}>(x, k) s = {gate}(t) u = Transpose<perm = [0, 2, 3, 1]>(s) [free] y = Add(u, c) }}"
    made = compiled(text)
    assert made.forms()["free"] == "free"
    assert_lowered(made)


@pytest.mark.parametrize("alpha", [0.0, -0.2])
def test_a_hard_sigmoid_that_does_not_rise(alpha: float) -> None:
    text = f"{MAP} <{K}> {{ t = Conv<{PAD}>(x, k) [gate] y = HardSigmoid<alpha = {alpha}>(t) }}"
    made = compiled(text)
    assert made.forms()["gate"] == "float"
    assert_lowered(made, accuracy=0.2)


def test_a_range_that_is_nothing() -> None:
    text = (
        f"{MAP} <{K}, {B}> {{ z = Sub(x, x) t = Conv<{PAD}>(z, k, b) r = Relu(t) y = Mul(r, z) }}"
    )
    assert_lowered(compiled(text))


def test_parts_of_a_split_that_nobody_reads() -> None:
    text = f"g (float[1,4,6,6] x) => (float[1,2,6,6] z) <{K}> {{ t = Conv<{PAD}>(x, k) y, z = Split<axis = 1>(t) }}"
    made = compiled(text)
    assert_lowered(made)
    assert integer_ops(made.fused) == ["QLinearConv", "Split"]
