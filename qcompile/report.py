"""What a compilation found out: one dataclass, printed as a table, JSON or Markdown."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcompile.errors import OutputError
from qcompile.figure import draw_points
from qcompile.graph.publish import atomic, write_text

GOOD, WRONG_INPUT, INACCURATE, NOT_FASTER = 0, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of `compile_model`.

    Attributes:
        model, output: paths, or None for models in memory.
        target, recipe, format, ranges: what was used.
        seconds: wall time of the compilation.
        peak_rss_mb: most resident memory of the process, in 10^6 bytes.
        size_mb: `before` and `after`, with external data, in 10^6 bytes.
        latency: `fp32_ms`, `result_ms`, `speedup` on the feed that gained least, and `feeds` with all.
        outputs: per output its name and `slices`, deployed; `exact` with optimizations off.
        kernels: counts of the optimized graph (`integer`, `float`, `leftover_qdq`), and `nodes`.
        kept_float: nodes of the kinds that can be integer but stayed float, with the reason.
        plan: the plan as a JSON-able table.
        samples: `calibration`, `held_out`.
        warnings: sentences.
        notes: what was guessed, sentences.
        next_command: a command worth trying next.
        search: with limits: `limits`, the `points` that were compiled, run and timed (the last one is the
            result), and `pareto`, the indices of those that no other beats; else None.
        goal_missed: the SQNR in decibels that was aimed for and not reached; None if it was.
        kv_cache: of integer caches: `kind`, `keys` (the kind of theirs), `caches` (how many), `skipped` (name and reason),
            bytes of a token in all of them (`token_bytes`: `before`, `after`; `ratio`), `scale_bytes` once a model, `tokens`
            that the ranges are of; `perplexity` of the next token on held-out samples (`fp32`, `float_cache`: the result
            but for its caches, `result`, and `tokens` scored) or None; `greedy` decoding of `tokens` after `prompt` ones, with
            `differs`: by `fp32` and `float_cache` the first token, from 1, that is another one, or None. None: no such caches.
        exit_code: 0 good, 3 a limit missed, 4 not faster or not fused as planned.
    """

    model: str | None
    output: str | None
    target: str
    recipe: str
    format: str
    ranges: str
    seconds: float
    peak_rss_mb: float
    size_mb: dict[str, float]
    latency: dict[str, Any]
    outputs: list[dict[str, Any]]
    kernels: dict[str, Any]
    kept_float: list[dict[str, str]]
    samples: dict[str, int]
    warnings: list[str]
    notes: list[str]
    next_command: str
    exit_code: int
    goal_missed: float | None = None
    plan: list[dict[str, str]] = dataclasses.field(default_factory=list)
    search: dict[str, Any] | None = None
    kv_cache: dict[str, Any] | None = None

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)

    @property
    def worst_db(self) -> float | None:
        """The lowest SQNR of any output slice; None if all outputs are equal."""
        values = [
            s["sqnr_db"] for o in self.outputs for s in o["slices"] if s["sqnr_db"] is not None
        ]
        return min(values, default=None)

    def verdict(self) -> str:
        """One sentence: what the result is."""
        speed = self.latency.get("speedup")
        if self.exit_code == NOT_FASTER:
            return f"NOT a success: {self.warnings[0] if self.warnings else 'the result is not faster.'}"
        if self.exit_code == INACCURATE:
            missed = self.search is not None and self.search["points"][-1]["misses"]
            what = "NOT within the limits" if missed else "NOT accurate enough"
            return f"{what}: {self.warnings[0] if self.warnings else ''}"
        shown = "not timed" if speed is None else f"{speed:.2f}x as fast"
        text = f"{shown}, {sized(self.size_mb['before'], self.size_mb['after'], 1)}"
        if self.kv_cache is not None:
            text += f", caches {1 / self.kv_cache['ratio']:.1f}x smaller"
        if self.goal_missed is not None:
            text += (
                f", but {self.worst_db:.1f} dB SQNR is below the goal of {self.goal_missed:g} dB"
            )
        return text


