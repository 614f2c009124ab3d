"""Reading and writing ONNX files: the only module, with `text`, that knows protobuf.

Weights stay where they are: external data is memory-mapped when it is read, and streamed when it is
written. A file appears under its final name only when it is complete.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx  # noqa: TID251 - the one door to protobuf
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import numpy_helper  # noqa: TID251

from qcompile.errors import ModelError, brief
from qcompile.graph import trust, wire
from qcompile.graph.publish import atomic, check_apart, data_file

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

MAX_OPSET = 27  # onnxruntime 1.32 has no QuantizeLinear kernel at 28
# protobuf stops at 2 GiB: weights of more than this go to a data file
EXTERNAL_BYTES = 1_900_000_000
_UNREADABLE = (
    ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError, OverflowError, OSError,
)  # fmt: skip


def load(source: str | Path | ir.Model | onnx.ModelProto, *, mapped: bool = False) -> ir.Model:
    """The model, its weights not yet read.

    Args:
        source: a file, or a model in memory, which is not changed.
        mapped: large weights inside the file stay there, too: they are read as if they were external data.

    Raises:
        ModelError: `source` is missing, not an ONNX model, truncated, lacks its external data, or says of itself what
            cannot be: see `qcompile.graph.trust`.
    """
    if isinstance(source, ir.Model | onnx.ModelProto):
        return _from_memory(source)
    path = Path(source)
    try:
        if not path.exists():
            raise ModelError(f"{path} does not exist: give the path of an ONNX model.")
        if path.is_dir():
            raise ModelError(f"{path} is a folder: give the path of the .onnx file inside it.")
        if not os.access(path, os.R_OK):
            raise ModelError(f"{path} cannot be read: check its permissions.")
        model = ir.from_proto(_dense(_read(path, mapped=mapped)))
        trust.set_folder(model, path.parent)
        _trust(model, path.resolve())
    except DecodeError as error:
        raise ModelError(
            f"{path} is not an ONNX model, or is truncated ({path.stat().st_size} bytes): "
            "export or copy it again."
        ) from error
    except _UNREADABLE as error:
        raise ModelError(f"{path} cannot be read as an ONNX model: {_reason(error)}.") from error
    trust.check(model, str(path), path)
    return _checked(model, str(path))


def _from_memory(source: ir.Model | onnx.ModelProto) -> ir.Model:
    """A copy whose tensors share the caller's numbers."""
    where, outside = "the model given", None
    try:
        if isinstance(source, ir.Model):
            if not _is_sorted(source):
                raise ModelError(f"the nodes of {where} are not sorted: call model.graph.sort().")
            model = source.clone()
        else:
            model, outside = ir.from_proto(_dense(source)), Path(where)
            trust.set_folder(model, Path())  # it does not say where its data is: here, or nowhere
        trust.check(model, where, outside)
        return _checked(_unshared(model), where)
    except _UNREADABLE as error:
        raise ModelError(f"{where} is not valid: {_reason(error)}.") from error


def _reason(error: BaseException) -> str:
    """What the cause of all says."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return brief(error)


def _read(path: Path, *, mapped: bool) -> onnx.ModelProto:
    if mapped:
        with contextlib.suppress(ValueError):  # what is no message is refused below
            return wire.read_mapped(path, str(path.resolve()))
    return onnx.load(path, load_external_data=False)


def _trust(model: ir.Model, path: Path) -> None:
    """Tensors that stand in the model's own file are read though it may be a link, as in a cache of downloads."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.location == str(path):
            tensor.base_dir = ""  # onnx_ir refuses links out of a folder that is given


def _checked(model: ir.Model, where: str) -> ir.Model:
    if not len(model.graph) and not model.graph.inputs and not model.graph.outputs:
        raise ModelError(f"{where} holds no graph: it is not an ONNX model, or is truncated.")
    if not model.graph.outputs:
        raise ModelError(f"{where} has no outputs: there is nothing to compile.")
    if not model.opset_imports:
        raise ModelError(f"{where} names no opset: it is not a valid ONNX model.")
    if not _is_sorted(model):  # ONNX Runtime sorts by itself
        try:
            model.graph.sort()
        except ValueError as error:
            raise ModelError(f"{where} is not valid: its nodes wait for each other.") from error
    return model


def _is_sorted(model: ir.Model) -> bool:
    """Whether each node stands behind what it and its bodies read."""
    for graph in model.graphs():
        place = {node: i for i, node in enumerate(graph)}
        for node, i in place.items():
            bodies = (
                inner
                for held in node.attributes.values()
                if held.type == ir.AttributeType.GRAPH
                for inner in held.as_graph().all_nodes()
            )
            read = (v for each in (node, *bodies) for v in each.inputs if v is not None)
            if any(place.get(v.producer(), -1) >= i for v in read):  # type: ignore[arg-type]
                return False
    return True


