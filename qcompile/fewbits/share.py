"""Bits and blocks shared out among the matrices of a model: what costs it least, within a size.

Each matrix may have 2, 4 or 8 bits (ORT has no kernel for 3) in blocks of 16 to 128, and each choice has its bytes, exactly as they
are stored, and what it is expected to cost the model (`qcompile.fewbits.damage`). Costs are taken to add up, so that the best choice is
a knapsack's (`qcompile.plan.knapsack`). Matrices that several nodes read are counted, and stored, once.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from passes.lower_nbits import Form
from qcompile.errors import LimitError
from qcompile.fewbits.assign import Assignment, Scheme
from qcompile.fewbits.sequential import tap
from qcompile.fewbits.size import stored_bytes
from qcompile.graph.linear import Linear
from qcompile.plan.knapsack import choose
from qcompile.recipe import Recipe

_BITS = (2, 4, 8)
_SHARED = (16, 32, 64, 128)
_SLOW = 16  # blocks for which the kernel of 2 bits has no fast path (ORT 1.32)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix, and what may become of it.

    Attributes:
        readers: the nodes that read it, in graph order.
        schemes: to choose from.
        sizes: bytes of each.
    """

    readers: tuple[Linear, ...]
    schemes: tuple[Scheme, ...]
    sizes: tuple[int, ...]

    @property
    def weights(self) -> int:
        """How many numbers it has."""
        rows, depth = self.readers[0].shape
        return rows * depth

    def decider(self, model: ir.Model) -> Linear:
        """The node of `model` whose inputs decide how the matrix is rounded, as in `qcompile.fewbits.sequential`."""
        tapped = [item for item in self.readers if tap(item, model)]
        return (tapped or list(self.readers))[-1 if tapped else 0]


@dataclasses.dataclass(frozen=True)
class Shares:
    """What was chosen.

    Attributes:
        assignment: the schemes.
        bits: on average a weight, scales and zero points included.
        nbytes: of all matrices.
        cost: expected, in the unit of the costs given.
    """

    assignment: Assignment
    bits: float
    nbytes: int
    cost: float

    def summary(self) -> str:
        """How many matrices got what, most frequent first."""
        count: Counter[str] = Counter()
        seen: set[object] = set()
        for item, scheme in self.assignment.chosen:
            assert item.weight is not None
            if item.weight.key not in seen:
                count[f"{scheme.bits} bits in blocks of {scheme.block}"] += 1
            seen.add(item.weight.key)
        return ", ".join(f"{n} of {name}" for name, n in count.most_common())


def matrices(
    assignment: Assignment, recipe: Recipe, asked: Mapping[str, int], form: Form
) -> list[Matrix]:
    """The matrices of a model with all that may become of them, in graph order.

    Args:
        assignment: which have few bits.
        recipe: its block, if it has one, holds for all.
        asked: bits by node name that are not to choose; of several readers the most.
        form: of the result. A table of the portable one has 8 bits.
    """
    readers: dict[object, list[Linear]] = {}
    for item, _ in assignment.chosen:
        assert item.weight is not None
        readers.setdefault(item.weight.key, []).append(item)
    made = []
    for items in readers.values():
        fixed = max((asked[item.name] for item in items if item.name in asked), default=0)
        if form == "portable" and any(item.kind == "gather" for item in items):
            fixed = 8
        open_to: tuple[int, ...] = (fixed,) if fixed else _BITS
        if not fixed and form == "portable" and items[0].shape[0] % 4:
            open_to = _BITS[1:]  # `passes.lower_nbits` refuses such
        schemes = [
            Scheme(bits, block, recipe.symmetric)
            for bits in open_to
            for block in ((recipe.block,) if recipe.block else _SHARED)
            if recipe.block or not (bits == 2 and block == _SLOW)
        ]
        sizes = tuple(stored_bytes(items, scheme, form) for scheme in schemes)
        made.append(Matrix(tuple(items), tuple(schemes), sizes))
    return made


def room(recipe: Recipe, found: Sequence[Matrix], before: int, others: int) -> int:
    """Bytes that all matrices may have together.

    Args:
        recipe: with `bits_per_weight`, `max_size` or both.
        found: the matrices.
        before: bytes of the float model, which a share in percent is of.
        others: bytes of the result that are none of the matrices'.
    """
    rooms = []
    if recipe.bits_per_weight is not None:
        rooms.append(int(recipe.bits_per_weight * sum(one.weights for one in found) / 8))
    limit = recipe.size_limit
    if limit is not None:
        rooms.append(int(limit.of(before / 1e6) * 1e6) - others)
    return min(rooms)


def share(
    assignment: Assignment, found: Sequence[Matrix], costs: Sequence[Sequence[float]], limit: int
) -> Shares:
    """The schemes of least cost that keep the limit.

    Args:
        assignment: of the model.
        found: its matrices.
        costs: of each of their schemes.
        limit: bytes of all matrices; `check_room` has passed.
    """
    numbers = choose([one.sizes for one in found], costs, limit)
    assert numbers is not None
    schemes = {
        one.readers[0].weight.key: one.schemes[i]
        for one, i in zip(found, numbers, strict=True)
        if one.readers[0].weight is not None
    }
    chosen = tuple(
        (item, schemes[item.weight.key]) for item, _ in assignment.chosen if item.weight is not None
    )
    nbytes = sum(one.sizes[i] for one, i in zip(found, numbers, strict=True))
    cost = sum(row[i] for row, i in zip(costs, numbers, strict=True))
    bits = 8 * nbytes / max(sum(one.weights for one in found), 1)
    return Shares(dataclasses.replace(assignment, chosen=chosen), bits, nbytes, cost)


def check_room(recipe: Recipe, found: Sequence[Matrix], limit: int, others: int) -> None:
    """Nothing, if the fewest bits in the largest blocks keep the limit.

    Raises:
        LimitError: they do not; the sentence says what the least is.
    """
    least = sum(min(one.sizes) for one in found)
    if least <= limit:
        return
    asked = []
    if recipe.bits_per_weight is not None:
        bits = 8 * least / max(sum(one.weights for one in found), 1)
        asked.append(
            f"bits_per_weight is {recipe.bits_per_weight:g}, scales and zero points included; the least is {bits:.3f}"
        )
    if recipe.size_limit is not None:
        asked.append(
            f"max_size is {recipe.max_size}; the least is {(least + others) / 1e6:.2f} MB, of which {others / 1e6:.2f} MB "
            "are no weights of few bits"
        )
    raise LimitError(
        f"no bits and blocks are small enough: {', and '.join(asked)}. Nothing was written; allow more, or leave out "
        "--bits-for, --block and --keep-float."
    )
