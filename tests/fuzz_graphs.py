"""Random valid models from a grammar of the operators that qcompile rewrites, and samples for them.

A graph grows from its inputs: each step takes a value that is there and adds an operator, or a few that belong
together. What is drawn comes from a `random.Random`, so that hypothesis can draw it, too, and make failures small.
Shapes are those of one sample; the first dimension may be declared as dynamic.
"""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import numpy as np
import onnx
from fuzz_grower import Grower, Sample, numbers
from fuzz_steps import STEPS
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]
Feed = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A model and its inputs."""

    model: onnx.ModelProto
    samples: tuple[Sample, ...]
    extreme: bool

    def feeds(self, count: int, seed: int) -> list[Feed]:
        """So many samples, the same for the same seed."""
        rng = np.random.default_rng([3, seed])
        return [{s.name: _sample(rng, s) for s in self.samples} for _ in range(count)]


def _sample(rng: np.random.Generator, sample: Sample) -> Array:
    if sample.kind == "ids":
        return rng.integers(0, sample.high, sample.shape)
    return numbers(rng, sample.shape, sample.kind)


def draw(random: Random, *, most: int = 14, extreme: bool = False, wide: bool = False) -> Drawn:
    """A model of up to `most` steps; `extreme` ones hold numbers near the ends of float32, `wide` ones large matrices."""
    g = Grower(random, extreme=extreme, wide=wide)
    for _ in range(1 if g.chance(0.8) else 2):
        g.input()
    for _ in range(random.randint(1, most)):
        g.pick(STEPS)(g)
    read = {name for node in g.nodes for name in node.input}
    made = [(n, s) for n, s in g.live if n not in {x.name for x in g.samples}]
    ends = [(n, s) for n, s in made if n not in read]
    inner = [(n, s) for n, s in made if n in read]
    if inner and g.chance(0.3):
        ends.append(g.pick(inner))
    if not ends:  # nothing was added
        name, shape = g.live[0]
        ends = [(g.node("Relu", [name], shape), shape)]
    if len(ends) > 4:
        ends = ends[-4:]
    dynamic = g.chance(0.5)
    inputs = [
        _info(s.name, s.shape, dynamic=dynamic, kind=7 if s.kind == "ids" else 1) for s in g.samples
    ]
    outputs = [_info(n, s, dynamic=True) for n, s in ends]
    weights = [numpy_helper.from_array(values, name) for name, values in g.weights.items()]
    graph = helper.make_graph(g.nodes, "fuzz", inputs, outputs, weights)
    opset = 17
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return Drawn(model, tuple(g.samples), extreme)


def _info(
    name: str, shape: tuple[int, ...], *, dynamic: bool, kind: int = 1
) -> onnx.ValueInfoProto:
    dims: list[int | str] = list(shape)
    if dynamic:
        dims = [f"{name}_{i}" if i == 0 or kind == 0 else d for i, d in enumerate(dims)]
    return helper.make_tensor_value_info(name, kind, dims)
