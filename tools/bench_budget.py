"""Whether a promise is kept: `--max-drop 0.5%` searched for on calibration samples, judged on the evaluation split.

    python tools/bench_budget.py [--tasks imagenet,stsb] [--drop 0.5%] [--eval ../shared/eval] [--out table.md]

Where the calibration split of the kit has labels, the task's own metric on them is what may drop (`kit_metric.py`); else
what qcompile takes by default, decisions that change or the cosine. A promise is kept if the metric on the evaluation
split is worse by no more than the limit and the paired sampling noise of that difference. Speed is that of all models of a
task in turns, as in `bench.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from bench import HERE, ROOT, TASKS, Bench, find_kit, names, say, working_folder
from bench_process import measured

UNLABELLED = ("coco", "vad")  # the calibration split of these tasks has no labels
LOWER = ("ocr_rec", "books")  # error rate, perplexity


class Budget(Bench):
    """A bench of qcompile with a limit."""

    def compile(self, tool: str, recipe: str, model: Path, data: Path, out: Path) -> dict[str, Any]:
        """As `Bench.compile`, with the limit and the task's metric."""
        del recipe  # the limit decides
        task = out.parent.name
        out.unlink(missing_ok=True)
        env = {
            "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "QCOMPILE_EVAL": str(self.kit), "QCOMPILE_TASK": task,
        }  # fmt: skip
        command = [
            sys.executable, "-m", "qcompile", str(model), "--data", str(data), "-o", str(out), "--json",
            "--max-drop", self.args.drop,
        ]  # fmt: skip
        if task not in UNLABELLED:
            command += ["--metric", "kit_metric:score"]
            command += ["--lower-is-better"] if task in LOWER else []
        done = measured(command, limit=self.args.time_limit, env=env, folder=out.parent)
        row: dict[str, Any] = {"tool": tool, "seconds": done.seconds, "peak_rss_mb": done.peak_mb}
        if done.code not in (0, 3, 4) or not out.exists():
            return row | {"why": done.why()}
        return row | {"exit": done.code, "report": done.json()}


def table(report: dict[str, Any], drop: str) -> str:
    """Markdown: a row a task, and the geometric mean of speed-ups."""
    lines = [
        "| task | limit on | float model | change ± σ | allowed | kept | exit | speed-up | MB | seconds |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    speeds = []
    for task, found in report["tasks"].items():
        float_row, row = found["rows"]
        if why := row.get("why") or float_row.get("why"):
            lines.append(f"| {task} | {why} |")
            continue
        share = (
            float(drop.rstrip("%")) / 100 * abs(float_row["value"])
            if drop.endswith("%")
            else float(drop)
        )
        loss = row["change"] if task in LOWER else -row["change"]
        kept = loss <= share + row["change_sigma"]
        what = "cosine or decisions" if task in UNLABELLED else row["name"]
        speed = min(times["speedup"] for times in row["latency"].values())
        speeds.append(speed)
        lines.append(
            f"| {task} | {what} | {float_row['value']:.2f} {row['name']} | {row['change']:+.2f} ± {row['change_sigma']:.2f} | "
            f"{share:.2f} | {'yes' if kept else '**no**'} | {row['exit']} | {speed:.2f}x | {row['mb']:.2f} | {row['seconds']:.0f} |"
        )
    if speeds:
        mean = math.exp(sum(map(math.log, speeds)) / len(speeds))
        lines.append(f"\nGeometric mean of the speed-ups: {mean:.2f}x.")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Exit code 2 if there is no evaluation kit."""
    parser = argparse.ArgumentParser(description="Whether --max-drop keeps its promise.")
    parser.add_argument(
        "--tasks", type=names(TASKS), default=list(TASKS), help=f"of {', '.join(TASKS)}"
    )
    parser.add_argument("--drop", default="0.5%", help="as --max-drop of qcompile")
    parser.add_argument("--eval", type=Path, metavar="DIR", help="folder of evaluate.py")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep models and calibration data here"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table here as well")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything here, after each task"
    )
    parser.add_argument("--time-limit", type=float, default=900.0, help="seconds for a model")
    parser.set_defaults(tools=["qcompile"], limit=None, threads=2, seconds=8.0, nncf_python=None)
    args = parser.parse_args()
    kit = find_kit(args.eval, "bench_budget.py")
    if kit is None:
        return 2
    with working_folder(args.work) as work:
        report = Budget(args, kit, work).run()
    text = table(report, args.drop)
    print(text, end="")
    if args.out:
        args.out.write_text(text, "utf-8")
    if report["skipped"]:
        say(json.dumps(report["skipped"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
