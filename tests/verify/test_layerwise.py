"""Errors at the results of layers, against the same computed node by node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st
from lowering import Compiled, _Interpreter, compiled, constant, evaluate
from numpy.typing import NDArray
from rewrites import run

from qcompile.calib.taps import with_outputs
from qcompile.graph.edit import array
from qcompile.plan.candidates import Candidate
from qcompile.plan.make import find_candidates
from qcompile.plan.plan import Form
from qcompile.plan.tensors import coding
from qcompile.quant.affine import dequantize, fake_quantize
from qcompile.verify import layerwise
from qcompile.verify.layerwise import Quantized, Unit, own_errors, sites_of, total_errors, units_of
from qcompile.verify.sensitivity import switched

PAD = "pads = [1, 1, 1, 1]"
CNN = f"""g (float[1,4,8,8] x) => (float[1,4,8,8] y) <{constant("k", 4, 4, 3, 3, scale=0.3)}, {constant("b", 4)},
    {constant("l", 4, 4, 3, 3, scale=0.3, seed=1)}> {{ [one] a = Conv<{PAD}>(x, k, b) [r] c = Relu(a) [gate] g = Sigmoid(c)
    [mul] m = Mul(c, g) [two] n = Conv<{PAD}>(m, l) [move] p = Transpose<perm = [0, 1, 3, 2]>(n) [add] y = Add(p, x) }}"""
MLP = f"""g (float[5,16] x) => (float[5,16] y, float[5,16] h) <{constant("w", 16, 16, scale=0.3)}, {constant("v", 16, 16, scale=0.3)},
    {constant("c", 16)}> {{ [a] h = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, w, c) [g] s = Sigmoid(h)
    [d] m = MatMul(s, v) [e] y = Add(m, c) }}"""


def quantized(made: Compiled) -> Quantized:
    found = find_candidates(made.prepared, made.target, made.facts)
    return Quantized(
        made.prepared, made.plan, found, coding(made.prepared, made.plan, found), made.solution,
        made.target.saturating,
    )  # fmt: skip


def totals(made: Compiled) -> dict[Unit, float]:
    given = quantized(made)
    graph = switched(
        given.prepared, given.plan, given.found, given.coding, given.solution.weights, ir.DataType.UINT8,
        by_weight=True,
    )  # fmt: skip
    return total_errors(given, graph, units_of(given), made.feeds, made.facts, threads=1)


def floats(made: Compiled, feed: dict[str, Any]) -> dict[str, NDArray[Any]]:
    names = [v.name or "" for node in made.prepared.graph for v in node.outputs]
    values = run(with_outputs(made.prepared, names), feed)
    return {**feed, **dict(zip(names, values, strict=True))}


def slow_node(
    made: Compiled, item: Candidate, feed: dict[str, Any], known: dict[str, NDArray[Any]]
) -> NDArray[Any]:
    """What a quantized node, and what it absorbs, make of float inputs."""
    node, name = item.node, item.node.name or ""
    values = [None if v is None else known.get(v.name or "", array(v)) for v in node.inputs]
    if made.plan[name].form is Form.DYNAMIC:
        result = _Interpreter(made, feed).product(node, values[0])
    else:
        weight = made.solution.weights.get(name)
        if weight is not None:
            values[1:] = [dequantize(weight.codes, weight.params)]
            values += [] if weight.bias is None else [weight.bias]
        result = evaluate(node, values)[0]
    for after in item.absorbed:
        inner = [result if v is node.outputs[0] else array(v) for v in after.inputs]
        result = evaluate(after, inner)[0]
    return result


def slow_own(made: Compiled, unit: Unit) -> float:
    """Each node alone in ORT, its weight replaced, its result rounded by numpy."""
    given = quantized(made)
    noise = power = 0.0
    for feed in made.feeds:
        known = floats(made, dict(feed))
        result = known[unit.tensor]
        if unit.node:
            result = slow_node(made, given.item(unit.node), dict(feed), known)
        if not unit.node or given.plan[unit.node].form is Form.STATIC:
            result = fake_quantize(result, made.solution.params[unit.tensor])
        true = known[unit.tensor].astype(np.float64)
        noise += float(np.square(result - true).sum())
        power += float(np.square(true).sum())
    return noise / power


@pytest.fixture(scope="module", params=[CNN, MLP], ids=["cnn", "mlp"])
def made(request: pytest.FixtureRequest) -> Compiled:
    return compiled(request.param)


def test_units(made: Compiled) -> None:
    """What only moves codes rounds nothing; absorbed nodes belong to what absorbs them; borders come last."""
    found = units_of(quantized(made))
    conv = [("one", "c"), ("gate", "g"), ("mul", "m"), ("two", "n"), ("add", "y"), ("", "x")]
    linear = [("a", "h"), ("g", "s"), ("d", "y"), ("", "h")]
    expected = conv if "one" in {u.node for u in found} else linear
    assert sorted((u.node, u.tensor) for u in found) == sorted(expected)
    assert found[-1].name == expected[-1][1]


def test_own_errors_are_those_of_single_nodes(made: Compiled) -> None:
    given = quantized(made)
    units = units_of(given)
    found = own_errors(given, units, made.feeds, threads=1)
    assert set(found) == set(units)
    for unit in units:
        assert found[unit] == pytest.approx(slow_own(made, unit), rel=0.02), unit
        assert found[unit] > 0


def test_whole_errors_are_those_of_the_plan(made: Compiled) -> None:
    """As an interpreter of the plan computes it; biases are rounded there too, and a code may differ."""
    found = totals(made)
    for unit, ratio in found.items():
        noise = power = 0.0
        for feed in made.feeds:
            walk = _Interpreter(made, feed)
            walk.run()
            value = next(v for v in walk.floats if v.name == unit.tensor)
            seen = walk.read(value) if not unit.node else walk.told(value)
            true = floats(made, dict(feed))[unit.tensor].astype(np.float64)
            noise += float(np.square(seen - true).sum())
            power += float(np.square(true).sum())
        assert ratio == pytest.approx(noise / power, rel=0.1), unit


def test_a_border_inherits_what_comes_before(made: Compiled) -> None:
    """The input of the model has its own error only; what a product made brings more."""
    given = quantized(made)
    units = units_of(given)
    own, whole = own_errors(given, units, made.feeds, threads=1), totals(made)
    (border,) = (unit for unit in units if not unit.node)
    if border.tensor == "x":
        assert whole[border] == pytest.approx(own[border], rel=1e-4)
    else:
        assert whole[border] > 1.1 * own[border]


def test_results_are_looked_at_in_chunks(made: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    together = totals(made)
    monkeypatch.setattr(layerwise, "_CHUNK_BYTES", 1)
    assert totals(made) == pytest.approx(together)


def test_sites_of_a_unit(made: Compiled) -> None:
    """Each site belongs to one unit, and names of nodes are not those of tensors."""
    given = quantized(made)
    _, sites = switched(
        given.prepared, given.plan, given.found, given.coding, given.solution.weights, ir.DataType.UINT8,
        by_weight=True,
    )  # fmt: skip
    taken = [i for unit in units_of(given) for i in sites_of(given, unit, sites)]
    assert sorted(taken) == list(range(len(sites)))
    for unit in units_of(given):
        own = [sites[i] for i in sites_of(given, unit, sites)]
        weighted = unit.node in given.solution.weights
        assert [site.weight for site in own].count(True) == weighted
        assert len(own) == 1 + weighted


@settings(max_examples=20)
@examples(st.integers(0, 3), st.floats(0.01, 100))
def test_own_error_does_not_depend_on_the_unit_of_a_tensor(seed: int, factor: float) -> None:
    """A border whose values and scale grow alike has the same ratio."""
    params = quantized_input(seed, 1.0)
    grown = quantized_input(seed, factor)
    assert grown == pytest.approx(params, rel=1e-2)


def quantized_input(seed: int, factor: float) -> float:
    made = compiled(
        f"g (float[1,4,8,8] x) => (float[1,4,8,8] y) <{constant('k', 4, 4, 1, 1, seed=seed)}> {{ [one] y = Conv(x, k) }}",
        scale=factor,
    )
    given = quantized(made)
    return own_errors(given, [Unit("", "x")], made.feeds, threads=1)[Unit("", "x")]


def test_a_result_that_is_not_there() -> None:
    made = compiled(MLP)
    assert own_errors(quantized(made), [Unit("none", "none")], made.feeds, threads=1) == {}
