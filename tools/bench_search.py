"""Compares the search within limits with the best of all plans, on toy models small enough to try every one.

    python tools/bench_search.py [--groups 9] [--shape apart,chain] [--seeds 2] [--levels 6] [--pooled]

A toy has up to 12 convolutions of different sizes, whose weights and activations have different outliers. Each
of the 2^n sets that stay float is compiled and judged on held-out samples; the time of a plan is what the target's costs
say, so that the table is the same on every machine of a kind. For several limits of SQNR, the answer of
`frontier.within` is set beside the fastest plan that keeps the limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from qcompile import frontier, tune
from qcompile.opened import Opened, open_model
from qcompile.plan.cost import plan_cost
from qcompile.plan.make import Request
from qcompile.plan.plan import Form, Plan
from qcompile.progress import Silent
from qcompile.recipe import Recipe
from qcompile.referee import Referee
from qcompile.run.session import Feed
from qcompile.verify.latency import Timing
from qcompile.verify.metric import Metric
from qcompile.workshop import Attempt, Ranging, Workshop

SIDE = 16
FACTORS = (1.0, 2.0, 5.0, 12.0, 30.0)
CHANNELS = (16, 32, 48, 64)
_FORM = "fused"


def toy(groups: int, *, chain: bool, seed: int = 0, pooled: bool = False) -> onnx.ModelProto:
    """`x (N, 16, 16, 16)` -> so many convolutions c0, c1 ... -> `y (N, channels, 16, 16)`.

    Between them stands Softsign, which has no integer kernel: each is a group of its own; or with `chain` a Relu, so
    that neighbours that are both integer share their codes. Channels, kernels and outliers are drawn.
    With `pooled` the output is scores of the mean over all places, where errors partly cancel: noise does not add up.
    """
    rng = np.random.default_rng([17, seed])
    constants: dict[str, npt.NDArray[np.float32]] = {}
    steps, value, inner = "", "x", 16
    for i in range(groups):
        outer, side = int(rng.choice(CHANNELS)), int(rng.choice((1, 3)))
        weight = rng.normal(size=(outer, inner, side, side)) * 1.6 / np.sqrt(inner * side * side)
        weight[rng.integers(outer)] *= rng.choice(FACTORS)  # a channel that stretches the range
        weight[:, rng.integers(inner), 0, 0] *= rng.choice(FACTORS)  # weights that do
        constants[f"k{i}"] = weight.astype(np.float32)
        pad = side // 2
        between = "Relu" if chain else "Softsign"
        steps += (
            f"[c{i}] a{i} = Conv<pads = [{pad}, {pad}, {pad}, {pad}]>({value}, k{i}) "
            f"[r{i}] r{i} = {between}(a{i}) "
        )
        value, inner = f"r{i}", outer
    kind, last = f"float[N,{inner},{SIDE},{SIDE}]", f"y = Neg({value})"
    if pooled:
        constants["h"] = rng.normal(size=(inner, 10)).astype(np.float32)
        kind = "float[N,10]"
        last = f"p = ReduceMean<axes = [2, 3], keepdims = 0>({value}) y = MatMul(p, h)"
    text = f"toy (float[N,16,{SIDE},{SIDE}] x) => ({kind} y) {{ {steps}{last} }}"
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>\n' + text)
    for name, values in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def images(count: int, seed: int = 0) -> list[Feed]:
    """Samples of a toy's input."""
    rng = np.random.default_rng([18, seed])
    return [{"x": rng.normal(size=(1, 16, SIDE, SIDE)).astype(np.float32)} for _ in range(count)]


class Entry(NamedTuple):
    """A plan that was tried: the nodes that stay float, its time in nanoseconds, and its decibels."""

    floats: tuple[str, ...]
    ns: float
    db: float


class CostReferee(Referee):
    """A referee whose clock is the plan's cost."""

    def __init__(self, bench: Toy, metric: Metric | None = None, **limits: Any) -> None:
        """`limits` are fields of the recipe."""
        recipe = dataclasses.replace(bench.opened.recipe, **limits)
        super().__init__(dataclasses.replace(bench.opened, recipe=recipe), metric)
        self._bench = bench

    def _race(self, attempt: Attempt, _: Feed) -> Timing:
        ns, whole = self._bench.ns(attempt.plan), self._bench.float_ns
        times = {"fp32": whole / 1e6, "result": ns / 1e6}
        return Timing(times, {"fp32": 1.0, "result": whole / ns}, 3)


