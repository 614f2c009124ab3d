import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import eager
from rewrites import parse, random_feed

from qcompile.calib.stats import Extremes, TensorStats
from qcompile.plan.candidates import Candidate
from qcompile.plan.make import Request, find_candidates, make_plan
from qcompile.plan.plan import Form, Plan
from qcompile.plan.tensors import Coding, coding
from qcompile.prepare import prepare
from qcompile.quant.scheme import QParams
from qcompile.run.probe import probe
from qcompile.solve.activations import constant_params, solve_activations

W = "float[1,1,1,1] w = {2}"
Range = tuple[float, float]


def planned(
    text: str, target: str = "ort-cpu-x64-vnni", forms: dict[str, Form] | None = None
) -> tuple[Plan, Coding]:
    model, _ = prepare(parse(text))
    chip = eager(target)
    facts = probe(model, random_feed(model))
    found = find_candidates(model, chip, facts)
    static = {
        n: Form.STATIC for n, c in found.items() if isinstance(c, Candidate) and c.row is not None
    }
    free = {n: Form.FREE for n, c in found.items() if isinstance(c, Candidate) and c.row is None}
    plan = make_plan(model, chip, facts, Request(forms=static | free | (forms or {})), found)
    return plan, coding(model, plan, found)


def seen(count: int, *samples: Range) -> TensorStats:
    """So many values a sample, with these extremes."""
    lows, highs = (np.array(ends, np.float32) for ends in zip(*samples, strict=True))
    extremes = Extremes(len(samples), float(lows.sum()), float(highs.sum()), lows, highs)
    ends = min(low for low, _ in samples), max(high for _, high in samples)
    return TensorStats(count * len(samples), *ends, extremes)


def stats(**ranges: Range) -> dict[str, TensorStats]:
    return {name: seen(1, ends) for name, ends in ranges.items()}


def solved(text: str, target: str = "ort-cpu-x64-vnni", **ranges: Range) -> dict[str, QParams]:
    plan, tensors = planned(text, target)
    return solve_activations(plan, tensors, stats(**ranges), "minmax")


def meaning(params: QParams) -> tuple[object, int]:
    return float(params.scale), int(params.zero)


CONV = f"g (float[1,1,2,2] x) => (float[1,1,2,2] y) <{W}> {{ y = Conv(x, w) }}"


def test_a_range_becomes_a_scale_and_a_zero_point() -> None:
    params = solved(CONV, x=(-1.0, 1.55), y=(0.5, 2.55))
    assert meaning(params["x"]) == (pytest.approx(0.01), 100)
    assert meaning(params["y"]) == (pytest.approx(0.01), 0)  # zero is always a code
    assert {str(p.scheme) for p in params.values()} == {"uint8.tensor.asym"}


def test_signed_codes() -> None:
    params = solved(CONV, "ort-cpu-arm64", x=(-1.0, 1.55), y=(0.0, 2.55))
    assert meaning(params["x"]) == (pytest.approx(0.01), -28)
    assert meaning(params["y"]) == (pytest.approx(0.01), -128)


def test_overrides_win() -> None:
    plan, tensors = planned(CONV)
    given_stats = stats(x=(-1.0, 1.55), y=(0.0, 2.55))
    params = solve_activations(plan, tensors, given_stats, "minmax", {"y": (0.0, 5.1)})
    assert meaning(params["y"]) == (pytest.approx(0.02), 0)
    assert meaning(params["x"]) == (pytest.approx(0.01), 100)


def test_the_method_chooses_the_range() -> None:
    plan, tensors = planned(CONV)
    known = {n: seen(10**6, (0.0, 2.0), (0.0, 3.1)) for n in ("x", "y")}
    assert float(solve_activations(plan, tensors, known, "mean")["x"].scale) == pytest.approx(
        2.55 / 255
    )
    assert float(solve_activations(plan, tensors, known, "minmax")["x"].scale) == pytest.approx(
        3.1 / 255
    )


def test_tensors_that_share_codes_share_parameters() -> None:
    text = f"g (float[1,1,2,2] x) => (float[1,4] y) <{W}> {{ t = Conv(x, w) u = MaxPool<kernel_shape = [1, 1]>(t) y = Flatten(u) }}"
    plan, tensors = planned(text)
    assert [value.name for value in tensors.roots] == ["x", "t"]
    params = solve_activations(plan, tensors, stats(x=(0, 1), t=(-1.0, 1.55)), "minmax")
    assert meaning(params["t"]) == meaning(params["u"]) == meaning(params["y"])


def test_outputs_of_sigmoids_need_no_statistics() -> None:
    text = f"g (float[1,1,2,2] x) => (float[1,1,2,2] y, float[1,1,2,2] z) <{W}> {{ t = Conv(x, w) y = Sigmoid(t) z = HardSigmoid(t) }}"
    params = solved(text, x=(0, 1), t=(-1, 1))
    assert meaning(params["y"]) == (1 / 256, 0)
    assert meaning(params["z"]) == (pytest.approx(1 / 255), 0)
    params = solved(text, "ort-cpu-arm64", x=(0, 1), t=(-1, 1))
    assert meaning(params["y"]) == (1 / 256, -128)


