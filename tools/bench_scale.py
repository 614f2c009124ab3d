"""Times qcompile on long chains of small nodes, where the graph is the work and the arithmetic is not.

    PYTHONPATH=. python tools/bench_scale.py [--nodes 2000,20000] [--samples 8] [--json FILE]

Prints the seconds of each stage and the time a node. What grows linearly takes as long a node in the longer
chain as in the shorter one. ONNX Runtime's own time to load the chain stands below, since several stages
load a session.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
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
from qcompile.run.session import Options, Session, version

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


def chain(nodes: int) -> ir.Model:
    """A chain of so many nodes: Conv 1x1 and Relu in turns, and an Add around every `_RESIDUAL` pairs."""
    rng, tape = np.random.default_rng(0), Tape()
    shape = (1, CHANNELS, SIDE, SIDE)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    value = shortcut = x
    count = pairs = 0
    while count < nodes:
        # Orthogonal weights keep the variance through any number of layers.
        weights, _ = np.linalg.qr(rng.standard_normal((CHANNELS, CHANNELS)))
        tensor = ir.Tensor(weights.astype(np.float32).reshape(CHANNELS, CHANNELS, 1, 1))
        name = f"w{pairs}"
        value = tape.op(
            "Conv",
            (value, tape.initializer(tensor, name)),
            {"kernel_shape": [1, 1]},
            name=f"conv{pairs}",
        )
        value = tape.op("Relu", (value,), name=f"relu{pairs}")
        count, pairs = count + 2, pairs + 1
        if pairs % _RESIDUAL == 0 and count < nodes:
            value = shortcut = tape.op("Add", (value, shortcut), name=f"add{pairs}")
            count += 1
    value.name, value.type, value.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    graph = ir.Graph(
        [x], [value], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 17}, name="chain",
    )  # fmt: skip
    return ir.Model(graph, ir_version=8)


def measure(nodes: int, samples: int, folder: Path) -> dict[str, Any]:
    """Seconds of each stage of `compile_model`, of all of it, and of loading the chain in ORT."""
    path = folder / f"chain{nodes}.onnx"
    ir.save(chain(nodes), path)
    rng = np.random.default_rng(1)
    data = [
        {"x": rng.standard_normal((1, CHANNELS, SIDE, SIDE), np.float32)} for _ in range(samples)
    ]
    start = time.perf_counter()
    Session(path, Options("all", threads=1))
    load = time.perf_counter() - start
    clock = Clock()
    start = time.perf_counter()
    cpu = time.process_time()
    result = compile_model(path, data, output=folder / f"chain{nodes}.int8.onnx", progress=clock)
    total, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "nodes": nodes, "seconds": total, "cpu_seconds": cpu, "stages": clock.seconds,
        "outside_stages": total - sum(clock.seconds.values()), "ort_load_seconds": load,
        "kernels": {key: count for key, count in result.kernels.items() if isinstance(count, int)},
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }  # fmt: skip


def show(report: dict[str, Any]) -> Iterator[str]:
    """Lines of a table: seconds, and microseconds a node."""
    nodes = report["nodes"]
    rows = [*report["stages"].items(), ("outside of stages", report["outside_stages"])]
    rows += [("all", report["seconds"]), ("CPU time of all", report["cpu_seconds"])]
    rows += [("ORT loads the float chain", report["ort_load_seconds"])]
    kernels = ", ".join(f"{count} {kind}" for kind, count in report["kernels"].items())
    yield f"{nodes} nodes ({kernels}; peak RSS {report['peak_rss_mb']:.0f} MB)"
    for title, seconds in rows:
        yield f"  {title:<36}{seconds:9.2f} s{1e6 * seconds / nodes:10.0f} us a node"


def main() -> int:
    """Prints a table a size, and how much longer a node takes in the longest chain than in the shortest."""
    parser = argparse.ArgumentParser(description="Time qcompile on long chains of small nodes.")
    parser.add_argument("--nodes", default="2000,20000", help="lengths (default: 2000,20000)")
    parser.add_argument("--samples", type=int, default=8, help="calibration samples (default: 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    args = parser.parse_args()
    reports = []
    print(f"onnxruntime {version()}")
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as folder:
        for nodes in map(int, args.nodes.split(",")):
            reports.append(measure(nodes, args.samples, Path(folder)))
            print("\n".join(show(reports[-1])), flush=True)
    if len(reports) > 1:
        first, last = (r["seconds"] / r["nodes"] for r in (reports[0], reports[-1]))
        print(
            f"A node takes {last / first:.2f} times as long in the longest chain as in the first one."
        )
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
