"""Every row of the x64 targets names a kernel that the installed ORT has, and that computes the right thing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from probe_cases import cases
from probe_table import RowResult, fitted, table
from probe_target import probe_row, probe_rows
from probe_timing import fit, fit_line

from qcompile.errors import RecipeError
from qcompile.targets.schema import Cost, OpRow, detect, load_target


def _here() -> str:
    try:
        return detect().name
    except RecipeError:
        return "no target fits this machine"


X64 = ("ort-cpu-x64-vnni", "ort-cpu-x64-avx2")  # the same rows
TARGET = load_target(_here() if _here() in X64 else X64[0])
needs_x64 = pytest.mark.skipif(
    _here() not in X64, reason=f"the kernels of {TARGET.name} need x86-64, and this is: {_here()}"
)


@needs_x64
@pytest.mark.parametrize("row", TARGET.op, ids=lambda row: f"{row.type}-{row.variant}".rstrip("-"))
def test_the_row_holds(row: OpRow) -> None:
    results = list(probe_row(row, TARGET))
    assert results
    assert [f"{r.case}: {r.problem}" for r in results if r.problem] == []


def test_every_row_of_every_operator_has_a_graph() -> None:
    assert [row.type for row in TARGET.op if not cases(row)] == []


@needs_x64
def test_a_row_with_the_wrong_kernel_is_found_out() -> None:
    row = TARGET.row("Add")
    assert row is not None
    wrong = dataclasses.replace(row, kernel="QLinearSub")
    target = dataclasses.replace(TARGET, op=(wrong,))
    (problem,) = {result.problem for result in probe_rows(target)}
    assert problem.startswith("no QLinearSub, but QuantizeLinear")


def test_a_row_without_a_graph_is_a_problem() -> None:
    row = dataclasses.replace(TARGET.op[0], type="Softplus")
    (result,) = probe_row(row, TARGET)
    assert "no graph" in result.problem


@needs_x64
def test_times_and_predictions_reach_the_table() -> None:
    results = probe_rows(TARGET, ["Sigmoid"], seconds=0.01)
    assert all(
        r.times is not None and r.times.float_ns > 0 and r.times.int8_ns > 0 for r in results
    )
    head, *lines = table(results).splitlines()
    assert len(lines) == len(results)
    assert head.startswith("row")
    assert "QLinearSigmoid" in lines[0]
    (line,) = fitted(results)
    assert line.startswith("Sigmoid")
    assert "elem" in line


def test_a_failure_is_shown_in_the_table() -> None:
    line = table([RowResult(TARGET.op[0], "tiny", "only 3.0 dB")]).splitlines()[1]
    assert "FAILS" in line


def test_fit_finds_the_cost_that_made_the_times() -> None:
    cost = Cost(mac=4.0, elem=0.5)
    rows = [(1e6, 1e3, 0.0), (1e3, 1e6, 0.0), (2e5, 3e5, 0.0)]
    found = fit(Cost(mac=1.0, elem=1.0), rows, [cost.ns(*row) for row in rows])
    assert np.allclose([found.mac, found.elem, found.input], [4.0, 0.5, 0.0])
    assert fit(Cost(), rows, [1.0, 1.0, 1.0]) == Cost()


def test_fit_line_finds_slope_and_start() -> None:
    assert np.allclose(fit_line([(n, 0.1 * n + 2000) for n in (10, 1000, 100000)]), (0.1, 2000))
    assert np.isnan(fit_line([])[0])
