"""Five places where a rewrite that looks right goes wrong, for every pass before the plan."""

import dataclasses

import numpy as np
import pytest
from rewrites import assert_close, assert_same_interface, parse, random_feed, run

from qcompile.graph import io
from qcompile.prepare import PASSES, prepare
from qcompile.step import Pass, run_pass


@dataclasses.dataclass(frozen=True)
class Cell:
    """Nodes that a pass rewrites: from `x` to `t`, over `middle`, reading the constant `shared`."""

    shape: str
    out: str
    constants: str
    nodes: str
    middle: str
    middle_shape: str
    shared: str


SQUARE = "1,2,2,2"
CELLS = {
    "name_nodes": Cell("2,2", "2,2", "float[2,2] w = {1, 2, 3, 4}", "m = MatMul(x, w) t = Relu(m)", "m", "2,2", "w"),
    "fold_constants": Cell("2,2", "2,2", "float[2,2] w = {1, 2, 3, 4}", "m = Transpose(w) t = MatMul(x, m)", "m", "2,2", "w"),
    "drop_identity": Cell("2,2", "2,2", "float[1] w = {1}", "r = Relu(x) m = Identity(r) t = Mul(m, w)", "m", "2,2", "w"),
    "fold_batchnorm": Cell(
        SQUARE, SQUARE,
        "float[2,2,1,1] k = {1, 2, 3, 4}, float[2] w = {1, 2}, float[2] b = {3, 4}, float[2] v = {1, 4}",
        "m = Conv(x, k) t = BatchNormalization(m, w, b, b, v)", "m", SQUARE, "w",
    ),
    "fold_affine": Cell(
        SQUARE, SQUARE, "float[2,2,1,1] w = {1, 2, 3, 4}, float[2,1,1] c = {3, 5}",
        "m = Conv(x, w) t = Mul(m, c)", "m", SQUARE, "w",
    ),
    "fuse_hard_swish": Cell(
        "2,2", "2,2", "float zero = {0}, float three = {3}, float w = {6}",
        "a = Add(x, three) m = Clip(a, zero, w) p = Mul(x, m) t = Div(p, w)", "m", "2,2", "w",
    ),
    "fold_gate": Cell(
        SQUARE, SQUARE, "float[2,2,1,1] w = {1, 2, 3, 4}",
        "p = GlobalAveragePool(x) c = Conv(p, w) g = Sigmoid(c) m = Mul(x, g) t = Add(x, m)", "m", SQUARE, "w",
    ),
    "fold_shuffle": Cell(
        "1,4,2,2", SQUARE, "int64[3] s = {2, 2, 4}, int64[5] r = {2, 1, 2, 2, 2}, int64 i = {1}, float w = {2}",
        "m = Reshape(x, s) p = Transpose<perm = [1, 0, 2]>(m) q = Reshape(p, r) n = Gather(q, i) t = Mul(n, w)",
        "m", "2,2,4", "w",
    ),
    "fold_shapes": Cell(
        "2,2", "2,2", "float[2,2] w = {1, 2, 3, 4}", "m = Mul(x, w) s = Shape(m) t = Reshape(m, s)", "m", "2,2", "w",
    ),
    "group_heads": Cell(
        "1,1,2,2", SQUARE, "int64[1] a = {2}, int64[5] e = {1, 1, 2, 2, 2}, int64[4] r = {1, 2, 2, 2}, float w = {2}",
        "c = Concat<axis = 1>(x, x) m = Mul(c, w) u = Unsqueeze(x, a) v = Expand(u, e) k = Reshape(v, r) t = MatMul(m, k)",
        "m", SQUARE, "w",
    ),
    "pool_to_conv": Cell(
        SQUARE, SQUARE, "float[2,2,1,1] w = {1, 2, 3, 4}",
        "m = Conv(x, w) t = AveragePool<kernel_shape = [1, 1]>(m)", "m", SQUARE, "w",
    ),
    "inline_if": Cell(
        "2,2", "2,2", "bool on = {1}, float[2,2] w = {1, 2, 3, 4}",
        "m = If(on) <then_branch = p () => (float[2,2] ma) { ma = MatMul(x, w) }, "
        "else_branch = q () => (float[2,2] mb) { mb = Neg(x) }> t = Relu(m)", "m", "2,2", "w",
    ),
}  # fmt: skip


@pytest.fixture(params=PASSES, ids=[step.name for step in PASSES])
def step(request: pytest.FixtureRequest) -> Pass:
    found: Pass = request.param
    return found


def check(step: Pass, text: str, **given: np.ndarray) -> list[str]:
    """What the pass changed: the model still computes the same, has the same face and is settled."""
    model = parse(text)
    before = model.clone()
    outcome = run_pass(step, model)
    assert io.check(model) is None
    assert_same_interface(before, model)
    for seed in range(2):
        feed = random_feed(before, seed, given)
        assert_close(run(model, feed), run(before, feed))
    assert run_pass(step, model).changed == []
    return outcome.changed


def test_the_cells_are_what_the_passes_rewrite(step: Pass) -> None:
    cell = CELLS[step.name]
    text = f"g (float[{cell.shape}] x) => (float[{cell.out}] y) <{cell.constants}> {{ {cell.nodes} y = Neg(t) }}"
    assert check(step, text)


@pytest.mark.parametrize("taken", [True, False])
def test_subgraph_bodies(step: Pass, taken: bool) -> None:
    cell = CELLS[step.name]
    text = f"""g (float[{cell.shape}] x, bool cond) => (float[{cell.out}] y, float[{cell.shape}] z) <{cell.constants}> {{
        y = If(cond) <then_branch = a () => (float[{cell.out}] yes) {{ {cell.nodes} yes = Neg(t) }},
                   else_branch = b () => (float[{cell.out}] no) {{ no = Sigmoid(x) }}>
        z = Exp(x) }}"""
    assert check(step, text, cond=np.array(taken))


