"""Masks before a Softmax: constants so low that what they are added to gets no weight, and what can stand in for them.

    Softmax(x + m), m = 0 or -1e9   ->   Softmax(Clip(x + m', floor)), m' = 0 or `bound`

With x + m' <= floor wherever something is masked, and floor below all else by `reach`, masked entries together weigh less
than half a unit in the last place of the sum over the row. Two things could still change, and decide whether there is a Clip:

* A row that is masked as a whole. Where the constant is so large that x is lost beside it (x + m = m in float32),
  all its entries are equal, and the Clip makes them equal again. Where x is kept, as with -1e4, no Clip must be there.
  Rows of -inf are NaN, so such a constant needs a proof that no row is masked as a whole.
* Numbers beyond the range of calibration: the range is taken wider by `MARGIN` on either side.

A Where that masks the scores themselves stays: it has no integer kernel that could gain.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.algo.equalization import Array
from qcompile.calib.stats import TensorStats
from qcompile.graph.edit import array, attribute, is_op
from qcompile.run.probe import Fact

LEAST = 1000.0  # of the magnitude of a mask: biases of positions are smaller
MARGIN = 0.5  # of the width of a range, on either side
_ROW = 4096  # entries that a row may have at least: samples need not be the longest
_BITS = (
    25  # masked entries weigh less than 2**-25 of a row: half a unit in the last place of float32
)
_LOST = 2.0**-25  # of the mask: what is added and less vanishes
_KEPT = 2.0**14  # masks up to that are added to within 2**-10
_DEEP = 8  # operators that a question about whole numbers may go back
_MOVES = (
    "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand", "Slice", "Flatten", "Identity", "Tile", "Gather",
)  # fmt: skip
Use = tuple[ir.Node, int]


@dataclasses.dataclass
class Mask:
    """Constants that mask something out, and all that reads them.

    Attributes:
        uses: the nodes that read such a constant, and as which input.
        adds: the nodes that add the mask to something, with the other operand.
        values: the values between that hold the mask.
        factors: tensors that a constant is multiplied by.
        others: tensors that a Where takes where it does not mask.
        refused: why it must stay as it is; empty if nothing speaks against it.
    """

    uses: list[Use] = dataclasses.field(default_factory=list)
    adds: dict[ir.Node, ir.Value] = dataclasses.field(default_factory=dict)
    values: list[ir.Value] = dataclasses.field(default_factory=list)
    factors: list[ir.Value] = dataclasses.field(default_factory=list)
    others: list[ir.Value] = dataclasses.field(default_factory=list)
    refused: str = ""

    @property
    def name(self) -> str:
        """That of the first node that adds it, else of the first one that reads the constant."""
        return next(iter(self.adds), self.uses[0][0]).name or ""

    @property
    def names(self) -> set[str]:
        """Of the nodes that add it."""
        return {node.name or "" for node in self.adds}

    def numbers(self) -> Array:
        """The masking entries of all its constants, float64."""
        found = [_entries(node, i) for node, i in self.uses]
        return np.concatenate([values[values <= -LEAST] for values in found])

    def small(self) -> tuple[float, float]:
        """The range of all other entries of its constants, and of constants beside them, with 0."""
        ends = [0.0]
        for node, i in self.uses:
            found = [_entries(node, i)]
            if is_op(node, "Where"):
                beside = array(node.inputs[3 - i])
                found += [] if beside is None else [beside.reshape(-1).astype(np.float64)]
            for values in found:
                kept = values[values > -LEAST]
                ends += [float(kept.min()), float(kept.max())] if kept.size else []
        return min(ends), max(ends)


@dataclasses.dataclass(frozen=True)
class Bound:
    """What takes the place of a mask.

    Attributes:
        number: of each masking entry.
        floors: by name of the sum, the lower bound of the Clip behind it; empty: no Clip.
    """

    number: float
    floors: Mapping[str, float]


def find_masks(model: ir.Model, facts: Mapping[str, Fact]) -> list[Mask]:
    """The masks of the main graph whose constants reach a Softmax or could; those that cannot say why."""
    seeds = list(_seeds(model))
    holding = _holding(seeds)
    masks: list[Mask] = []
    for use in seeds:
        mask = _follow(model, use, holding, facts)
        joined = [m for m in masks if m.adds.keys() & mask.adds.keys() or _meet(m, mask)]
        for other in joined:
            masks.remove(other)
            mask = _joined(other, mask)
        masks.append(mask)
    return [mask for mask in masks if mask.adds]


def bound_of(
    mask: Mask, stats: Mapping[str, TensorStats], facts: Mapping[str, Fact], opset: int
) -> Bound | str:
    """The finite numbers that do the same, or why there are none.

    Args:
        mask: of `find_masks`.
        stats: ranges of what it is added to, of factors and of what stands beside it.
        facts: shapes.
        opset: of the model.
    """
    if mask.refused:
        return mask.refused
    numbers = mask.numbers()
    open_rows = _open_rows(mask, facts, opset)
    why = _unproved(mask, stats, numbers, open_rows=open_rows)
    if why:
        return why
    low = min([mask.small()[0], *(stats[value.name or ""].low for value in mask.others)])
    floors, number, most = {}, 0.0, 0.0
    for node, value in mask.adds.items():
        own = stats.get(value.name or "")
        if own is None or not own.bounded:
            return f"the range of {value.name!r}, which the mask is added to, is not known"
        wide = MARGIN * (own.high - own.low)
        least, top = own.low - wide, own.high + wide
        floor = least + low - _reach(node, facts, opset)
        floors[node.outputs[0].name or ""] = floor
        number = min(number, floor - max(top, 0.0) - 1.0)
        most = max(most, abs(least), abs(top))
    if 4 * abs(number) > np.abs(numbers).max():
        return f"the range of what it is added to is too wide: {number:.4g} would have to mask"
    lost = most < _LOST * np.abs(numbers).min()
    if not (open_rows or lost) and np.abs(numbers).max() > _KEPT:
        return "rows that are masked as a whole would change"
    clipped = open_rows or lost
    if clipped and opset < 11:
        return f"opset {opset} has no Clip with a bound as input"
    return Bound(number, floors if clipped else {})


def replaced(node: ir.Node, index: int, number: float) -> Array:
    """The constant that a node reads, with this number in place of masking entries; of the same shape, float32."""
    values = array(node.inputs[index])
    assert values is not None
    return np.where(values <= -LEAST, number, values).astype(np.float32)


def _entries(node: ir.Node, index: int) -> Array:
    values = array(node.inputs[index])
    assert values is not None
    return values.reshape(-1).astype(np.float64)


def _seeds(model: ir.Model) -> Iterator[Use]:
    """The nodes of the main graph that read a constant with entries as low as a mask's."""
    for node in model.graph:
        if not is_op(node, "Where", "Mul", "Add", *_MOVES):
            continue
        for i, value in enumerate(node.inputs):
            values = array(value)
            if values is None or values.dtype != np.float32 or not values.size:
                continue
            if (i == 0 and is_op(node, "Where")) or (i > 0 and is_op(node, *_MOVES)):
                continue
            if np.isfinite(values[values > -LEAST]).all() and values.min() <= -LEAST:
                yield node, i


