"""Compares gathering statistics with qcompile with plain inference and with other tools; prints Markdown tables.

    python tools/bench_calibration.py [--tables A,B] [--repeat 3] [--nncf-python OTHER_VENV/bin/python]
                                      [--out tables.md] [--json tables.json] [--quick]

    A  mobilenet_v2 on image files: FP32 inference, qcompile, ORT, NNCF
    B  peak memory with few and with many samples
    C  all-MiniLM-L6-v2 on sentences of different lengths
    D  models with caches, states, and inputs of different sizes
    E  the range methods alone

Everything measured runs in a process of its own (`bench_calibration_peers.py`), on as many cores as --threads
says. This process imports the standard library only, so that it does not add to the memory it measures. The kit
is found as by `bench.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import BESIDE, ROOT, machine, names, say, working_folder
from bench_calibration_table import markdown
from bench_process import Finished, measured

HERE = Path(__file__).resolve().parent
TABLES = ("A", "B", "C", "D", "E")
ORT_METHODS = ("MinMax", "Percentile", "Entropy")
IMAGE_WORDS = (
    "--resize", "256", "--crop", "center", "--color", "rgb", "--layout", "nchw", "--scale", repr(1 / 255),
    "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225",
)  # fmt: skip
CASES = (
    ("gpt-books-4m, empty caches", "books", "books-empty"),
    ("gpt-books-4m, caches of different lengths", "books", "books"),
    ("silero_vad", "vad", "vad"),
    ("fastestdet_coco", "coco", "coco"),
    ("PP-OCR det, pages of different sizes", "ocr_det", "ocr_det"),
    ("PP-OCR rec, lines of different widths", "ocr_rec", "ocr_rec"),
)
_SAME = 1e-5  # of feeds that two programs normalize
_IMAGE_BYTES = 80_000_000  # of a sample of mobilenet_v2, when ORT keeps all tensors
_SPARE = 1_000_000_000  # bytes that are left to the machine
_FEW = 20  # images from which ORT's histograms take as long to search as from all
_LONG = 1800.0

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many samples each table takes; 0: all."""

    images: int = 200
    sentences: int = 512
    small: tuple[int, int] = (100, 10_000)
    large: tuple[int, int] = (100, 2_000)
    case: int = 0


QUICK = Sizes(images=16, sentences=16, small=(10, 100), large=(10, 40), case=6)


