"""Which nodes could be integer, in which role, and the reasons of the others."""

from __future__ import annotations

import numpy as np
import pytest
from lowering import constant, eager
from rewrites import parse

from qcompile.plan.candidates import Candidate, clip_bounds
from qcompile.plan.make import find_candidates
from qcompile.run.probe import Fact
from qcompile.targets.schema import load_target

TARGET = eager()
K, B = constant("k", 4, 4, 3, 3), constant("b", 4)
M = constant("m", 4, 6)
NUMBERS = "float two = {2}, float none = {0}, float[4] row = {1, 2, 3, 4}, float[1,4,1,1] four = {1, 2, 3, 4}"
IMAGE = f"g (float[1,4,6,6] x, float[1,4,6,6] z, float[1,4,1,1] s) => (float[O] y) <{K}, {B}, {NUMBERS}>"
MATRIX = f"g (float[5,4] x, float[4,6] v) => (float[O] y) <{M}, {NUMBERS}, {constant('c', 6)}, float[4] w1 = {{1, 2, 3, 4}}, {constant('w3', 2, 4, 6)}>"
SHAPES = {
    IMAGE: {"x": (1, 4, 6, 6), "z": (1, 4, 6, 6), "s": (1, 4, 1, 1)},
    MATRIX: {"x": (5, 4), "v": (4, 6)},
}


def found(head: str, nodes: str, **shapes: tuple[int, ...]) -> dict[str, Candidate | str]:
    model = parse(f"{head} {{ {nodes} }}", opset=13)
    known = {**SHAPES.get(head, {}), **shapes}
    facts = {name: Fact(np.dtype(np.float32), shape) for name, shape in known.items()}
    facts |= {
        value.name or "": Fact(np.dtype(np.float32), None)
        for node in model.graph for value in node.outputs if value.name not in facts
    }  # fmt: skip
    return find_candidates(model, TARGET, facts)


ROLES = {
    "Conv": (IMAGE, "[n] y = Conv(x, k, b)", "conv"),
    "Conv without bias": (IMAGE, '[n] y = Conv(x, k, "")', "conv"),
    "MatMul": (MATRIX, "[n] y = MatMul(x, m)", "dynamic"),
    "Gemm": (MATRIX, "[n] y = Gemm<transB = 0>(x, m, c)", "dynamic"),
    "Add": (IMAGE, "[n] y = Add(x, z)", "binary"),
    "Mul by one a channel": (IMAGE, "[n] y = Mul(s, x)", "binary"),
    "Mul with a number": (IMAGE, "[n] y = Mul(two, x)", "free"),
    "Add of a number": (IMAGE, "[n] y = Add(x, two)", "free"),
    "Add of zero": (IMAGE, "[n] y = Add(x, none)", "free"),
    "Sigmoid": (IMAGE, "[n] y = Sigmoid(x)", "unary"),
    "HardSigmoid": (IMAGE, "[n] y = HardSigmoid(x)", "unary"),
    "Relu": (IMAGE, "[n] y = Relu(x)", "unary"),
    "Clip": (IMAGE, "[n] y = Clip(x, none, two)", "unary"),
    "LeakyRelu": (IMAGE, "[n] y = LeakyRelu(x)", "unary"),
    "GlobalAveragePool": (IMAGE, "[n] y = GlobalAveragePool(x)", "pool"),
    "Concat": (IMAGE, "[n] y = Concat<axis = 1>(x, z)", "concat"),
    "MaxPool": (IMAGE, "[n] y = MaxPool<kernel_shape = [2, 2]>(x)", "same"),
    "Transpose": (IMAGE, "[n] y = Transpose(x)", "same"),
    "Resize": (IMAGE, '[n] y = Resize(x, "", row)', "same"),
}


@pytest.mark.parametrize("name", ROLES)
def test_roles(name: str) -> None:
    head, nodes, role = ROLES[name]
    item = found(head, nodes)["n"]
    assert isinstance(item, Candidate), item
    assert item.role == role
    assert (item.row is None) == (role == "free")
    assert item.node.op_type == nodes.split("=")[1].split("(")[0].split("<")[0].strip()


