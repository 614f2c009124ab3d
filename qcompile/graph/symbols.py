"""Sizes that are numbers or symbols.

A symbol stands for one size of one tensor in a run. Two symbols are one where every run that ends without an error has the same number
for both, so what is equal here is equal whatever is fed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import onnx_ir as ir


@dataclasses.dataclass(eq=False)
class Symbol:
    """A size that is not known.

    Attributes:
        known: what it is equal to, once that is found: follow it with `find`.
        natural: never negative.
        length: of a tensor, so far below the limits of integers.
        copied: it is equal to this, or this is 0: a Reshape to a size of 0 copies what it reads.
    """

    known: Size | None = None
    natural: bool = True
    length: bool = True
    copied: Size | None = None


Size = int | Symbol
Sizes = tuple[Size, ...]


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The contents of an integer tensor (or of flags, 0 and 1) of no or one axis."""

    sizes: Sizes
    scalar: bool
    kind: ir.DataType


def find(size: Size) -> Size:
    """The number, or the one symbol that stands for all that are equal."""
    last = size
    while isinstance(last, Symbol) and last.known is not None:
        last = last.known
    while isinstance(size, Symbol) and size.known is not None:  # a long way is gone once
        size.known, size = last, size.known
    return last


def found(sizes: Sequence[Size]) -> Sizes:
    """The same of several."""
    return tuple(map(find, sizes))


class Known:
    """What is known of sizes.

    Attributes:
        shapes: by value, of those whose rank is known.
        numbers: contents of small integer tensors, by value.
    """

    def __init__(self) -> None:
        self.shapes: dict[ir.Value, Sizes] = {}
        self.numbers: dict[ir.Value, Numbers] = {}
        self._made: dict[tuple[object, ...], Symbol] = {}
        self._sure = True

    @contextlib.contextmanager
    def guessing(self) -> Iterator[None]:
        """What is read meanwhile may never run: nothing is joined."""
        before, self._sure = self._sure, False
        try:
            yield
        finally:
            self._sure = before

    def shape(self, value: ir.Value | None) -> Sizes | None:
        """The sizes of a value, None if its rank is not known."""
        sizes = None if value is None else self.shapes.get(value)
        return None if sizes is None else found(sizes)

    def contents(self, value: ir.Value | None) -> Numbers | None:
        """What a small integer tensor holds, None if that is not known."""
        numbers = None if value is None else self.numbers.get(value)
        return numbers and dataclasses.replace(numbers, sizes=found(numbers.sizes))

    def join(self, a: Size, b: Size) -> None:
        """Both are equal in every run that does not fail."""
        a, b = find(a), find(b)
        if a is b or not self._sure:
            return
        if isinstance(a, Symbol):
            a.known = b
        elif isinstance(b, Symbol):
            b.known = a

    def broadcast(self, shapes: Sequence[Sizes]) -> Sizes:
        """The sizes of what operands of these give."""
        made: list[Size] = []
        for place in range(-max(map(len, shapes)), 0):
            here = found([sizes[place] for sizes in shapes if len(sizes) >= -place])
            other = list(dict.fromkeys(size for size in here if size != 1))
            # beside a size of 0, others are 0 or 1
            other = [
                size
                for size in other
                if not isinstance(size, Symbol)
                or size.copied is None
                or find(size.copied) not in other
            ]
            fixed = [size for size in other if isinstance(size, int)]
            if fixed:
                made.append(fixed[0])
            elif len(other) > 1:  # one of them, and the others that or 1
                made.append(self._result("broadcast", *sorted(other, key=id)))
            else:
                made.append(other[0] if other else 1)
        return tuple(made)

    def total(self, sizes: Sequence[Size]) -> Size:
        """The size of tensors side by side."""
        made: Size = 0
        for size in sizes:
            made = self.reckon("Add", ir.DataType.INT64, made, size)
            if isinstance(made, Symbol):
                made.natural = made.length = True
        return made

    def copy(self, size: Size, other: Size | None) -> Size:
        """The size that a Reshape to `size` makes, of a tensor that has `other` there, None if it has nothing there."""
        size, other = find(size), None if other is None else find(other)
        if not isinstance(size, Symbol) or size is other:
            return size
        made = Symbol() if other is None else self._result("copy", size, other)
        made.copied = size
        return made

    def reckon(self, op: str, kind: ir.DataType, *operands: Size) -> Size:
        """What Add, Sub, Mul, Div, Equal or Where make of elements of a type."""
        values = found(operands)
        if op == "Where":
            chosen = values[0]
            return values[1 if chosen else 2] if isinstance(chosen, int) else _any()
        a, b = values
        if op == "Equal":
            return self._equal(a, b)
        if isinstance(a, int) and isinstance(b, int):
            if op == "Div":  # of integers: towards 0
                quotient = abs(a) // abs(b) if b else 0
                return (quotient if (a < 0) == (b < 0) else -quotient) if b else _any()
            return {"Add": a + b, "Sub": a - b, "Mul": a * b}[op]
        if (op in ("Add", "Sub") and b == 0) or (op in ("Mul", "Div") and b == 1):
            return a
        if (op == "Add" and a == 0) or (op == "Mul" and a == 1):
            return b
        # lengths are far below 2**31: sums and products of two do not wrap in 64 bits
        small = all(v.length if isinstance(v, Symbol) else 0 <= v < 1 << 31 for v in (a, b))
        natural = op != "Sub" and small and kind == ir.DataType.INT64
        if op in ("Add", "Mul") and (
            isinstance(a, int) or (isinstance(b, Symbol) and id(a) > id(b))
        ):
            a, b = b, a
        return self._result(op, kind, a, b, natural=natural, length=False)

    def _equal(self, a: Size, b: Size) -> Size:
        if a is b or (isinstance(a, int) and isinstance(b, int)):
            return int(a == b)
        for one, other in ((a, b), (b, a)):
            if isinstance(one, Symbol) and one.natural and isinstance(other, int) and other < 0:
                return 0
        return self._result("Equal", a, b)

    def _result(
        self, op: str, *operands: Size | ir.DataType, natural: bool = True, length: bool = True
    ) -> Symbol:
        """The symbol of a result: the same for the same operands."""
        key = (op, *operands)
        if key not in self._made:
            self._made[key] = Symbol(natural=natural, length=length)
        return self._made[key]


def _any() -> Symbol:
    """Any integer."""
    return Symbol(natural=False, length=False)
