"""Small edits that every pass needs, each keeping the graph valid.

Names of graph inputs and outputs never change. A tensor counts as constant only if it is an
initializer that no caller can override, so not also a graph input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt


_STEPS = 8  # operators that a question about a value's type may go back
_KEEP_RANK = frozenset(
    {
        "AveragePool", "BatchNormalization", "Clip", "Concat", "Dropout", "Elu", "Gelu",
        "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu",
        "MaxPool", "Mish", "Pad", "Relu", "Resize", "Selu", "Sigmoid", "Softmax", "Softplus", "Tanh", "Transpose",
    }
)  # fmt: skip
_BROADCAST = frozenset({"Add", "Sub", "Mul", "Div"})


class Names:
    """Fresh names, unique over every scope of a model: the main graph and all bodies."""

    def __init__(self, model: ir.Model) -> None:
        self._used: set[str] = set()
        self._next: dict[str, int] = {}  # number to try first for a wish
        for graph in model.graphs():
            self._used.update(name for name in graph.initializers if name)
            self._used.update(value.name for value in graph.inputs if value.name)
            for node in graph:
                if node.name:
                    self._used.add(node.name)
                self._used.update(value.name for value in node.outputs if value.name)

    def fresh(self, wish: str) -> str:
        """`wish`, or `wish` with the first free number appended."""
        name, number = wish, self._next.get(wish, 1)
        while name in self._used:
            name, number = f"{wish}_{number}", number + 1
        self._next[wish] = number
        self._used.add(name)
        return name


def array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The values of a constant tensor (a view of the stored ones), or None if it is not constant."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    if not value.is_initializer():
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant one-element tensor holds, or None."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    values = array(value)
    return None if values is None or values.dtype.kind not in "fiu" else float(values.reshape(()))


def ints(value: ir.Value | None) -> tuple[int, ...] | None:
    """The numbers that a constant integer tensor holds, or None."""
    values = array(value)
    if values is None or values.dtype.kind not in "iu":
        return None
    return tuple(int(v) for v in values.reshape(-1))


def sole_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, if nobody else does and it is no graph output."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses)).node


def read_once(value: ir.Value | None) -> bool:
    """Whether one node alone reads a value: for a weight, a changed copy then takes the place of the old one."""
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def rank(value: ir.Value | None, steps: int = _STEPS) -> int | None:
    """The number of dimensions: as declared, or as follows from at most `steps` operators before."""
    if value is None or value.shape is not None:
        return None if value is None or value.shape is None else len(value.shape)
    node = value.producer()
    if node is None or steps == 0:
        return None
    if is_op(node, "Conv", "ConvTranspose"):
        return rank(node.inputs[1], steps - 1)
    if is_op(node, "Gemm", "Flatten"):
        return 2
    if is_op(node, *_KEEP_RANK):
        return rank(node.inputs[0], steps - 1)
    if is_op(node, *_BROADCAST):
        ranks = [rank(operand, steps - 1) for operand in node.inputs]
        known = [dims for dims in ranks if dims is not None]
        return max(known) if len(known) == len(ranks) else None
    return None


def dtype(value: ir.Value | None, steps: int = _STEPS) -> ir.DataType | None:
    """The element type: as declared, or as follows from at most `steps` operators before."""
    if value is None or value.dtype not in (None, ir.DataType.UNDEFINED):
        return None if value is None else value.dtype
    node = value.producer()
    if node is None or steps == 0:
        return None
    if not is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul", *_KEEP_RANK, *_BROADCAST):
        return None
    operands = node.inputs[:1] if is_op(node, "Pad", "Resize") else node.inputs
    found = (dtype(operand, steps - 1) for operand in operands)
    return next((kind for kind in found if kind is not None), None)


def with_number(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Operands x and c of `x op c` or `c op x`, c one constant number, if the result has x's shape."""
    a, b = node.inputs
    for x, c in ((a, b), (b, a)):
        number = scalar(c)
        if x is None or c is None or number is None or array(x) is not None:
            continue
        dims, own = rank(c), rank(x)
        if dims == 0 or (dims is not None and own is not None and dims <= own):
            return x, number
    return None


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute, or `default` if the node lacks it."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def is_op(node: ir.Node | None, *types: str) -> bool:
    """Whether `node` is one of these operators of the default ONNX domain."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in types


def add_initializer(
    graph: ir.Graph,
    names: Names,
    wish: str,
    values: npt.NDArray[Any],
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """A new initializer of `graph` that owns `values`."""
    name = names.fresh(wish)
    # ascontiguousarray would turn a scalar into (1,), which no fusion of ORT accepts as a scale
    values = np.ascontiguousarray(values) if np.ndim(values) else np.asarray(values)
    tensor = ir.Tensor(values, dtype=dtype, name=name)
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def add_node(
    names: Names,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    before: ir.Node | None = None,
    after: ir.Node | None = None,
    graph: ir.Graph | None = None,
    domain: str = "",
    name: str,
    output: str,
    attributes: dict[str, Any] | None = None,
) -> ir.Node:
    """A new one-output node, inserted before or after another one, or at the end of `graph`."""
    node = ir.node(
        op_type, inputs, attributes or None, domain=domain, num_outputs=1, name=names.fresh(name)
    )
    node.outputs[0].name = names.fresh(output)
    if before is not None and before.graph is not None:
        before.graph.insert_before(before, node)
    elif after is not None and after.graph is not None:
        after.graph.insert_after(after, node)
    elif graph is not None:
        graph.append(node)
    return node


def replace(old: ir.Value, new: ir.Value) -> None:
    """Every reader of `old` reads `new`; if `old` is a graph output, `new` takes its place, name and documentation."""
    was_output = old.is_graph_output()
    if new.dtype is None and old.dtype is not None:
        new.type = old.type
    if new.shape is None and old.shape is not None:
        new.shape = old.shape
    if not was_output:
        ir.convenience.replace_all_uses_with(old, new)
        return
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    _take_name(old, new)


def supersede(old: ir.Value, new: ir.Value) -> None:
    """As `replace`, and `new` has the name of `old` in any case: it holds the same tensor."""
    named = old.is_graph_output()
    replace(old, new)
    if not named:
        _take_name(old, new)


def put_aside(old: ir.Value, new: ir.Value) -> None:
    """`new` has the name of `old`, which gets one of its own: it may still be read, and be one of several of that name."""
    name = old.name
    old.name = f"{new.name or name}__replaced"
    new.name = name


def _take_name(old: ir.Value, new: ir.Value) -> None:
    put_aside(old, new)
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    new.meta.update(old.meta)


def can_replace(old: ir.Value, new: ir.Value) -> bool:
    """Whether `replace` keeps the model's interface: `new` must not be another output or an input."""
    return not old.is_graph_output() or not (
        new.is_graph_output() or new.is_graph_input() or new.is_initializer()
    )


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph and every body of If, Loop and Scan, outermost first."""
    for graph in model.graphs():
        if isinstance(graph, ir.Graph):
            yield graph


def nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of every graph, in graph order. The graph may be edited meanwhile."""
    for graph in list(graphs(model)):
        yield from list(graph)


def drop_unread(model: ir.Model) -> None:
    """Nodes whose results nobody reads are gone, and unread initializers of every graph with them."""
    common.RemoveUnusedNodesPass()(model)
    for graph in graphs(model):  # the pass leaves the initializers of bodies
        for value in list(graph.initializers.values()):
            if not (value.uses() or value.is_graph_input() or value.is_graph_output()):
                del graph.initializers[value.name or ""]
