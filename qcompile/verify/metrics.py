"""Error of one output, whole and per slice, accumulated over samples."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_NOTHING = 1e-5  # an error in a slice of zeros that counts as none
MOST_DB = 300.0  # beyond, a ratio of powers leaves float64


@dataclasses.dataclass(frozen=True)
class Part:
    """A slice of an output: `start:stop` along `axis`; `axis` None is the whole output."""

    name: str
    axis: int | None = None
    start: int = 0
    stop: int = 0

    def of(self, values: Array) -> Array:
        """The values of the slice, a view."""
        if self.axis is None:
            return values
        index: list[slice] = [slice(None)] * values.ndim
        index[self.axis] = slice(self.start, self.stop)
        return values[tuple(index)]


@dataclasses.dataclass
class Error:
    """Sums over the samples, for one slice of one output.

    SQNR is 10 log10(sum y^2 / sum (y~ - y)^2) in decibels, the cosine that of all values as one vector.
    `agreement` counts positions along the last axis whose largest entry is the same.

    Indices and flags (booleans, integers of 32 bits and more) have no magnitude: `agreement` counts
    those that are the same, the cosine is their share, and SQNR is 10 log10(1 / share that differs).
    """

    part: Part
    power: float = 0.0
    noise: float = 0.0
    dot: float = 0.0
    power_result: float = 0.0
    largest: float = 0.0
    same: int = 0
    decisions: int = 0
    total: float = 0.0
    total_result: float = 0.0
    count: int = 0
    bad: int = 0
    unlike: int = 0
    discrete: bool = False

    def add(self, reference: Array, result: Array) -> None:
        """One sample; shapes must agree. Non-finite results are counted in `bad`, and as lost."""
        y, z = self.part.of(reference), self.part.of(result)
        if y.size == 0:
            return
        if y.dtype.kind not in "fc":
            self.discrete = y.dtype.kind == "b" or y.dtype.itemsize >= 4
            self.same += int((y == z).sum())
            self.decisions += y.size
            y, z = (a.astype(np.float64) if a.dtype.kind in "iub" else np.zeros(1) for a in (y, z))
        elif y.ndim >= 2 and y.shape[-1] > 1 and self.part.axis is None:
            self.same += int((y.argmax(-1) == z.argmax(-1)).sum())
            self.decisions += y.size // y.shape[-1]
        y, z = y.astype(np.float64), z.astype(np.float64)
        known = np.isfinite(y)
        lost = known & ~np.isfinite(z)
        self.bad += int(lost.sum())
        y, z = np.where(known, y, 0.0), np.where(known & ~lost, z, 0.0)
        self.power += float(np.square(y).sum())
        self.noise += float(np.square(z - y).sum())
        self.dot += float((y * z).sum())
        self.power_result += float(np.square(z).sum())
        self.largest = max(self.largest, float(np.abs(z - y).max()))
        self.total += float(y.sum())
        self.total_result += float(z.sum())
        self.count += y.size

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio; infinite if there is no noise."""
        if self.discrete:
            differ = 1 - self.same / self.decisions
            return -10 * math.log10(differ) if differ else math.inf
        if self.noise == 0.0:
            return math.inf
        if self.power == 0.0:  # nothing to compare with: a tiny error is none, any other is total
            return math.inf if self.noise <= self.count * _NOTHING**2 else -MOST_DB
        return max(-MOST_DB, 10 * math.log10(self.power / self.noise))

    @property
    def cosine(self) -> float:
        """Cosine of the angle between reference and result."""
        if self.discrete:
            return self.same / self.decisions
        product = math.sqrt(self.power * self.power_result)
        return self.dot / product if product else float(self.power == self.power_result)

    @property
    def agreement(self) -> float | None:
        """Share of equal decisions, if the output looks like one."""
        return self.same / self.decisions if self.decisions else None

    @property
    def dead(self) -> bool:
        """Whether the reference varies but the result is constant: the slice carries nothing.

        Of flags and indices it is not said: one that is rare may be absent by chance.
        """
        if self.count < 2 or self.discrete:
            return False

        def spread(power: float, total: float) -> float:
            return power / self.count - (total / self.count) ** 2

        alive = spread(self.power, self.total) > 1e-12 * max(self.power / self.count, 1e-30)
        return alive and spread(self.power_result, self.total_result) <= 1e-12 * max(
            self.power_result / self.count, 1e-30
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures, for reports; an infinite SQNR is None (the outputs are equal)."""
        sqnr = self.sqnr_db
        return {
            "slice": self.part.name,
            "sqnr_db": None if math.isinf(sqnr) else round(sqnr, 2),
            "cosine": round(self.cosine, 6),
            "max_abs_error": self.largest,
            "agreement": None if self.agreement is None else round(self.agreement, 5),
            "dead": self.dead,
        }
