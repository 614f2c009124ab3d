"""What became of one case of the ONNX backend suite, judged by ONNX Runtime alone on the file that was written.

The bound on the error is what rounding makes unavoidable, times a margin, and not a number of decibels: a graph of
one operator with the suite's values may cancel, divide by little, or be an ArgMax, and then no 8 bits help. The float
model is therefore run once more with every tensor rounded: inputs and, for 8-bit activations, all that nodes make to
8 bits over their range, constants to the bits of the recipe in its blocks. The root mean square of what that changes
in an output, the most of all samples, with half a step of 8 bits added, is the noise that rounding makes. Where ranges
are calibrated, a sample with values beyond them saturates, whatever compiled it: of that sample alone the bound is what
rounding within the calibrated ranges makes, if that is more. A result may have `MARGIN` times as much noise, as other
codes are rounded elsewhere. Outputs that are no floats may differ in so many places, measured likewise, and NaN and
infinities must stand where they stood. A result in which nothing is integer has to be the float model's to `SAME` of its
range (to that of half precision where it works in that).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from backend_noise import noisy, ranges_of, rounded
from backend_runner import LEVELS, Runner, ends, is_float, widened

MARGIN = 3.0
SAME = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-4, "float64": 1e-4}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a case: one of `qcompile`'s answers, and why."""

    outcome: str
    why: str = ""


def usable(
    runner: Runner, calibrating: Sequence[Mapping[str, Any]], judging: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]], bool]:
    """The feeds of either kind that are alike, and whether runs repeat.

    Alike are feeds that make outputs of the shapes, NaN and infinities of the first one's.

    Raises:
        Exception: ONNX Runtime cannot run the first.
    """
    first, again = runner.run(calibrating[0]), runner.run(calibrating[0])
    repeats = all(
        _alike(a, b, exact=True)
        for level, values in again.items()
        for a, b in zip(values, first[level], strict=True)
    )
    known = [feed for feed in calibrating if _like(runner, feed, first["all"])]
    fresh = [feed for feed in judging if _like(runner, feed, first["all"])]
    return known, fresh, repeats


def _like(runner: Runner, feed: Mapping[str, Any], first: Sequence[Any]) -> bool:
    """Whether the outputs for a feed are like the first ones."""
    try:
        made = runner.run(feed)["all"]
    except Exception:  # noqa: BLE001 - ORT raises a dozen classes
        return False
    return all(map(_alike, made, first))


def _alike(a: Any, b: Any, *, exact: bool = False) -> bool:
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return repr(a) == repr(b) if exact else type(a) is type(b)
    if a.shape != b.shape:
        return False
    if not is_float(a):
        return not exact or bool((a == b).all())
    if exact:
        return np.array_equal(widened(a), widened(b), equal_nan=True)
    return bool((np.isfinite(widened(a)) == np.isfinite(widened(b))).all())


def error(wanted: Any, got: Any) -> float:
    """Of one output: of floats the rms of the difference, of others the share that differs; inf if nothing compares."""
    if not isinstance(wanted, np.ndarray) or not isinstance(got, np.ndarray):
        return 0.0 if _same(wanted, got) else math.inf
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return math.inf
    if wanted.size == 0:
        return 0.0
    if not is_float(wanted):
        return float((wanted != got).mean())
    y, z = widened(wanted), widened(got)
    known = np.isfinite(y)
    if not np.array_equal(y[~known], z[~known], equal_nan=True) or not np.isfinite(z[known]).all():
        return math.inf
    return float(np.sqrt(np.square(z[known] - y[known]).mean())) if known.any() else 0.0


