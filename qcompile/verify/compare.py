"""Runs the float model and a result on the same samples and measures the error of every output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qcompile.errors import DataError
from qcompile.run.session import Feed, Session
from qcompile.verify.metrics import MOST_DB, Error, Part

_CACHE_BYTES = 96 << 20
_SPREAD_DB = 10.0  # that a sample may be below all together: less is how samples differ

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Errors by output name: the whole output first, then its slices."""

    outputs: Mapping[str, list[Error]]
    samples: int

    @property
    def worst_db(self) -> float:
        """The lowest SQNR of any slice of any output, in decibels; -inf if values or an output were lost."""
        if any(errors[0].unlike and not errors[0].count for errors in self.outputs.values()):
            return -np.inf
        values = [
            e.sqnr_db if not e.bad else -np.inf
            for errors in self.outputs.values()
            for e in errors
            if e.count
        ]
        return float(min(values, default=np.inf))

    @property
    def noise_to_signal(self) -> float:
        """The largest noise-to-signal power ratio of any slice: a finite number, whatever was lost."""
        worst = max(self.worst_db, -MOST_DB)
        return 0.0 if np.isinf(worst) else 10 ** (-worst / 10)

    @property
    def divergence(self) -> float | None:
        """The greatest mean KL divergence of an output with scores of classes, in nats; None without one."""
        found = [e.divergence for errors in self.outputs.values() for e in errors]
        return max((value for value in found if value is not None), default=None)

    @property
    def differing(self) -> int:
        """Decisions of outputs with scores of classes that differ."""
        found = (e for errors in self.outputs.values() for e in errors if e.part.decides)
        return sum(e.decisions - e.same for e in found)

    @property
    def decisions(self) -> int:
        """Decisions of outputs with scores of classes."""
        found = (e for errors in self.outputs.values() for e in errors if e.part.decides)
        return sum(e.decisions for e in found)

    @property
    def drop(self) -> float:
        """What is lost of the output that lost most, 0 to 1: see `Error.drop`."""
        if self.worst_db == -np.inf:
            return 1.0
        return max((e.drop for es in self.outputs.values() for e in es if e.count), default=0.0)

    def problems(self) -> list[str]:
        """Sentences about outputs that carry nothing any more."""
        found = []
        for name, errors in self.outputs.items():
            if errors[0].unlike and not errors[0].count:
                found.append(f"output {name!r} never had the shape of the float model's.")
            for error in errors:
                where = f"output {name!r}" + (
                    "" if error.part.axis is None else f", slice {error.part.name}"
                )
                if error.bad:
                    found.append(
                        f"{where}: {error.bad} values are lost: not finite, or in no place."
                    )
                elif error.dead:
                    found.append(f"{where} is constant: all its information is lost.")
                elif error.unrelated:
                    found.append(
                        f"{where} has nothing of the float model's: {error.sqnr_db:.1f} dB SQNR, cosine {error.cosine:.2f}."
                    )
        return found

    def remarks(self, goal: float = -np.inf) -> list[str]:
        """Sentences about outputs that could not be compared, as many rows as boxes were found, or not in each sample.

        Args:
            goal: the SQNR in decibels that is promised of all samples together, which few of them may decide.
        """
        found = [
            f"output {name!r} has another shape than that of the float model for {errors[0].unlike} of "
            f"{self.samples} samples and was not compared there: judge the result by your own metric."
            for name, errors in self.outputs.items()
            if errors[0].unlike
        ]
        for name, (whole, *_) in self.outputs.items():
            each, all_of_them = whole.by_sample, whole.sqnr_db
            if whole.bad or not each or not min(each) < goal <= all_of_them:
                continue
            if all_of_them - min(each) > _SPREAD_DB:
                found.append(
                    f"output {name!r} has less than the goal of {goal:g} dB SQNR in {sum(db < goal for db in each)} of "
                    f"{self.samples} samples, {min(each):.1f} dB in the worst, and {all_of_them:.1f} dB in all together: judge "
                    "the result by your own metric on every kind of input."
                )
        return found


class Runner(Protocol):
    """What can be compared with the reference: a session, or something that runs like one."""

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[Array]:
        """The outputs of that name for one feed."""


class Reference:
    """The float model on the held-out samples; its outputs are kept while they are small."""

    def __init__(
        self,
        session: Session,
        samples: Callable[[], Iterable[Feed]],
        parts: Mapping[str, Sequence[Part]],
        where: Callable[[int], str] | None = None,
    ) -> None:
        """`where` words the place of a sample; without it NaN in the outputs is not looked for."""
        self._session, self._samples, self._parts = session, samples, parts
        self._where = where
        self._names = [info.name for info in session.outputs]
        self._kept: list[list[Array]] = []
        self._room = _CACHE_BYTES

    def _outputs(self, number: int, feed: Feed) -> list[Array]:
        if number < len(self._kept):
            return self._kept[number]
        values = self._session.run(feed)
        if self._where is not None:
            self._check(values, self._where(number))
        size = sum(map(_nbytes, values))
        if number == len(self._kept) and size <= self._room:
            self._room -= size
            self._kept.append(values)
        return values

    def _check(self, values: Sequence[Array], where: str) -> None:
        for name, value in zip(self._names, values, strict=True):
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.isnan(value).any():
                raise DataError(
                    f"output {name!r} is NaN for {where}: the float model itself fails there. "
                    "Remove that sample or mend the model."
                )

    def on(self, samples: Callable[[], Iterable[Feed]]) -> Reference:
        """The float model on other samples."""
        return Reference(self._session, samples, self._parts)

    def compare(self, result: Runner, limit: int | None = None) -> Comparison:
        """The errors of `result` over the first `limit` samples.

        Raises:
            DataError: an output of the float model is NaN.
        """
        errors = {
            name: [Error(part) for part in self._parts.get(name, [Part("all")])]
            for name in self._names
        }
        seen = 0
        for number, feed in enumerate(self._samples()):
            if limit is not None and number >= limit:
                break
            wanted, got = self._outputs(number, feed), result.run(feed, self._names)
            for name, y, z in zip(self._names, wanted, got, strict=True):
                if not isinstance(y, np.ndarray) or y.dtype.kind not in "fiub":
                    continue
                for error in errors[name]:
                    if y.shape == z.shape:
                        error.add(y, z)
                    elif y.ndim == z.ndim:
                        error.unlike += 1
                    else:
                        error.bad, error.count = error.bad + max(y.size, 1), error.count + 1
            seen += 1
        return Comparison(errors, seen)


def _nbytes(value: Any) -> int:
    """Bytes of an output, which may be a sequence of arrays of several shapes, or nothing."""
    return sum(map(_nbytes, value)) if isinstance(value, list) else getattr(value, "nbytes", 0)
