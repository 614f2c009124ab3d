"""Models and data files made to do harm: each maker writes into a folder what a command is then given.

None of them is large: they only say that they are, or lead to what is.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from networks import from_text, linear_net, rows
from onnx import TensorProto, helper, numpy_helper

HUGE = 1 << 40
Maker = Callable[[Path], None]


def _external(
    folder: Path, location: str, offset: str | None = None, length: str | None = None
) -> None:
    """`m.onnx`, whose weight w0 (256, 256) is said to stand in another file."""
    model = linear_net()
    refer(model.graph.initializer[0], location, offset, length)
    (folder / "m.onnx").write_bytes(model.SerializeToString())


def refer(
    tensor: TensorProto, location: str, offset: str | None = None, length: str | None = None
) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for word, text in (("location", location), ("offset", offset), ("length", length)):
        if text is not None:
            tensor.external_data.add(key=word, value=text)


def secret(place: Path) -> Path:
    place.write_bytes(bytes(1 << 18))
    return place


def _outside(folder: Path) -> str:
    return str(secret(folder.parent / f"{folder.name}-secret").name)


def external_above(folder: Path) -> None:
    _external(folder, f"../{_outside(folder)}")


def external_absolute(folder: Path) -> None:
    _external(folder, str(folder.parent / _outside(folder)))


def external_link(folder: Path) -> None:
    (folder / "w.data").symlink_to(folder.parent / _outside(folder))
    _external(folder, "w.data")


def external_hard_link(folder: Path) -> None:
    os.link(folder.parent / _outside(folder), folder / "w.data")
    _external(folder, "w.data")


def external_device(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    _external(folder, "pipe")


def external_folder(folder: Path) -> None:
    (folder / "w.data").mkdir()
    _external(folder, "w.data", "0", "0")


def external_self(folder: Path) -> None:
    """The data is the model file itself, which is too short for it."""
    _external(folder, "m.onnx")


def offsets(offset: str | None, length: str | None) -> Maker:
    def make(folder: Path) -> None:
        secret(folder / "w.data")
        _external(folder, "w.data", offset, length)

    return make


def external_attribute(folder: Path) -> None:
    """A Constant node refers to a file outside."""
    model = linear_net()
    weight = model.graph.initializer.pop(0)
    refer(weight, f"../{_outside(folder)}")
    model.graph.node.insert(0, helper.make_node("Constant", [], [weight.name], value=weight))
    (folder / "m.onnx").write_bytes(model.SerializeToString())


def external_in_function(folder: Path) -> None:
    """The same inside a local function, and nobody calls it."""
    model = linear_net()
    tensor = TensorProto(name="t", data_type=1, dims=[4])
    refer(tensor, "/etc/passwd")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensor),
        helper.make_node("Add", ["a", "c"], ["b"]),
    ]
    made = helper.make_function("mine", "F", ["a"], ["b"], nodes, [helper.make_opsetid("", 17)])
    model.functions.append(made)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    (folder / "m.onnx").write_bytes(model.SerializeToString())


def weight(**changes: object) -> Maker:
    """The weight w0 says something else of itself than its bytes do."""

    def make(folder: Path) -> None:
        model = linear_net()
        tensor = model.graph.initializer[0]
        for field, value in changes.items():
            tensor.ClearField(field)
            if value == b"" and len(changes) > 1:
                continue  # no bytes, but numbers
            if isinstance(value, list):
                getattr(tensor, field).extend(value)
            else:
                setattr(tensor, field, value)
        (folder / "m.onnx").write_bytes(model.SerializeToString())

    return make


def sparse_huge(folder: Path, dims: tuple[int, ...] = (HUGE, 256)) -> None:
    """A sparse weight of one number that is dense in no memory."""
    model = linear_net()
    model.graph.initializer.pop(0)
    values = numpy_helper.from_array(np.ones(1, np.float32), "w0")
    index = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, index, list(dims)))
    (folder / "m.onnx").write_bytes(model.SerializeToString())


def sparse_outside(folder: Path) -> None:
    """A sparse weight with an index beyond its shape."""
    model = linear_net()
    model.graph.initializer.pop(0)
    values = numpy_helper.from_array(np.ones(1, np.float32), "w0")
    index = numpy_helper.from_array(np.full(1, HUGE, np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, index, [256, 256]))
    (folder / "m.onnx").write_bytes(model.SerializeToString())


def nested(levels: int) -> Maker:
    """Ifs in Ifs, put together from bytes: no library writes so deep a model."""

    def field(number: int, content: bytes) -> bytes:
        size, made = len(content), bytearray(_varint(number << 3 | 2))
        return bytes(made + _varint(size)) + content

    def make(folder: Path) -> None:
        value = helper.make_tensor_value_info("o", 1, [1]).SerializeToString()
        inner = field(1, helper.make_node("Identity", ["x"], ["o"]).SerializeToString())
        body = inner + field(2, b"b") + field(12, value)
        for _ in range(levels):
            other = inner + field(2, b"e") + field(12, value)
            head = field(1, b"c") + field(2, b"o") + field(4, b"If")
            for name, graph in ((b"then_branch", body), (b"else_branch", other)):
                kind = _varint(20 << 3) + _varint(5)  # AttributeProto.type = GRAPH
                head += field(5, field(1, name) + field(6, graph) + kind)
            body = field(1, head) + field(2, b"g") + field(12, value)
        inputs = [
            helper.make_tensor_value_info("x", 1, [1]), helper.make_tensor_value_info("c", 9, [1]),
        ]  # fmt: skip
        graph = body + b"".join(field(11, v.SerializeToString()) for v in inputs)
        opset = field(8, helper.make_opsetid("", 17).SerializeToString())
        (folder / "m.onnx").write_bytes(_varint(1 << 3) + _varint(8) + field(7, graph) + opset)

    return make


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*made, number))


def functions(calls: dict[str, list[str]], root: str) -> Maker:
    """Local functions that each call others in turn, on `x (N, 256)`; without any: Relu."""

    def make(folder: Path) -> None:
        model = from_text("g (float[N,256] x) => (float[N,256] y) { t = Identity(x) y = MatMul(t, w) }",
                          w=np.eye(256, dtype=np.float32))  # fmt: skip
        model.graph.node[0].op_type, model.graph.node[0].domain = root, "mine"
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
        model.opset_import.append(opsets[1])
        for name, callees in calls.items():
            steps = [f"v{i}" for i in range(max(len(callees), 1) + 1)]
            nodes = [
                helper.make_node(callee, [a], [b], domain="mine")
                for callee, a, b in zip(callees, steps, steps[1:], strict=False)
            ] or [helper.make_node("Relu", ["v0"], ["v1"])]
            model.functions.append(
                helper.make_function("mine", name, ["v0"], [steps[-1]], nodes, opsets)
            )
        (folder / "m.onnx").write_bytes(model.SerializeToString())

    return make


LAUGHS = {f"f{i}": [f"f{i + 1}"] * 10 for i in range(30)} | {"f30": []}  # 10 ** 30 nodes
RING = {f"f{i}": [f"f{(i + 1) % 50}"] for i in range(50)}
MANY: dict[str, list[str]] = {f"f{i}": [] for i in range(500)}
DEEP = {f"f{i}": [f"f{i + 1}"] for i in range(300)} | {"f300": []}


def _text(graph: str, **weights: object) -> Maker:
    """`m.onnx` from ONNX's text form, unchecked, with arrays as initializers."""

    def make(folder: Path) -> None:
        arrays = {name: np.asarray(values) for name, values in weights.items()}
        (folder / "m.onnx").write_bytes(from_text(graph, **arrays).SerializeToString())

    return make


