"""Feature maps that the graph reduced, read at once, against the statistics of their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from statistic import F32, assert_same

from qcompile.calib.fold import fold
from qcompile.calib.histogram import UNIT
from qcompile.calib.maps import Map, Maps, places
from qcompile.calib.stats import TensorStats
from qcompile.step import Need

Array = NDArray[Any]
INF = float("inf")
EVERY = 1 << 30


def need(name: str) -> Need:
    return Need(name, histogram=True, channels=True)


def maps(channels: Sequence[int], floors: Sequence[float], step: int = 1, rank: int = 4) -> Maps:
    items = tuple(
        Map(need(f"t{i}"), (1, c, *[9] * (rank - 2)), (step,) * (rank - 2), floor, 0)
        for i, (c, floor) in enumerate(zip(channels, floors, strict=True))
    )
    return Maps(rank, items, {})


def reduced(group: Maps, values: Sequence[Array]) -> dict[str, Array]:
    """What the graph makes of the maps of one sample."""
    axes = tuple(range(2, group.rank))
    found = {
        "shapes": np.concatenate([np.array(x.shape) for x in values]),
        "peaks": np.concatenate([x.max(axis=axes, keepdims=True) for x in values], axis=1),
        "means": np.concatenate([x.mean(axis=axes, keepdims=True) for x in values], axis=1),
        "grids": np.concatenate(
            [
                x[(slice(None), slice(None), *(slice(None, None, s) for s in m.steps))].reshape(
                    x.shape[0], -1
                )
                for x, m in zip(values, group.maps, strict=True)
            ],
            axis=1,
        ),
    }
    least = [
        x.min(axis=axes, keepdims=True)
        for x, m in zip(values, group.maps, strict=True)
        if m.has_bottoms
    ]
    if least:
        found["bottoms"] = np.concatenate(least, axis=1)
    return found


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(1, 3, shape).astype(F32)


def relu(x: Array) -> Array:
    x = np.maximum(x, F32(0))
    x.reshape(x.shape[0], x.shape[1], -1)[:, :, 0] = 0  # every channel of every sample has one
    return x


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("sides", [[(8, 9)] * 4, [(8, 9), (3, 3), (1, 20), (30, 2)]])
def test_as_if_the_values_had_come_out(n: int, sides: list[tuple[int, int]]) -> None:
    """Of several maps, one behind a Relu, in samples of the same and of different sizes."""
    group = maps([3, 5, 2], [-INF, 0.0, -INF])
    samples = [
        [
            normal(n, 3, *side, seed=i),
            relu(normal(n, 5, *side, seed=i + 50)),
            normal(n, 2, *side, seed=i + 90),
        ]
        for i, side in enumerate(sides)
    ]
    made = group.read([reduced(group, values) for values in samples], EVERY)
    assert made is not None
    wanted = [fold([values[k] for values in samples], need("t"), 1, EVERY) for k in range(3)]
    found = {f"t{k}": stats for k, stats in enumerate(made)}
    assert_same(found, {f"t{k}": s for k, s in enumerate(wanted) if s is not None}, rtol=1e-4)
    for ours, theirs in zip(made, wanted, strict=True):
        assert ours.channels is not None
        assert theirs is not None
        assert theirs.channels is not None
        np.testing.assert_array_equal(ours.channels.lows, theirs.channels.lows)
        assert ours.channels.count == ours.channels.square_count == theirs.channels.count


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_samples_together_are_those_one_by_one(sizes: list[tuple[int, int]], seed: int) -> None:
    group = maps([4, 2], [-INF, 0.0])
    samples = [
        reduced(group, [normal(1, 4, a, b, seed=seed + i), relu(normal(1, 2, b, a, seed=seed + i))])
        for i, (a, b) in enumerate(sizes)
    ]
    together, apart = group.read(samples, 64), [TensorStats(), TensorStats()]
    for sample in samples:
        one = group.read([sample], 64)
        assert one is not None
        for mine, theirs in zip(apart, one, strict=True):
            mine.add(theirs)
    assert together is not None
    assert_same(dict(enumerate(together)), dict(enumerate(apart)), rtol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_a_grid_stands_for_all_places(rank: int) -> None:
    side = {3: 900, 4: 33, 5: 11}[rank]
    group = maps([8], [-INF], step=3, rank=rank)
    x = normal(6, 8, *[side] * (rank - 2))
    made = group.read([reduced(group, [part]) for part in np.split(x, 6)], EVERY)
    assert made is not None
    (stats,) = made
    assert stats.histogram is not None
    assert stats.channels is not None
    assert stats.histogram.total == pytest.approx(UNIT * x.size, rel=0.005)
    grid = x[(slice(None), slice(None), *[slice(None, None, 3)] * (rank - 2))]
    axes = tuple(i for i in range(rank) if i != 1)
    assert stats.channels.square_count == grid.size // 8
    np.testing.assert_allclose(stats.channels.squares, np.square(grid).sum(axis=axes), rtol=1e-5)
    np.testing.assert_allclose(stats.channels.mean(), x.mean(axis=axes), rtol=1e-4)
    assert stats.histogram.bins().quantile(0.5) == pytest.approx(np.median(x), abs=0.15)
    assert (stats.low, stats.high) == (x.min(), x.max())
    assert stats.histogram.bins().high[-1] >= x.max()  # counted, on the grid or not


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_and_infinities_are_not_told(wrong: float, where: int) -> None:
    group = maps([3, 3], [-INF, 0.0])
    values = [normal(1, 3, 4, 4), relu(normal(1, 3, 4, 4))]
    values[where][0, 1, 2, 2] = wrong
    with np.errstate(invalid="ignore"):
        sample = reduced(group, values)
    assert group.read([sample], 64) is None
    good = reduced(group, [normal(1, 3, 4, 4), relu(normal(1, 3, 4, 4))])
    assert group.read([good, sample, good], 64) is None


@pytest.mark.parametrize("shape", [(1, 3, 0, 9), (0, 3, 9, 9)])
def test_empty(shape: tuple[int, ...]) -> None:
    group = maps([3], [0.0], step=3)
    sample = {
        "shapes": np.array(shape), "grids": np.zeros((shape[0], 0), F32),
        "peaks": np.zeros((shape[0], 3, 1, 1), F32), "means": np.zeros((shape[0], 3, 1, 1), F32),
    }  # fmt: skip
    assert group.read([sample], 64) is None


def test_only_what_is_needed() -> None:
    items = [
        Map(Need("a"), (1, 2, 3, 3), (1, 1), 0.0, 0),
        Map(Need("b", histogram=True), (1, 2, 3, 3), (1, 1), -INF, 0),
    ]
    group = Maps(4, tuple(items), {})
    made = group.read([reduced(group, [relu(normal(1, 2, 3, 3)), normal(1, 2, 3, 3)])], 64)
    assert made is not None
    assert [(s.histogram is None, s.channels is None) for s in made] == [
        (True, True),
        (False, True),
    ]


@given(st.integers(0, 500), st.integers(1, 99))
def test_places(side: int, step: int) -> None:
    assert places(side, step) == len(range(0, side, step))


def test_without_an_output_shapes_are_those_known() -> None:
    group = maps([3, 2], [0.0, -INF])
    values = [relu(normal(1, 3, 9, 9)), normal(1, 2, 9, 9)]
    sample = reduced(group, values)
    told = group.read([sample], EVERY)
    del sample["shapes"]
    known = group.read([sample], EVERY)
    assert told is not None
    assert known is not None
    assert_same(dict(enumerate(known)), dict(enumerate(told)))  # type: ignore[arg-type]
