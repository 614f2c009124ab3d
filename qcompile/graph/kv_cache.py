"""Finds the key and value caches of a decoder, by structure.

    past (graph input) -> Concat(past, new) over tokens -> present (graph output) -> attention
    past (graph input) -> GroupQueryAttention           -> present (graph output)

as exporters write them (optimum, torch, the builder of onnxruntime-genai), whatever the names are. All have the
layout (batch, heads, tokens, width).
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError
from qcompile.graph.edit import attribute, is_op
from qcompile.quant.cache import CacheParams, Packing

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

RANK = 4
TOKENS_AXIS = 2
GQA = "GroupQueryAttention"
MARK = "qcompile.kv_cache"
"""Metadata of a model whose caches are integers: JSON, by name of the past input what `StoredCache` says."""
_KEY_PAST = 3
_STEPS = 8  # operators that a question about what reads a cache goes forward
_LAYOUT = (
    "Cast",
    "Expand",
    "Identity",
    "Reshape",
    "Transpose",
    "Unsqueeze",
    "Squeeze",
    "Mul",
    "Div",
    "DequantizeLinear",
)
_SCORES = ("Add", "Cast", "Div", "Identity", "Mul", "Tanh", "Where", "Max", "Min", "Clip")
_GQA_PAST = {_KEY_PAST: 1, 4: 2}  # input of a past to the output of its present
_KEEPS_FLOAT = ("Attention", "MultiHeadAttention", "DecoderMaskedMultiHeadAttention")


@dataclasses.dataclass(frozen=True)
class Cache:
    """One cache tensor.

    Attributes:
        past: the graph input (batch, heads, tokens, width).
        present: the graph output, with the new tokens at its end.
        node: the Concat or GroupQueryAttention that makes it.
        form: which of them.
        new: the tokens that a Concat adds, (batch, heads, new tokens, width).
    """

    past: ir.Value
    present: ir.Value
    node: ir.Node
    form: Literal["concat", "gqa"]
    new: ir.Value | None = None

    @property
    def is_key(self) -> bool:
        """Whether it may hold keys: products with it go into a Softmax, or nobody can tell."""
        if self.form == "gqa":
            return self.past is self.node.inputs[_KEY_PAST]
        product = _product(self.present, _STEPS)
        return product is None or _reaches_softmax(product, _STEPS)

    @property
    def name(self) -> str:
        """Of the input."""
        return self.past.name or ""

    @property
    def heads(self) -> int | None:
        """The number of heads, if the input's shape fixes it."""
        return _fixed(self.past, 1)

    @property
    def width(self) -> int | None:
        """Elements of one stored token and head, if the input's shape fixes them."""
        return _fixed(self.past, RANK - 1)


@dataclasses.dataclass(frozen=True)
class StoredCache:
    """How one cache of a quantized model is to be written and read.

    Attributes:
        past, present: names of the graph input and output.
        params: of the codes.
        packing: of those of int4.
    """

    past: str
    present: str
    params: CacheParams
    packing: Packing


def mark_caches(model: ir.Model, rows: Sequence[tuple[Cache, str, str, str | None]]) -> None:
    """The model tells how its caches are stored: of each the kind, and the names of scales and offsets."""
    table = {
        cache.name: {
            "present": cache.present.name, "kind": kind, "scale": scale, "offset": offset,
            "packing": (Packing.PAIRS if cache.form == "gqa" else Packing.HALVES).value,
        }
        for cache, kind, scale, offset in rows
    }  # fmt: skip
    model.metadata_props[MARK] = json.dumps(table)


def stored_caches(model: ir.Model) -> tuple[StoredCache, ...]:
    """The integer caches that `mark_caches` told of; none in other models.

    Raises:
        ModelError: what is told does not fit the graph.
    """
    told = model.metadata_props.get(MARK)
    if told is None:
        return ()
    try:
        return tuple(
            StoredCache(
                past, row["present"],
                CacheParams(row["kind"], _numbers(model, row["scale"]), row["offset"] and _numbers(model, row["offset"])),
                Packing(row["packing"]),
            )
            for past, row in json.loads(told).items()
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"the metadata {MARK} does not fit the graph ({error!r}): compile the float model again."
        ) from error


