"""The search for the fastest (or smallest) result within limits, and the trade-off that it finds on the way.

Noise is predicted from measured sensitivities (`qcompile.predict`), and the fastest plan whose predicted noise is within the
limit is an integer program: the cut of `qcompile.plan.make` with one further constraint, exact however sites are coupled.
It is compiled, run and timed; what it has in truth corrects the prediction, and the next plan is solved for. Once a
plan is within the limits, plans of a little more predicted noise are tried as well, as the prediction may be
too high. A limit of another kind than SQNR is a limit of noise that is not known: it is bracketed by what was measured.
Where predictions stay wrong plan after plan, as where errors cancel each other, ever less is aimed at, and once that
succeeds, the middle between what failed and what did not.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping

from qcompile.budget import Point
from qcompile.errors import ModelError
from qcompile.plan.candidates import Candidate
from qcompile.plan.cost import plan_cost
from qcompile.plan.make import Request
from qcompile.plan.plan import Form, Plan
from qcompile.predict import Estimate
from qcompile.referee import Referee
from qcompile.verify.sensitivity import Noise
from qcompile.workshop import LARGE, Attempt, Workshop

logger = logging.getLogger(__name__)

_WIDE = 1e3  # factor on the time of float nodes, that makes all integer
_TRIES = 14  # plans that are measured
_FEW_TRIES = 3  # of large graphs, where no clock ends the search
_BOLD = (
    1.0,
    1.1,
    1.25,
    1.5,
    2.0,
    3.0,
)  # factors on the noise aimed at, once something is within the limits
_CAREFUL = (1.0, 0.8, 0.6, 0.4, 0.25, 0.1, 1.25, 1.6, 2.5, 4.0)  # and before that
_FAR = 4.0  # the same factor, where single nodes are left out
_AROUND = 24  # nodes of either side that are turned
_GAIN = 0.01  # of the time, that a plan must promise to save: less is not measured
_TRUST = 2  # plans that may fail before less is aimed at
_DISTRUST = 0.35  # the share of the noise aimed at, that is aimed at next
_NEAR = 1.2  # shares nearer to each other are taken as the same
_PATIENCE = 7  # plans in a row that were in vain, once one is within the limits


def within(
    shop: Workshop, request: Request, best: Attempt, noise: Noise | None, referee: Referee
) -> None:
    """Measures attempts until one within the limits is known that is probably the best, or the time is over.

    What was found is `referee.best`; all that was measured is in `referee.points`.
    """
    first = referee.measure(shop, best, "the fastest plan")

    def measured(plan: Plan, what: str) -> Point | None:
        try:
            attempt = shop.attempt(plan, best.ranging, best.form)
        except ModelError as error:
            logger.warning("a plan was not built: %s", error)
            return None
        return referee.measure(shop, attempt, what)

    budget = referee.budget
    if budget.smallest or first.size_mb > budget.max_size:
        _smaller(shop, request, best.plan, measured)
    if _accurate(referee, first) or noise is None:
        return
    estimate = Estimate(shop, best.plan, best.ranging, noise)
    estimate.learn(best.plan, best.noise)
    with shop.progress.stage("searching", _TRIES) as tick:
        _Search(shop, request, estimate, referee, measured, tick).run(best.plan, first)


def blame(noise: Noise | None, most: int = 5) -> str:
    """A sentence on the sites that add most of the noise; empty if it was not measured."""
    if noise is None:
        return ""
    total = sum(noise.sites.values()) + noise.weights
    if total <= 0:
        return ""
    ranked = sorted(noise.sites.items(), key=lambda pair: -pair[1])[:most]
    told = [f"{name} ({value / total:.0%})" for name, value in ranked if value > 0.01 * total]
    if noise.weights > 0.1 * total:
        told.append(f"the rounded weights ({noise.weights / total:.0%})")
    return f"Most of the error comes from {', '.join(told)}." if told else ""


def _forms(plan: Plan) -> tuple[Form, ...]:
    return tuple(entry.form for entry in plan.nodes)


def _accurate(referee: Referee, point: Point) -> bool:
    """Whether the limits of accuracy are kept, whatever the size and the time."""
    budget = dataclasses.replace(
        referee.budget, max_size=math.inf, max_latency=math.inf, min_speedup=0.0
    )
    return budget.excess(point) == 0


def _smaller(
    shop: Workshop, request: Request, plan: Plan, measured: Callable[[Plan, str], Point | None]
) -> None:
    """All that can be integer: the smallest result, which need not be the fastest."""
    widest = shop.plan(dataclasses.replace(request, gain=_WIDE, border=0.0, measured={}))
    if _forms(widest) != _forms(plan):
        measured(widest, "as much as possible integer")


class _Search:
    """Plans solved for, measured, and what is known of them."""

    def __init__(
        self, shop: Workshop, request: Request, estimate: Estimate, referee: Referee,
        measured: Callable[[Plan, str], Point | None], tick: Callable[[int, int | None], None],
    ) -> None:  # fmt: skip
        self._shop, self._request, self._estimate = shop, request, estimate
        self._referee, self._measured, self._tick = referee, measured, tick
        limit = referee.budget.min_sqnr
        self._known = 10 ** (-limit / 10) if math.isfinite(limit) else math.inf
        self._low, self._high = 0.0, self._known  # noise that is accepted, and that is not
        self._seen: set[tuple[Form, ...]] = set()
        self._large = False  # so many integer nodes that each integer program takes seconds
        self._cost = math.inf  # of the fastest plan within the limits
        self._vain = 0  # plans since then
        self._failed = 0  # plans in a row, before that
        self._share = 1.0  # of the noise aimed at, as predictions are not to be trusted
        self._calm, self._wild = (
            0.0,
            math.inf,
        )  # the greatest share that succeeded, the least that did not

    def run(self, start: Plan, first: Point) -> None:
        """Measures plans until none is left that promises more, or the tries or the time are over."""
        self._seen.add(_forms(start))
        if first.misses and self._known == math.inf:
            self._high = _noise(first)
        self._large = len(start.of(Form.STATIC)) > LARGE
        few = self._large and not self._shop.recipe.timing
        for _ in range(_FEW_TRIES if few else _TRIES):
            over = self._referee.expired or self._vain >= _PATIENCE
            plan = None if over else self._next()
            if plan is None:
                return
            self._seen.add(_forms(plan))
            point = self._measured(plan, f"predicted {_decibels(self._estimate.of(plan)):.1f} dB")
            self._tick(1, None)
            if point is not None:
                self._learn(plan, point)

    def _next(self) -> Plan | None:
        """The fastest plan within the noise aimed at that was not measured yet and promises to be faster than the best.

        Before anything is within the limits, plans of less noise are tried, and after that plans of more.
        """
        aim = self._aim() * self._share
        found = self._cost < math.inf
        for ease in _BOLD if found else _CAREFUL:
            if found and self._share * ease >= self._wild < 1.0:
                break
            if self._referee.expired:  # each plan may take many seconds to solve for
                return None
            plan = self._shop.plan(self._estimate.request(self._request, aim * ease))
            if not plan.quantizes or _forms(plan) in self._seen:
                continue
            if self._ns(plan) < (1 - _GAIN) * self._cost:
                return plan
        if found and self._share < 1.0:  # nothing is left between what failed and what did not
            self._share, self._wild = 1.0, math.inf
            return self._next()
        return None if self._large else self._around(aim)  # one node of so many changes nothing

    def _around(self, aim: float) -> Plan | None:
        """The plan of least predicted noise with one node on the other side than in the one nearest to the limits.

        Where errors cancel each other, what seems to be the quietest plan need not be.
        """
        assert self._referee.best is not None
        nearest = self._referee.best.attempt.plan
        wanted = self._estimate.request(self._request, aim * _FAR)
        integer = nearest.of(Form.STATIC, Form.DYNAMIC, Form.WEIGHT)
        flips = [(entry.node, Form.FLOAT) for entry in integer if entry.op != "Gather"]
        others = (entry.node for entry in nearest.of(Form.FLOAT))
        flips = flips[:_AROUND] + [(n, Form.STATIC) for n in others if self._heavy(n)][:_AROUND]
        free = self._flipped(wanted, dict(flips), {})
        if free or self._cost == math.inf:
            return min(free, key=self._estimate.of, default=None)
        products = (entry for entry in nearest.nodes if entry.form in (Form.STATIC, Form.FLOAT))
        pinned = {entry.node: entry.form for entry in products if self._heavy(entry.node)}
        return min(self._flipped(wanted, dict(flips), pinned), key=self._estimate.of, default=None)

    def _flipped(
        self, wanted: Request, flips: Mapping[str, Form], pinned: Mapping[str, Form]
    ) -> list[Plan]:
        """Plans with one of these nodes in that form, and the pinned ones in theirs, that promise to be faster than the best."""
        found = []
        for name, form in flips.items():
            if self._referee.expired:
                break
            forms = {**wanted.forms, **pinned, name: form}
            why = dict.fromkeys(
                (n for n, f in forms.items() if f is Form.FLOAT), "left float for accuracy or speed"
            )
            reasons = {**why, **wanted.reasons}
            plan = self._shop.plan(dataclasses.replace(wanted, forms=forms, reasons=reasons))
            if not plan.quantizes or _forms(plan) in self._seen:
                continue
            if self._ns(plan) < (1 - _GAIN) * self._cost:
                found.append(plan)
        return found

    def _heavy(self, name: str) -> bool:
        """Whether a node is a Conv that a plan may have integer."""
        item = self._shop.found.get(name)
        return isinstance(item, Candidate) and item.role == "conv"

    def _aim(self) -> float:
        """The noise that the next plan may have."""
        if self._high == self._known < math.inf:
            return self._known
        return math.sqrt(self._low * self._high) if self._low else self._high / 4

    def _learn(self, plan: Plan, point: Point) -> None:
        noise = _noise(point)
        self._estimate.learn(plan, noise)
        if _accurate(self._referee, point):
            self._cost, self._vain = min(self._cost, self._ns(plan)), 0
            self._low = max(self._low, min(noise, self._high))
            self._calm = max(self._calm, self._share)
            self._share = self._between()
            return
        self._wild = min(self._wild, self._share)
        if self._cost < math.inf:
            self._vain += 1
            self._share = self._between()
        else:
            self._failed += 1
            self._share = _DISTRUST ** max(0, self._failed - _TRUST)
        if noise <= self._known:  # another limit is broken, so that noise must be less
            self._high = min(self._high, noise)

    def _between(self) -> float:
        """The share between the greatest that succeeded and the least that did not; 1 if there is no such."""
        if self._calm >= 1.0 or self._wild < _NEAR * self._calm or math.isinf(self._wild):
            return 1.0
        return math.sqrt(self._calm * self._wild)

    def _ns(self, plan: Plan) -> float:
        shop = self._shop
        return plan_cost(plan, shop.found, shop.target, shop.facts, self._request)


def _noise(point: Point) -> float:
    """The noise-to-signal ratio of a point."""
    return 0.0 if point.sqnr_db is None else 10 ** (-point.sqnr_db / 10)


def _decibels(noise: float) -> float:
    return -10 * math.log10(max(noise, 1e-12))
