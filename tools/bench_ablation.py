"""What each rewrite and correction is worth: compiles with all of them, without each in turn, and with none.

    python tools/bench_ablation.py [--tasks imagenet,coco,stsb,ocr_rec] [--limit 100] [--samples 64]
                                   [--only equalize,smooth] [--untimed] [--out table.md]

A row has the SQNR and the agreement of decisions with FP32 on the evaluation samples of the kit, which no compilation saw, and
the speed-up against FP32 in turns. What is off by default (`weight_search`, and `rounding` where the recipe has it) is
switched the other way. With --untimed plans follow the target's costs, not measured ones, and nothing is left float for
accuracy: then rows differ by what they name alone, on a busy machine as well, and have no speed-up. The kit is found beside the checkout (../shared/eval), by --eval or by the environment
variable QCOMPILE_EVAL.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from qcompile import compile_model, search
from qcompile.recipe import Recipe
from qcompile.workshop import Workshop

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("imagenet", "coco", "stsb", "ocr_rec")
HEAD = ("without", "SQNR dB", "change", "agreement %", "change", "speed-up", "seconds")
FULL, BARE = "nothing: all is on", "all of it"
OF_TIME = ("measured kernels", "8-bit weights alone", "float for accuracy (sqnr_goal)")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A compilation with something off, or on that is off by default.

    Attributes:
        name: in the table.
        options: fields of the recipe.
        patches: (owner, name, replacement) of stages that have no option.
    """

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    patches: tuple[tuple[Any, str, Any], ...] = ()

    def recipe(self, threads: int) -> Recipe:
        """The default recipe with these options."""
        return Recipe(threads=threads, **self.options)

    def untimed(self) -> Variant:
        """The same, whatever clocks say: the plan is that of the target's costs, in the fused form."""
        options = {"sqnr_goal": 0.0, "bench_seconds": 0.01, "timing": False, **self.options}
        return Variant(self.name, options, self.patches)

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """The stages without an option are off inside."""
        with contextlib.ExitStack() as stack:
            for owner, name, replacement in self.patches:
                stack.enter_context(mock.patch.object(owner, name, replacement))
            yield


def variants() -> list[Variant]:
    """All of them, the full compilation first and the bare one last."""
    tuning = ((search, "_tune", lambda _shop, best, _found, _history: best),)
    alone = ((Workshop, "_one_shape", lambda _shop: False),)
    kernels = ((Workshop, "timed", lambda _shop, request: request),)
    off = [
        Variant("equalize", {"equalize": False}),
        Variant("absorb", {"absorb": False}),
        Variant("smooth", {"smooth": False}),
        Variant("masks", {"masks": False}),
        Variant("bias_correction", {"bias_correction": False}),
        Variant("ranges: minmax only", {"ranges": "minmax"}),
        Variant("ranges: mean only", {"ranges": "mean"}),
        Variant("tuning of single ranges", patches=tuning),
        Variant("float for accuracy (sqnr_goal)", {"sqnr_goal": 0.0}),
        Variant("measured kernels", patches=kernels),
        Variant("8-bit weights alone", patches=alone),
    ]
    turned = [_turned(name) for name in ("weight_search", "rounding") if _has(name)]
    bare = {
        "equalize": False,
        "absorb": False,
        "smooth": False,
        "masks": False,
        "bias_correction": False,
        "ranges": "minmax",
        "sqnr_goal": 0.0,
    }
    bare |= {name: False for name in ("weight_search", "rounding") if _has(name)}
    return [Variant(FULL), *off, *turned, Variant(BARE, bare, (*tuning, *kernels))]


def _has(option: str) -> bool:
    return any(field.name == option for field in dataclasses.fields(Recipe))


def _turned(option: str) -> Variant:
    """An option as it is not by default."""
    is_on = getattr(Recipe(), option)
    return Variant(option if is_on else f"(with) {option}", {option: not is_on})


