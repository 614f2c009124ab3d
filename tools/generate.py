"""Decodes greedily with a decoder's cache, and compares it with another one.

    python tools/generate.py MODEL.onnx --tokenizer tokenizer.json [--prompt TEXT] [--tokens 200]
        [--against FLOAT.onnx] [--text FILE] [--windows 4] [--length 512]

prints the text, tokens/s and bytes of the cache. `--against` adds the same for the other model, the first token that
differs, and, with `--text`, the perplexity of both: of windows of LENGTH tokens spread over the file, of which the
first quarter is read at once and the rest in pieces of 64, so that it comes out of the cache.

`--quantize int8|uint8|int4` makes MODEL.onnx from the float model of `--against` first, with ranges from the first
half of the text; windows for the perplexity are then taken from the second half. For example

    python tools/generate.py kv8.onnx --against model.onnx --quantize int8 --tokenizer tokenizer.json --text valid.txt
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qcompile.calib.feeds import Feed
from qcompile.decode import Decoder, compare
from qcompile.graph import io
from qcompile.graph.kv_cache import find_caches
from qcompile.kv import quantize_kv_cache
from qcompile.prepare import prepare

PROMPT = "The history of the city begins"
CALIBRATION = (8, 256)  # windows, tokens


@dataclasses.dataclass(frozen=True)
class Run:
    """One greedy decoding. `cache_bytes` is what the cache takes at its end."""

    tokens: list[int]
    seconds: float
    cache_bytes: int

    def __str__(self) -> str:
        return f"{len(self.tokens) / self.seconds:.1f} tokens/s, cache of {self.cache_bytes} bytes at the end"


def decode(decoder: Decoder, prompt: list[int], count: int) -> Run:
    """`count` tokens after the prompt; the time is that of all of them but the first, with the prompt."""
    decoder.greedy(prompt, 2)  # memory is allocated
    start = time.perf_counter()
    made = decoder.greedy(prompt, count)
    return Run(made, time.perf_counter() - start, decoder.cache_bytes)


def windows(ids: list[int], count: int, length: int) -> list[list[int]]:
    """`count` windows of `length` tokens, spread evenly over the text; fewer if it is short."""
    last = len(ids) - length
    if last < 0:
        return []
    starts = sorted({int(s) for s in np.linspace(0, last, count)})
    return [ids[start : start + length] for start in starts]


def feeds(model: Path, ids: list[int]) -> list[Feed]:
    """Calibration samples with empty caches."""
    caches, _ = find_caches(io.load(model))
    empty = {c.name: np.zeros((1, c.heads or 0, 0, c.width or 0), np.float32) for c in caches}
    count, length = CALIBRATION
    return [
        {
            "input_ids": np.array([part], np.int64), "attention_mask": np.ones((1, len(part)), np.int64),
            "position_ids": np.arange(len(part), dtype=np.int64)[None], **empty,
        }
        for part in windows(ids, count, min(length, len(ids)))
    ]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("model", type=Path)
    made.add_argument("--tokenizer", type=Path, required=True)
    made.add_argument("--prompt", default=PROMPT)
    made.add_argument("--tokens", type=int, default=200)
    made.add_argument("--against", type=Path)
    made.add_argument("--quantize", choices=("int8", "uint8", "int4"))
    made.add_argument("--text", type=Path)
    made.add_argument("--windows", type=int, default=4)
    made.add_argument("--length", type=int, default=512)
    made.add_argument("--threads", type=int, default=0)
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parser()
    args = options.parse_args(arguments)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    text = tokenizer.encode(args.text.read_text("utf-8")).ids if args.text else []
    if args.quantize:
        if not args.against or not text:
            options.error("--quantize needs --against, the float model, and --text")
        half = len(text) // 2
        model, _ = prepare(io.load(args.against))
        made, report = quantize_kv_cache(
            model, feeds(args.against, text[:half]), kind=args.quantize, threads=args.threads
        )
        io.save(made, args.model)
        text = text[half:]
        print(report)
    prompt = tokenizer.encode(args.prompt).ids
    decoder = Decoder(args.model, threads=args.threads)
    run = decode(decoder, prompt, args.tokens)
    print(tokenizer.decode(run.tokens))
    print(f"{args.model.name}: {run}")
    if args.against:
        other = Decoder(args.against, threads=args.threads)
        print(f"{args.against.name}: {decode(other, prompt, args.tokens)}")
        parts = windows(text, args.windows, args.length)
        if args.text and not parts:
            options.error(f"--text has {len(text)} tokens left, fewer than --length {args.length}")
        print(
            compare(
                other, decoder, prompt, parts, tokens=args.tokens, first=max(1, args.length // 4)
            )
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
