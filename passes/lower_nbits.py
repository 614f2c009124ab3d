"""Stores the matrices of linear layers and embeddings in a few bits, for kernels that read these.

    x W' (+ b)      => nbits:    MatMulNBits(x, W_q, scales[, zeros][, b])
                    => portable: MatMul(x, DequantizeLinear(W_q, scales[, zeros])) (+ b); ORT makes MatMulNBits of it
    Gather(W, ids)  => nbits:    GatherBlockQuantized(W_q, ids, scales[, zeros])
                    => portable: (Cast(Gather(W_q, ids)) - Gather(zeros, ids)) * Gather(scales, ids), 8 bits only

A table that is also the head's matrix is stored once, as MatMulNBits reads it; the lookup reads it through a Reshape
from (N, G, bytes) to (N, G * bytes), since MatMulNBits takes no other shape. Measured on ORT 1.32 with 64000 rows of
1024, 4 bits, blocks of 32: the file has 41 MB instead of 74. The Reshape costs nothing at run time: ORT folds it when
it optimizes, to a second copy in memory, and else lets it alias. The other way round saves that copy, but without
optimization MatMulNBits then unpacks the whole matrix each time (454 ms instead of 6).
In the portable form each product stores its own weights, since ORT fuses no others, and a lookup wants rows where a
product wants columns; so what is shared is stored as often as it is read.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompile.graph.bias import Bias, find_bias
from qcompile.graph.chain import Stored, follow
from qcompile.graph.edit import (
    Names,
    add_initializer,
    add_node,
    attribute,
    graphs,
    is_op,
    rank,
    supersede,
)  # fmt: skip
from qcompile.graph.linear import Linear, find_linears
from qcompile.graph.place import Steps, release
from qcompile.solve.payload import Solved, Source, Store, as_source
from qcompile.step import Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MS = "com.microsoft"
Form = Literal["nbits", "portable"]
_SINCE = {2: (25, 13), 4: (21, 10), 8: (21, 10)}  # opset with blocks of these bits, and IR version


@dataclasses.dataclass(frozen=True)
class LowerNbits(Pass):
    """The named nodes, in every graph.

    Attributes:
        weights: by node name, (N, K) as `find_linears` has it. Nodes that share a matrix share a payload if their
            weights are one object or hold the same numbers (form nbits).
        form: operators of ORT, or of ONNX only (opset 21; 25 for 2 bits).
        accuracy_level: of MatMulNBits: 4 rounds activations to 8 bits by blocks, which is 4 to 14 times as fast as
            floats for one row; 0 and 1 keep them float32. The portable form leaves it to the session.
    """

    name: ClassVar[str] = "lower_nbits"
    weights: Mapping[str, Solved]
    form: Form = "nbits"
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Results keep their names; float weights that nobody reads any more are gone.

        Raises:
            PassError: weights have another shape than the node's.
        """
        outcome = Outcome()
        items: dict[str, Linear] = {}
        for item in find_linears(model):
            known = items.setdefault(item.name, item)
            if known is not item:
                items[item.name] = dataclasses.replace(item, reason="several nodes have its name")
        for name in self.weights:
            if name not in items:
                outcome.skipped[name] = "no product with a constant matrix has this name"
        chosen: list[tuple[Linear, Source]] = []
        for name, item in items.items():
            fit = self._fit(model, item)
            if isinstance(fit, str):
                outcome.skipped[name] = fit
            elif fit is not None:
                chosen.append((item, fit))
        lowering = _Lowering(Names(model), self.form, self.accuracy_level, chosen)
        for item, source in chosen:
            lowering.lower(item, source)
            outcome.changed.append(item.name)
        if chosen:
            self._declare(model, [source for _, source in chosen])
        return outcome

    def unfit(self, model: ir.Model) -> dict[str, str]:
        """Why nodes that have weights would stay float, by name; the model is not changed."""
        fits = {item.name: self._fit(model, item) for item in find_linears(model)}
        return {
            name: reason
            for name, reason in fits.items()
            if isinstance(reason, str) and name in self.weights
        }

    def _fit(self, model: ir.Model, item: Linear) -> Source | str | None:
        """The weights for a node; the reason why it has none of few bits; None if none are given."""
        if item.reason is not None:
            return item.reason
        if item.name not in self.weights:
            return None
        source = as_source(item, self.weights[item.name])
        if isinstance(source, str) or self.form == "nbits":
            return source
        bits, opset = source.layout.stored, model.opset_imports.get("", 1)
        if opset < _SINCE[bits][0]:
            return f"opset {opset} has no blocks of {bits}-bit codes: raise it to {_SINCE[bits][0]}"
        if bits == 2 and source.layout.rows % 4:
            # Measured on ORT 1.32: the fusion into MatMulNBits mixes up such codes.
            return f"ONNX Runtime computes {source.layout.rows} outputs of 2-bit codes wrongly: their number must be a multiple of 4"
        if item.kind == "gather":
            if bits < 8:
                return f"Gather takes no {bits}-bit codes: lower it in the form of ORT"
            if rank(item.node.inputs[item.x]) is None:
                return "it is not known how many axes its indices have"
        return source

    def _declare(self, model: ir.Model, sources: list[Source]) -> None:
        """The model says that it uses the new operators and types."""
        if self.form == "nbits":
            for graph in graphs(model):
                graph.opset_imports.setdefault(MS, 1)
            return
        needed = max(_SINCE[source.layout.stored][1] for source in sources)
        model.ir_version = max(model.ir_version or 0, needed)


