"""The end of a compilation: the full verification, the files, the result."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.budget import pareto
from qcompile.errors import ModelError, OutputError
from qcompile.graph import io
from qcompile.graph.publish import check_apart, check_writable
from qcompile.kv_apply import apply_kv_cache, with_cache
from qcompile.kv_session import open_session, timed
from qcompile.opened import Opened
from qcompile.plan.candidates import Candidate
from qcompile.plan.plan import Form, NodePlan, Plan
from qcompile.progress import Progress
from qcompile.provenance import describe, describe_data, describe_ranges
from qcompile.report import GOOD, INACCURATE, NOT_FASTER, Result, write_report
from qcompile.run.session import Feed, Options, Session
from qcompile.search import History, timing_feeds
from qcompile.verify.compare import Comparison
from qcompile.verify.kernels import Kernels, optimized, verdicts
from qcompile.verify.latency import race, typical_feeds
from qcompile.workshop import Attempt, Workshop

_TEXT = (
    ".json",
    ".txt",
    ".pbtxt",
    ".prototxt",
    ".textproto",
    ".onnxtxt",
    ".onnxjson",
    ".toml",
    ".py",
    ".npz",
    ".npy",
)
_EXACT_SAMPLES = 4
_QUANTIZABLE = (
    "Conv",
    "MatMul",
    "Gemm",
    "ConvTranspose",
    "LSTM",
    "GRU",
    "RNN",
    "Einsum",
    "Attention",
    "Gather",
)


def output_path(
    model: Any, output: str | Path | None, inputs: Mapping[str, Path | None] | None = None,
    label: str = "int8",
) -> Path | None:  # fmt: skip
    """Where the result goes; `MODEL.label.onnx` beside the model, if nothing else is said.

    Raises:
        ModelError: there is no such model.
        OutputError: it would be one of the inputs, it is named as text, or it cannot be written.
    """
    path = Path(model) if isinstance(model, str | Path) else None
    if path is not None and not path.is_file():
        io.load(path)  # says what is wrong with it
    if output is None:
        if path is None:
            return None
        place = path.with_name(f"{path.stem}.{label}.onnx")
    else:
        place = Path(output)
    check_apart(place, {"the input": path, **(inputs or {})})
    if path is not None:
        io.check_outside(place, path)
    if place.suffix in _TEXT:
        raise OutputError(
            f"{place} is named as text, and ONNX models are not: end its name in .onnx."
        )
    check_writable(place)
    return place


def finish(
    opened: Opened, shop: Workshop, best: Attempt, history: History, place: Path | None,
    report: str | Path | None, start: float, show: Progress,
) -> Result:  # fmt: skip
    """The best attempt verified in full, written, and described."""
    kv = None
    if opened.recipe.kv_cache is not None:
        kv = apply_kv_cache(opened, best.model, best.session, show)
        best = dataclasses.replace(best, model=kv.model, session=kv.session)
    with show.stage("verifying"):
        deployed = shop.judge(best)
        exact_session = open_session(best.model, Options("off", threads=shop.recipe.threads))
        exact = shop.reference.compare(exact_session, _EXACT_SAMPLES)
        del exact_session
        graph = optimized(best.model, Options("all", threads=shop.recipe.threads))
        kernels = verdicts(graph, best.model, best.plan, shop.found)
        feeds = latency_rows(opened, best.session)
    complaint = io.check(best.model)
    if complaint and io.check(opened.original) is None:
        raise ModelError(
            f"the result is not a valid model: {complaint}. This is a defect of qcompile."
        )
    _describe(best.model, opened, shop, best)
    before = _size(opened.path, opened.original)  # if the model is gone by now, nothing is written
    if place is not None:
        with show.stage("writing"):
            io.save(best.model, place)
    after = _size(place, best.model)
    speedup = min(row["speedup"] for row in feeds)
    warnings = [*history.warnings, *_warnings(opened, shop, best, deployed, kernels)]
    code, reason = _exit_code(shop, best, deployed, kernels, speedup, opened, history)
    if reason:
        warnings.insert(0, reason)
    worst = min(feeds, key=lambda row: row["speedup"])
    result = Result(
        model=None if opened.path is None else str(opened.path), output=None if place is None else str(place),
        target=shop.target.name, recipe=shop.recipe.name, format=best.form, ranges=best.ranging.method,
        seconds=time.perf_counter() - start, peak_rss_mb=peak_rss(),
        size_mb={"before": before / 1e6, "after": after / 1e6},
        latency={"fp32_ms": worst["fp32_ms"], "result_ms": worst["result_ms"], "speedup": speedup, "feeds": feeds},
        outputs=_outputs(deployed, exact),
        kernels={"integer": kernels.integer, "float": kernels.float, "leftover_qdq": kernels.leftover_qdq,
                 "operators": dict(kernels.operators), "nodes": [dataclasses.asdict(v) for v in kernels.nodes]},
        kept_float=kept_float(shop, best.plan),
        samples={"calibration": _calibrated(opened),
                 "held_out": opened.samples.held_out_count if opened.samples else 0},
        warnings=warnings, notes=[*opened.notes, *history.notes], next_command=_next(opened, best, code),
        exit_code=code, goal_missed=_goal_missed(shop, best, deployed), plan=[dataclasses.asdict(e) for e in best.plan.nodes],
        search=_search(history),
    )  # fmt: skip
    result = with_cache(result, kv)
    if report is not None:
        write_report(Path(report), result, best.plan.to_json())
    return result


def _search(history: History) -> dict[str, Any] | None:
    """The points that were measured against limits; None without limits."""
    if history.budget is None:
        return None
    limits = {
        k: v for k, v in vars(history.budget).items() if isinstance(v, float) and math.isfinite(v)
    }
    return {
        "limits": limits, "points": [point.to_dict() for point in history.points],
        "pareto": pareto(history.points),
    }  # fmt: skip


def _calibrated(opened: Opened) -> int:
    """How many samples calibrated."""
    if opened.statistics is not None:
        return opened.statistics.samples
    return opened.samples.calibration_count if opened.samples else 0


def latency_rows(
    opened: Opened, session: Session, more: Sequence[tuple[str, Feed]] = ()
) -> list[dict[str, Any]]:
    """Times of the float model and a result on typical feeds and `more`, in turns: the `feeds` of `Result.latency`."""
    rows, seconds = [], opened.recipe.bench_seconds
    feeds = [*typical_feeds(timing_feeds(opened)), *more]
    for name, feed in feeds:
        timing = race(
            {"fp32": opened.session, "result": timed(session, feed)},
            feed,
            seconds=seconds / len(feeds),
        )
        rows.append({"feed": name, "fp32_ms": timing.ms["fp32"], "result_ms": timing.ms["result"],
                     "speedup": timing.speedup["result"], "rounds": timing.rounds})  # fmt: skip
    return rows


def _outputs(deployed: Comparison, exact: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "slices": [e.to_dict() for e in errors],
            "exact": [e.to_dict() for e in exact.outputs[name]],
        }
        for name, errors in deployed.outputs.items()
    ]


def _warnings(
    opened: Opened, shop: Workshop, best: Attempt, deployed: Comparison, kernels: Kernels
) -> list[str]:
    found = [*deployed.problems(), *deployed.remarks(shop.recipe.sqnr_goal)]
    if opened.samples is None:
        convs = len(_waiting(best))
        if convs:
            found.append(
                f"No calibration data: {convs} Conv nodes stay float. Give samples with --data to quantize them."
            )
        found.append(
            "No calibration data: errors and latency were measured on stand-in inputs, not on real ones."
        )
    elif opened.samples.shared:
        found.append(
            "Only one sample: it both calibrated and judged the result; give more with --data."
        )
    elif best.plan.quantizes:
        found += opened.few_judges()
    found += [
        f"{v.node} ({v.op}) was planned as {v.form} but ORT runs {v.kernel}: {v.why}."
        for v in kernels.missed
    ]
    goal = _goal_missed(shop, best, deployed)
    if goal is not None:
        guessed = (
            " First make sure that the guessed preprocessing is right." if opened.guessed else ""
        )
        found.append(
            f"The worst output slice has {deployed.worst_db:.1f} dB SQNR, below the goal of {goal:g} dB: "
            f"judge the result by your own metric.{guessed}"
        )
    return found


def _goal_missed(shop: Workshop, best: Attempt, deployed: Comparison) -> float | None:
    goal = shop.recipe.sqnr_goal
    asked = goal > 0 and not shop.recipe.limited and best.plan.quantizes
    return goal if asked and deployed.worst_db < goal else None


def _exit_code(
    shop: Workshop,
    best: Attempt,
    deployed: Comparison,
    kernels: Kernels,
    speedup: float,
    opened: Opened,
    history: History,
) -> tuple[int, str]:
    if history.points and history.points[-1].misses:
        misses = history.points[-1].misses
        costs = ("the size", "the latency")
        blamed = history.blame if any(not miss.startswith(costs) for miss in misses) else ""
        return INACCURATE, f"{'; '.join(misses)}. {blamed}".strip()
    if deployed.problems():
        return INACCURATE, deployed.problems()[0]
    if not best.plan.quantizes:
        return NOT_FASTER, "nothing was quantized: " + _no_reason(shop, best, opened)
    if not kernels.runs:
        return NOT_FASTER, "no integer kernel is left in the graph that ORT optimized."
    if speedup < 1.0:
        return NOT_FASTER, f"the result is not faster than the float model: {speedup:.2f}x."
    if len(kernels.missed) > len(kernels.nodes) // 20:
        return (
            NOT_FASTER,
            f"{len(kernels.missed)} of {len(kernels.nodes)} planned nodes did not become integer kernels.",
        )
    return GOOD, ""


def _no_reason(shop: Workshop, best: Attempt, opened: Opened) -> str:
    rows = kept_float(shop, best.plan)
    waiting = _waiting(best) if opened.samples is None else []
    if waiting:
        first, more = waiting[0].node, len(waiting) - 1
        who = f"Conv {first} and {more} more like it need" if more else f"Conv {first} needs"
        return f"{who} calibration data, give it with --data."
    if rows:
        return f"{rows[0]['op']} {rows[0]['node']}: {rows[0]['why']}."
    return "the model has no node with an integer kernel."


def _waiting(best: Attempt) -> list[NodePlan]:
    """The Conv nodes that are float for want of calibration data."""
    return [e for e in best.plan.of(Form.FLOAT) if e.op == "Conv" and "--data" in e.why]


def kept_float(shop: Workshop, plan: Plan) -> list[dict[str, str]]:
    """Nodes that a person would expect to be quantized, and are not."""
    rows = []
    for entry in plan.of(Form.FLOAT):
        item = shop.found.get(entry.node)
        if entry.op in _QUANTIZABLE and not (
            entry.op == "Gather" and not isinstance(item, Candidate)
        ):
            rows.append({"node": entry.node, "op": entry.op, "why": entry.why})
    return rows


def _describe(model: ir.Model, opened: Opened, shop: Workshop, best: Attempt) -> None:
    """Where the file comes from, in its metadata."""
    describe(model, shop.target.name, shop.recipe, opened.original)
    describe_data(model, opened)
    model.metadata_props["qcompile.format"] = best.form
    model.metadata_props["qcompile.ranges"] = best.ranging.method
    if best.plan.of(Form.STATIC, Form.FREE):
        describe_ranges(model, shop.parameters(best.plan, best.ranging))


def _size(path: Path | None, model: ir.Model) -> int:
    return io.file_bytes(path) if path is not None else io.weight_bytes(model)


def peak_rss() -> float:
    """The most resident memory of this process, in 10^6 bytes."""
    try:
        import resource  # noqa: PLC0415 - Windows lacks it
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _next(opened: Opened, best: Attempt, code: int) -> str:
    name = shlex.quote(str(opened.path or "MODEL.onnx"))
    if opened.samples is None and _waiting(best):
        return f"qcompile {name} --data FOLDER_OF_SAMPLES"
    data = f" --data {shlex.quote(opened.data)}" if opened.data else ""
    if code == INACCURATE:
        return f"qcompile plan {name}{data} -o plan.json   # set sensitive nodes to float there, then: qcompile {name}{data} --plan plan.json"
    return f"qcompile {name}{data} --report report/   # every node, its kernel and its reason"
