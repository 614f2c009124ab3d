"""Some layers of a quantized file, each run alone by ONNX Runtime on a few outputs, against the float weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.errors import PassError
from qcompile.graph.edit import array, attribute, nodes
from qcompile.graph.linear import Linear
from qcompile.quant.nbits import unpack_rows
from qcompile.run.session import Options, Session
from qcompile.solve.slabs import contiguous, mapped

OUTPUTS = 256  # of a layer that are run
SAMPLES = 64  # rows of random input
_TIMES = 1.5  # how far the error of the output may be from that of the weights: chance is 0.2 of it
_ROUNDING = {np.dtype(np.float32): 1e-3, np.dtype(np.float16): 1e-2}  # of the kernel's arithmetic


@dataclasses.dataclass(frozen=True)
class SpotCheck:
    """A layer that was run.

    Attributes:
        node: its name.
        op: the operator.
        weight: the error of the outputs' weights as they are stored, relative to the float ones.
        output: the error of the outputs for random inputs, which should be about the same.
    """

    node: str
    op: str
    weight: float
    output: float


def check_layers(
    model: ir.Model, layers: Sequence[tuple[Linear, float]], most: int
) -> tuple[SpotCheck, ...]:
    """At most so many layers, spread over the model, run as it stores them.

    Args:
        model: with operators of a few bits; its weights may stay in files.
        layers: float layers whose nodes have the same names there, and the relative error of the whole weight.
        most: of them.

    Raises:
        PassError: an error is greater than that of the weights explains.
    """
    number = min(most, len(layers))
    chosen = sorted({round(place) for place in np.linspace(0, len(layers) - 1, number)})
    named = {node.name: node for node in nodes(model)}
    return tuple(_check(named.get(layers[i][0].name), *layers[i]) for i in chosen)


def _check(node: ir.Node | None, item: Linear, error: float) -> SpotCheck:
    if node is None or node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
        raise PassError(f"the result has no node of few bits named {item.name!r}.")
    part = _Part(node, item)
    alone = part.run()
    made = SpotCheck(item.name, node.op_type, part.error(), relative(alone[0], alone[1]))
    slack = _ROUNDING[part.scale.dtype]
    whole = part.rows.size == item.shape[0]
    if abs(made.output - made.weight) > (_TIMES - 1) * made.weight + slack or (
        whole and abs(made.weight - error) > 1e-3 + 0.01 * error
    ):
        raise PassError(
            f"the outputs of {item.name} are off by {made.output:.2%}, the weights that are stored by "
            f"{made.weight:.2%}, those that were made by {error:.2%}: these should agree."
        )
    return made


def relative(found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    """The length of the difference over that of what was wanted; the former alone where that is 0."""
    exact = np.asarray(wanted, np.float64)
    size = float(np.linalg.norm(exact))
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact)) / (size or 1.0)


class _Part:
    """A node with some rows of its weight."""

    def __init__(self, node: ir.Node, item: Linear) -> None:
        self.node, (count, self.depth) = node, item.shape
        self.rows = np.unique(np.linspace(0, count - 1, min(OUTPUTS, count)).round().astype(int))
        self.product = node.op_type == "MatMulNBits"
        self.bits = int(attribute(node, "bits", 4))
        data = node.inputs[0 if not self.product else 1]
        producer = None if data is None else data.producer()
        if producer is not None:  # a table that is a head's matrix, in another shape
            data = producer.inputs[0]
        codes = self._taken(data)
        self.codes = codes if self.product else codes.reshape(len(codes), -1)
        self.scale, zero = (
            self._taken(node.inputs[2]),
            node.inputs[3] if len(node.inputs) > 3 else None,
        )
        self.zero = None if zero is None else self._taken(zero)
        weight = item.weight
        assert weight is not None
        with mapped(weight.tensor):
            self.weight = np.array(contiguous(weight, weight.moved()[self.rows]))
        if item.node.op_type == "Gemm":
            self.weight *= np.float32(attribute(item.node, "alpha", 1.0))

    def _taken(self, value: ir.Value | None) -> npt.NDArray[Any]:
        found = array(value)
        if found is None:
            raise PassError(f"{self.node.name} reads codes that are not constant.")
        taken: npt.NDArray[Any] = found[self.rows]
        return taken

    def stored(self) -> npt.NDArray[np.float32]:
        """The rows as they are stored, float32 (n, K)."""
        groups = self.scale.shape[1]
        size = int(attribute(self.node, "block_size", 0))
        codes = unpack_rows(self.codes.reshape(len(self.codes), -1), self.bits, self._wide())
        off = codes[:, : self.depth].astype(np.float32)
        zero = np.full(self.scale.shape, 1 << (self.bits - 1), np.uint8)
        if self.zero is not None:
            zero = unpack_rows(self.zero, self.bits, groups)
        off -= np.repeat(zero, size, axis=1)[:, : self.depth]
        off *= np.repeat(self.scale, size, axis=1)[:, : self.depth]
        return off

    def _wide(self) -> int:
        """Codes that a stored row has."""
        return self.codes.reshape(len(self.codes), -1).shape[1] * 8 // self.bits

    def error(self) -> float:
        """Of the stored rows, relative to the float ones."""
        return relative(self.stored(), self.weight)

    def run(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
        """What ONNX Runtime makes of the node, and what the float weight gives."""
        kind = self.scale.dtype
        if not self.product:
            ids = np.arange(len(self.rows))
            return self._run({"x": ids}, ("data", "x"))[:, : self.depth], self.weight
        x = np.random.default_rng(0).standard_normal((SAMPLES, self.depth)).astype(kind)
        return self._run({"x": x}, ("x", "data")), x.astype(np.float32) @ self.weight.T

    def _run(self, feed: dict[str, npt.NDArray[Any]], first: tuple[str, str]) -> npt.NDArray[Any]:
        parts = {"data": self.codes, "scale": self.scale} | (
            {} if self.zero is None else {"zero": self.zero}
        )
        values = {
            name: ir.Value(name=name, const_value=ir.Tensor(np.ascontiguousarray(held), name=name))
            for name, held in parts.items()
        }
        for name, value in values.items():
            value.type, value.shape = (
                ir.TensorType(ir.DataType.from_numpy(parts[name].dtype)),
                ir.Shape(parts[name].shape),
            )
        ((name, given),) = feed.items()
        values[name] = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(given.dtype)),
            shape=ir.Shape(given.shape),
        )
        attributes = {key: held.value for key, held in self.node.attributes.items()}
        if self.product:
            attributes |= {"N": len(self.rows), "accuracy_level": 1}
        order = [*first, "scale", *(["zero"] if self.zero is not None else [])]
        node = ir.node(
            self.node.op_type, [values[key] for key in order], attributes, domain=self.node.domain
        )
        node.outputs[0].name = "y"
        node.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(self.scale.dtype))
        graph = ir.Graph(
            [values["x"]], [node.outputs[0]], nodes=[node], name="layer",
            initializers=[values[key] for key in parts], opset_imports={"": 21, self.node.domain: 1},
        )  # fmt: skip
        session = Session(ir.Model(graph, ir_version=10), Options("off", threads=1))
        made: npt.NDArray[Any] = session.run(feed)[0]
        return made
