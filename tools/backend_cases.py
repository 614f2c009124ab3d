"""The cases of the ONNX backend suite as models with samples; nothing is downloaded.

A case comes in up to three variants. `given` is the model of the suite. In most of its 1,880 node cases the weight
is an input, and then there is nothing to quantize: `weights` is the same model with every input but the first one
of floats turned into an initializer, and `table`, for lookups, the one in which the indices stay inputs. Kernels for
weights of few bits take 16 inputs and more, which no product of the suite has: `deep` is `weights` with the inputs of
a product repeated until there are 32, each time with other weights.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnx.backend.test import loader

Array = npt.NDArray[Any]
Feed = dict[str, Any]  # sequences are lists, absent optionals None
KINDS = ("node", "simple", "pytorch-operator", "pytorch-converted", "light")
SAMPLES, FRESH = 8, 3  # that calibrate, and that judge, the case's own among the first
_LOOKUPS = ("Gather",)
_PRODUCTS = ("MatMul", "Gemm")
_DEPTH = 32
_FLOATS = ("float16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of the suite.

    Attributes:
        name: kind and name, as `node/test_relu`, and the variant if it is another than `given`.
        model: the model.
        feed: its own input, or for the light models, which have none, seeded noise.
    """

    name: str
    model: onnx.ModelProto
    feed: Feed


@functools.cache
def _suite() -> dict[str, Any]:
    """The suite's cases by kind and name; their own warnings are about the cases' values."""
    found: dict[str, Any] = {}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for kind in KINDS[:-1]:
            found |= {f"{kind}/{case.name}": case for case in loader.load_model_tests(kind=kind)}
    for path in sorted((Path(loader.DATA_DIR) / "light").glob("*.onnx")):
        found[f"light/{path.stem}"] = path
    return found


def names() -> list[str]:
    """The names of all cases, in the order in which they are run: by kind, then by name."""
    return sorted(_suite(), key=lambda name: (KINDS.index(name.partition("/")[0]), name))


def variants(name: str) -> Iterator[Case]:
    """The variants of a case that differ from each other."""
    given = _load(name)
    yield given
    inputs = _fed(given)
    floats = [n for n in inputs if getattr(given.feed.get(n), "dtype", None) in _FLOATS]
    arrays = [n for n in inputs if isinstance(given.feed.get(n), np.ndarray | np.generic)]
    ops = {node.op_type for node in given.model.graph.node}
    if floats and len(arrays) > 1:
        frozen = _frozen(given, "weights", [n for n in arrays if n != floats[0]])
        yield frozen
        if [node.op_type in _PRODUCTS for node in given.model.graph.node] == [True]:
            yield _deep(frozen)
    if ops & set(_LOOKUPS) and floats and len(floats) < len(arrays):
        yield _frozen(given, "table", floats)


def operators(name: str) -> set[str]:
    """The operators of a case's main graph."""
    return {node.op_type for node in _load(name).model.graph.node}


def chosen(each: int, touched: Collection[str]) -> list[str]:
    """A slice of the node cases: one of each operator, `each` of those that are `touched`; always the same ones."""
    left: dict[str, int] = {}
    found = []
    for name in sorted(_suite(), key=lambda name: zlib.crc32(name.encode())):
        if not name.startswith("node/") or "_expanded" in name:
            continue
        ops = operators(name)
        wanted = [op for op in ops if left.setdefault(op, each if op in touched else 1)]
        if wanted:
            found.append(name)
            left.update((op, left[op] - 1) for op in wanted)
    return sorted(found)


def _load(name: str) -> Case:
    kind = name.partition("/")[0]
    if kind not in KINDS:
        raise ValueError(f"{name}: {kind} is none of {', '.join(KINDS)}")
    case = _suite()[name]
    if isinstance(case, Path):
        model = onnx.load(case)
        feed = {value: _noise(model, value) for value in _fed(Case(name, model, {}))}
        return Case(name, model, feed)
    if case.model is not None:
        model, values = case.model, case.data_sets[0][0]
    else:
        folder = Path(case.model_dir)
        model = onnx.load(folder / "model.onnx")
        files = sorted(
            (folder / "test_data_set_0").glob("input_*.pb"), key=lambda path: int(path.stem[6:])
        )
        types = [value.type for value in model.graph.input]
        values = [_read(file, kind) for file, kind in zip(files, types, strict=False)]
    inputs = [value.name for value in model.graph.input]
    return Case(name, model, {n: _plain(v) for n, v in zip(inputs, values, strict=False)})


