"""What a result may cost: limits of accuracy, size and latency, and the points that were measured against them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from qcompile.limits import Limit, parse_limit
from qcompile.recipe import Recipe

_LEAST = 1e-12
_EQUAL = 1e-9  # of a limit: what is nearer is the same
_ENOUGH = 100  # scores whose sampling noise is taken for true


@dataclasses.dataclass(frozen=True)
class Point:
    """One result that was compiled, run and timed.

    Attributes:
        what: how it came about, in words.
        integer, floating: nodes of its plan that are quantized, and those that could be and are not.
        sqnr_db: of the worst output slice on held-out samples; None if all outputs are equal.
        drop: without a metric the share of decisions that differ, or of the cosine that is lost, of the worst
            output, 0 to 1; with one, how much worse the metric is than the float model's, in its unit.
        divergence: greatest mean KL divergence of an output with scores of classes, in nats; None without one.
        metric: the user's metric, if there is one.
        sigma: sampling noise of `drop`, if the metric tells.
        latency_ms, speedup: on the feed that gained least, the float model timed in turn.
        size_mb: of the model, in 10^6 bytes.
        misses: the limits that it breaks, sentences.
        scored: samples that the metric gave scores of; 0 if it gave a number alone.
    """

    what: str
    integer: int
    floating: int
    sqnr_db: float | None
    drop: float
    divergence: float | None
    metric: float | None
    sigma: float | None
    latency_ms: float
    speedup: float
    size_mb: float
    misses: tuple[str, ...] = ()
    scored: int = 0

    def counted(self, limit: float) -> float:
        """The drop that counts against a limit: 0 more than it, where what is beyond is no more than sampling noise.

        So it is where enough samples are scored, and the limit is not nothing at all.
        """
        noise = (self.sigma or 0.0) if self.scored >= _ENOUGH and limit > 0 else 0.0
        return limit if limit < self.drop <= limit + noise + _EQUAL * limit else self.drop

    def to_dict(self) -> dict[str, Any]:
        """The figures for reports, rounded."""
        table = dataclasses.asdict(self)
        rounded = {k: float(f"{v:.5g}") for k, v in table.items() if isinstance(v, float)}
        return table | rounded | {"misses": list(self.misses)}


@dataclasses.dataclass(frozen=True)
class Budget:
    """The limits of a recipe, made absolute by the float model's figures.

    Attributes:
        max_drop: in the unit of `Point.drop`.
        min_sqnr: decibels.
        max_size: 10^6 bytes.
        max_latency: milliseconds.
        smallest: the smallest result is best, not the fastest.
        min_speedup: over the float model, timed in turn: where ms themselves do not matter, it is the steadier figure.
    """

    max_drop: float = math.inf
    min_sqnr: float = -math.inf
    max_size: float = math.inf
    max_latency: float = math.inf
    smallest: bool = False
    min_speedup: float = 0.0

    def excess(self, point: Point) -> float:
        """By how much a point breaks the limits, 0 if it keeps all: the sum of relative excesses."""
        db = math.inf if point.sqnr_db is None else point.sqnr_db
        over = [
            (point.size_mb, self.max_size),
            (point.latency_ms, self.max_latency),
            (self.min_speedup, point.speedup),
            (point.counted(self.max_drop), self.max_drop),
            (
                10 ** (-db / 20),
                10 ** (-self.min_sqnr / 20) if self.min_sqnr > -math.inf else math.inf,
            ),
        ]
        found = [value / max(limit, _LEAST) - 1 for value, limit in over if value > limit]
        return sum(min(value, 1e6) for value in found)

    def misses(self, point: Point) -> tuple[str, ...]:
        """The limits that a point breaks, as sentences without their full stop."""
        found = []
        db = math.inf if point.sqnr_db is None else point.sqnr_db
        if db < self.min_sqnr:
            found.append(
                f"the worst output slice has {db:.1f} dB SQNR, the limit is {self.min_sqnr:g} dB"
            )
        if point.counted(self.max_drop) > self.max_drop:
            if point.metric is None:
                told = f"{100 * point.drop:.3g}% of what the outputs say is lost, the limit is {100 * self.max_drop:.3g}%"
            else:
                told = f"the metric is {point.metric:.5g}, worse by {point.drop:.3g}, the limit is {self.max_drop:.3g}"
            found.append(told)
        if point.size_mb > self.max_size:
            found.append(f"the size is {point.size_mb:.2f} MB, the limit is {self.max_size:.2f} MB")
        if point.latency_ms > self.max_latency:
            found.append(
                "the latency is {} ms, the limit is {} ms".format(
                    *_apart(point.latency_ms, self.max_latency)
                )
            )
        if point.speedup < self.min_speedup:
            found.append(
                f"it is {point.speedup:.2f}x as fast, the limit is {self.min_speedup:.2f}x"
            )
        return tuple(found)

    def doubt(self, point: Point) -> str:
        """A sentence, where a drop is beyond the limit by no more than its sampling noise; else nothing."""
        over = point.drop - self.max_drop
        if over <= 2 * _EQUAL * self.max_drop or point.counted(self.max_drop) > self.max_drop:
            return ""
        assert point.sigma is not None
        needed = point.scored * (point.sigma / over) ** 2
        wanted = f" ({float(f'{needed:.2g}'):,.0f} could)" if needed < 1e6 else ""
        return (
            f"The metric is worse by {point.drop:.3g} ± {point.sigma:.2g}, the limit is {self.max_drop:.3g}: "
            f"{point.scored:,} samples cannot tell whether it is kept{wanted}."
        )

    def best(self, points: Sequence[Point]) -> int:
        """The index of the best point: within the limits the fastest (or smallest), else the nearest to them."""

        def rank(i: int) -> tuple[float, float]:
            point = points[i]
            return self.excess(point), point.size_mb if self.smallest else -point.speedup

        return min(range(len(points)), key=rank)


def budget_of(recipe: Recipe, *, metric: float | None, ms: float, mb: float) -> Budget:
    """The recipe's limits for a float model of this metric, latency and size.

    Without a metric the float model agrees with itself in everything: shares are of 1.
    """

    def limit(text: str | None, name: str, unit: str, reference: float) -> float:
        found = Limit(math.inf) if text is None else parse_limit(text, name, unit)
        return found.of(reference)

    return Budget(
        limit(recipe.max_drop, "max_drop", "", 1.0 if metric is None else metric),
        -math.inf if recipe.min_sqnr is None else recipe.min_sqnr,
        limit(recipe.max_size, "max_size", "MB", mb),
        limit(recipe.max_latency, "max_latency", "ms", ms),
        recipe.objective == "smallest",
    )


def pareto(points: Sequence[Point]) -> list[int]:
    """The indices of the points that no other beats in drop, SQNR, latency and size at once, fastest first."""

    def figures(point: Point) -> tuple[float, ...]:
        db = math.inf if point.sqnr_db is None else point.sqnr_db
        return point.drop, -db, -point.speedup, point.size_mb

    rows = [figures(point) for point in points]

    def beaten(i: int) -> bool:
        return any(
            all(a <= b for a, b in zip(rows[j], rows[i], strict=True))
            and (rows[j] != rows[i] or j < i)
            for j in range(len(rows))
            if j != i
        )

    kept = [i for i in range(len(points)) if not beaten(i)]
    return sorted(kept, key=lambda i: -points[i].speedup)


def _apart(value: float, limit: float) -> tuple[str, str]:
    """Both in as many digits as tell them apart."""
    pairs = [(f"{value:.{digits}f}", f"{limit:.{digits}f}") for digits in (2, 3, 4, 6)]
    return next((pair for pair in pairs if pair[0] != pair[1]), pairs[-1])
