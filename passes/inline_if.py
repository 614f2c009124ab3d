"""Replaces an If whose condition is known before the model runs by the branch that it takes.

    y = If(c)[then: y1, else: y2], c constant  ->  the nodes of then, y1 in place of y

Exporters write Ifs about shapes: is the batch 1, is this a vector. Each costs ORT a nested executor
at every inference, and hides the weights inside. An If is decided by

* its condition, computed from constants and from dimensions that follow from the declared shapes of
  the model's inputs, which ORT enforces: `Equal(Gather(Shape(x), 1), 1)` after a Conv of one output
  channel;
* or the rank of its results: where an LSTM reads one, only a branch that gives three dimensions can
  run. On inputs that took the other branch the model failed, and it still fails.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.graph.edit import Names, add_node, array, attribute, is_op, nodes, replace
from qcompile.run.probe import inferred
from qcompile.step import Outcome, Pass

_WRAPS = 2**31  # results that an int32 might not hold are not known
_KINDS: dict[int, type] = {ir.DataType.BOOL: bool, ir.DataType.INT32: int, ir.DataType.INT64: int}
_MOST = 64  # elements of a tensor that a condition may be computed from
_STEPS = 8  # operators between an If and the one that tells the rank of its result
_RECURRENT = ("LSTM", "GRU", "RNN")
_KEEP_RANK = (
    "Cast", "Clip", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "Neg", "Relu", "Selu", "Sigmoid", "Softplus", "Sqrt", "Tanh",
)  # fmt: skip
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Equal": operator.eq,
    "Less": operator.lt, "LessOrEqual": operator.le, "Greater": operator.gt,
    "GreaterOrEqual": operator.ge, "And": operator.and_, "Or": operator.or_, "Xor": operator.xor,
}  # fmt: skip

_Name = tuple[type, str]  # of a node or of a value: the two may be alike

Partial = npt.NDArray[np.object_]
"""Python numbers and bools; None where an element is not known."""


@dataclasses.dataclass(frozen=True)
class InlineIf(Pass):
    """Every If of every graph whose branch is known, and then those inside it."""

    name: ClassVar[str] = "inline_if"

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Constant nodes must have been lifted. Skipped: what depends on the inputs."""
        outcome = Outcome()
        while True:
            ifs = [node for node in nodes(model) if is_op(node, "If")]
            if not ifs:
                return outcome
            decided = _decide(model, ifs)
            names, counts, gone = Names(model), _count_names(model), set[ir.Graph]()
            for node, choice in decided.items():
                if node.graph in gone:
                    continue
                taken, other = _branches(node)[:: 1 if choice else -1]
                for graph in list(_nested(other)):
                    gone.add(graph)
                    counts.subtract(_names_of(graph))
                    _forget(graph)
                _inline(node, taken, names, counts)
                outcome.changed.append(node.name or "")
            if not decided:
                for node in ifs:
                    outcome.skipped[node.name or ""] = "its condition depends on the model's inputs"
                return outcome


def _branches(node: ir.Node) -> tuple[ir.Graph, ir.Graph]:
    then, other = (node.attributes[key].as_graph() for key in ("then_branch", "else_branch"))
    return then, other


