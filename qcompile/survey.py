"""What statistics say of each tensor, as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from qcompile.calib.ranges import GRID, METHODS
from qcompile.calib.statistics import Statistics
from qcompile.calib.stats import TensorStats


def survey(found: Statistics, methods: Iterable[str] = tuple(METHODS)) -> dict[str, Any]:
    """A JSON-able table of the statistics: what they belong to, and each tensor with its range by these methods."""
    methods = list(methods)
    return {
        "model": found.key.title, "model_digest": found.key.model,
        "data": [
            {"description": s.description, "digest": s.digest, "samples": s.samples}
            for s in found.key.shards
        ],
        "versions": dict(found.key.versions),
        "samples": found.samples, "skipped": found.skipped, "held_out": len(found.held),
        "forced": list(found.forced), "unobserved": dict(found.unobserved), "methods": methods,
        "tensors": [_row(name, stats, methods) for name, stats in found.tensors.items()],
    }  # fmt: skip


def _row(name: str, stats: TensorStats, methods: list[str]) -> dict[str, Any]:
    mean, deviation = _finite(stats.mean), _finite(stats.deviation)
    spread = stats.span / deviation if deviation else None
    return {
        "name": name, "count": stats.count, "min": stats.low, "max": stats.high,
        "infinite": stats.infinite, "mean": mean, "deviation": deviation, "spread": spread,
        "zeros": stats.share_of_zeros(), "saturated": stats.share_saturated(),
        "outliers": stats.share_of_outliers(),
        "ranges": {method: METHODS[method](stats, GRID) for method in methods},
    }  # fmt: skip


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