def cyclic(folder: Path) -> None:
    model = linear_net()
    model.graph.node[0].input[0] = "r"
    (folder / "m.onnx").write_bytes(model.SerializeToString())


def strange(domain: str) -> Maker:
    def make(folder: Path) -> None:
        model = linear_net()
        model.graph.node[1].op_type, model.graph.node[1].domain = "Strange", domain
        model.opset_import.append(helper.make_opsetid(domain, 1))
        (folder / "m.onnx").write_bytes(model.SerializeToString())

    return make


def renamed(name: str) -> Maker:
    """The result of the Relu, and the node itself, have another name."""

    def make(folder: Path) -> None:
        model = linear_net()
        model.graph.node[1].output[0] = model.graph.node[2].input[0] = name
        model.graph.node[1].name = name
        (folder / "m.onnx").write_bytes(model.SerializeToString())

    return make


def bad_utf8(folder: Path) -> None:
    renamed("QQQQQQQQ")(folder)
    path = folder / "m.onnx"
    path.write_bytes(path.read_bytes().replace(b"QQQQQQQQ", b"\xff\xfe\xc3\x28\xa0\xf0\x28\x8c"))


def bad_metadata(folder: Path) -> None:
    """Metadata whose key is no text."""
    model = linear_net()
    model.metadata_props.add(key="QQQQQQQQ", value="me")
    data = model.SerializeToString().replace(b"QQQQQQQQ", b"\xff\xfe\xc3\x28\xa0\xf0\x28\x8c")
    (folder / "m.onnx").write_bytes(data)


def many_dims(folder: Path) -> None:
    """A weight of 10,000 dimensions."""
    weight(dims=[1] * 10_000 + [256, 256])(folder)


def control_names(folder: Path) -> None:
    renamed("\x1b[2J\x1b[31mred\r\n")(folder)


