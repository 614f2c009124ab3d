"""Switches at every site: off is the float model with rounded weights, on is the quantized one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from lowering import Compiled, compiled, constant, reference
from numpy.typing import NDArray
from rewrites import assert_same_interface, run

from qcompile.calib.taps import with_outputs
from qcompile.graph import io
from qcompile.plan.make import find_candidates
from qcompile.plan.tensors import coding
from qcompile.quant.affine import choose, dequantize
from qcompile.quant.scheme import QParams, Scheme
from qcompile.run.session import Options, Session
from qcompile.verify.compare import Reference
from qcompile.verify.sensitivity import (
    Meter,
    Noise,
    Site,
    improve_ranges,
    measure,
    measure_units,
    switched,
)

Array = NDArray[Any]
U8 = Scheme.parse("uint8.tensor.asym")
PAD = "pads = [1, 1, 1, 1]"
CNN = f"""g (float[1,4,8,8] x) => (float[1,4,8,8] y) <{constant("k", 4, 4, 3, 3, scale=0.3)}, {constant("b", 4)},
    {constant("l", 4, 4, 3, 3, scale=0.3, seed=1)}> {{ [one] a = Conv<{PAD}>(x, k, b) [r] c = Relu(a) [gate] g = Sigmoid(c)
    [mul] m = Mul(c, g) [two] n = Conv<{PAD}>(m, l) [add] y = Add(n, x) }}"""
MLP = f"""g (float[5,16] x) => (float[5,16] y, float[5,16] h) <{constant("w", 16, 16, scale=0.3)}, {constant("v", 16, 16, scale=0.3)},
    {constant("c", 16)}> {{ [a] h = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, w, c) [g] s = Sigmoid(h)
    [d] m = MatMul(s, v) [e] y = Add(m, c) }}"""


def switches(made: Compiled) -> tuple[ir.Model, list[Site]]:
    found = find_candidates(made.prepared, made.target, made.facts)
    coded = coding(made.prepared, made.plan, found)
    return switched(
        made.prepared, made.plan, found, coded, made.solution.weights, ir.DataType.UINT8
    )


def inputs(made: Compiled, sites: Sequence[Site], on: Sequence[bool]) -> dict[str, Array]:
    params = made.solution.params
    return {
        "qc_switches": np.array(on),
        "qc_scales": np.array(
            [1 if s.dynamic else params[s.name].scale for s in sites], np.float32
        ),
        "qc_zeros": np.array([0 if s.dynamic else params[s.name].zero for s in sites], np.uint8),
    }


def meter(made: Compiled, samples: int = 4) -> Meter:
    model, sites = switches(made)
    session = Session(made.prepared, Options(threads=1))
    ref = Reference(session, lambda: iter(made.feeds), {})
    return Meter(model, sites, made.solution.params, ref, samples=samples, threads=1)


@pytest.fixture(scope="module")
def cnn() -> Compiled:
    return compiled(CNN)


@pytest.fixture(scope="module")
def mlp() -> Compiled:
    return compiled(MLP)


def rounded(made: Compiled) -> ir.Model:
    """The float model whose weights are what the codes say."""
    model = made.prepared.clone()
    for node in model.graph:
        weight = made.solution.weights.get(node.name or "")
        if weight is None:
            continue
        back = dequantize(weight.codes, weight.params)
        if node.op_type == "Gemm":
            back = 2 * back.T  # transB = 1, alpha = 0.5
        source = node.inputs[1]
        assert source is not None
        value = ir.Value(name=f"{source.name}_rounded", const_value=ir.Tensor(back))
        value.const_value.name = value.name  # type: ignore[union-attr]
        model.graph.register_initializer(value)
        node.replace_input_with(1, value)
    return model


@pytest.mark.parametrize("text", [CNN, MLP])
def test_all_off_is_the_float_model_with_rounded_weights(text: str) -> None:
    """A square weight behind transB and alpha among them."""
    made = compiled(text)
    model, sites = switches(made)
    plain = rounded(made)
    for feed in made.feeds:
        got = run(model, {**feed, **inputs(made, sites, [False] * len(sites))})
        for ours, theirs in zip(got, run(plain, feed), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("text", [CNN, MLP])
def test_all_on_is_the_quantized_model(text: str) -> None:
    """As the plan computes it node by node; the built model is no further away than a code."""
    made = compiled(text)
    model, sites = switches(made)
    for feed in made.feeds:
        got = run(model, {**feed, **inputs(made, sites, [True] * len(sites))})
        for ours, theirs, plain in zip(
            got, reference(made, feed), run(made.prepared, feed), strict=True
        ):
            step = np.abs(plain).max() / 255
            off = np.abs(ours - theirs)
            assert off.max() <= 2 * step
            assert np.square(off).sum() <= 0.1 * np.square(theirs - plain).sum()


EMBEDDED = f"""g (int64[2,3] i) => (float[2,3,16] e, float[2,3,16] y) <{constant("t", 512, 16)}, {constant("w", 16, 16)}>
    {{ [rows] e = Gather(t, i) [a] y = MatMul(e, w) }}"""


def by_weight(made: Compiled) -> tuple[ir.Model, list[Site]]:
    found = find_candidates(made.prepared, made.target, made.facts)
    coded = coding(made.prepared, made.plan, found)
    weights, kind = made.solution.weights, ir.DataType.UINT8
    return switched(made.prepared, made.plan, found, coded, weights, kind, by_weight=True)


@pytest.mark.parametrize("text", [CNN, MLP])
def test_switches_of_weights(text: str) -> None:
    """Off they leave the float model, on that with rounded weights."""
    made = compiled(text)
    model, sites = by_weight(made)
    plain, plain_sites = switches(made)
    count = len(sites) - len(plain_sites)
    assert [(s.name, s.weight) for s in sites[:count]] == [
        (name, True) for name in made.solution.weights
    ]
    assert [s.name for s in sites[count:]] == [s.name for s in plain_sites]
    params = made.solution.params
    for feed in made.feeds:
        extra: dict[str, Array] = {
            "qc_scales": np.array(
                [1 if s.weight or s.dynamic else params[s.name].scale for s in sites], np.float32
            ),
            "qc_zeros": np.array(
                [0 if s.weight or s.dynamic else params[s.name].zero for s in sites], np.uint8
            ),
        }
        off = run(model, {**feed, **extra, "qc_switches": np.zeros(len(sites), np.bool_)})
        on = run(model, {**feed, **extra, "qc_switches": np.arange(len(sites)) < count})
        rest = inputs(made, plain_sites, [False] * len(plain_sites))
        for got, want in zip(off, run(made.prepared, feed), strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5)
        for got, want in zip(on, run(plain, {**feed, **rest}), strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_table_has_a_switch_behind_its_lookup() -> None:
    """An output of the model among its readers."""
    rng = np.random.default_rng(2)
    made = compiled(EMBEDDED, given={"i": rng.integers(0, 512, (2, 3))})
    assert "rows" in made.solution.weights
    model, sites = by_weight(made)
    assert [(s.name, s.weight, s.dynamic) for s in sites] == [
        ("rows", True, False), ("a", True, False), ("a", False, True),
    ]  # fmt: skip
    assert io.check(model) is None
    feed = {
        **made.feeds[0], "qc_scales": np.ones(3, np.float32), "qc_zeros": np.zeros(3, np.uint8)
    }  # fmt: skip
    table, plain = made.solution.weights["rows"], run(made.prepared, made.feeds[0])
    off = run(model, {**feed, "qc_switches": np.array([False] * 3)})
    on = run(model, {**feed, "qc_switches": np.array([True, False, False])})
    np.testing.assert_array_equal(off[0], plain[0])
    np.testing.assert_array_equal(on[0], dequantize(table.codes, table.params)[made.feeds[0]["i"]])
    assert np.abs(on[1] - plain[1]).max() > 1e-4  # the product reads them, too


def test_sites(cnn: Compiled, mlp: Compiled) -> None:
    """Each root once, in graph order, then the inputs of dynamic nodes."""
    assert [(s.name, s.dynamic) for s in switches(cnn)[1]] == [
        (n, False) for n in ("x", "c", "g", "m", "n", "y")
    ]
    static = [s.name for s in switches(mlp)[1] if not s.dynamic]
    assert static == ["h", "s"]
    assert [s.name for s in switches(mlp)[1] if s.dynamic] == ["a", "d"]


def test_the_model_is_valid_and_the_given_one_unchanged(cnn: Compiled) -> None:
    before = ir.to_onnx_text(cnn.prepared)
    model, _ = switches(cnn)
    assert io.check(model) is None
    assert ir.to_onnx_text(cnn.prepared) == before
    model.graph.inputs[1:] = []
    assert_same_interface(cnn.prepared, model)


def test_an_input_that_is_an_output() -> None:
    """Its name is its own; what is output is not what is quantized."""
    made = compiled(
        f"g (float[1,4,8,8] x) => (float[1,4,8,8] x, float[1,4,8,8] y) <{constant('k', 4, 4, 3, 3)}> {{ y = Conv<{PAD}>(x, k) }}"
    )
    model, sites = switches(made)
    feed = made.feeds[0]
    got = run(model, {**feed, **inputs(made, sites, [True] * len(sites))})
    np.testing.assert_array_equal(got[0], feed["x"])


# ---- measuring


def test_noise_is_that_of_the_quantized_model(cnn: Compiled) -> None:
    """Switched on altogether, as the fused model itself has it."""
    measured = meter(cnn)
    ref = Reference(Session(cnn.prepared, Options(threads=1)), lambda: iter(cnn.feeds), {})
    true = ref.compare(Session(cnn.fused, Options("all", threads=1))).noise_to_signal
    assert measured.noise(range(len(measured.sites))) == pytest.approx(true, rel=0.25)
    assert 0 < measured.noise([]) < true


def test_noise_adds_up(cnn: Compiled) -> None:
    """Errors of separate roundings are hardly related."""
    measured = meter(cnn)
    weights = measured.noise([])
    alone = sum(measured.noise([i]) - weights for i in range(len(measured.sites)))
    assert weights + alone == pytest.approx(measured.noise(range(len(measured.sites))), rel=0.3)


def test_a_trial_does_not_stay(cnn: Compiled) -> None:
    measured = meter(cnn)
    before = measured.noise([1])
    coarse = choose(0.0, 1000.0, U8)
    assert measured.noise([1], (1, coarse)) > 10 * before
    assert measured.noise([1]) == before
    measured.adopt(1, coarse)
    assert measured.noise([1]) > 10 * before


def test_codes_of_another_type_than_that_of_no_tensor() -> None:
    """Where only dynamic nodes are, no parameters tell the type of the zero points."""
    made = compiled(
        f"g (float[5,16] x) => (float[5,16] y) <{constant('w', 16, 16)}> {{ [a] y = MatMul(x, w) }}"
    )
    found = find_candidates(made.prepared, made.target, made.facts)
    coded = coding(made.prepared, made.plan, found)
    model, sites = switched(
        made.prepared, made.plan, found, coded, made.solution.weights, ir.DataType.INT8
    )
    ref = Reference(Session(made.prepared, Options(threads=1)), lambda: iter(made.feeds), {})
    assert Meter(model, sites, {}, ref, samples=2, threads=1).noise([0]) > 0


def test_only_the_outputs_that_are_asked_for(cnn: Compiled) -> None:
    model, sites = switches(cnn)
    shown = with_outputs(model, ["n"])
    feed = {**cnn.feeds[0], **inputs(cnn, sites, [False] * len(sites))}
    assert [value.name for value in shown.graph.outputs] == ["n"]
    assert run(shown, feed)[0].shape == (1, 4, 8, 8)


def test_units_of_several_sites() -> None:
    stub = Stub([1.0, 2.0, 4.0, 8.0, 0.0], weights=0.0)
    noise, measured = measure_units(stub.noise, [[0, 3], [1], [2, 4]], groups=3, share=0.9, most=3)
    assert noise == [9.0, 2.0, 4.0]
    assert sorted(measured) == [0, 1, 2]
    assert stub.asked == [[0, 3], [1], [2, 4]]  # a group of one is not measured twice
    assert measure_units(stub.noise, [], groups=3, share=0.9, most=3) == ([], [])


def test_a_quiet_group_shares_its_noise() -> None:
    stub = Stub([1.0, 3.0, 10.0, 90.0], weights=0.0)
    noise, measured = measure_units(stub.noise, [[0], [1], [2], [3]], groups=2, share=0.9, most=4)
    assert noise == [2.0, 2.0, 10.0, 90.0]
    assert measured == [2, 3]


class Stub:
    """A meter whose noise is a sum by site, and which remembers what it was asked."""

    def __init__(
        self, noise: Sequence[float], weights: float = 0.5, dynamic: Sequence[int] = ()
    ) -> None:
        self.own, self.weights = list(noise), weights
        self.sites = [Site(f"s{i}", i in dynamic) for i in range(len(noise))]
        self.asked: list[list[int]] = []
        self.adopted: dict[int, Any] = {}

    def noise(self, on: Sequence[int], trial: tuple[int, float] | None = None) -> float:
        self.asked.append(list(on))
        total = self.weights + sum(self.own[i] for i in on)
        return total if trial is None else total - self.own[trial[0]] + trial[1]

    def adopt(self, site: int, params: float) -> None:
        self.adopted[site] = params


def by_site(found: Noise) -> list[float]:
    return [found.sites[f"s{i}"] for i in range(len(found.sites))]


def test_few_sites_are_measured_one_by_one() -> None:
    stub = Stub([1, 5, 2])
    found = measure(stub, groups=24)  # type: ignore[arg-type]
    assert by_site(found) == pytest.approx([1, 5, 2])
    assert (found.weights, found.total) == (0.5, 8.5)
    assert found.measured[0] == 1
    assert stub.asked == [[], [0, 1, 2], [0], [1], [2]]


def test_the_noisiest_groups_are_refined() -> None:
    noise = [0.1] * 12
    noise[5] = 30
    stub = Stub(noise)
    ticks: list[int] = []
    found = measure(stub, groups=3, share=0.9, tick=lambda: ticks.append(1))  # type: ignore[arg-type]
    assert sorted(found.measured) == [4, 5, 6, 7]
    assert found.sites["s5"] == pytest.approx(30)
    assert by_site(found)[:4] == pytest.approx([0.1] * 4)
    assert len(ticks) == 3 + 4
    assert sum(by_site(found)) == pytest.approx(sum(noise))


def test_so_many_sites_and_no_more() -> None:
    found = measure(Stub([1.0] * 40), groups=10, share=1.0, most=8)  # type: ignore[arg-type]
    assert len(found.measured) == 8
    assert by_site(found) == pytest.approx([1.0] * 40)
    assert measure(Stub([1.0] * 40), groups=10, most=0).measured == []  # type: ignore[arg-type]


def test_noise_below_that_of_the_weights_is_none() -> None:
    found = measure(Stub([-0.1, 1.0]), groups=5)  # type: ignore[arg-type]
    assert by_site(found) == [0.0, pytest.approx(1.0)]


def alternatives(table: dict[str, list[tuple[str, float]]]) -> Any:
    def of(name: str) -> Iterator[tuple[str, float]]:
        yield from table.get(name, [])

    return of


def test_the_better_of_two_ranges_is_taken() -> None:
    stub = Stub([10, 4, 1, 8], dynamic=[3])
    found = measure(stub, groups=24, share=1.0)  # type: ignore[arg-type]
    table = {
        "s0": [("mse", 6.0), ("kl", 2.0), ("mean", 3.0)],
        "s1": [("mse", 3.9)],
        "s2": [("mse", 5.0)],
        "s3": [("mse", 0.0)],
    }
    chosen = improve_ranges(stub, found, alternatives(table), most=12)  # type: ignore[arg-type]
    assert chosen == {"s0": "kl"}
    assert stub.adopted == {0: 2.0}
    assert found.sites["s0"] == pytest.approx(2)
    assert found.sites["s1"] == pytest.approx(4)  # a gain of less than a fifth may be chance


def test_only_the_noisiest_tensors_are_tried() -> None:
    stub = Stub([1, 10, 5])
    found = measure(stub, groups=24, share=1.0)  # type: ignore[arg-type]
    table = {f"s{i}": [("mse", 0.0)] for i in range(3)}
    assert set(improve_ranges(stub, found, alternatives(table), most=2)) == {"s1", "s2"}  # type: ignore[arg-type]


def test_a_planted_bad_range_is_mended(cnn: Compiled) -> None:
    """For real: one tensor with a range a hundred times too wide."""
    params: dict[str, QParams] = {**cnn.solution.params, "m": choose(-500.0, 500.0, U8)}
    model, sites = switches(cnn)
    ref = Reference(Session(cnn.prepared, Options(threads=1)), lambda: iter(cnn.feeds), {})
    bad = Meter(model, sites, params, ref, samples=3, threads=1)
    found = measure(bad, groups=24)
    worst = max(found.sites, key=lambda name: found.sites[name])
    assert worst == "m"
    before = bad.noise(range(len(sites)))
    table = {name: [("good", p)] for name, p in cnn.solution.params.items()}
    assert improve_ranges(bad, found, alternatives(table), most=12) == {"m": "good"}  # type: ignore[arg-type]
    after = bad.noise(range(len(sites)))
    assert after < before / 20
    assert math.isclose(after, meter(cnn, 3).noise(range(len(sites))), rel_tol=1e-6)
