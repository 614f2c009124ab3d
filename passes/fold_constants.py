"""Computes once what does not depend on the model's inputs.

A weight behind Identity, Cast, Transpose or Reshape becomes an initializer, so that it can be
quantized; so do shapes and bounds. All that can be folded in a graph is evaluated in one run of ONNX
Runtime; where that fails, node by node.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError
from qcompile.graph.edit import Names, add_initializer, attribute, graphs, is_op, replace
from qcompile.graph.io import weight_bytes
from qcompile.run.session import Options, Session
from qcompile.step import Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

# Results of these may be far larger than what they are made of, or differ from run to run, or are
# what a quantized model means to keep.
_KEPT = frozenset(
    {
        "ConstantOfShape", "Expand", "Tile", "Range", "OneHot", "RandomNormal", "RandomNormalLike",
        "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout",
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear",
    }
)  # fmt: skip
_MOVES = frozenset(
    {
        "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Shape", "Size",
        "Concat", "SequenceConstruct",
    }
)  # fmt: skip
_MAPS = frozenset(
    {
        "Identity", "Cast", "Neg", "Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Sign", "Floor", "Ceil",
        "Round", "Not", "Relu", "Sigmoid", "Tanh", "Erf", "Softmax",
    }
)  # fmt: skip
_BROADCASTS = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where"})
# Results have no more elements than the product of the operands' numbers of them. Of all other operators, such as Pad,
# Resize or HannWindow, the size of the result is a value, and a few bytes could ask for terabytes.
_PRODUCTS = frozenset(
    {
        "MatMul", "Gemm", "Einsum", "GatherND", "GatherElements", "ScatterND", "ScatterElements", "And", "Or", "Xor",
        "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Mod", "BitShift", "BitwiseAnd", "BitwiseOr",
        "BitwiseXor", "PRelu", "Sum", "Mean", "Clip", "CastLike", "Compress", "Trilu", "CumSum", "TopK", "ArgMax",
        "ArgMin", "LayerNormalization", "BatchNormalization", "InstanceNormalization", "Unique", "IsNaN", "IsInf",
        "Sin", "Cos", "Tan", "LeakyRelu", "Elu", "HardSigmoid", "HardSwish", "Softplus", "LogSoftmax", "BitwiseNot",
        "Gelu", "LpNormalization", "MeanVarianceNormalization", "EyeLike", "Mish", "Sinh", "Cosh",
        *_BROADCASTS, "Gather",
    }
)  # fmt: skip
_FREE_GROWTH = 1 << 16  # bytes that a folded result may have beyond its inputs
_MAX_CAST = 8  # bytes of an element: int64 or float64


@dataclasses.dataclass(frozen=True)
class FoldConstants(Pass):
    """`Transpose(W[const]) -> MatMul` -> `MatMul(W')`, for every deterministic chain on constants.

    Attributes:
        tied: large weights that other nodes read as well are not folded, as each fold would store them once more: a
            table of embeddings whose transpose is the head.
    """

    name: ClassVar[str] = "fold_constants"
    tied: bool = False

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Skipped: what ORT cannot evaluate, what could grow. Outputs stay computed."""
        outcome = Outcome()
        names = Names(model)
        most = _FREE_GROWTH + _MAX_CAST * weight_bytes(model)
        for graph in graphs(model):
            folded = _foldable(graph, outcome, most, tied=self.tied)
            if folded and not _fold(model, graph, names, folded, outcome):
                for node in folded:
                    _fold(model, graph, names, [node], outcome)
        return outcome


