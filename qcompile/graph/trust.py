"""Models from anywhere: what they say of themselves is checked before anything is allocated or opened for it.

A file of some hundred bytes can name a tensor of a terabyte, a file that is not its own, or functions that expand
without end. Each check here takes time in proportion to the file, and reads no weight.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from qcompile.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_RANK = 64  # of NumPy
MAX_NODES = 1_000_000  # that a model may have when its functions are expanded
MAX_DEPTH = 32  # bodies in bodies: protobuf reads messages of 100 levels, and each body takes three
_LEAST_DENSE, _DENSITY = (
    64 << 20,
    1000,
)  # a sparse weight takes so many bytes, or so many times its own
_MOST_DENSE = 1 << 31
_COMPLEX = (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128)
_FIELDS = {
    ir.DataType.FLOAT: "float_data", ir.DataType.COMPLEX64: "float_data", ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data", ir.DataType.INT64: "int64_data", ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
}  # fmt: skip
_PACKED = (2, 4)  # bits of the types that share the bytes of `int32_data`


def check(model: ir.Model, where: str, path: Path | None) -> None:
    """Nothing, if the model is what it says it is, as far as can be told without reading weights.

    Args:
        model: as it was read.
        where: its name in messages.
        path: its file; None for one in memory, whose tensors outside are the caller's own.

    Raises:
        ModelError: a tensor has other data than its shape and type take, or data that is missing, too short or outside
            of the model's folder; functions call themselves or expand to too many nodes; bodies are too deep; a name
            or metadata is not UTF-8.
    """
    _check_depth(model, where)
    for name, tensor in _tensors(model):
        label = f"tensor {name!r}"
        _check_shape(tensor, label, where)
        if isinstance(tensor, ir.ExternalTensor):
            if path is not None:
                _check_external(tensor, label, path)
        else:
            _check_inline(tensor, label, where)
    _check_functions(model, where)
    _check_nodes(model, where)


def check_dense(dims: Sequence[int], stored: int, item: int, name: str) -> None:
    """Nothing, if a sparse tensor of these dimensions may be made dense.

    Args:
        dims: of the dense tensor.
        stored: bytes of its values and indices.
        item: bytes of an element.
        name: of the tensor.

    Raises:
        ModelError: it would take far more memory than the file does.
    """
    if any(dim < 0 for dim in dims) or len(dims) > MAX_RANK:
        raise ModelError(f"sparse tensor {name!r} has an impossible shape: export the model again.")
    size = math.prod(dims) * item
    if size > min(_MOST_DENSE, max(_LEAST_DENSE, _DENSITY * stored)):
        raise ModelError(
            f"sparse tensor {name!r} takes {size} bytes when it is dense, and {stored} in the file: "
            "export the model with dense weights."
        )


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """All graphs, those of functions too."""
    yield from model.graphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.subgraphs()


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Every tensor that the model holds, with the name of the value that it is, or is made for."""
    for graph in _graphs(model):
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value
        for node in graph:
            for attr in node.attributes.values():
                if attr.is_ref():
                    continue
                name = (node.outputs[0].name if node.outputs else node.name) or ""
                if attr.type == ir.AttributeType.TENSOR:
                    yield name, attr.as_tensor()
                elif attr.type == ir.AttributeType.TENSORS:
                    for tensor in attr.as_tensors():
                        yield name, tensor


def set_folder(model: ir.Model, folder: Path) -> None:
    """Tensors outside of the model's file are looked for in this folder, those of functions too."""
    for _, tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = folder


def _check_shape(tensor: ir.TensorProtocol, label: str, where: str) -> None:
    dims = [dim if isinstance(dim, int) else -1 for dim in tensor.shape]
    if any(dim < 0 for dim in dims) or math.prod(dim for dim in dims if dim) >= 1 << 62:
        raise ModelError(
            f"{where}: {label} has the impossible shape {dims[:MAX_RANK]}: export the model again."
        )
    if len(dims) > MAX_RANK:
        raise ModelError(
            f"{where}: {label} has {len(dims)} dimensions, more than {MAX_RANK}: export the model again."
        )
    outside = isinstance(tensor, ir.ExternalTensor)
    if tensor.dtype == ir.DataType.UNDEFINED or (outside and tensor.dtype == ir.DataType.STRING):
        raise ModelError(
            f"{where}: {label} is of type {tensor.dtype.name}, and has no bytes: export the model again."
        )


