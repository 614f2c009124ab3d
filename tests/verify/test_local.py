"""The error of each tensor's readers, against the same computed in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from lowering import eager
from numpy.typing import NDArray
from rewrites import parse, random_feed, run
from workbench import images, small_cnn, workbench

from qcompile import tune
from qcompile.calib.taps import with_outputs
from qcompile.errors import ModelError
from qcompile.plan.candidates import Candidate
from qcompile.plan.make import Request, find_candidates, make_plan
from qcompile.plan.plan import Form, Plan
from qcompile.plan.tensors import Coding, coding
from qcompile.prepare import prepare
from qcompile.quant.affine import choose, fake_quantize
from qcompile.quant.scheme import QParams, Scheme
from qcompile.run.probe import probe
from qcompile.verify.local import LocalErrors, best_methods

UINT8 = Scheme.parse("uint8.tensor.asym")
W = "float[2,2,1,1] w = {1, -2, 0.5, 3}"
NET = f"g (float[1,2,4,4] x) => (float[1,2,4,4] y) <{W}> {{ a = Conv(x, w) r = Relu(a) b = Conv(r, w) y = Add(b, r) }}"


def planned(text: str) -> tuple[ir.Model, Plan, Coding]:
    model, _ = prepare(parse(text))
    facts = probe(model, random_feed(model))
    found = find_candidates(model, eager(), facts)
    forms = {name: Form.STATIC for name, item in found.items() if isinstance(item, Candidate)}
    plan = make_plan(model, eager(), facts, Request(forms=forms), found)
    return model, plan, coding(model, plan, found)


def params(high: float, low: float = 0.0) -> QParams:
    return choose(low, high, UINT8)


def measured(
    text: str, tables: dict[str, dict[str, QParams]], feeds: list[Any]
) -> tuple[list[str], Any]:
    model, plan, codes = planned(text)
    meter = LocalErrors(model, plan, codes, ir.DataType.UINT8, threads=1)
    return meter.roots, meter.measure(tables, feeds)


def ratio(true: NDArray[Any], other: NDArray[Any]) -> float:
    return float(np.square(other - true).sum() / np.square(true).sum())


def test_against_numpy() -> None:
    """Of x what the first Conv and its Relu make; of r both readers; of b the Add; of y itself."""
    feeds = [random_feed(parse(NET), seed) for seed in range(3)]
    table = {"x": params(2, -2), "r": params(3), "b": params(9, -9), "y": params(9, -9)}
    roots, found = measured(NET, {"it": table}, feeds)
    assert roots == ["x", "r", "b", "y"]
    w = np.array([[1, -2], [0.5, 3]], np.float32)
    want = dict.fromkeys(roots, 0.0)

    def conv(x: NDArray[Any]) -> NDArray[Any]:
        return np.einsum("oc,nchw->nohw", w, x)

    for feed in feeds:
        x = feed["x"]
        q = {name: (lambda v, p=p: fake_quantize(v, p)) for name, p in table.items()}
        r = np.maximum(conv(x), 0)
        b = conv(r)
        y = b + r
        want["x"] += ratio(r, np.maximum(conv(q["x"](x)), 0))
        want["r"] += ratio(b, conv(q["r"](r))) + ratio(y, b + q["r"](r))
        want["b"] += ratio(y, q["b"](b) + r)
        want["y"] += ratio(y, q["y"](y))
    assert dict(zip(roots, found["it"].tolist(), strict=True)) == pytest.approx(want, rel=1e-3)


def test_the_range_of_least_error_wins() -> None:
    feeds = [random_feed(parse(NET), seed) for seed in range(3)]
    model, _, codes = planned(NET)
    shown = with_outputs(model, [root.name or "" for root in codes.roots])
    tops = np.max([[np.abs(v).max() for v in run(shown, feed)] for feed in feeds], axis=0)
    roots = [root.name or "" for root in codes.roots]
    tables = {
        name: {
            root: params(top * factor, -top * factor) for root, top in zip(roots, tops, strict=True)
        }
        for name, factor in (("wide", 30.0), ("right", 1.0), ("narrow", 0.05))
    }
    _, errors = measured(NET, tables, feeds)
    assert best_methods(errors, roots) == dict.fromkeys(roots, "right")


def test_of_equals_the_first() -> None:
    same = np.array([0.5, 0.25])
    assert best_methods({"a": same, "b": same.copy()}, ["x", "y"]) == {"x": "a", "y": "a"}


def test_nothing_to_measure() -> None:
    text = "g (float[1,2,4,4] x) => (float[1,2,4,4] y) { y = Tanh(x) }"
    model, plan, codes = planned(text)
    meter = LocalErrors(model, plan, codes, ir.DataType.UINT8, threads=1)
    assert meter.roots == []
    assert meter.measure({"a": {}}, [])["a"].size == 0


def test_the_model_stays_as_it_was() -> None:
    model, plan, codes = planned(NET)
    before = ir.to_onnx_text(model)
    LocalErrors(model, plan, codes, ir.DataType.UINT8, threads=1)
    assert ir.to_onnx_text(model) == before


def test_ranges_by_tensor() -> None:
    """For every tensor of a plan; none if ORT refuses the doubled graph."""
    bench = workbench(small_cnn(), images())
    roots = {value.name for value in bench.shop.coding(bench.draft).roots}
    assert set(tune.local_ranges(bench.shop, bench.draft)) == roots


def test_a_model_that_ort_refuses_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = workbench(small_cnn(), images())

    def refuse(*_: Any, **__: Any) -> None:
        raise ModelError("no.")

    monkeypatch.setattr(tune, "LocalErrors", refuse)
    assert tune.local_ranges(bench.shop, bench.draft) == {}