def _numbers(model: ir.Model, name: str) -> npt.NDArray[np.float32]:
    """Scales or offsets (heads, width), stored as (1, heads, 1, width) or so."""
    tensor = model.graph.initializers[name].const_value
    if tensor is None:
        raise KeyError(name)
    values = tensor.numpy().astype(np.float32)
    return values.reshape(values.shape[-3], values.shape[-1]) if values.ndim == RANK else values


def find_caches(model: ir.Model) -> tuple[list[Cache], dict[str, str]]:
    """The caches in the order of the inputs, and by name of the input why another one is none.

    Inputs that neither look like a cache nor are named `past` are passed over in silence. Integer caches are
    found as float ones are.
    """
    found: list[Cache] = []
    reasons: dict[str, str] = {}
    for value in model.graph.inputs:
        cache = _find(value)
        if isinstance(cache, Cache):
            found.append(cache)
        elif cache is not None and "past" in (value.name or ""):
            reasons[value.name or ""] = cache
    return found, reasons


def _find(past: ir.Value) -> Cache | str:
    """The cache that an input is, or why it is none."""
    readers = [(use.node, use.idx) for use in past.uses() if not is_op(use.node, "Shape")]
    if past.is_initializer():
        return "it has a default value, so that callers may leave it out"
    if past.shape is not None and len(past.shape) != RANK:
        return (
            f"it has {len(past.shape)} dimensions, not the {RANK} of (batch, heads, tokens, width)"
        )
    if not readers:
        return "nothing but Shape reads it"
    if any(node.graph is not past.graph for node, _ in readers):
        return "a body of If, Loop or Scan reads it: export the decoder without a cache branch"
    if len(readers) > 1:
        kinds = ", ".join(sorted({node.op_type for node, _ in readers}))
        return f"{len(readers)} nodes read it ({kinds}), not one Concat or {GQA}"
    node, index = readers[0]
    if node.op_type == GQA and index in _GQA_PAST:
        return _of_gqa(past, node, index)
    if is_op(node, "Concat"):
        return _of_concat(past, node, index)
    if node.op_type in _KEEPS_FLOAT:
        return f"{node.op_type} reads it, which has no integer cache"
    return f"{node.op_type} reads it, not a Concat with the new tokens or {GQA}"


def _of_concat(past: ir.Value, node: ir.Node, index: int) -> Cache | str:
    present = node.outputs[0]
    axis = attribute(node, "axis", 0)
    if axis % RANK != TOKENS_AXIS:
        return f"new tokens are joined along axis {axis}, not {TOKENS_AXIS} of (batch, heads, tokens, width)"
    if len(node.inputs) != 2 or index != 0 or node.inputs[1] is None:
        return "new tokens do not stand behind it in a Concat of two tensors"
    if not present.is_graph_output():
        return "its Concat with the new tokens is no output of the graph"
    return Cache(past, present, node, "concat", node.inputs[1])


def _of_gqa(past: ir.Value, node: ir.Node, index: int) -> Cache | str:
    output = _GQA_PAST[index]
    if len(node.outputs) <= output or not node.outputs[output].is_graph_output():
        return f"the cache that {GQA} makes of it is no output of the graph"
    return Cache(past, node.outputs[output], node, "gqa")


def _fixed(value: ir.Value, axis: int) -> int | None:
    if value.shape is None or len(value.shape) != RANK:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def _product(value: ir.Value, steps: int) -> ir.Node | None:
    """The MatMul that reads a value, past operators that move it about."""
    for use in value.uses() if steps else ():
        if is_op(use.node, "MatMul", "Einsum"):
            return use.node
        if is_op(use.node, *_LAYOUT):
            found = _product(use.node.outputs[0], steps - 1)
            if found is not None:
                return found
    return None


def _reaches_softmax(node: ir.Node, steps: int) -> bool:
    return steps > 0 and any(
        is_op(use.node, "Softmax")
        or (is_op(use.node, *_SCORES) and _reaches_softmax(use.node, steps - 1))
        for use in node.outputs[0].uses()
    )