def sized(before: float, after: float, digits: int = 2) -> str:
    """How a size has changed: `3.90x smaller`, or `1.25x larger`."""
    before, after = max(before, 1e-9), max(after, 1e-9)
    larger = f"{after / before:.2f}"
    if float(larger) > 1:
        return f"{larger}x larger"
    return f"{before / after:.{digits}f}x smaller"


def check_folder(folder: Path) -> None:
    """Nothing, if a report can be written to `folder`, which need not exist yet.

    Raises:
        OutputError: it cannot.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"the report cannot be written to {folder}: {place} is a file.")
    if not os.access(place, os.W_OK):
        raise OutputError(
            f"the report cannot be written to {folder}: check permissions, or change --report."
        )


def grouped_float(
    kept: Sequence[Mapping[str, str]], most: int = 8
) -> list[tuple[str, str, int, str]]:
    """Rows with `op`, `why` and `node` of what stayed float, by (operator, reason): count and an example, most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    example: dict[tuple[str, str], str] = {}
    for row in kept:
        key = (row["op"], row["why"])
        counts[key] += 1
        example.setdefault(key, row["node"])
    return [(op, why, n, example[op, why]) for (op, why), n in counts.most_common(most)]


_BESIDE = {"fp32": "the float model", "float_cache": "float caches"}


def cache_lines(kv: Mapping[str, Any]) -> list[str]:
    """Sentences on integer caches: see `Result.kv_cache`."""
    size, keys = kv["token_bytes"], "" if kv["keys"] == kv["kind"] else f" (keys {kv['keys']})"
    lines = [
        f"{kv['caches']} caches as {kv['kind']}{keys}: {size['before']} -> {size['after']} bytes a token ({kv['ratio']:.3f}x), "
        f"{kv['scale_bytes']} bytes of scales, ranges of {kv['tokens']} tokens"
    ]
    losses, greedy = kv["perplexity"], kv["greedy"]
    if losses is not None:
        before, after = losses["fp32"], losses["result"]
        line = f"perplexity of {losses['tokens']} held-out tokens: {before:.3f} -> {after:.3f} ({after / before - 1:+.2%})"
        if "float_cache" in losses:
            middle = losses["float_cache"]
            line += f", {middle:.3f} with float caches: the caches cost {after / middle - 1:+.2%}"
        lines.append(line)
    if greedy is not None:
        told = [
            f"{'the same as' if place is None else f'from token {place} on another than'} with {_BESIDE[name]}"
            for name, place in greedy["differs"].items()
        ]
        lines.append(f"greedy decoding of {greedy['tokens']} tokens: {', '.join(told)}")
    return lines


POINT_COLUMNS = (
    "result",
    "integer",
    "float",
    "SQNR dB",
    "lost",
    "metric",
    "ms",
    "speed-up",
    "MB",
    "limits",
)


