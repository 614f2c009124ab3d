"""Times qcompile on graphs of many small nodes, where the graph is the work and the arithmetic is not.

    PYTHONPATH=. python tools/bench_scale.py [--graphs chain,residual,wide] [--nodes 2000,20000] [--json FILE]

Prints the table of `docs/scale.md`, and on stderr the seconds of each stage. What grows linearly takes as long a node
in the larger graph as in the smaller one. ONNX Runtime's own time to load the float graph stands beside, since
several stages load a session.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from qcompile import compile_model
from qcompile.run.session import Options, Session

CHANNELS, SIDE = 8, 8
_RESIDUAL = 4  # a residual Add after so many pairs of Conv and Relu


class Clock:
    """A progress display that shows nothing and adds up the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(
        self, title: str, total: int | None = None
    ) -> Iterator[Callable[[int, int | None], None]]:
        """See `qcompile.progress.Progress`."""
        del total
        start = time.perf_counter()
        yield lambda done, new_total: None
        self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - start


class Grower:
    """A graph that grows by pairs of Conv 1x1 and Relu, and what it computes, on one sample.

    Weights are scaled by what they met, so that values stay of one size however deep the graph becomes.
    """

    def __init__(self) -> None:
        self.rng, self.tape = np.random.default_rng(0), Tape()
        self.shape = (1, CHANNELS, SIDE, SIDE)
        self.x = ir.Value(
            name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(self.shape)
        )
        self.seen = {self.x: self.rng.standard_normal((CHANNELS, SIDE * SIDE))}
        self.count = self.pairs = 0

    def pair(self, value: ir.Value) -> ir.Value:
        """Conv and Relu behind a value."""
        weights, _ = np.linalg.qr(self.rng.standard_normal((CHANNELS, CHANNELS)))
        made = weights @ self.seen[value]
        scale = 1 / made.std(axis=1, keepdims=True)
        weights, made = weights * scale, made * scale
        bias = 1 - made.mean(axis=1)  # so that Relu cuts little
        conv = self.tape.op(
            "Conv", (value, self._constant("w", weights[:, :, None, None]), self._constant("b", bias)),
            {"kernel_shape": [1, 1]}, name=f"conv{self.pairs}",
        )  # fmt: skip
        result = self.tape.op("Relu", (conv,), name=f"relu{self.pairs}")
        self.seen[result] = np.maximum(made + bias[:, None], 0)
        self.count, self.pairs = self.count + 2, self.pairs + 1
        return result

    def _constant(self, kind: str, values: np.ndarray) -> ir.Value:
        return self.tape.initializer(ir.Tensor(values.astype(np.float32)), f"{kind}{self.pairs}")

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The sum of two values."""
        result = self.tape.op("Add", (a, b), name=f"add{self.count}")
        self.seen[result] = self.seen[a] + self.seen[b]
        self.count += 1
        return result

    def model(self, y: ir.Value) -> ir.Model:
        """The model whose output is `y`."""
        y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(self.shape)
        graph = ir.Graph(
            [self.x], [y], nodes=self.tape.nodes, initializers=self.tape.initializers, opset_imports={"": 17},
            name="scale",
        )  # fmt: skip
        return ir.Model(graph, ir_version=8)


def chain(nodes: int) -> ir.Model:
    """Conv and Relu in turns, each behind the one before."""
    grower = Grower()
    value = grower.x
    while grower.count < nodes:
        value = grower.pair(value)
    return grower.model(value)


def residual(nodes: int) -> ir.Model:
    """A chain with an Add around every `_RESIDUAL` pairs of Conv and Relu."""
    grower = Grower()
    value = shortcut = grower.x
    while grower.count < nodes:
        value = grower.pair(value)
        if grower.pairs % _RESIDUAL == 0:
            value = shortcut = grower.add(value, shortcut)
    return grower.model(value)


def wide(nodes: int) -> ir.Model:
    """Pairs of Conv and Relu that all read the input, summed pair by pair: nothing is deep."""
    grower = Grower()
    level = [grower.pair(grower.x) for _ in range(nodes // 3)]
    while len(level) > 1:
        odd = level[len(level) & ~1 :]
        level = [grower.add(a, b) for a, b in zip(level[::2], level[1::2], strict=False)] + odd
    return grower.model(level[0])


SHAPES = {"chain": chain, "residual": residual, "wide": wide}


def measure(shape: str, nodes: int, samples: int) -> dict[str, Any]:
    """Seconds of each stage of `compile_model`, of all of it, and of loading the graph in ORT."""
    model = SHAPES[shape](nodes)
    nodes = len(model.graph)
    rng = np.random.default_rng(1)
    data = [
        {"x": rng.standard_normal((1, CHANNELS, SIDE, SIDE), np.float32)} for _ in range(samples)
    ]
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as folder:
        path, output = Path(folder) / "m.onnx", Path(folder) / "m.int8.onnx"
        ir.save(model, path)
        del model
        start = time.perf_counter()
        Session(path, Options("all", threads=1))
        load = time.perf_counter() - start
        clock = Clock()
        start, cpu = time.perf_counter(), time.process_time()
        result = compile_model(path, data, output=output, progress=clock)
        total, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "shape": shape, "nodes": nodes, "seconds": total, "cpu_seconds": cpu, "stages": clock.seconds,
        "outside_stages": total - sum(clock.seconds.values()), "ort_load_seconds": load,
        "kernels": {key: count for key, count in result.kernels.items() if isinstance(count, int)},
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }  # fmt: skip


def apart(shape: str, nodes: int, samples: int) -> dict[str, Any]:
    """`measure` in a process of its own: the peak of its memory is its own, and a crash ends nothing else."""
    words = ["--graphs", shape, "--nodes", str(nodes), "--samples", str(samples), "--one"]
    done = subprocess.run(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        return {"shape": shape, "nodes": nodes, "failed": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def stages(report: dict[str, Any]) -> Iterator[str]:
    """Lines of a table: seconds, and microseconds a node."""
    nodes = report["nodes"]
    rows = [*report["stages"].items(), ("outside of stages", report["outside_stages"])]
    rows += [("all", report["seconds"]), ("CPU time of all", report["cpu_seconds"])]
    rows += [("ORT loads the float graph", report["ort_load_seconds"])]
    kernels = ", ".join(f"{count} {kind}" for kind, count in report["kernels"].items())
    yield f"{report['shape']}, {nodes} nodes ({kernels}; peak RSS {report['peak_rss_mb']:.0f} MB)"
    for title, seconds in rows:
        yield f"  {title:<36}{seconds:9.2f} s{1e6 * seconds / nodes:10.0f} us a node"


def row(report: dict[str, Any]) -> str:
    """A line of the table in `docs/scale.md`."""
    shape, nodes = report["shape"], report["nodes"]
    if "failed" in report:
        return f"| {shape} | {nodes} | exit code {report['failed']} | | | | |"
    each = [report[key] * 1000 / nodes for key in ("seconds", "cpu_seconds", "ort_load_seconds")]
    numbers = " | ".join(f"{x:.2f}" for x in each)
    return (
        f"| {shape} | {nodes} | {report['seconds']:.0f} | {numbers} | {report['peak_rss_mb']:.0f} |"
    )


HEAD = (
    "| graph | nodes | seconds | seconds per 1000 nodes | CPU seconds per 1000 nodes "
    "| ORT loads 1000 float nodes, seconds | peak RSS, MB |\n|---|---:|---:|---:|---:|---:|---:|"
)


def main() -> int:
    """Prints the stages of each graph as they are done, and the table."""
    parser = argparse.ArgumentParser(description="Time qcompile on graphs of many small nodes.")
    parser.add_argument("--graphs", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--nodes", default="2000,20000", help="sizes (default: 2000,20000)")
    parser.add_argument("--samples", type=int, default=8, help="calibration samples (default: 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.graphs, int(args.nodes), args.samples)))
        return 0
    reports = []
    for shape in args.graphs.split(","):
        for nodes in map(int, args.nodes.split(",")):
            reports.append(apart(shape, nodes, args.samples))
            if "failed" not in reports[-1]:
                print("\n".join(stages(reports[-1])), file=sys.stderr, flush=True)
    print("\n".join([HEAD, *map(row, reports)]))
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1) + "\n", "utf-8")
    return int(any("failed" in report for report in reports))


if __name__ == "__main__":
    sys.exit(main())
