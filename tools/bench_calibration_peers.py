"""What `bench_calibration.py` measures: one tool over one folder of samples, each time in a fresh process.

    python bench_calibration_peers.py [--threads N] [--memory BYTES] MODE WORDS...

A folder of samples holds `.npz` files, a feed each, or images, which are read as the evaluation kit reads those
of ImageNet. Every mode prints one JSON object. qcompile and the kit are imported only where a mode needs them,
since another interpreter may run this.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from bench_peers import Feed, load

INPUT = "input"  # of the model that images are for
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_SIDE = 224
_WARM = 8  # feeds
_TRIALS = 3
Answer = dict[str, Any]


def read(file: Path) -> Feed:
    """The feed in a file."""
    return load(file) if file.suffix == ".npz" else {INPUT: image(file)}


def image(file: Path) -> np.ndarray[Any, Any]:
    """The middle of an image, normalized: what the kit does, without the kit's imports, which would be timed."""
    pillow = importlib.import_module("PIL.Image")
    with pillow.open(file) as opened:
        pixels = opened.convert("RGB")
    left, top = (pixels.width - _SIDE) // 2, (pixels.height - _SIDE) // 2
    crop = np.asarray(pixels.crop((left, top, left + _SIDE, top + _SIDE)), np.float32)
    return np.ascontiguousarray(((crop / 255 - _MEAN) / _STD).transpose(2, 0, 1)[None])


def files(folder: Path) -> list[Path]:
    """The samples of a folder."""
    return sorted(folder.iterdir())


class Reader:
    """ORT's data reader: one feed at a time, then None."""

    def __init__(self, folder: Path) -> None:
        self._files = iter(files(folder))

    def get_next(self) -> Feed | None:
        """The next feed."""
        file = next(self._files, None)
        return None if file is None else read(file)


def few_cores(threads: int) -> None:
    """Lets this process have `threads` cores only: some tools use all that they see."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
    count = min(threads, os.cpu_count() or threads)
    os.cpu_count = lambda: count


def less_memory(size: int) -> None:
    """Makes allocations beyond `size` bytes fail in this process, rather than the machine."""
    resource = importlib.import_module("resource")
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def ort_with(threads: int) -> Any:
    """The module onnxruntime, in which sessions have so many threads unless they are told otherwise."""
    ort: Any = importlib.import_module("onnxruntime")

    class Settings(ort.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = threads

    ort.SessionOptions = Settings
    return ort


def _session(model: str, threads: int) -> Any:
    ort = ort_with(threads)
    return ort.InferenceSession(model, ort.SessionOptions(), providers=["CPUExecutionProvider"])


def fp32(threads: int, model: str, data: str) -> Answer:
    """Plain inference, a feed at a time."""
    session = _session(model, threads)
    count = 0
    for file in files(Path(data)):
        session.run(None, read(file))
        count += 1
    return {"samples": count}


def qcompile(threads: int, *words: str) -> Answer | None:
    """The command line of qcompile, which prints its own answer."""
    del threads
    from qcompile.cli import main as run

    code = run(words)
    if code:
        raise SystemExit(code)
    return None


def repeated(threads: int, model: str, data: str, count: str, out: str) -> Answer:
    """`calibrate_model` over the same few feeds again and again: they take no more memory if they are more."""
    del threads
    from qcompile.calibrate import calibrate_model

    held = [read(file) for file in files(Path(data))]
    feeds = [held[i % len(held)] for i in range(int(count))]
    made = calibrate_model(model, feeds, output=out, held_out=0)
    return {"samples": made.statistics.samples, "passes": made.passes}


def ort_calibration(threads: int, method: str, model: str, data: str) -> Answer:
    """ORT's calibration of the tensors that `quantize_static` would ask for."""
    ort_with(threads)
    calibrate = importlib.import_module("onnxruntime.quantization.calibrate")
    registry = importlib.import_module("onnxruntime.quantization.registry")
    kinds = sorted({*registry.QLinearOpsRegistry, *registry.QDQRegistry})
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        calibrator = calibrate.create_calibrator(
            Path(model), kinds, str(Path(folder) / "augmented.onnx"),
            calibrate_method=calibrate.CalibrationMethod[method],
        )  # fmt: skip
        calibrator.collect_data(Reader(Path(data)))
        collected = time.perf_counter()
        found = calibrator.compute_data()
    done = time.perf_counter()
    return {"collect": collected - start, "compute": done - collected, "tensors": len(found.data)}