def available() -> int | None:
    """Bytes of memory that this machine has left; None: it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def lacking(samples: int, free: int | None) -> str:
    """Why ORT cannot keep the tensors of so many images in `free` bytes, or ""."""
    need = samples * _IMAGE_BYTES
    if free is None or free >= need:
        return ""
    return f"skipped: needs up to {need / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"


def row(tool: str, runs: list[Finished], **more: Any) -> Row:
    """What the runs of a tool took: the median of their seconds, and the greatest memory."""
    failed = next((run for run in runs if run.code != 0), None)
    return {
        "tool": tool, "seconds": statistics.median(run.seconds for run in runs),
        "peak_rss_mb": max(run.peak_mb for run in runs), "runs": [run.seconds for run in runs],
        **({"why": failed.why()} if failed else {}), **more,
    }  # fmt: skip


def finite(survey: Row) -> Row:
    """How many tensors and methods a survey holds, and the tensors whose range is not finite by every method."""
    tensors = survey.get("tensors", [])
    methods = survey.get("methods", [])
    bad = [
        tensor["name"]
        for tensor in tensors
        if tensor["ranges"].keys() != set(methods)
        or not all(math.isfinite(end) for pair in tensor["ranges"].values() for end in pair)
    ]
    return {"tensors": len(tensors), "methods": methods, "not_finite": bad}


class Bench:
    """The evaluation kit, a folder for what is made, and the options."""

    def __init__(self, args: argparse.Namespace, kit: Path, work: Path) -> None:
        self.args, self.kit, self.work = args, kit, work
        self.sizes = QUICK if args.quick else Sizes()
        described = measured(
            [sys.executable, str(HERE / "bench_eval.py"), str(kit), "describe"], limit=_LONG
        )
        self._settled(described, "describing the kit")
        self.models: dict[str, str | None] = described.json()
        self.report: Row = {
            "machine": machine(), "threads": args.threads, "repeat": args.repeat, "quick": args.quick,
            "skipped": {}, "tables": {},
        }  # fmt: skip

    def run(self) -> Row:
        """The report; it is written to --json after each table."""
        makers: dict[str, Callable[[], Row]] = {
            "A": self.images, "B": self.growth, "C": self.sentences, "D": self.cases, "E": self.methods,
        }  # fmt: skip
        needed = {"A": ["imagenet"], "C": ["stsb"], "E": ["imagenet"]}
        for name in self.args.tables:
            if not all(self.models.get(task) for task in needed.get(name, [])):
                self.report["skipped"][f"table {name}"] = "its FP32 model is not there"
                continue
            self.report["tables"][name] = makers[name]()
            if self.args.json:
                self.args.json.write_text(json.dumps(self.report, indent=1) + "\n", "utf-8")
        return self.report

    # ---- the tables

    def images(self) -> Row:
        """Table A."""
        model, data = self.model("imagenet"), self.data("imagenet", self.sizes.images)
        apart = self.difference(model, data)
        rows = self.pair(model, data, self.work / "imagenet.stats", IMAGE_WORDS)
        for method in ORT_METHODS:
            why = "" if method == "MinMax" else lacking(self.sizes.images, available())
            rows.append(
                {"tool": f"ORT {method}", "why": why} if why else self.ort(method, model, data)
            )
        rows.append(self.nncf(model, data))
        return {
            "samples": self.sizes.images, "difference": apart, "rows": self.compared(rows),
            "memory": self.memory(model, data),
        }  # fmt: skip

    def growth(self) -> Row:
        """Table B."""
        rows = []
        for task, counts in (("cifar10", self.sizes.small), ("imagenet", self.sizes.large)):
            if not self.models.get(task):
                self.report["skipped"][f"{task} of table B"] = "its FP32 model is not there"
                continue
            model = self.model(task)
            first = 0.0
            for count in counts:
                say(f"B: {model.name}, {count} samples")
                out = self.work / "growth.stats"
                if task == "imagenet":
                    data = self.data(task, count)
                    done = self.qcompile(model, data, out, IMAGE_WORDS)
                else:
                    data = self.data(task, counts[0])
                    done = self.ask("repeated", model, data, count, out)
                found = row(model.stem, [done], samples=count)
                first = first or found["peak_rss_mb"]
                rows.append(found | {"growth": 100 * (found["peak_rss_mb"] / first - 1)})
        return {"rows": rows}

    def sentences(self) -> Row:
        """Table C."""
        model, data = self.model("stsb"), self.data("stsb", self.sizes.sentences)
        rows = self.pair(model, data, self.work / "stsb.stats")
        rows += [self.ort(method, model, data) for method in ORT_METHODS]
        return {
            "samples": len(list(data.iterdir())), "rows": self.compared(rows),
            "memory": self.memory(model, data),
        }  # fmt: skip

    def cases(self) -> Row:
        """Table D."""
        found = []
        for title, task, name in CASES:
            if not self.models.get(task):
                self.report["skipped"][title] = "its FP32 model is not there"
                continue
            model, data = self.model(task), self.data(name, self.sizes.case)
            rows = self.pair(model, data, self.work / f"{name}.stats")
            rows += [self.ort(method, model, data) for method in ORT_METHODS[:2]]
            found.append({
                "title": title, "samples": len(list(data.iterdir())), "rows": self.compared(rows),
                "memory": self.memory(model, data),
            })  # fmt: skip
        return {"cases": found}

    def methods(self) -> Row:
        """Table E."""
        stats = self.work / "imagenet.stats"
        if not stats.exists():
            data = self.data("imagenet", self.sizes.images)
            self._settled(
                self.qcompile(self.model("imagenet"), data, stats, IMAGE_WORDS), "qcompile"
            )
        say("E: range methods")
        done = self.ask("ranges", stats)
        self._settled(done, "the range methods")
        rows = self.report["tables"].get("A", {}).get("rows", [])
        searched = {row["tool"]: row for row in rows if "compute" in row}
        ort = []
        for method in ORT_METHODS:
            tool = f"ORT {method}"
            few = min(_FEW, self.sizes.images)
            ort.append(
                searched.get(tool)
                or self.ort(method, self.model("imagenet"), self.data("imagenet", few))
            )
        return done.json() | {"ort": ort}

    # ---- what they measure

    def pair(self, model: Path, data: Path, out: Path, words: tuple[str, ...] = ()) -> list[Row]:
        """Plain inference and qcompile, in turns."""
        plain: list[Finished] = []
        mine: list[Finished] = []
        for turn in range(self.args.repeat):
            say(f"{model.stem}, {data.name}: FP32 and qcompile, {turn + 1} of {self.args.repeat}")
            plain.append(self.ask("fp32", model, data))
            mine.append(self.qcompile(model, data, out, words))
        survey = mine[-1].json()
        ratios = [a.seconds / b.seconds for a, b in zip(mine, plain, strict=True)]
        more = finite(survey) | {"passes": survey.get("passes"), "ratio": statistics.median(ratios)}
        return [row("FP32 inference", plain), row("qcompile calibrate", mine, **more)]

    def qcompile(self, model: Path, data: Path, out: Path, words: tuple[str, ...] = ()) -> Finished:
        """`qcompile calibrate`, all samples and everything that any range method needs."""
        return self.ask(
            "qcompile", "calibrate", model, "--data", data, "-o", out, "--held-out", "0", "--json", "--quiet",
            *words,
        )  # fmt: skip

    def ort(self, method: str, model: Path, data: Path) -> Row:
        """Calibration by ORT, which fails before it takes all of the machine's memory."""
        say(f"{model.stem}, {data.name}: ORT {method}")
        free = available()
        limit = () if free is None else ("--memory", str(max(free - _SPARE, _SPARE)))
        done = self.ask("ort", method, model, data, options=limit)
        return row(f"ORT {method}", [done], **done.json())

    def nncf(self, model: Path, data: Path) -> Row:
        """`nncf.quantize`, and how much of it is statistics."""
        if self.args.nncf_python is None:
            return {
                "tool": "NNCF",
                "why": "skipped: no interpreter that has it was given (--nncf-python)",
            }
        say(f"{model.stem}: NNCF")
        done = self.ask("nncf", model, data, python=self.args.nncf_python)
        return row("NNCF quantize", [done], **done.json())

    def memory(self, model: Path, data: Path) -> Row:
        """The ratio without reading, loading and writing."""
        say(f"{model.stem}, {data.name}: feeds in memory")
        done = self.ask("memory", model, data, self.args.repeat)
        return done.json() if done.code == 0 else {"why": done.why()}

    def compared(self, rows: list[Row]) -> list[Row]:
        """The rows with the ratio of each one's seconds to those of the first one."""
        first = rows[0]
        known = "why" not in first
        return [
            {"ratio": r["seconds"] / first["seconds"], **r} if known and "seconds" in r else r
            for r in rows
        ]

    def difference(self, model: Path, data: Path) -> Row:
        """How far the feeds that the tools read differ; it is an error if they do by more than rounding."""
        done = self.ask("check", self.kit, model, data, *IMAGE_WORDS)
        self._settled(done, "comparing how images are read")
        apart = done.json()
        if not max(apart.values()) <= _SAME:
            raise SystemExit(f"bench_calibration.py: images are not read alike: {apart}")
        return apart

    # ---- children

    def ask(
        self, mode: str, *words: object, options: tuple[str, ...] = (), python: str = sys.executable
    ) -> Finished:
        """A run of `bench_calibration_peers.py`."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {} if mode == "nncf" else {"PYTHONPATH": os.pathsep.join(paths)}
        command = [
            python, str(HERE / "bench_calibration_peers.py"), "--threads", str(self.args.threads), *options,
            mode, *map(str, words),
        ]  # fmt: skip
        return measured(command, limit=self.args.time_limit, env=env, folder=self.work)

    def model(self, task: str) -> Path:
        """A copy of a task's model: ORT's tool writes files beside the one that it is given."""
        original = Path(str(self.models[task]))
        folder = self.work / "models" / task
        folder.mkdir(parents=True, exist_ok=True)
        # Many models are called model.onnx, but their folders are not.
        name = original.name if original.stem != "model" else f"{original.parent.name}.onnx"
        if not (folder / name).exists():
            for file in original.parent.glob(f"{original.name}?data*"):
                shutil.copyfile(file, folder / file.name)
            shutil.copyfile(original, folder / name)
        return folder / name

    def data(self, name: str, count: int) -> Path:
        """A folder of samples, made once."""
        folder = self.work / "data" / f"{name}-{count or 'all'}"
        if not folder.exists():
            say(f"samples: {folder.name}")
            part = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            self._settled(self.ask("prepare", self.kit, name, part, count), f"samples of {name}")
            part.rename(folder)
        return folder

    def _settled(self, done: Finished, what: str) -> None:
        """If a part of the bench itself fails, so does the bench: the fault is no tool's."""
        if done.code != 0:
            sys.stderr.write(done.err)
            raise SystemExit(f"bench_calibration.py: {what} {done.why()}")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare calibration with plain inference.")
    parser.add_argument(
        "--tables", type=names(TABLES), default=list(TABLES), help=f"of {','.join(TABLES)}"
    )
    parser.add_argument(
        "--repeat", type=int, default=3, metavar="N", help="runs of FP32 and qcompile, in turns (3)"
    )
    parser.add_argument("--threads", type=int, default=2, help="cores that each tool may use (2)")
    parser.add_argument(
        "--time-limit", type=float, default=_LONG, help="seconds that a run may take (1800)"
    )
    parser.add_argument(
        "--nncf-python", metavar="PATH", help="interpreter that has nncf, onnx, numpy and pillow"
    )
    parser.add_argument("--quick", action="store_true", help="few samples, to try the bench itself")
    parser.add_argument("--eval", type=Path, metavar="DIR", help="folder of evaluate.py")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep models and samples here")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables here as well")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything here, after each table"
    )
    args = parser.parse_args(words)
    for name in ("repeat", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: give 1 or more")
    return args


def main() -> int:
    """Exit code 2 if there is no evaluation kit."""
    args = arguments()
    given = args.eval or os.environ.get("QCOMPILE_EVAL")
    kit = Path(given).resolve() if given else (ROOT / BESIDE).resolve()
    if not (kit / "evaluate.py").exists():
        say(
            f"bench_calibration.py: there is no evaluate.py in {given or BESIDE}: point to its folder with "
            "--eval DIR or the environment variable QCOMPILE_EVAL."
        )
        return 2
    with working_folder(args.work) as work:
        text = markdown(Bench(args, kit, work).run())
    print(text, end="")
    if args.out:
        args.out.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
