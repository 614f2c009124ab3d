"""One compilation's working state: everything that the attempts at a result share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qcompile.build import Format, Solution, build
from qcompile.calib.moments import rounding_shift
from qcompile.calib.observe import Want, observe
from qcompile.calib.ranges import HISTOGRAM_METHODS
from qcompile.calib.split import Samples
from qcompile.calib.stats import TensorStats
from qcompile.plan.candidates import Candidate
from qcompile.plan.make import Request, find_candidates, make_plan
from qcompile.plan.plan import Form, Plan
from qcompile.plan.tensors import Coding, coding
from qcompile.progress import Progress
from qcompile.quant.scheme import QParams
from qcompile.recipe import Recipe
from qcompile.run.probe import Fact
from qcompile.run.session import Feed, Options, Session
from qcompile.solve.activations import solve_activations
from qcompile.solve.weights import InputMoments, solve_weights
from qcompile.targets.schema import Target
from qcompile.verify.compare import Comparison, Reference

_SHIFT_SAMPLES = 16


@dataclasses.dataclass
class Attempt:
    """A built model, and what was found out about it."""

    plan: Plan
    method: str
    form: Format
    model: ir.Model
    session: Session
    comparison: Comparison | None = None
    speedup: float = 0.0


class Workshop:
    """The prepared model, its facts and statistics, and how a plan becomes a measured attempt."""

    def __init__(
        self, prepared: ir.Model, target: Target, facts: Mapping[str, Fact], recipe: Recipe,
        samples: Samples | None, reference: Reference, progress: Progress,
    ) -> None:  # fmt: skip
        self.prepared, self.target, self.facts, self.recipe = prepared, target, facts, recipe
        self.samples, self.reference, self.progress = samples, reference, progress
        self.found = find_candidates(prepared, target, facts)
        self.stats: Mapping[str, TensorStats] = {}
        self.methods: tuple[str, ...] = ("minmax",)
        self._shifts: dict[str, Mapping[str, np.ndarray]] = {}
        self._few: list[Feed] | None = None

    def plan(self, request: Request) -> Plan:
        """The cheapest plan within a request."""
        return make_plan(self.prepared, self.target, self.facts, request, self.found)

    def coding(self, plan: Plan) -> Coding:
        """The coded tensors of a plan."""
        return coding(self.prepared, plan, self.found)

    def calibrate(self, plan: Plan) -> None:
        """Statistics of every tensor that the plan, or any with fewer integer nodes, may need.

        Raises:
            DataError: a tensor holds NaN.
        """
        assert self.samples is not None
        ranges = self.recipe.ranges
        self.methods = ("mean", "minmax", "mse") if ranges == "auto" else (ranges,)
        histogram = any(method in HISTOGRAM_METHODS for method in self.methods)
        inputs = self._conv_inputs(plan)
        wanted = {
            value.name or "": Want(histogram, channels=value.name in inputs)
            for value in self.coding(plan).tensors
        }
        wanted |= {name: Want(histogram, channels=True) for name in inputs}
        total = self.samples.calibration_count
        with self.progress.stage("calibrating", total) as step:
            found = observe(
                self.prepared, wanted, self.samples.calibration, self.facts, threads=self.recipe.threads,
                tick=lambda number, passes: step(1, total * passes if number == 0 else None),
            )  # fmt: skip
        self.stats = found.tensors

    def _conv_inputs(self, plan: Plan) -> set[str]:
        names = set()
        for entry in plan.of(Form.STATIC):
            item = self.found[entry.node]
            if isinstance(item, Candidate) and item.role == "conv":
                names.add(item.data[0].name or "")
        return names

    def unusable(self) -> dict[str, str]:
        """Nodes that read or make a tensor whose range is infinite, and why they cannot be static."""
        infinite = {name for name, stats in self.stats.items() if not stats.finite}
        reasons = {}
        for name, item in self.found.items():
            if isinstance(item, Candidate) and item.role not in (
                "dynamic",
                "recurrent",
                "embedding",
            ):
                for value in (*item.data, item.result):
                    if value.name in infinite:
                        reasons[name] = (
                            f"tensor {value.name!r} reaches infinity in the calibration data"
                        )
        return reasons

    def solve(self, plan: Plan, method: str) -> Solution:
        """Scales, zero points, codes and corrected biases."""
        params = solve_activations(plan, self.coding(plan), self.stats, method)
        moments: dict[str, InputMoments] = {}
        if self.recipe.bias_correction and self.samples is not None:
            inputs = [n for n in self._conv_inputs(plan) if self.stats[n].sums is not None]
            shifts = self._shift(method, {n: params[n] for n in sorted(inputs)})
            moments = {n: InputMoments(self.stats[n].mean(), shifts.get(n)) for n in inputs}
        weights = solve_weights(
            plan,
            self.found,
            params,
            moments,
            saturating=self.target.saturating,
            search=self.recipe.weight_search,
        )
        return Solution(params, weights)

    def _shift(self, method: str, params: Mapping[str, QParams]) -> Mapping[str, np.ndarray]:
        if method not in self._shifts:
            assert self.samples is not None
            if self._few is None:
                self._few = self.samples.few(_SHIFT_SAMPLES)
            self._shifts[method] = rounding_shift(
                self.prepared, params, self._few, self.facts, threads=self.recipe.threads
            )
        return self._shifts[method]

    def attempt(
        self, plan: Plan, method: str, form: Format, solution: Solution | None = None
    ) -> Attempt:
        """The plan built and loaded.

        Raises:
            ModelError: ORT refuses the result.
        """
        solution = self.solve(plan, method) if solution is None else solution
        model = build(self.prepared, plan, solution, self.target, self.facts, form)
        return Attempt(
            plan, method, form, model, Session(model, Options("all", threads=self.recipe.threads))
        )

    def judge(self, attempt: Attempt, limit: int | None = None) -> Comparison:
        """The error of an attempt on held-out samples, deployed."""
        attempt.comparison = self.reference.compare(attempt.session, limit)
        return attempt.comparison
