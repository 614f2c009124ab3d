"""What became of one case of the ONNX backend suite, judged by ONNX Runtime alone on the file that was written.

The bound on the error is what rounding makes unavoidable, times a margin, and not a number of decibels: a graph of
one operator with the suite's values may cancel, divide by little, or be an ArgMax, and then no 8 bits help. The float
model is therefore run once more with every tensor rounded: inputs and, for 8-bit activations, all that nodes make to
8 bits over the range that calibrated, beyond which they saturate, constants to the bits of the recipe in its blocks. The root mean square of what that changes
in an output, the most of all samples, with half a step of 8 bits added, is the noise that rounding makes. A result
may have `MARGIN` times as much, as other codes are rounded elsewhere. Outputs that are no floats may differ in so many
places, measured likewise, and NaN and infinities must stand where they stood. A result in which nothing is integer
has to be the float model's to `SAME` of its range (to that of half precision where it works in that).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import numpy_helper

Array = npt.NDArray[Any]
MARGIN = 3.0
SAME = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-4, "float64": 1e-4}
LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a case: one of `qcompile`'s answers, and why."""

    outcome: str
    why: str = ""


class Runner:
    """A model in ONNX Runtime, optimized (`all`) and as it is written (`off`)."""

    def __init__(
        self, model: onnx.ModelProto | Path, levels: Sequence[str] = tuple(LEVELS)
    ) -> None:
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        self.sessions = {name: _session(source, LEVELS[name]) for name in levels}

    def run(self, feed: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The outputs by level."""
        return {name: session.run(None, dict(feed)) for name, session in self.sessions.items()}

    @property
    def signature(self) -> list[tuple[str, str, int]]:
        """Name, type and rank of the inputs, then of the outputs."""
        session = self.sessions["all"]
        values = (*session.get_inputs(), *session.get_outputs())
        return [(value.name, value.type, len(value.shape or ())) for value in values]


def _session(source: bytes | str, level: ort.GraphOptimizationLevel) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = level
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


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


def _ends(output: Any) -> tuple[float, float]:
    """The least and the largest finite value of an output of floats, 0 where there is none."""
    if not isinstance(output, np.ndarray) or not _is_float(output):
        return 0.0, 0.0
    values = _wide(output)
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def _alike(a: Any, b: Any, *, exact: bool = False) -> bool:
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return repr(a) == repr(b) if exact else type(a) is type(b)
    if a.shape != b.shape:
        return False
    if not _is_float(a):
        return not exact or bool((a == b).all())
    if exact:
        return np.array_equal(_wide(a), _wide(b), equal_nan=True)
    return bool((np.isfinite(_wide(a)) == np.isfinite(_wide(b))).all())


def _is_float(array: Array) -> bool:
    return "float" in array.dtype.name


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def error(wanted: Any, got: Any) -> float:
    """Of one output: of floats the rms of the difference, of others the share that differs; inf if nothing compares."""
    if not isinstance(wanted, np.ndarray) or not isinstance(got, np.ndarray):
        return 0.0 if _same(wanted, got) else math.inf
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return math.inf
    if wanted.size == 0:
        return 0.0
    if not _is_float(wanted):
        return float((wanted != got).mean())
    y, z = _wide(wanted), _wide(got)
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
            np.allclose(a, b, 1e-3, 1e-5, equal_nan=True) if _is_float(a) else bool((a == b).all())
        )
    return repr(a) == repr(b)


def span(array: Any) -> float:
    """The range of an output with zero in it; 1 for what has no range."""
    if not isinstance(array, np.ndarray) or not _is_float(array):
        return 1.0
    low, high = _ends(array)
    return max(high, 0.0) - min(low, 0.0)


def rounded(values: Array, bits: int) -> Array:
    """The nearest of 2^bits values that are spread evenly over the range with zero in it."""
    known = np.isfinite(_wide(values)) if values.size else np.zeros(0, bool)
    if not known.any():
        return values
    wide = _wide(values)
    low, high = min(wide[known].min(), 0.0), max(wide[known].max(), 0.0)
    step = (high - low) / (2**bits - 1)
    if step == 0 or not np.isfinite(step):
        return values
    made = np.where(known, np.round(wide / step) * step, wide)
    return made.astype(values.dtype)


def _in_blocks(values: Array, bits: int, axis: int) -> Array:
    """The same for each 32 values along an axis by themselves."""
    made = np.moveaxis(values.copy(), axis, -1)
    rows = made.reshape(-1, made.shape[-1])
    for row in rows:
        for start in range(0, len(row), 32):
            row[start : start + 32] = rounded(row[start : start + 32], bits)
    return np.moveaxis(rows.reshape(made.shape), -1, axis)


def _constants(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        if node.op_type == "Constant":
            yield from (item.t for item in node.attribute if item.name == "value")


def _ranges(
    model: onnx.ModelProto, feeds: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[float, float]]:
    """The range of each float32 tensor that a node of the main graph makes, where ORT gives all of them."""
    inferred = onnx.shape_inference.infer_shapes(model)
    known = {value.name: value for value in (*inferred.graph.value_info, *inferred.graph.output)}
    made = [name for node in model.graph.node for name in node.output]
    floats = [
        name for name in made
        if name in known and known[name].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    ]  # fmt: skip
    copied = copy.deepcopy(model)
    del copied.graph.output[:]
    copied.graph.output.extend(known[name] for name in floats)
    try:
        session = _session(copied.SerializeToString(), LEVELS["off"])
        runs = [session.run(floats, dict(feed)) for feed in feeds] if floats else []
    except Exception:  # noqa: BLE001 - then only what goes in is rounded
        return {}
    ends = [[_ends(value) for value in values] for values in zip(*runs, strict=True)]
    return {
        name: (min(low for low, _ in pairs), max(high for _, high in pairs))
        for name, pairs in zip(floats, ends, strict=True)
    }


def _round_results(model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]]) -> None:
    """`node -> v` becomes `node -> raw -> Quantize -> Dequantize -> v`, in ORT's domain, which has no opset to fit."""
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            low, high = ranges.get(name, (0.0, 0.0))
            step = (max(high, 0.0) - min(low, 0.0)) / 255
            if not 1e-30 < step < 1e30:
                continue
            zero = round(-min(low, 0.0) / step)
            raw, scale, point, codes = (
                f"{name}__{part}" for part in ("raw", "scale", "zero", "codes")
            )
            node.output[i] = raw
            model.graph.initializer.append(
                numpy_helper.from_array(np.array(step, np.float32), scale)
            )
            model.graph.initializer.append(numpy_helper.from_array(np.array(zero, np.uint8), point))
            for op, source, result in (
                ("QuantizeLinear", raw, codes),
                ("DequantizeLinear", codes, name),
            ):
                nodes.append(onnx.helper.make_node(op, [source, scale, point], [result], domain="com.microsoft"))  # fmt: skip
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if all(item.domain != "com.microsoft" for item in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    model.ir_version = max(model.ir_version, 4)


def _roundings(bits: int | None) -> list[Callable[[Array], Array]]:
    """How constants may be rounded: as a whole to 8 bits, or by blocks along either of the last two axes."""
    if bits is None:
        return [lambda values: rounded(values, 8)]

    def along(axis: int) -> Callable[[Array], Array]:
        return lambda values: _in_blocks(values, bits, axis) if values.ndim > 1 else values

    return [along(-1), along(-2)]


def noisy(
    model: onnx.ModelProto, bits: int | None, feeds: Sequence[Mapping[str, Any]]
) -> list[Runner]:
    """The model with rounded constants, once for each way; with activations of 8 bits, all else rounded as well."""
    runners = []
    ranges = _ranges(model, feeds) if bits is None else {}
    for way in _roundings(bits):
        copied = copy.deepcopy(model)
        _round_results(copied, ranges)
        for tensor in _constants(copied):
            values = numpy_helper.to_array(tensor)
            if values.dtype == np.float32 and values.size > 1:
                name = tensor.name
                tensor.CopyFrom(numpy_helper.from_array(way(values), name))
        runners.append(Runner(copied, ["off"]))  # ORT would make integer kernels of what is here
    return runners


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
        self._noise: dict[int | None, list[float]] = {}

    def __call__(self, result: Path, integer: int, bits: int | None) -> Verdict:
        """Whether a file that was written is valid, and as near to the float model as it can be.

        Args:
            result: the file.
            integer: nodes that became integer.
            bits: of the weights; None: 8, and activations, too.
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
                    self._allowed(number, level, bits) if integer else self._same(number, level)
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

    def _allowed(self, number: int, level: str, bits: int | None) -> list[float]:
        """The largest error of each output where something is."""
        if bits not in self._noise:
            self._noise[bits] = self._noise_of(noisy(self.model, bits, self.calibrating))
        return [
            MARGIN * (noise + (span(y) / 255 / 2 if _has_steps(y) else 0.0))
            for y, noise in zip(self.wanted[number][level], self._noise[bits], strict=True)
        ]

    def _noise_of(self, runners: Sequence[Runner]) -> list[float]:
        """What rounding changes in each output: the most of all feeds and ways to round."""
        noise = [0.0] * len(self.wanted[0]["all"])
        for feed, wanted in zip(self.feeds, self.wanted, strict=True):
            small = {
                name: rounded(value, 8) if getattr(value, "dtype", None) == np.float32 else value
                for name, value in feed.items()
            }
            for runner in runners:
                for level, values in runner.run(small).items():
                    pairs = zip(noise, wanted[level], values, strict=True)
                    noise = [max(most, error(y, z)) for most, y, z in pairs]
        return noise


def _has_steps(output: Any) -> bool:
    return isinstance(output, np.ndarray) and _is_float(output)


def _checks(model: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError:
        return False
    return True


def _line(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(problem).__name__
