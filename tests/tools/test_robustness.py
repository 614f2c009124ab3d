"""The table of robustness: every case is in it, and what it says of qcompile is what the cases claim."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import robustness
from regressions.all_cases import CASES
from regressions.recipes import RECIPES, small_models_pay

PAGE = Path(__file__).parents[2] / "docs" / "robustness.md"


@pytest.fixture
def _small_models_pay() -> Iterator[None]:
    with small_models_pay():
        yield


def test_the_page_has_every_case_and_no_failure_of_ours() -> None:
    lines = PAGE.read_text("utf-8").partition("## Cases")[2].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == list(CASES), "run tools/robustness.py -o docs/robustness.md"
    ours = {cell.split()[0] for row in rows for cell in row[-len(RECIPES) :]}
    assert ours == {"right", "nothing", "refused"}


@pytest.mark.usefixtures("_small_models_pay")
@pytest.mark.parametrize(
    ("name", "static", "int4"),
    [
        ("N12 an output that a Relu reads", "right 1", "nothing"),
        ("T09 NaN in a matrix", "refused", "refused"),
    ],
)
def test_a_row(name: str, static: str, int4: str) -> None:
    peers, ours = robustness.row(name)
    assert str(ours["static qdq"]).startswith(static.split(maxsplit=1)[0])
    assert ours["int4"].word == int4
    assert set(peers) == set(robustness.PEERS)
    page = robustness.document({name: (peers, ours)})
    assert re.search(rf"\| {name} \|.*\| {ours['int8']} \|", page)
    assert f"* {name}\n    * " in page  # with its reasons


def test_models_that_only_look_right_are_told_apart() -> None:
    """A file in which nothing is quantized, one that computes something else, and one that ORT does not load."""
    case = CASES["N12 an output that a Relu reads"]()
    truth = robustness.Truth(case, 2)
    assert robustness._judged(truth, case.model, 25).word == "right"
    other = type(case.model).FromString(case.model.SerializeToString())
    other.graph.node[1].op_type = "Abs"
    assert str(robustness._judged(truth, other, 25)).startswith("**wrong** ")
    other.graph.node[1].op_type = "Nothing"
    assert robustness._judged(truth, other, 25).word == "invalid"
