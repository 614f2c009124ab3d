"""Runs every row of a target file in the installed ONNX Runtime.

    PYTHONPATH=. python tools/probe_target.py [TARGET] [--op Conv] [--seconds 0.5] [--no-time]

For each row: a graph of one node is compiled as a plan would, ORT loads it with all optimizations, one of
the row's kernels must be in the optimized graph and read 8-bit codes, and the result must be that of the Q/DQ
form run without optimization (to one code) and near that of the float model. Then the kernel is timed
against the float one, in turns, on one thread; beside it stands what the row's costs say. Exit code 1 if a
row's kernel is missing or wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from probe_cases import cases
from probe_graph import SUBJECT, Array, Case
from probe_table import Prediction, RowResult, borders, fitted, table
from probe_timing import time_pair

from qcompile.build import Solution, build
from qcompile.calib.observe import observe
from qcompile.errors import QcompileError
from qcompile.plan.candidates import Candidate, Facts
from qcompile.plan.make import Request, border_costs, find_candidates, make_plan, node_costs
from qcompile.plan.plan import Form
from qcompile.plan.tensors import coding
from qcompile.prepare import prepare
from qcompile.run.probe import probe
from qcompile.run.session import Options, Session, version
from qcompile.solve.activations import solve_activations
from qcompile.solve.weights import solve_weights
from qcompile.step import Need
from qcompile.targets.schema import OpRow, Target, load_target

LEAST_DB = 25.0  # 8 bits over a normal distribution give 36 to 44 dB, a product of two 30
_FLOAT_OPS = {
    "Conv": {"Conv", "FusedConv"}, "MatMul": {"MatMul", "FusedMatMul", "Gemm"},
    "Gemm": {"Gemm", "FusedGemm"}, "Resize": {"Resize", "Upsample"},
}  # fmt: skip
_ROLES_OF_FLOATS = ("dynamic", "recurrent", "embedding")  # their kernels read and write floats


def probe_rows(
    target: Target, ops: Iterable[str] | None = None, *, seconds: float = 0.0
) -> list[RowResult]:
    """The results of all cases of all rows, of the operators in `ops` only if it is given.

    Times are taken for `seconds` each; 0 takes none.
    """
    wanted = None if ops is None else set(ops)
    rows = [row for row in target.op if wanted is None or row.type in wanted]
    return [result for row in rows for result in probe_row(row, target, seconds=seconds)]


def probe_row(row: OpRow, target: Target, *, seconds: float = 0.0) -> Iterator[RowResult]:
    """The results of the cases of one row."""
    todo = cases(row)
    if not todo:
        yield RowResult(row, "", "tools/probe_cases.py has no graph for this operator")
    for case in todo:
        try:
            yield _probe(case, target, seconds)
        except QcompileError as error:
            yield RowResult(row, case.name, str(error))


def _probe(case: Case, target: Target, seconds: float) -> RowResult:
    model, _ = prepare(case.model.clone())
    facts = probe(model, case.feed)
    found = find_candidates(model, target, facts)
    item = found.get(SUBJECT)
    if not isinstance(item, Candidate):
        return RowResult(case.row, case.name, f"not a candidate: {item}")
    if item.row is not case.row:
        return RowResult(case.row, case.name, "the candidate has another row")
    forms = {
        name: Form.STATIC
        for name, other in found.items()
        if isinstance(other, Candidate) and other.role not in _ROLES_OF_FLOATS
    }
    plan = make_plan(model, target, facts, Request(forms=forms), found)
    codes = coding(model, plan, found)
    stats = observe(
        model,
        {v.name or "": Need(v.name or "") for v in codes.roots},
        lambda: [(0, case.feed)],
        facts,
    )
    params = solve_activations(plan, codes, stats.tensors, "minmax")
    weights = solve_weights(plan, found, params, {}, saturating=target.saturating, search=False)
    solution = Solution(params, weights)
    fused = build(model, plan, solution, target, facts, "fused")
    exact = build(model, plan, solution, target, facts, "qdq")
    steps = [float(params[v.name].scale) if v.name in params else None for v in model.graph.outputs]
    result = _check(case, fused, exact, steps)
    predicted = _predict(
        case, [c for c in found.values() if isinstance(c, Candidate)], facts, target
    )
    times = None
    if seconds and not result.problem:
        float_ops = _FLOAT_OPS.get(case.row.type, {case.row.type})
        times = time_pair(
            case.model, fused, case.feed, float_ops, case.row.kernels, seconds=seconds
        )
    return dataclasses.replace(result, times=times, predicted=predicted)


def _check(
    case: Case, fused: ir.Model, exact: ir.Model, steps: Sequence[float | None]
) -> RowResult:
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        path = Path(folder) / "optimized.onnx"
        ours = Session(fused, Options("all", threads=1, optimized=path)).run(case.feed)
        optimized = ir.load(path)
    kernels = tuple(node.op_type for node in optimized.graph)
    references = Session(exact, Options("off", threads=1)).run(case.feed)
    floats = Session(case.model, Options("basic", threads=1)).run(case.feed)
    off = float("nan")
    if case.row.role != "recurrent":
        off = max(
            float(np.abs(a - b).max()) / (step or 1e-4 * float(np.abs(b).max()))
            for a, b, step in zip(ours, references, steps, strict=True)
        )
    sqnr = min(_sqnr(a, b) for a, b in zip(ours, floats, strict=True))
    result = RowResult(case.row, case.name, "", case.context, kernels, sqnr, off)
    return dataclasses.replace(result, problem=_problem(result, optimized))


def _problem(result: RowResult, optimized: ir.Model) -> str:
    row = result.row
    kernels = [node for node in optimized.graph if node.op_type in row.kernels]
    if not kernels:
        return f"no {row.kernel}, but {' '.join(result.kernels)}"
    if row.role == "same" and not all(_holds_codes(node.inputs[0]) for node in kernels):
        return f"{row.kernel} works on floats"
    if row.role != "recurrent" and not result.codes_off <= 1.01:
        return f"{result.codes_off:.2f} codes off the exact result"
    if not result.sqnr_db >= LEAST_DB:
        return f"only {result.sqnr_db:.1f} dB"
    return ""


def _holds_codes(value: ir.Value | None) -> bool:
    """Whether a value is 8-bit; ORT writes no type beside values that its optimizer made."""
    while value is not None and value.dtype is None:
        node = value.producer()
        if node is None or node.op_type == "DequantizeLinear":
            return False
        if node.op_type.startswith(("QLinear", "Quantize")):
            return True
        value = node.inputs[0]
    return value is not None and value.dtype in (ir.DataType.UINT8, ir.DataType.INT8)


def _sqnr(values: Array, reference: Array) -> float:
    noise = np.square(values - reference, dtype=np.float64).sum()
    power = np.square(reference, dtype=np.float64).sum()
    return float("inf") if noise == 0 else float(10 * np.log10(power / noise))


def _predict(case: Case, items: Sequence[Candidate], facts: Facts, target: Target) -> Prediction:
    subject = next(item for item in items if item.node.name == SUBJECT)
    fact = facts.get(subject.node.outputs[0].name or "")
    source = facts.get(subject.data[0].name or "") if subject.data else None
    outs = float(fact.elements if fact is not None else 0)
    ins = float(source.elements if source is not None else 0)
    kernels = [cost.ns(case.macs, outs, ins) for cost in (case.row.float, case.row.int8)]
    walls = list(kernels)
    if subject.role not in _ROLES_OF_FLOATS:
        for item in items:
            if item is not subject:
                costs = node_costs(item, facts)
                walls = [wall + cost for wall, cost in zip(walls, costs, strict=True)]
        graph = subject.node.graph
        assert graph is not None
        walls[1] += sum(border_costs(value, target, facts)[0] for value in graph.inputs)
        walls[1] += sum(border_costs(value, target, facts)[1] for value in graph.outputs)
    return Prediction(kernels[0], kernels[1], walls[0], walls[1], (case.macs, outs, ins))


# ---- command line ------------------------------------------------------------------------------


def main() -> int:
    """Exit code 1 if a row does not hold."""
    parser = argparse.ArgumentParser(description="Run every row of a target file in ONNX Runtime.")
    parser.add_argument(
        "target", nargs="?", default="auto", help="name or .toml file (default: this machine's)"
    )
    parser.add_argument(
        "--op", action="append", metavar="TYPE", help="only these operators; may be repeated"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="how long to time each case (default: 0.5)"
    )
    parser.add_argument("--no-time", action="store_true", help="check kernels and results only")
    args = parser.parse_args()
    try:
        target = load_target(args.target)
        results = probe_rows(target, args.op, seconds=0.0 if args.no_time else args.seconds)
    except QcompileError as error:
        parser.error(str(error))
    print(f"{target.title}; onnxruntime {version()}; 1 thread; (row): what the target file says")
    print(table(results))
    if not args.no_time:
        print("\nCosts that explain the times above (mac in ps; elem, input in ns):")
        print("\n".join([*fitted(results), *borders(results, target)]))
    bad = [result for result in results if result.problem]
    for result in bad:
        print(f"{result.name} ({result.case}): {result.problem}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
