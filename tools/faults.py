"""Ends compilations at random moments, and looks at what is left.

    PYTHONPATH=. python tools/faults.py [--rounds 100] [--seed 0] [--cases int8,int4] [--signals KILL,INT,TERM]

Each round runs one command, in some an old result stands in its place, and sends it a signal: in every second round of a case at a
moment drawn evenly from the time that an undisturbed run takes, in the others within `LATE` seconds after it has begun to
write, where files move to their places. Then every file under a final name must be the old one or one that is whole,
no model may stand beside the data of another, and after SIGINT and SIGTERM nothing else may be left, one line be
printed, and the exit code be 128 and the signal. After SIGKILL a folder `.*.qcompile-part` may be left, which the next run
must remove, and files in the folder for temporary files. Prints counts, and a line for each breach.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "models" / "digits_cnn"
# As the console script; a data file stands for more than 1.9 GB.
_START = "from qcompile.__main__ import entry; entry()"
_PAIR = f"from qcompile.graph import io; io.EXTERNAL_BYTES = 1000; {_START}"
ORT_FILE = (
    ".ses"  # ONNX Runtime 1.32 writes a file of this name into the folder for temporary files
)
LATE = 0.03  # seconds in which small results are written
_EARLY = 0.35  # seconds in which Python itself may still be starting


@dataclasses.dataclass(frozen=True)
class Case:
    """A command, what runs it, and the files that it makes."""

    words: tuple[str, ...]
    made: tuple[str, ...]
    start: str = _START


_STATIC = ("m.onnx", "--data", "d.npz", "-q")
_REPORT = ("report/report.json", "report/report.md", "report/plan.json")
CASES = {
    "int8": Case(_STATIC, ("m.int8.onnx",)),
    "int8, data file": Case(_STATIC, ("m.int8.onnx", "m.int8.onnx.data"), _PAIR),
    "int4": Case(("l.onnx", "--recipe", "int4", "-q"), ("l.int4.onnx",)),
    "int4, large": Case(
        ("l.onnx", "--recipe", "int4", "-q"), ("l.int4.onnx", "l.int4.onnx.data"), _PAIR
    ),
    "calibrate": Case(("calibrate", *_STATIC), ("m.stats",)),
    "report": Case((*_STATIC, "--report", "report"), ("m.int8.onnx", *_REPORT)),
    "plan": Case(("plan", *_STATIC, "-o", "p.json"), ("p.json",)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a command: exit code (negative: the signal that ended it), stderr, seconds it ran."""

    code: int
    err: str
    seconds: float