REASONS = {
    "another domain": (IMAGE, "[n] y = com.microsoft.Conv(x, k)", "operator of domain com.microsoft"),
    "no kernel": (IMAGE, "[n] y = Neg(x)", "no integer kernel"),
    "refused by the target": (IMAGE, "[n] y = Softmax(x)", "QLinearSoftmax is"),
    "a weight that is computed": (IMAGE, "w = Neg(k) [n] y = Conv(x, w)", "its weight is not constant"),
    "a bias that is computed": (IMAGE, "c = Neg(b) [n] y = Conv(x, k, c)", "its bias is not constant"),
    "two activations": (MATRIX, "[n] y = MatMul(x, v)", "both operands are activations"),
    "constant first": (MATRIX, "[n] y = MatMul(m, v)", "its constant operand is the first one"),
    "a vector": (MATRIX, "[n] y = MatMul(x, w1)", "its weight has 1 dimensions"),
    "a batch": (MATRIX, "[n] y = MatMul(x, w3)", "its weight has 3 dimensions"),
    "transA": (MATRIX, "[n] y = Gemm<transA = 1>(x, m)", "transA is set"),
    "a Gemm bias that is computed": (MATRIX, "[n] y = Gemm(x, m, v)", "its bias is not constant"),
    "a constant tensor": (IMAGE, "[n] y = Add(x, four)", "an operand is a constant tensor"),
    "a product with 0": (IMAGE, "[n] y = Mul(x, none)", "a product with 0"),
    "a sum behind a Sigmoid": (IMAGE, "t = Sigmoid(x) [n] y = Add(t, two)", "its input's scale is fixed"),
    "Clip around 1": (IMAGE, '[n] y = Clip(x, two, "")', "its bounds are not constant, or do not include zero"),
    "HardSigmoid above": (IMAGE, "[n] y = HardSigmoid<beta = 1.5>(x)", "beta is not between 0 and 1"),
    "HardSigmoid falling": (IMAGE, "[n] y = HardSigmoid<alpha = -0.5>(x)", "alpha is not positive"),
    "Concat with a constant": (IMAGE, "[n] y = Concat<axis = 1>(x, four)", "an operand is constant"),
    "MaxPool with indices": (IMAGE, "[n] y, i = MaxPool<kernel_shape = [2, 2]>(x)", "returns indices"),
    "linear Resize": (IMAGE, '[n] y = Resize<mode = "linear">(x, "", row)', "no integer kernel for mode linear"),
    "a product of columns": (IMAGE, "[n] y = Mul(s, t)", "broadcasting of both operands"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name: str) -> None:
    head, nodes, reason = REASONS[name]
    if "Mul(s, t)" in nodes:
        head = head.replace("float[1,4,1,1] s", "float[1,4,1,1] s, float[1,1,6,6] t")
    item = found(head, nodes, t=(1, 1, 6, 6), s=(1, 4, 1, 1))["n"]
    assert isinstance(item, str)
    assert reason in item


def test_other_types() -> None:
    model = parse(
        "g (double[1,4,6,6] x, float16[2,2] h) => (double[O] y, float16[O] z) { [n] y = Add(x, x) [m] z = Add(h, h) }"
    )
    facts = {"x": Fact(np.dtype(np.float64), (1, 4, 6, 6))}
    items = find_candidates(model, TARGET, facts)
    assert items["n"] == "works on float64, integer kernels take float32"
    assert items["m"] == "works on an unknown type, integer kernels take float32"


def test_too_small_to_gain() -> None:
    """As the target says, for the shapes of the first sample."""
    model = parse(f"{MATRIX} {{ [n] y = MatMul(x, m) }}")
    target = load_target("ort-cpu-x64-vnni")
    facts = {"x": Fact(np.dtype(np.float32), (5, 4)), "y": Fact(np.dtype(np.float32), (5, 6))}
    assert (
        find_candidates(model, target, facts)["n"] == "too small to gain (120 multiply-accumulates)"
    )
    facts["y"] = Fact(np.dtype(np.float32), (5000, 6))
    assert isinstance(find_candidates(model, target, facts)["n"], Candidate)


@pytest.mark.parametrize(
    ("weight", "group", "variant"),
    [((8, 4, 3, 3), 1, "few_inputs"), ((8, 8, 3, 3), 1, ""), ((8, 1, 3, 3), 8, "depthwise"),
     ((16, 1, 3, 3), 8, "narrow_groups"), ((8, 4, 3, 3), 2, "narrow_groups"), ((32, 16, 3, 3), 2, "grouped")],
)  # fmt: skip
def test_kinds_of_convolution(weight: tuple[int, ...], group: int, variant: str) -> None:
    inputs = weight[1] * group
    model = parse(
        f"g (float[1,{inputs},6,6] x) => (float[O] y) <{constant('k', *weight)}> {{ [n] y = Conv<group = {group}>(x, k) }}"
    )
    item = find_candidates(model, TARGET, {})["n"]
    assert isinstance(item, Candidate)
    assert item.row is not None
    assert item.row.variant == variant


# ---- what is absorbed

ABSORBED = {
    "Relu": ("[n] t = Conv(x, k) [r] y = Relu(t)", ["r"]),
    "Clip": ("[n] t = Conv(x, k) [r] y = Clip(t, none, two)", ["r"]),
    "Clip above zero": ('[n] t = Conv(x, k) [r] y = Clip(t, two, "")', []),
    "Relu of a sum": ("[n] t = Add(x, z) [r] y = Relu(t)", ["r"]),
    "two readers": ("[n] t = Conv(x, k) [r] r = Relu(t) y = Add(r, t)", []),
    "Sigmoid": ("[n] t = Conv(x, k) [r] y = Sigmoid(t)", []),
    "Relu of a pool": ("[n] t = GlobalAveragePool(x) [r] y = Relu(t)", []),
}


@pytest.mark.parametrize("name", ABSORBED)
def test_saturation_absorbs(name: str) -> None:
    nodes, absorbed = ABSORBED[name]
    item = found(IMAGE, nodes)["n"]
    assert isinstance(item, Candidate)
    assert [node.name for node in item.absorbed] == absorbed
    assert item.result.name == ("y" if absorbed else "t")


def test_an_output_is_not_absorbed() -> None:
    item = found(
        IMAGE.replace("(float[O] y)", "(float[O] y, float[P] t)"),
        "[n] t = Conv(x, k) [r] y = Relu(t)",
    )["n"]
    assert isinstance(item, Candidate)
    assert item.absorbed == ()


@pytest.mark.parametrize(
    ("add", "kept"),
    [
        ("Add(t, c)", ["a"]),
        ("Add(c, t)", ["a"]),
        ("Add(t, two)", []),
        ("Add(t, t)", []),
        ("Sub(t, c)", []),
    ],
)
def test_a_bias_behind_a_product(add: str, kept: list[str]) -> None:
    item = found(MATRIX, f"[n] t = MatMul(x, m) [a] y = {add}", t=(5, 6))["n"]
    assert isinstance(item, Candidate)
    assert [node.name for node in item.absorbed] == kept


def test_a_bias_that_may_add_dimensions() -> None:
    head = MATRIX.replace("<float", "<float[1,1,6] wide = {1, 2, 3, 4, 5, 6}, float", 1)
    assert "may add dimensions" in str(
        found(head, "[n] t = MatMul(x, m) [a] y = Add(t, wide)", t=(5, 6))["n"]
    )
    deep = found(head, "[n] t = MatMul(x, m) [a] y = Add(t, wide)", t=(2, 5, 6))["n"]
    assert isinstance(deep, Candidate)


@pytest.mark.parametrize(
    ("nodes", "bounds"),
    [("[n] y = Relu(x)", (0, np.inf)), ("[n] y = Clip(x, none, two)", (0, 2)), ('[n] y = Clip(x, "", two)', (-np.inf, 2)),
     ("[n] y = Clip(x)", (-np.inf, np.inf)), ('[n] y = Clip(x, two, "")', None), ("t = Neg(two) [n] y = Clip(x, t)", None),
     ("[n] y = Neg(x)", None)],
)  # fmt: skip
def test_bounds(nodes: str, bounds: tuple[float, float] | None) -> None:
    model = parse(f"{IMAGE} {{ {nodes} }}")
    (node,) = (node for node in model.graph if node.name == "n")
    assert clip_bounds(node) == bounds


def test_bounds_before_opset_11() -> None:
    model = parse(
        "g (float[4] x) => (float[4] y, float[4] z) { [n] y = Clip<max = 6.0>(x) [m] z = Clip<min = 1.0>(x) }",
        opset=6,
    )
    n, m = model.graph
    assert clip_bounds(n) == (-np.inf, 6)
    assert clip_bounds(m) is None


def test_opsets_without_8_bit_kernels() -> None:
    """ORT has QuantizeLinear up to opset 27; products that find their scale need none."""
    weights = f"{constant('k', 4, 4, 1, 1)}, {constant('w', 64, 64)}"
    text = f"g (float[1,4,8,64] x) => (float[O] y) <{weights}> {{ [c] a = Conv(x, k) [m] y = MatMul(a, w) }}"
    for opset, kind in ((10, str), (27, Candidate), (28, str)):
        model = parse(text, opset=opset)
        facts = {name: Fact(np.dtype(np.float32), (1, 4, 8, 64)) for name in "xay"}
        made = find_candidates(model, TARGET, facts)
        assert isinstance(made["c"], kind), opset
        assert isinstance(made["m"], str if opset < 11 else Candidate), opset
    assert "export it at 27 or below" in str(made["c"])


# ---- Gather and LSTM

TABLE = f"g (int64[7] i, float[1,4,6] x) => (float[O] y) <{constant('t', 600, 32)}, {constant('u', 4, 3, 3)}, int64[2] j = {{0, 2}}>"


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [("[n] y = Gather(t, i)", "embedding"), ("[n] y = Gather<axis = 1>(t, i)", "not a lookup of rows"),
     ("[n] y = Gather(u, i)", "not a lookup of rows"), ("[n] y = Gather<axis = 1>(x, j)", "same"),
     ("[n] y = Gather<axis = 1>(x, i)", "indices into an activation")],
)  # fmt: skip
def test_gather(nodes: str, wanted: str) -> None:
    item = found(TABLE, nodes)["n"]
    assert (item.role if isinstance(item, Candidate) else item) == wanted


