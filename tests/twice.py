"""Compiles small models by every recipe, and prints the hash of each file: run in processes that should agree.

PYTHONPATH=. python tests/twice.py FOLDER THREADS
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from decoders import VOCABULARY, decoder, text_feed
from language_models import language, texts
from networks import conv_net, linear_net, rows, samples

from qcompile import compile_model
from qcompile.recipe import BUILT_IN


def jobs() -> Mapping[str, tuple[str, Any, list[Any], dict[str, Any]]]:
    """By name: a recipe, a model, its samples, and further options."""
    images = [{"x": image[None]} for image in samples(12)]
    vectors = [{"x": row[None]} for row in rows(12)]
    words = np.random.default_rng(0).integers(0, VOCABULARY, (6, 12))
    lines = [text_feed(ids) for ids in words]
    return {
        "int8": ("int8", conv_net(), images, {}),
        "int8 within limits": ("int8", conv_net(), images, {"min_sqnr": 56.0}),
        "int8 of a language model": ("int8", language(), texts(12), {}),
        "static qdq": ("int8-static", conv_net(), images, {"format": "qdq"}),
        "static fused": ("int8-static", conv_net(), images, {"format": "fused"}),
        "dynamic": ("int8-dynamic", linear_net(), vectors, {}),
        "int8 weights": ("int8-weights", language(), texts(12), {}),
        "int4": ("int4", language(), texts(12), {}),
        "kv cache": ("kv-cache", decoder(), lines, {}),
        "int4 and kv cache": ("int4", decoder(), lines, {"kv_cache": "int8"}),
    }


def hashes(folder: Path, threads: int) -> dict[str, str]:
    """SHA-256 of the file that each job wrote, by its name."""
    found = {}
    for name, (recipe, model, data, more) in jobs().items():
        path = folder / f"{name}.onnx"
        options = {"threads": threads, "bench_seconds": 0.01, "timing": False, **more}
        compile_model(
            model, data, output=path, recipe=dataclasses.replace(BUILT_IN[recipe], **options)
        )
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


if __name__ == "__main__":
    print(json.dumps(hashes(Path(sys.argv[1]), int(sys.argv[2]))))  # noqa: T201
