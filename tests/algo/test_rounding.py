"""Rounding by reconstruction, against slow searches and against the nearest codes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qcompile.algo.rounding import batched, coordinate_descent, error, nearest, sequential

Array = NDArray[Any]


def layer(
    seed: int, rows: int = 6, depth: int = 24, samples: int = 400
) -> tuple[Array, Array, Array]:
    """Weights (O, K), their scales (O,), and H of correlated inputs."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, depth)).astype(np.float32)
    mix = rng.standard_normal((depth, depth)) * (rng.random(depth) ** 2)[:, None]
    x = rng.standard_normal((samples, depth)) @ mix
    return w, (np.abs(w).max(axis=1) / 7).astype(np.float32), x.T @ x / samples


def slow_descent(
    w: Array, scale: Array, H: Array, qmin: int, qmax: int, iterations: int, start: Array
) -> Array:
    """The same with the error of each single move written out."""
    codes = start.astype(np.int64).copy()
    order = np.argsort(-np.diag(H), kind="stable")
    for _ in range(iterations):
        for row, k in itertools.product(range(len(w)), order):
            own = H[k, k]
            off = w[row].astype(np.float64) / scale[row] - codes[row]
            if own > 0:
                codes[row, k] = np.clip(codes[row, k] + np.rint(off @ H[:, k] / own), qmin, qmax)
    return codes


def slow_sequential(w: Array, scale: Array, H: Array, qmin: int, qmax: int) -> Array:
    """One coordinate after the other, all later ones free: their best real values by least squares."""
    codes = np.zeros(w.shape, np.int64)
    order = np.argsort(-np.diag(H), kind="stable")
    firm = H + 1e-6 * np.diag(H).max() * np.eye(len(H))
    for row in range(len(w)):
        wish = w[row].astype(np.float64) / scale[row]
        done: list[int] = []
        for place, k in enumerate(order):
            rest = order[place:]
            off = wish[done] - codes[row, done]
            # e_rest = -H_rest,rest^-1 H_rest,done e_done makes the error least
            free = -np.linalg.solve(firm[np.ix_(rest, rest)], firm[np.ix_(rest, done)] @ off)
            codes[row, k] = np.clip(np.rint(wish[k] - free[0]), qmin, qmax)
            done.append(int(k))
    return codes


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_descent_is_that_of_single_moves(seed: int, rows: int, depth: int) -> None:
    w, scale, H = layer(seed, rows, depth)
    start = nearest(w, scale, -7, 7)
    found = coordinate_descent(w, scale, H, -7, 7, 3)
    slow = slow_descent(w, scale, H, -7, 7, 3, start)
    # a tie of rounding may fall either way: errors agree even where codes do not
    np.testing.assert_allclose(
        error(w, found, scale, H), error(w, slow, scale, H), rtol=1e-6, atol=1e-9
    )


@given(st.integers(0, 10_000), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_sequential_leaves_the_rest_to_later_coordinates(seed: int, depth: int) -> None:
    w, scale, H = layer(seed, 3, depth)
    found = sequential(w[None], scale[None], H[None], -7, 7)[0]
    slow = slow_sequential(w, scale, H, -7, 7)
    near = nearest(w, scale, -7, 7)
    better = np.minimum(error(w, slow, scale, H), error(w, near, scale, H))
    np.testing.assert_allclose(error(w, found, scale, H), better, rtol=1e-6, atol=1e-9)


@given(st.integers(0, 10_000), st.sampled_from([1, 5, 40, 70, 130]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_no_row_is_worse_than_its_start(seed: int, depth: int, narrow: bool) -> None:
    """Narrow: codes saturate, which moves have to respect."""
    w, scale, H = layer(seed, 4, depth, samples=depth)  # H may be singular
    scale = scale / np.float32(2) if narrow else scale
    start = nearest(w, scale, -7, 7)
    first = sequential(w[None], scale[None], H[None], -7, 7)
    last = batched(w[None], scale[None], H[None], -7, 7, start=first)
    near, ahead, best = (error(w, c, scale, H) for c in (start, first[0], last[0]))
    slack = 1e-9 * near.max()
    assert np.all(ahead <= near + slack)
    assert np.all(best <= ahead + slack)
    assert last.min() >= -7
    assert last.max() <= 7


def test_what_is_saved_on_correlated_inputs() -> None:
    """On inputs that were not seen, not only in H."""
    rng = np.random.default_rng(5)
    w = rng.standard_normal((16, 96)).astype(np.float32)
    mix = rng.standard_normal((12, 96))
    x, other = (
        rng.standard_normal((n, 12)) @ mix + 0.1 * rng.standard_normal((n, 96)) for n in (2000, 500)
    )
    scale = np.abs(w).max(axis=1) / 7
    H = x.T @ x / len(x) + 0.01 * np.eye(96)
    first = sequential(w[None], scale[None], H[None], -7, 7)
    codes = batched(w[None], scale[None], H[None], -7, 7, start=first)[0]
    judge = other.T @ other / len(other)
    before = error(w, nearest(w, scale, -7, 7), scale, judge).sum()
    after = error(w, codes, scale, judge).sum()
    assert after < 0.2 * before


def test_the_best_of_all_codes_is_nearly_reached() -> None:
    """Against every combination of up and down, for a row of 8."""
    gaps = []
    for seed in range(10):
        w, scale, H = layer(seed, 1, 8)
        low = np.floor(w[0] / scale[0])
        every = low + np.array(list(itertools.product((0, 1), repeat=8)))
        best = min(error(w, row[None], scale, H)[0] for row in every)
        first = sequential(w[None], scale[None], H[None], -8, 8)
        ours = error(w, batched(w[None], scale[None], H[None], -8, 8, start=first)[0], scale, H)[0]
        near = error(w, nearest(w, scale, -8, 8), scale, H)[0]
        gaps.append((near - ours) / max(near - best, 1e-12) if near > 1.01 * best else 1.0)
    assert np.mean(gaps) > 0.7


def test_uncorrelated_inputs_leave_the_nearest_codes() -> None:
    w, scale, _ = layer(3)
    H = np.diag(np.linspace(1, 2, w.shape[1]))
    np.testing.assert_array_equal(coordinate_descent(w, scale, H, -7, 7), nearest(w, scale, -7, 7))


def test_inputs_that_are_always_zero_keep_their_codes() -> None:
    w, scale, H = layer(4)
    H[:, 3] = H[3] = 0
    start = nearest(w, scale, -7, 7)
    start[:, 3] = 5
    assert np.all(coordinate_descent(w, scale, H, -7, 7, start=start)[:, 3] == 5)


def test_groups_are_worked_on_alike_at_once_and_alone() -> None:
    parts = [layer(seed, 2, 9) for seed in range(5)]
    w, scale, H = (np.stack(p) for p in zip(*parts, strict=True))
    together = batched(w, scale, H, -7, 7)
    for i in range(5):
        np.testing.assert_array_equal(together[i], coordinate_descent(w[i], scale[i], H[i], -7, 7))


@pytest.mark.parametrize("power", [1e-30, 1e30])
def test_the_size_of_the_data_does_not_matter(power: float) -> None:
    w, scale, H = layer(6)
    usual = coordinate_descent(w, scale, H, -7, 7)
    scaled = coordinate_descent(w, scale, H * power, -7, 7)
    np.testing.assert_allclose(error(w, scaled, scale, H), error(w, usual, scale, H), rtol=1e-6)
