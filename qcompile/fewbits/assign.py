"""How many bits each matrix gets: by the recipe, its patterns, and what kernels take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import onnx_ir as ir

from qcompile.errors import RecipeError
from qcompile.graph.chain import Stored, follow
from qcompile.graph.edit import graphs, is_op
from qcompile.graph.linear import Linear, find_linears
from qcompile.keep import match_patterns
from qcompile.quant.affine import too_small
from qcompile.recipe import Recipe

_WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "LSTM", "GRU", "RNN")
TABLE_BITS = 8  # of heads that are the table of embeddings as well, and of portable tables, unless a pattern says otherwise
_LEAST = 1 << 12  # weights: a smaller matrix costs more in kernels than it saves


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Bits and blocks of one matrix.

    Attributes:
        bits: 2, 4 or 8.
        block: weights that share a scale.
        symmetric: zero points are the middle code.
    """

    bits: int
    block: int
    symmetric: bool

    def __str__(self) -> str:
        return f"uint{self.bits}.axis1/{self.block}.{'sym' if self.symmetric else 'asym'}"


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What becomes of the matrices of a model.

    Attributes:
        chosen: those that get few bits, in graph order, with their schemes.
        left: the others, with the reason.
    """

    chosen: tuple[tuple[Linear, Scheme], ...]
    left: tuple[tuple[Linear, str], ...]


def assign(model: ir.Model, recipe: Recipe, original: ir.Model) -> Assignment:
    """A scheme for every matrix that a kernel takes, or the reason why it stays float; nothing if no bits are asked for.

    Raises:
        RecipeError: a pattern matches nothing.
    """
    keep = match_patterns(model, recipe.keep_float, original).why
    if recipe.bits is None:
        return Assignment((), ())
    asked = asked_bits(model, recipe.bits_for, original)
    chosen: list[tuple[Linear, Scheme]] = []
    left: list[tuple[Linear, str]] = []
    items = find_linears(model)
    tables, heads = (
        {item.weight.key for item in items if item.weight and (item.kind == "gather") == table}
        for table in (True, False)
    )
    tied = tables & heads
    for item in items:
        reason = item.reason or keep.get(item.name)
        if reason is None and item.rarely_pays and item.name not in asked:
            reason = "it would need its activations transposed: name it with --bits-for to have it all the same"
        if reason is None and item.shape[0] * item.shape[1] < _LEAST and item.name not in asked:
            reason = f"it has {item.shape[0] * item.shape[1]} weights, too few to save anything"
        if reason is None:
            reason = too_small(item.read()) or None
        if reason is not None:
            left.append((item, reason))
            continue
        assert item.weight is not None
        whole = item.weight.key in tied or (item.kind == "gather" and recipe.format == "qdq")
        usual = max(recipe.bits, TABLE_BITS) if whole else recipe.bits
        bits = asked.get(item.name, usual)
        chosen.append((item, Scheme(bits, recipe.usual_block, recipe.symmetric)))
    return Assignment(tuple(_shared(chosen)), tuple(left))


def others(model: ir.Model, listed: AbstractSet[ir.Node]) -> list[tuple[str, str, str]]:
    """(name, operator, reason) of nodes with constant weights that are no products with a matrix."""
    return [
        (node.name or "", node.op_type, f"kernels for weights of few bits take no {node.op_type}")
        for graph in graphs(model)
        for node in graph
        if is_op(node, *_WEIGHTED) and node not in listed and any(map(_is_weight, node.inputs[:2]))
    ]


def _is_weight(value: ir.Value | None) -> bool:
    found = follow(value)
    return isinstance(found, Stored) and found.dtype.is_floating_point()


def _shared(chosen: Sequence[tuple[Linear, Scheme]]) -> list[tuple[Linear, Scheme]]:
    """Readers of one matrix get one scheme, that of most bits, so that it is stored once."""
    most: dict[object, Scheme] = {}
    for item, scheme in chosen:
        assert item.weight is not None
        known = most.get(item.weight.key)
        if known is None or scheme.bits > known.bits:
            most[item.weight.key] = scheme
    return [(item, most[item.weight.key]) for item, _ in chosen if item.weight is not None]


def asked_bits(model: ir.Model, wishes: Sequence[str], original: ir.Model) -> dict[str, int]:
    """Bits by node name, of the wishes PATTERN=BITS; the last one counts.

    Raises:
        RecipeError: a wish is spelled otherwise, or its pattern matches nothing.
    """
    found: dict[str, int] = {}
    for wish in wishes:
        pattern, _, bits = wish.rpartition("=")
        if not pattern or bits not in ("2", "4", "8"):
            raise RecipeError(
                f"bits_for {wish!r}: write PATTERN=BITS with 2, 4 or 8 bits, as lm_head=8."
            )
        found |= dict.fromkeys(
            match_patterns(model, [pattern], original, "--bits-for").why, int(bits)
        )
    return found
