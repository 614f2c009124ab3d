"""Every regression case through every recipe: a right answer, or a sentence that says what is in the way."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from regressions import control_flow, names, operators, types_and_values
from regressions.case import Case, Truth
from regressions.recipes import FRESH, RECIPES, assert_answered, small_models_pay

CASES = {
    name: make
    for file in (names, operators, control_flow, types_and_values)
    for name, make in file.case.makers.items()
}


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
