from __future__ import annotations

import numpy as np
from rewrites import assert_refuses, assert_rewrites, parse, random_feed

from passes.scale_channels import ScaleChannels
from qcompile.run.probe import Fact, probe
from qcompile.solve.channels import channel_groups

HEAD = "g (float[1,1,2,2] x) => (float[1,1,2,2] y)"
V = "float[2,1,1,1] v = {2, 4}, float[2] b = {2, 8}, float[1,2,1,1] w = {3, 5}"
BODY = "{ [c0] a = Conv(x, v, b) r = Relu(a) [c3] y = Conv(r, w) }"
S = np.array([2.0, 4.0])


def facts(text: str) -> dict[str, Fact]:
    model = parse(text)
    return dict(probe(model, random_feed(model)))


def step(text: str, name: str = "a", scale: np.ndarray = S) -> ScaleChannels:
    return ScaleChannels(facts(text), {name: scale})


def test_between_two_convolutions() -> None:
    before = f"{HEAD} <{V}> {BODY}"
    outcome = assert_rewrites(
        step(before),
        before=before,
        after=f"{HEAD} <float[2,1,1,1] v = {{1, 1}}, float[2] b = {{1, 2}}, float[1,2,1,1] w = {{6, 20}}> {BODY}",
    )
    assert outcome.rescaled == {"a", "r"}


def test_into_a_depthwise_convolution() -> None:
    body = "{ [c0] a = Conv(x, v) r = Relu(a) [c2] d = Conv<group = 2>(r, k) [c3] y = Conv(d, w) }"
    before = f"{HEAD} <float[2,1,1,1] v = {{2, 4}}, float[2,1,1,1] k = {{1, 1}}, float[1,2,1,1] w = {{3, 5}}> {body}"
    assert_rewrites(
        step(before),
        before=before,
        after=f"{HEAD} <float[2,1,1,1] v = {{1, 1}}, float[2,1,1,1] k = {{2, 4}}, float[1,2,1,1] w = {{3, 5}}> {body}",
    )


def test_a_sum_ties_its_operands() -> None:
    text = f"{HEAD} <{V}, float[2,1,1,1] u = {{1, 2}}> {{ [c0] a = Conv(x, v, b) [c1] c = Conv(x, u) s = Add(a, c) [c3] y = Conv(s, w) }}"
    groups, _ = channel_groups(parse(text), facts(text))
    assert [set(group.tensors) for group in groups] == [{"a", "c", "s"}]


def test_a_weight_that_others_read_is_not_stored_twice() -> None:
    text = f"{HEAD} <{V}> {{ [c0] a = Conv(x, v, b) [c1] c = Conv(x, v) r = Relu(a) [c3] d = Conv(r, w) [c4] e = Conv(c, w) y = Add(d, e) }}"
    groups, refused = channel_groups(parse(text), facts(text))
    assert groups == []
    assert refused["a"] == "a Conv makes it whose weight others read"


def test_refusals() -> None:
    text = f"{HEAD} <{V}> {{ [c0] a = Conv(x, v, b) r = Sigmoid(a) [c3] y = Conv(r, w) }}"
    assert_refuses(step(text), text, "Sigmoid reads it")
    text = f"{HEAD} <{V}> {BODY}"
    assert_refuses(step(text, "nothing"), text, "there is no such group")
    assert_refuses(step(text, scale=np.ones(3)), text, "it has 2 channels, the scale 3")
    assert_refuses(step(text, scale=np.array([1.0, -1.0])), text, "its scale is not positive")
    text = f"{HEAD} <{V}, float low = {{0}}, float high = {{6}}> {{ [c0] a = Conv(x, v, b) r = Clip(a, low, high) [c3] y = Conv(r, w) }}"
    assert_refuses(step(text), text, "a Clip would saturate earlier")
