"""Shapes of scales, against the obvious loop over elements."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor

SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple)


def group_of(granularity: Granularity, at: tuple[int, ...]) -> tuple[int, ...]:
    """The index of the scale of element `at`, said once more and slowly."""
    match granularity:
        case PerTensor():
            return ()
        case PerAxis(axis):
            return (at[axis],)
        case PerBlock(axis, size):
            return tuple(i // size if d == axis else i for d, i in enumerate(at))


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], Granularity]:
    shape = draw(SHAPES)
    axis = draw(st.integers(0, len(shape) - 1))
    size = draw(st.integers(1, 9))
    choices: list[Granularity] = [PerTensor(), PerAxis(axis), PerBlock(axis, size)]
    return shape, draw(st.sampled_from(choices))


@settings(database=None, deadline=None, derandomize=True)
@given(cases())
def test_spread_gives_each_element_its_scale(case: tuple[tuple[int, ...], Granularity]) -> None:
    shape, granularity = case
    params_shape = granularity.params_shape(shape)
    params = np.arange(np.prod(params_shape, dtype=int)).reshape(params_shape)
    full = np.broadcast_to(granularity.spread(params, shape), shape)
    for at in np.ndindex(shape):
        assert full[at] == params[group_of(granularity, at)]


@settings(database=None, deadline=None, derandomize=True)
@given(cases(), st.sampled_from([np.minimum, np.maximum, np.add]))
def test_reduce_folds_each_group_with_zero(
    case: tuple[tuple[int, ...], Granularity], ufunc: np.ufunc
) -> None:
    shape, granularity = case
    x = np.random.default_rng(0).integers(-9, 9, shape)
    expected = np.zeros(granularity.params_shape(shape), x.dtype)
    for at in np.ndindex(shape):
        group = group_of(granularity, at)
        expected[group] = ufunc(expected[group], x[at])
    np.testing.assert_array_equal(granularity.reduce(ufunc, x), expected, strict=True)


def test_params_index_selects_the_scales_of_a_part() -> None:
    part = (slice(4, 6), slice(8, 13))
    assert PerTensor().params_index(part) == ()
    assert PerAxis(1).params_index(part) == (slice(8, 13),)
    assert PerBlock(1, 4).params_index(part) == (slice(4, 6), slice(2, 4))
    assert PerBlock(0, 2).params_index(part) == (slice(2, 3), slice(8, 13))


@pytest.mark.parametrize("granularity", [PerAxis(2), PerBlock(2, 4)], ids=str)
def test_an_axis_that_the_tensor_lacks_is_named(granularity: Granularity) -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 4\) has no axis 2"):
        granularity.params_shape((3, 4))


def test_what_names_no_axis_or_block_is_refused() -> None:
    with pytest.raises(ValueError, match="axis -1 is negative"):
        PerAxis(-1)
    with pytest.raises(ValueError, match="axis -1 is negative"):
        PerBlock(-1, 32)
    with pytest.raises(ValueError, match="block size 0"):
        PerBlock(0, 0)