def nncf_quantization(threads: int, model: str, data: str) -> Answer:
    """`nncf.quantize` with all samples, and how long the part took that gathers statistics (None: not known)."""
    ort_with(threads)
    nncf, onnx = importlib.import_module("nncf"), importlib.import_module("onnx")
    seconds: list[float] = []
    try:
        place = importlib.import_module("nncf.common.tensor_statistics.aggregator")
        whole = place.StatisticsAggregator.collect_statistics
    except (ImportError, AttributeError):
        pass  # another version
    else:

        def timed(*words: Any, **options: Any) -> Any:
            start = time.perf_counter()
            answer = whole(*words, **options)
            seconds.append(time.perf_counter() - start)
            return answer

        place.StatisticsAggregator.collect_statistics = timed
    samples = files(Path(data))
    nncf.quantize(onnx.load(model), nncf.Dataset(samples, read), subset_size=len(samples))
    return {"version": nncf.__version__, "statistics": sum(seconds) if seconds else None}


def memory(threads: int, model: str, data: str, rounds: str) -> Answer:
    """Gathering statistics against plain inference, in turns, on feeds that are in memory.

    The observed model is loaded anew each time, which counts; that of inference is loaded once, which does not.
    `start` is what gathering takes on one feed.
    """
    from qcompile.calib.observe import Observed, Settings, observe
    from qcompile.opened import open_model
    from qcompile.prepare import PASSES
    from qcompile.progress import Silent
    from qcompile.solve.needs import everything
    from qcompile.workshop import Workshop

    held = [read(file) for file in files(Path(data))]
    session = _session(model, threads)
    opened = open_model(Path(model), held, held_out=0)
    shop = Workshop(
        opened.prepared, opened.target, opened.facts, opened.recipe, opened.samples, opened.reference(), Silent(),
    )  # fmt: skip
    coding = shop.coding(shop.widest(opened.request()))
    needs = everything(opened.prepared, coding, opened.facts, PASSES, gram=False)
    if not needs:
        raise SystemExit("there is nothing to observe")
    settings = Settings(opened.recipe.memory)

    def infer(feeds: list[Feed]) -> float:
        start = time.perf_counter()
        for feed in feeds:
            session.run(None, feed)
        return time.perf_counter() - start

    def gather(feeds: list[Feed]) -> tuple[float, Observed]:
        start = time.perf_counter()
        found = observe(opened.prepared, needs, lambda: enumerate(feeds), opened.facts, settings)
        return time.perf_counter() - start, found

    infer(held[:_WARM])
    gather(held[:_WARM])
    start = statistics.median(gather(held[:1])[0] for _ in range(_TRIALS))
    plain, gathered = [], []
    for _ in range(int(rounds)):
        plain.append(infer(held))
        seconds, found = gather(held)
        gathered.append(seconds)
    ratios = [mine / theirs for mine, theirs in zip(gathered, plain, strict=True)]
    return {
        "fp32": statistics.median(plain), "gather": statistics.median(gathered),
        "start": start, "ratio": statistics.median(ratios), "ratios": ratios, "samples": found.samples,
        "tensors": len(found.tensors), "passes": found.passes,
    }  # fmt: skip