HEAD = "g (float[N,256] x) => (float[N,256] y) {"
ONES = np.ones(4, np.float32)
# Constants that are small and make large ones: nodes that make c0, and their initializers.
GROWING: dict[str, tuple[str, dict[str, object]]] = {
    "constant of shape": ("c0 = ConstantOfShape(s)", {"s": [HUGE]}),
    "expand": ("c0 = Expand(v, s)", {"v": ONES[:1], "s": [HUGE]}),
    "range": ("r = Range(a, b, d) c0 = Cast<to=1>(r)", {"a": 0, "b": HUGE, "d": 1}),
    "tile": ("c0 = Tile(v, s)", {"v": ONES, "s": [HUGE]}),
    "pad": ("c0 = Pad(v, s)", {"v": ONES, "s": [0, HUGE]}),
    "pad to gigabytes": ("c0 = Pad(v, s)", {"v": ONES, "s": [0, 1 << 30]}),
    "resize": (
        "c0 = Resize(v, , k)",
        {"v": ONES.reshape(1, 1, 2, 2), "k": np.array([1, 1, 1e5, 1e5], np.float32)},
    ),
    "one hot": (
        "c0 = OneHot(i, d, o)",
        {"i": np.zeros(4, np.int64), "d": [HUGE], "o": ONES[:2]},
    ),
    "outer product": (
        "c0 = MatMul(a, b)",
        {"a": np.ones((4000, 1), np.float32), "b": np.ones((1, 4000), np.float32)},
    ),
    "sum of a row and a column": (
        "t = Identity(a) u = Transpose(t) c0 = Add(t, u)",
        {"a": np.ones((1 << 15, 1), np.float32)},
    ),
    "gather": (
        "t = Gather(v, i) c0 = Gather<axis=1>(t, i)",
        {"v": np.ones((1, 1), np.float32), "i": np.zeros(1 << 17, np.int64)},
    ),
    "window": ("c0 = HannWindow(s)", {"s": HUGE}),
    "mel": (
        "c0 = MelWeightMatrix(b, d, r, l, h)",
        {"b": 1 << 20, "d": 1 << 20, "r": 8000, "l": np.float32(0), "h": np.float32(4000)},
    ),
    "convolution": (
        f"c0 = Conv<pads=[{1 << 16}, {1 << 16}, {1 << 16}, {1 << 16}]>(v, k)",
        {"v": ONES.reshape(1, 1, 2, 2), "k": ONES.reshape(1, 1, 2, 2)},
    ),
    "doubled": (
        "a0 = Identity(v) "
        + " ".join(f"a{i + 1} = Concat<axis=0>(a{i}, a{i})" for i in range(36))
        + " c0 = Identity(a36)",
        {"v": ONES},
    ),
}


def growing(name: str, *, taken: bool) -> Maker:
    """Constants that grow, on the way to the output, or in the branch of an If that is not taken."""
    steps, weights = GROWING[name]
    steps += " m0 = ReduceMax<keepdims=0>(c0)"
    if taken:
        return _text(f"{HEAD} {steps} y = Add(x, m0) }}", **weights)
    then = f"then_branch = a () => (float[N,256] p) {{ {steps} p = Add(x, m0) }}"
    other = "else_branch = b () => (float[N,256] q) { q = Relu(x) }"
    inputs = {key: np.asarray(value) for key, value in weights.items()}
    return _text(
        f"{HEAD} n = Shape(x) e = Gather(n, zero) c = Greater(e, many) y = If(c) <{then}, {other}> }}",
        zero=0, many=1 << 20, **inputs,
    )  # fmt: skip


EYE = np.eye(256, dtype=np.float32)
SHAPES: dict[str, Maker] = {
    "input": _text(f"g (float[{HUGE},256] x) => (float[M,256] y) {{ y = MatMul(x, w) }}", w=EYE),
    "input of 8 GB": _text(f"g (float[{1 << 23},256] x) => (float[M,256] y) {{ y = MatMul(x, w) }}", w=EYE),
    "output": _text(f"g (float[N,256] x) => (float[{HUGE},{HUGE}] y) {{ y = MatMul(x, w) }}", w=EYE),
    "value": _text(f"g (float[N,256] x) => (float[N,256] y) <float[{HUGE},{HUGE}] h> {{ h = MatMul(x, w) y = Relu(h) }}", w=EYE),
    "reshape": _text(f"{HEAD} h = MatMul(x, w) r = Reshape(h, s) y = Relu(r) }}", w=EYE, s=[HUGE, -1]),
    "reshape overflows": _text(f"{HEAD} r = Reshape(x, s) y = Relu(r) }}", s=[HUGE, HUGE]),
    "pad": _text(f"{HEAD} h = MatMul(x, w) y = Pad(h, s) }}", w=EYE, s=[0, 0, HUGE, 0]),
    "tile": _text(f"{HEAD} h = MatMul(x, w) y = Tile(h, s) }}", w=EYE, s=[HUGE, 1]),
}  # fmt: skip


def object_array(folder: Path) -> None:
    """Data that runs code when it is unpickled: it would make a file."""
    np.savez(folder / "d.npz", x=np.array([_Opens()], object))


class _Opens:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, ("pwned", "w")


def lying_bomb(folder: Path) -> None:
    """An `.npz` whose directory says that it unpacks to terabytes."""
    np.savez_compressed(folder / "d.npz", x=rows())
    path = folder / "d.npz"
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 0xFFFFFFF0)
    path.write_bytes(content)


def long_header(folder: Path) -> None:
    """An array that says it has 2 ** 40 rows."""
    with (folder / "d.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (HUGE, 256)}
        )
        file.write(bytes(1024))
