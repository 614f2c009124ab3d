"""Rewrites that data decides on, from the first plan on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest
from networks import from_text
from workbench import PAD, QUICK, Bench, weight, workbench

from qcompile.improve import improve
from qcompile.plan.plan import Form
from qcompile.search import History, choose_ranges

MASKED = (
    "g (float[N,4,8,8] x, bool[N,1,1,8] open) => (float[N,4,8,8] y) { "
    f"[one] a = Conv<{PAD}>(x, k) [mask] m = Where(open, zero, big) [add] s = Add(a, m) "
    f"p = Softmax<axis = -1>(s) [two] y = Conv<{PAD}>(p, l) }}"
)


def masked_net(big: float = -1e9) -> onnx.ModelProto:
    """Attention whose scores a Conv makes: the Add of the mask could be integer."""
    return from_text(
        MASKED, k=weight(4, 4, 3, 3), l=weight(4, 4, 3, 3, seed=1), zero=np.float32(0), big=np.float32(big)
    )  # fmt: skip


def masked_feeds(count: int = 12) -> list[dict[str, Any]]:
    rng = np.random.default_rng(13)
    return [
        {
            "x": rng.normal(size=(1, 4, 8, 8)).astype(np.float32),
            "open": np.arange(8).reshape(1, 1, 1, 8) < rng.integers(3, 9),
        }
        for _ in range(count)
    ]


def improved(bench: Bench) -> tuple[Any, Any, Any, History]:
    log = History()
    best = choose_ranges(bench.shop, bench.draft, "fused", log)
    return (*improve(bench.shop, bench.request, best, bench.opened, log), log)


def switches(**on: bool) -> Any:
    off = dict.fromkeys(("equalize", "absorb", "smooth", "masks", "rounding"), False)
    return dataclasses.replace(QUICK, **{**off, **on})


@pytest.mark.parametrize("judged_good", [True, False])
def test_a_bounded_mask_lets_its_sum_be_integer(
    judged_good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompile.improve.better", lambda *_: judged_good)
    bench = workbench(masked_net(), masked_feeds(), switches(masks=True))
    assert bench.draft["add"].form is Form.FLOAT
    assert "-1e+09 in the calibration data" in bench.draft["add"].why
    shop, request, best, log = improved(bench)
    if not judged_good:
        assert (shop, request) == (bench.shop, bench.request)
        assert best.plan["add"].form is Form.FLOAT
        assert "add stays float: with its mask bounded" in log.notes[-1]
        return
    assert best.plan["add"].form is Form.STATIC
    assert "add" not in request.keep_float
    assert -100 < shop.stats["m"].low < -20
    assert best.comparison.worst_db > 15
    assert "1 masks bounded, so that 1 more nodes are integer" in log.notes[-1]
    operators = [node.op_type for node in best.model.graph]
    assert "QLinearAdd" in operators
    assert "Clip" not in operators


def test_a_sum_that_a_person_keeps_float_stays() -> None:
    bench = workbench(masked_net(), masked_feeds(), switches(masks=True))
    kept = dataclasses.replace(bench.request, keep_float={"add": "named"})
    bench = dataclasses.replace(bench, request=kept, draft=bench.shop.plan(kept))
    shop, request, best, log = improved(bench)
    assert (shop, request) == (bench.shop, kept)
    assert best.plan["add"].why == "named"
    assert not any("mask" in note for note in log.notes)


@pytest.mark.parametrize("why", ["off", "not proved"])
def test_masks_that_stay(why: str) -> None:
    net = masked_net(-1e9 if why == "off" else -np.inf)
    bench = workbench(net, masked_feeds(), switches(masks=why != "off"))
    shop, _, best, log = improved(bench)
    assert shop is bench.shop
    assert best.plan["add"].form is Form.FLOAT
    assert not any("mask" in note for note in log.notes)


def biased_net(pads: int) -> onnx.ModelProto:
    """A Conv whose channels have high biases, Relu, and a Conv that pads or does not."""
    bias = np.array([40, 0, 1, 30], np.float32)
    text = (
        f"g (float[N,4,8,8] x) => (float[N,4,8,8] y) {{ [one] a = Conv<{PAD}>(x, k, b) [act] r = Relu(a) "
        f"[two] y = Conv<pads = [{pads}, {pads}, {pads}, {pads}]>(r, l) }}"
    )
    side = 1 + 2 * pads
    return from_text(
        text, k=weight(4, 4, 3, 3), b=bias, l=weight(4, 4, side, side, seed=1) - np.float32(0.1)
    )


def biased_feeds() -> list[dict[str, Any]]:
    rng = np.random.default_rng(14)
    return [{"x": rng.normal(size=(1, 4, 8, 8)).astype(np.float32)} for _ in range(12)]


def test_high_biases_are_absorbed_where_that_helps() -> None:
    bench = workbench(biased_net(0), biased_feeds(), switches(absorb=True))
    before = choose_ranges(bench.shop, bench.draft, "fused", History())
    shop, _, best, log = improved(bench)
    assert best.db > before.db + 3
    assert shop.stats["r"].high < 0.5 * bench.shop.stats["r"].high
    assert "1 of 1 high biases absorbed by the next layers" in log.notes[-1]


@pytest.mark.parametrize(("pads", "on"), [(1, True), (0, False)])
def test_high_biases_that_stay(pads: int, on: bool) -> None:
    bench = workbench(biased_net(pads), biased_feeds(), switches(absorb=on))
    shop, _, _, log = improved(bench)
    assert shop is bench.shop
    assert not any("biases" in note for note in log.notes)


def test_ranges_behind_activations_are_gathered_for_products_too() -> None:
    """Gemm, Relu, Gemm: products have no codes, so that nothing else asks for their channels."""
    net = from_text(
        f"g (float[N,4,8,8] x) => (float[N,4] y) {{ [one] a = Conv<{PAD}>(x, k) [pool] g = GlobalAveragePool(a) f = Flatten(g) "
        "[two] h = Gemm(f, v, b) [act] r = Relu(h) [three] y = Gemm(r, w) }",
        k=weight(8, 4, 3, 3), v=weight(8, 16), b=np.full(16, 9, np.float32), w=weight(16, 4),
    )  # fmt: skip
    bench = workbench(net, biased_feeds(), switches(absorb=True))
    channels = bench.shop.observed["r"].channels
    assert channels is not None
    assert channels.lows.shape == (16,)
    assert (channels.lows > 4).all()
