"""What limits a plan: data, patterns, fixed forms, prices; and the reasons it gives."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from lowering import constant, eager
from rewrites import parse

from qcompile.plan.cost import plan_cost
from qcompile.plan.make import Request, find_candidates, make_plan, node_costs
from qcompile.plan.plan import Form, Plan
from qcompile.run.probe import Fact
from qcompile.targets.schema import load_target

F32 = np.dtype(np.float32)
TARGET = eager()
NET = parse(
    f"""g (float[1,8,16,16] x, int64[7] i) => (float[1,8] y, float[7,8] z) <{constant("k", 8, 8, 3, 3)},
    {constant("m", 8, 8)}, {constant("t", 600, 32)}, {constant("u", 32, 8)}, float two = {{2}}, {constant("c", 8)}> {{
    [conv] a = Conv<pads = [1, 1, 1, 1]>(x, k) [relu] b = Relu(a) [twice] d = Mul(b, two)
    [last] e = Conv<pads = [1, 1, 1, 1]>(d, k) [pool] p = GlobalAveragePool(e) [flat] f = Flatten(p)
    [product] q = MatMul(f, m) [bias] y = Add(q, c) [rows] r = Gather(t, i) [other] z = MatMul(r, u) }}"""
)
SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys("xabde", (1, 8, 16, 16)), "p": (1, 8, 1, 1), **dict.fromkeys("fqy", (1, 8)),
    "r": (7, 32), "z": (7, 8),
}  # fmt: skip
FACTS = {name: Fact(F32, shape) for name, shape in SHAPES.items()}
CONVS = {"conv": (1e6, 1e5), "last": (1e6, 1e5)}  # both pay


def plan(**limits: Any) -> Plan:
    return make_plan(NET, TARGET, FACTS, Request(**{"measured": CONVS, **limits}))


def forms(made: Plan) -> dict[str, str]:
    return {entry.node: entry.form.value for entry in made.nodes}


def test_everything_that_pays() -> None:
    made = plan()
    assert (made.target, made.activation) == (TARGET.name, TARGET.activation)
    assert forms(made) == {
        "conv": "static", "relu": "absorbed", "twice": "free", "last": "static", "pool": "static", "flat": "float",
        "product": "dynamic", "bias": "absorbed", "rows": "weight", "other": "dynamic",
    }  # fmt: skip
    assert {e.node: e.weight for e in made.nodes if e.weight} == {
        "conv": "int8.axis0.sym", "last": "int8.axis0.sym", "product": "int8.axis1.sym", "other": "int8.axis1.sym",
        "rows": "int8.axis0.sym",
    }  # fmt: skip
    assert made["relu"].why == "part of conv"
    assert made["bias"].why == "part of product"


def test_without_data() -> None:
    made = plan(calibrated=False)
    assert {e.node for e in made.of(Form.STATIC, Form.FREE)} == set()
    assert made["conv"].why == "needs calibration data: give --data"
    assert forms(made)["product"] == "dynamic"


def test_without_static_forms() -> None:
    for calibrated in (True, False):
        made = plan(static=False, calibrated=calibrated)
        assert made["conv"].why == "static quantization is off"
        assert made.of(Form.STATIC, Form.FREE) == []


def test_without_dynamic_forms() -> None:
    made = plan(dynamic=False)
    assert forms(made)["product"] == forms(made)["other"] == forms(made)["bias"] == "float"
    assert made["product"].why == "dynamic quantization is off"
    assert forms(made)["rows"] == "weight"
    assert forms(made)["conv"] == "static"


@pytest.mark.parametrize(
    ("kept", "also"),
    [("conv", {"conv": "kept", "relu": "no"}), ("relu", {"relu": "kept", "conv": "relu after it stays float"}),
     ("product", {"product": "kept"}), ("bias", {"bias": "kept", "product": "bias after it stays float"}),
     ("rows", {"rows": "kept"}), ("twice", {"twice": "kept"})],
)  # fmt: skip
def test_patterns(kept: str, also: dict[str, str]) -> None:
    made = plan(keep_float={kept: "kept"})
    for node, why in also.items():
        assert made[node].form is Form.FLOAT or why == "no"
        assert why == "no" or made[node].why == why
    assert forms(made)["last"] == "static"


def test_a_relu_behind_a_float_conv_stays_for_itself() -> None:
    """It is not part of an integer node that is not there; as a kernel of its own it may be."""
    made = plan(keep_float={"conv": "kept"}, measured={**CONVS, "relu": (1e6, 0)})
    assert forms(made)["relu"] == "static"
    made = plan(measured={"conv": (0, 1e9), "last": (1e6, 0), "relu": (1e6, 0)})
    assert forms(made)["conv"] == forms(made)["relu"] == "float"
    assert made["relu"].why == "conv before it stays float"
    assert made["conv"].why == "left float for accuracy or speed"


def test_forms_that_a_person_fixed() -> None:
    costly = {"conv": (0, 1e9), "last": (0, 1e9)}
    assert forms(plan(measured=costly, forms={"conv": Form.STATIC}))["conv"] == "static"
    assert forms(plan(measured=costly))["conv"] == "float"
    made = plan(forms={"conv": Form.FLOAT, "product": Form.FLOAT})
    assert made["conv"].form is made["product"].form is Form.FLOAT
    assert made["conv"].why == made["product"].why == "set in the plan"
    assert forms(made)["last"] == "static"


def test_what_a_fixed_node_absorbs_goes_with_it() -> None:
    """A plan with everything float in which one Conv was set to static, and the reverse."""
    everything = dict.fromkeys(forms(plan()), Form.FLOAT)
    made = plan(forms={**everything, "conv": Form.STATIC})
    assert forms(made)["conv"] == "static"
    assert forms(made)["relu"] == "absorbed"
    assert forms(made)["last"] == "float"
    made = plan(forms={e.node: e.form for e in plan().nodes} | {"conv": Form.FLOAT})
    assert forms(made)["conv"] == "float"
    assert forms(made)["last"] == "static"


def test_the_same_plan_fed_back_changes_nothing() -> None:
    first = plan()
    assert forms(plan(forms={entry.node: entry.form for entry in first.nodes})) == forms(first)


def test_only_what_was_calibrated() -> None:
    made = plan(only={"last", "pool"})
    assert {e.node for e in made.of(Form.STATIC, Form.FREE)} == {"last", "pool"}
    assert forms(made)["product"] == "dynamic"
    assert made["conv"].why == "an integer kernel would not pay for its borders"


def test_a_dynamic_node_must_be_worth_its_noise() -> None:
    measured = {**CONVS, "product": (1000.0, 400.0)}
    for noise, form in ((500.0, "dynamic"), (700.0, "float")):
        made = plan(measured=measured, price=1.0, noise={"product": noise})
        assert forms(made)["product"] == form
    assert made["product"].why == "left float for accuracy"
    assert forms(made)["bias"] == "float"
    assert forms(plan(measured=measured, noise={"product": 1e9}))["product"] == "dynamic"


def test_gain_widens_a_plan() -> None:
    """As if float kernels took so many times as long; measured times stay as they are."""
    target = load_target("ort-cpu-x64-vnni")
    narrow = make_plan(NET, target, FACTS, Request())
    wide = make_plan(NET, target, FACTS, Request(gain=100.0, border=0.01))
    assert not narrow.of(Form.STATIC)
    assert wide["conv"].form is Form.STATIC
    assert (
        make_plan(
            NET, target, FACTS, Request(gain=100.0, measured={"conv": (0, 1e6), "last": (0, 1e6)})
        )["conv"].form
        is Form.FLOAT
    )


# ---- costs, by hand


def cost(text: str, name: str, **shapes: tuple[int, ...]) -> tuple[float, float]:
    model = parse(text)
    facts = {value: Fact(F32, shape) for value, shape in shapes.items()}
    item = find_candidates(model, eager(), facts)[name]
    assert not isinstance(item, str), item
    return node_costs(item, facts)


def test_cost_of_a_convolution() -> None:
    """8 x 14 x 14 results of 4 x 3 x 3 products each: 56448; depthwise 9 each."""
    row = eager().row("Conv", "few_inputs")
    assert row is not None
    got = cost(
        f"g (float[1,4,14,14] x) => (float[O] y) <{constant('k', 8, 4, 3, 3)}> {{ [n] y = Conv(x, k) }}",
        "n",
        y=(1, 8, 14, 14),
    )
    results = 8 * 14 * 14
    assert got == pytest.approx(
        (
            row.float.mac * results * 36 / 1000 + row.float.elem * results,
            row.int8.mac * results * 36 / 1000 + row.int8.elem * results,
        )
    )
    row = eager().row("Conv", "depthwise")
    assert row is not None
    got = cost(
        f"g (float[1,8,14,14] x) => (float[O] y) <{constant('k', 8, 1, 3, 3)}> {{ [n] y = Conv<group = 8>(x, k) }}",
        "n",
        y=(1, 8, 14, 14),
    )
    assert got[0] == pytest.approx(row.float.mac * results * 9 / 1000 + row.float.elem * results)


@pytest.mark.parametrize(
    ("op", "weight"), [("MatMul(x, w)", (32, 24)), ("Gemm<transB = 1>(x, w)", (24, 32))]
)
def test_cost_of_a_product(op: str, weight: tuple[int, int]) -> None:
    """5 x 24 results of 32 products each."""
    row = eager().row("MatMul")
    assert row is not None
    got = cost(
        f"g (float[5,32] x) => (float[O] y) <{constant('w', *weight)}> {{ [n] y = {op} }}",
        "n",
        y=(5, 24),
    )
    assert got == pytest.approx((row.float.mac * 3.84, row.int8.mac * 3.84 + row.int8.elem * 120))


def test_cost_of_a_pool_is_that_of_its_input() -> None:
    row = eager().row("GlobalAveragePool")
    assert row is not None
    got = cost(
        "g (float[1,8,14,14] x) => (float[O] y) { [n] y = GlobalAveragePool(x) }",
        "n",
        x=(1, 8, 14, 14),
        y=(1, 8, 1, 1),
    )
    assert got == pytest.approx((row.float.input * 1568, row.int8.input * 1568))


def test_a_product_with_a_number_costs_nothing_as_integer() -> None:
    as_float, as_int = cost(
        "g (float[4] x) => (float[O] y) <float two = {2}> { [n] y = Mul(x, two) }", "n", y=(4,)
    )
    assert as_int == 0 < as_float


# ---- products with an 8-bit weight alone


def test_a_product_is_by_block_where_that_is_clearly_faster() -> None:
    measured = {**CONVS, "product": (900.0, 500.0), "other": (900.0, 500.0)}
    made = plan(measured=measured, by_block={"product": 470.0, "other": 490.0})
    assert (made["product"].form, made["other"].form) == (Form.WEIGHT, Form.DYNAMIC)
    assert made["product"].weight == "int8.axis0/32.sym"
    assert made["product"].why == "8-bit weight, scales by block"
    assert made["bias"].why == "part of product"


def test_a_plan_fixes_weights_alone() -> None:
    made = plan(forms={"product": Form.WEIGHT})
    assert (made["product"].form, made["other"].form) == (Form.WEIGHT, Form.DYNAMIC)
    faster = {"product": 1.0, "other": 1.0}
    made = plan(forms={"product": Form.DYNAMIC, "other": Form.FLOAT}, by_block=faster)
    assert (made["product"].form, made["other"].form) == (Form.DYNAMIC, Form.FLOAT)
    made = plan(keep_float={"product": "so"}, by_block=faster)
    assert made["product"].form is Form.FLOAT
    assert plan(dynamic=False, by_block=faster)["product"].form is Form.FLOAT


def test_a_target_without_such_a_kernel_has_none() -> None:
    rows = tuple(dataclasses.replace(row, block=0) for row in TARGET.op)
    bare = dataclasses.replace(TARGET, op=rows)
    request = Request(by_block={"product": 1.0}, forms={"other": Form.WEIGHT})
    made = make_plan(NET, bare, FACTS, request)
    assert (made["product"].form, made["other"].form) == (Form.DYNAMIC, Form.DYNAMIC)


@pytest.mark.parametrize("seed", range(25))
def test_within_a_limit_each_product_has_the_best_of_three_forms(seed: int) -> None:
    """Against an enumeration of all nine plans of two products."""
    rng = np.random.default_rng(seed)
    names = ("product", "other")
    measured = {n: (float(rng.integers(50, 100)) * 10, float(rng.integers(10, 90)) * 10) for n in names}  # fmt: skip
    by_block = {n: float(rng.integers(10, 90)) * 10 for n in names}
    noise = {n: float(rng.integers(1, 9)) for n in names}
    quiet = {n: float(rng.integers(1, 5)) for n in names}
    most = float(rng.integers(0, 12)) + 0.5
    request = Request(
        calibrated=False, measured=measured, by_block=by_block, noise=noise, block_noise=quiet, most_noise=most
    )  # fmt: skip
    found = find_candidates(NET, TARGET, FACTS)
    made = make_plan(NET, TARGET, FACTS, request, found)
    each = [
        {
            Form.FLOAT: (measured[n][0], 0.0),
            Form.DYNAMIC: (measured[n][1], noise[n]),
            Form.WEIGHT: (by_block[n], quiet[n]),
        }
        for n in names
    ]
    costs = {
        pair: (a[0] + b[0], a[1] + b[1])
        for pair, a, b in (
            ((f, g), each[0][f], each[1][g]) for f, g in itertools.product(each[0], each[1])
        )
    }
    chosen = costs[made["product"].form, made["other"].form]
    assert chosen[1] <= most
    assert chosen[0] == min(cost for cost, total in costs.values() if total <= most)
    floats = make_plan(NET, TARGET, FACTS, Request(calibrated=False, dynamic=False), found)
    rest = plan_cost(floats, found, TARGET, FACTS, request) - sum(
        pair[0] for pair in measured.values()
    )
    own = plan_cost(made, found, TARGET, FACTS, request) - rest
    pairs = [(made[n].form, each[i]) for i, n in enumerate(names)]
    assert own == pytest.approx(sum(table[form][0] for form, table in pairs))
