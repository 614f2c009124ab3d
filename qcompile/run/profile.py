"""Time of every node as ONNX Runtime runs it, by its own profiler."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.errors import no_room
from qcompile.run.session import Feed, Options, Session

_SUFFIX = re.compile(r"_token_\d+$|_nchwc$|_int$")  # what ORT's transformers, and ours, append
_WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class Profile:
    """Mean nanoseconds a run: by node name (without ORT's suffixes), and by operator type."""

    nodes: Mapping[str, float]
    operators: Mapping[str, float]


def base_name(name: str) -> str:
    """The name that a node had before ORT's transformers renamed it."""
    return _SUFFIX.sub("", name)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One node as ORT ran it.

    Attributes:
        name: as ORT calls it, its suffixes included.
        op_type: its operator type in the optimized graph.
        shape: of its first output, () if ORT does not say.
        times: nanoseconds of every call but those of the first runs, in whole microseconds rounded down.
    """

    name: str
    op_type: str
    shape: tuple[int, ...]
    times: tuple[float, ...]


def kernels(model: ir.Model | Path, feed: Feed, *, threads: int, runs: int = 8) -> list[Kernel]:
    """Runs the model with ORT's profiler on; the first runs are not counted.

    Raises:
        ModelError: ORT refuses or cannot run the model.
        OutputError: the profile cannot be written to the folder for temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        session = Session(
            model, Options("all", threads=threads, profile=str(Path(folder) / "profile"))
        )
        for _ in range(runs + _WARM_UP):
            session.run(feed)
        text = session.end_profiling().read_text("utf-8")
    try:
        events = json.loads(text)
    except ValueError as error:  # ONNX Runtime does not tell that the file came to an end
        raise no_room(folder, "ONNX Runtime's profile is cut off") from error
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
            times[key].append(1000.0 * event["dur"])
            shapes[key] = _shape(event["args"])
    return [
        Kernel(*key, shapes[key], tuple(all_of[len(all_of) * _WARM_UP // (runs + _WARM_UP) :]))
        for key, all_of in times.items()
    ]


def _shape(args: Mapping[str, Any]) -> tuple[int, ...]:
    shapes = [shape for item in args.get("output_type_shape", ()) for shape in item.values()]
    return tuple(shapes[0]) if shapes else ()


def profile(model: ir.Model | Path, feed: Feed, *, threads: int, runs: int = 8) -> Profile:
    """The mean times of all nodes, as `kernels` finds them.

    Raises:
        ModelError: ORT refuses or cannot run the model.
    """
    nodes: dict[str, float] = defaultdict(float)
    operators: dict[str, float] = defaultdict(float)
    for kernel in kernels(model, feed, threads=threads, runs=runs):
        # nodes of one name, and bodies that run several times a run, add up
        mean = sum(kernel.times) / runs
        nodes[base_name(kernel.name)] += mean
        operators[kernel.op_type] += mean
    return Profile(dict(nodes), dict(operators))