def ranges(threads: int, file: str) -> Answer:
    """Seconds of every range method for all tensors of a file of statistics."""
    del threads
    from qcompile.calib import store
    from qcompile.calib.ranges import GRID, METHODS

    found = store.load(Path(file))
    seconds: dict[str, float] = {}
    for name, method in METHODS.items():
        trials = []
        for _ in range(_TRIALS):
            start = time.perf_counter()
            for stats in found.tensors.values():
                method(stats, GRID)
            trials.append(time.perf_counter() - start)
        seconds[name] = statistics.median(trials)
    return {"seconds": seconds, "tensors": len(found.tensors), "samples": found.samples}


def prepare(threads: int, eval_dir: str, name: str, folder: str, limit: str) -> Answer:
    """Writes samples of the kit: images as links, under new names if more are wanted, all else as `.npz` files."""
    del threads
    kit = _kit(eval_dir)
    most, out = int(limit) or None, Path(folder)
    out.mkdir(parents=True)
    if name == "imagenet":
        images = kit.TASKS[name].items("calib")
        for i in range(most or len(images)):
            item = images[i % len(images)]
            (out / f"{i:05d}_{item.name}").symlink_to(item)
    else:
        for i, feed in enumerate(islice(_SETS.get(name, _calibration)(kit, name), most)):
            np.savez(out / f"{i:05d}.npz", **feed)  # type: ignore[arg-type]
    return {"samples": len(files(out))}


def _kit(eval_dir: str) -> Any:
    sys.path.insert(0, eval_dir)
    return importlib.import_module("evaluate")


def _calibration(kit: Any, name: str) -> Iterator[Feed]:
    yield from kit.TASKS[name].calibration()


def _sentences(kit: Any, name: str) -> Iterator[Feed]:
    """Each sentence of the pairs alone, without padding."""
    task = kit.TASKS[name]
    for pair, score in task.items("calib"):
        for sentence in pair:
            yield task.load(([sentence], score))[0]


def _empty_caches(kit: Any, name: str) -> Iterator[Feed]:
    """Feeds without past keys: as many tokens as the mask is long."""
    for feed in kit.TASKS[name.partition("-")[0]].calibration():
        if feed["input_ids"].shape == feed["attention_mask"].shape:
            yield feed


def _pages(kit: Any, name: str) -> Iterator[Feed]:
    """All pages there are: accuracy is not at stake here, and those to calibrate on are few."""
    task = kit.TASKS[name]
    for split in ("calib", "eval"):
        for item in task.items(split):
            yield task.load(item)[0]


_SETS: dict[str, Callable[[Any, str], Iterator[Feed]]] = {
    "stsb": _sentences, "books-empty": _empty_caches, "ocr_det": _pages,
}  # fmt: skip


def check(threads: int, eval_dir: str, model: str, data: str, *words: str) -> Answer:
    """The largest difference between the first feed as the kit, this bench and qcompile, told so, read it."""
    del threads
    from qcompile.opened import open_model
    from qcompile.options import parser_of, recipe_of

    file = files(Path(data))[0]
    args = parser_of("calibrate").read([model, "--data", data, *words])
    theirs = open_model(Path(model), data, recipe_of(args)).feed
    kit, own = _kit(eval_dir).TASKS["imagenet"].load(file)[0], read(file)
    if not kit.keys() == own.keys() == theirs.keys() == {INPUT}:
        raise SystemExit(f"the model's inputs are {', '.join(kit)}, not {INPUT} alone")
    return {
        "bench": float(np.abs(kit[INPUT] - own[INPUT]).max()),
        "qcompile": float(np.abs(kit[INPUT] - theirs[INPUT]).max()),
    }


MODES: dict[str, Callable[..., Answer | None]] = {
    "fp32": fp32, "qcompile": qcompile, "repeated": repeated, "ort": ort_calibration, "nncf": nncf_quantization,
    "memory": memory, "ranges": ranges, "prepare": prepare, "check": check,
}  # fmt: skip


def main() -> None:
    """Prints what the mode answers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, default=0, help="bytes; 0: no limit")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    few_cores(args.threads)
    if args.memory:
        less_memory(args.memory)
    answer = MODES[args.mode](args.threads, *args.words)
    if answer is not None:
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
