"""Solved weights of a few bits as initializers: each stored once, and made when the model is saved if it can wait.

A model of 3 GiB need not have all its codes in memory: `Deferred` weights say how they will look, and make their codes
when a tensor of theirs is written. Codes, scales and zero points of a weight stand one after the other, so that they
are made once a file: the last ones made are kept until others are asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from qcompile.algo.blocks import Blocked
from qcompile.errors import ModelError, PassError
from qcompile.quant import nbits
from qcompile.quant.pack import pack

if TYPE_CHECKING:
    import numpy.typing as npt

    from qcompile.graph.edit import Names
    from qcompile.graph.linear import Linear

Style = Literal["product", "table", "portable", "portable_table"]


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """Weights that are made when they are needed, once or more often: by reading a file, or by rounding to nearest.

    Attributes:
        bits: as in `Blocked`.
        block: as in `Blocked`.
        symmetric: every zero point is 2**(bits - 1).
        make: the weights, which must be as the other fields say.
    """

    bits: int
    block: int
    symmetric: bool
    make: Callable[[], Blocked]


Solved = Blocked | Deferred | Callable[[], Blocked]
"""Weights of a node. A bare function is called once to see how its weights look, and again when they are saved."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Weights with their layout. `given` tells those that are the same from others."""

    layout: nbits.Layout
    make: Callable[[], Blocked]
    given: Solved

    @property
    def eager(self) -> bool:
        """Whether the codes are there already."""
        return isinstance(self.given, Blocked)

    def same(self, other: Source) -> bool:
        """Whether both are the same object, or hold equal codes, scales and zero points."""
        if self.given is other.given:
            return True
        a, b = self.given, other.given
        if not (isinstance(a, Blocked) and isinstance(b, Blocked)):
            return False
        return (a.bits, a.block) == (b.bits, b.block) and all(
            np.array_equal(left, right)
            for left, right in ((a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero))
        )


def as_source(item: Linear, given: Solved) -> Source | str:
    """The weights for a node, or the reason why no kernel takes them.

    Raises:
        PassError: they have another shape than the node's weight.
    """
    if isinstance(given, Deferred):
        bits, block, symmetric, make = given.bits, given.block, given.symmetric, given.make
    else:
        made = given if isinstance(given, Blocked) else given()
        if made.codes.shape != item.shape:
            raise PassError(
                f"the weights solved for node {item.name!r} are {made.codes.shape}, its weight is {item.shape}."
            )
        bits, block = made.bits, made.block
        symmetric = bool(np.all(made.zero == 1 << (bits - 1)))
        make = (lambda: given) if isinstance(given, Blocked) else given
    reason = nbits.misfit(bits, block)
    if reason is not None:
        return reason
    if (
        isinstance(given, Blocked)
        and item.weight is not None
        and item.weight.dtype != ir.DataType.FLOAT
    ):
        try:
            _scales(given, 1.0, np.dtype(np.float16), item.name)
        except ModelError as error:
            return str(error).removesuffix(".")
    return Source(nbits.Layout(*item.shape, bits, block, symmetric), make, given)


@dataclasses.dataclass(frozen=True)
class Payload:
    """A stored weight: codes, scales, and zero points unless it is symmetric."""

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value | None


