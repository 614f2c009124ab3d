import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import parse, run

from qcompile.algo.bias_correction import input_shift, weight_shift

Array = npt.NDArray[np.float64]


def slow(error: Array, mean: Array, group: int) -> Array:
    """The same, one product at a time."""
    out, per_group = error.shape[:2]
    result = np.zeros(out)
    for o, i in itertools.product(range(out), range(per_group)):
        channel = o // (out // group) * per_group + i
        result[o] += error[o, i].sum() * mean[channel]
    return result


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([(1, 3, 4), (2, 3, 2), (4, 1, 1), (3, 2, 5), (1, 1, 1)]),
    st.lists(st.integers(1, 3), max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_against_one_product_at_a_time(
    groups: tuple[int, int, int], kernel: list[int], seed: int
) -> None:
    group, per_group, out = groups
    rng = np.random.default_rng(seed)
    error = rng.standard_normal((group * out, per_group, *kernel))
    mean = rng.standard_normal(group * per_group)
    for shift in (weight_shift, input_shift):
        np.testing.assert_allclose(shift(error, mean, group), slow(error, mean, group), atol=1e-12)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_it_is_what_a_convolution_is_off_by_on_average(group: int) -> None:
    """Without padding, on inputs of a given mean, in ORT."""
    rng = np.random.default_rng(group)
    weight = rng.standard_normal((4, 4 // group, 3, 3)).astype(np.float32)
    wrong = (weight + 0.1 * rng.standard_normal(weight.shape)).astype(np.float32)
    x = (rng.standard_normal((8, 4, 12, 12)) + rng.standard_normal((1, 4, 1, 1))).astype(np.float32)
    # A mean over all pixels is that of every tap only if the image repeats beyond its borders.
    x = np.pad(x[:, :, 1:-1, 1:-1], ((0, 0), (0, 0), (1, 1), (1, 1)), mode="wrap")
    model = parse(
        f"g (float[8,4,12,12] x, float[4,{4 // group},3,3] w) => (float[8,4,10,10] y) "
        f"{{ y = Conv<group = {group}>(x, w) }}"
    )
    one, two = (run(model, {"x": x, "w": w})[0] for w in (weight, wrong))
    off = (two.astype(np.float64) - one).mean(axis=(0, 2, 3))
    mean = x[:, :, 1:-1, 1:-1].mean(axis=(0, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(weight_shift(wrong - weight, mean, group), off, atol=2e-5)


def test_no_error_no_shift() -> None:
    assert not weight_shift(np.zeros((4, 2, 3, 3)), np.ones(4), 2).any()
    assert not input_shift(np.ones((4, 2, 3, 3)), np.zeros(4), 2).any()


def test_sums_are_exact_in_float64() -> None:
    error = np.full((1, 1, 1000), np.float32(0.1))
    shift = weight_shift(error, np.ones(1))
    assert shift.dtype == np.float64
    np.testing.assert_allclose(shift, [np.float64(np.float32(0.1)) * 1000], rtol=1e-12)