def _dense(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with dense tensors in place of sparse initializers, which the IR lacks; a copy if it has any."""
    if not model.graph.sparse_initializer:
        return model
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for sparse in copied.graph.sparse_initializer:
        values, index = map(numpy_helper.to_array, (sparse.values, sparse.indices))
        stored = values.nbytes + index.nbytes
        trust.check_dense(sparse.dims, stored, values.itemsize, sparse.values.name)
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        if index.ndim == 1:  # into the flat tensor
            dense.reshape(-1)[index] = values
        else:
            dense[tuple(index.T)] = values
        copied.graph.initializer.append(numpy_helper.from_array(dense, sparse.values.name))
    del copied.graph.sparse_initializer[:]
    return copied


def _unshared(model: ir.Model) -> ir.Model:
    """The model with tensors of its own that share the caller's numbers: a new name is ours alone."""
    bodies = [function.graph for function in model.functions.values()]
    for graph in (*model.graphs(), *(g for body in bodies for g in (body, *body.subgraphs()))):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _unnamed(value.const_value)
        for node in graph:
            for key, attr in node.attributes.items():
                if attr.type == ir.AttributeType.TENSOR and not attr.is_ref():
                    node.attributes[key] = ir.AttrTensor(key, _unnamed(attr.as_tensor()))
    return model


def _unnamed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Another tensor of the same numbers, which are not copied."""
    if isinstance(tensor, ir.TensorProtoTensor):  # its name is that of the protobuf message
        return ir.Tensor(
            tensor.numpy(), tensor.dtype, shape=tensor.shape, name=tensor.name, doc_string=tensor.doc_string
        )  # fmt: skip
    return copy.copy(tensor)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, in every scope."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def model_bytes(model: ir.Model) -> int:
    """What the model takes on disk, about: exactly if it can be one message of protobuf."""
    size = weight_bytes(model)
    return len(to_bytes(model)) if size < EXTERNAL_BYTES else size


def to_bytes(model: ir.Model) -> bytes:
    """The serialized model, weights included. Only for models below 2 GiB."""
    data: bytes = _to_proto(model).SerializeToString()
    return data


def _to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model with its weights inside, wherever they came from."""
    with _weights_inside(model):
        proto: onnx.ModelProto = ir.to_proto(model)
        return proto


@contextlib.contextmanager
def _weights_inside(model: ir.Model) -> Iterator[None]:
    """Meanwhile no initializer refers to a file: such a reference holds in one folder only."""
    held = [
        (value, value.const_value)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    try:
        for value, tensor in held:
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        yield
    finally:
        for value, tensor in held:
            value.const_value = tensor


def file_bytes(path: Path) -> int:
    """Size of a model on disk, with the external data files it names."""
    model = ir.from_proto(_read(path, mapped=True))  # weights are not read
    ir.external_data.set_base_dir(model.graph, path.parent)
    files = {file.resolve() for file in (path, *external_files(model))}
    return sum(file.stat().st_size for file in files)


def external_files(model: ir.Model) -> set[Path]:
    """The files beside the model's own that hold weights of it, or constants of its nodes."""
    held: list[object] = []
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        held += [value.const_value for value in graph.initializers.values()]
        held += [
            attribute.value
            for node in graph
            for attribute in node.attributes.values()
            if attribute.type == ir.AttributeType.TENSOR
        ]
    return {Path(tensor.path) for tensor in held if isinstance(tensor, ir.ExternalTensor)}


def check_outside(place: Path, model: Path) -> None:
    """Nothing, if `place` holds no weights of the model in the file `model`.

    Raises:
        OutputError: writing it would destroy them.
        ModelError: the model cannot be read.
    """
    there = [file for file in (place, data_file(place)) if file.exists()]
    if there:
        for file in sorted(external_files(load(model, mapped=True))):
            for one in there:
                check_apart(one, {"the external data of the model": file})


def save(model: ir.Model, path: Path) -> None:
    """`path` (and `path`.data for large weights) hold the model; each is replaced only when whole.

    Raises:
        OutputError: the folder is missing or cannot be written, or the disk is full.
    """
    with atomic(path) as temporary:
        write(model, temporary)


def write(model: ir.Model, path: Path) -> None:
    """As `save`, in place: for a folder of one's own, as `atomic` gives.

    Raises:
        OSError: it cannot be written.
    """
    if weight_bytes(model) >= EXTERNAL_BYTES:
        ir.save(model, path, external_data=data_file(path).name)
        return
    with path.open("wb") as file:
        wire.write(model, file)


def check(model: ir.Model) -> str | None:
    """The ONNX checker's complaint about the model, if it has one."""
    if weight_bytes(model) >= EXTERNAL_BYTES:
        return None  # the checker wants a file; such models are checked by loading them in ORT
    try:
        onnx.checker.check_model(to_bytes(model))
    except onnx.checker.ValidationError as error:
        return str(error).strip().splitlines()[0]
    return None


def check_file(path: Path) -> str | None:
    """The ONNX checker's complaint about a file, whose weights stay there. Its folder must be one's own."""
    skeleton = path.with_name("skeleton.onnx")
    try:
        skeleton.write_bytes(wire.read_mapped(path).SerializeToString())
        onnx.checker.check_model(str(skeleton))
    except (onnx.checker.ValidationError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    finally:
        skeleton.unlink(missing_ok=True)
    return None


def convert_opset(model: ir.Model, opset: int) -> ir.Model:
    """The model at a newer default-domain opset, by onnx's own converter.

    Raises:
        ModelError: the converter cannot do it.
    """
    proto = _to_proto(model)
    proto.ir_version = max(proto.ir_version, 8)  # below 4 the converter wants weights as inputs
    try:
        proto = onnx.version_converter.convert_version(proto, opset)
    except (RuntimeError, ValueError, onnx.version_converter.ConvertError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(f"the model cannot be raised to opset {opset}: {reason}.") from error
    converted = ir.from_proto(proto)
    named = {value.name: node.name for node in model.graph for value in node.outputs}
    for node in converted.graph:  # those that were rewritten have lost their names
        node.name = node.name or next(
            (named[v.name] for v in node.outputs if v.name in named), None
        )
    return converted
