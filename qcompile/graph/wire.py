"""Models in one file without their weights in memory: read as references into the file, written one at a time.

The bytes written are those that protobuf would write. Messages are sequences of fields, each a key (number << 3 | wire
type) and a value; of wire type 2 it is a length and so many bytes. Source: protobuf's "Encoding", and onnx.proto for the
numbers of fields.
"""

from __future__ import annotations

import mmap
from typing import IO, TYPE_CHECKING

import onnx  # noqa: TID251 - a door to protobuf
import onnx_ir as ir

from qcompile.errors import PassError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from google.protobuf.message import Message

GRAPH = 7  # of ModelProto
INITIALIZER = 5  # of GraphProto
RAW_DATA = 9  # of TensorProto
LEAST = 4096  # bytes of a tensor that is worth a reference
_BYTES = 2  # wire type
_FIXED = {1: 8, 5: 4}  # bytes of the wire types of numbers of one length

Field = tuple[int, int, int, int]  # number, start of the key, start of the value, end


def varint(number: int) -> bytes:
    """Seven bits a byte, lowest first; all but the last have the high bit set."""
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*made, number))


def key(number: int, length: int) -> bytes:
    """What stands before a value of so many bytes."""
    return varint(number << 3 | _BYTES) + varint(length)


def read_mapped(path: Path, location: str | None = None) -> onnx.ModelProto:
    """The model of a file; large initializers of its main graph refer to the file as if it were external data.

    Args:
        path: of the file.
        location: what they call it; its name, if not given.

    Raises:
        ValueError: the bytes are no message.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        made, graphs = bytearray(), [f for f in _fields(data, 0, len(data)) if f[0] == GRAPH]
        if len(graphs) != 1:
            raise ValueError("the file holds no graph, or one in pieces")
        _, start, inner, end = graphs[0]
        made += data[:start]
        graph = _graph(data, inner, end, location or path.name)
        made += key(GRAPH, len(graph)) + graph
        made += data[end:]
    model = onnx.ModelProto()
    model.ParseFromString(bytes(made))
    return model


def _graph(data: mmap.mmap, start: int, end: int, name: str) -> bytes:
    """A graph with references in place of large numbers."""
    made = bytearray()
    for number, first, inner, last in _fields(data, start, end):
        if number == INITIALIZER and last - inner >= LEAST:
            tensor = _tensor(data, inner, last, name)
            made += key(INITIALIZER, len(tensor)) + tensor
        else:
            made += data[first:last]
    return bytes(made)


def _tensor(data: mmap.mmap, start: int, end: int, name: str) -> bytes:
    made = bytearray()
    for number, first, inner, last in _fields(data, start, end):
        if number == RAW_DATA and last - inner >= LEAST:
            refer = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
            for word, text in (("location", name), ("offset", inner), ("length", last - inner)):
                refer.external_data.add(key=word, value=str(text))
            made += refer.SerializeToString()
        else:
            made += data[first:last]
    return bytes(made)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[Field]:
    """The fields of the message that stands in these bytes."""
    at = start
    while at < end:
        first = at
        word, at = _varint(data, at, end)
        number, kind = word >> 3, word & 7
        if kind == _BYTES:
            length, at = _varint(data, at, end)
        elif kind == 0:
            _, stop = _varint(data, at, end)
            length = stop - at
        elif kind in _FIXED:
            length = _FIXED[kind]
        else:
            raise ValueError(f"wire type {kind} at byte {first}")
        if at + length > end:
            raise ValueError(f"the field at byte {first} ends beyond its message")
        yield number, first, at, at + length
        at += length


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number, and where the next byte stands."""
    number = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise ValueError(f"a number at byte {at} does not end")


def write(model: ir.Model, file: IO[bytes]) -> None:
    """`file` holds the model in one message; at most one large initializer of the main graph was in memory at a time.

    Args:
        model: all its weights together have less than 2 GiB, which protobuf is limited to.
        file: open for writing, at its beginning.

    Raises:
        PassError: a tensor has other bytes than it said.
    """
    held = [
        (value, value.const_value)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    ]
    streamed: dict[str, ir.TensorProtocol] = {}
    try:
        for value, tensor in held:
            if value.graph is model.graph and _can_wait(tensor):
                tensor.name = value.name  # as the serializer of `onnx_ir` does
                streamed[value.name or ""] = tensor
                value.const_value = _placeholder(tensor)
            elif isinstance(tensor, ir.ExternalTensor):  # a reference holds in one folder only
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        proto = ir.to_proto(model)
    finally:
        for value, tensor in held:
            value.const_value = tensor
    _write(proto, streamed, file)


def _can_wait(tensor: ir.TensorProtocol) -> bool:
    kinds = ir.LazyTensor, ir.ExternalTensor, ir.Tensor, ir.PackedTensor
    return isinstance(tensor, kinds) and tensor.nbytes >= LEAST


def _placeholder(tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    """What a tensor looks like, without its numbers."""
    return ir.ExternalTensor(
        "", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name or "",
        doc_string=tensor.doc_string, metadata_props=dict(tensor.metadata_props),
    )  # fmt: skip


def _write(proto: onnx.ModelProto, tensors: dict[str, ir.TensorProtocol], file: IO[bytes]) -> None:
    pieces: list[tuple[bytes, ir.TensorProtocol | None, bytes]] = []
    for held in proto.graph.initializer:
        tensor = tensors.get(held.name)
        if tensor is None:
            pieces.append((held.SerializeToString(), None, b""))
            continue
        held.ClearField("external_data")
        held.ClearField("data_location")
        head, tail = _split(held, RAW_DATA)
        pieces.append((head + key(RAW_DATA, tensor.nbytes), tensor, tail))
    sizes = [len(a) + len(c) + (0 if t is None else t.nbytes) for a, t, c in pieces]
    proto.graph.ClearField("initializer")
    head, tail = _split(proto.graph, INITIALIZER)
    whole = len(head) + len(tail) + sum(size + len(key(INITIALIZER, size)) for size in sizes)
    proto.ClearField("graph")
    before, after = _split(proto, GRAPH)
    file.write(before + key(GRAPH, whole) + head)
    _write_tensors(pieces, sizes, file)
    file.write(tail + after)


def _write_tensors(
    pieces: Sequence[tuple[bytes, ir.TensorProtocol | None, bytes]],
    sizes: Sequence[int],
    file: IO[bytes],
) -> None:
    for (head, tensor, tail), size in zip(pieces, sizes, strict=True):
        file.write(key(INITIALIZER, size) + head)
        if tensor is not None:
            start = file.tell()
            tensor.tofile(file)  # type: ignore[attr-defined]  # all of the three kinds have it
            if file.tell() - start != tensor.nbytes:
                raise PassError(
                    f"tensor {tensor.name!r} wrote {file.tell() - start} bytes and said {tensor.nbytes}."
                )
        file.write(tail)


def _split(message: Message, number: int) -> tuple[bytes, bytes]:
    """The bytes of the fields before and after a number; a message is written in the order of numbers."""
    halves = []
    for before in (True, False):
        part = type(message)()
        part.CopyFrom(message)
        for field, _ in message.ListFields():
            if (field.number < number) != before:
                part.ClearField(field.name)
        halves.append(part.SerializeToString())
    return halves[0], halves[1]
