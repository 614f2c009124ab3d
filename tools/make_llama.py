"""A model with the matrices of a Llama, of any size, for tests and benchmarks of large models.

    PYTHONPATH=. python tools/make_llama.py OUT.onnx [--params 7B | --layers 4 --width 512 ...] [--random]

Weights are zeros in a sparse file, which takes no room, or with `--random` one block of random numbers again and again.
Products, norms, gates and the table of tokens are those of a Llama; attention is the sum of what it would read, so that
the model runs, fast and without masks.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Kind = Literal["float32", "float16", "bfloat16"]
_KINDS: tuple[Kind, ...] = ("float32", "float16", "bfloat16")
_TYPES: dict[Kind, tuple[int, np.dtype[Any]]] = {
    "float32": (TensorProto.FLOAT, np.dtype(np.float32)),
    "float16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bfloat16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
_PATTERN = 1 << 20  # random numbers that are repeated
_ALIGN = 4096


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Llama.

    Attributes:
        layers: of the decoder.
        width: of the stream between them.
        inner: of the gated layer; 0 for 8/3 of the width.
        vocab: tokens.
    """

    layers: int = 32
    width: int = 4096
    inner: int = 11008
    vocab: int = 32000

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Names of matrices -> shape, (K, N) but for the table, in graph order."""
        width, inner = self.width, self.inner
        shapes = {"embed": (self.vocab, width)}
        for i in range(self.layers):
            shapes |= {f"layers.{i}.{part}": (width, width) for part in ("q", "k", "v", "o")}
            shapes |= {f"layers.{i}.gate": (width, inner), f"layers.{i}.up": (width, inner)}
            shapes[f"layers.{i}.down"] = (inner, width)
        return shapes | {"head": (width, self.vocab)}

    @property
    def params(self) -> int:
        """Numbers of all matrices."""
        return sum(math.prod(shape) for shape in self.matrices.values())


SIZES = {
    "7B": Shape(),
    "1B": Shape(layers=22, width=2048, inner=5632, vocab=32000),
}


def make_llama(
    path: Path, shape: Shape, *, random: bool = False, files: int = 1, kind: Kind = "float32",
    cast: bool = False, seed: int = 0,
) -> int:  # fmt: skip
    """The model at `path`, its weights in `files` files beside it, or with 0 inside it; returns the bytes of weights.

    Args:
        path: of the model.
        shape: its sizes.
        random: weights of a normal distribution; else zeros.
        files: of weights, about equal.
        kind: type of the weights, and of the activations unless `cast`.
        cast: activations are float32, and each matrix is cast.
        seed: of the random numbers.
    """
    stored, numpy_type = _TYPES[kind]
    run = TensorProto.FLOAT if cast else stored
    pattern = np.random.default_rng(seed).standard_normal(_PATTERN).astype(np.float32) * 0.02
    store = _Store(path, files, shape.params * numpy_type.itemsize, pattern.astype(numpy_type))
    made = [
        store.tensor(name, dims, stored, random=random) for name, dims in shape.matrices.items()
    ]
    width = numpy_helper.from_array(
        np.ones(shape.width, np.float32).astype(_TYPES[_name(run)][1]), "norm"
    )
    nodes = list(_nodes(shape, run, cast=cast and stored != run))
    graph = helper.make_graph(
        nodes, "llama",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("logits", run, ["batch", "tokens", shape.vocab])],
        [*made, width],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, path)
    return shape.params * numpy_type.itemsize


def make_chain(path: Path, count: int, width: int, *, seed: int = 0) -> int:
    """A chain of so many products of float32 (width, width), random, at `path`; returns the bytes of weights."""
    size = count * width * width * 4
    pattern = np.random.default_rng(seed).standard_normal(_PATTERN).astype(np.float32)
    store = _Store(path, 1, size, pattern)
    names = ["x", *(f"y{i}" for i in range(count))]
    weights = [
        store.tensor(f"w{i}", (width, width), TensorProto.FLOAT, random=True) for i in range(count)
    ]
    nodes = [
        helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], f"n{i}")
        for i in range(count)
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
        for name in (names[0], names[-1])
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return size


def _name(kind: int) -> Kind:
    return next(name for name in _KINDS if _TYPES[name][0] == kind)


class _Store:
    """Writes the weights to their files, or into the model."""

    def __init__(self, path: Path, files: int, size: int, pattern: npt.NDArray[np.generic]) -> None:
        self._path, self._files, self._pattern = path, files, pattern.reshape(-1)
        self._share, self._written, self._at = size // max(files, 1) + 1, 0, 0

    def tensor(
        self, name: str, dims: tuple[int, int], kind: int, *, random: bool
    ) -> onnx.TensorProto:
        made = TensorProto(name=name, data_type=kind, dims=dims)
        count, item = math.prod(dims), self._pattern.itemsize
        if not self._files:
            made.raw_data = (
                np.resize(self._pattern, count).tobytes() if random else bytes(count * item)
            )
            return made
        file = self._path.with_name(
            f"{self._path.name}.{min(self._written // self._share, self._files - 1)}"
        )
        start = (
            -(-(file.stat().st_size if file.exists() and self._written else 0) // _ALIGN) * _ALIGN
        )
        with file.open("r+b" if start else "wb") as out:
            out.truncate(start + count * item)
            out.seek(start)
            if random:
                self._fill(out, count)
        made.data_location = TensorProto.EXTERNAL
        for key, value in (("location", file.name), ("offset", start), ("length", count * item)):
            made.external_data.add(key=key, value=str(value))
        self._written += count * item
        return made

    def _fill(self, out: BinaryIO, count: int) -> None:
        """The pattern again and again, each tensor from another place of it on."""
        self._at += 7919
        turned = np.roll(self._pattern, self._at)
        for first in range(0, count, _PATTERN):
            turned[: count - first].tofile(out)


def _nodes(shape: Shape, run: int, *, cast: bool) -> Iterator[onnx.NodeProto]:
    def weight(name: str) -> Iterator[onnx.NodeProto]:
        if cast:
            yield helper.make_node("Cast", [name], [f"{name}.wide"], f"{name}.cast", to=run)

    def read(name: str) -> str:
        return f"{name}.wide" if cast else name

    def product(x: str, name: str, y: str) -> Iterator[onnx.NodeProto]:
        yield from weight(name)
        yield helper.make_node("MatMul", [x, read(name)], [y], f"/{name}/MatMul")

    def norm(x: str, y: str) -> onnx.NodeProto:
        return helper.make_node("RMSNormalization", [x, "norm"], [y], f"/{y}", epsilon=1e-5)

    yield from weight("embed")
    yield helper.make_node("Gather", [read("embed"), "ids"], ["h0"], "/embed/Gather")
    for i in range(shape.layers):
        a, h = f"layers.{i}", f"h{i}"
        yield norm(h, f"{a}.n")
        for part in "qkv":
            yield from product(f"{a}.n", f"{a}.{part}", f"{a}.{part}.y")
        yield helper.make_node("Sum", [f"{a}.{p}.y" for p in "qkv"], [f"{a}.a"], f"/{a}/attend")
        yield from product(f"{a}.a", f"{a}.o", f"{a}.o.y")
        yield helper.make_node("Add", [h, f"{a}.o.y"], [f"{a}.m"], f"/{a}/add")
        yield norm(f"{a}.m", f"{a}.n2")
        yield from product(f"{a}.n2", f"{a}.gate", f"{a}.g")
        yield from product(f"{a}.n2", f"{a}.up", f"{a}.u")
        yield helper.make_node("Sigmoid", [f"{a}.g"], [f"{a}.s"], f"/{a}/sigmoid")
        yield helper.make_node("Mul", [f"{a}.g", f"{a}.s"], [f"{a}.w"], f"/{a}/silu")
        yield helper.make_node("Mul", [f"{a}.w", f"{a}.u"], [f"{a}.d"], f"/{a}/gated")
        yield from product(f"{a}.d", f"{a}.down", f"{a}.down.y")
        yield helper.make_node("Add", [f"{a}.m", f"{a}.down.y"], [f"h{i + 1}"], f"/{a}/out")
    yield norm(f"h{shape.layers}", "last")
    yield from product("last", "head", "logits")


def main() -> None:
    """Makes one, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--params", choices=SIZES, default="7B")
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int)
    parser.add_argument("--random", action="store_true", help="random weights; else zeros, sparse")
    parser.add_argument("--files", type=int, default=1, help="of weights; 0: inside the model")
    parser.add_argument("--kind", choices=_TYPES, default="float32")
    parser.add_argument("--cast", action="store_true", help="activations are float32")
    args = parser.parse_args()
    own = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(Shape)
        if getattr(args, field.name) is not None
    }
    shape = dataclasses.replace(SIZES[args.params], **own)
    size = make_llama(
        args.path, shape, random=args.random, files=args.files, kind=args.kind, cast=args.cast
    )
    print(f"{shape.params / 1e9:.2f}e9 parameters, {size / 2**30:.2f} GiB of weights")


if __name__ == "__main__":
    main()
