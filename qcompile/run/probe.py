"""Types and shapes as ONNX Runtime sees them: inference that never gives up.

onnx's shape inference stops at custom operators and at shapes computed at run time. Here the model
is loaded with every value as an output, which tells the types, and run once on a real feed with
`Shape` of each, which tells the shapes. Nothing large is kept.

What is inside bodies of If, Loop and Scan cannot be an output. There onnx's inference goes on from
what was found outside, and past operators that it does not know the types are handed on.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qcompile.errors import ModelError
from qcompile.graph import io
from qcompile.graph.edit import Names, attribute
from qcompile.graph.skeleton import SHARED_BYTES
from qcompile.run.session import Feed, Options, Session

# what runs once gains nothing by weights in another order, and keeps no memory
_ONCE = Options("off", arena=False, shared=True, config=(("session.disable_prepacking", "1"),))
_NOT_TENSORS = frozenset(
    {
        "Optional", "OptionalGetElement", "SequenceConstruct", "SequenceEmpty", "SequenceErase",
        "SequenceInsert", "SequenceMap", "SplitToSequence", "StringSplit",
    }
)  # fmt: skip
_BODY_DATA = 1024  # bytes of a body's initializer that inference may want to read: a shape, an axis
_BOOL = frozenset(
    {
        "And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not",
        "Or", "Xor",
    }
)  # fmt: skip
_INT64 = frozenset({"ArgMax", "ArgMin", "NonZero", "Shape", "Size"})
# The first output has the type of the inputs: of the first one whose type is known.
_SAME = frozenset(
    {
        "Abs", "Add", "AveragePool", "BatchNormalization", "BiasGelu", "Clip", "Concat", "Conv",
        "ConvTranspose", "Cos", "CumSum", "DepthToSpace", "Div", "Dropout", "Einsum", "Elu", "Erf",
        "Exp", "Expand", "FastGelu", "Flatten", "FusedConv", "FusedGemm", "FusedMatMul", "GRU",
        "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool",
        "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "LSTM",
        "LayerNormalization", "LeakyRelu", "Log", "MatMul", "Max", "MaxPool", "Mean", "Min", "Mul",
        "MultiHeadAttention", "Neg", "PRelu", "Pad", "Pow", "QuickGelu", "RNN", "Reciprocal",
        "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape",
        "Resize", "RotaryEmbedding", "ScatterElements", "ScatterND", "Sigmoid", "Sign",
        "SimplifiedLayerNormalization", "Sin", "SkipLayerNormalization", "Slice", "Softmax",
        "Softplus", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile",
        "TopK", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
_SAME_ALL = frozenset({"LSTM", "GRU", "RNN", "Split"})  # and so have their other outputs


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is known of one value: its dtype and, if it was computed for the feed, its shape."""

    dtype: np.dtype[Any] | None
    shape: tuple[int, ...] | None

    @property
    def is_float(self) -> bool:
        """Whether it is known to hold floating-point numbers, of any width."""
        return self.dtype is not None and "float" in np.dtype(self.dtype).name

    @property
    def elements(self) -> int:
        """The number of elements, 0 if the shape is unknown."""
        return 0 if self.shape is None else int(np.prod(self.shape, dtype=np.int64))


def probe(model: ir.Model, feed: Feed | None, *, must_load: bool = False) -> Mapping[str, Fact]:
    """A fact for each value of the main graph, its inputs included, and of the bodies.

    Names may repeat in bodies: of a repeated one is known what holds for all its bearers. Shapes in
    bodies are those that follow from the feed's, in branches that it does not take too. With `feed`
    None the types are found, and such shapes as are the same for every feed.

    Raises:
        RefusedError: ORT does not load the model, which it `must_load`.
        ModelError: the feed does not run.
    """
    facts = _main(model, feed, must_load=must_load)
    for value in _body_values(inferred(model, facts)) if _bodies(model.graph) else ():
        fact = Fact(_numpy(value.dtype), _static_shape(value))
        other = facts.get(value.name or "", fact)
        facts[value.name or ""] = Fact(
            fact.dtype if fact.dtype == other.dtype else None,
            fact.shape if fact.shape == other.shape else None,
        )
    return facts


