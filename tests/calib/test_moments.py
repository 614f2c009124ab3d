"""What rounding does to channel means, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rewrites import parse

from qcompile.calib.moments import rounding_shift
from qcompile.quant.affine import choose
from qcompile.quant.scheme import QParams, Scheme
from qcompile.run.probe import probe

Feed = dict[str, NDArray[Any]]
U8 = Scheme.parse("uint8.tensor.asym")
NET = parse(
    "g (float[N,3,H,W] x) => (float[N,3] y) { a = Relu(x) b = GlobalAveragePool(a) y = Flatten(b) }"
)


def feeds(count: int, *, ragged: bool = False) -> list[Feed]:
    rng = np.random.default_rng(1)
    return [
        {
            "x": rng.normal(1, 2, (1 + i % 2, 3, 5 + i, 6) if ragged else (2, 3, 5, 6)).astype(
                np.float32
            )
        }
        for i in range(count)
    ]


def values_of(feed: Feed) -> dict[str, NDArray[Any]]:
    a = np.maximum(feed["x"], 0)
    return {"x": feed["x"], "a": a, "y": a.mean(axis=(2, 3))}


def rounded(x: NDArray[Any], params: QParams) -> NDArray[Any]:
    scale, zero = float(params.scale), int(params.zero)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


PARAMS = {"x": choose(-1.0, 2.0, U8), "a": choose(0.0, 0.7, U8), "y": choose(0.0, 3.0, U8)}


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("memory", [1 << 30, 1])
def test_the_median_of_each_samples_mean(count: int, ragged: bool, memory: int) -> None:
    """Over the samples; a range that cuts values shifts the mean down."""
    samples = feeds(count, ragged=ragged)
    found = rounding_shift(NET, PARAMS, samples, probe(NET, samples[0]), memory=memory, threads=1)
    assert set(found) == set(PARAMS)
    for name, shift in found.items():
        rows = []
        for feed in samples:
            x = values_of(feed)[name].astype(np.float64)
            error = (rounded(x, PARAMS[name]) - x).reshape(len(x), 3, -1)
            rows.append(error.mean(axis=(0, 2)))
        np.testing.assert_allclose(shift, np.median(rows, axis=0), atol=2e-5)
        assert shift.dtype == np.float64
    assert (found["a"] < -0.1).all()


def test_one_sample_that_saturates_is_not_typical() -> None:
    samples = feeds(5)
    samples[3]["x"] = samples[3]["x"] * np.float32(100)
    wide = {"x": choose(-8.0, 8.0, U8)}
    found = rounding_shift(NET, wide, samples, {}, threads=1)
    assert (np.abs(found["x"]) < 0.01).all()


def test_empty_samples_and_no_samples() -> None:
    empty = {"x": np.zeros((1, 3, 0, 6), np.float32)}
    assert rounding_shift(NET, {"a": PARAMS["a"]}, [empty], {}, threads=1) == {}
    assert rounding_shift(NET, {"a": PARAMS["a"]}, [], {}, threads=1) == {}
    both = rounding_shift(NET, {"a": PARAMS["a"]}, [empty, *feeds(1)], {}, threads=1)
    alone = rounding_shift(NET, {"a": PARAMS["a"]}, feeds(1), {}, threads=1)
    np.testing.assert_array_equal(both["a"], alone["a"])


def test_generators_are_read_once_whatever_the_groups() -> None:
    samples = feeds(3)
    once = (feed for feed in samples)
    found = rounding_shift(NET, PARAMS, once, probe(NET, samples[0]), memory=1, threads=1)
    again = rounding_shift(NET, PARAMS, samples, {}, threads=1)
    for name in PARAMS:
        np.testing.assert_array_equal(found[name], again[name])