def _check_inline(tensor: ir.TensorProtocol, label: str, where: str) -> None:
    size = tensor.size
    if isinstance(tensor, ir.StringTensor):
        held, wanted, unit = len(tensor.string_data()), size, "strings"
    elif isinstance(tensor, ir.serde.TensorProtoTensor):
        proto, bits = tensor.raw, tensor.dtype.bitwidth
        if proto.HasField("raw_data"):
            held, wanted, unit = len(proto.raw_data), -(-size * bits // 8), "bytes"
        else:
            held, unit = len(getattr(proto, _FIELDS.get(tensor.dtype, "int32_data"))), "numbers"
            wanted = size * (2 if tensor.dtype in _COMPLEX else 1)
            wanted = -(-size * bits // 8) if bits in _PACKED else wanted
    else:
        return  # in memory, of a shape of its own
    if held != wanted:
        raise ModelError(
            f"{where}: {label} of shape {list(tensor.shape)} takes {wanted} {unit}, and {held} are there: "
            "export or copy the model again."
        )


def _check_external(tensor: ir.ExternalTensor, label: str, path: Path) -> None:
    label = f"the external data of {label}"
    try:
        file = Path(tensor.path)
        if tensor.base_dir and not _inside(file, Path(tensor.base_dir)):
            raise ModelError(
                f"{label} is refused: {file} is a link, or lies outside of the folder of {path.name}. "
                "Copy both into one folder."
            )
        if not file.exists():
            raise ModelError(
                f"{label} is missing: {file} does not exist. Put it beside {path.name}."
            )
        if not file.is_file():
            raise ModelError(f"{label} is refused: {file} is no ordinary file.")
        there = file.stat().st_size
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # a name that no file can have, a ring of links
        raise ModelError(f"{label} cannot be found: {error}.") from error
    offset, length, size = tensor.offset or 0, tensor.length or tensor.nbytes, tensor.nbytes
    if offset < 0 or length != size:
        raise ModelError(
            f"{label} is said to be {length} bytes from byte {offset}, and its shape takes {size}: "
            "export the model again."
        )
    if there < offset + length:
        raise ModelError(
            f"{label} is truncated: {file} has {there} bytes of at least {offset + length}. Copy it again."
        )


def _inside(file: Path, folder: Path) -> bool:
    """Whether a file is in a folder, links followed, and in no other: what else a model names may be a secret."""
    found = file.resolve()
    alone = not found.is_file() or found.stat().st_nlink == 1
    return alone and found.is_relative_to(folder.resolve())


def _check_depth(model: ir.Model, where: str) -> None:
    """No recursion here, as this is what guards it."""
    waiting = [(model.graph, 0), *((function.graph, 0) for function in model.functions.values())]
    while waiting:
        graph, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ModelError(
                f"{where} has bodies of If, Loop or Scan more than {MAX_DEPTH} deep in each other, "
                "more than ONNX files can hold."
            )
        for node in graph:
            for attr in node.attributes.values():
                if attr.type == ir.AttributeType.GRAPH and not attr.is_ref():
                    waiting.append((attr.as_graph(), depth + 1))
                elif attr.type == ir.AttributeType.GRAPHS and not attr.is_ref():
                    waiting.extend((body, depth + 1) for body in attr.as_graphs())


def _check_functions(model: ir.Model, where: str) -> None:
    """Nodes are counted from functions that call no others upwards: expanding them may never end."""
    if not model.functions:
        return
    own: dict[ir.OperatorIdentifier, int] = {}
    calls: dict[ir.OperatorIdentifier, list[ir.OperatorIdentifier]] = {}
    for key, function in model.functions.items():
        bodies = [function.graph, *function.subgraphs()]
        own[key] = sum(map(len, bodies))
        called = [node.op_identifier() for body in bodies for node in body]
        calls[key] = [callee for callee in called if callee in model.functions]
    counts: dict[ir.OperatorIdentifier, int] = {}
    for start in model.functions:
        chain: dict[ir.OperatorIdentifier, Iterator[ir.OperatorIdentifier]] = {
            start: iter(calls[start])
        }
        while chain and start not in counts:
            key = next(reversed(chain))
            missing = next((other for other in chain[key] if other not in counts), None)
            if missing is None:
                counts[key] = own[key] + sum(counts[other] for other in calls[key])
                del chain[key]
            elif missing in chain:
                raise ModelError(
                    f"{where}: function {missing[1]!r} calls itself, which ONNX does not allow: export the model again."
                )
            else:
                chain[missing] = iter(calls[missing])
    graphs = list(model.graphs())
    total = sum(map(len, graphs)) + sum(
        counts.get(node.op_identifier(), 0) for graph in graphs for node in graph
    )
    if total > MAX_NODES:
        raise ModelError(
            f"{where} has more than {MAX_NODES} nodes when its functions are expanded: "
            "export it with fewer calls."
        )


def _check_nodes(model: ir.Model, where: str) -> None:
    """What is not UTF-8, protobuf gives as bytes; texts made in Python may hold half a surrogate pair."""
    holders = [model, *(held for graph in _graphs(model) for held in (graph, *graph))]
    for key, value in (entry for held in holders for entry in held.metadata_props.items()):
        if not (_is_text(key) and _is_text(value)):
            raise ModelError(f"{where}: the metadata {key!r} is not UTF-8: export the model again.")
    for graph in _graphs(model):
        names = [value.name for value in (*graph.inputs, *graph.initializers.values())]
        for node in graph:
            if not node.outputs:
                raise ModelError(
                    f"{where}: node {node.name!r} ({node.op_type}) has no outputs: export the model again."
                )
            names += [node.name, node.op_type, node.domain, *(value.name for value in node.outputs)]
        for name in names:
            if not _is_text(name):
                raise ModelError(
                    f"{where}: the name {name!r} is not UTF-8: export the model again."
                )


def _is_text(name: object) -> bool:
    if not isinstance(name, str):
        return name is None
    return name.isascii() or not any("\ud800" <= c <= "\udfff" for c in name)
