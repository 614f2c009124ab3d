"""Error of one output, whole and per slice, accumulated over samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_NOTHING = 1e-5  # an error in a slice of zeros that counts as none
_MOST_LOGIT = 1e6  # masks of -inf stay comparable
_LEAST_SHARE = 1e-9  # a probability that codes cannot hold is no infinite loss
_AT_ONCE = 1 << 20  # values that are compared at once
_QUIET = 1e-6  # of the power of all samples of as many values: less is silence, which has no SQNR of its own
_CONSTANT = 1e-12  # of the mean square, that values of one number vary by, as sums round
_UNRELATED = 0.1  # a cosine below is that of chance
_ROUNDING = (1e-12, 1e-5)  # sizes of what is left of float32 numbers around 1 that cancel
_FEW = 16  # values that may have it by chance
MOST_DB = 300.0  # beyond, a ratio of powers leaves float64


@dataclasses.dataclass(frozen=True)
class Part:
    """A slice of an output: `start:stop` along `axis`; `axis` None is the whole output.

    `chance`: random numbers of the model's own are in it, another time others.
    `decides`: the last axis holds scores of classes, `logits` or `probabilities`; "" if it does not, or if that
    is not known.
    """

    name: str
    axis: int | None = None
    start: int = 0
    stop: int = 0
    decides: Literal["", "logits", "probabilities"] = ""
    chance: bool = False

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
    `agreement` counts positions along the last axis whose largest entry is the same. Where these entries are the
    scores of classes, `divergence` is the mean of KL(p || q) over the positions, p and q being what the float
    model and the result make of them, in nats.

    `samples` holds power, noise and number of values of each sample. The SQNR of one (`by_sample`) may be far below that
    of all together, where a sample whose values are a tenth counts for a hundredth.

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
    lost: float = 0.0
    total: float = 0.0
    total_result: float = 0.0
    count: int = 0
    bad: int = 0
    unlike: int = 0
    discrete: bool = False
    samples: list[tuple[float, float, int]] = dataclasses.field(default_factory=list)

    def add(self, reference: Array, result: Array) -> None:
        """One sample; shapes must agree. Non-finite results are counted in `bad`, and as lost."""
        y, z = self.part.of(reference), self.part.of(result)
        if y.size == 0:
            return
        power = noise = 0.0
        for pair in _pieces(y, z):
            more = self._add(*pair)
            power, noise = power + more[0], noise + more[1]
        self.samples.append((power, noise, y.size))

    def _add(self, y: Array, z: Array) -> tuple[float, float]:
        """A piece of a sample; its power and its noise."""
        if y.dtype.kind not in "fc":
            self.discrete = y.dtype.kind == "b" or y.dtype.itemsize >= 4
            self.same += int((y == z).sum())
            self.decisions += y.size
            y, z = (a.astype(np.float64) if a.dtype.kind in "iub" else np.zeros(1) for a in (y, z))
        elif y.ndim >= 2 and y.shape[-1] > 1 and self.part.axis is None:
            self.same += int((y.argmax(-1) == z.argmax(-1)).sum())
            self.decisions += y.size // y.shape[-1]
            if self.part.decides:
                logits = self.part.decides == "logits"
                self.lost += float(divergence(y, z, logits=logits).sum())
        y, z = y.astype(np.float64), z.astype(np.float64)
        known = np.isfinite(y)
        lost = known & ~np.isfinite(z)
        self.bad += int(lost.sum())
        y, z = np.where(known, y, 0.0), np.where(known & ~lost, z, 0.0)
        power, noise = float(np.square(y).sum()), float(np.square(z - y).sum())
        self.power += power
        self.noise += noise
        self.dot += float((y * z).sum())
        self.power_result += float(np.square(z).sum())
        self.largest = max(self.largest, float(np.abs(z - y).max()))
        self.total += float(y.sum())
        self.total_result += float(z.sum())
        self.count += y.size
        return power, noise

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
    def by_sample(self) -> list[float]:
        """The SQNR of each sample that has noise, and values to compare it with: decibels."""
        if self.discrete or not self.power:
            return []
        least = _QUIET * self.power / self.count
        return [
            max(-MOST_DB, 10 * math.log10(power / noise))
            for power, noise, size in self.samples
            if noise and power > least * size
        ]

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
    def divergence(self) -> float | None:
        """Mean Kullback-Leibler divergence a decision in nats, if the output holds scores of classes."""
        return self.lost / self.decisions if self.decisions and self.part.decides else None

    @property
    def drop(self) -> float:
        """What is lost of the float model, 0 to 1: decisions that differ, or else the cosine that is missing.

        A cosine of 1 - d is a noise-to-signal ratio of about 2 d: 0.005 are 20 dB.
        """
        if self.bad or self.dead or self.unrelated:
            return 1.0
        if self.part.decides and self.decisions:
            return 1.0 - self.same / self.decisions
        return min(max(1.0 - self.cosine, 0.0), 1.0)

    @property
    def dead(self) -> bool:
        """Whether the reference varies but the result is constant: the slice carries nothing.

        Of flags and indices it is not said: one that is rare may be absent by chance.
        """
        if self.count < 2 or self.discrete:
            return False

        def spread(power: float, total: float) -> float:
            return power / self.count - (total / self.count) ** 2

        alive = spread(self.power, self.total) > _CONSTANT * self.power / self.count
        left = spread(self.power_result, self.total_result)
        return alive and left <= _CONSTANT * self.power_result / self.count

    @property
    def unrelated(self) -> bool:
        """Whether the result has nothing of the reference: more noise than signal, and hardly any cosine."""
        if self.count < _FEW or self.discrete or not self.power or self.part.chance:
            return False
        low, high = _ROUNDING
        if low < math.sqrt(self.power / self.count) and math.sqrt(self.noise / self.count) < high:
            return False
        return self.noise >= self.power and self.cosine < _UNRELATED

    def to_dict(self) -> dict[str, Any]:
        """The figures, for reports; an infinite SQNR is None (the outputs are equal)."""
        sqnr = self.sqnr_db
        return {
            "slice": self.part.name,
            "sqnr_db": None if math.isinf(sqnr) else round(sqnr, 2),
            "cosine": round(self.cosine, 6),
            "max_abs_error": self.largest,
            "agreement": None if self.agreement is None else round(self.agreement, 5),
            "divergence": None if self.divergence is None else float(f"{self.divergence:.4g}"),
            "dead": self.dead,
        }


def _pieces(y: Array, z: Array) -> Iterator[tuple[Array, Array]]:
    """Both, some rows at a time: sums in float64 of all logits of a text would take more than the model."""
    if y.ndim < 2 or y.size <= _AT_ONCE:
        yield y, z
        return
    rows = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
    step = max(1, _AT_ONCE // y.shape[-1])
    for first in range(0, len(rows[0]), step):
        yield rows[0][first : first + step], rows[1][first : first + step]


def divergence(reference: Array, result: Array, *, logits: bool) -> npt.NDArray[np.float64]:
    """KL(p || q) in nats along the last axis, p of the reference: float64, the other axes.

    Args:
        reference: scores (..., classes).
        result: the same of the other model.
        logits: their softmax is compared; else they are probabilities, normalized here.
    """
    p, q = (_log_softmax(a) if logits else _log_share(a) for a in (reference, result))
    found: npt.NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=-1)
    return np.maximum(np.where(np.isfinite(found), found, 0.0), 0.0)


def _log_softmax(scores: Array) -> npt.NDArray[np.float64]:
    wide = np.clip(scores.astype(np.float64), -_MOST_LOGIT, _MOST_LOGIT)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    made: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return made


def _log_share(probabilities: Array) -> npt.NDArray[np.float64]:
    wide = np.maximum(np.nan_to_num(probabilities.astype(np.float64)), _LEAST_SHARE)
    made: npt.NDArray[np.float64] = np.log(wide / wide.sum(axis=-1, keepdims=True))
    return made
