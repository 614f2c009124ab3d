"""Random models through the compiler: each becomes a right model, says that it is inaccurate, or is refused.

A bounded number of fixed examples; `tools/fuzz.py` runs at length.
"""

from __future__ import annotations

from random import Random

import pytest
from fuzz_graphs import draw
from fuzz_judge import WAYS, is_wide, judge
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=10)
@given(random=st.randoms(use_true_random=False))
def test_a_random_model(way: str, random: Random) -> None:
    verdict = judge(draw(random, most=8, wide=is_wide(way)), way)
    assert verdict.kind != "failed", verdict


@settings(max_examples=16)
@given(random=st.randoms(use_true_random=False), way=st.sampled_from(WAYS))
def test_numbers_near_the_ends_of_float32(random: Random, way: str) -> None:
    verdict = judge(draw(random, most=6, extreme=True, wide=is_wide(way)), way)
    assert verdict.kind != "failed", verdict


@pytest.mark.parametrize("way", WAYS)
def test_most_models_are_compiled(way: str) -> None:
    """The grammar and the ways do reach the integer kernels: else the tests above would prove nothing."""
    kinds = [judge(draw(Random(seed), wide=is_wide(way)), way).kind for seed in range(100, 106)]
    assert kinds.count("compiled") >= 2, kinds
    assert "failed" not in kinds