def _fold(
    model: ir.Model, graph: ir.Graph, names: Names, folded: list[ir.Node], outcome: Outcome
) -> bool:
    """Whether these nodes, in graph order, could be evaluated; they are then gone if unread."""
    inside = set(folded)
    frontier = [
        value
        for node in folded
        for value in node.outputs
        if any(use.node not in inside or value.is_graph_output() for use in value.uses())
    ]
    if not frontier:  # a result that only the graph returns stays computed
        return True
    if not all(_is_constant(value) for node in folded for value in _outer(node, inside)):
        return True  # its inputs could not be evaluated, which is said of them
    try:
        results = _evaluate(model, folded, frontier)
    except ModelError as error:
        if len(folded) == 1:
            outcome.skipped[folded[0].name or ""] = str(error)
        return False
    for value, result in zip(frontier, results, strict=True):
        node = value.producer()
        assert node is not None
        if not isinstance(result, np.ndarray) or result.dtype == np.object_:
            outcome.skipped[node.name or ""] = "its result is not a tensor of numbers"
            continue
        constant = _copied(value) or add_initializer(graph, names, f"{value.name}_folded", result)
        if value.is_graph_output():
            for use in value.uses():
                use.node.replace_input_with(use.idx, constant)
        else:
            replace(value, constant)
        outcome.changed.append(node.name or "")
    for node in reversed(folded):
        if all(not value.uses() and not value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    return True


def _copied(value: ir.Value) -> ir.Value | None:
    """The initializer that only Identities stand before: a fold would store it once more."""
    source: ir.Value | None = value
    while source is not None and is_op(node := source.producer(), "Identity"):
        assert node is not None
        source = node.inputs[0]
    return source if source is not None and source is not value and _is_constant(source) else None


def _outer(node: ir.Node, inside: set[ir.Node]) -> list[ir.Value]:
    """The inputs of a node that no node of `inside` makes."""
    return [value for value in node.inputs if value is not None and value.producer() not in inside]


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input() and value.const_value is not None


@dataclasses.dataclass(frozen=True)
class _Bound:
    """What is known of a constant before it is computed: bytes, and if so an upper bound of its shape."""

    size: int
    shape: tuple[int, ...] | None

    @property
    def elements(self) -> int:
        """As many as there can be: two in a byte where nothing else is known."""
        return 2 * self.size if self.shape is None else math.prod(self.shape)


def _foldable(graph: ir.Graph, outcome: Outcome, most: int, *, tied: bool) -> list[ir.Node]:
    """The nodes on constants alone, in graph order, whose results have at most `most` bytes."""
    known: dict[ir.Value, _Bound] = {}
    folded: list[ir.Node] = []
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if not inputs or not _deterministic(node):
            continue
        for value in inputs:
            tensor = value.const_value
            if value not in known and _is_constant(value) and tensor is not None:
                known[value] = _Bound(tensor.nbytes, tuple(map(int, tensor.shape.numpy())))
        if any(value not in known for value in inputs):
            continue
        if tied and any(known[v].size > _FREE_GROWTH and _read_elsewhere(v, node) for v in inputs):
            outcome.skipped[node.name or ""] = (
                "its weight is read elsewhere, and would be stored twice"
            )
            continue
        bound = _bound(node, [known[value] for value in inputs])
        if bound is None or bound.size > most:
            outcome.skipped[node.name or ""] = "its result could be much larger than its inputs"
            continue
        known.update(dict.fromkeys(node.outputs, bound))
        folded.append(node)
    return folded


def _read_elsewhere(value: ir.Value, node: ir.Node) -> bool:
    return value.is_graph_output() or any(use.node is not node for use in value.uses())


def _deterministic(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type in _KEPT or node.op_type == "Constant":
        return False
    graphs_inside = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return not any(a.type in graphs_inside for a in node.attributes.values())


def _bound(node: ir.Node, inputs: Sequence[_Bound]) -> _Bound | None:
    """An upper bound of each result; None if it could be much larger than the inputs together."""
    size = sum(bound.size for bound in inputs)
    shapes = [bound.shape for bound in inputs]
    reduced = node.op_type.startswith("Reduce")
    if is_op(node, *_MAPS) or (reduced and attribute(node, "keepdims", 1)):
        return _Bound(_MAX_CAST * inputs[0].elements if is_op(node, "Cast") else size, shapes[0])
    if reduced or is_op(node, *_MOVES):
        return _Bound(size + 64, None)
    known = [shape for shape in shapes if shape is not None]
    if is_op(node, *_BROADCASTS) and len(known) == len(shapes):
        try:
            out = np.broadcast_shapes(*known)
        except ValueError:  # an upper bound is no shape
            out = None
        if out is not None and math.prod(out) <= max(map(math.prod, known)):
            return _Bound(size, out)
    if not is_op(node, *_PRODUCTS):
        return None
    grown = _MAX_CAST * _most_elements(node, inputs)
    return _Bound(grown, None) if grown <= size + _FREE_GROWTH else None


def _most_elements(node: ir.Node, inputs: Sequence[_Bound]) -> int:
    """As many elements as the result of an operator of `_PRODUCTS` can have."""
    if is_op(node, "MatMul") and len(inputs) == 2:
        a, b = (bound.shape for bound in inputs)
        if a is not None and b is not None and len(a) == len(b) == 2:
            return a[0] * b[1]
    return math.prod(max(bound.elements, 1) for bound in inputs)


def _evaluate(
    model: ir.Model, folded: list[ir.Node], frontier: list[ir.Value]
) -> list[npt.NDArray[Any]]:
    """The values of `frontier`, computed by ORT as the nodes are written."""
    mapping: dict[ir.Value, ir.Value] = {}
    initializers: list[ir.Value] = []
    copies: list[ir.Node] = []
    for node in folded:
        for value in node.inputs:
            if value is not None and value not in mapping:
                tensor = value.const_value
                assert tensor is not None
                mapping[value] = ir.Value(
                    name=value.name, type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape(tensor.shape.numpy()), const_value=tensor,
                )  # fmt: skip
                initializers.append(mapping[value])
        copy = ir.Node(
            node.domain, node.op_type,
            [None if value is None else mapping[value] for value in node.inputs],
            list(node.attributes.values()), num_outputs=len(node.outputs), name=node.name,
        )  # fmt: skip
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name = old.name
            mapping[old] = new
        copies.append(copy)
    opset = {domain: v for domain, v in model.opset_imports.items() if domain in ("", "ai.onnx")}
    graph = ir.Graph(
        [], [mapping[value] for value in frontier], nodes=copies, initializers=initializers,
        opset_imports=opset, name="fold",
    )  # fmt: skip
    small = ir.Model(graph, ir_version=min(model.ir_version or 8, 11))
    return Session(small, Options("off", threads=1)).run({})
