"""Small models with what large ones have: weights in files, of narrow types, shared, under odd names."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from make_llama import Kind, Shape, make_llama

SMALL = Shape(layers=2, width=64, inner=96, vocab=80)


def llama(
    path: Path, *, files: int = 1, kind: Kind = "float32", cast: bool = False, shape: Shape = SMALL
) -> Path:
    """A tiny Llama with random weights at `path`."""
    make_llama(path, shape, random=True, files=files, kind=kind, cast=cast)
    return path


def edited(path: Path, **names: str) -> onnx.ModelProto:
    """The model of a file, tensors renamed, its data left where it is."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    onnx.save(model, path)
    return model
