"""Samples of different shapes, folded together and one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from statistic import F32

from qcompile.calib.fold import fold
from qcompile.calib.stats import TensorStats
from qcompile.step import Need

ALL = Need("x", histogram=True, channels=True, gram=True)


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=6
    ),
    st.integers(0, 99),
)
def test_ragged_samples_are_folded_as_one_by_one(
    sizes: list[tuple[int, int, int]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    for axis, shapes in (
        (1, [(n, 5, a, b) for n, a, b in sizes]),
        (-1, [(n, a, 5) for n, a, _ in sizes]),
    ):
        values = [rng.normal(size=shape).astype(F32) for shape in shapes]
        together = fold(values, ALL, axis, 64)
        apart = TensorStats()
        for array in values:
            one = fold([array], ALL, axis, 64)
            assert one is not None
            apart.add(one)
        assert together is not None
        assert (together.count, together.low, together.high) == (apart.count, apart.low, apart.high)
        np.testing.assert_array_equal(together.extremes.lows, apart.extremes.lows)
        assert together.histogram is not None and apart.histogram is not None
        assert together.histogram.total == apart.histogram.total
        assert together.channels is not None and apart.channels is not None
        np.testing.assert_allclose(
            together.channels.sums, apart.channels.sums, rtol=1e-12, atol=1e-9
        )
        np.testing.assert_allclose(together.channels.squares, apart.channels.squares, rtol=1e-12)
        np.testing.assert_array_equal(together.channels.highs, apart.channels.highs)
        np.testing.assert_allclose(together.gram, apart.gram, rtol=1e-12, atol=1e-9)
