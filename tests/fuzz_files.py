"""Damaged files for everything that qcompile reads: bytes flipped, cut, inserted, spliced; and what reading them does.

Only an answer or a `QcompileError` is allowed. Calls run in a `sandbox`, which bounds time and memory.
"""

from __future__ import annotations

import collections
import dataclasses
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fuzz_damage import damaged, damaged_archive, damaged_json, damaged_model, damaged_text
from networks import conv_net, from_text, linear_net, rows, samples, save
from onnx import helper

import qcompile.targets
from qcompile import compile_model
from qcompile.calib import store
from qcompile.calib.data import DataOptions, open_data
from qcompile.calib.feeds import InputSpec
from qcompile.calibrate import calibrate_model
from qcompile.commands import inspect_model, plan_model
from qcompile.errors import DataError, PassError, QcompileError
from qcompile.graph import io
from qcompile.plan.plan import load_plan
from qcompile.progress import Silent
from qcompile.recipe import Recipe, load_recipe
from qcompile.survey import survey
from qcompile.targets.schema import load_target

KINDS = (
    "model",
    "stats",
    "recipe",
    "target",
    "plan",
    "npz",
    "npy",
    "model used",
    "stats used",
    "plan used",
)
QUICK = Recipe(threads=1, bench_seconds=0.001, search_time=1.0)
RECIPE = """
name = "mine"
target = "auto"
ranges = "percentile:99.9"
format = "qdq"
keep_float = ["*/head/*", 'Softmax']
static = true
sqnr_goal = 18.5
max_drop = "0.5%"
max_size = "4MB"
search_time = 12
threads = 2

[data]
samples = 16
max_tokens = 32
image = { size = [224, 224], mean = [0.1, 0.2, 0.3], layout = "nchw" }
"""