def inputs(folder: Path) -> None:
    """`m.onnx`, a network of convolutions, with data `d.npz`; `l.onnx`, products alone."""
    folder.mkdir()
    shutil.copy(f"{DIGITS}.onnx", folder / "m.onnx")
    shutil.copy(f"{DIGITS}.calib.npz", folder / "d.npz")
    rng, width, layers = np.random.default_rng(0), 256, 12
    nodes, weights, value = [], [], "x"
    for i in range(layers):
        weight = rng.normal(0, width**-0.5, (width, width)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        name = "y" if i == layers - 1 else f"h{i}"
        nodes.append(helper.make_node("MatMul", [value, f"w{i}"], [name], f"/layer{i}/MatMul"))
        value = name
    ends = [helper.make_tensor_value_info(name, 1, ["N", width]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "l", ends[:1], ends[1:], weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        folder / "l.onnx",
    )


def run(
    case: Case, folder: Path, temp: Path, sent: int | None = None, after: float = 0.0,
    late: float | None = None,
) -> Outcome:  # fmt: skip
    """The command in `folder`; `sent` goes to it after so many seconds, if it still runs.

    With `late` it goes so many seconds after the command has begun to write, which a folder of parts shows.
    """
    temp.mkdir(exist_ok=True)
    env = {
        **os.environ, "TMPDIR": str(temp), "QCOMPILE_CACHE": str(folder.parent / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", case.start, *case.words], cwd=folder, env=env, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    if late is not None:
        while process.poll() is None and not any(folder.rglob("*.qcompile-part")):
            time.sleep(0.0002)
        after = late
    try:
        _, err = process.communicate(timeout=after if sent is not None else 600)
    except subprocess.TimeoutExpired:
        process.send_signal(sent or signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    return Outcome(process.returncode, err, time.perf_counter() - start)


def breaches(
    case: Case, folder: Path, temp: Path, whole: dict[str, bytes], old: dict[str, bytes],
    outcome: Outcome, sent: int,
) -> list[str]:  # fmt: skip
    """Sentences on what must not be."""
    found = []
    for name in case.made:
        path = folder / name
        if not path.exists():
            continue
        data = path.read_bytes()
        if data != old.get(name) and not _is_whole(path, data, whole[name]):
            found.append(f"{name} is neither old nor whole ({len(data)} bytes)")
    found += _mixed(case, folder, old)
    known = {"m.onnx", "d.npz", "l.onnx", "report", *case.made}
    left = [p.relative_to(folder).as_posix() for p in folder.rglob("*")]
    left = [name for name in left if name not in known]
    if sent == signal.SIGKILL:
        return found + [f"{name} is left" for name in left if ".qcompile-part" not in name]
    found += [f"{name} is left" for name in left]
    found += [
        f"{p.name} is left in the folder for temporary files"
        for p in temp.rglob("*")
        if p.name != ORT_FILE
    ]
    if outcome.code in (128 + sent, 0, 4) or outcome.seconds < _EARLY:
        lines = outcome.err.splitlines()
        if outcome.code == 128 + sent and lines != ["qcompile: interrupted."]:
            found.append(f"stderr is {outcome.err!r}")
    else:
        found.append(f"exit code {outcome.code}, stderr {outcome.err!r}")
    return found


def _is_whole(path: Path, data: bytes, whole: bytes) -> bool:
    """Whether a file is what an undisturbed run makes, or, where times decide or stand in it, as good."""
    if data == whole:
        return True
    try:
        if path.suffix == ".onnx":
            onnx.checker.check_model(str(path))
        elif path.suffix == ".json":
            json.loads(data)
        elif path.suffix == ".md":
            return data.startswith(b"#") and data.endswith(b"\n")
        else:  # of a data file the checker of its model looks at the bounds
            return path.suffix == ".data"
    except (onnx.checker.ValidationError, ValueError):
        return False
    return True


def _mixed(case: Case, folder: Path, old: dict[str, bytes]) -> list[str]:
    """A model must stand beside its own data, if it has any."""
    model = next((name for name in case.made if name.endswith(".onnx")), None)
    if model is None or f"{model}.data" not in case.made or not (folder / model).exists():
        return []
    data = folder / f"{model}.data"
    if not data.exists():
        return [f"{model} has lost its data"]
    old_ones = [(folder / f).read_bytes() == old.get(f) for f in (model, data.name)]
    return [] if len(set(old_ones)) == 1 else [f"{model} stands beside the data of another"]


def main() -> int:
    """Prints the counts; 1 if there was a breach."""
    parser = argparse.ArgumentParser(description="End compilations at random moments.")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", default="", help=f"of {', '.join(CASES)} separated by ';'")
    parser.add_argument("--signals", default="KILL,INT,TERM")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    chosen = args.cases.split(";") if args.cases else list(CASES)
    signals = [int(getattr(signal, f"SIG{name}")) for name in args.signals.split(",")]
    counts: Counter[tuple[str, str, str]] = Counter()
    bad: list[str] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as base:
        root = Path(base)
        whole: dict[str, dict[str, bytes]] = {}
        seconds: dict[str, float] = {}
        for name in chosen:
            case = CASES[name]
            for number in range(2):  # the first one measures kernels
                folder = root / f"{name}{number}"
                inputs(folder)
                done = run(case, folder, root / "temp")
                assert done.code in (0, 3, 4), done
            whole[name] = {file: (folder / file).read_bytes() for file in case.made}
            seconds[name] = done.seconds
            print(f"{name}: {done.seconds:.1f} s undisturbed", flush=True)
        for number in range(args.rounds):
            name, sent = chosen[number % len(chosen)], signals[number // len(chosen) % len(signals)]
            case, folder, temp = CASES[name], root / f"round{number}", root / f"temp{number}"
            inputs(folder)
            old = {}
            if rng.random() < 0.5:
                for file in case.made:
                    (folder / file).parent.mkdir(exist_ok=True)
                    old[file] = f"old {file}".encode()
                    if file == "m.stats":  # what holds no statistics is refused
                        old[file] = whole[name][file]
                    (folder / file).write_bytes(old[file])
            after, late = rng.uniform(0, seconds[name] * 1.02), rng.uniform(0, LATE)
            in_time = number // len(chosen) // len(signals) % 2 == 0
            done = run(case, folder, temp, sent, after, None if in_time else late)
            found = breaches(case, folder, temp, whole[name], old, done, sent)
            parts = list(folder.rglob("*.qcompile-part"))
            if parts:
                again = run(case, folder, temp)
                found += [
                    f"{p.name} is left after the next run, code {again.code}"
                    for p in parts
                    if p.exists()
                ]
            title = signal.Signals(sent).name
            ended = "ended" if done.code not in (0, 4) else "finished before"
            counts[name, title, ended] += 1
            if done.code not in (0, 4):
                states = ["absent" if not (folder / f).exists() else "old"
                          if (folder / f).read_bytes() == old.get(f) else "new" for f in case.made]  # fmt: skip
                counts[name, title, "files " + "/".join(dict.fromkeys(states))] += 1
            if parts:
                counts[name, title, "part folders, swept by the next run"] += 1
            bad += [f"round {number}: {name}, {title}: {sentence}" for sentence in found]
            if found:
                print(bad[-1], flush=True)
            shutil.rmtree(folder)
            shutil.rmtree(temp, ignore_errors=True)
    for (name, title, what), count in sorted(counts.items()):
        print(f"{name:<18}{title:<9}{what:<36}{count:5}")
    print("\n".join(bad))
    print(f"{args.rounds} rounds, {len(bad)} breaches")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
