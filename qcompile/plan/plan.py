"""The plan: for each node of the prepared graph the form it takes, and why.

A plan is plain data: it can be printed, saved, edited and fed back. Which tensors carry codes
follows from the forms (`qcompile.plan.tensors`), so that an edit cannot contradict itself.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from qcompile.errors import RecipeError
from qcompile.table import fill, read_text

VERSION = 1


class Form(enum.StrEnum):
    """What becomes of a node.

    STATIC: integer kernel, activation scales from calibration.
    DYNAMIC: integer kernel, the activation's scale found at every inference.
    WEIGHT: 8-bit weight alone: rows of embeddings, and products whose kernel rounds each block of the input by itself.
    FREE: codes pass unchanged, only their scale or zero point is read differently.
    ABSORBED: part of the node before it (an activation function that saturation does anyway).
    FLOAT: as it was.
    """

    STATIC = "static"
    DYNAMIC = "dynamic"
    WEIGHT = "weight"
    FREE = "free"
    ABSORBED = "absorbed"
    FLOAT = "float"


@dataclasses.dataclass(frozen=True)
class NodePlan:
    """One node.

    Attributes:
        node: its name in the prepared graph, which is its name in the input where that is unique.
        op: its operator type.
        form: what it becomes.
        weight: spelling of the weight's scheme (`int8.axis0.sym`), "" where it has none.
        why: the reason, in words.
    """

    node: str
    op: str
    form: Form
    weight: str = ""
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The forms of all nodes for one target; `activation` spells the scheme of activations."""

    target: str
    activation: str
    nodes: tuple[NodePlan, ...]

    def __getitem__(self, node: str) -> NodePlan:
        return self._index[node]

    def get(self, node: str | None) -> NodePlan | None:
        """The entry of a node, if it has one."""
        return None if node is None else self._index.get(node)

    @property
    def _index(self) -> Mapping[str, NodePlan]:
        index = self.__dict__.get("_by_name")
        if index is None:
            index = {entry.node: entry for entry in self.nodes}
            object.__setattr__(self, "_by_name", index)
        return index

    def of(self, *forms: Form) -> list[NodePlan]:
        """The entries with one of these forms, in graph order."""
        return [entry for entry in self.nodes if entry.form in forms]

    @property
    def quantizes(self) -> bool:
        """Whether anything becomes an integer kernel or an 8-bit weight."""
        return bool(self.of(Form.STATIC, Form.DYNAMIC, Form.WEIGHT))

    def keep_float(self, nodes: Iterable[str], why: str) -> Plan:
        """The plan with these nodes float; what depended on them is settled by `qcompile.plan.make`."""
        chosen = set(nodes)
        return dataclasses.replace(
            self,
            nodes=tuple(
                dataclasses.replace(e, form=Form.FLOAT, why=why) if e.node in chosen else e
                for e in self.nodes
            ),
        )

    def to_json(self) -> str:
        """The plan as JSON text, one node a line."""
        rows = [json.dumps(dataclasses.asdict(entry)) for entry in self.nodes]
        head = json.dumps(
            {"version": VERSION, "target": self.target, "activation": self.activation}
        )
        return head[:-1] + ', "nodes": [\n' + ",\n".join(rows) + "\n]}\n"

    def show(self) -> str:
        """The plan as aligned text, one node a line."""
        rows = [("node", "op", "form", "weight", "why")]
        rows += [(e.node, e.op, e.form.value, e.weight, e.why) for e in self.nodes]
        widths = [min(60, max(len(row[i]) for row in rows)) for i in range(4)]
        return "\n".join(
            "  ".join(
                [*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]
            ).rstrip()
            for row in rows
        )


def load_plan(path: Path) -> Plan:
    """The plan of a JSON file that `Plan.to_json` wrote and a person may have edited.

    Raises:
        RecipeError: not a plan; the message names the file and the entry.
    """
    where = f"plan {path}"
    try:
        table = json.loads(read_text(path, where))
    except RecursionError as error:
        raise RecipeError(f"{where} is nested too deeply.") from error
    except ValueError as error:
        raise RecipeError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(table, dict) or table.pop("version", None) != VERSION:
        raise RecipeError(
            f"{where} is not a plan of version {VERSION}: write one with `qcompile plan`."
        )
    plan = fill(Plan, table, where)
    for name, count in Counter(entry.node for entry in plan.nodes).items():
        if count > 1:
            raise RecipeError(f"{where} has {count} entries for node {name!r}: keep one.")
    return plan
