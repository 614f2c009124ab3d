"""Times the rounding of large models from file to file, with the anonymous memory that it takes.

    PYTHONPATH=. python tools/bench_large.py [--cases 3GiB,7B] [--folder DIR] [--peer SECONDS] [--json FILE]

    3GiB   48 products of float32 (4096, 4096), random, in one file of data: 8 bits a channel, and 4 bits in blocks of 32
    7B     all matrices of a Llama of 6.7e9 parameters, float32, zeros in a sparse file: 4 bits in blocks of 32

Each run is a process of its own. `cpu` are the seconds of all its threads: on a machine that others use, wall time is
the lesser figure. With `--peer` ONNX Runtime's MatMulNBitsQuantizer does the same, for so many seconds at most; it
writes 4 bits symmetric in blocks of 32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_process import measured
from make_llama import SIZES, make_chain, make_llama

_OURS = """
import json, os, sys
from pathlib import Path
from qcompile.stream import StreamSettings, quantize_large
source, out, bits, block = sys.argv[1:]
made = quantize_large(Path(source), Path(out), StreamSettings(int(bits), int(block)))
used = os.times()
worst = max(line.error for line in made.quantized)
print(json.dumps({"seconds": made.seconds, "cpu": used[0] + used[1], "peak": made.peak, "growth": made.growth,
                  "before": made.before, "after": made.after, "error": worst, "checks": len(made.checks)}))
"""
_PEER = """
import json, os, sys, time
from qcompile.resident import Peak
import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
source, out, bits, block = sys.argv[1:]
start = time.perf_counter()
with Peak() as peak:
    made = MatMulNBitsQuantizer(onnx.load(source), bits=int(bits), block_size=int(block), is_symmetric=True)
    made.process()
    made.model.save_model_to_file(out, True)
used = os.times()
print(json.dumps({"seconds": time.perf_counter() - start, "cpu": used[0] + used[1], "peak": peak.most,
                  "growth": peak.most - peak.start}))
"""
CASES = {"3GiB": ((8, 0), (4, 32)), "7B": ((4, 32),)}
_DISK = {"3GiB": 6 << 30, "7B": 6 << 30}  # weights and results, with some room
_LIMIT = 600.0


def run(code: str, source: Path, bits: int, block: int, limit: float) -> dict[str, Any]:
    """What the process printed, or why it did not."""
    out = source.with_name("out") / "out.onnx"
    out.parent.mkdir()
    try:
        words = [sys.executable, "-c", code, str(source), str(out), str(bits), str(block)]
        done = measured(words, limit=limit)
        return done.json() if done.code == 0 else {"failed": done.why()}
    finally:
        shutil.rmtree(out.parent)


def case(name: str, folder: Path, peer: float) -> list[dict[str, Any]]:
    """The lines of a case."""
    source, lines = folder / f"{name}.onnx", []
    if name == "7B":
        make_llama(source, SIZES[name])
    else:
        make_chain(source, 48, 4096)
    for bits, block in CASES[name]:
        lines.append(
            {"case": name, "by": "qcompile", "bits": bits, "block": block}
            | run(_OURS, source, bits, block, _LIMIT)
        )
        show(lines[-1])
    if peer:
        lines.append(
            {"case": name, "by": "onnxruntime", "bits": 4, "block": 32}
            | run(_PEER, source, 4, 32, peer)
        )
        show(lines[-1])
    for file in folder.iterdir():
        file.unlink()
    return lines


def show(line: dict[str, Any]) -> None:
    """One line of the table."""
    what = f"{line['case']:<6}{line['by']:<12}{line['bits']} bits, block {line['block']:<4}"
    if "failed" in line:
        print(f"{what}{line['failed']}", flush=True)
        return
    memory = [f"{line[key] / 2**30:5.2f}" for key in ("peak", "growth")]
    print(
        f"{what}{line['seconds']:6.1f} s {line['cpu']:6.1f} cpu   anonymous {memory[0]} GiB, grown by {memory[1]}"
        + (f"   {line['before'] / 2**30:.2f} -> {line['after'] / 2**30:.2f} GiB" if "after" in line else ""),
        flush=True,
    )  # fmt: skip


def main() -> None:
    """Runs the cases of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--folder", type=Path, help="where models are made; a temporary one")
    parser.add_argument("--peer", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for name in args.cases.split(","):
        with tempfile.TemporaryDirectory(prefix="bench-large-", dir=args.folder) as folder:
            free = shutil.disk_usage(folder).free
            if free < _DISK[name]:
                print(
                    f"{name:<6}left out: {free / 2**30:.1f} GiB are free, {_DISK[name] >> 30} needed"
                )
                continue
            lines += case(name, Path(folder), args.peer)
    if args.json:
        args.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