def inferred(model: ir.Model, facts: Mapping[str, Fact]) -> ir.Model:
    """A copy, of the same nodes in the same order, that carries types and shapes in bodies too.

    They follow from the facts of the main graph, from the shapes that the model declares for its
    inputs, and from the weights. Shapes declared for other values are not believed: ORT does not
    enforce them. Where nothing follows, a shape is None.
    """
    clone = model.clone()
    overridable = {value.name for value in clone.graph.inputs} & clone.graph.initializers.keys()
    for name in overridable:  # their values are no constants
        del clone.graph.initializers[name or ""]
    inputs = set(clone.graph.inputs)
    for graph in clone.graphs():
        for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
            fact = facts.get(value.name or "") if graph is clone.graph else None
            if value not in inputs:
                value.shape = None
            if fact is not None and fact.shape is not None:
                value.shape = ir.Shape(fact.shape)
            if fact is not None and fact.dtype is not None and fact.dtype != np.object_:
                value.dtype = ir.DataType.from_numpy(fact.dtype)
    _weights_outside(clone)
    _infer(clone)
    _hand_on(clone.graph)
    return clone


def _weights_outside(clone: ir.Model) -> None:
    """Large weights of bodies become inputs of the model: inference would copy them otherwise."""
    names = Names(clone)
    for graph in list(clone.graphs()):
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if graph is clone.graph or tensor is None or tensor.nbytes <= _BODY_DATA:
                continue
            del graph.initializers[name]
            value.name = names.fresh(name)
            value.const_value = None
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            clone.graph.inputs.append(value)


def _infer(clone: ir.Model) -> None:
    logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
    level = logger.level
    logger.setLevel(logging.ERROR)  # that it fails is nothing that the user could mend
    try:
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(clone)
    except Exception as error:  # noqa: BLE001 - best effort; it raises many kinds
        logging.getLogger(__name__).debug("no shape inference: %s", error)
    finally:
        logger.setLevel(level)


def _hand_on(graph: ir.Graph) -> None:
    """Types through operators that inference did not get past, bodies before their node."""
    for node in graph:
        for body in _bodies_of(node):
            _into(node, body)
            _hand_on(body)
        for i, value in enumerate(node.outputs):
            if _kind(value) is None and not isinstance(value.type, ir.SequenceType):
                kind = _output_kind(node, i)
                if kind is not None:
                    value.dtype = kind


def _into(node: ir.Node, body: ir.Graph) -> None:
    """The types of what a Loop or Scan hands to its body."""
    given = [_kind(value) for value in node.inputs]
    if node.op_type == "Loop":
        given[:2] = [ir.DataType.INT64, ir.DataType.BOOL]
    for value, kind in zip(body.inputs, given, strict=False):
        if _kind(value) is None and kind is not None:
            value.dtype = kind


def _output_kind(node: ir.Node, i: int) -> ir.DataType | None:
    op, kinds = node.op_type, [_kind(value) for value in node.inputs]
    bodies = _bodies_of(node)
    if bodies:
        i += op == "Loop"  # the condition comes first
        found = {_kind(body.outputs[i]) for body in bodies if i < len(body.outputs)}
        return found.pop() if len(found) == 1 else None
    if node.domain not in ("", "ai.onnx", "com.microsoft"):
        return None
    if op in _BOOL:
        return ir.DataType.BOOL
    if op in _INT64:
        return ir.DataType.INT64
    if op == "Cast":
        return ir.DataType(attribute(node, "to", 0))
    if op in ("Where", "CastLike", "DequantizeLinear") and len(kinds) > 1:
        return kinds[1]
    if op in _SAME and (i == 0 or op in _SAME_ALL):
        first = kinds[:1] if op in ("Gather", "Reshape", "Slice", "Pad", "Tile", "TopK") else kinds
        return next((kind for kind in first if kind is not None), None)
    return None


def _kind(value: ir.Value | None) -> ir.DataType | None:
    known = value is not None and value.dtype not in (None, ir.DataType.UNDEFINED)
    return value.dtype if known and value is not None else None


