"""Where a result comes from, in the metadata of its file: so that anyone can tell, and make it again.

It names versions, options, and hashes of what was read. It holds no time, no path and no user's name, nor what
changes nothing in the result: the same compilation writes the same bytes, wherever and whenever it runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.calib.split import Samples
from qcompile.graph.digest import digest
from qcompile.opened import Opened
from qcompile.quant.scheme import QParams
from qcompile.recipe import Recipe
from qcompile.run.session import version
from qcompile.version import __version__

PREFIX = "qcompile."
_IDLE = ("threads", "memory", "bench_seconds", "search_time")
"""Options that say how fast or how long something is done."""


def describe(model: ir.Model, target: str, recipe: Recipe, source: ir.Model) -> None:
    """The metadata of `model` tells who made it, and what `origin` says."""
    put(model, origin(target, recipe, source))


def put(model: ir.Model, properties: Mapping[str, str]) -> None:
    """The metadata of `model` tells who made it, and these properties."""
    model.producer_name, model.producer_version = "qcompile", __version__
    model.metadata_props.update(properties)


def origin(target: str, recipe: Recipe, source: ir.Model) -> dict[str, str]:
    """Of which model, with which versions and how a result is made.

    Args:
        target: the name of its target.
        recipe: with all options.
        source: the float model, as it was given, with its weights.
    """
    maker = " ".join(word for word in (source.producer_name, source.producer_version) if word)
    found = {
        "version": __version__,
        "onnxruntime": version(),
        "target": target,
        "recipe": recipe.name,
        "options": json.dumps(options(recipe), sort_keys=True),
        "source.sha256": digest(source),
    }
    if maker:
        found["source.producer"] = maker
    return {PREFIX + key: text for key, text in found.items()}


def describe_data(model: ir.Model, opened: Opened) -> None:
    """The metadata of `model` tells what it was calibrated with, if it was."""
    statistics, samples = opened.statistics, opened.samples
    if statistics is not None:
        hashes = [shard.digest for shard in statistics.key.shards]
        model.metadata_props[f"{PREFIX}data.sha256"] = " ".join(hashes)
        model.metadata_props[f"{PREFIX}data.samples"] = str(statistics.samples)
    elif isinstance(samples, Samples):
        model.metadata_props[f"{PREFIX}data.sha256"] = samples.digest
        model.metadata_props[f"{PREFIX}data.samples"] = str(samples.calibration_count)


def describe_ranges(model: ir.Model, params: Mapping[str, QParams]) -> None:
    """The metadata of `model` holds one number for the scales and zero points of all its tensors, by name."""
    if not params:
        return
    made = hashlib.sha256()
    for name in sorted(params):
        made.update(name.encode("utf-8", "surrogatepass") + b"\0")
        for values in (params[name].scale, params[name].zero):
            made.update(np.ascontiguousarray(values, np.float64).tobytes())
    model.metadata_props[f"{PREFIX}ranges.sha256"] = made.hexdigest()


def options(recipe: Recipe) -> dict[str, Any]:
    """The options of a recipe that are not the usual ones, as JSON holds them; of files, their names alone."""
    return _changed(recipe, Recipe(), ("name", *_IDLE))


def _changed(given: Any, usual: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(given):
        mine, theirs = getattr(given, field.name), getattr(usual, field.name)
        if field.name in without or mine == theirs:
            continue
        if dataclasses.is_dataclass(mine):
            found[field.name] = _changed(mine, theirs)
        else:
            found[field.name] = _plain(mine)
    if str(found.get("target", "")).endswith(".toml"):
        found["target"] = Path(found["target"]).name
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value
