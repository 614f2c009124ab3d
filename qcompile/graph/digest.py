"""What a model computes, as one number: to tell whether something was gathered on this very model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import onnx_ir as ir


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def digest(model: ir.Model) -> str:
    """SHA-256 of the graph and the weights, in hexadecimal.

    It covers operators, names of values, attributes, bodies, functions, opsets, types and shapes of inputs and
    outputs, and every number; but not where the file is, how weights are stored, who made it, or what
    documentation it carries.
    """
    made = hashlib.sha256()
    for domain, version in sorted(model.opset_imports.items()):
        _words(made, "opset", domain or "ai.onnx", str(version))
    _graph(made, model.graph)
    for key in sorted(model.functions, key=str):
        function = model.functions[key]
        _words(made, "function", *map(str, key), *(v.name or "" for v in function.inputs))
        for domain, version in sorted(function.opset_imports.items()):
            _words(made, "opset", domain or "ai.onnx", str(version))
        _attributes(made, function.attributes)
        for node in function:
            _node(made, node)
        _words(made, *(v.name or "" for v in function.outputs))
    return made.hexdigest()


def _graph(made: _Hash, graph: ir.Graph) -> None:
    for title, values in (("in", graph.inputs), ("out", graph.outputs)):
        for value in values:
            _words(made, title, value.name or "", str(value.type), str(value.shape))
    for name in sorted(graph.initializers):
        _words(made, "weight", name)
        tensor = graph.initializers[name].const_value
        if tensor is not None:
            _tensor(made, tensor)
    for node in graph:
        _node(made, node)
    _words(made, "end")


def _node(made: _Hash, node: ir.Node) -> None:
    _words(made, "node", node.domain or "ai.onnx", node.op_type, node.overload or "")
    _words(made, *("" if v is None else v.name or "" for v in node.inputs), "->")
    _words(made, *(v.name or "" for v in node.outputs))
    _attributes(made, node.attributes)


def _attributes(made: _Hash, attributes: Mapping[str, ir.Attr]) -> None:
    for name in sorted(attributes):
        attribute = attributes[name]
        _words(made, "attribute", name, str(attribute.type), attribute.ref_attr_name or "")
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            _graph(made, attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            for body in attribute.as_graphs():
                _graph(made, body)
        elif attribute.type == ir.AttributeType.TENSOR:
            _tensor(made, attribute.as_tensor())
        elif attribute.type == ir.AttributeType.TENSORS:
            for tensor in attribute.as_tensors():
                _tensor(made, tensor)
        else:
            _words(made, repr(attribute.value))


def _tensor(made: _Hash, tensor: ir.TensorProtocol) -> None:
    _words(made, tensor.dtype.name, str(list(tensor.shape)))
    if tensor.dtype == ir.DataType.STRING:
        _words(made, repr(tensor.numpy().tolist()))
        return
    values = np.ascontiguousarray(tensor.numpy())
    made.update(memoryview(values.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]


def _words(made: _Hash, *words: str) -> None:
    for word in words:
        data = word.encode("utf-8", "surrogatepass")
        made.update(len(data).to_bytes(8, "little") + data)
