"""What is known of shapes, and of the small integer tensors that shapes are computed with.

Exporters write `x.view(b, t, heads, -1)` as a dozen of operators that take the shape of x apart and put it together again.
Shapes that a file declares of intermediate values are not believed, and of operators that are not listed nothing is known.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import onnx_ir as ir

from qcompile.graph.edit import array, attribute, ints, is_op
from qcompile.graph.symbols import Known, Numbers, Size, Sizes, Symbol, found

_WHOLE = (ir.DataType.INT64, ir.DataType.INT32)
_FEW = 64  # elements of an integer tensor that may be a shape


def dims(model: ir.Model, *, one_batch: bool = False) -> Known:
    """What is known of all graphs of a model.

    Of what a body reads as its own inputs nothing is known, and what would have to be equal in a body need not be: it may not run.
    Names of sizes say nothing, as ORT does not hold callers to them; with `one_batch` first axes of one name are equal, as ONNX
    has it.
    """
    known = Known()
    named: dict[str, Symbol] = {}
    for value in model.graph.inputs:
        if value.shape is not None and len(value.shape):  # ORT checks feeds, but for scalars
            sizes: list[Size] = [
                size if isinstance(size, int) and size > 0 else Symbol() for size in value.shape
            ]
            name = getattr(value.shape[0], "value", None)
            if one_batch and name and isinstance(sizes[0], Symbol):
                sizes[0] = named.setdefault(name, sizes[0])
            known.shapes[value] = tuple(sizes)
    _walk(known, model.graph)
    return known


def _walk(known: Known, graph: ir.Graph) -> None:
    for value in graph.initializers.values():
        _constant(known, value)
    for node in graph:
        for held in node.attributes.values():
            if held.type == ir.AttributeType.GRAPH:
                with known.guessing():
                    _walk(known, held.as_graph())
        if node.domain in ("", "ai.onnx") and node.outputs:
            _visit(known, node)


def _constant(known: Known, value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None or value.is_graph_input():
        return
    shape = tuple(map(int, tensor.shape.numpy()))
    known.shapes[value] = shape
    if tensor.size <= _FEW and len(shape) <= 1 and tensor.dtype in _WHOLE:
        known.numbers[value] = Numbers(ints(value) or (), not shape, tensor.dtype)


def _visit(known: Known, node: ir.Node) -> None:
    rule, reckon = _SHAPES.get(node.op_type), _NUMBERS.get(node.op_type)
    sizes = None if rule is None else rule(known, node)
    if sizes is not None:
        known.shapes[node.outputs[0]] = sizes
    numbers = None if reckon is None else reckon(known, node)
    if numbers is not None and len(numbers.sizes) <= _FEW and _fits(numbers):
        known.numbers[node.outputs[0]] = numbers
        known.shapes[node.outputs[0]] = () if numbers.scalar else (len(numbers.sizes),)


def _fits(numbers: Numbers) -> bool:
    """Whether no number is beyond its type, where a run would wrap it."""
    bits = 31 if numbers.kind == ir.DataType.INT32 else 63
    return all(-(1 << bits) <= s < 1 << bits for s in numbers.sizes if isinstance(s, int))


def _at(node: ir.Node, place: int) -> ir.Value | None:
    """An input, None if there is none."""
    return node.inputs[place] if place < len(node.inputs) else None


def _places(axes: Sequence[int] | None, rank: int) -> tuple[int, ...] | None:
    """Axes counted from the front; None if there are none such."""
    if axes is None or not all(-rank <= axis < rank for axis in axes):
        return None
    return tuple(axis % rank for axis in axes)


def _same(known: Known, node: ir.Node) -> Sizes | None:
    return known.shape(node.inputs[0])


def _broadcast(known: Known, node: ir.Node) -> Sizes | None:
    shapes = [known.shape(value) for value in node.inputs]
    there = [sizes for sizes in shapes if sizes is not None]
    return known.broadcast(there) if there and len(there) == len(shapes) else None


def _matmul(known: Known, node: ir.Node) -> Sizes | None:
    a, b = (known.shape(_at(node, i)) for i in (0, 1))
    if a is None or b is None or min(len(a), len(b)) < 2:
        return None
    known.join(a[-1], b[-2])
    return (*known.broadcast([a[:-2], b[:-2]]), a[-2], b[-1])


def _transpose(known: Known, node: ir.Node) -> Sizes | None:
    sizes = known.shape(node.inputs[0])
    if sizes is None:
        return None
    perm = attribute(node, "perm", tuple(reversed(range(len(sizes)))))
    return tuple(sizes[axis] for axis in perm) if len(perm) == len(sizes) else None


def _reshape(known: Known, node: ir.Node) -> Sizes | None:
    target = known.contents(_at(node, 1))
    if target is None or attribute(node, "allowzero", 0):
        return None
    if any(isinstance(size, Symbol) and not size.natural for size in target.sizes):
        return None
    sizes = known.shape(node.inputs[0])
    made: list[Size] = []
    for i, size in enumerate(target.sizes):
        there = sizes is None or i < len(sizes)  # what a size of 0 would copy
        copied = sizes[i] if sizes is not None and there else None
        if size == 0:
            made.append(Symbol() if copied is None else copied)
        else:
            made.append(known.copy(size, copied) if there else size)
    if -1 in made:
        made[made.index(-1)] = _rest(sizes, [size for size in made if size != -1])
    return tuple(made)


def _rest(sizes: Sizes | None, others: Sequence[Size]) -> Size:
    """What is left of a shape for the size that is -1 of another one."""
    if sizes is None:
        return Symbol()
    left = [s for s in found(sizes) if isinstance(s, Symbol)]
    for size in found(others):
        if isinstance(size, Symbol):
            if size not in left:
                return Symbol()
            left.remove(size)
    up = math.prod(s for s in found(sizes) if isinstance(s, int))
    down = math.prod(s for s in found(others) if isinstance(s, int))
    if down == 0 or up % down or len(left) > (up == down):
        return Symbol()
    return left[0] if left else up // down


def _axes(node: ir.Node, place: int = 1) -> tuple[int, ...] | None:
    """Axes, of an attribute or of a constant input; None if they are neither."""
    if "axes" in node.attributes:
        return tuple(attribute(node, "axes", ()))
    return ints(_at(node, place))


def _unsqueeze(known: Known, node: ir.Node) -> Sizes | None:
    sizes, axes = known.shape(node.inputs[0]), _axes(node)
    if sizes is None or axes is None:
        return None
    rank = len(sizes) + len(axes)
    new = _places(axes, rank)
    if new is None or len(set(new)) < len(new):
        return None
    rest = iter(sizes)
    return tuple(1 if axis in new else next(rest) for axis in range(rank))


def _squeeze(known: Known, node: ir.Node) -> Sizes | None:
    sizes = known.shape(node.inputs[0])
    gone = None if sizes is None else _places(_axes(node), len(sizes))
    if sizes is None or gone is None:
        return None
    return tuple(size for axis, size in enumerate(sizes) if axis not in gone)


def _concat(known: Known, node: ir.Node) -> Sizes | None:
    shapes = [known.shape(value) for value in node.inputs]
    there = [sizes for sizes in shapes if sizes is not None]
    if not there or len({len(sizes) for sizes in there}) > 1 or not there[0]:
        return None
    rank = len(there[0])
    places = _places((attribute(node, "axis", 0),), rank)
    if places is None:
        return None
    axis, alike = places[0], len(there) == len(shapes)
    made: list[Size] = []
    for place in range(rank):
        along = [sizes[place] for sizes in there]
        # ORT leaves out what is empty, whatever its other sizes are: all have to agree before anything is known
        same = alike and all(size is along[0] or size == along[0] for size in along)
        made.append(along[0] if same else Symbol())
    others = all(
        sizes[place] is made[place] or sizes[place] == made[place]
        for sizes in there
        for place in range(rank)
        if place != axis
    )
    made[axis] = known.total([sizes[axis] for sizes in there]) if alike and others else Symbol()
    return tuple(made)


def _gather_shape(known: Known, node: ir.Node) -> Sizes | None:
    data, places = (known.shape(_at(node, i)) for i in (0, 1))
    along = None if data is None else _places((attribute(node, "axis", 0),), len(data))
    if data is None or places is None or along is None:
        return None
    axis = along[0]
    return (*data[:axis], *places, *data[axis + 1 :])


def _expand(known: Known, node: ir.Node) -> Sizes | None:
    sizes, target = known.shape(node.inputs[0]), known.contents(_at(node, 1))
    return None if sizes is None or target is None else known.broadcast([sizes, target.sizes])


def _reduce(known: Known, node: ir.Node) -> Sizes | None:
    sizes = known.shape(node.inputs[0])
    gone = None if sizes is None else _places(_axes(node), len(sizes))
    if sizes is None or not gone:
        return None
    keep = attribute(node, "keepdims", 1)
    return tuple(1 if i in gone else s for i, s in enumerate(sizes) if keep or i not in gone)


def _slice_shape(known: Known, node: ir.Node) -> Sizes | None:
    sizes = known.shape(node.inputs[0])
    parts = [known.contents(value) for value in node.inputs[1:]]
    if sizes is None or len(parts) < 3 or parts[2] is None:
        return None
    axes = parts[2].sizes
    fixed = _places([axis for axis in axes if isinstance(axis, int)], len(sizes))
    if fixed is None or any(part and len(part.sizes) != len(fixed) for part in parts):
        return None
    made: list[Size] = list(sizes)
    for number, axis in enumerate(fixed):
        step = parts[3].sizes[number] if len(parts) > 3 and parts[3] is not None else 1
        bounds = [part.sizes[number] if part is not None else None for part in parts[:2]]
        size = made[axis]
        numbers = [v for v in (size, *bounds, step) if isinstance(v, int)]
        # backwards, ORT has other bounds than Python
        whole = len(numbers) == 4 and (len(parts) < 4 or parts[3] is not None) and numbers[3] > 0
        made[axis] = len(range(*slice(*numbers[1:]).indices(numbers[0]))) if whole else Symbol()
    return tuple(made)


def _split(known: Known, node: ir.Node) -> Sizes | None:
    sizes = known.shape(node.inputs[0])
    if sizes is None:
        return None
    places = _places((attribute(node, "axis", 0),), len(sizes))
    if places is None:
        return None
    axis = places[0]
    parts = ints(_at(node, 1)) or attribute(node, "split", None)
    for number, value in enumerate(node.outputs):
        made: list[Size] = list(sizes)
        made[axis] = parts[number] if parts and number < len(parts) else Symbol()
        known.shapes[value] = tuple(made)
    return known.shapes[node.outputs[0]]


_LIKE_FIRST = (
    "Identity", "Cast", "Neg", "Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Sign", "Floor", "Ceil", "Round", "Not", "Relu", "Sigmoid",
    "Tanh", "Erf", "Softmax", "LogSoftmax", "LayerNormalization", "Sin", "Cos", "LeakyRelu", "Elu", "Gelu", "HardSigmoid", "HardSwish",
    "Softplus", "Clip", "Dropout", "RMSNormalization", "SimplifiedLayerNormalization", "Trilu", "CumSum", "IsNaN", "Swish", "Mish",
)  # fmt: skip
_LIKE_ALL = (
    "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "And", "Or", "Xor", "Equal", "Less", "LessOrEqual", "Greater",
    "GreaterOrEqual", "Mod", "PRelu", "Sum", "Mean",
)  # fmt: skip
_SHAPES: dict[str, Callable[[Known, ir.Node], Sizes | None]] = {
    **dict.fromkeys(_LIKE_FIRST, _same), **dict.fromkeys(_LIKE_ALL, _broadcast), "MatMul": _matmul, "Transpose": _transpose,
    "Reshape": _reshape, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Concat": _concat, "Gather": _gather_shape, "Expand": _expand,
    "Slice": _slice_shape, "Split": _split, "Range": lambda known, node: (Symbol(),), **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), _reduce),
}  # fmt: skip


def _shape_of(known: Known, node: ir.Node) -> Numbers | None:
    sizes = known.shape(node.inputs[0])
    if sizes is None:
        return None
    first, last = attribute(node, "start", 0), attribute(node, "end", None)
    return Numbers(sizes[slice(first, last)], scalar=False, kind=ir.DataType.INT64)


def _pick(known: Known, node: ir.Node) -> Numbers | None:
    data, places = known.contents(node.inputs[0]), array(_at(node, 1))
    if data is None or data.scalar or places is None or places.ndim > 1:
        return None
    chosen, count = [int(p) for p in places.flat], len(data.sizes)
    if attribute(node, "axis", 0) not in (0, -1) or not all(-count <= p < count for p in chosen):
        return None
    return dataclasses.replace(
        data, sizes=tuple(data.sizes[p] for p in chosen), scalar=places.ndim == 0
    )


def _part(known: Known, node: ir.Node) -> Numbers | None:
    data = known.contents(node.inputs[0])
    bounds = [ints(value) for value in node.inputs[1:]]
    if data is None or data.scalar or len(bounds) < 2:
        return None
    numbers = [bound[0] for bound in bounds if bound is not None and len(bound) == 1]
    step = numbers[3] if len(numbers) > 3 else 1
    if len(numbers) < len(bounds) or step <= 0:  # backwards, ORT has other bounds than Python
        return None
    return dataclasses.replace(data, sizes=data.sizes[slice(numbers[0], numbers[1], step)])


def _line(known: Known, node: ir.Node) -> Numbers | None:
    parts = [known.contents(value) for value in node.inputs]
    there = [part for part in parts if part is not None and not part.scalar]
    if len(there) < len(parts):
        return None
    return dataclasses.replace(there[0], sizes=tuple(size for part in there for size in part.sizes))


def _with_axis(known: Known, node: ir.Node) -> Numbers | None:
    data, axes = known.contents(node.inputs[0]), _axes(node)
    if data is None or axes is None or len(axes) != 1:
        return None
    if is_op(node, "Unsqueeze"):
        return dataclasses.replace(data, scalar=False) if data.scalar else None
    single = not data.scalar and len(data.sizes) == 1
    return dataclasses.replace(data, scalar=True) if single else None


def _flat(known: Known, node: ir.Node) -> Numbers | None:
    data, target = known.contents(node.inputs[0]), known.contents(_at(node, 1))
    if data is None or target is None or attribute(node, "allowzero", 0):
        return None
    if target.sizes == () and len(data.sizes) == 1:
        return dataclasses.replace(data, scalar=True)
    whole = target.sizes in ((-1,), (len(data.sizes),)) and data.sizes
    return dataclasses.replace(data, scalar=False) if whole else None


def _cast(known: Known, node: ir.Node) -> Numbers | None:
    data, to = known.contents(node.inputs[0]), attribute(node, "to", None)
    if data is None or to not in _WHOLE:
        return None
    sizes = data.sizes
    if to == ir.DataType.INT32 and data.kind == ir.DataType.INT64:  # may wrap
        sizes = tuple(
            size if isinstance(size, int) or size.length else Symbol(natural=False, length=False)
            for size in sizes
        )
    return dataclasses.replace(data, sizes=sizes, kind=ir.DataType(to))


def _fill(known: Known, node: ir.Node) -> Numbers | None:
    target, held = known.contents(node.inputs[0]), attribute(node, "value", None)
    if target is None or held is None or len(target.sizes) != 1 or held.dtype not in _WHOLE:
        return None
    count = target.sizes[0]
    if not isinstance(count, int) or not 0 <= count <= _FEW:
        return None
    return Numbers((int(held.numpy().reshape(-1)[0]),) * count, scalar=False, kind=held.dtype)


def _elementwise(known: Known, node: ir.Node) -> Numbers | None:
    operands = [known.contents(value) for value in node.inputs]
    there = [operand for operand in operands if operand is not None]
    if len(there) < len(operands):
        return None
    count = max(len(operand.sizes) for operand in there)
    if any(len(operand.sizes) not in (1, count) for operand in there):
        return None
    rows = [o.sizes * (count if len(o.sizes) == 1 else 1) for o in there]
    kind = there[-1].kind
    made = tuple(known.reckon(node.op_type, kind, *column) for column in zip(*rows, strict=True))
    kind = ir.DataType.BOOL if is_op(node, "Equal") else kind
    return Numbers(made, all(operand.scalar for operand in there), kind)


_NUMBERS: dict[str, Callable[[Known, ir.Node], Numbers | None]] = {
    "Shape": _shape_of, "Gather": _pick, "Slice": _part, "Concat": _line, "Unsqueeze": _with_axis, "Squeeze": _with_axis,
    "Reshape": _flat, "Cast": _cast, "Identity": lambda known, node: known.contents(node.inputs[0]), "ConstantOfShape": _fill,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Where", "Equal"), _elementwise),
}  # fmt: skip
