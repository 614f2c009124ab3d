"""The search for the fastest (or smallest) result within limits, and the trade-off that it finds on the way.

Noise gets a price, in nanoseconds a unit, and for each price the plan is the exact optimum of time plus price times
noise: sites that kernels couple are one cut (`qcompile.plan.make`), so they move together. These plans, from the
fastest to the most accurate, are the rungs of a ladder, the lower convex hull of what can be reached (Everett
1963). Predictions only order them: rungs are compiled, run and timed, by bisection, until the first one within the
limits is known. Between that rung and the one before it, single nodes are made integer again, those first
that save most time for their noise, as long as the measured result stays within the limits.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence

from qcompile import tune
from qcompile.budget import Point
from qcompile.errors import ModelError
from qcompile.plan.candidates import Candidate
from qcompile.plan.make import Request, node_costs
from qcompile.plan.plan import Form, Plan
from qcompile.referee import Referee
from qcompile.verify.sensitivity import Noise
from qcompile.workshop import Attempt, Workshop

logger = logging.getLogger(__name__)

_PRICES = 48  # of noise, from nothing to more than any time
_LEAST, _MOST = 1e2, 1e13  # nanoseconds a unit of noise
_WIDE = 1e3  # factor on the time of float nodes, that makes all integer
_REPAIRS = 12  # parts that are made integer again


@dataclasses.dataclass(frozen=True)
class Rung:
    """A plan, and the noise-to-signal ratio that is predicted of it."""

    plan: Plan
    noise: float


def ladder(shop: Workshop, request: Request, noise: Noise, start: Plan) -> list[Rung]:
    """Plans of rising price of noise, the first one is `start`; each quantizes something."""
    single = tune.by_tensor(shop, start, noise)
    rungs = [Rung(start, tune.noise_of(shop, start, noise, single))]
    seen = {_forms(start)}
    for i in range(_PRICES):
        price = _LEAST * (_MOST / _LEAST) ** (i / (_PRICES - 1))
        plan = shop.plan(dataclasses.replace(request, noise=single, price=price))
        if _forms(plan) in seen or not plan.quantizes:
            continue
        seen.add(_forms(plan))
        predicted = tune.noise_of(shop, plan, noise, single)
        if predicted < rungs[-1].noise or len(rungs) == 1:
            rungs.append(Rung(plan, predicted))
    return rungs


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
    rungs = ladder(shop, request, noise, best.plan)
    with shop.progress.stage("searching", _steps(len(rungs))) as tick:
        low, high = _bisect(rungs, best, referee, measured, tick)
        if high < len(rungs) and not referee.expired:

            def kept(plan: Plan, what: str) -> bool:
                point = measured(plan, what)
                return point is not None and _accurate(referee, point)

            refill(shop, request, noise, (rungs[low], rungs[high]), kept, lambda: referee.expired)


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


def _steps(rungs: int) -> int:
    return max(1, math.ceil(math.log2(max(rungs, 2))))


def _accurate(referee: Referee, point: Point) -> bool:
    """Whether the limits of accuracy are kept, whatever the size and the time."""
    budget = dataclasses.replace(referee.budget, max_size=math.inf, max_latency=math.inf)
    return budget.excess(point) == 0


def _smaller(
    shop: Workshop, request: Request, plan: Plan, measured: Callable[[Plan, str], Point | None]
) -> None:
    """All that can be integer: the smallest result, which need not be the fastest."""
    widest = shop.plan(dataclasses.replace(request, gain=_WIDE, border=0.0, measured={}))
    if _forms(widest) != _forms(plan):
        measured(widest, "as much as possible integer")


def _bisect(
    rungs: Sequence[Rung], best: Attempt, referee: Referee, measured: Callable[[Plan, str], Point | None],
    tick: Callable[[int, int | None], None],
) -> tuple[int, int]:  # fmt: skip
    """The last rung found that breaks the limits of accuracy, and the first one that keeps them."""
    low, high = 0, len(rungs)
    first = True
    while low + 1 < high and not referee.expired:
        middle = _guess(rungs, best, referee, low, high) if first else (low + high) // 2
        first = False
        point = measured(rungs[middle].plan, f"noise at price {middle} of {len(rungs) - 1}")
        if point is not None and _accurate(referee, point):
            high = middle
        else:
            low = middle
        tick(1, None)
    return low, high


def _guess(rungs: Sequence[Rung], best: Attempt, referee: Referee, low: int, high: int) -> int:
    """The rung that a limit of SQNR asks for, if the predictions are right; else the middle one."""
    limit = referee.budget.min_sqnr
    if not math.isfinite(limit) or rungs[0].noise <= 0:
        return (low + high) // 2
    factor = max(best.noise, 1e-30) / rungs[0].noise
    for i in range(low + 1, high):
        if rungs[i].noise * factor <= 10 ** (-limit / 10):
            return i
    return high - 1


def refill(
    shop: Workshop, request: Request, noise: Noise, rungs: tuple[Rung, Rung],
    keeps: Callable[[Plan, str], bool], over: Callable[[], bool] = lambda: False, most: int = _REPAIRS,
) -> None:  # fmt: skip
    """Parts of what the first rung has integer and the second has not are added to the second, as long as that is good.

    Args:
        shop: makes plans.
        request: for them.
        noise: by site.
        rungs: one that is not accurate enough, and a slower one that is.
        keeps: whether a plan, described in words, is measured to be accurate enough.
        over: whether the time is.
        most: plans that are measured.
    """
    coarse, fine = rungs
    single = tune.by_tensor(shop, coarse.plan, noise)
    integer = (Form.STATIC, Form.DYNAMIC, Form.FREE)
    kept = {e.node: e.form for e in fine.plan.nodes if e.form in integer}
    more = [e for e in coarse.plan.nodes if e.form in integer and e.node not in kept]
    forms = {entry.node: entry.form for entry in more}

    def worth(name: str) -> float:
        item = shop.found.get(name)
        if not isinstance(item, Candidate):
            return 0.0
        as_float, as_int = request.measured.get(name) or node_costs(item, shop.facts)
        cost = single.get(name, 0.0) + single.get(item.result.name or "", 0.0)
        return (as_float - as_int) / (cost + 1e-12)

    waiting = [sorted(forms, key=lambda name: -worth(name))]
    for _ in range(most):
        if not waiting or over():
            return
        part = waiting.pop(0)
        half = part[: (len(part) + 1) // 2] if len(part) > 1 else part
        if not half:
            continue
        plan = _with(shop, request, fine.plan, {**kept, **{name: forms[name] for name in half}})
        rest = part[len(half) :]
        if keeps(plan, f"{len(half)} more nodes integer"):
            kept |= {name: forms[name] for name in half}
            waiting.insert(0, rest)
        elif len(half) > 1:
            waiting[:0] = [half, rest]
        else:
            waiting.insert(0, rest)
        waiting = [item for item in waiting if item]


def _with(shop: Workshop, request: Request, plan: Plan, forms: dict[str, Form]) -> Plan:
    """The plan in which just these nodes are integer, of those that a search may choose."""
    fixed = {
        entry.node: forms.get(entry.node, Form.FLOAT)
        for entry in plan.nodes
        if isinstance(item := shop.found.get(entry.node), Candidate)
        and item.role not in ("recurrent", "embedding")
        and entry.form is not Form.ABSORBED
    }
    wanted = {name: Form.STATIC if form is Form.FREE else form for name, form in fixed.items()}
    reasons = dict.fromkeys(wanted, "left float for accuracy or speed")
    return shop.plan(
        dataclasses.replace(
            request, forms={**wanted, **request.forms}, reasons={**reasons, **request.reasons}
        )
    )
