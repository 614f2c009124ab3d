"""LowerRecurrent against ORT's float LSTM, and what it does not take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from lowering import SATURATES, constant, eager
from rewrites import assert_same_interface, parse, random_feed, run

from passes.lower_recurrent import LowerRecurrent
from qcompile.graph import io
from qcompile.graph.edit import graphs
from qcompile.plan.candidates import Candidate
from qcompile.plan.make import find_candidates
from qcompile.plan.plan import Form, NodePlan, Plan
from qcompile.quant.affine import fake_quantize
from qcompile.quant.ranges import weight_params
from qcompile.quant.scheme import Scheme
from qcompile.run.probe import probe
from qcompile.run.session import Options, Session
from qcompile.step import Outcome, run_pass
from qcompile.targets.schema import load_target

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

N, K, H = 3, 8, 6  # batch, input, hidden
ROWS, TENSOR = "int8.axis0.sym", "int8.tensor.sym"
TYPES = "(float[5,3,8] x) => (float[5,D,3,6] y, float[D,3,6] h, float[D,3,6] c)"


def text(
    inputs: str = "x, W, R", attributes: str = "", *, directions: int = 1, seed: int = 0
) -> str:
    """A graph of one LSTM, with all constants that its optional inputs may name."""
    made = ", ".join(
        constant(name, *shape, seed=seed, scale=0.4)
        for name, shape in {
            "W": (directions, 4 * H, K), "R": (directions, 4 * H, H), "B": (directions, 8 * H),
            "h0": (directions, N, H), "c0": (directions, N, H), "P": (directions, 3 * H),
        }.items()
    )  # fmt: skip
    head = TYPES.replace("D", str(directions))
    lengths = "int32[3] lengths = {5, 2, 4}"
    op = f"LSTM <hidden_size = {H}{attributes}> ({inputs})"
    return f"g {head} <{made}, {lengths}> {{ [cell] y, h, c = {op} }}"


def lowered(
    model: ir.Model, scheme: str = ROWS, **options: Any
) -> tuple[ir.Model, Outcome, dict[str, str]]:
    """The model with every LSTM that can be lowered, the outcome, and why others cannot."""
    model = model.clone()
    options.setdefault("saturating", SATURATES)
    found = find_candidates(model, eager(), probe(model, None))
    plan = Plan(
        "t", "uint8.tensor.asym",
        tuple(
            NodePlan(name, "LSTM", Form.DYNAMIC, scheme)
            for name, item in found.items() if isinstance(item, Candidate) and item.role == "recurrent"
        ),
    )  # fmt: skip
    step = LowerRecurrent(plan, found, **options)
    outcome = run_pass(step, model)
    before = ir.to_onnx_text(model)
    assert run_pass(step, model).changed == []
    assert ir.to_onnx_text(model) == before
    return model, outcome, {name: item for name, item in found.items() if isinstance(item, str)}


def errors(model: ir.Model, made: ir.Model, given: dict[str, Array] | None = None) -> list[float]:
    """Of each output the root of the mean squared error, in units of the output's."""
    feed = random_feed(model, given=given)
    assert io.check(made) is None
    assert_same_interface(model, made)
    return [
        float(np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean()))
        for ours, theirs in zip(run(made, feed, "all"), run(model, feed), strict=True)
    ]


CASES: dict[str, tuple[str, str, int]] = {
    "least": ("x, W, R", "", 1),
    "bias": ("x, W, R, B", "", 1),
    "lengths": ('x, W, R, "", lengths', "", 1),
    "initial h": ('x, W, R, B, "", h0', "", 1),
    "initial c": ('x, W, R, B, "", "", c0', "", 1),
    "peepholes": ('x, W, R, "", "", "", "", P', "", 1),
    "all inputs": ("x, W, R, B, lengths, h0, c0, P", "", 1),
    "reverse": ("x, W, R, B", ', direction = "reverse"', 1),
    "bidirectional": ("x, W, R, B, lengths, h0, c0, P", ', direction = "bidirectional"', 2),
    "clip": ("x, W, R, B", ", clip = 0.5", 1),
    "activations": ("x, W, R, B", ', activations = ["HardSigmoid", "Tanh", "Relu"]', 1),
    "alpha": (
        "x, W, R, B",
        ', activations = ["HardSigmoid", "LeakyRelu", "Tanh"], activation_alpha = [0.3, 0.1], activation_beta = [0.4]',
        1,
    ),
    "coupled gates": ("x, W, R, B", ", input_forget = 1", 1),
    "layout 0": ("x, W, R, B", ", layout = 0", 1),
}


@pytest.mark.parametrize("scheme", [ROWS, TENSOR, "int8.tensor.asym", "uint8.axis0.sym"])
@pytest.mark.parametrize("case", CASES)
def test_it_computes_nearly_the_same(case: str, scheme: str) -> None:
    inputs, attributes, directions = CASES[case]
    model = parse(text(inputs, attributes, directions=directions))
    made, outcome, _ = lowered(model, scheme)
    assert outcome.changed == ["cell"]
    assert [node.op_type for node in made.graph] == ["DynamicQuantizeLSTM"]
    assert max(errors(model, made)) < (0.06 if SATURATES else 0.03)  # 7 bits: steps twice as large


