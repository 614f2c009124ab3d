"""Models too large to be run here: weights rounded to nearest from file to file, single layers checked."""

from __future__ import annotations

import os
import time
from pathlib import Path

from qcompile.errors import RecipeError
from qcompile.fewbits.forms import form_of
from qcompile.finish import peak_rss
from qcompile.graph import io
from qcompile.progress import Progress
from qcompile.provenance import origin, put
from qcompile.recipe import Recipe
from qcompile.report import GOOD, Result, write_report
from qcompile.stream import StreamReport, StreamSettings, quantize_large


def is_large(model: str | Path) -> bool:
    """Whether a model has more bytes of weights than one file can hold.

    Raises:
        ModelError: it cannot be read.
    """
    return io.weight_bytes(io.load(model, mapped=True)) > io.EXTERNAL_BYTES


def compile_large(
    model: Path, place: Path, recipe: Recipe, report: str | Path | None, start: float, show: Progress,
    *, data: bool,
) -> Result:  # fmt: skip
    """The model with weights of `recipe.bits`, written and described; it is neither run nor timed.

    Raises:
        ModelError, OutputError: as `quantize_large`.
        RecipeError: a pattern matches nothing, or an option needs data.
    """
    assert recipe.bits is not None
    if recipe.kv_cache is not None:
        raise RecipeError(
            f"{model} has more than {io.EXTERNAL_BYTES / 1e9:.1f} GB and is not run here, and --kv-cache takes its "
            "scales from runs: leave it out."
        )
    if form_of(recipe) == "portable":
        raise RecipeError(
            f"{model} has more than {io.EXTERNAL_BYTES / 1e9:.1f} GB and is rounded file to file, for operators of ONNX Runtime: "
            "leave out --format qdq."
        )
    if recipe.shares_bits:
        raise RecipeError(
            f"{model} has more than {io.EXTERNAL_BYTES / 1e9:.1f} GB and is rounded file to file, with the same bits for all: "
            "leave bits_per_weight and max_size out, or name matrices with bits_for."
        )
    if recipe.algorithm not in ("auto", "rtn", "search"):
        raise RecipeError(
            f"{model} has more than {io.EXTERNAL_BYTES / 1e9:.1f} GB and is rounded file to file: "
            f"algorithm {recipe.algorithm!r} is not one of auto, rtn and search."
        )
    wishes = [wish.rpartition("=") for wish in recipe.bits_for]
    settings = StreamSettings(
        bits=recipe.bits, block=recipe.usual_block, symmetric=recipe.symmetric, search=recipe.algorithm == "search",
        keep_float=recipe.keep_float, bits_for=tuple((pattern, int(bits)) for pattern, _, bits in wishes),
        accuracy_level=recipe.accuracy_level, threads=recipe.threads or os.cpu_count() or 1,
    )  # fmt: skip
    told = origin("any", recipe, io.load(model, mapped=True))
    found = quantize_large(model, place, settings, show, lambda made: put(made, told))
    result = _result(model, place, recipe, found, start, data=data)
    if report is not None:
        write_report(Path(report), result)
    return result


def _result(
    model: Path, place: Path, recipe: Recipe, found: StreamReport, start: float, *, data: bool
) -> Result:
    done = found.quantized
    worst = max((line.error or 0.0 for line in done), default=0.0)
    warnings = [
        "The model is too large to be run here: it was neither compared as a whole nor timed."
    ]
    if data:
        warnings.append(
            "The data was not used: weights of so large a model are rounded by themselves."
        )
    notes = [
        f"{len(done)} matrices rounded to nearest; the largest relative error of a weight is {worst:.3f}.",
        f"{len(found.checks)} layers of the result were run beside the float ones.",
    ]
    if found.peak is not None:
        notes.append(f"Peak anonymous memory {found.peak / 1e6:.0f} MB.")
    plan = [
        {"node": node, "op": "", "form": "weight", "weight": f"uint{line.bits}.axis1/{line.block or 'row'}", "why": "rtn"}
        for line in done for node in line.nodes
    ]  # fmt: skip
    left = [line for line in found.weights if line.bits is None]
    return Result(
        model=str(model), output=str(place), target="any", recipe=recipe.name, format="nbits", ranges="none",
        seconds=time.perf_counter() - start, peak_rss_mb=peak_rss(),
        size_mb={"before": found.before / 1e6, "after": found.after / 1e6},
        latency={"fp32_ms": None, "result_ms": None, "speedup": None, "feeds": []}, outputs=[],
        kernels={"integer": len(plan), "float": len(left), "leftover_qdq": 0, "operators": {}, "nodes": []},
        kept_float=[{"node": ", ".join(line.nodes), "op": "", "why": line.reason or ""} for line in left],
        samples={"calibration": 0, "held_out": 0}, warnings=warnings, notes=notes,
        next_command=f"qcompile inspect {place}", exit_code=GOOD, plan=plan,
    )  # fmt: skip
