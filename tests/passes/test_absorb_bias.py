"""Parts of biases that go through an activation into the next layer."""

from __future__ import annotations

import numpy as np
import pytest
from rewrites import assert_close, assert_refuses, assert_rewrites, parse, random_feed, run

from passes.absorb_bias import AbsorbBias
from qcompile.run.probe import Fact, probe
from qcompile.solve.shifts import shift_groups
from qcompile.step import run_pass

HEAD = "g (float[1,1,2,2] x) => (float[1,1,2,2] y)"
V = "float[2,1,1,1] v = {0.5, 0.5}, float[2] b = {20, 1}"
W = "float[1,2,1,1] w = {3, 5}, float[1] d = {1}"
C = np.array([10.0, 0.0])
BODY = "{ [c0] a = Conv(x, v, b) r = Relu(a) [c2] y = Conv(r, w, d) }"


def facts(text: str) -> dict[str, Fact]:
    model = parse(text)
    return dict(probe(model, random_feed(model)))


def step(text: str, name: str = "r", shift: np.ndarray = C) -> AbsorbBias:
    return AbsorbBias(facts(text), {name: shift})


def test_between_two_convolutions() -> None:
    before = f"{HEAD} <{V}, {W}> {BODY}"
    outcome = assert_rewrites(
        step(before),
        before=before,
        after=f"{HEAD} <float[2,1,1,1] v = {{0.5, 0.5}}, float[2] b = {{10, 1}}, float[1,2,1,1] w = {{3, 5}}, float[1] d = {{31}}> {BODY}",
    )
    assert outcome.rescaled == {"a", "r"}
    assert outcome.changed == ["c0", "c2"]


def test_a_clip_that_is_not_reached_and_a_reader_without_a_bias() -> None:
    body = "{ [c0] a = Conv(x, v, b) r = Clip(a, low, top) [c2] y = Conv(r, w%s) }"
    bounds = "float low = {0}, float top = {60}"
    before = f"{HEAD} <{V}, {bounds}, float[1,2,1,1] w = {{3, 5}}> {body % ''}"
    after = before.replace("{20, 1}", "{10, 1}").replace("Conv(r, w)", "Conv(r, w, d)")
    assert_rewrites(
        step(before), before=before, after=after.replace("> {", ", float[1] d = {30}> {")
    )


def test_a_depthwise_layer_and_one_of_several_taps() -> None:
    head = "g (float[1,1,4,4] x) => (float[1,2,3,3] y, float[1,1,2,2] z)"
    weights = "float[2,1,2,2] k = {1, 2, 3, 4, 5, 6, 7, 8}, float[1,2,3,3] w"
    body = "{ [c0] a = Conv(x, v, b) r = Relu(a) [c2] y = Conv<group = 2>(r, k) [c3] z = Conv(r, w, d) }"
    w = ", ".join(str(i) for i in range(18))
    text = f"{head} <{V}, {weights} = {{{w}}}, float[1] d = {{1}}> {body}"
    model = parse(text)
    outcome = run_pass(step(text, shift=np.array([10.0, 0.5])), model)
    assert outcome.changed == ["c0", "c2", "c3"]
    nodes = {node.name: node for node in model.graph}
    np.testing.assert_allclose(nodes["c2"].inputs[2].const_value.numpy(), [100, 13])  # type: ignore[union-attr]
    np.testing.assert_allclose(nodes["c3"].inputs[2].const_value.numpy(), [1 + 360 + 58.5])  # type: ignore[union-attr]


def test_through_the_average_to_a_gemm() -> None:
    head = "g (float[1,1,2,2] x) => (float[1,3] y)"
    body = "{ [c0] a = Conv(x, v, b) r = Relu(a) p = GlobalAveragePool(r) f = Flatten(p) [fc] y = Gemm<transB = 1, alpha = 2.0>(f, w, d) }"
    rest = "float[3,2] w = {1, 2, 3, 4, 5, 6}, float[3] d = {%s}"
    before = f"{head} <{V}, {rest % '1, 1, 1'}> {body}"
    after = f"{head} <{V.replace('20', '10')}, {rest % '21, 61, 101'}> {body}"
    outcome = assert_rewrites(step(before), before=before, after=after)
    assert outcome.rescaled == {"a", "r", "p", "f"}


