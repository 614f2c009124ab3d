"""Injuries to files: bytes flipped, cut, inserted and spliced; words, fields and members changed for others."""

from __future__ import annotations

import io as streams
import json
import re
import zipfile
from random import Random
from typing import Any

import onnx

ODD = (
    b"0", b"-1", b"99999999999999999999", b"1e999", b"nan", b"-inf", b"true", b"''", b'""', b"[]", b"{}", b"[[", b"null",
    b"\x00", b"\xff\xfe", b"\\ud800", "\u202e".encode(), b"../../x", b"%s%n", b"1979-05-27", b"0x7fffffffffffffff",
)  # fmt: skip


def damaged(random: Random, data: bytes, other: bytes) -> bytes:
    """The bytes after one to four injuries."""
    made = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        if not made:
            break
        at = random.randrange(len(made))
        size = min(random.choice((1, 1, 2, 4, 8, 64, 1024)), len(made) - at)
        match random.randrange(9):
            case 0:
                made[at] ^= 1 << random.randrange(8)
            case 1:
                made[at] = random.choice(
                    (0, 1, 0x7F, 0x80, 0xFF, made[at] - 1 & 0xFF, made[at] + 1 & 0xFF)
                )
            case 2:
                del made[at : at + size]
            case 3:
                del made[at:]
            case 4:
                made[at:at] = random.randbytes(size)
            case 5:
                start = random.randrange(max(1, len(other)))
                made[at : at + size] = other[start : start + random.choice((size, 16, 256))]
            case 6:
                made[at:at] = made[at : at + size] * random.choice((1, 2, 50))
            case 7:
                made[at : at + size] = random.choice((b"\x00", b"\xff", b"\x80")) * size
            case _:
                made[at : at + random.choice((0, 1, size))] = random.choice(ODD)
    return bytes(made)


def damaged_text(random: Random, data: bytes) -> bytes:
    """The text with some of its words changed for others, or for odd ones."""
    parts = re.split(r"(\w+|\s+)", data.decode("utf-8", "replace"))
    words = [i for i, part in enumerate(parts) if part.strip()]
    for _ in range(random.choice((1, 1, 2, 3))):
        i = random.choice(words)
        odd = random.choice(ODD).decode("utf-8", "replace")
        parts[i] = random.choice((odd, odd, parts[random.choice(words)], parts[i] * 2, ""))
    return "".join(parts).encode()


def damaged_json(random: Random, data: bytes) -> bytes:
    """JSON that can be parsed, one of whose values is another, missing or twice there."""
    table = json.loads(data)
    places: list[tuple[Any, Any]] = []
    waiting = [table]
    while waiting:
        found = waiting.pop()
        keys = list(found) if isinstance(found, dict) else list(range(len(found)))
        places += [(found, key) for key in keys]
        waiting += [found[key] for key in keys if isinstance(found[key], dict | list)]
    for _ in range(random.choice((1, 1, 2))):
        found, key = random.choice(places)
        values = (
            0,
            -1,
            1 << 31,
            1 << 63,
            10**30,
            1.5,
            1e308,
            -1e308,
            True,
            None,
            "",
            "static",
            [],
            {},
            [[1, 2]],
            "float64",
        )
        found[key] = random.choice((*values, random.choice(places)[0]))
        if isinstance(found, list) and random.random() < 0.3:
            found.append(found[0])
    try:
        return json.dumps(table).encode()
    except ValueError:  # it holds itself
        return damaged_text(random, data)


def damaged_archive(random: Random, data: bytes) -> bytes:
    """A whole archive, one of whose members is damaged, missing or named otherwise."""
    made = streams.BytesIO()
    with zipfile.ZipFile(streams.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        bad = random.choice(names)
        for name in names:
            content = old.read(name)
            if name == bad:
                if random.random() < 0.1:
                    continue
                text = name.endswith(".json") and random.random() < 0.8
                content = (
                    damaged_text(random, content) if text else damaged(random, content, content)
                )
            new.writestr(
                name
                if random.random() < 0.98
                else random.choice(("../x.npy", "/x", "a\\b", names[0])),
                content,
            )
    return made.getvalue()


def damaged_model(random: Random, data: bytes) -> bytes:
    """A message that can be parsed, some of whose fields say something else."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        graph = model.graph
        bodies = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
        graph = random.choice([graph, *bodies])
        nodes = [*graph.node, *(node for function in model.functions for node in function.node)]
        names = [
            *(v.name for v in graph.input),
            *(t.name for t in graph.initializer),
            *(o for n in nodes for o in n.output),
        ] or ["gone"]  # earlier damage may have taken them all
        odd = random.choice((-(1 << 63), -1, 0, 1, 2, 7, 64, 1 << 31, 1 << 40, (1 << 63) - 1))
        tensors = [
            *graph.initializer,
            *(a.t for n in nodes for a in n.attribute if a.HasField("t")),
        ]
        attributes = [a for node in nodes for a in node.attribute]
        infos = [*graph.input, *graph.output]
        what = random.randrange(13)
        if what == 0 and tensors:
            tensor = random.choice(tensors)
            tensor.dims[:] = random.choice(
                ([odd], [*tensor.dims, odd], tensor.dims[1:], tensor.dims[::-1])
            )
        elif what == 1 and tensors:
            random.choice(tensors).data_type = random.choice(range(-1, 30))
        elif what == 2 and tensors:
            tensor = random.choice(tensors)
            tensor.raw_data = damaged(random, tensor.raw_data, b"\0" * 16)
        elif what == 3 and tensors:
            tensor = random.choice(tensors)
            tensor.data_location = 1
            for key, text in (
                ("location", random.choice(names)),
                ("offset", str(odd)),
                ("length", str(odd)),
            ):
                tensor.external_data.add(key=key, value=text)
        elif what == 4 and nodes:
            random.choice(nodes).op_type = random.choice(
                ("Conv", "Gemm", "If", "Loop", "Reshape", "LSTM", "F", "", "Split")
            )
        elif what == 5 and nodes:
            node = random.choice(nodes)
            node.input[:] = random.choice(
                (
                    [],
                    [*node.input, random.choice(names)],
                    node.input[1:],
                    [random.choice(names)],
                    [""],
                )
            )
        elif what == 6 and nodes:
            node = random.choice(nodes)
            node.output[:] = random.choice(
                ([], [random.choice(names)], [""], [*node.output, "more"])
            )
        elif what == 7 and nodes:
            random.choice(nodes).domain = random.choice(("", "mine", "com.microsoft", "ai.onnx.ml"))
        elif what == 8 and attributes:
            found = random.choice(attributes)
            found.type = random.choice((found.type, *range(15)))
            found.i = odd
            found.ints.append(odd)
        elif what == 9 and infos:
            kind = random.choice(infos).type
            if random.random() < 0.3:
                kind.Clear()
            else:
                kind.tensor_type.elem_type = random.choice(range(25))
                kind.tensor_type.shape.dim.add(dim_value=odd)
        elif what == 10:
            model.opset_import[0].version = random.choice((odd, 1, 6, 11, 13, 18, 23, 27, 99))
            model.ir_version = random.choice((3, 4, 8, 10, 99))
        elif what == 11 and graph.node:
            copied = random.choice(graph.node)
            graph.node.insert(random.randrange(len(graph.node)), copied)
        elif what == 12:
            random.choice(infos).name = random.choice(names)
    return model.SerializeToString()