class _Lowering:
    """What the nodes of one model share: payloads, and tables in the shape of lookups."""

    def __init__(
        self, names: Names, form: Form, level: int, chosen: Sequence[tuple[Linear, Source]]
    ) -> None:
        self.names, self.form, self.level = names, form, level
        self.store = Store(names)
        self.tables: dict[ir.Value, ir.Value] = {}
        self.products: dict[
            object, list[Source]
        ] = {}  # sources of products by the matrix they read
        for item, source in chosen:
            if item.kind != "gather" and _alpha(item.node) == 1:
                self.products.setdefault(_matrix(item), []).append(source)

    def lower(self, item: Linear, source: Source) -> None:
        """The node, and the Add of its bias, give way to the new ones."""
        node, tail, bias = item.node, item.node, Bias()
        if item.kind == "gather":
            result = self.look_up(item, source)
        else:
            bias = find_bias(item, Steps(self.names, item))
            tail = bias.node or node
            result = self.product(item, source, bias)
        read = [value for step in dict.fromkeys((tail, node)) for value in step.inputs]
        if result.dtype is None and item.weight is not None:
            result.type = ir.TensorType(item.weight.dtype)
        supersede(tail.outputs[0], result)
        for step in dict.fromkeys((tail, node)):
            assert step.graph is not None
            step.graph.remove(step, safe=True)
        for value in read:
            if isinstance(follow(value), Stored):
                release(value)

    def look_up(self, item: Linear, source: Source) -> ir.Value:
        """The rows of a table."""
        step, layout, ids = Steps(self.names, item), source.layout, item.node.inputs[1]
        if self.form == "portable":
            result, wide = self.portable_rows(item, source, step), layout.groups * layout.size
        else:
            tied = any(source.same(other) for other in self.products.get(_matrix(item), ()))
            payload = self.store.payload(item, source, "product" if tied else "table")
            data = self.as_table(payload.codes, source) if tied else payload.codes
            attributes = {
                "bits": layout.stored, "block_size": layout.size, "gather_axis": 0, "quantize_axis": 1,
            }  # fmt: skip
            inputs = [data, ids, payload.scale, payload.zero]
            result = step("GatherBlockQuantized", inputs, "rows", attributes, MS, main=True)
            columns = layout.groups * layout.size if tied else layout.depth
            wide = -(-columns * layout.stored // 8) * 8 // layout.stored  # whole bytes
        if wide == layout.depth:
            return result
        ends = [
            step.ints(part, [number])
            for part, number in (("from", 0), ("to", layout.depth), ("axis", -1))
        ]
        return step("Slice", [result, *ends], "cut")

    def as_table(self, codes: ir.Value, source: Source) -> ir.Value:
        """B of MatMulNBits as data of GatherBlockQuantized: once, in the graph that stores it."""
        if codes not in self.tables:
            home, layout = codes.graph, source.layout
            assert isinstance(home, ir.Graph)
            rows, groups, size = layout.product_shape
            shape = add_initializer(
                home, self.names, f"{codes.name}_shape", np.array([rows, groups * size], np.int64)
            )
            self.tables[codes] = add_node(
                self.names, "Reshape", [codes, shape], before=home[0],
                name=f"{codes.name}_table", output=f"{codes.name}_table",
            ).outputs[0]  # fmt: skip
        return self.tables[codes]

    def portable_rows(self, item: Linear, source: Source, step: Steps) -> ir.Value:
        """Rows by operators of ONNX: (ids..., G, block), then (ids..., G * block)."""
        payload, ids, layout = (
            self.store.payload(item, source, "portable_table"),
            item.node.inputs[1],
            source.layout,
        )
        assert item.weight is not None

        def rows(table: ir.Value, part: str) -> ir.Value:
            found = step("Gather", [table, ids], part)
            return step("Cast", [found], f"{part}_float", {"to": int(item.weight.dtype)})  # type: ignore[union-attr]

        codes = rows(payload.codes, "q")
        if payload.zero is not None:
            codes = step("Sub", [codes, rows(payload.zero, "zeros")], "off")
        scaled = step(
            "Mul", [codes, step("Gather", [payload.scale, ids], "scales")], "scaled", main=True
        )
        axes = rank(ids)
        assert axes is not None
        shape = step.ints("shape", [0] * axes + [layout.groups * layout.size])  # 0: as it is
        return step("Reshape", [scaled, shape], "rows")

    def product(self, item: Linear, source: Source, bias: Bias) -> ir.Value:
        """Axes moved to where the kernel wants them, the product with its bias, and back."""
        step, node = Steps(self.names, item), item.node
        x = node.inputs[item.x]
        axes = rank(node.inputs[1]) if item.kind == "conv" else 2
        assert axes is not None
        turned = item.kind == "conv" or item.left
        last = [0, *range(2, axes), 1] if item.kind == "conv" else [1, 0]
        if turned or (item.kind == "gemm" and attribute(node, "transA", 0)):
            x = step("Transpose", [x], "turned", {"perm": last})
        form = item.product
        if form is not None and form.contracted > 1:
            x = step(
                "Reshape",
                [x, step.ints("depth", [0] * (form.prefix or 0) + [source.layout.depth])],
                "flat",
            )
        result = self.core(item, source, x, bias.flat, step)
        if bias.other is not None:
            result = step("Add", [result, bias.other], "biased")
        if form is not None and form.free > 1:
            shape = step.ints("shape", [0] * (form.prefix or 0) + list(item.free))
            result = step("Reshape", [result, shape], "unfolded")
        if not turned:
            return result
        back = [0, axes - 1, *range(1, axes - 1)] if item.kind == "conv" else [1, 0]
        return step("Transpose", [result], "back", {"perm": back})

    def core(
        self, item: Linear, source: Source, x: ir.Value | None, bias: ir.Value | None, step: Steps
    ) -> ir.Value:
        """The product with W', x (..., K) -> (..., N), and the bias (N,)."""
        layout, alpha = source.layout, _alpha(item.node)
        if self.form == "nbits":
            payload = self.store.payload(item, source, "product", alpha)
            attributes = {
                "K": layout.depth, "N": layout.rows, "bits": layout.stored, "block_size": layout.size,
                "accuracy_level": self.level,
            }  # fmt: skip
            inputs = [x, payload.codes, payload.scale, payload.zero, None, bias]  # None: g_idx
            return step("MatMulNBits", inputs, "nbits", attributes, MS, main=True)
        payload = self.store.payload(item, source, "portable", alpha)
        weight = step(
            "DequantizeLinear", [payload.codes, payload.scale, payload.zero], "weight",
            {"axis": 0, "block_size": layout.size},
        )  # fmt: skip
        result = step("MatMul", [x, weight], "product", main=True)
        return result if bias is None else step("Add", [result, bias], "biased")


def _alpha(node: ir.Node) -> float:
    return float(attribute(node, "alpha", 1.0)) if is_op(node, "Gemm") else 1.0


def _matrix(item: Linear) -> object:
    assert item.weight is not None
    return item.weight.key, item.weight.dtype
