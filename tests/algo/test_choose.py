from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from block_weights import any_scheme, any_weights, inputs, moment, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.algo.blocks import error
from qcompile.algo.choose import PLAIN, QUICK, SECOND, Factors, solve_blocks
from qcompile.algo.rtn import rtn
from qcompile.errors import DataError, ModelError, RecipeError

SCHEME: dict[str, Any] = {"bits": 4, "block": 16, "symmetric": True}


def test_without_data_weights_judge() -> None:
    W = weights(0, 16, 64)
    made, tally = solve_blocks(W, **SCHEME)
    assert [name for name, _ in tally.tried] == list(PLAIN)
    assert tally.error == pytest.approx(error(W, made))
    assert tally.rtn == pytest.approx(error(W, rtn(W, **SCHEME)))
    assert tally.error < 0.95 * tally.rtn


def test_held_out_data_judges() -> None:
    W, H, other = weights(0, 16, 64), moment(inputs(0, 2000, 64)), moment(inputs(1, 2000, 64))
    made, tally = solve_blocks(W, H=H, held_out_H=other, algorithm="all", **SCHEME)
    assert [name for name, _ in tally.tried] == [*PLAIN, *SECOND]
    assert tally.error == pytest.approx(error(W, made, other))
    assert tally.algorithm in SECOND
    assert tally.error < 0.5 * tally.rtn
    ratios = dict(tally.tried)
    assert ratios["rtn"] == 1
    assert ratios[tally.algorithm] == min(ratios.values())
    assert ratios[tally.algorithm] == pytest.approx(tally.error / tally.rtn)


def test_what_fits_the_data_alone_is_not_chosen() -> None:
    """Few rows whose inputs do not correlate: GPTQ makes other data worse than rounding to nearest."""
    rng = np.random.default_rng(0)
    H, other = (moment(rng.normal(size=(n, 96))) for n in (110, 5000))
    W = weights(0, 24, 96)
    blind = dict(solve_blocks(W, H=H, **SCHEME)[1].tried)
    _, tally = solve_blocks(W, H=H, held_out_H=other, **SCHEME)
    ratios = dict(tally.tried)
    assert blind["gptq"] < 0.9
    assert ratios["gptq"] > 1
    assert tally.algorithm in PLAIN


def test_the_diagonal_is_enough_for_plain_algorithms() -> None:
    W, power = weights(0, 16, 64), np.random.default_rng(0).uniform(0, 9, 64)
    made, tally = solve_blocks(W, H=power, **SCHEME)
    assert [name for name, _ in tally.tried] == list(PLAIN)
    assert tally.error == pytest.approx(error(W, made, power))
    whole = solve_blocks(W, H=np.diag(power), algorithm=tally.algorithm, **SCHEME)[1]
    assert whole.error == pytest.approx(tally.error)


@pytest.mark.parametrize("algorithm", [*PLAIN, *SECOND])
def test_one_algorithm_is_compared_with_nearest(algorithm: str) -> None:
    W, H = weights(0, 16, 64), moment(inputs(0, 500, 64))
    made, tally = solve_blocks(W, H=H, algorithm=algorithm, **SCHEME)
    assert [name for name, _ in tally.tried] == list(dict.fromkeys(["rtn", algorithm]))
    assert tally.algorithm == (algorithm if dict(tally.tried)[algorithm] < 1 else "rtn")
    all_of_them = dict(solve_blocks(W, H=H, algorithm="all", **SCHEME)[1].tried)
    assert dict(tally.tried)[algorithm] == pytest.approx(all_of_them[algorithm])
    assert made.block == 16


def test_auto_tries_few() -> None:
    W, H = weights(0, 16, 64), moment(inputs(0, 500, 64))
    assert [name for name, _ in solve_blocks(W, H=H, **SCHEME)[1].tried] == list(QUICK[:2])
    assert [name for name, _ in solve_blocks(W, **SCHEME)[1].tried] == list(PLAIN)
    fine = {**SCHEME, "bits": 8}
    assert [name for name, _ in solve_blocks(W, H=H, **fine)[1].tried] == ["rtn", "search"]


def test_search_is_tried_where_some_rows_are_better() -> None:
    """Moments of few rows mislead GPTQ; a search of scales by their diagonal, less."""
    W, x = weights(0, 200, 64), np.random.default_rng(0).normal(size=(40, 64))
    H, other = moment(x), np.eye(64)
    made, tally = solve_blocks(W, H=H, held_out_H=other, **SCHEME)
    assert [name for name, _ in tally.tried] == list(QUICK)
    assert tally.algorithm == "search"
    alone = solve_blocks(W, H=H, held_out_H=other, algorithm="search", **SCHEME)[0]
    np.testing.assert_array_equal(made.codes, alone.codes)


def test_factors_are_made_once() -> None:
    H = moment(inputs(0, 500, 64))
    factors = Factors(H)
    assert factors.get(order=True) is factors.get(order=True)
    assert factors.get(order=True) is not factors.get(order=False)
    for seed in (0, 1):
        W = weights(seed, 8, 64)
        shared, alone = (solve_blocks(W, H=h, **SCHEME) for h in (factors, H))
        assert shared[1] == alone[1]
        np.testing.assert_array_equal(shared[0].codes, alone[0].codes)


@settings(max_examples=30)
@given(any_weights(), any_scheme(), st.integers(0, 99), st.booleans())
def test_never_worse_than_nearest(
    W: np.ndarray, scheme: dict[str, Any], seed: int, correlate: bool
) -> None:
    k = W.shape[1]
    H, other = (moment(inputs(s, 9, k)) for s in (seed, seed + 100))
    made, tally = solve_blocks(
        W, H=H if correlate else None, held_out_H=other if correlate else None, **scheme
    )
    plain = rtn(W, **scheme)
    judge = other if correlate else None
    assert error(W, made, judge) <= error(W, plain, judge) * (1 + 1e-9)
    assert all(ratio >= 0 for _, ratio in tally.tried)


def test_inputs_that_are_always_zero_judge_nothing() -> None:
    W = weights(0, 8, 32)
    _, tally = solve_blocks(W, H=np.zeros((32, 32)), **SCHEME)
    assert tally.error < tally.rtn


def test_exact_weights_keep_nearest() -> None:
    W = np.full((2, 8), -0.5, np.float32)
    made, tally = solve_blocks(W, **SCHEME)
    assert tally.algorithm == "rtn"
    assert dict(tally.tried) == dict.fromkeys(PLAIN, 1.0)
    np.testing.assert_array_equal(made.dequantize(), W)


def test_refusals() -> None:
    W = weights(0, 2, 8)
    with pytest.raises(RecipeError, match=r"'gtpq' is no algorithm .* Did you mean 'gptq'"):
        solve_blocks(W, algorithm="gtpq", **SCHEME)
    for H in (None, np.ones(8)):
        with pytest.raises(RecipeError, match="'gptq' needs the second moment"):
            solve_blocks(W, algorithm="gptq", H=H, **SCHEME)
    with pytest.raises(DataError, match="not symmetric"):
        solve_blocks(W, H=np.triu(np.ones((8, 8))), **SCHEME)
    with pytest.raises(ValueError, match="H is"):
        solve_blocks(W, held_out_H=np.ones(7), **SCHEME)
    with pytest.raises(ModelError, match="nan"):
        solve_blocks(W * np.nan, **SCHEME)
