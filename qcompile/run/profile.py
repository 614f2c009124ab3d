"""Time of every node as ONNX Runtime runs it, by its own profiler."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

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


def profile(model: ir.Model | Path, feed: Feed, *, threads: int, runs: int = 8) -> Profile:
    """Runs the model with ORT's profiler on; the first runs are not counted.

    Raises:
        ModelError: ORT refuses or cannot run the model.
    """
    nodes: dict[str, float] = defaultdict(float)
    operators: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        session = Session(
            model, Options("all", threads=threads, profile=str(Path(folder) / "profile"))
        )
        for _ in range(runs + _WARM_UP):
            session.run(feed)
        events = json.loads(session.end_profiling().read_text("utf-8"))
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
            times[key].append(1000.0 * event["dur"])
    for (name, op_type), durations in times.items():
        counted = durations[len(durations) * _WARM_UP // (runs + _WARM_UP) :]
        # nodes of one name, and bodies that run several times a run, add up
        mean = sum(counted) / runs if counted else 0.0
        nodes[base_name(name)] += mean
        operators[op_type] += mean
    return Profile(dict(nodes), dict(operators))
