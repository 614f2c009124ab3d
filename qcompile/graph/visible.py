"""What a mask that is added before a Softmax hides.

Of an integer mask `(1 - m) * low` it is taken that m is 0 or 1, as attention masks are.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qcompile.graph.edit import is_op, scalar, with_number

LEAST = -1000.0  # masks are lower, biases are not
_MOVES = ("Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand", "Slice", "Identity", "Cast")
_DEEP = 12  # operators that a question about a mask may go back


@dataclasses.dataclass
class Seen:
    """What may be seen.

    Attributes:
        value: a mask, or the condition of a Where.
        kind: `added`, a mask that is added; `hidden`, where the condition tells what is masked; or `open`, what is not.
        number: of what is masked.
    """

    value: ir.Value
    kind: str
    number: float


def hidden_number(value: ir.Value | None, steps: int = _DEEP) -> float | None:
    """What is added where something is masked, if that and 0 is all that a tensor holds; else None."""
    node = None if value is None else value.producer()
    if value is None or node is None or steps == 0:
        return None
    if is_op(node, *_MOVES) and not (is_op(node, "Cast") and value.dtype is not ir.DataType.FLOAT):
        return hidden_number(node.inputs[0], steps - 1)
    if is_op(node, "Where"):
        numbers = sorted(n for n in map(scalar, node.inputs[1:]) if n is not None)
        return numbers[0] if len(numbers) == 2 and numbers[1] == 0 and numbers[0] <= LEAST else None
    if is_op(node, "Mul"):
        found = with_number(node)
        if found is not None and found[1] <= LEAST and _zero_or_one(found[0]):
            return found[1]
    return None


def _zero_or_one(value: ir.Value | None) -> bool:
    """Whether a tensor is 1 - m of the zeros and ones of an attention mask, moved about."""
    node = None if value is None else value.producer()
    while is_op(node, *_MOVES) and not is_op(node, "Cast"):
        assert node is not None
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if not is_op(node, "Sub") or node is None or scalar(node.inputs[0]) != 1:
        return False
    source = node.inputs[1]
    for _ in range(_DEEP):
        cast = None if source is None else source.producer()
        if not is_op(cast, *_MOVES) or cast is None:
            return False
        source = cast.inputs[0]
        kind = None if source is None else source.dtype
        if (
            is_op(cast, "Cast")
            and kind is not None
            and (kind.is_integer() or kind is ir.DataType.BOOL)
        ):
            return True
    return False