def _bodies(graph: ir.Graph) -> list[ir.Graph]:
    return [body for node in graph for body in _bodies_of(node)]


def _bodies_of(node: ir.Node) -> list[ir.Graph]:
    return [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]


def _body_values(clone: ir.Model) -> Iterator[ir.Value]:
    for graph in clone.graphs():
        if graph is not clone.graph:
            values = (*graph.inputs, *(value for node in graph for value in node.outputs))
            yield from (value for value in values if value.name)


def _static_shape(value: ir.Value) -> tuple[int, ...] | None:
    dims = None if value.shape is None else list(value.shape)
    if dims is None or not all(isinstance(dim, int) for dim in dims):
        return None
    return tuple(dim for dim in dims if isinstance(dim, int))


def _numpy(kind: ir.DataType | None) -> np.dtype[Any] | None:
    if kind is None or kind == ir.DataType.UNDEFINED:
        return None
    return kind.numpy()


def _main(model: ir.Model, feed: Feed | None, *, must_load: bool) -> dict[str, Fact]:
    """Facts of the main graph, from a session."""
    values = [
        value
        for node in model.graph
        if node.op_type not in _NOT_TENSORS
        for value in node.outputs
        if value.name and not isinstance(value.type, ir.SequenceType | ir.OptionalType)
    ]
    clone = model.clone()
    names = Names(clone)
    by_name = {value.name: value for node in clone.graph for value in node.outputs}
    shapes: dict[str, str] = {}
    outputs = {value.name for value in clone.graph.outputs}
    for value in values:
        copy = by_name[value.name]
        shape = ir.node("Shape", [copy], num_outputs=1, name=names.fresh("probe_shape"))
        shape.outputs[0].name = names.fresh(f"{value.name}_shape")
        shape.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        clone.graph.append(shape)
        clone.graph.outputs.append(shape.outputs[0])
        assert shape.outputs[0].name is not None and value.name is not None
        shapes[value.name] = shape.outputs[0].name
        if value.name not in outputs:
            clone.graph.outputs.append(copy)
    try:
        session = Session(clone, _ONCE)
    except ModelError:
        if must_load:  # if not with all values as outputs, then as it is
            Session(model, Options("all"))
        return _declared(model, feed)
    facts: dict[str, Fact] = {}
    types = {info.name: info.dtype for info in session.outputs}
    found: dict[str, tuple[int, ...]] = {}
    if feed is not None and io.weight_bytes(clone) >= SHARED_BYTES:
        # outputs live as long as the run: without them each value goes once its shape was told
        told = {*outputs, *shapes.values()}
        kept = [value for value in clone.graph.outputs if value.name in told]
        clone.graph.outputs.clear()
        clone.graph.outputs.extend(kept)
        session = Session(clone, dataclasses.replace(_ONCE, in_order=True))
    if feed is not None:  # that it runs is to be known even if there are no shapes
        results = session.run(feed, list(shapes.values()) or None)
        found = {name: tuple(map(int, r)) for name, r in zip(shapes, results, strict=False)}
    for value in values:
        assert value.name is not None
        facts[value.name] = Fact(types.get(value.name), found.get(value.name))
    facts.update(_inputs(session, feed))
    return facts


def _inputs(session: Session, feed: Feed | None) -> dict[str, Fact]:
    return {
        info.name: Fact(
            info.dtype, None if feed is None or info.name not in feed else np.shape(feed[info.name])
        )
        for info in session.inputs
    }


def _declared(model: ir.Model, feed: Feed | None) -> dict[str, Fact]:
    """What the model itself says, where ORT does not load it with extra outputs."""
    facts = {}
    for node in model.graph:
        for value in node.outputs:
            if value.name:
                facts[value.name] = Fact(_numpy(value.dtype), _static_shape(value))
    for value in model.graph.inputs:
        if value.name:
            data = None if feed is None else feed.get(value.name)
            facts[value.name] = Fact(_numpy(value.dtype), None if data is None else np.shape(data))
    return facts