def _holding(seeds: Sequence[Use]) -> set[ir.Value]:
    """All values that hold entries of a mask, before they are added to something."""
    found: set[ir.Value] = set()
    waiting = [node.outputs[0] for node, _ in seeds if not is_op(node, "Add")]
    while waiting:
        value = waiting.pop()
        if value in found:
            continue
        found.add(value)
        handing = (use.node for use in value.uses() if _hands_on(use.node, use.idx))
        waiting += [node.outputs[0] for node in handing]
    return found


def _hands_on(node: ir.Node, index: int) -> bool:
    return (is_op(node, *_MOVES) and index == 0) or (is_op(node, "Where") and index > 0)


def _follow(model: ir.Model, seed: Use, holding: set[ir.Value], facts: Mapping[str, Fact]) -> Mask:
    """What one constant reaches."""
    mask = Mask([seed])
    waiting = [seed]
    while waiting:
        node, index = waiting.pop(0)
        if node.graph is not model.graph:
            mask.refused = "a body of If, Loop or Scan reads it"
        elif is_op(node, "Add"):
            _add(mask, node, index, holding, facts)
        elif _hands_on(node, index) or (is_op(node, "Mul") and (node, index) == seed):
            _beside(mask, node, index, holding)
            made = node.outputs[0]
            if made in mask.values:
                continue
            mask.values.append(made)
            if made.is_graph_output():
                mask.refused = "it is an output of the model"
            waiting += [(use.node, use.idx) for use in made.uses()]
        else:
            mask.refused = f"{node.op_type} {node.name} reads it"
    return mask


def _beside(mask: Mask, node: ir.Node, index: int, holding: set[ir.Value]) -> None:
    """The factor of a product, or the other branch of a Where."""
    if is_op(node, *_MOVES):
        return
    other = node.inputs[3 - index if is_op(node, "Where") else 1 - index]
    if other is None or other in holding:
        return
    if is_op(node, "Mul"):
        mask.factors.append(other)
    elif array(other) is None:
        mask.others.append(other)


