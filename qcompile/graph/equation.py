"""Einsum as a product of rows with a matrix: which equations are one, and how the weight is read for it.

    x[prefix, contracted] , w[free and contracted in any order] -> y[prefix, free]

"bsk,kn->bsn" is a MatMul; "bsk,khd->bshd" is one with h and d as one axis, "bshd,hdk->bsk" one with two contracted.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Product:
    """An equation of that kind.

    Attributes:
        perm: order of the weight's axes that puts free before contracted ones, each as x and y have them.
        prefix: leading axes of x and y; None with an ellipsis.
        free: how many axes of the weight are in the result.
        contracted: how many are not.
    """

    perm: tuple[int, ...]
    prefix: int | None
    free: int
    contracted: int


def as_product(equation: str, weight: int) -> Product | str:
    """The equation as a product with operand `weight` (0 or 1) as the matrix, or why it is none."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    operands = terms.split(",")
    if len(operands) != 2:
        return f"its equation {equation!r} has {len(operands)} operands"
    w, x = operands[weight], operands[1 - weight]
    if not arrow:  # ONNX: letters that appear once, in alphabetical order, behind the ellipsis
        letters = sorted(c for c in w + x if c != "." and (w + x).count(c) == 1)
        result = ("..." if "." in x else "") + "".join(letters)
    if (
        "." in w
        or len(set(w)) < len(w)
        or any(t.count(c) > 1 for t in (x, result) for c in t if c != ".")
    ):
        return f"its equation {equation!r} repeats a letter, or has an ellipsis in the weight"
    contracted = "".join(c for c in x if c in w and c not in result)
    free = "".join(c for c in result if c in w and c not in x)
    prefix = x.removesuffix(contracted)
    if not contracted or not free:
        return f"its equation {equation!r} is no product with a matrix"
    if set(w) != set(free + contracted) or x != prefix + contracted or result != prefix + free:
        return f"its equation {equation!r} is no product of rows with one matrix"
    dots = "." in prefix
    if not prefix or (dots and (len(free) > 1 or len(contracted) > 1)):
        return f"its equation {equation!r} leaves open how many axes its input has"
    perm = tuple(w.index(c) for c in free + contracted)
    return Product(perm, None if dots else len(prefix), len(free), len(contracted))
