"""Measures attempts against the limits: accuracy on held-out samples or by the user's metric, time, size."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import NamedTuple

from qcompile.budget import Budget, Point, budget_of
from qcompile.graph import io
from qcompile.opened import Opened
from qcompile.plan.candidates import Candidate
from qcompile.plan.cost import expected_ms
from qcompile.plan.plan import Form
from qcompile.run.session import Feed
from qcompile.verify.latency import Timing, race, typical_feeds
from qcompile.verify.metric import Metric
from qcompile.workshop import Attempt, Workshop

logger = logging.getLogger(__name__)
_SECONDS = 0.8  # that a point is timed


class Standing(NamedTuple):
    """An attempt, and the point that it reached."""

    attempt: Attempt
    point: Point


class Referee:
    """Measures, and remembers every point and the best attempt; the time for the search begins with it."""

    def __init__(
        self, opened: Opened, metric: Metric | None = None, *, seconds: float | None = None,
        samples: int | None = None, limits: Budget | None = None,
    ) -> None:  # fmt: skip
        """Limits are those of the recipe, or others.

        Args:
            opened: the float model, and the samples.
            metric: scores results in place of the decisions that differ.
            seconds: for the search, in place of the recipe's.
            samples: held-out ones that judge; None for all.
            limits: in place of the recipe's.
        """
        self._opened, self.metric = opened, metric
        self._samples, self._limits = samples, limits
        limit = opened.recipe.search_time if seconds is None else seconds
        self._end = time.perf_counter() + limit
        self._budget: Budget | None = None
        self.points: list[Point] = []
        self.best: Standing | None = None

    @property
    def expired(self) -> bool:
        """Whether the time for the search is over."""
        return self._opened.recipe.timing and time.perf_counter() >= self._end

    @property
    def budget(self) -> Budget:
        """The limits, made absolute by the float model's figures; known once a point was measured."""
        assert self._budget is not None
        return self._budget

    def measure(self, shop: Workshop, attempt: Attempt, what: str) -> Point:
        """The attempt judged on held-out samples, scored and timed; it may become the best one."""
        comparison = shop.judge(attempt, self._samples)
        timings = self._timings(shop, attempt)
        worst = min(timings, key=lambda t: t.speedup["result"])
        attempt.speedup = worst.speedup["result"]
        score = None if self.metric is None else self.metric.of(attempt.session)
        reference = None if self.metric is None else self.metric.reference
        if self._budget is None:
            known = None if reference is None else reference.value
            self._budget = self._made(worst.ms["fp32"], known)
        drop, sigma = comparison.drop, None
        if score is not None and reference is not None and self.metric is not None:
            drop = reference.drop(score, lower_is_better=self.metric.lower_is_better)
            sigma = reference.sigma(score)
        db = comparison.worst_db
        integer = attempt.plan.of(Form.STATIC, Form.DYNAMIC, Form.WEIGHT)
        point = Point(
            what, len(integer), _floats(shop, attempt), None if db == float("inf") else db, drop,
            comparison.divergence, None if score is None else score.value, sigma, worst.ms["result"],
            attempt.speedup, io.model_bytes(attempt.model) / 1e6,
        )  # fmt: skip
        scored = (
            0 if sigma is None or score is None or score.samples is None else score.samples.size
        )
        point = dataclasses.replace(point, scored=scored)
        point = dataclasses.replace(point, misses=self.budget.misses(point))
        self.points.append(point)
        db_told = "inf" if point.sqnr_db is None else f"{point.sqnr_db:.1f}"
        logger.info("%s: %s dB, drop %.2g, %.2fx", what, db_told, point.drop, point.speedup)
        if self.best is None or self.budget.best([self.best.point, point]):
            self.best = Standing(attempt, point)
        return point

    def _made(self, ms: float, metric: float | None) -> Budget:
        opened = self._opened
        if self._limits is not None:
            return self._limits
        path = opened.path
        size = io.weight_bytes(opened.original) if path is None else io.file_bytes(path)
        return budget_of(opened.recipe, metric=metric, ms=ms, mb=size / 1e6)

    def _timings(self, shop: Workshop, attempt: Attempt) -> list[Timing]:
        """What it takes on each of the typical feeds; without timing, what the target's costs promise."""
        if self._opened.recipe.timing:
            return [self._race(attempt, feed) for feed in self._feeds()]
        before, after = expected_ms(attempt.plan, shop.found, shop.target, shop.facts)
        speedup = before / after if after else 1.0
        return [Timing({"fp32": before, "result": after}, {"fp32": 1.0, "result": speedup}, 0)]

    def _race(self, attempt: Attempt, feed: Feed) -> Timing:
        sessions = {"fp32": self._opened.session, "result": attempt.session}
        return race(sessions, feed, seconds=_SECONDS)

    def _feeds(self) -> list[Feed]:
        samples = self._opened.samples
        feeds = [self._opened.feed] if samples is None else list(samples.held_out())
        return [feed for _, feed in typical_feeds(feeds)]


def _floats(shop: Workshop, attempt: Attempt) -> int:
    """Nodes that stay float and could be integer."""
    found = (shop.found.get(entry.node) for entry in attempt.plan.of(Form.FLOAT))
    return sum(isinstance(item, Candidate) and item.role != "free" for item in found)