class Toy:
    """A toy model, opened and calibrated, and its fastest plan."""

    def __init__(
        self, groups: int, *, chain: bool, seed: int = 0, samples: int = 40, pooled: bool = False
    ) -> None:
        recipe = Recipe(threads=1, search_time=1e6, ranges="minmax")
        model = toy(groups, chain=chain, seed=seed, pooled=pooled)
        self.opened: Opened = open_model(model, images(samples, seed), recipe)
        self.shop = Workshop(
            self.opened.prepared, self.opened.target, self.opened.facts, recipe, self.opened.samples,
            self.opened.reference(), Silent(),
        )  # fmt: skip
        self.names = [f"c{i}" for i in range(groups)]
        widest = self.with_floats(())
        self.shop.calibrate(widest)
        calibrated = frozenset(e.node for e in widest.of(Form.STATIC, Form.FREE))
        self.request = dataclasses.replace(self.opened.request(), only=calibrated, dynamic=False)
        self.float_ns = self.ns(self.with_floats(self.names))
        self.draft = self.shop.plan(self.request)

    def with_floats(self, floats: Sequence[str]) -> Plan:
        """The plan with these convolutions float and all others integer."""
        forms = {n: Form.FLOAT if n in floats else Form.STATIC for n in self.names}
        return self.shop.plan(Request(forms=forms, dynamic=False))

    def ns(self, plan: Plan) -> float:
        """Nanoseconds of a plan, by the target's costs."""
        shop = self.shop
        return plan_cost(plan, shop.found, shop.target, shop.facts, Request())

    def attempt(self, plan: Plan) -> Attempt:
        """A plan built as all here are: extremes of the calibration samples, integer operators."""
        return self.shop.attempt(plan, Ranging("minmax"), _FORM)

    def every(self) -> Iterator[Entry]:
        """All plans but the one where nothing is integer."""
        for count in range(len(self.names)):
            for floats in itertools.combinations(self.names, count):
                plan = self.with_floats(floats)
                db = self.shop.judge(self.attempt(plan)).worst_db
                yield Entry(floats, self.ns(plan), db)

    def search(self, referee: Referee) -> tuple[Entry, int]:
        """The answer of the search within a referee's limits, and how many plans it measured."""
        best = self.attempt(self.draft)
        self.shop.judge(best)
        found = tune.sensitivity(self.shop, best.plan, best.ranging)
        noise = None if found is None else found.noise
        frontier.within(self.shop, self.request, best, noise, referee)
        assert referee.best is not None
        plan, point = referee.best.attempt.plan, referee.best.point
        floats = tuple(n for n in self.names if plan[n].form is Form.FLOAT)
        db = math.inf if point.sqnr_db is None else point.sqnr_db
        return Entry(floats, self.ns(plan), db), len(referee.points)


class Row(NamedTuple):
    """A limit of SQNR in decibels, the fastest plan that keeps it, and what the search found with how many plans."""

    limit: float
    best: Entry
    found: Entry
    measured: int

    @property
    def gap(self) -> float:
        """How much slower the search's answer is, as a share; infinite if it breaks the limit."""
        return self.found.ns / self.best.ns - 1 if self.found.db >= self.limit else math.inf


def compared(bench: Toy, entries: Sequence[Entry], levels: int) -> list[Row]:
    """The search at so many limits, between the least and the most decibels of all plans that are faster than float."""
    faster = [e for e in entries if e.ns < bench.float_ns]
    least, most = (f(e.db for e in faster) for f in (min, max))
    rows = []
    for limit in np.linspace(least, most, levels + 2)[1:-1].tolist():
        best = min((e for e in entries if e.db >= limit), key=lambda e: (e.ns, -e.db))
        rows.append(Row(limit, best, *bench.search(CostReferee(bench, min_sqnr=limit))))
    return rows


def show(title: str, bench: Toy, rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        f"### {title}", "",
        "| limit dB | best us | best dB | found us | found dB | slower by | plans measured | float: best / found |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        floats = " / ".join(" ".join(e.floats) or "-" for e in (row.best, row.found))
        lines.append(
            f"| {row.limit:.1f} | {row.best.ns / 1e3:.2f} | {row.best.db:.1f} | {row.found.ns / 1e3:.2f} "
            f"| {row.found.db:.1f} | {row.gap:.2%} | {row.measured} | {floats} |"
        )
    return "\n".join([*lines, "", f"All float: {bench.float_ns / 1e3:.2f} us.", ""])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare the search with the best of all plans.")
    parser.add_argument("--groups", type=int, default=9, choices=range(2, 13), metavar="2..12")
    parser.add_argument("--shape", default="apart,chain", help="of apart, chain")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="toys of a shape")
    parser.add_argument("--levels", type=int, default=6, metavar="N", help="limits for a toy")
    parser.add_argument("--pooled", action="store_true", help="scores of a mean as output")
    return parser.parse_args()


def main() -> None:
    """Prints a table for each toy, and the worst gap."""
    args: Any = arguments()
    worst = 0.0
    for shape in args.shape.split(","):
        for seed in range(args.seeds):
            start = time.perf_counter()
            bench = Toy(args.groups, chain=shape == "chain", seed=seed, pooled=args.pooled)
            rows = compared(bench, list(bench.every()), args.levels)
            took = time.perf_counter() - start
            title = f"{shape}, seed {seed}: {2**args.groups - 1} plans, {took:.0f} s"
            print(show(title, bench, rows), flush=True)
            worst = max([worst, *(row.gap for row in rows)])
    print(f"The search is at most {worst:.2%} slower than the best plan.")


if __name__ == "__main__":
    main()
