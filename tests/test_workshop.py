"""A compilation's working state: statistics, what they forbid, solutions and attempts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest
from lowering import eager
from networks import from_text
from workbench import PAD, QUICK, Bench, images, small_cnn, weight, workbench

import qcompile.workshop
from qcompile.errors import DataError
from qcompile.graph import io
from qcompile.plan.plan import Form
from qcompile.workshop import Ranging


@pytest.fixture(scope="module")
def bench() -> Bench:
    return workbench(small_cnn(), images())


def test_the_first_plan(bench: Bench) -> None:
    assert bench.forms() == {
        "stem": "static", "act": "absorbed", "gate": "static", "mul": "static", "body": "static", "add": "static",
    }  # fmt: skip


# ---- calibration


def test_statistics_of_every_coded_tensor(bench: Bench) -> None:
    """Of calibration samples alone, with channel means where a Conv reads."""
    assert set(bench.shop.stats) == {"x", "r", "s", "m", "c", "y"}
    held = set(bench.opened.samples.held_out_numbers)  # type: ignore[union-attr]
    seen = [feed["x"] for i, feed in enumerate(images()) if i not in held]
    stats = bench.shop.stats["x"]
    assert stats.extremes.samples == len(seen) == 10
    assert (stats.low, stats.high) == (min(x.min() for x in seen), max(x.max() for x in seen))
    assert stats.channels is not None
    np.testing.assert_allclose(
        stats.channels.mean(),
        np.mean([x.mean(axis=(0, 2, 3)) for x in seen], axis=0),
        rtol=1e-4,
        atol=1e-5,
    )
    assert [name for name, s in bench.shop.stats.items() if s.channels is not None] == ["x", "m"]


@pytest.mark.parametrize(
    ("ranges", "methods", "histogram"),
    [("auto", ("mean", "minmax", "mse"), True), ("minmax", ("minmax",), False), ("kl", ("kl",), True), ("percentile", ("percentile",), True)],
)  # fmt: skip
def test_range_methods(ranges: Any, methods: tuple[str, ...], histogram: bool) -> None:
    shop = workbench(small_cnn(), images(4), dataclasses.replace(QUICK, ranges=ranges)).shop
    assert shop.methods == methods
    assert all((s.histogram is not None) == histogram for s in shop.stats.values())


def test_large_graphs_try_one_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qcompile.workshop, "LARGE", 3)
    assert workbench(small_cnn(), images(4)).shop.methods == ("mean",)


def test_nan_inside_the_model() -> None:
    model = from_text(
        f"g (float[N,4,8,8] x) => (float[N,4,8,8] y) {{ n = Sqrt(x) y = Conv<{PAD}>(n, k) }}",
        k=weight(4, 4, 3, 3),
    )
    samples = [{"x": np.abs(feed["x"])} for feed in images(6)]
    samples[2]["x"][0, 0, 0, 0] = -1
    with pytest.raises(DataError, match=r"tensor 'n' is NaN at index \[0, 0, 0, 0\] for sample 2"):
        workbench(model, samples)


# ---- what no scale can serve


def middle(nodes: str, **weights: Any) -> onnx.ModelProto:
    """Nodes between two convolutions, from `a` to `b`."""
    return from_text(
        f"g (float[N,4,8,8] x) => (float[N,4,8,8] y) {{ [one] a = Conv<{PAD}>(x, k) {nodes} [two] y = Conv<{PAD}>(b, l) }}",
        k=weight(4, 4, 3, 3), l=weight(4, 4, 3, 3, seed=1), **weights,
    )  # fmt: skip


@pytest.mark.parametrize("value", [-1e9, float(np.finfo(np.float32).min), -np.inf])
def test_nodes_beside_a_mask_stay_float(value: float) -> None:
    """The Add, whose operand and result reach the mask's value, and nobody else."""
    mask = np.zeros((1, 4, 8, 8), np.float32)
    mask[..., 4:] = value
    text = "e = Exp(x) z = Mul(e, none) n = Where(hit, z, mask) [add] m = Add(a, n) p = Softmax<axis = -1>(m) b = Max(p)"
    made = workbench(middle(text, mask=mask, hit=mask == 0, none=np.float32(0)), images())
    assert made.forms()["add"] == "float"
    assert made.forms()["one"] == made.forms()["two"] == "static"
    why = made.draft["add"].why
    what = "is infinite" if np.isinf(value) else f"reaches {value:g}"
    assert why in (f"tensor {t!r} {what} in the calibration data" for t in ("n", "m"))