@dataclasses.dataclass
class Tried:
    """What became of damaged files: counts by outcome, and failures as [number, traceback]."""

    read: int = 0
    refused: int = 0
    failures: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def build(place: str) -> None:
    """Whole files of each kind, as `KIND-NUMBER` in a folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {"l": linear_net(), "s": _small(), "b": _body(), "f": _function()}
        models["c"] = conv_net(convs=1, channels=4, norm=True)
        found = {"model": [save(made, folder / f"{key}.onnx") for key, made in models.items()]}
        np.savez(folder / "l.npz", x=rows())
        np.savez_compressed(folder / "c.npz", x=samples(6))
        np.save(folder / "l.npy", rows())
        found |= {"npz": [folder / "l.npz", folder / "c.npz"], "npy": [folder / "l.npy"]}
        found["stats"] = [folder / "l.stats", folder / "c.stats"]
        for path in found["stats"]:
            calibrate_model(
                path.with_suffix(".onnx"),
                path.with_suffix(".npz"),
                output=path,
                recipe=QUICK,
                gram=True,
            )
        plan = plan_model(folder / "c.onnx", folder / "c.npz", QUICK, Silent())
        (folder / "p").write_text(plan.to_json())
        (folder / "r").write_text(RECIPE)
        found |= {"plan": [folder / "p"], "recipe": [folder / "r"], "target": [_shipped()]}
        for kind, paths in found.items():
            for i, path in enumerate(paths):
                Path(place, f"{kind}-{i}").write_bytes(path.read_bytes())


def _shipped() -> Path:
    return Path(qcompile.targets.__file__).with_name("ort-cpu-x64-vnni.toml")


def _small() -> Any:
    """Typed data in place of raw bytes, a Constant node, metadata."""
    text = """g (float[N,4] x) => (float[N,3] y) <float[4,3] w = {1,2,3,4,5,6,7,8,9,1,2,3}> {
        c = Constant<value_float = 2.0>() h = MatMul(x, w) y = Mul(h, c) }"""
    model = from_text(text)
    model.metadata_props.add(key="author", value="me")
    return model


def _body() -> Any:
    return from_text(
        """g (float[N,4] x, bool c) => (float[N,4] y) { y = If(c) <
        then_branch = a () => (float[N,4] p) <float[4,4] v = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> { p = MatMul(x, v) },
        else_branch = b () => (float[N,4] q) { q = Relu(x) }> }"""
    )


def _function() -> Any:
    model = from_text("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    nodes = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["c"])]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    model.functions.append(helper.make_function("mine", "F", ["a"], ["c"], nodes, opsets))
    model.graph.node[0].op_type, model.graph.node[0].domain = "F", "mine"
    model.opset_import.append(opsets[1])
    return model


def _read_model(path: Path) -> None:
    io.load(path)
    io.load(path, mapped=True)
    inspect_model(str(path))


def _use_model(path: Path) -> None:
    for recipe in (QUICK, dataclasses.replace(QUICK, bits=4, block=16)):
        compile_model(path, output=path.with_name("out.onnx"), recipe=recipe)


def _use_stats(path: Path) -> None:
    """For one of the two models that they may be of."""
    errors = []
    for model in (linear_net(), conv_net(convs=1, channels=4, norm=True)):
        place = save(model, path.with_name("m.onnx"))
        try:
            compile_model(
                place, stats=path, force=True, output=path.with_name("out.onnx"), recipe=QUICK
            )
        except QcompileError as error:
            errors.append(error)
    if len(errors) == 2:
        raise errors[0]


def _use_plan(path: Path) -> None:
    model = save(conv_net(convs=1, channels=4, norm=True), path.with_name("m.onnx"))
    compile_model(
        model,
        {"x": samples(6)},
        plan=load_plan(path),
        output=path.with_name("out.onnx"),
        recipe=QUICK,
    )


def _read_data(path: Path) -> None:
    """As one of the two models that it may be for would."""
    kind = np.dtype(np.float32)
    errors = []
    for shape in (("N", 256), ("N", 3, 16, 16)):
        try:
            for _ in open_data(path, [InputSpec("x", kind, shape, required=True)], DataOptions()):
                pass
        except DataError as error:
            errors.append(error)
    if len(errors) == 2:
        raise errors[0]


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "model": ("m.onnx", _read_model),
    "stats": ("s.stats", lambda path: survey(store.load(path))),
    "recipe": ("r.toml", load_recipe),
    "target": ("t.toml", lambda path: load_target(str(path))),
    "plan": ("p.json", load_plan),
    "npz": ("d.npz", _read_data),
    "npy": ("d.npy", _read_data),
    "model used": ("m.onnx", _use_model),
    "stats used": ("s.stats", _use_stats),
    "plan used": ("p.json", _use_plan),
}


def make(place: str, kind: str, number: int) -> bytes:
    """The damaged file of a number, made of the whole ones that `build` left in a folder."""
    random = Random(f"{kind} {number}")
    whole = sorted(Path(place).glob(f"{kind.removesuffix(' used')}-*"))
    one, other = random.choice(whole), random.choice(whole)
    inner, kind = random.random() < 0.7, kind.removesuffix(" used")
    if kind in ("stats", "npz") and inner:
        return damaged_archive(random, one.read_bytes())
    if kind == "model" and inner:
        return damaged_model(random, one.read_bytes())
    if kind == "plan" and inner:
        return damaged_json(random, one.read_bytes())
    if kind in ("recipe", "target") and inner:
        return damaged_text(random, one.read_bytes())
    return damaged(random, one.read_bytes(), other.read_bytes())


def run(place: str, kind: str, start: int, count: int) -> dict[str, Any]:
    """Reads damaged files of these numbers."""
    tried = Tried()
    name, read = READERS[kind]
    for number in range(start, start + count):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder) / name
            path.write_bytes(make(place, kind, number))
            try:
                read(path)
                tried.read += 1
            except PassError:
                tried.failures.append((number, traceback.format_exc(limit=-4)))
            except QcompileError as error:
                tried.refused += 1
                tried.reasons[type(error).__name__ + " " + str(error).replace(folder, "")[:60]] += 1
                if len(str(error)) > 2000:
                    tried.failures.append((number, f"a sentence of {len(str(error))} characters"))
            except Exception:  # noqa: BLE001 - the finding
                tried.failures.append((number, traceback.format_exc(limit=-6)))
    return {**vars(tried), "reasons": dict(tried.reasons)}