def test_a_body_reads_the_intermediate_value(step: Pass) -> None:
    cell = CELLS[step.name]
    text = f"""g (float[{cell.shape}] x, bool cond) => (float[{cell.out}] y, float[{cell.middle_shape}] z)
        <{cell.constants}> {{ {cell.nodes} y = Neg(t)
        z = If(cond) <then_branch = a () => (float[{cell.middle_shape}] yes) {{ yes = Neg({cell.middle}) }},
                   else_branch = b () => (float[{cell.middle_shape}] no) {{ no = Sigmoid({cell.middle}) }}> }}"""
    check(step, text, cond=np.array(True))
    check(step, text, cond=np.array(False))


def test_a_body_reads_the_constant(step: Pass) -> None:
    cell = CELLS[step.name]
    text = f"""g (float[{cell.shape}] x, bool cond) => (float[{cell.out}] y, float z)
        <{cell.constants}> {{ {cell.nodes} y = Neg(t)
        z = If(cond) <then_branch = a () => (float yes) {{ yes = ReduceSum<keepdims = 0>({cell.shared}) }},
                   else_branch = b () => (float no) {{ no = ReduceMax<keepdims = 0>({cell.shared}) }}> }}"""
    assert check(step, text, cond=np.array(True))
    assert check(step, text, cond=np.array(False))


def test_a_shared_initializer(step: Pass) -> None:
    cell = CELLS[step.name]
    text = f"""g (float[{cell.shape}] x) => (float[{cell.out}] y, float z) <{cell.constants}> {{
        {cell.nodes} y = Neg(t) each = Exp({cell.shared}) z = ReduceSum<keepdims = 0>(each) }}"""
    if step.name == "fold_constants":  # here the sum is a constant as well
        text = text.replace("Exp(w)", "MatMul(x, w)")
    assert check(step, text)


def test_an_initializer_that_is_an_input(step: Pass) -> None:
    cell = CELLS[step.name]
    constants = cell.constants.split(", float")
    constants = [constants[0], *(f"float{part}" for part in constants[1:])]
    default = next(part for part in constants if f" {cell.shared} = " in part)
    others = ", ".join(part for part in constants if part != default)
    text = f"""g (float[{cell.shape}] x, {default}) => (float[{cell.out}] y)
        {f"<{others}>" if others else ""} {{ {cell.nodes} y = Neg(t) }}"""
    model = parse(text)
    w = next(value for value in model.graph.inputs if value.name == cell.shared)
    assert w.is_initializer()
    shape = tuple(int(d) for d in w.shape or ())  # type: ignore[arg-type]
    check(step, text)
    check(step, text, **{cell.shared: np.full(shape, 7, np.float32)})


def test_an_intermediate_value_that_is_an_output(step: Pass) -> None:
    cell = CELLS[step.name]
    text = f"""g (float[{cell.shape}] x) => (float[{cell.out}] y, float[{cell.middle_shape}] {cell.middle})
        <{cell.constants}> {{ {cell.nodes} y = Neg(t) }}"""
    check(step, text)


def test_the_result_is_an_output_that_is_read(step: Pass) -> None:
    cell = CELLS[step.name]
    text = f"""g (float[{cell.shape}] x) => (float[{cell.out}] t, float[{cell.out}] y)
        <{cell.constants}> {{ {cell.nodes} y = Neg(t) }}"""
    assert check(step, text)


def test_a_missing_optional_input(step: Pass) -> None:
    cell = CELLS[step.name]
    nodes = cell.nodes
    for op in ("Conv(x, k)", "Conv(x, w)", "Conv(p, w)", "Identity(r)"):
        nodes = nodes.replace(op, {"Identity(r)": 'Dropout(r, "", "")'}.get(op, op[:-1] + ', "")'))
    text = f"""g (float[{cell.shape}] x) => (float[{cell.out}] y) <{cell.constants}, float low = {{-9}}> {{
        {nodes} k2 = Clip(t, "", low) y = Clip(k2, low) }}"""
    assert check(step, text)


def test_all_of_them_together() -> None:
    """The phase as a whole: opset 9 with a Constant node, defaults as inputs, and a BatchNormalization."""
    text = """<ir_version: 3, opset_import: ["":9]>
        g (float[1,2,2,2] x, float[2,2,1,1] k, float[2] w, float[2] b, float[2] v) => (float[1,2,2,2] y)
        <float[2,2,1,1] k = {1, 2, 3, 4}, float[2] w = {1, 2}, float[2] b = {3, 4}, float[2] v = {1, 4}> {
        c = Conv(x, k) n = BatchNormalization(c, w, b, b, v) three = Constant<value = float {3}>()
        i = Identity(n) a = Add(i, three) l = Clip<min = 0.0, max = 6.0>(a) m = Mul(i, l)
        six = Constant<value = float {6}>() h = Div(m, six) y = Dropout<ratio = 0.5>(h) }"""
    model = parse(text)
    feed = random_feed(model)
    wanted = run(model, feed)
    prepared, outcomes = prepare(model.clone())
    assert [node.op_type for node in prepared.graph] == ["Conv", "HardSigmoid", "Mul"]
    assert list(outcomes) == [step.name for step in PASSES]
    assert len(prepared.graph.initializers) == 2
    assert io.check(prepared) is None
    assert_close(run(prepared, feed), wanted)