class Ablation:
    """The kit, and the options."""

    def __init__(self, args: argparse.Namespace, kit: Any) -> None:
        self.args, self.kit = args, kit

    def table(self, name: str) -> str:
        """The Markdown table of a task."""
        task = self.kit.TASKS[name]
        if not task.model.exists():
            return f"### {name}\n\nskipped: its FP32 model is not there\n"
        feeds = [
            dict(f) for _, f in zip(range(self.args.samples), task.calibration(), strict=False)
        ]
        rows = []
        with tempfile.TemporaryDirectory(prefix="qcompile-ablation-") as folder:
            found = chosen(self.args.only)
            if self.args.untimed:
                found = [variant.untimed() for variant in found if variant.name not in OF_TIME]
            for variant in found:
                row = self.row(task, variant, feeds, Path(folder) / "o.onnx")
                say(f"{name}: {variant.name}: {row}")
                rows.append((variant.name, row))
        return markdown(name, rows)

    def row(
        self, task: Any, variant: Variant, feeds: Sequence[Any], out: Path
    ) -> dict[str, float | None]:
        """SQNR, agreement, speed-up and seconds of one variant."""
        with variant.patched():
            done = compile_model(
                task.model, feeds, output=out, recipe=variant.recipe(self.args.threads)
            )
        scored = self.kit.compare(task, out, task.model, self.args.limit, self.args.threads)
        speed = min(feed["speedup"] for feed in scored["latency"].values())
        return {
            "db": scored["sqnr_db"], "agreement": scored["agreement %"],
            "speed": None if self.args.untimed else speed,
            "seconds": done.seconds,
        }  # fmt: skip


def chosen(only: Sequence[str] | None) -> list[Variant]:
    """The variants whose names hold one of these words, and always the full one."""
    found = variants()
    if not only:
        return found
    return [v for v in found if v.name == FULL or any(word in v.name for word in only)]


def markdown(task: str, rows: Sequence[tuple[str, Mapping[str, float | None]]]) -> str:
    """The table of a task; changes are against its first row, and a negative one says that what is off helped."""
    first = rows[0][1]
    lines = [f"### {task}", "", "| " + " | ".join(HEAD) + " |"]
    lines.append("|" + "|".join("---" if i == 0 else "---:" for i in range(len(HEAD))) + "|")
    for name, row in rows:
        cells = [name]
        for key, digits in (("db", 1), ("agreement", 2)):
            value, reference = row[key], first[key]
            cells.append("" if value is None else f"{value:.{digits}f}")
            same = row is first or value is None or reference is None
            cells.append("" if same else f"{value - reference:+.{digits}f}")  # type: ignore[operator]
        speed = row["speed"]
        cells += ["" if speed is None else f"{speed:.2f}x", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="What each rewrite and correction is worth.")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="WORDS",
                        help="rows whose names hold one of these words")  # fmt: skip
    parser.add_argument(
        "--untimed",
        action="store_true",
        help="compare accuracy alone, with plans that no clock decides",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="first N evaluation samples")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="for calibration")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eval", type=Path, metavar="DIR", help="folder of evaluate.py")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables here as well")
    return parser.parse_args()


def main() -> int:
    """Exit code 2 if there is no evaluation kit, or no such task."""
    args = arguments()
    folder = Path(args.eval or os.environ.get("QCOMPILE_EVAL") or ROOT.parent / "shared" / "eval")
    if not (folder / "evaluate.py").exists():
        say(
            "bench_ablation.py: there is no evaluate.py: point to its folder with --eval DIR or the environment "
            "variable QCOMPILE_EVAL."
        )
        return 2
    sys.path.insert(0, str(folder.resolve()))
    kit = importlib.import_module("evaluate")
    tasks = args.tasks.split(",")
    unknown = [name for name in tasks if name not in kit.TASKS]
    if unknown:
        say(f"bench_ablation.py: {unknown[0]!r} is no task: give some of {', '.join(kit.TASKS)}.")
        return 2
    text = "\n".join(Ablation(args, kit).table(name) for name in tasks)
    print(text, end="")
    if args.out:
        args.out.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
