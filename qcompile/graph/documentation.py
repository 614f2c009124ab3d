"""What nodes say of themselves to people and tools, and what changes nothing in what they compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from qcompile.graph.edit import nodes


@dataclasses.dataclass(frozen=True)
class Said:
    """The doc string and the metadata of a node."""

    doc_string: str | None
    properties: Mapping[str, str]


def documentation(model: ir.Model) -> dict[str, Said]:
    """What the nodes of all graphs say, by name; those that say nothing, or have no name, are left out."""
    return {
        node.name: Said(node.doc_string, dict(node.metadata_props))
        for node in nodes(model)
        if node.name and (node.doc_string or node.metadata_props)
    }


def restore(model: ir.Model, said: Mapping[str, Said]) -> None:
    """Nodes that took the place of others, under their names, and say nothing, say what those said."""
    for node in nodes(model) if said else ():
        before = said.get(node.name or "")
        if before is None or node.doc_string or node.metadata_props:
            continue
        node.doc_string = before.doc_string
        node.metadata_props.update(before.properties)