def point_rows(search: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The points of a search as cells, a star first where a point is on the front, then `POINT_COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for i, p in enumerate(search["points"]):
        sampled = "" if p["sigma"] is None else f" ± {p['sigma']:.2g}"
        lost = f"{100 * p['drop']:.2f}%" if p["metric"] is None else f"{p['drop']:.4g}{sampled}"
        metric = "" if p["metric"] is None else f"{p['metric']:.5g}"
        rows.append(
            ("*" if i in search["pareto"] else "", p["what"], str(p["integer"]), str(p["floating"]),
             _db(p["sqnr_db"]), lost, metric, f"{p['latency_ms']:.2f}", f"{p['speedup']:.2f}x",
             f"{p['size_mb']:.2f}", "missed" if p["misses"] else "kept")
        )  # fmt: skip
    return rows


def to_markdown(result: Result) -> str:
    """The report as a document."""
    source = "a model in memory" if result.model is None else f"`{result.model}`"
    size = result.size_mb
    lines = [
        f"# {Path(result.output).name if result.output else 'result'}: {result.verdict()}", "",
        f"Compiled from {source} for `{result.target}`, recipe `{result.recipe}`, format `{result.format}`, "
        f"ranges `{result.ranges}`, in {result.seconds:.1f} s and {result.peak_rss_mb:.0f} MB; "
        f"{result.samples['calibration']} calibration and {result.samples['held_out']} held-out samples.", "",
        *_head("", "FP32", "result", ""),
        _row("size, MB", f"{size['before']:.2f}", f"{size['after']:.2f}", sized(size["before"], size["after"])),
    ]  # fmt: skip
    lines += [
        _row(
            f"latency, ms ({row['feed']})", f"{row['fp32_ms']:.2f}", f"{row['result_ms']:.2f}",
            f"{row['speedup']:.2f}x",
        )
        for row in result.latency["feeds"]
    ]  # fmt: skip
    lines += [
        "",
        "## Error of the outputs on held-out samples (the first of them also chose between variants)",
        "",
    ]
    lines += _head("output", "slice", "SQNR dB", "cosine", "agreement", "exact SQNR dB")
    for output in result.outputs:
        exact = {part["slice"]: part["sqnr_db"] for part in output["exact"]}
        for part in output["slices"]:
            name, same = part["slice"], part["agreement"]
            before = _db(exact[name]) if name in exact else ""
            agreement = "" if same is None else f"{same:.2%}"
            figures = (_db(part["sqnr_db"]), f"{part['cosine']:.5f}", agreement, before)
            lines.append(_row(output["name"], name, *figures))
    if result.kv_cache is not None:
        lines += ["", "## Caches of keys and values", ""]
        lines += [f"- {line}" for line in cache_lines(result.kv_cache)]
    if result.search is not None:
        lines += [
            "",
            "## What was measured",
            "",
            "Rows with a star: nothing else measured is better in all columns.",
            "",
        ]
        lines += _head("", *POINT_COLUMNS)
        lines += [_row(*row) for row in point_rows(result.search)]
        lines += ["", "![trade-off](pareto.png)"]
    kernels = result.kernels
    lines += ["", "## Kernels", ""]
    lines += [
        f"{kernels['integer']} nodes on integer kernels, {kernels['float']} float Conv/MatMul-like nodes, "
        f"{kernels['leftover_qdq']} QuantizeLinear/DequantizeLinear left.", "",
        *_head("node", "op", "planned", "ORT runs", "verdict"),
    ]  # fmt: skip
    lines += [
        _row(v["node"], v["op"], v["form"], v["kernel"], f"{v['verdict']} {v['why']}".strip())
        for v in kernels["nodes"]
    ]
    lines += ["", "## Left float", "", *_head("op", "reason", "nodes", "for example")]
    lines += [
        _row(op, why, str(count), node)
        for op, why, count, node in grouped_float(result.kept_float, 1000)
    ]
    for title, sentences in (("Warnings", result.warnings), ("Notes", result.notes)):
        if sentences:
            lines += ["", f"## {title}", "", *(f"- {sentence}" for sentence in sentences)]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|" + "---|" * len(cells)]


def _db(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def write_report(folder: Path, result: Result, plan: str | None = None) -> None:
    """`report.json` and `report.md`, `plan.json` if it is given, and `pareto.png` if there was a search.

    Raises:
        OutputError: the folder cannot be written.
    """
    texts = {"report.json": result.to_json(), "report.md": to_markdown(result)}
    if plan is not None:
        texts["plan.json"] = plan
    model = f" The model is whole: {result.output}." if result.output else ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_text(folder / name, text)
        if result.search is not None:
            with atomic(folder / "pareto.png") as picture:
                draw_points(result.search, picture)
    except OSError as error:
        raise OutputError(
            f"the report could not be written to {folder}: {error.strerror}.{model}"
        ) from error
    except OutputError as error:
        raise OutputError(f"{error}{model}") from error
