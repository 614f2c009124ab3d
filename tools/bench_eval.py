"""What `bench.py` asks of evaluate.py beyond its command line; run in a process of its own.

    python bench_eval.py EVAL_DIR describe
    python bench_eval.py EVAL_DIR time TASK [--threads 2] [--seconds 8] NAME=MODEL.onnx...

`time` runs all models of a task in turns, in a new random order each round, so that a change of the machine's
speed meets them alike, and compares each with the first one within the round.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from typing import Any

import numpy as np

_ROUNDS = (20, 2000)  # at least and at most
_WARM = 3


def describe(kit: Any) -> dict[str, Any]:
    """The FP32 model of each task, or None if it is not there."""
    return {
        name: str(task.model) if task.model.exists() else None for name, task in kit.TASKS.items()
    }


def interleave(
    kit: Any, task_name: str, models: dict[str, str], threads: int, seconds: float
) -> dict[str, Any]:
    """For each feed and model: median milliseconds, and median and quartiles of the first one's time over its."""
    task = kit.TASKS[task_name]
    sessions = {name: kit.open_session(path, threads) for name, path in models.items()}
    feeds: dict[str, dict[str, Any]] = {}
    for name in list(sessions):
        try:
            feeds[name] = task.latency_feeds(sessions[name])
            for values in feeds[name].values():
                kit.run(sessions[name], values)
        except Exception as error:  # noqa: BLE001 - one model must not stop the others
            print(f"{name}: {error}", file=sys.stderr)
            del sessions[name]
    first = next(iter(models))
    rng = np.random.default_rng(0)
    report: dict[str, Any] = {}
    for feed in feeds[first]:
        times: dict[str, list[float]] = {name: [] for name in sessions}
        deadline = time.perf_counter() + seconds
        while len(times[first]) < _ROUNDS[0] or (
            time.perf_counter() < deadline and len(times[first]) < _ROUNDS[1]
        ):
            for name in rng.permutation(list(sessions)):
                start = time.perf_counter()
                kit.run(sessions[name], feeds[name][feed])
                times[name].append(time.perf_counter() - start)
        report[feed] = {}
        reference = np.array(times[first][_WARM:])
        for name, values in times.items():
            own = np.array(values[_WARM:])
            low, middle, high = np.percentile(reference / own, [25, 50, 75])
            report[feed][name] = {
                "ms": 1000 * float(np.median(own)), "speedup": float(middle), "quartiles": [float(low), float(high)],
                "rounds": len(own),
            }  # fmt: skip
    return report


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("eval_dir")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("describe")
    timing = commands.add_parser("time")
    timing.add_argument("task")
    timing.add_argument("--threads", type=int, default=2)
    timing.add_argument("--seconds", type=float, default=8.0)
    timing.add_argument("models", nargs="+", metavar="NAME=MODEL")
    args = parser.parse_args()
    sys.path.insert(0, args.eval_dir)
    kit = importlib.import_module("evaluate")
    if args.command == "describe":
        print(json.dumps(describe(kit)))
        return
    models = dict(item.split("=", 1) for item in args.models)
    print(json.dumps(interleave(kit, args.task, models, args.threads, args.seconds)))


if __name__ == "__main__":
    main()