def test_large_activations_are_no_masks() -> None:
    made = workbench(
        middle("[big] c = Mul(a, much) [sum] b = Add(c, c)", much=np.float32(1e5)), images()
    )
    assert made.forms()["sum"] == "static"


@pytest.mark.parametrize(("scale", "form"), [(2.0, "static"), (10.0, "static"), (40.0, "float")])
def test_an_output_of_parts_that_differ_in_range(scale: float, form: str) -> None:
    """One scale for both would leave the smaller part no more than a few codes."""
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,8,8,8] y) "
        f"{{ [one] a = Conv<{PAD}>(x, k) [two] b = Conv<{PAD}>(x, l) [join] y = Concat<axis = 1>(a, b) }}",
        k=weight(4, 4, 3, 3, scale=scale), l=weight(4, 4, 3, 3, seed=1),
    )  # fmt: skip
    made = workbench(model, images())
    assert made.forms()["join"] == form
    if form == "float":
        assert made.draft["join"].why.startswith("the ranges of its inputs differ ")
        assert 16 < float(made.draft["join"].why.split()[-1].removesuffix("-fold")) < 100


def test_a_concat_in_the_middle_may_be_joined() -> None:
    """What its parts are worth is measured, not known."""
    made = workbench(
        middle(
            "[much] c = Mul(a, many) [join] d = Concat<axis = 1>(a, c) b = Conv(d, n)",
            many=np.float32(40),
            n=weight(4, 8, 1, 1),
        ),
        images(),
    )
    assert made.forms()["join"] == "static"


# ---- solving


def test_parameters_by_method() -> None:
    """Of all tensors, or of single ones. An extreme that the histogram does not know tells them apart."""
    made = workbench(small_cnn(), images())
    shop, draft = made.shop, made.draft
    shop.stats["x"].high *= 5
    wide, narrow = (shop.parameters(draft, Ranging(method)) for method in ("minmax", "mse"))
    assert set(wide) == {"x", "r", "s", "m", "c", "y"}
    low, high = shop.stats["x"].low, shop.stats["x"].high
    assert float(wide["x"].scale) == pytest.approx((high - low) / 255, rel=1e-5)
    assert float(narrow["x"].scale) < 0.7 * float(wide["x"].scale)
    single = shop.parameters(draft, Ranging("minmax", {"x": "mse", "not there": "mse"}))
    assert float(single["x"].scale) == float(narrow["x"].scale)
    assert float(single["y"].scale) == float(wide["y"].scale)


def test_biases_are_corrected_for_the_weights_and_for_the_inputs(bench: Bench) -> None:
    shop, draft = bench.shop, bench.draft
    plain = dataclasses.replace(shop.recipe, bias_correction=False)
    before = Bench(bench.opened, shop, bench.request, draft)
    solved = {
        shift: shop.solve(draft, Ranging("mean", shift=shift)).weights for shift in (False, True)
    }
    shop.recipe = plain
    try:
        raw = before.shop.solve(draft, Ranging("mean")).weights
    finally:
        shop.recipe = QUICK
    assert raw["body"].bias is None
    biases = [raw["stem"].bias, solved[False]["stem"].bias, solved[True]["stem"].bias]
    np.testing.assert_array_equal(biases[0], weight(4))  # type: ignore[arg-type]
    for a, b in ((0, 1), (1, 2)):
        assert np.abs(biases[a] - biases[b]).max() > 1e-6  # type: ignore[operator]
        assert np.abs(biases[a] - biases[b]).max() < 0.05  # type: ignore[operator]
    for name in ("stem", "body"):
        np.testing.assert_array_equal(solved[False][name].codes, raw[name].codes)


def test_corrected_biases_mend_the_mean(bench: Bench) -> None:
    """The mean of each channel of the result, over the calibration samples, is nearer to the float one."""
    shop = bench.shop
    samples = [feed for _, feed in bench.opened.samples.calibration()]  # type: ignore[union-attr]
    wanted = np.mean([bench.opened.session.run(feed)[0] for feed in samples], axis=(0, 1, 3, 4))
    off = {}
    for correction in (False, True):
        shop.recipe = dataclasses.replace(QUICK, bias_correction=correction)
        session = shop.attempt(bench.draft, Ranging("minmax", shift=correction), "fused").session
        off[correction] = np.abs(
            np.mean([session.run(feed)[0] for feed in samples], axis=(0, 1, 3, 4)) - wanted
        )
    shop.recipe = QUICK
    assert off[True].sum() < off[False].sum()


