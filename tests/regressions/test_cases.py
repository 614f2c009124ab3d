"""Every regression case through every recipe: a right answer, or a sentence that says what is in the way."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from regressions.all_cases import CASES
from regressions.case import Case, Truth, feeds
from regressions.recipes import FRESH, RECIPES, assert_answered, small_models_pay

from qcompile import QcompileError, compile_model


@pytest.fixture(autouse=True)
def _small_models_pay() -> Iterator[None]:
    with small_models_pay():
        yield


@functools.lru_cache(maxsize=2)  # the recipes of a case follow each other
def opened(name: str) -> tuple[Case, Truth | None]:
    """The case, and what its float model computes, if it is not refused."""
    case = CASES[name]()
    return case, None if "" in case.refused else Truth(case, FRESH)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, recipe: str, tmp_path: Path) -> None:
    case, truth = opened(name)
    assert_answered(case, truth, recipe, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_quantized_caches_want_caches(name: str, tmp_path: Path) -> None:
    """None of these models is a decoder; what is wrong with it otherwise may be said first."""
    case, _ = opened(name)
    words = "no input is joined with new tokens"
    with pytest.raises(QcompileError, match=re.escape(case.refused.get("", words))):
        compile_model(case.model, feeds(case, 2, 0), output=tmp_path / "y.onnx", recipe="kv-cache")
    assert not list(tmp_path.iterdir())
