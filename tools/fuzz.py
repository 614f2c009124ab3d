"""Random models and damaged files through qcompile, for as long as one likes.

    python tools/fuzz.py --minutes 15 --seed 1 --output failures/

Models are those of `tests/fuzz_graphs.py`, files those of `tests/fuzz_files.py`. Each is tried in a process of its own
with limits of time and memory, so that a crash is counted as well. What fails is written to the output folder: the model
(and what was said of it), or the damaged file. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import onnx  # noqa: E402
from fuzz_files import KINDS, READERS, make  # noqa: E402
from fuzz_judge import WAYS, drawn_of  # noqa: E402
from sandbox import Sandbox  # noqa: E402

MODELS, FILES = 16, 50  # that share a process
MEMORY, SECONDS = 3 << 30, 120


class Run:
    """Counts, and what failed."""

    def __init__(self, box: Sandbox, whole: Path, output: Path) -> None:
        self._box, self._whole, self._output = box, whole, output
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        self.reasons: collections.Counter[str] = collections.Counter()

    def models(self, start: int, count: int) -> None:
        """Models of these seeds; one by one, if their process ended otherwise."""
        done = self._box.call("fuzz_judge:run", start, count, cwd=self._whole)
        if done.code and count > 1:
            for seed in range(start, start + count):
                self.models(seed, 1)
            return
        rows = json.loads(done.out.splitlines()[-1]) if done.code == 0 else None
        for seed, way, kind, why in rows or [
            [start, WAYS[start % len(WAYS)], "failed", _end(done)]
        ]:
            self.counts[f"models, {way}"].update(("tried", kind))
            if kind in ("refused", "odd"):
                self.reasons[why[:100]] += 1
            if kind == "failed":
                self._output.mkdir(parents=True, exist_ok=True)
                path = self._output / f"model-{seed}.onnx"
                onnx.save(drawn_of(seed).model, path)
                self._tell(path, f"seed {seed}, {way}: {why}")

    def files(self, kind: str, start: int, count: int) -> None:
        """Damaged files of these numbers, likewise."""
        done = self._box.call(
            "fuzz_files:run", str(self._whole), kind, start, count, cwd=self._whole
        )
        if done.code and count > 1:
            for number in range(start, start + count):
                self.files(kind, number, 1)
            return
        found = {"read": 0, "refused": 0, "failures": [[start, _end(done)]]}
        if done.code == 0:
            found = json.loads(done.out.splitlines()[-1])
        seen = self.counts[f"files, {kind}"]
        seen.update(
            {
                "tried": count,
                "compiled": found["read"],
                "refused": found["refused"],
                "failed": len(found["failures"]),
            }
        )
        for number, why in found["failures"]:
            self._output.mkdir(parents=True, exist_ok=True)
            path = self._output / f"{kind.replace(' ', '-')}-{number}-{READERS[kind][0]}"
            path.write_bytes(make(str(self._whole), kind, number))
            self._tell(path, why)

    def _tell(self, path: Path, why: str) -> None:
        path.with_name(f"{path.name}.txt").write_text(why)
        print(f"FAILED {path}: {why[-1500:]}", flush=True)

    def table(self) -> list[str]:
        """Counts as Markdown."""
        columns = ("tried", "compiled", "unchanged", "refused", "odd", "failed")
        lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        total: collections.Counter[str] = collections.Counter()
        for name, seen in self.counts.items():
            total.update(seen)
            lines.append(f"| {name} | " + " | ".join(str(seen[c]) for c in columns) + " |")
        lines.append("| all | " + " | ".join(str(total[c]) for c in columns) + " |")
        return lines


def _end(done: object) -> str:
    return f"the process ended: {done}"[-1500:]


def main() -> int:
    """Fuzzes; prints counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first model and file")
    parser.add_argument("--only", choices=("models", "files"))
    parser.add_argument("--output", type=Path, default=Path("fuzz-failures"))
    args = parser.parse_args()
    end, step = time.monotonic() + 60 * args.minutes, 0
    with Sandbox(memory=MEMORY, seconds=SECONDS) as box, tempfile.TemporaryDirectory() as folder:
        built = box.call("fuzz_files:build", folder, cwd=ROOT)
        assert built.code == 0, built
        run = Run(box, Path(folder), args.output)
        while time.monotonic() < end:
            first = 1_000_003 * args.seed
            if args.only != "files":
                run.models(first + step * MODELS, MODELS)
            if args.only != "models":
                kind = KINDS[step % len(KINDS)]
                run.files(
                    kind, first + step // len(KINDS) * FILES, FILES // (3 if "used" in kind else 1)
                )
            step += 1
    print("\n".join(run.table()))
    for why, count in run.reasons.most_common(12):
        print(f"{count:6} refused: {why}")
    return int(any(seen["failed"] for seen in run.counts.values()))


if __name__ == "__main__":
    sys.exit(main())