def test_shifts_are_measured_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = workbench(small_cnn(), images()).shop
    asked: list[set[str]] = []
    true_shift = qcompile.workshop.rounding_shift

    def count(model: object, params: dict[str, Any], *rest: Any, **more: Any) -> Any:
        asked.append(set(params))
        return true_shift(model, params, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(qcompile.workshop, "rounding_shift", count)
    first = shop.solve(bench.draft, Ranging("minmax", shift=True))
    again = shop.solve(bench.draft, Ranging("minmax", shift=True))
    assert asked == [{"x", "m"}]
    shop.stats["m"].high *= 3
    shop.solve(bench.draft, Ranging("minmax", shift=True))
    assert asked == [{"x", "m"}, {"m"}]
    np.testing.assert_array_equal(first.weights["body"].bias, again.weights["body"].bias)  # type: ignore[arg-type]


def test_a_target_that_saturates_gets_7_bits() -> None:
    text = "g (float[N,8,8,8] x) => (float[N,4,8,8] y) { [one] y = Conv(x, k) }"
    model = from_text(text, k=np.abs(weight(4, 8, 1, 1)) + np.float32(0.1))
    codes = {}
    for name in ("ort-cpu-x64-vnni", "ort-cpu-x64-avx2"):
        made = workbench(model, images(channels=8), target=dataclasses.replace(eager(name)))
        made.shop.target = eager(name)
        request = dataclasses.replace(made.request, forms={"one": Form.STATIC})
        plan = made.shop.plan(request)
        made.shop.calibrate(plan)
        codes[name] = np.abs(
            made.shop.solve(plan, Ranging("minmax")).weights["one"].codes.astype(int)
        ).max()
    assert codes["ort-cpu-x64-vnni"] == 127
    assert codes["ort-cpu-x64-avx2"] <= 64


# ---- attempts


@pytest.mark.parametrize("form", ["fused", "qdq"])
def test_the_same_choices_give_the_same_bytes(form: Any) -> None:
    """Plan, solution and graph, from two compilations of their own."""
    made = []
    for _ in range(2):
        bench = workbench(small_cnn(), images())
        attempt = bench.shop.attempt(bench.draft, Ranging("mean", {"m": "mse"}, shift=True), form)
        made.append((bench.draft, io.to_bytes(attempt.model)))
    assert made[0] == made[1]


def test_judged_on_the_samples_held_out(bench: Bench) -> None:
    attempt = bench.shop.attempt(bench.draft, Ranging("minmax"), "fused")
    assert (attempt.noise, attempt.db) == (0.0, np.inf)
    found = bench.shop.judge(attempt)
    assert found.samples == bench.opened.samples.held_out_count  # type: ignore[union-attr]
    assert attempt.comparison is found
    assert attempt.db == found.worst_db > 20
    assert attempt.noise == pytest.approx(10 ** (-attempt.db / 10))
    assert bench.shop.judge(attempt, 1).samples == 1


def test_tuning_does_not_see_what_is_held_out(bench: Bench) -> None:
    """Its samples are calibration samples; its outputs those of the float graph."""
    reference = bench.shop.tuning_reference(["c", "y"], bench.shop.samples.few(3))
    used: list[Any] = []

    class Spy:
        def run(self, feed: Any, outputs: Any = None) -> Any:
            used.append(feed["x"])
            return [np.zeros((1, 4, 8, 8), np.float32)] * 2

    found = reference.compare(Spy())
    assert list(found.outputs) == ["c", "y"]
    held = [images()[i]["x"] for i in bench.opened.samples.held_out_numbers]  # type: ignore[union-attr]
    assert len(used) == 3
    assert not any(np.array_equal(x, other) for x in used for other in held)


def test_an_lstm_has_only_the_fused_form() -> None:
    rng = np.random.default_rng(0)
    model = from_text(
        "g (float[6,1,8] x) => (float[6,1,1,16] y) { [lstm] y = LSTM<hidden_size = 16>(x, w, r) }",
        w=rng.normal(size=(1, 64, 8)).astype(np.float32), r=rng.normal(size=(1, 64, 16)).astype(np.float32),
    )  # fmt: skip
    made = workbench(model, [{"x": np.zeros((6, 1, 8), np.float32)}] * 3)
    assert made.forms() == {"lstm": "dynamic"}
    assert made.shop.only_fused(made.draft)
    cnn = workbench(small_cnn(), images(3))
    assert not cnn.shop.only_fused(cnn.draft)


def test_nothing_observed_is_nothing_forbidden() -> None:
    shop = workbench(small_cnn(), None).shop
    assert shop.stats == {}
    assert shop.unusable() == {}
