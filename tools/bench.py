"""Compares qcompile with other quantizers on the tasks of the evaluation kit, and prints the table as Markdown.

    python tools/bench.py [--tasks imagenet,stsb] [--tools qcompile,ort] [--nncf-python OTHER_VENV/bin/python]
                          [--limit 20] [--out table.md] [--json table.json]

Every tool quantizes in a process of its own, under a time limit: what fails becomes a row that says why. The
kit is found beside the checkout (../shared/eval), by --eval or by the environment variable QCOMPILE_EVAL.

This process imports the standard library only, so that it does not add to the memory it measures.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_process import measured, reason
from bench_table import markdown

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BESIDE = Path("..") / "shared" / "eval"
TASKS = ("imagenet", "cifar10", "stsb", "coco", "ocr_rec", "ocr_det", "vad", "books")
TOOLS = ("qcompile", "ort", "ort-best", "nncf")
_MATMUL_HEAVY = ("stsb", "books", "vad")
_TRANSFORMERS = ("stsb", "books")
_LONG = 1800.0  # seconds, for calibration data, scoring and timing
_PATHS = (
    "model",
    "output",
    "next_command",
)  # keys of qcompile's report that name files of this machine
_WRITTEN = (0, 3, 4)  # qcompile's exit codes for a written result: good, not accurate, not faster


def recipes(tool: str, task: str) -> list[str]:
    """How `bench_peers.py` calls what a tool does for a task; the first one counts that works."""
    if tool == "qcompile":
        return [""]
    if tool == "nncf":
        return ["nncf-transformer", "nncf"] if task in _TRANSFORMERS else ["nncf"]
    kind = "dynamic" if task in _MATMUL_HEAVY else "static"
    if tool == "ort":
        return [f"{kind}-default"]
    return [
        f"{kind}-best",
        f"{kind}-best-raw",
        *(["static-best-tensor"] if kind == "static" else []),
    ]


class Bench:
    """The evaluation kit, a folder for what is made, and the options."""

    def __init__(self, args: argparse.Namespace, kit: Path, work: Path) -> None:
        self.args, self.kit, self.work = args, kit, work

    def run(self) -> dict[str, Any]:
        """The report; it is written to --json after each task."""
        models = json.loads(self._ask([str(HERE / "bench_eval.py"), str(self.kit), "describe"]))
        report: dict[str, Any] = {
            "machine": machine(), "threads": self.args.threads, "limit": self.args.limit, "skipped": {}, "tasks": {},
        }  # fmt: skip
        tools = list(self.args.tools)
        if "nncf" in tools:
            why = self._nncf(report["machine"]["versions"])
            if why:
                report["skipped"]["nncf"] = why
                tools.remove("nncf")
        for name in self.args.tasks:
            if models.get(name) is None:
                report["skipped"][name] = "its FP32 model is not there"
                continue
            report["tasks"][name] = self.task(name, Path(models[name]), tools)
            if self.args.json:
                self.args.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        return report

    def _nncf(self, versions: dict[str, str]) -> str:
        """Why NNCF cannot be run, or ""; its version goes to `versions`."""
        if self.args.nncf_python is None:
            return "no interpreter that has it was given (--nncf-python)"
        done = measured(
            [self.args.nncf_python, "-c", "import nncf; print(nncf.__version__)"], limit=120
        )
        if done.code != 0:
            return f"the interpreter given does not have it ({reason(done.err)})"
        versions["nncf"] = done.out.strip().splitlines()[-1]
        return ""

    def task(self, name: str, original: Path, tools: list[str]) -> dict[str, Any]:
        """The rows of one task, FP32 first."""
        folder = self.work / name
        folder.mkdir(parents=True, exist_ok=True)
        # A copy, because ORT's tool writes files beside the model that it is given.
        model = folder / original.name
        for file in (original, *original.parent.glob(f"{original.name}?data*")):
            shutil.copyfile(file, folder / file.name)
        data = self.calibration(name, folder)
        rows = [{"tool": "FP32", **self._score(name, model)}]
        outputs = {}
        for tool in tools:
            out = folder / f"{tool}.onnx"
            row = self.row(tool, name, model, data, out)
            if not row.get("why"):
                outputs[tool] = out
            say(f"{name}: {tool}: {row.get('why') or _headline(row)}")
            rows.append(row)
        latency = self.timing(name, model, outputs)
        for row in rows:
            key = "fp32" if row["tool"] == "FP32" else row["tool"]
            pairs = {feed: times[key] for feed, times in latency.items() if key in times}
            row["latency"] = pairs
        return {"rows": rows, "latency": latency}

    def calibration(self, name: str, folder: Path) -> Path:
        """The folder of feeds, made once for all tools (and kept with --work)."""
        data = folder / (f"calib-{self.args.limit}" if self.args.limit else "calib")
        if not data.exists():
            say(f"{name}: calibration data")
            part = folder / "calib.part"
            shutil.rmtree(part, ignore_errors=True)
            self._ask([str(self.kit / "evaluate.py"), "calib", name, str(part), *self._limit()])
            part.rename(data)
        return data

    def row(self, tool: str, task: str, model: Path, data: Path, out: Path) -> dict[str, Any]:
        """The tool's result by the first of its recipes that works; if none does, why the first one does not."""
        failed: dict[str, Any] = {}
        for recipe in recipes(tool, task):
            say(f"{task}: {tool} {recipe} ...")
            row = self.compile(tool, recipe, model, data, out)
            if not row.get("why"):
                row |= self._score(task, out, model)
            if not row.get("why"):
                if failed:
                    row["note"] += f", because {failed['recipe']} {failed['why']}"
                return row
            failed = failed or {"recipe": recipe, **row}
        return failed

    def compile(self, tool: str, recipe: str, model: Path, data: Path, out: Path) -> dict[str, Any]:
        """What it took to quantize, or why it failed."""
        out.unlink(missing_ok=True)
        env = {}
        if tool == "qcompile":
            paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            env = {"PYTHONPATH": os.pathsep.join(paths)}
            command = ["-m", "qcompile", str(model), "--data", str(data), "-o", str(out), "--json"]
        else:
            command = [str(HERE / "bench_peers.py"), recipe, str(model), str(data), str(out)]
        python = self.args.nncf_python if tool == "nncf" else sys.executable
        command = [python, *command]
        done = measured(command, limit=self.args.time_limit, env=env, folder=out.parent)
        row: dict[str, Any] = {"tool": tool, "seconds": done.seconds, "peak_rss_mb": done.peak_mb}
        if done.code not in (_WRITTEN if tool == "qcompile" else (0,)):
            return row | {"why": done.why()}
        if not out.exists():
            return row | {"why": "writes no model"}
        answer = done.json()
        if tool == "qcompile":
            shown = {key: value for key, value in answer.items() if key not in _PATHS}
            return row | {"exit": done.code, "report": shown}
        return row | {"note": answer.get("note", "")}

    def _score(self, task: str, model: Path, fp32: Path | None = None) -> dict[str, Any]:
        """What evaluate.py says of a model, without its timings, or why it does not."""
        against = [] if fp32 is None else ["--fp32", str(fp32)]
        command = [
            sys.executable, str(self.kit / "evaluate.py"), "run", task, str(model), *against, *self._limit(),
            "--threads", str(self.args.threads), "--json",
        ]  # fmt: skip
        done = measured(command, limit=_LONG)
        if done.code != 0:
            if done.code == 1 and "in open_session" in done.err:
                return {"why": f"does not load: {reason(done.err)}"}
            return {"why": f"does not run: {done.why()}"}
        answer = done.json()
        alone = answer.pop("latency", None)
        size = (
            sum(f.stat().st_size for f in (model, *model.parent.glob(f"{model.name}?data*"))) / 1e6
        )
        return answer | {"mb": size, "pair_latency": alone}

    def timing(self, task: str, model: Path, outputs: dict[str, Path]) -> dict[str, Any]:
        """All models of a task in turns; FP32 twice, as a control."""
        say(f"{task}: timing {len(outputs)} models against FP32")
        pairs = {"fp32": model, "fp32 again": model, **outputs}
        command = [
            str(HERE / "bench_eval.py"), str(self.kit), "time", task, "--threads", str(self.args.threads),
            "--seconds", str(self.args.seconds), *(f"{name}={path}" for name, path in pairs.items()),
        ]  # fmt: skip
        done = measured([sys.executable, *command], limit=_LONG)
        if done.code != 0:  # a model that ends the process, alone or beside the others
            say(f"{task}: timing {done.why()}")
        return done.json() if done.code == 0 else {}

    def _ask(self, command: list[str]) -> str:
        """What a part of the bench prints. If it fails, so does the bench: the fault is no tool's."""
        done = measured([sys.executable, *command], limit=_LONG)
        if done.code != 0:
            sys.stderr.write(done.err)
            raise SystemExit(f"bench.py: {' '.join(Path(command[0]).name.split())} {done.why()}")
        return done.out

    def _limit(self) -> list[str]:
        return ["--limit", str(self.args.limit)] if self.args.limit else []


