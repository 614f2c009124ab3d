"""What errors of matrices cost the outputs, predicted, against models that really have them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from language_models import language, texts
from networks import from_text
from numpy.typing import NDArray
from workbench import weight

from passes.lower_nbits import LowerNbits
from qcompile.algo.choose import Factors
from qcompile.algo.gptq import gptq
from qcompile.algo.rtn import search
from qcompile.fewbits import sweep
from qcompile.fewbits.assign import Scheme, assign
from qcompile.fewbits.damage import costs_of_weights, errors, rounded
from qcompile.fewbits.share import Matrix, matrices
from qcompile.fewbits.sweep import measured_costs
from qcompile.opened import Opened, open_model
from qcompile.recipe import BUILT_IN
from qcompile.run.session import Options, Session
from qcompile.step import run_pass
from qcompile.verify.metrics import divergence

Array = NDArray[Any]
RECIPE = dataclasses.replace(BUILT_IN["int4"], bits_per_weight=4.5, algorithm="search", threads=1)


def opened(model: onnx.ModelProto, data: list[dict[str, Array]]) -> tuple[Opened, list[Matrix]]:
    found = open_model(model, data, RECIPE)
    return found, matrices(assign(found.prepared, RECIPE, found.original), RECIPE, {}, "nbits")


def costs(
    found: Opened, some: list[Matrix], judges: list[dict[str, Array]]
) -> dict[str, dict[tuple[int, int], float]]:
    """Costs by the name of the first reader, and by bits and block."""
    assert found.samples is not None
    rows = measured_costs(found.prepared, some, found.samples.few(8), judges, found.facts, RECIPE)
    return {
        one.readers[0].name: {(s.bits, s.block): c for s, c in zip(one.schemes, row, strict=True)}
        for one, row in zip(some, rows, strict=True)
    }


def truth(found: Opened, one: Matrix, scheme: Scheme, judges: list[dict[str, Array]]) -> float:
    """KL of the model with this matrix rounded by its weights alone."""
    W = one.readers[0].read()
    made = search(W, bits=scheme.bits, block=scheme.block, symmetric=False)
    model = found.prepared.clone()
    run_pass(LowerNbits({item.name: made for item in one.readers}, accuracy_level=0), model)
    session = Session(model, Options("all", threads=1))
    pairs = [(found.session.run(f, ["logits"])[0], session.run(f, ["logits"])[0]) for f in judges]
    return float(np.mean([divergence(y, z, logits=True).mean() for y, z in pairs]))


def test_costs_are_what_the_model_loses() -> None:
    found, some = opened(language(layers=3), texts())
    judges = texts(34)[-4:]
    predicted = costs(found, some, judges)
    assert len(predicted) == 7
    ratios = [
        predicted[one.readers[0].name][bits, 32] / truth(found, one, Scheme(bits, 32, symmetric=False), judges)
        for one in some
        for bits in (2, 4, 8)
    ]  # fmt: skip
    assert min(ratios) > 0.4
    assert max(ratios) < 2.5
    spread = [truth(found, one, Scheme(4, 32, symmetric=False), judges) for one in some]
    assert max(spread) > 5 * min(spread)  # or any costs would do


def test_few_are_followed_and_the_others_lie_between(monkeypatch: pytest.MonkeyPatch) -> None:
    found, some = opened(language(layers=6), texts())
    judges = texts(34)[-4:]
    every = costs(found, some, judges)
    monkeypatch.setattr(sweep, "_FOLLOWED", 7)  # the lookup, and three of each kind of product
    few = costs(found, some, judges)
    changed = [name for name in every if every[name][4, 32] != few[name][4, 32]]
    assert {"up1", "down1"} <= set(changed)
    assert all(0.3 < few[name][4, 32] / every[name][4, 32] < 3 for name in every)


def test_a_model_without_scores_is_judged_by_relative_error() -> None:
    text = (
        "g (float[N,64] x) => (float[N,64] y) { [first] a = MatMul(x, u) [second] b = MatMul(x, v) s = Mul(b, k) "
        "r = Add(a, s) y = Tanh(r) }"
    )
    model = from_text(
        text, u=weight(64, 64), v=weight(64, 64, seed=1), k=np.array(0.01, np.float32)
    )
    rng = np.random.default_rng(0)
    data = [{"x": rng.normal(size=(16, 64)).astype(np.float32)} for _ in range(10)]
    found, some = opened(model, data)
    made = costs(found, some, data[:2])
    # errors of the second are a hundredth as large when they arrive
    assert made["first"][4, 32] == pytest.approx(1e4 * made["second"][4, 32], rel=0.5)
    assert all(row[8, 32] < row[4, 32] < row[2, 32] for row in made.values())


def test_matrices_in_bodies_cost_what_others_do() -> None:
    text = (
        "g (float[N,64] x, bool c) => (float[N,64] y) { [first] a = MatMul(x, u) "
        "b = If(c)<then_branch = t () => (float[N,64] p) { [inside] p = MatMul(a, v) }, "
        "else_branch = e () => (float[N,64] q) { q = Neg(a) }> y = Tanh(b) }"
    )
    model = from_text(text, u=weight(64, 64), v=weight(64, 64, seed=1))
    rng = np.random.default_rng(0)
    data = [
        {"x": rng.normal(size=(16, 64)).astype(np.float32), "c": np.array(True)} for _ in range(10)
    ]
    found, some = opened(model, data)
    made = costs(found, some, data[:2])
    assert set(made) == {"first", "inside"}
    ratio = made["inside"][4, 32] / made["first"][4, 32]
    assert 0.2 < ratio < 5


def test_errors_of_rows_are_those_of_the_algorithm() -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(48, 48))
    x = (rng.normal(size=(500, 48)) @ mix).astype(np.float32)
    H = (x.T @ x).astype(np.float64) / len(x)
    W = rng.normal(size=(40, 48)).astype(np.float32)
    schemes = [Scheme(2, 16, symmetric=False), Scheme(4, 16, symmetric=True)]
    factors = Factors(H)
    found = errors(W, schemes, "auto", factors, H)
    for scheme, error in zip(schemes, found, strict=True):
        whole = gptq(
            W, factors.get(order=False), bits=scheme.bits, block=16, symmetric=scheme.symmetric
        )
        off = W - whole.dequantize()
        assert error == pytest.approx(float(np.sum((off @ H) * off)), rel=1e-4)
        # rows do not know each other: some tell what all have
        part = rounded(W[::4], scheme, "auto", factors)
        np.testing.assert_array_equal(part.codes, whole.codes[::4])


def test_without_data_relative_errors_count_once_a_reader() -> None:
    found = open_model(language(), None, RECIPE)
    some = matrices(assign(found.prepared, RECIPE, found.original), RECIPE, {}, "nbits")
    rows = costs_of_weights(some, RECIPE)
    at = next(i for i, s in enumerate(some[0].schemes) if (s.bits, s.block) == (4, 32))
    by_name = {one.readers[0].name: row[at] for one, row in zip(some, rows, strict=True)}
    assert by_name["up0"] == pytest.approx(by_name["up1"], rel=0.2)
    assert by_name["Gather:e"] == pytest.approx(2 * by_name["up0"], rel=0.3)


def test_the_graph_is_not_changed() -> None:
    found, some = opened(language(), texts(12))
    before = ir.to_onnx_text(found.prepared)
    costs(found, some, [])
    assert ir.to_onnx_text(found.prepared) == before