def _add(
    mask: Mask, node: ir.Node, index: int, holding: set[ir.Value], facts: Mapping[str, Fact]
) -> None:
    """What the mask is added to, if a Softmax alone reads the sum."""
    x, made = node.inputs[1 - index], node.outputs[0]
    users = [use.node for use in made.uses()]
    if x is None or array(x) is not None or x in holding:
        mask.refused = "two masks are added"
        return
    mask.adds[node] = x
    fact = facts.get(made.name or "")
    if fact is None or fact.dtype != np.float32:
        mask.refused = "what it is added to is no float32"
    if made.is_graph_output() or not users or not all(is_op(user, "Softmax") for user in users):
        others = [user.op_type for user in users if not is_op(user, "Softmax")]
        mask.refused = f"not only a Softmax reads the sum: {others[0] if others else 'an output'}"


def _meet(a: Mask, b: Mask) -> bool:
    values = set(a.values)
    return any(value in values for value in b.values)


def _joined(a: Mask, b: Mask) -> Mask:
    return Mask(
        [*a.uses, *b.uses], {**a.adds, **b.adds}, list(dict.fromkeys([*a.values, *b.values])),
        [*a.factors, *b.factors], [*a.others, *b.others], a.refused or b.refused,
    )  # fmt: skip


def _unproved(
    mask: Mask, stats: Mapping[str, TensorStats], numbers: Array, *, open_rows: bool
) -> str:
    """Why the mask is not known to be what it looks like."""
    infinite = not np.isfinite(numbers).all()
    if infinite and (not open_rows or mask.factors):
        return "a row that -inf masks as a whole is NaN, and must stay so"
    if len(set(numbers.tolist())) > 1 and not open_rows:
        return "constants of several sizes mask"
    if max(map(abs, mask.small())) >= LEAST:
        return "its other entries are as large"
    for value in (*mask.factors, *mask.others):
        own = stats.get(value.name or "")
        if own is None or not own.bounded or max(abs(own.low), abs(own.high)) >= LEAST:
            return f"the range of {value.name!r} beside the mask is not known"
        if value in mask.factors and not (_whole(value) and own.low >= 0 and own.high <= 1):
            return f"its factor {value.name!r} may be other than 0 and 1"
    return ""


def _whole(value: ir.Value | None, steps: int = _DEEP) -> bool:
    """Whether a tensor holds whole numbers only."""
    values = array(value)
    if values is not None:
        return bool((values == np.round(values)).all())
    node = None if value is None else value.producer()
    if node is None or steps == 0:
        return False
    if is_op(node, "Cast"):
        kind = node.inputs[0].dtype if node.inputs[0] is not None else None
        known = kind is not None and (kind.is_integer() or kind == ir.DataType.BOOL)
        return known or _whole(node.inputs[0], steps - 1)
    if is_op(node, "Sub", "Add", "Mul"):
        return all(_whole(operand, steps - 1) for operand in node.inputs)
    return is_op(node, *_MOVES) and _whole(node.inputs[0], steps - 1)


def _open_rows(mask: Mask, facts: Mapping[str, Fact], opset: int) -> bool:
    """Whether each row of a Softmax has an entry that is not masked: the masks are constants that say so."""
    for node, index in mask.uses:
        values, shape = array(node.inputs[index]), _shape(node, facts)
        if not is_op(node, "Add") or values is None or not values.ndim or not shape:
            return False
        if not (values > -LEAST).any(axis=-1).all():
            return False
        if any(
            _axis(use.node, opset) not in (-1, len(shape) - 1) for use in node.outputs[0].uses()
        ):
            return False
    return True


def _shape(node: ir.Node, facts: Mapping[str, Fact]) -> tuple[int, ...]:
    fact = facts.get(node.outputs[0].name or "")
    return () if fact is None or fact.shape is None else fact.shape


def _axis(softmax: ir.Node, opset: int) -> int:
    found: int = attribute(softmax, "axis", -1 if opset >= 13 else 1)
    return found


def _reach(node: ir.Node, facts: Mapping[str, Fact], opset: int) -> float:
    """How far below all else masked entries must be, so that all of a row together weigh nothing."""
    shape, row = _shape(node, facts), 1
    for use in node.outputs[0].uses() if shape else ():
        axis = _axis(use.node, opset)
        # before opset 13 all axes from this one on are one row
        row = max(row, math.prod(shape[axis:]) if opset < 13 else shape[axis])
    return math.log(max(row, _ROW)) + _BITS * math.log(2)