def _same(a: Any, b: Any) -> bool:
    """Whether sequences or maps are equal, floats to within rounding."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return (
            np.allclose(a, b, 1e-3, 1e-5, equal_nan=True) if is_float(a) else bool((a == b).all())
        )
    return repr(a) == repr(b)


def span(array: Any) -> float:
    """The range of an output with zero in it; 1 for what has no range."""
    if not isinstance(array, np.ndarray) or not is_float(array):
        return 1.0
    low, high = ends(array)
    return max(high, 0.0) - min(low, 0.0)


class Judge:
    """The float model on feeds that it takes, against which files are judged.

    Args:
        model: the float model, which ONNX Runtime runs.
        calibrating: feeds whose ranges are those of the result.
        feeds: that it is judged on.
        repeats: whether the model makes the same of the same; otherwise only shapes are compared.
    """

    def __init__(
        self, model: onnx.ModelProto, calibrating: Sequence[Mapping[str, Any]],
        feeds: Sequence[Mapping[str, Any]], *, repeats: bool,
    ) -> None:  # fmt: skip
        self.model, self.calibrating, self.feeds, self.repeats = model, calibrating, feeds, repeats
        self.before = Runner(model)
        self.wanted = [self.before.run(feed) for feed in feeds]
        self._noise: dict[tuple[int | None, bool], list[list[float]]] = {}

    def __call__(
        self, result: Path, integer: int, bits: int | None, *, calibrated: bool
    ) -> Verdict:
        """Whether a file that was written is valid, and as near to the float model as it can be.

        Args:
            result: the file.
            integer: nodes that became integer.
            bits: of the weights; None: 8, and activations, too.
            calibrated: whether activations have ranges of the samples that calibrated.
        """
        try:
            onnx.checker.check_model(str(result))
        except Exception as problem:  # noqa: BLE001 - protobuf and the checker raise what they like
            if _checks(self.model):
                return Verdict("invalid", f"checker: {_line(problem)}")
        try:
            after = Runner(result)
        except Exception as problem:  # noqa: BLE001
            return Verdict("invalid", f"does not load: {_line(problem)}")
        if self.before.signature != after.signature:
            return Verdict("invalid", f"has {after.signature}, not {self.before.signature}")
        worst = 0.0
        for number, feed in enumerate(self.feeds):
            try:
                got = after.run(feed)
            except Exception as problem:  # noqa: BLE001
                return Verdict("wrong", f"sample {number} does not run: {_line(problem)}")
            for level in LEVELS:
                allowed = (
                    self._allowed(number, level, bits, calibrated=calibrated)
                    if integer
                    else self._same(number, level)
                )
                names = [output.name for output in self.before.sessions[level].get_outputs()]
                rows = zip(names, self.wanted[number][level], got[level], allowed, strict=True)
                for name, y, z, most in rows:
                    found = error(y, z) if self.repeats else float(np.shape(y) != np.shape(z))
                    if found > most:
                        where = f"output {name}, sample {number}, optimization {level}"
                        return Verdict(
                            "wrong",
                            f"{where}: error {found:.3g} in {span(y):.3g}, at most {most:.3g}",
                        )
                    worst = max(worst, found / most if most else 0.0)
        return Verdict("right" if integer else "nothing", f"{worst:.2f} of the bound")

    def _same(self, number: int, level: str) -> list[float]:
        """The largest error of each output where nothing is integer."""
        return [
            SAME.get(y.dtype.name, 0.0) * span(y) if isinstance(y, np.ndarray) and y.size else 0.0
            for y in self.wanted[number][level]
        ]

    def _allowed(
        self, number: int, level: str, bits: int | None, *, calibrated: bool
    ) -> list[float]:
        """The largest error of each output of a sample where something is."""
        key = (bits, calibrated)
        if key not in self._noise:
            self._noise[key] = self._noise_of(bits, calibrated=calibrated)
        return [
            MARGIN * (noise + (span(y) / 255 / 2 if _has_steps(y) else 0.0))
            for y, noise in zip(self.wanted[number][level], self._noise[key][number], strict=True)
        ]

    def _noise_of(self, bits: int | None, *, calibrated: bool) -> list[list[float]]:
        """What rounding changes in each output, by sample: the most of all samples, and what saturates in its own."""
        if bits is not None:
            return self._worst(self._changes(noisy(self.model, bits, {})))
        known = ranges_of(self.model, self.calibrating)
        fresh = ranges_of(self.model, self.feeds)
        whole = {
            name: (min(low, fresh[name][0]), max(high, fresh[name][1]))
            for name, (low, high) in known.items()
            if name in fresh
        }
        noise = self._worst(self._changes(noisy(self.model, bits, whole)))
        if not calibrated or whole == known:
            return noise
        cut = self._changes(noisy(self.model, bits, known))
        return [list(map(max, a, b)) for a, b in zip(noise, cut, strict=True)]

    @staticmethod
    def _worst(changes: list[list[float]]) -> list[list[float]]:
        """The most of all samples, for each of them."""
        return [list(map(max, zip(*changes, strict=True)))] * len(changes)

    def _changes(self, runners: Sequence[Runner]) -> list[list[float]]:
        """By sample, what changes in each output: the most of all ways to round."""
        found = []
        for feed, wanted in zip(self.feeds, self.wanted, strict=True):
            small = {
                name: rounded(value, 8) if getattr(value, "dtype", None) == np.float32 else value
                for name, value in feed.items()
            }
            noise = [0.0] * len(wanted["all"])
            for runner in runners:
                for level, values in runner.run(small).items():
                    pairs = zip(noise, wanted[level], values, strict=True)
                    noise = [max(most, error(y, z)) for most, y, z in pairs]
            found.append(noise)
        return found


def _has_steps(output: Any) -> bool:
    return isinstance(output, np.ndarray) and is_float(output)


def _checks(model: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError:
        return False
    return True


def _line(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(problem).__name__
