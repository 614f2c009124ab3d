"""Which parts of an output mean different things.

A detector returns boxes, scores and classes in one tensor. An error that is small for the whole can be
total for one of them, so each input of a Concat behind an output is measured on its own. A Concat
whose parts grow with the data, such as that of a cache with a new token, has no such parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import onnx_ir as ir

from qcompile.graph.edit import array, attribute, is_op
from qcompile.run.probe import Fact
from qcompile.verify.metrics import Part

_RANDOM = (
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial",
)  # fmt: skip
_MAX_PARTS = 64
_RANK = 2  # least rank, and number of classes, of scores
_STEPS = 6  # operators that a question about an output goes back
_ELEMENTWISE = ("Identity", "Cast", "Sigmoid", "Mul", "Add", "Sub", "Div", "Clip", "Relu", "Tanh")


def parts_of(output: ir.Value, facts: Mapping[str, Fact]) -> list[Part]:
    """The whole output, then its slices along the Concat axis that made it, if one did.

    There are none where their sizes may vary from sample to sample: neither the output's dimension nor
    those of all of the Concat's inputs are declared as numbers.
    """
    whole = Part("all", decides=decides(output, facts), chance=_by_chance(output))
    found = concat_behind(output, facts)
    if found is None:
        return [whole]
    node, axes = found
    shape = _shape(node.outputs[0], facts)
    assert shape is not None
    axis = attribute(node, "axis", 0) % len(shape)
    sizes = _sizes(node.inputs, axis, facts)
    place = axes.index(axis)
    fixed = _declared(output, place) is not None or all(
        value is not None and (array(value) is not None or _declared(value, axis) is not None)
        for value in node.inputs
    )
    if sizes is None or not fixed or not 1 < len(sizes) < _MAX_PARTS:
        return [whole]
    parts, start = [whole], 0
    for value, size in zip(node.inputs, sizes, strict=True):
        assert value is not None
        parts.append(
            Part(
                f"[{start}:{start + size}] {value.name}",
                place,
                start,
                start + size,
                chance=whole.chance,
            )
        )
        start += size
    return parts


def _by_chance(output: ir.Value) -> bool:
    """Whether random numbers go into an output."""
    seen: set[ir.Node] = set()
    waiting = [output.producer()]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        bodies = [
            a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH
        ]
        inner = [one for body in bodies for one in body]
        if any(is_op(one, *_RANDOM) or _drops(one) for one in (node, *inner)):
            return True
        waiting += [value.producer() for value in node.inputs if value is not None]
    return False


def _drops(node: ir.Node) -> bool:
    """Whether a Dropout may be one of training, which its third input says; without it, it does nothing."""
    return is_op(node, "Dropout") and len(node.inputs) > 2 and node.inputs[2] is not None


def decides(output: ir.Value, facts: Mapping[str, Fact]) -> Literal["", "logits", "probabilities"]:
    """What the last axis of an output holds, if these are scores of classes.

    They are if a linear layer or a Softmax along that axis makes them. Vectors that leave a normalization or an
    activation are features, and what convolutions make has its channels elsewhere.
    """
    shape = _shape(output, facts)
    if not shape or len(shape) < _RANK or shape[-1] < _RANK:
        return ""
    value = output
    for _ in range(_STEPS):
        node = value.producer()
        if node is None:
            return ""
        if is_op(node, "Softmax", "LogSoftmax"):
            axis = attribute(node, "axis", -1)
            last = axis in (-1, len(shape) - 1)
            return ("probabilities" if is_op(node, "Softmax") else "logits") if last else ""
        if is_op(node, "Gemm") or (is_op(node, "MatMul") and array(node.inputs[1]) is not None):
            return "logits"
        if is_op(node, "Conv"):  # a 1x1 head behind a pooled feature map, flattened
            pooled = _shape(value, facts)
            flat = (
                pooled is not None
                and value is not output
                and pooled[2:] == (1,) * (len(pooled) - 2)
            )
            return "logits" if flat and len(shape) == _RANK else ""
        if is_op(node, "Add"):
            ahead = [v for v in node.inputs if v is not None and array(v) is None]
            if len(ahead) != 1:
                return ""
            value = ahead[0]
        elif is_op(node, "Identity", "Cast", "Flatten", "Squeeze", "Reshape") and node.inputs[0]:
            value = node.inputs[0]
        elif is_op(node, "MatMul") and _is_tied(node.inputs[1]):
            return "logits"
        else:
            return ""
    return ""


def _is_tied(weight: ir.Value | None) -> bool:
    """Whether a weight is a transposed constant: a head that shares the table of the embedding."""
    node = None if weight is None else weight.producer()
    return is_op(node, "Transpose") and node is not None and array(node.inputs[0]) is not None


def concat_behind(
    output: ir.Value, facts: Mapping[str, Fact]
) -> tuple[ir.Node, tuple[int, ...]] | None:
    """The Concat whose values an output is, place by place, and the axes of its result in the output's order."""
    value, shape = output, _shape(output, facts)
    if not shape:
        return None
    axes = tuple(range(len(shape)))
    node = value.producer()
    while is_op(node, "Transpose", *_ELEMENTWISE):
        assert node is not None
        if is_op(node, "Transpose"):
            perm = attribute(node, "perm", None) or range(len(axes))[::-1]
            axes, source = tuple(perm[a] for a in axes), node.inputs[0]
        else:  # an operand that is broadcast has other places
            shape = _shape(value, facts)
            same = [v for v in node.inputs if v is not None and _shape(v, facts) == shape]
            source = next((v for v in same if array(v) is None), None)
        if source is None or _shape(source, facts) is None:
            return None
        value, node = source, source.producer()
    return (node, axes) if node is not None and is_op(node, "Concat") else None


def _sizes(
    values: Sequence[ir.Value | None], axis: int, facts: Mapping[str, Fact]
) -> list[int] | None:
    shapes = [None if value is None else _shape(value, facts) for value in values]
    known = [shape[axis] for shape in shapes if shape is not None]
    return known if len(known) == len(values) else None


def _shape(value: ir.Value, facts: Mapping[str, Fact]) -> tuple[int, ...] | None:
    """As for the first sample; that of a constant is its own."""
    values, fact = array(value), facts.get(value.name or "")
    if values is not None:
        return values.shape
    return None if fact is None else fact.shape


def _declared(value: ir.Value, axis: int) -> int | None:
    """A dimension that the model says is the same for all inputs."""
    dims = value.shape
    if dims is None or axis >= len(dims):
        return None
    size = dims[axis]
    return size if isinstance(size, int) else None
