"""Compares weights of few bits on a language model: qcompile's recipes and ONNX Runtime's own quantizer.

    python tools/bench_llm.py MODEL.onnx --data CALIB --task wikitext2 [--windows 8] [--rows int4,rtn,...] [--eval ../shared/eval]
    python tools/bench_llm.py MODEL.onnx --data calib.txt --tokenizer tokenizer.json --max-tokens 512 [...]   # as one text

Prints perplexity on the evaluation split of the kit's task, time of one token behind a cache of 128, size, and seconds and
memory of the quantizer. Data for calibration and figures come from different texts.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_process import measured

OURS = {
    "int4": ["--recipe", "int4"],
    "int4-rtn": ["--recipe", "int4", "--algorithm", "rtn"],
    "int4-g128": ["--recipe", "int4", "--block", "128"],
    "int4-g128-rtn": ["--recipe", "int4", "--block", "128", "--algorithm", "rtn"],
    "int4-small": ["--recipe", "int4", "--block", "64", "--bits-for", "Gather=4"],
    "int4-90mb": ["--recipe", "int4", "--max-size", "90MB"],
    "int8-weights": ["--recipe", "int8-weights"],
    "int8-weights-64": ["--recipe", "int8-weights", "--block", "64", "--symmetric"],
}
_ORT = """
import sys, onnx
import onnxruntime.quantization.matmul_nbits_quantizer as q
path, place, size, algorithm, data, tokenizer, tokens = sys.argv[1:]
config = None
if algorithm == "kquant":
    config = q.KQuantWeightOnlyQuantConfig()
if algorithm == "gptq":
    from pathlib import Path
    from qcompile.calib.data import DataOptions, open_data
    from qcompile.inputs import input_specs
    from qcompile.run.session import Session
    from qcompile.graph import io
    options = DataOptions(tokenizer=Path(tokenizer), max_tokens=int(tokens), pack=True) if tokenizer else DataOptions()
    feeds = list(open_data(data, input_specs(Session(Path(path)), io.load(path, mapped=True)), options))
    feeds = iter(feeds[:: max(len(feeds) // 16, 1)][:16])
    class Reader(q.CalibrationDataReader):
        def get_next(self):
            return next(feeds, None)
    config = q.GPTQWeightOnlyQuantConfig(Reader(), block_size=int(size))
made = q.MatMulNBitsQuantizer(onnx.load(path), block_size=int(size), is_symmetric=False, accuracy_level=4, algo_config=config)
made.process()
made.model.save_model_to_file(place, False)
"""
ORT = {
    "ort-int4": ("32", "default"),
    "ort-int4-g128": ("128", "default"),
    "ort-kquant": ("32", "kquant"),
    "ort-gptq": ("32", "gptq"),
}
_SCORE = """
import json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from evaluate import TASKS, open_session
session = open_session(sys.argv[3])
value = TASKS[sys.argv[2]].evaluate(session, int(sys.argv[4])).value
print(json.dumps({"value": float(value)}))
"""
_RACE = """
import json, sys
from pathlib import Path
import numpy as np
from qcompile.run.session import Options, Session
from qcompile.verify.latency import race
sessions = {name: Session(Path(name), Options("all")) for name in sys.argv[1:]}
first = next(iter(sessions.values()))
rng = np.random.default_rng(0)
def feed(tokens, past):
    made = {}
    for info in first.native.get_inputs():
        shape = list(info.shape)
        if len(shape) == 4:
            shape = [1, shape[1], past, shape[3]]
            made[info.name] = rng.normal(size=shape).astype(np.float32)
        else:
            made[info.name] = np.ones((1, past + tokens if "mask" in info.name else tokens), np.int64)
    return made
print(json.dumps({str(t): race(sessions, feed(t, p), seconds=8.0).speedup for t, p in ((1, 128), (128, 0))}))
"""


def main() -> int:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", help="tokenizer.json, where the data is one text")
    parser.add_argument("--max-tokens", default="512", help="of its samples")
    parser.add_argument("--task", default="wikitext2", help="of the evaluation kit")
    parser.add_argument(
        "--windows", default=8, type=int, help="of text that perplexity is measured on"
    )
    parser.add_argument("--rows", default=",".join([*OURS, *ORT]))
    parser.add_argument("--eval", type=Path, default=Path("..") / "shared" / "eval")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-llm-"))
    try:
        rows = [_row(args, name, folder / f"{name}.onnx") for name in args.rows.split(",")]
        rows = [row for row in rows if row is not None]
        print(_table(args, rows, folder))
    finally:
        shutil.rmtree(folder)
    return 0


def _row(args: argparse.Namespace, name: str, path: Path) -> dict[str, Any] | None:
    if name in OURS:
        command = [
            sys.executable,
            "-m",
            "qcompile",
            str(args.model),
            "--data",
            args.data,
            "-o",
            str(path),
            "-q",
            *OURS[name],
        ]
        if args.tokenizer is not None:
            command += ["--tokenizer", args.tokenizer, "--max-tokens", args.max_tokens, "--pack"]
    else:
        reads = [args.data, args.tokenizer or "", args.max_tokens]
        command = [sys.executable, "-c", _ORT, str(args.model), str(path), *ORT[name], *reads]
    done = measured(command, limit=900)
    if not path.exists():
        print(
            f"{name}: no result: {done.why()}",
            file=sys.stderr,
        )
        return None
    size = sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))
    score = _score(args, path)
    print(f"{name}: {done.seconds:.0f} s, {score:.3f}", file=sys.stderr)
    return {
        "name": name,
        "path": path,
        "seconds": done.seconds,
        "rss": done.peak_mb,
        "mb": size / 1e6,
        "value": score,
    }


def _score(args: argparse.Namespace, path: Path) -> float:
    done = measured(
        [sys.executable, "-c", _SCORE, str(args.eval), args.task, str(path), str(args.windows)],
        limit=1800,
    )
    answer = done.json()
    if "value" not in answer:
        raise SystemExit(f"{path.name} was not scored: {done.why()}")
    return float(answer["value"])


def _table(args: argparse.Namespace, rows: list[dict[str, Any]], folder: Path) -> str:
    exact = _score(args, args.model)
    paths = [str(args.model), *(str(row["path"]) for row in rows)]
    speed = measured([sys.executable, "-c", _RACE, *paths], limit=1800).json()
    mb = sum(p.stat().st_size for p in args.model.parent.glob(f"{args.model.name}*")) / 1e6
    lines = [
        f"Perplexity on {args.windows} windows; speed-up over FP32, all models in turns in one process.", "",
        "| model | perplexity | change % | one token | prefill of 128 | MB | seconds | peak RSS MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| FP32 | {exact:.2f} |  | 1.00x | 1.00x | {mb:.0f} |  |  |",
    ]  # fmt: skip
    for row in rows:
        one, many = (speed[t][str(row["path"])] for t in ("1", "128"))
        change = 100 * (row["value"] / exact - 1)
        lines.append(
            f"| {row['name']} | {row['value']:.2f} | {change:+.1f} | {one:.2f}x | {many:.2f}x | {row['mb']:.0f} | "
            f"{row['seconds']:.0f} | {row['rss']:.0f} |"
        )
    return "\n".join(lines).replace(str(folder), "")


if __name__ == "__main__":
    sys.exit(main())