def test_the_weights_are_those_of_the_scheme() -> None:
    """(directions, k, 4 * hidden), and one scale a direction and row."""
    model = parse(text("x, W, R, B", ', direction = "bidirectional"', directions=2))
    made, _, _ = lowered(model, saturating=False)  # of any target: nothing is run
    stored = {k: v.const_value.numpy() for k, v in made.graph.initializers.items() if v.const_value}
    assert stored["W_q"].shape == (2, K, 4 * H)
    assert stored["R_q"].shape == (2, H, 4 * H)
    assert stored["R_scale"].shape == stored["R_zero"].shape == (2, 4 * H)
    for name in ("W", "R"):
        back = stored[f"{name}_q"] * stored[f"{name}_scale"][:, None]
        for direction in (0, 1):
            w, scheme = stored[name][direction], Scheme.parse(ROWS)
            wanted = fake_quantize(w, weight_params(w, scheme))
            np.testing.assert_allclose(back[direction], wanted.T, rtol=1e-6)


def test_codes_of_a_saturating_target_have_seven_bits() -> None:
    made, _, _ = lowered(parse(text()), saturating=True)
    codes = made.graph.initializers["W_q"].const_value
    assert codes is not None
    assert np.abs(codes.numpy().astype(int)).max() <= 64
    assert max(errors(parse(text()), made)) < 0.03


def test_outputs_that_are_not_read() -> None:
    """Missing first and last outputs stay missing."""
    source = text("x, W, R, B").replace("y, h, c =", '"", h, "" =')
    source = source.replace(", float[1,3,6] c)", ")").replace("float[5,1,3,6] y, ", "")
    model = parse(source)
    made, outcome, _ = lowered(model)
    assert outcome.changed == ["cell"]
    assert max(errors(model, made)) < 0.03


def test_in_a_body_with_weights_inside_and_outside() -> None:
    one, two = (constant(name, 1, 4 * H, H, scale=0.4) for name in "RU")
    model = parse(f"""g (float[5,3,8] x, bool p) => (float[1,3,6] h) <{constant("W", 1, 4 * H, K, scale=0.4)}> {{
        v = Relu(x)
        h = If <then_branch = one () => (float[1,3,6] t) <{one}> {{
                    u = Abs(v) [a] "", t = LSTM <hidden_size = {H}> (u, W, R) }},
                else_branch = two () => (float[1,3,6] e) <{two}> {{
                    f = Neg(v) [b] "", e = LSTM <hidden_size = {H}> (f, W, U) }}> (p) }}""")
    made, outcome, _ = lowered(model)
    assert len(outcome.changed) == 2
    names = sorted(
        name for graph in graphs(made) for name in graph.initializers if name.endswith("_q")
    )
    assert names == ["R_q", "U_q", "W_q"]  # W is shared
    for branch in (False, True):
        assert max(errors(model, made, {"p": np.array(branch)})) < 0.03


REFUSED = {
    "a weight that is an input": (
        text().replace("x)", "x, float[1,24,8] V)", 1).replace("(x, W,", "(x, V,"),
        "not constant",
    ),
    "a weight that a caller can override": (
        text().replace("[5,3,8] x)", "[5,3,8] x, float[1,24,8] W)"),
        "not constant",
    ),
    "doubles": (text().replace("float", "double"), "float64"),
    "layout": (
        text("x, W, R", ", layout = 1").replace("5,3,8", "3,5,8").replace("5,1,3,6", "3,5,1,6")
        .replace("1,3,6", "3,1,6"),
        "layout 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_kernel_stays(case: str) -> None:
    source, reason = REFUSED[case]
    model = parse(source)
    made, outcome, reasons = lowered(model)
    assert outcome.changed == []
    assert reason in reasons["cell"]
    assert [node.op_type for node in made.graph] == ["LSTM"]


def test_weights_that_are_not_finite_stay() -> None:
    model = parse(text())
    w = model.graph.initializers["W"]
    assert w.const_value is not None
    values = w.const_value.numpy().copy()
    values[0, 0, 0] = np.inf
    w.const_value = ir.Tensor(values, name="W")
    assert "infinities" in lowered(model)[2]["cell"]


def test_small_weights_stay() -> None:
    target = load_target("ort-cpu-x64-vnni")
    row = target.row("LSTM")
    assert row is not None
    model = parse(text())
    found = find_candidates(model, target, probe(model, None))
    if row.min_bytes > 4 * 4 * H * (K + H):
        assert found["cell"] == "too small to gain (1344 bytes of weights a direction)"
    else:
        assert isinstance(found["cell"], Candidate)


@pytest.mark.parametrize(
    ("scheme", "options", "reason"),
    [
        (ROWS, {"form": "portable"}, "ONNX has no integer LSTM"),
        ("int4.axis0.sym", {}, "int8 and uint8"),
        ("int8.axis0.asym", {}, "no zero points by row"),
        ("int8.axis1.sym", {}, "one a row"),
    ],
)
def test_schemes_without_a_kernel(scheme: str, options: dict[str, Any], reason: str) -> None:
    made, outcome, _ = lowered(parse(text()), scheme, **options)
    assert outcome.changed == []
    assert reason in outcome.skipped["cell"]
    assert [node.op_type for node in made.graph] == ["LSTM"]


def test_ort_runs_the_integer_kernel() -> None:
    made, _, _ = lowered(parse(text()))
    assert Session(made, Options("all")).outputs[0].shape == (5, 1, 3, 6)