def test_between_two_gemms() -> None:
    head = "g (float[2,2] x) => (float[2,2] y)"
    body = "{ [f0] a = Gemm(x, v, b) r = Relu(a) [f2] y = Gemm(r, w, d) }"
    rest = "float[2,2] v = {0.5, 0, 0, 0.5}, float[2,2] w = {1, 2, 3, 4}"
    before = f"{head} <{rest}, float[2] b = {{20, 1}}, float[2] d = {{0, 0}}> {body}"
    after = f"{head} <{rest}, float[2] b = {{10, 1}}, float[2] d = {{10, 20}}> {body}"
    assert_rewrites(step(before), before=before, after=after)


def test_a_value_below_its_shift_is_lost() -> None:
    """What the margin is for: the rewrite is exact only above c."""
    text = f"{HEAD} <{V}, {W}> {BODY}"
    model = parse(text)
    run_pass(step(text), model)
    feed = {"x": np.full((1, 1, 2, 2), -40, np.float32)}  # 20 - 20 = 0 < 10
    assert run(parse(text), feed)[0].max() == 1
    assert run(model, feed)[0].max() == 31
    feed = {"x": np.full((1, 1, 2, 2), -20, np.float32)}
    assert_close(run(model, feed), run(parse(text), feed))


def conv(tail: str, middle: str = "r = Relu(a)", more: str = "") -> str:
    return f"{HEAD} <{V}, {W}{more}> {{ [c0] a = Conv(x, v, b) {middle} {tail} }}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (conv("[c2] y = Conv<pads = [1, 1, 1, 1], kernel_shape = [3, 3]>(r, k, d)", more=f", float[1,2,3,3] k = {{{', '.join(['1'] * 18)}}}"), "c2 pads it with zeros"),
        (conv('[c2] y = Conv<auto_pad = "SAME_UPPER">(r, w, d)'), "c2 pads it with zeros"),
        (conv("[c2] q = Conv(r, w, d) [add] s = Add(r, q) y = ReduceMax<axes = [1], keepdims = 1>(s)"), "Add add reads it"),
        (conv("[c2] y = Conv(r, w, d)", "m = Relu(x) r = Clip(a, low)", ", float low = {-1}"), "not bounded by 0"),
    ],
)  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    assert_refuses(step(text), text, reason)


def test_refusals_of_shifts() -> None:
    text = f"{HEAD} <{V}, {W}> {BODY}"
    assert_refuses(step(text, "nothing"), text, "there is no such group")
    assert_refuses(step(text, shift=np.ones(3)), text, "it has 2 channels, the shift 3")
    assert_refuses(step(text, shift=np.array([1.0, -1.0])), text, "its shift is below 0")


def test_a_bias_that_is_computed_and_an_output_in_between() -> None:
    text = "g (float[1,1,2,2] x, float[2] b) => (float[1,1,2,2] y)" + conv("[c2] y = Conv(r, w, d)")[len(HEAD):]  # fmt: skip
    text = text.replace(", float[2] b = {20, 1}", "")
    assert_refuses(step(text), text, "the bias of Conv c0 is not constant")
    text = conv("[c2] y = Conv(r, w, d)").replace("(float[1,1,2,2] y)", "(float[1,1,2,2] y, float[1,2,2,2] r)")  # fmt: skip
    assert_refuses(step(text), text, "it is an output of the model")


def test_needs_are_the_channels_behind_the_activation() -> None:
    text = f"{HEAD} <{V}, {W}> {BODY}"
    (need,) = step(text).needs(parse(text))
    assert (need.tensor, need.channels) == ("r", True)


def test_a_shared_bias_is_left_to_others() -> None:
    text = (
        f"g (float[1,1,2,2] x) => (float[1,1,2,2] y, float[1,2,2,2] z) <{V}, {W}> "
        "{ [c0] a = Conv(x, v, b) r = Relu(a) [c2] y = Conv(r, w, d) [c3] z = Conv(x, v, b) }"
    )
    model = parse(text)
    assert [group.producer for group in shift_groups(model, facts(text))[0]] == ["c0"]
    run_pass(step(text), model)
    feed = random_feed(model)
    assert_close(run(model, feed), run(parse(text), feed))
