"""A graph that grows step by step from its inputs, for random models, and the numbers that samples and weights hold.

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
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
Feed = dict[str, Array]
SIDES = (1, 2, 3, 5, 7, 8, 13)
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 32, 64, 16, 24, 33, 48)
WIDE = (16, 40, 64, 96, 128)
MOST = 1 << 15  # elements of a tensor
RANGES = ("normal",) * 10 + (
    "constant", "zero", "positive", "negative", "tiny", "denormal", "large", "outlier", "mixed",
)  # fmt: skip
EXTREME = ("1e30", "infinitesimal")  # more than arithmetic in float32 is made for


@dataclasses.dataclass(frozen=True)
class Sample:
    """How the samples of one input are drawn."""

    name: str
    shape: tuple[int, ...]
    kind: str  # of RANGES or EXTREME, or `ids`
    high: int = 0  # of ids


def numbers(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Array:
    """float32 numbers of a kind of range."""
    x = rng.normal(size=shape)
    match kind:
        case "constant":
            x = np.full(shape, 0.7)
        case "zero":
            x = np.zeros(shape)
        case "positive":
            x = np.abs(x) + 0.5
        case "negative":
            x = -np.abs(x) - 0.01
        case "tiny":
            x *= 1e-12
        case "denormal":
            x *= 1e-40
        case "large":
            x *= 1e4
        case "1e30":
            x *= 1e30
        case "infinitesimal":
            x *= 1e-30
        case "outlier" if x.size:
            x.reshape(-1)[:1] *= 200
        case "mixed" if x.ndim and x.size:
            x = x * 10.0 ** rng.uniform(-3, 2, (shape[0],) + (1,) * (x.ndim - 1))
    return x.astype(np.float32)


class Grower:
    """A graph under construction. `live`: values with their shapes, all float32."""

    def __init__(self, random: Random, *, extreme: bool = False, wide: bool = False) -> None:
        """With `wide` matrices are large enough for weights of few bits."""
        self.wide, self.widths = wide, WIDE if wide else WIDTHS
        self.random, self.extreme = random, extreme
        self._rng = np.random.default_rng(random.getrandbits(32))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.live: list[tuple[str, tuple[int, ...]]] = []
        self.samples: list[Sample] = []
        self._count = 0

    # What is drawn.

    def pick(self, options: Any) -> Any:
        return self.random.choice(list(options))

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def _range(self) -> str:
        kinds = RANGES + EXTREME * 3 if self.extreme else RANGES
        return str(self.pick(kinds))

    # What is built.

    def fresh(self, stem: str) -> str:
        self._count += 1
        return f"{stem}{self._count}"

    def node(
        self,
        op: str,
        inputs: list[str],
        *shapes: tuple[int, ...],
        live: bool = True,
        **attributes: Any,
    ) -> Any:
        """The name of the result, or the names if it has several."""
        outputs = [self.fresh("v") for _ in shapes]
        name = "" if self.chance(0.1) else self.fresh(op)
        self.nodes.append(helper.make_node(op, inputs, outputs, name, **attributes))
        if live:
            self.live += zip(outputs, shapes, strict=True)
        return outputs[0] if len(outputs) == 1 else outputs

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """Parameters that are no weights: shapes, bounds, scalars."""
        name = self.fresh("c")
        array = np.asarray(values, dtype)
        if self.chance(0.3):
            tensor = numpy_helper.from_array(array, name)
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.weights[name] = array
        return name

    def weight(self, shape: tuple[int, ...], fan: int = 1) -> str:
        """A weight, perhaps shared, perhaps behind operators on constants."""
        alike = [
            name for name, array in self.weights.items() if array.shape == shape and name[0] == "w"
        ]
        if alike and self.chance(0.3):
            return str(self.pick(alike))
        kind = self._range() if self.chance(0.3) else "normal"
        values = numbers(self._rng, shape, kind) / np.float32(max(fan, 1) ** 0.5)
        name = self.fresh("w")
        how = self.pick(("plain",) * 6 + ("Constant", "Identity", "Cast", "Transpose", "half"))
        if how == "Transpose" and len(shape) == 2:
            self.weights[name] = np.ascontiguousarray(values.T)
            return str(self.node("Transpose", [name], shape, live=False, perm=[1, 0]))
        if how in ("Cast", "half"):
            kind_of = np.float64 if how == "Cast" else np.float16
            with np.errstate(over="ignore"):
                narrow = values.astype(kind_of)
            if np.isfinite(narrow).all():
                self.weights["n" + name] = narrow
                return str(self.node("Cast", ["n" + name], shape, live=False, to=TensorProto.FLOAT))
        if how == "Constant":
            tensor = numpy_helper.from_array(values, name)
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
            return name
        self.weights[name] = values
        if how == "Identity":
            return str(self.node("Identity", [name], shape, live=False))
        return name

    def value(self, *ranks: int) -> tuple[str, tuple[int, ...]] | None:
        """One that is there, rather a late one, without an axis of no length."""
        found = [(n, s) for n, s in self.live if (not ranks or len(s) in ranks) and 0 not in s]
        if not found:
            return None
        return found[-1] if self.chance(0.6) else self.pick(found)

    def input(self) -> None:
        """One more input, of floats or of ids that index a table."""
        name = f"x{len(self.samples)}"
        n = self.pick((1, 1, 1, 2))
        families = ("map", "map", "map", "signal", "rows", "rows", "sequence", "ids")
        family = self.pick(families[4:] if self.wide else families)
        width = self.pick(self.widths)
        if family == "map":
            shape = (n, width, self.pick(SIDES), self.pick(SIDES))
        elif family == "rows":
            shape = (n, width)
        else:
            shape = (n, self.pick(SIDES), width)
        if family == "ids":
            high = self.pick((1, 5, 40))
            self.samples.append(Sample(name, shape[:2], "ids", high))
            table = self.weight((high, width))
            self.node("Gather", [table, name], shape)
            return
        kind = self._range() if self.chance(0.4) else "normal"
        self.samples.append(Sample(name, shape, kind))
        self.live.append((name, shape))