def _headline(row: dict[str, Any]) -> str:
    return f"{row['seconds']:.1f} s, {row['peak_rss_mb']:.0f} MB, {row['name']} {row['value']:.2f} ({row['change']:+.2f})"


def machine() -> dict[str, Any]:
    """The processor and the versions that a reader needs to compare."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    versions = {"python": platform.python_version()}
    for name in ("onnxruntime", "onnx"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"cpu": cpu, "cores": os.cpu_count(), "versions": versions}


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


def names(allowed: tuple[str, ...]) -> Any:
    """An argparse type: names out of `allowed`, split by commas."""

    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",") if name.strip()]
        for name in chosen:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return chosen

    return parse


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare qcompile with other quantizers.")
    parser.add_argument(
        "--tasks", type=names(TASKS), default=list(TASKS), help=f"of {', '.join(TASKS)}"
    )
    parser.add_argument(
        "--tools", type=names(TOOLS), default=list(TOOLS), help=f"of {', '.join(TOOLS)}"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="first N samples, of calibration and evaluation"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="intra-op threads of what is scored and timed"
    )
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="timing of all models of a task on one feed"
    )
    parser.add_argument(
        "--time-limit", type=float, default=300.0, help="seconds that a tool may take for a model"
    )
    parser.add_argument(
        "--nncf-python", metavar="PATH", help="interpreter that has nncf, onnx and numpy"
    )
    parser.add_argument("--eval", type=Path, metavar="DIR", help="folder of evaluate.py")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep models and calibration data here"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table here as well")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything here, after each task"
    )
    return parser.parse_args()


@contextlib.contextmanager
def working_folder(kept: Path | None) -> Iterator[Path]:
    """The folder given, or one that is gone afterwards."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="qcompile-bench-") as folder:
        yield Path(folder)


def find_kit(chosen: Path | None, tool: str) -> Path | None:
    """The folder of evaluate.py; None, and a sentence, where there is none."""
    given = chosen or os.environ.get("QCOMPILE_EVAL")
    kit = Path(given).resolve() if given else (ROOT / BESIDE).resolve()
    if (kit / "evaluate.py").exists():
        return kit
    say(
        f"{tool}: there is no evaluate.py in {given or BESIDE}: point to its folder with --eval DIR or "
        "the environment variable QCOMPILE_EVAL."
    )
    return None


def main() -> int:
    """Exit code 2 if there is no evaluation kit."""
    args = arguments()
    kit = find_kit(args.eval, "bench.py")
    if kit is None:
        return 2
    with working_folder(args.work) as work:
        text = markdown(Bench(args, kit, work).run())
    print(text, end="")
    if args.out:
        args.out.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