def test_lstm() -> None:
    w = f"{constant('w', 1, 16, 4)}, {constant('r', 1, 16, 4)}"
    model = parse(
        f"g (float[6,1,4] x, float[1,16,4] v) => (float[O] a, float[P] b, float[Q] c) <{w}> "
        "{ [a] a = LSTM<hidden_size = 4>(x, w, r) [b] b = LSTM<hidden_size = 4>(x, v, r) "
        "[c] c = LSTM<hidden_size = 4, layout = 1>(x, w, r) }",
        opset=14,
    )
    facts = {"x": Fact(np.dtype(np.float32), (6, 1, 4))}
    items = find_candidates(model, TARGET, facts)
    assert isinstance(items["a"], Candidate)
    assert items["a"].role == "recurrent"
    assert items["b"] == "its weights are not constant"
    assert items["c"] == "layout 1 has no kernel"
    small = find_candidates(model, load_target("ort-cpu-x64-vnni"), facts)["a"]
    assert small == "too small to gain (512 bytes of weights a direction)"


def test_bodies_have_no_static_nodes() -> None:
    """Dynamic ones they may have: those need no ranges."""
    model = parse(
        f"g (float[5,4] x, bool p) => (float[A,B] y) <{M}> {{ [i] y = If <"
        "then_branch = one () => (float[A,B] t) { [m] a = MatMul(x, m) [r] t = Sigmoid(a) }, "
        "else_branch = two () => (float[A,B] e) { [e] e = Identity(x) }> (p) }"
    )
    facts = {name: Fact(np.dtype(np.float32), None) for name in ("x", "a")}
    items = find_candidates(model, TARGET, facts)
    assert isinstance(items["m"], Candidate)
    assert items["r"] == "inside a control-flow body, where ranges are not observed yet"
    assert items["i"] == "no integer kernel"
