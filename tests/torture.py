"""Graphs that break quantizers, as cases: a model, its samples, and how the result is judged.

The file that was written is judged apart from the compiler: by ORT alone, with optimizations and
without, on samples that calibrated nothing, each part of an output for itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from qcompile import compile_model
from qcompile.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from qcompile.recipe import Format
    from qcompile.report import Result

    Array = NDArray[Any]
    Feed = dict[str, Array]
    Part = tuple[str, int, int, int]  # output, axis, start, stop

LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
SAMPLES, FRESH = 12, 8
PAD = "pads = [1, 1, 1, 1]"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and what is expected of its result.

    Attributes:
        model: the float model.
        feed: draws one sample.
        least: decibels that every part of every output must have.
        parts: parts that mean different things, judged beside the whole outputs.
        integer: so many planned nodes run on integer kernels, at least.
        check: further claims on the result and the written model.
    """

    model: onnx.ModelProto
    feed: Callable[[np.random.Generator], Feed]
    least: float = 25.0
    parts: tuple[Part, ...] = ()
    integer: int = 1
    check: Callable[[Result, onnx.ModelProto], None] = lambda result, model: None


class Suite:
    """The cases of one file, by name."""

    def __init__(self) -> None:
        self.makers: dict[str, Callable[[], Case]] = {}

    def __call__(self, name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
        """Registers what it decorates under `name`."""

        def register(make: Callable[[], Case]) -> Callable[[], Case]:
            assert name not in self.makers
            self.makers[name] = make
            return make

        return register


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng([7, seed])


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    """A weight that keeps the size of what it multiplies: (in, out), or (out, in, ...)."""
    fan = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
    return (random(seed).normal(size=shape) * scale / np.sqrt(max(fan, 1))).astype(np.float32)


def offset(size: int, seed: int = 9, scale: float = 0.5) -> Array:
    """A bias."""
    return (random(seed).normal(size=size) * scale).astype(np.float32)


def floats(**shapes: tuple[int, ...]) -> Callable[[np.random.Generator], Feed]:
    """Normal floats for each input."""
    return lambda rng: {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }


def feeds(case: Case, count: int, seed: int) -> list[Feed]:
    """Samples, the same for the same seed."""
    return [case.feed(random(seed + i)) for i in range(count)]


def compile_case(
    case: Case, folder: Path, *, form: Format = "auto", goal: float = 0.0
) -> tuple[Result, onnx.ModelProto]:
    """What became of the case, and the model in the file that was written.

    Without a goal nothing is left float because it was measured to be harmful.
    """
    path = folder / "result.onnx"
    before = case.model.SerializeToString()
    recipe = Recipe(bench_seconds=0.01, threads=1, sqnr_goal=goal, format=form)
    result = compile_model(case.model, feeds(case, SAMPLES, 0), output=path, recipe=recipe)
    assert case.model.SerializeToString() == before, "the input was changed"
    return result, onnx.load(path)


def assert_right(case: Case, folder: Path, form: Format) -> None:
    """The case compiles into a valid model that computes the same, and does run on integer kernels."""
    result, model = compile_case(case, folder, form=form)
    onnx.checker.check_model(model)
    low = {name: db for name, db in errors(case, model).items() if db < case.least}
    assert not low, (low, result.notes)
    integer = [v["node"] for v in result.kernels["nodes"] if v["verdict"] == "integer"]
    assert len(integer) >= case.integer, (result.kernels, result.kept_float)
    assert not [v for v in result.kernels["nodes"] if v["verdict"] == "leftover"]
    case.check(result, model)


def session(model: onnx.ModelProto, level: str) -> ort.InferenceSession:
    """The model in ORT."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = LEVELS[level]
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def face(model: ort.InferenceSession) -> list[tuple[str, str, int]]:
    """Names, types and ranks of inputs and outputs."""
    return [(v.name, v.type, len(v.shape)) for v in (*model.get_inputs(), *model.get_outputs())]


def errors(case: Case, model: onnx.ModelProto) -> dict[str, float]:
    """Decibels of each part of each output on new samples, at both levels."""
    plain = session(case.model, "off")
    names = [value.name for value in plain.get_outputs()]
    whole: list[Part] = [(name, 0, -1, -1) for name in names]
    found: dict[str, float] = {}
    for level in LEVELS:
        ours = session(model, level)
        assert face(ours) == face(plain), "inputs or outputs changed"
        sums = {part: np.zeros(2) for part in (*whole, *case.parts)}
        for feed in feeds(case, FRESH, 1000):
            wanted = dict(zip(names, plain.run(names, feed), strict=True))
            got = dict(zip(names, ours.run(names, feed), strict=True))
            for part, total in sums.items():
                name, axis, start, stop = part
                assert got[name].dtype == wanted[name].dtype
                assert got[name].shape == wanted[name].shape
                if wanted[name].dtype.kind == "f":
                    index = (slice(None),) * axis + (slice(start, stop),) if stop >= 0 else ...
                    total += _powers(wanted[name][index], got[name][index])  # noqa: PLW2901
        for (name, _, start, stop), (power, noise) in sums.items():
            where = name if stop < 0 else f"{name}[{start}:{stop}]"
            found[f"{where} {level}"] = _decibels(power, noise)
    return found


def _powers(y: Array, z: Array) -> Array:
    """Of the values and of their error; infinities must be the same."""
    y, z = y.astype(np.float64), z.astype(np.float64)
    known = np.isfinite(y)
    assert np.isfinite(z[known]).all(), "values were lost"
    assert np.array_equal(y[~known], z[~known], equal_nan=True)
    return np.array(
        [
            np.square(y[known]).sum(),
            np.square(z - y, where=known, out=np.zeros_like(y))[known].sum(),
        ]
    )


def _decibels(power: float, noise: float) -> float:
    return float(np.inf if noise == 0 else 10 * np.log10(max(power, 1e-300) / noise))


def initializers(model: onnx.ModelProto) -> dict[str, Array]:
    """The constants of the main graph."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