def _read(file: Path, kind: onnx.TypeProto) -> Any:
    """The value of a file, an array or a list."""
    if kind.HasField("sequence_type"):
        sequence = onnx.SequenceProto()
        sequence.ParseFromString(file.read_bytes())
        return numpy_helper.to_list(sequence)
    if kind.HasField("optional_type"):
        optional = onnx.OptionalProto()
        optional.ParseFromString(file.read_bytes())
        return numpy_helper.to_optional(optional)
    return numpy_helper.to_array(onnx.load_tensor(file))


def _plain(value: Any) -> Any:
    """Arrays of Python's own numbers and of text as ORT takes them."""
    if isinstance(value, onnx.TensorProto):
        value = numpy_helper.to_array(value)
    if isinstance(value, np.generic | float | int | bool):
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "SU":
        value = value.astype(object)
    return value


def _fed(case: Case) -> list[str]:
    """The inputs that have no default value."""
    defaults = {tensor.name for tensor in case.model.graph.initializer}
    return [value.name for value in case.model.graph.input if value.name not in defaults]


def _noise(model: onnx.ModelProto, name: str) -> Array:
    value = next(v for v in model.graph.input if v.name == name)
    dims = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
    return np.random.default_rng(0).standard_normal(dims).astype(np.float32)


def _frozen(case: Case, variant: str, weights: Sequence[str]) -> Case:
    """The case with some inputs as initializers."""
    model = copy.deepcopy(case.model)
    model.ir_version = max(model.ir_version, 8)  # below 4, initializers are inputs as well
    for name in weights:
        value = next(v for v in model.graph.input if v.name == name)
        tensor = numpy_helper.from_array(np.asarray(case.feed[name]), name)
        if tensor.data_type == onnx.TensorProto.UNDEFINED:
            tensor.data_type = value.type.tensor_type.elem_type
        model.graph.initializer.append(tensor)
        model.graph.input.remove(value)
    feed = {name: value for name, value in case.feed.items() if name not in weights}
    return Case(f"{case.name}+{variant}", model, feed)


def _deep(case: Case) -> Case:
    """A product of 32 inputs and more, whose weights and inputs are those of the case, repeated."""
    model, rng = copy.deepcopy(case.model), np.random.default_rng(0)
    node = model.graph.node[0]
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    x, w = case.feed[node.input[0]], numpy_helper.to_array(model.graph.initializer[0])
    times = -(-_DEPTH // x.shape[-2 if flags.get("transA") else -1])
    axis = -1 if flags.get("transB") or w.ndim == 1 else -2
    wide = np.concatenate([rng.permutation(w, axis=0) for _ in range(times)], axis)
    x = np.concatenate([x] * times, -2 if flags.get("transA") else -1)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(wide, node.input[1]))
    declared = model.graph.input[0].type.tensor_type
    declared.CopyFrom(onnx.helper.make_tensor_type_proto(declared.elem_type, x.shape).tensor_type)
    return Case(f"{case.name.partition('+')[0]}+deep", model, {node.input[0]: x})


def samples(case: Case) -> tuple[list[Feed], list[Feed]]:
    """Feeds that calibrate, and fresh ones that judge: the case's own among both.

    It is the last as well, which of fewer than ten is the one held out: so all that is different calibrates.

    In the others the values of each float array are shuffled, which keeps to what the operator takes: its signs,
    bounds, NaN and the range that was calibrated. Every second one is scaled down by up to a tenth as well. Integers,
    flags and text stay: they are indices, axes and shapes.
    """
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    made = [_varied(case.feed, rng, scaled=i % 2 == 1) for i in range(SAMPLES - 1 + FRESH)]
    return [case.feed, *made[: SAMPLES - 1], case.feed], [case.feed, *made[SAMPLES - 1 :]]


def _varied(feed: Mapping[str, Any], rng: np.random.Generator, *, scaled: bool) -> Feed:
    found = dict(feed)
    for name, value in feed.items():
        if getattr(value, "dtype", None) in _FLOATS and value.size > 1:
            mixed = rng.permutation(value.reshape(-1)).reshape(value.shape)
            factor = rng.uniform(0.9, 1.0) if scaled else 1.0
            found[name] = (mixed * factor).astype(value.dtype)
    return found