def _nested(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    yield from graph.subgraphs()


def _names_of(graph: ir.Graph) -> Iterator[_Name]:
    """The names that a graph defines, those of the bodies inside it not counted."""
    for values in (graph.inputs, graph.initializers.values(), *(node.outputs for node in graph)):
        yield from ((ir.Value, value.name) for value in values if value.name)
    yield from ((ir.Node, node.name) for node in graph if node.name)


def _forget(graph: ir.Graph) -> None:
    """The nodes of a branch that is not taken read nothing any more."""
    for node in graph:
        node.resize_inputs(0)


def _count_names(model: ir.Model) -> Counter[_Name]:
    return Counter(name for graph in _nested(model.graph) for name in _names_of(graph))


def _decide(model: ir.Model, ifs: list[ir.Node]) -> dict[ir.Node, bool]:
    """The Ifs whose branch is known, outermost first; by constants alone if that decides any."""
    reader = _Reader(shapes=False)  # those that are declared may be wrong
    decided = {node: choice for node in ifs if (choice := reader.condition(node)) is not None}
    if decided:
        return decided
    reader = _Reader(shapes=True)
    copies = [node for node in nodes(inferred(model, {})) if is_op(node, "If")]
    for node, copy in zip(ifs, copies, strict=True):
        choice = reader.condition(copy)
        choice = _by_rank(copy) if choice is None else choice
        if choice is not None:
            decided[node] = choice
    return decided


def _by_rank(node: ir.Node) -> bool | None:
    """The branch whose results can be read, if the other one has a result that cannot be."""
    for result, *pair in zip(node.outputs, *(b.outputs for b in _branches(node)), strict=True):
        needed = _needed_rank(result)
        fits = [ranks is None or needed in ranks for ranks in map(_ranks, pair)]
        if needed is not None and any(fits) and not all(fits):
            return fits[0]
    return None


def _ranks(value: ir.Value, steps: int = _STEPS) -> set[int] | None:
    """The ranks that a value can have; more than one behind an If whose branches differ."""
    node = value.producer()
    if value.shape is not None:
        return {len(value.shape)}
    if node is None or steps == 0:
        return None
    if is_op(node, "If"):
        results = (body.outputs[value.index() or 0] for body in _branches(node))
        one, two = (_ranks(result, steps - 1) for result in results)
        return None if one is None or two is None else one | two
    source, added = node.inputs[0] if node.inputs else None, _added_rank(node)
    found = None if source is None or added is None else _ranks(source, steps - 1)
    return None if found is None or added is None else {rank + added for rank in found}


def _added_rank(node: ir.Node) -> int | None:
    """The rank of an operator's result less that of its first input, if that is known."""
    if is_op(node, *_KEEP_RANK):
        return 0
    if not is_op(node, "Unsqueeze", "Squeeze"):
        return None
    axes = array(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes", None)
    sign = 1 if is_op(node, "Unsqueeze") else -1
    return None if axes is None else sign * int(np.size(axes))


def _needed_rank(value: ir.Value, steps: int = _STEPS) -> int | None:
    """The one rank with which the readers of a value, in its own graph, do not fail."""
    node = value.producer()
    found = (
        _rank_for(use.node, use.idx, steps)
        for use in value.uses()
        if steps and node is not None and use.node.graph is node.graph and _is_read(use.node)
    )
    return next((rank for rank in found if rank is not None), None)


def _is_read(node: ir.Node) -> bool:
    return any(value.uses() or value.is_graph_output() for value in node.outputs)


def _rank_for(node: ir.Node, i: int, steps: int) -> int | None:
    """The rank that an operator asks of its input `i`, or that its readers ask of its result."""
    if is_op(node, *_RECURRENT) and i in (0, 5, 6):
        return 3  # X, initial_h, initial_c
    if is_op(node, "Conv", "ConvTranspose") and i == 0:
        weight = node.inputs[1]
        return None if weight is None or weight.shape is None else len(weight.shape)
    if is_op(node, "Transpose"):
        order = attribute(node, "perm", None)
        return None if order is None else len(order)
    added = _added_rank(node) if i == 0 else None
    behind = None if added is None else _needed_rank(node.outputs[0], steps - 1)
    return None if behind is None or added is None else behind - added


class _Reader:
    """What is known of small tensors without running the model; every value is looked at once."""

    def __init__(self, *, shapes: bool) -> None:
        self._shapes = shapes
        self._known: dict[ir.Value, Partial | None] = {}

    def condition(self, node: ir.Node) -> bool | None:
        """The condition of an If, if it is known."""
        known = self._read(node.inputs[0])
        return None if known is None or known.size != 1 or known.item() is None else known.item()

    def _read(self, value: ir.Value | None) -> Partial | None:
        """The elements of a value, None for unknown ones; None if even their number is unknown."""
        if value is None:
            return None
        chain = [value]
        while chain:  # no recursion: a chain may be long
            node = chain[-1].producer()
            reads = node is not None and is_op(node, *_READABLE)
            missing = [v for v in node.inputs if v not in self._known] if node and reads else []
            missing = [v for v in missing if v is not None]
            if missing and not is_op(node, "Shape", "Size"):
                chain.extend(v for v in missing if v is not None)
                continue
            last = chain.pop()
            if last not in self._known:
                self._known[last] = self._compute(last, node if reads else None)
        return self._known[value]

    def _compute(self, value: ir.Value, node: ir.Node | None) -> Partial | None:
        constant = array(value) if value.const_value is not None else None
        if constant is not None:
            fits = constant.size <= _MOST and constant.dtype in (np.bool_, np.int32, np.int64)
            return constant.astype(object) if fits else None
        if node is None:
            return None
        if is_op(node, "Shape", "Size"):
            return _shape(node) if self._shapes else None
        inputs = [None if v is None else self._known[v] for v in node.inputs]
        if any(
            known is None and v is not None for known, v in zip(inputs, node.inputs, strict=True)
        ):
            return None
        try:
            result = _operate(node, [known for known in inputs if known is not None])
        except (ValueError, IndexError, TypeError, OverflowError):  # the model would fail here
            return None
        return result if result is not None and result.size <= _MOST else None


_READABLE = (
    "Shape", "Size", "Identity", "Cast", "Not", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze",
    *_BINARY,
)  # fmt: skip


def _shape(node: ir.Node) -> Partial | None:
    x = node.inputs[0]
    if x is None or x.shape is None:
        return None
    dims = [dim if isinstance(dim, int) else None for dim in x.shape]
    if is_op(node, "Shape"):
        part = dims[slice(attribute(node, "start", 0), attribute(node, "end", None))]
        return np.array(part, object)
    size = None if None in dims else int(np.prod([dim for dim in dims if dim is not None]))
    return np.array(size, object)


def _operate(node: ir.Node, inputs: list[Partial]) -> Partial | None:
    """The result of one operator on partly known operands, as ONNX defines it; None if unsure."""
    op, x = node.op_type, inputs[0]
    if op == "Identity":
        return x
    if op == "Not":
        return _map(operator.not_, x)
    if op == "Cast":
        kind = _KINDS.get(attribute(node, "to", 0))
        return None if kind is None else _map(kind, x)
    if op in _BINARY:
        return _map(_BINARY[op], x, inputs[1])
    if op == "Concat":
        return np.concatenate(inputs, attribute(node, "axis", 0))
    sizes = [known.astype(np.int64) for known in inputs[1:] if None not in known.ravel().tolist()]
    if len(sizes) < len(inputs) - 1:
        return None
    if op == "Gather":
        return np.array(np.take(x, sizes[0], attribute(node, "axis", 0)), np.object_)
    if op == "Slice":
        if x.ndim != 1 or None in node.inputs:
            return None
        start, end, step = (int(sizes[i][0]) if i < len(sizes) else 1 for i in (0, 1, 3))
        return x[start:end:step]
    axes = sizes[0] if sizes else attribute(node, "axes", None)
    if op == "Squeeze":
        return np.squeeze(x, None if axes is None else tuple(np.ravel(axes)))
    return None if axes is None else np.expand_dims(x, tuple(np.ravel(axes)))


def _map(function: Callable[..., Any], *operands: Partial) -> Partial:
    """The function of each element, with broadcasting; None where an operand is None."""

    def careful(*items: Any) -> Any:
        result = None if any(item is None for item in items) else function(*items)
        return None if result is not None and abs(result) >= _WRAPS else result

    return np.asarray(np.frompyfunc(careful, len(operands), 1)(*operands), object)


def _inline(node: ir.Node, taken: ir.Graph, names: Names, counts: Counter[_Name]) -> None:
    """The body's nodes and weights stand where the If stood, which is gone."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    results = list(taken.outputs)
    taken.outputs.clear()
    own = set[ir.Value]()

    def rename(item: ir.Value | ir.Node) -> None:
        if item.name and counts[type(item), item.name] > 1:  # also a name in another body
            counts[type(item), item.name] -= 1
            item.name = names.fresh(item.name)

    for name, value in list(taken.initializers.items()):
        del taken.initializers[name]
        rename(value)
        graph.register_initializer(value)
    body = list(taken)
    taken.remove(body)
    graph.insert_before(node, body)
    for moved in body:
        rename(moved)
        for value in moved.outputs:
            rename(value)
            own.add(value)
    for old, new in zip(node.outputs, results, strict=True):
        if old.is_graph_output():
            if new not in own or new.is_graph_output():
                name = f"{node.name}_result"
                copy = add_node(names, "Identity", [new], before=node, name=name, output=name)
                new = copy.outputs[0]  # noqa: PLW2901 - the graph returns a copy
            new.type, new.shape = old.type or new.type, old.shape or new.shape
        replace(old, new)
    graph.remove(node, safe=True)
