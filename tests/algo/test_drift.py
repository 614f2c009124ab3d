"""Weights that make up for what quantized layers before have lost."""

from __future__ import annotations

import numpy as np
import pytest
from block_weights import inputs, weights

from qcompile.algo.choose import Factors, solve_blocks
from qcompile.algo.drift import Behind, Drift, Wanted, aim
from qcompile.errors import DataError


def changed(seed: int, rows: int, depth: int, loss: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Inputs in the float model, and those of the quantized one: the same mixture, of which noise lost a part."""
    x = inputs(seed, rows, depth).astype(np.float64)
    mix = np.random.default_rng(99).normal(size=(depth, depth)) / np.sqrt(depth)
    noise = np.random.default_rng(seed + 50).normal(size=x.shape) * loss * x.std()
    return x, x + loss * x @ mix + noise


def off_by(found: Drift, W: np.ndarray, made: np.ndarray) -> float:
    return Wanted(W, found).error(made)


def drift(x: np.ndarray, z: np.ndarray) -> Drift:
    n, lost = len(x), x - z
    return Drift(z.T @ z / n, lost.T @ z / n, lost.T @ lost / n)


def test_the_error_is_that_of_the_rows() -> None:
    W, V = weights(0, 8, 32), weights(1, 8, 32)
    x, z = changed(0, 500, 32)
    slow = np.square(x @ W.T - z @ V.T).mean()
    assert off_by(drift(x, z), W, V) == pytest.approx(slow, rel=1e-6)


def test_the_aim_is_the_least_squares_solution() -> None:
    W = weights(0, 8, 32)
    x, z = changed(0, 4000, 32)
    made, share = aim(W, drift(x, z))
    slow = np.linalg.lstsq(z, x @ W.T, rcond=None)[0].T
    off = drift(x, z)
    assert share == pytest.approx(1, abs=0.05)
    # the least damping lies between
    assert off_by(off, W, slow) <= off_by(off, W, made) < 1.03 * off_by(off, W, slow)
    assert off_by(off, W, made) < 0.8 * off_by(off, W, W)


def test_the_share_is_the_best_one_for_other_rows() -> None:
    W = weights(0, 8, 64)
    few, other = drift(*changed(0, 90, 64)), drift(*changed(1, 5000, 64))
    made, share = aim(W, few, other)
    assert 0 < share < 1
    off = off_by(other, W, made)
    assert off < 0.9 * off_by(other, W, W)
    assert off < 0.9 * off_by(other, W, aim(W, few)[0])  # which fits few rows
    way = (made - W) / share
    tried = [off_by(other, W, W + s * way) for s in np.linspace(0, 1, 101)]
    assert off <= min(tried) * (1 + 1e-6)


def test_rows_that_contradict_leave_the_weights_alone() -> None:
    W = weights(0, 8, 32)
    x, z = changed(0, 500, 32)
    one, other = drift(x, z), drift(z, 2 * z - x)  # what is missing in one is too much in the other
    made, share = aim(W, one, Drift(other.H, -one.cross, other.off))
    assert share == 0
    np.testing.assert_array_equal(made, W)


def test_without_drift_nothing_changes() -> None:
    W, (x, _) = weights(0, 16, 64), changed(0, 500, 64)
    made, share = aim(W, drift(x, x))
    assert share == 0
    np.testing.assert_array_equal(made, W)
    H = x.T @ x / len(x)
    plain = solve_blocks(W, bits=4, block=16, symmetric=False, H=H)
    ours = solve_blocks(W, bits=4, block=16, symmetric=False, H=H, drift=(drift(x, x),) * 2)
    np.testing.assert_array_equal(plain[0].codes, ours[0].codes)
    assert ours[1].error == pytest.approx(plain[1].error, rel=1e-6)


def test_codes_make_up_for_it_on_held_out_rows() -> None:
    W = weights(0, 32, 64)
    one, other = drift(*changed(0, 3000, 64)), drift(*changed(1, 3000, 64))
    blind = solve_blocks(W, bits=4, block=16, symmetric=False, H=Factors(one.H), held_out_H=other.H)
    made, tally = solve_blocks(W, bits=4, block=16, symmetric=False, H=one.H, drift=(one, other))
    assert tally.share > 0.9
    assert tally.error == pytest.approx(off_by(other, W, made.dequantize()))
    assert tally.error < 0.6 * off_by(other, W, blind[0].dequantize())
    assert tally.error <= tally.rtn


def test_inputs_that_are_always_zero() -> None:
    W = weights(0, 8, 32)
    x, z = changed(0, 500, 32)
    x[:, 3] = z[:, 3] = 0
    made, _ = aim(W, drift(x, z))
    assert np.isfinite(made).all()
    np.testing.assert_array_equal(made[:, 3], W[:, 3])
    made, share = aim(W, drift(0 * x, 0 * z))
    assert share == 0


def test_nan_is_refused() -> None:
    x, z = changed(0, 100, 32)
    z[0, 0] = np.nan
    with pytest.raises(DataError, match="calibrate again"):
        aim(weights(0, 8, 32), drift(x, z))


def test_sums_that_are_nearly_definite_are_damped_more() -> None:
    """Sums in float32 of inputs that depend on each other leave negative eigenvalues, larger than the least damping."""
    W, (x, z) = weights(0, 8, 32), changed(0, 100, 32)
    z[:, 1] = z[:, 0]
    whole = drift(x, z)
    off = whole.H.copy()
    off[0, 1] = off[1, 0] = off[0, 0] * 1.05
    made, share = aim(W, Drift(off, whole.cross, whole.off))
    assert np.isfinite(made).all()
    assert share > 0


def test_what_is_no_second_moment_is_refused() -> None:
    x, z = changed(0, 100, 32)
    whole = drift(x, z)
    with pytest.raises(DataError, match="not positive semidefinite: calibrate again"):
        aim(weights(0, 8, 32), Drift(whole.H - 40 * np.ones((32, 32)) * whole.H.max(), whole.cross))


def test_damping_and_share_hardly_depend_on_the_rows_that_choose_it() -> None:
    """The damping is chosen by some rows of many; all rows at once are as good."""
    W, few, other = weights(0, 400, 64), drift(*changed(0, 90, 64)), drift(*changed(1, 5000, 64))
    made, _ = aim(W, few, other)
    slow = []
    for damp in (0.001, 0.01, 0.1):
        firm = few.H + damp * np.eye(64) * np.diag(few.H).mean()
        way = np.linalg.solve(firm, (W @ few.cross).T).T
        slow += [off_by(other, W, W + s * way) for s in np.linspace(0, 1, 51)]
    assert off_by(other, W, made) <= min(slow) * 1.001


def test_errors_need_all_moments() -> None:
    x, z = changed(0, 100, 32)
    whole = drift(x, z)
    with pytest.raises(ValueError, match="second moment of x - z"):
        off_by(Drift(whole.H, whole.cross), weights(0, 8, 32), weights(0, 8, 32))


def stream(seed: int, x: np.ndarray, z: np.ndarray, outputs: int) -> tuple[Drift, np.ndarray]:
    """The drift, and d of rows: a part of it depends on z, the rest is noise."""
    n, lost = len(x), x - z
    mix = np.random.default_rng(7).normal(size=(z.shape[1], outputs)) / np.sqrt(z.shape[1])
    d = 0.6 * z @ mix + 0.3 * np.random.default_rng(seed).normal(size=(n, outputs))
    behind = Behind(d.T @ z / n, d.T @ lost / n, float(np.vdot(d, d)) / n)
    return Drift(z.T @ z / n, lost.T @ z / n, lost.T @ lost / n, behind), d


def test_the_error_counts_what_the_value_lacks_that_the_output_is_added_to() -> None:
    W, V = weights(0, 8, 32), weights(1, 8, 32)
    x, z = changed(0, 500, 32)
    found, d = stream(0, x, z, 8)
    slow = np.square(x @ W.T + d - z @ V.T).mean()
    assert off_by(found, W, V) == pytest.approx(slow, rel=1e-6)
    assert off_by(found, W, V) != pytest.approx(off_by(drift(x, z), W, V), rel=1e-3)


def test_the_aim_makes_up_for_the_stream_on_other_rows() -> None:
    W = weights(0, 8, 32)
    one, d = stream(0, *changed(0, 4000, 32), 8)
    other, _ = stream(1, *changed(1, 4000, 32), 8)
    x, z = changed(0, 4000, 32)
    made, share = aim(W, one, other)
    slow = np.linalg.lstsq(z, x @ W.T + d, rcond=None)[0].T
    assert share == pytest.approx(1, abs=0.1)
    assert off_by(one, W, slow) <= off_by(one, W, made) < 1.05 * off_by(one, W, slow)
    blind, _ = aim(W, drift(x, z), drift(*changed(1, 4000, 32)))
    assert off_by(other, W, made) < 0.8 * off_by(other, W, blind)
    quantized, _ = solve_blocks(W, bits=4, block=16, symmetric=False, H=one.H, drift=(one, other))
    assert off_by(other, W, quantized.dequantize()) < off_by(other, W, blind)


def test_a_stream_that_lacks_something_is_enough() -> None:
    W = weights(0, 8, 32)
    _, z = changed(0, 2000, 32)
    found, _ = stream(0, z, z, 8)
    made, share = aim(W, found)
    assert share > 0.9
    assert off_by(found, W, made) < off_by(found, W, W)


def test_errors_need_the_moments_of_the_stream_as_well() -> None:
    x, z = changed(0, 100, 32)
    found, _ = stream(0, x, z, 8)
    assert found.behind is not None
    some = Drift(found.H, found.cross, found.off, Behind(found.behind.cross))
    with pytest.raises(ValueError, match="moment of d"):
        off_by(some, weights(0, 8, 32), weights(0, 8, 32))
