"""Times of one node inside a model: ORT's own profile of two models that run in turns."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy.optimize import nnls

from qcompile.run.session import Options, Session
from qcompile.targets.schema import Cost

Feed = Mapping[str, npt.NDArray[Any]]
_ROUNDS = (12, 400)  # at least and at most


@dataclasses.dataclass(frozen=True)
class Times:
    """Nanoseconds of the float and of the integer form.

    Attributes:
        float_ns, int8_ns: the node's kernels alone.
        float_wall_ns, int8_wall_ns: the whole model, borders and layout changes included.
        borders: type, elements and time of each Q, DQ and 8-bit Transpose of the integer model.
    """

    float_ns: float
    int8_ns: float
    float_wall_ns: float
    int8_wall_ns: float
    borders: tuple[tuple[str, int, float], ...] = ()

    @property
    def speedup(self) -> float:
        """How much faster the integer kernel is."""
        return self.float_ns / self.int8_ns if self.int8_ns else float("nan")

    @property
    def wall_speedup(self) -> float:
        """How much faster the whole integer model is."""
        return self.float_wall_ns / self.int8_wall_ns


def time_pair(
    as_float: ir.Model, as_int8: ir.Model, feed: Feed, float_ops: Collection[str], int8_ops: Collection[str],
    *, threads: int = 1, seconds: float = 0.5,
) -> Times:  # fmt: skip
    """Times of the nodes whose types are in `float_ops` and `int8_ops`, and of the whole models."""
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        models = (as_float, as_int8)
        plain = [Session(m, Options("all", threads=threads)) for m in models]
        prefix = str(Path(folder) / "profile")
        profiled = [Session(m, Options("all", threads=threads, profile=prefix)) for m in models]
        walls: list[list[float]] = [[], []]
        deadline = time.perf_counter() + seconds
        while len(walls[0]) < _ROUNDS[0] or (
            time.perf_counter() < deadline and len(walls[0]) < _ROUNDS[1]
        ):
            for side in (0, 1):
                profiled[side].run(feed)
                start = time.perf_counter()
                plain[side].run(feed)
                walls[side].append((time.perf_counter() - start) * 1e9)
        profiles = [_nodes(session.end_profiling()) for session in profiled]
    float_wall, int8_wall = (float(np.median(wall)) for wall in walls)
    kernels = [
        sum(node.ns for node in nodes if node.op in ops) or float("nan")
        for nodes, ops in zip(profiles, (float_ops, int8_ops), strict=True)
    ]
    borders = [
        (node.op, node.elements, node.ns)
        for node in profiles[1]
        if node.op in ("QuantizeLinear", "DequantizeLinear")
        or (node.op == "Transpose" and node.op not in int8_ops)
    ]
    return Times(kernels[0], kernels[1], float_wall, int8_wall, tuple(borders))


@dataclasses.dataclass(frozen=True)
class _Node:
    op: str
    elements: int  # of its first output
    ns: float  # a run


def _nodes(profile: Path) -> list[_Node]:
    """The nodes of a profile. It counts in whole microseconds, so the middle half of the runs is averaged."""
    runs: dict[str, list[float]] = {}
    seen: dict[str, tuple[str, int]] = {}
    for event in json.loads(profile.read_text("utf-8")):
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        shape = next(iter(event["args"]["output_type_shape"][0].values()))
        seen[event["name"]] = event["args"]["op_name"], int(np.prod(shape, dtype=np.int64))
        runs.setdefault(event["name"], []).append(event["dur"] * 1000.0)
    nodes = []
    for name, (op, elements) in seen.items():
        times = np.sort(runs[name])
        nodes.append(
            _Node(op, elements, float(times[len(times) // 4 : -(len(times) // 4) or None].mean()))
        )
    return nodes


def fit(cost: Cost, rows: list[tuple[float, float, float]], ns: list[float]) -> Cost:
    """The cost with the terms of `cost` that explains `ns` best, each case to the same relative error.

    `rows` has multiply-accumulates, output elements and input elements of each case.
    """
    terms = [name for name in ("mac", "elem", "input") if getattr(cost, name)]
    good = [i for i, value in enumerate(ns) if np.isfinite(value) and value > 0]
    if not terms or not good:
        return Cost()
    columns = {"mac": (0, 1e-3), "elem": (1, 1.0), "input": (2, 1.0)}
    matrix = np.array(
        [[rows[i][columns[t][0]] * columns[t][1] / ns[i] for t in terms] for i in good]
    )
    return Cost(**dict(zip(terms, map(float, nnls(matrix, np.ones(len(good)))[0]), strict=True)))


def fit_line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Nanoseconds an element and nanoseconds a node that explain (elements, nanoseconds) best."""
    if not points:
        return float("nan"), float("nan")
    matrix = np.array([[elements / ns, 1 / ns] for elements, ns in points if ns > 0])
    slope, start = nnls(matrix, np.ones(len(matrix)))[0]
    return float(slope), float(start)
