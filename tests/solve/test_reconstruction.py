"""Searched codes of weights: better outputs on samples that were not seen, biases that fit, nothing else changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from networks import from_text
from numpy.typing import NDArray
from workbench import PAD, QUICK, Bench, images, small_cnn, weight, workbench

from qcompile.graph.edit import array
from qcompile.quant.affine import dequantize
from qcompile.run.session import Feed
from qcompile.solve.reconstruction import Gain, reconstruct, representable
from qcompile.solve.weights import Weight, can_saturate
from qcompile.targets.schema import load_target
from qcompile.workshop import Ranging

Array = NDArray[Any]
Found = tuple[Mapping[str, Weight], Mapping[str, Weight], Mapping[str, Gain]]


def smooth_images(count: int, seed: int, channels: int = 4) -> list[Feed]:
    """Neighbouring pixels and channels are alike, and no channel is 0 on average, as in real ones."""
    rng = np.random.default_rng([13, seed])
    made = rng.normal(size=(count, channels, 8, 8)).cumsum(axis=2).cumsum(axis=3) / 8
    made += made.sum(axis=1, keepdims=True) + 1
    return [{"x": x[None].astype(np.float32)} for x in made]


def searched(bench: Bench, *, correct: bool = True, data: list[Feed] | None = None) -> Found:
    shop = bench.shop
    solution = shop.solve(bench.draft, Ranging("minmax"))
    means = {n: s.channels.mean() for n, s in shop.stats.items() if s.channels is not None}
    weights, gains = reconstruct(
        shop.prepared, bench.draft, shop.found, solution.params, solution.weights,
        data or shop.samples.few(16), shop.held_out(8), shop.facts,  # type: ignore[union-attr]
        means=means if correct else None,
    )  # fmt: skip
    return solution.weights, weights, gains


@pytest.fixture(scope="module")
def bench() -> Bench:
    return workbench(small_cnn(), smooth_images(20, 0))


def test_every_gain_is_one(bench: Bench) -> None:
    before, after, gains = searched(bench)
    assert set(gains) == {"stem", "body"}
    assert set(after) == set(before)
    assert all(0 < gain.after < 0.8 * gain.before for gain in gains.values())


def test_layers_with_huge_moments_are_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qcompile.solve.reconstruction._MOST_SUMS", 16 * 36**2 - 1
    )  # 4 channels, 3 x 3
    before, after, gains = searched(bench)
    assert gains == {}
    assert after == before


def test_only_codes_and_biases_change(bench: Bench) -> None:
    before, after, gains = searched(bench)
    for name in gains:
        old, new = before[name], after[name]
        assert new.params is old.params
        assert new.codes.dtype == old.codes.dtype
        assert new.codes.shape == old.codes.shape
        steps = np.abs(new.codes.astype(int) - old.codes)
        assert 0 < (steps > 0).mean() < 0.6
        assert steps.max() <= 6


def test_the_layer_is_nearer_to_the_float_one_on_new_samples(bench: Bench) -> None:
    """The convolution itself, with inputs that neither search nor judge saw."""
    before, after, _ = searched(bench)
    w, bias = (array(bench.shop.found["stem"].node.inputs[i]) for i in (1, 2))  # type: ignore[union-attr]
    assert w is not None
    assert bias is not None
    feeds = smooth_images(10, 5)

    def power(weight: Weight) -> float:
        assert weight.bias is not None
        off = dequantize(weight.codes, weight.params) - w
        shift = (weight.bias - bias).reshape(1, -1, 1, 1)
        return sum(float(np.square(_conv(feed["x"], off) + shift).sum()) for feed in feeds)

    assert power(after["stem"]) < 0.8 * power(before["stem"])


def _conv(x: Array, w: Array) -> Array:
    """A 3x3 convolution of one image, padded by 1."""
    wide = np.pad(x[0].astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), axis=(1, 2))
    made: Array = np.einsum("chwij,ocij->ohw", patches, w)
    return made[None]


def test_the_model_is_nearer_to_the_float_one(bench: Bench) -> None:
    shop = bench.shop
    _, after, gains = searched(bench)
    plain = shop.attempt(bench.draft, Ranging("minmax"), "fused")
    rounded = Ranging("minmax", rounded={name: after[name] for name in gains})
    better = shop.attempt(bench.draft, rounded, "fused")
    shop.judge(plain)
    shop.judge(better)
    assert better.noise < plain.noise


def test_biases_are_those_that_solving_makes(bench: Bench) -> None:
    """What an attempt with these codes stores is what the search judged."""
    _, after, gains = searched(bench)
    ranging = Ranging("minmax", rounded={name: after[name] for name in gains})
    solved = bench.shop.solve(bench.draft, ranging).weights
    for name in gains:
        np.testing.assert_array_equal(solved[name].codes, after[name].codes)
        assert solved[name].bias is not None
        np.testing.assert_allclose(solved[name].bias, after[name].bias, rtol=1e-4, atol=1e-6)


def test_without_means_biases_stay(bench: Bench) -> None:
    before, after, gains = searched(bench, correct=False)
    assert gains
    assert all(after[name].bias is before[name].bias for name in gains)


def test_a_layer_whose_input_saturates_everywhere_is_left_alone(bench: Bench) -> None:
    """Its rows are all left out, so nothing is known."""
    far = [{"x": np.full((1, 4, 8, 8), 1e6, np.float32)}] * 4
    before, after, gains = searched(bench, data=far)
    assert "stem" not in gains
    assert after["stem"] is before["stem"]


def test_nodes_without_a_search_keep_their_weights() -> None:
    """A table of embeddings rounds as it is; the product behind it is searched."""
    rng = np.random.default_rng(3)
    model = from_text(
        "g (int64[N,6] x) => (float[N,6,64] y) { e = Gather(table, x) [dense] y = MatMul(e, w) }",
        table=rng.normal(size=(2048, 64)).astype(np.float32), w=weight(64, 64),
    )  # fmt: skip
    feeds = [{"x": rng.integers(0, 2048, (1, 6))} for _ in range(20)]
    made = workbench(model, feeds)
    _, _, gains = searched(made)
    assert set(gains) <= {"dense"}


def grouped() -> onnx.ModelProto:
    return from_text(
        f"g (float[N,4,8,8] x) => (float[N,4,8,8] y) {{ [deep] y = Conv<group = 4, {PAD}>(x, k, b) }}",
        k=weight(4, 1, 3, 3), b=weight(4),
    )  # fmt: skip


def test_depthwise_layers() -> None:
    _, _, gains = searched(workbench(grouped(), smooth_images(20, 1)))
    assert gains["deep"].after < gains["deep"].before


def test_codes_do_not_begin_to_overflow() -> None:
    """Kernels without VNNI add pairs of products in 16 bits: what fits them before fits after."""
    bench = workbench(small_cnn(), images(20), QUICK)
    bench.opened.target = load_target("ort-cpu-x64-avx2")
    shop = bench.shop
    shop.target = dataclasses.replace(shop.target, saturating=True)
    before, after, _ = searched(bench)
    for name, weight_before in before.items():
        assert not can_saturate(weight_before.codes)
        assert not can_saturate(after[name].codes)


def test_what_codes_can_say(bench: Bench) -> None:
    params = bench.shop.solve(bench.draft, Ranging("minmax")).params["x"]
    low, high = representable(params)
    codes = np.array([0, 255], np.uint8)
    ends = dequantize(codes, params)
    step = float(params.scale)
    np.testing.assert_allclose([low, high], [ends[0] - step, ends[1] + step], rtol=1e-5)
