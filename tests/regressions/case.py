"""Graphs that break quantizers, as cases: a model, its samples, and what is expected of every recipe.

The file that was written is judged apart from the compiler: by ORT alone, with optimizations and
without, on samples that calibrated nothing, each part of an output for itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qcompile.report import Result

    Array = NDArray[Any]
    Feed = dict[str, Array]
    Part = tuple[str, int, int, int]  # output, axis, start, stop

LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
PAD = "pads = [1, 1, 1, 1]"


@dataclasses.dataclass(frozen=True)
class Done:
    """What a recipe made of a case.

    Attributes:
        recipe: one of `regressions.recipes.RECIPES`.
        result: what `compile_model` says.
        model: the file that was written.
        quantized: names of the nodes that run on integer kernels or on weights of few bits.
    """

    recipe: str
    result: Result
    model: onnx.ModelProto
    quantized: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and what is expected of its results.

    Attributes:
        model: the float model.
        feed: draws one sample.
        static: so many nodes run on integer kernels with scales from data, at least.
        dynamic: the same for kernels that find scales as they run, with or without data.
        bits: the same for kernels for weights of few bits.
        least: decibels that every part of every output must have, with 8 bits for activations.
        least4, least8: the same with weights of 4 and of 8 bits; the first is what rounding to nearest gives.
        bounds: decibels for single recipes, in place of these.
        parts: parts that mean different things, judged beside the whole outputs.
        refused: words of the sentence that refuses the model: by recipe, or "" for all.
        nothing: words of the reason why nothing is quantized, by recipe.
        options: of the recipes of few bits, beside those of all cases.
        check: further claims on what was made, by whatever recipe.
    """

    model: onnx.ModelProto
    feed: Callable[[np.random.Generator], Feed]
    static: int = 0
    dynamic: int = 0
    bits: int = 0
    least: float = 25.0
    least4: float = 13.0
    least8: float = 30.0
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    nothing: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    check: Callable[[Done], None] = lambda done: None


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


class Truth:
    """What the float model of a case computes on samples that calibrate nothing."""

    def __init__(self, case: Case, fresh: int) -> None:
        self.case = case
        plain = session(case.model, "off")
        self.face = face(plain)
        self.names = [value.name for value in plain.get_outputs()]
        self.feeds = feeds(case, fresh, 1000)
        self.outputs = [dict(zip(self.names, plain.run(None, f), strict=True)) for f in self.feeds]

    def errors(self, model: onnx.ModelProto) -> dict[str, float]:
        """Decibels of each part of each output, at both levels.

        Raises:
            AssertionError: inputs, outputs, types or shapes are others, or values were lost.
        """
        whole: list[Part] = [(name, 0, -1, -1) for name in self.names]
        found: dict[str, float] = {}
        for level in LEVELS:
            ours = session(model, level)
            assert face(ours) == self.face, "inputs or outputs changed"
            sums = {part: np.zeros(2) for part in (*whole, *self.case.parts)}
            for feed, wanted in zip(self.feeds, self.outputs, strict=True):
                got = dict(zip(self.names, ours.run(self.names, feed), strict=True))
                for part, total in sums.items():
                    total += _part_powers(wanted[part[0]], got[part[0]], part)  # noqa: PLW2901
            for (name, _, start, stop), (power, noise) in sums.items():
                where = name if stop < 0 else f"{name}[{start}:{stop}]"
                found[f"{where} {level}"] = _decibels(power, noise)
        return found


def _part_powers(wanted: Array, got: Array, part: Part) -> Array:
    _, axis, start, stop = part
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    if wanted.dtype.kind != "f":
        return np.zeros(2)
    index = (slice(None),) * axis + (slice(start, stop),) if stop >= 0 else ...
    return _powers(wanted[index], got[index])


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


def nodes_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a graph and of its bodies."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                found += nodes_of(body)
    return found


def one_payload(size: int) -> Callable[[Done], None]:
    """A claim: numbers of a weight of `size` are stored once, whatever became of them."""

    def check(done: Done) -> None:
        # scales take less than a half of the smallest codes
        large = {k: v.nbytes for k, v in initializers(done.model).items() if v.nbytes >= size // 2}
        assert len(large) == 1, large

    return check


def no_floats(limit: int) -> Callable[[Done], None]:
    """A claim: no float weight of more than `limit` numbers is left where anything was quantized."""

    def check(done: Done) -> None:
        kept = {
            k: v.shape
            for k, v in initializers(done.model).items()
            if v.dtype in (np.float32, np.float16) and v.size > limit
        }
        assert not (kept and done.quantized), kept

    return check