class Store:
    """The payloads of a model, in the graphs where the float weights are: readable wherever those are.

    But for the portable style: each node has its own, in its own graph. ORT 1.32 makes MatMulNBits of a
    DequantizeLinear only if nobody else reads its codes, scales and zero points, and refuses a model where these stand
    in an outer graph ("Missing required weight").
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._payloads: dict[object, list[tuple[Source, Payload]]] = {}
        self._last: tuple[Source, Blocked] | None = None

    def payload(self, item: Linear, source: Source, style: Style, factor: float = 1.0) -> Payload:
        """The initializers for the weight of a node, shared with those who read the same in the same style.

        Args:
            item: the node.
            source: its weights.
            style: which operator reads them.
            factor: what the scales are multiplied by.
        """
        weight = item.weight
        assert weight is not None
        own = item.node if style == "portable" else None
        payloads = self._payloads.setdefault((weight.key, weight.dtype, style, factor, own), [])
        for known, payload in payloads:
            if known.same(source):
                return payload
        kind = np.dtype(np.float16 if weight.dtype == ir.DataType.FLOAT16 else np.float32)
        layout, name = source.layout, weight.root.name or item.name
        shapes = _SHAPES[style](layout)
        types = _types(style, layout)

        def stored(
            part: str, index: int, dtype: ir.DataType, make: Callable[[Blocked], Any]
        ) -> ir.Value:
            shape = shapes[index]
            tensor = self._tensor(source, dtype, shape, lambda made: make(made).reshape(shape))
            return self._register(
                weight.root.graph if own is None else own.graph, f"{name}_{part}", tensor
            )

        payload = Payload(
            stored("q", 0, types, lambda made: _codes(made, layout, style)),
            stored(
                "scale", 1, ir.DataType.from_numpy(kind),
                lambda made: _turned(nbits.spread(_scales(made, factor, kind, item.name), layout), style),
            ),
            None if layout.symmetric else stored("zero_point", 2, types, lambda made: _zeros(made, layout, style)),
        )  # fmt: skip
        payloads.append((source, payload))
        return payload

    def _tensor(
        self,
        source: Source,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        make: Callable[[Blocked], Any],
    ) -> ir.TensorProtocol:
        """A tensor of the numbers that `make` finds in the weights: now if they are there, else when it is read."""

        def tensor() -> ir.TensorProtocol:
            values = np.ascontiguousarray(make(self._made(source)))
            if dtype.itemsize >= 1:
                return ir.Tensor(values, dtype=dtype)
            qtype = source.layout.portable_type
            return ir.PackedTensor(pack(values, qtype), dtype, shape=shape)

        return tensor() if source.eager else ir.LazyTensor(tensor, dtype, ir.Shape(shape))

    def _made(self, source: Source) -> Blocked:
        """The weights; the last ones made are at hand."""
        if self._last is not None and self._last[0] is source:
            return self._last[1]
        self._last = None  # before others are made: a table of 128k rows has a gigabyte of codes
        made = source.make()
        layout = source.layout
        shown = (
            made.codes.shape,
            made.bits,
            made.block,
            bool(np.all(made.zero == 1 << (made.bits - 1))),
        )
        said = (
            (layout.rows, layout.depth),
            layout.bits,
            layout.block,
            layout.symmetric or shown[3],
        )
        if shown != said:
            raise PassError(
                f"deferred weights are (shape, bits, block, symmetric) {shown}, but were said to be {said}."
            )
        if not source.eager:
            self._last = (source, made)
        return made

    def _register(self, home: object, wish: str, tensor: ir.TensorProtocol) -> ir.Value:
        assert isinstance(home, ir.Graph)
        name = self._names.fresh(wish)
        tensor.name = name
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        home.register_initializer(value)
        return value


def _types(style: Style, layout: nbits.Layout) -> ir.DataType:
    """The element type of codes and zero points."""
    return (
        ir.DataType(layout.portable_type.onnx_type)
        if style in ("portable", "portable_table")
        else ir.DataType.UINT8
    )


def _shapes_blocks(layout: nbits.Layout, codes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return codes, (layout.rows, layout.groups), layout.zeros_shape


_SHAPES: dict[Style, Callable[[nbits.Layout], tuple[tuple[int, ...], ...]]] = {
    "product": lambda layout: _shapes_blocks(layout, layout.product_shape),
    "table": lambda layout: _shapes_blocks(layout, layout.table_shape),
    "portable": lambda layout: ((layout.depth, layout.rows), *((layout.groups, layout.rows),) * 2),
    "portable_table": lambda layout: (
        (layout.rows, layout.groups, layout.size), *((layout.rows, layout.groups, 1),) * 2,
    ),
}  # fmt: skip


def _codes(made: Blocked, layout: nbits.Layout, style: Style) -> npt.NDArray[Any]:
    if style == "product":
        return nbits.product_codes(made.codes, layout)
    if style == "table":
        return nbits.table_codes(made.codes, layout)
    portable = nbits.portable_codes(made.codes, layout)
    if style == "portable":
        return portable
    rows = portable.T  # (N, K)
    return np.pad(rows, ((0, 0), (0, layout.groups * layout.size - layout.depth)))


def _zeros(made: Blocked, layout: nbits.Layout, style: Style) -> npt.NDArray[Any]:
    if style in ("product", "table"):
        return nbits.packed_zeros(made.zero, layout)
    return _turned(nbits.spread(made.zero, layout), style)


def _turned(params: npt.NDArray[Any], style: Style) -> npt.NDArray[Any]:
    """(N, G), or (G, N) for DequantizeLinear on axis 0."""
    return params.T if style == "portable" else params


def _scales(made: Blocked, factor: float, kind: np.dtype[Any], name: str) -> npt.NDArray[Any]:
    """The scales times a factor, of the type of the activations.

    Raises:
        ModelError: a scale is 0 or infinite in float16.
    """
    scale = made.scale if factor == 1 else made.scale * np.float32(factor)
    if kind == np.float32:
        return scale
    with np.errstate(over="ignore"):
        narrow = scale.astype(kind)
    if not np.all(np.isfinite(narrow) & (narrow != 0)):
        raise ModelError(f"a scale of the weight of node {name!r} is 0 or infinite in float16.")
    return narrow
