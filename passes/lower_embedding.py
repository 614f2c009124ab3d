"""Stores embedding tables as 8-bit rows.

    Gather(W[f32], ids)  =>  fused:    GatherBlockQuantized(W_q[u8], ids, scales)
                         =>  portable: Cast(Gather(W_q[s8], ids)) * Gather(scales, ids)

A quarter of the bytes, and of what a lookup reads.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import Names, add_initializer, add_node, graphs, supersede
from qcompile.plan.candidates import Candidate
from qcompile.plan.plan import Form, Plan
from qcompile.step import Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qcompile.solve.weights import Weight

MS = "com.microsoft"


@dataclasses.dataclass(frozen=True)
class LowerEmbedding(Pass):
    """The WEIGHT Gather nodes of a plan, in every graph. Attributes as in `LowerDynamic`."""

    name: ClassVar[str] = "lower_embedding"
    plan: Plan
    found: Mapping[str, Candidate | str]
    weights: Mapping[str, Weight]
    form: Literal["portable", "fused"] = "fused"

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Results keep their names; nodes that read one table share its codes."""
        outcome, names = Outcome(), Names(model)
        tables: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for entry in self.plan.of(Form.WEIGHT):
            item = self.found[entry.node]
            if not isinstance(item, Candidate) or item.role != "embedding":
                continue  # a product
            node, weight = item.node, self.weights[entry.node]
            table = node.inputs[0]
            assert table is not None
            if table not in tables:
                tables[table] = self._store(table, weight, names)
            width = weight.codes.shape[1]
            result = self._look_up(node, *tables[table], width=width, names=names)
            result.type = ir.TensorType(ir.DataType.FLOAT)
            supersede(node.outputs[0], result)
            assert node.graph is not None
            node.graph.remove(node, safe=True)
            outcome.changed.append(entry.node)
        if outcome.changed and self.form == "fused":
            for graph in graphs(model):
                graph.opset_imports.setdefault(MS, 1)
        return outcome

    def _store(self, table: ir.Value, weight: Weight, names: Names) -> tuple[ir.Value, ir.Value]:
        """Codes and scales, beside the table: they can be read wherever it can."""
        home = table.graph
        assert isinstance(home, ir.Graph)
        codes, scale = weight.codes, weight.params.scale.reshape(-1, 1)  # (rows, 1)
        if self.form == "fused":
            # Unsigned codes around 128, which is the operator's default zero point.
            codes = (codes.astype(np.int16) + 128).astype(np.uint8)
        return (
            add_initializer(home, names, f"{table.name}_q", codes),
            add_initializer(home, names, f"{table.name}_scale", scale),
        )

    def _look_up(
        self, node: ir.Node, codes: ir.Value, scale: ir.Value, *, width: int, names: Names
    ) -> ir.Value:
        wish, ids = node.outputs[0].name or "rows", node.inputs[1]

        def step(
            op_type: str, inputs: list[ir.Value | None], part: str, domain: str = "",
            attributes: dict[str, Any] | None = None,
        ) -> ir.Value:  # fmt: skip
            return add_node(
                names, op_type, inputs, before=node, domain=domain, name=f"{node.name}_{part}",
                output=f"{wish}_{part}", attributes=attributes,
            ).outputs[0]  # fmt: skip

        if self.form == "fused":
            # One block a row, so a power of two at least as wide.
            block = max(16, 1 << (width - 1).bit_length())
            attributes = {"bits": 8, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
            result = step("GatherBlockQuantized", [codes, ids, scale], "int", MS, attributes)
            producer = result.producer()
            assert producer is not None
            producer.name = node.name
            return result
        rows = step("Gather", [codes, ids], "q")
        cast = step("Cast", [rows], "cast", attributes={"to": int(ir.DataType.FLOAT)})
        return step("Mul", [cast, step("Gather", [scale, ids], "scales")], "scaled")