GATED = f"g (float[1,1,2,2] x) => (float[1,1,2,2] y) <{W}> {{ t = Conv(x, w) s = HardSigmoid<alpha = 0.2, beta = 0.5>(t) BODY }}"


@pytest.mark.parametrize(
    ("body", "cut"),
    [
        ("y = Mul(t, s)", True),
        ("y = Mul(s, t)", True),
        ("y = Neg(s)", True),  # nothing but the gate reads it
        ("u = Mul(t, s) y = Add(u, t)", False),
        ("u = Mul(t, s) v = Neg(t) y = Add(u, v)", False),
    ],
)
def test_codes_where_the_gate_is_closed_are_not_wasted(body: str, cut: bool) -> None:
    params = solved(
        GATED.replace("BODY", body), x=(0, 1), t=(-100.0, 2.6), u=(0, 3), v=(0, 1), y=(0, 3)
    )
    low = -float(params["t"].scale) * int(params["t"].zero)
    assert low == pytest.approx(-2.5 if cut else -100.0, abs=0.5)


def test_a_gate_that_the_graph_returns_is_not_cut() -> None:
    text = GATED.replace("BODY", "y = Mul(t, s)").replace("y) <", "y, float[1,1,2,2] t) <")
    params = solved(text, x=(0, 1), t=(-100.0, 2.6), y=(0, 3))
    assert -float(params["t"].scale) * int(params["t"].zero) == pytest.approx(-100, abs=0.5)


FREE = f"g (float[1,1,2,2] x) => (float[1,1,2,2] y, float[1,1,2,2] u) <{W}, float a = {{A}}, float b = {{B}}> {{ t = Conv(x, w) u = Mul(t, a) v = Add(u, b) y = Mul(t, v) }}"


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.01, 100), st.floats(-50, 50).filter(lambda b: abs(b) > 1e-3),
    st.floats(-20, 0), st.floats(0.1, 20), st.sampled_from(["ort-cpu-x64-vnni", "ort-cpu-arm64"]),
)  # fmt: skip
def test_every_meaning_is_the_affine_function_of_the_root(
    factor: float, offset: float, low: float, high: float, target: str
) -> None:
    plan, tensors = _planned_once(target)  # with other numbers, which are put in place of here
    members = tensors.members()
    root = next(value for value in members if value.name == "t")
    tensors = Coding({
        value: dataclasses.replace(
            coded,
            factor={"u": factor, "v": factor}.get(value.name or "", 1.0),
            offset={"v": offset}.get(value.name or "", 0.0),
        ) if coded.root is root else coded
        for value, coded in tensors.tensors.items()
    })  # fmt: skip
    params = solve_activations(plan, tensors, stats(x=(0, 1), t=(low, high), y=(0, 1)), "minmax")
    t, u, v = params["t"], params["u"], params["v"]
    codes = np.arange(t.scheme.qmin, t.scheme.qmax + 1)

    def values(p: QParams) -> np.ndarray:
        return (codes - int(p.zero)) * np.float64(p.scale)

    np.testing.assert_allclose(values(u), values(t) * factor, rtol=1e-5, atol=1e-6)
    step = float(v.scale)
    assert np.abs(values(v) - (values(u) + offset)).max() <= 0.51 * step + 1e-4 * abs(offset)
    assert values(t).min() <= low + float(t.scale)
    assert values(t).max() >= high - float(t.scale)
    assert 0 in values(v)  # the zero of padding and of saturation is a code


_ONCE: dict[str, tuple[Plan, Coding]] = {}


def _planned_once(target: str) -> tuple[Plan, Coding]:
    if target not in _ONCE:
        _ONCE[target] = planned(FREE.replace("{A}", "{2}").replace("{B}", "{3}"), target)
    return _ONCE[target]


def test_a_large_offset_is_a_whole_number_of_steps() -> None:
    params = solved(
        FREE.replace("{A}", "{1.5}").replace("{B}", "{-1.0}"), x=(0, 1), t=(-1.0, 1.55), y=(0, 1)
    )
    moved = int(params["v"].zero) - int(params["u"].zero)
    assert moved * float(params["u"].scale) == pytest.approx(1.0, rel=1e-6)


def test_a_constant_has_its_own_range() -> None:
    model = parse("g (float[3] x) => (float[3] y) <float[3] c = {-1, 0, 1.55}> { y = Add(x, c) }")
    plan, _ = planned(CONV)
    from qcompile.quant.scheme import Scheme

    params = constant_params(model.graph.initializers["c"], Scheme.parse(plan.activation))
    assert meaning(params) == (pytest.approx(0.01), 100)
