"""The benchmark's results as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HEAD = (
    "task", "tool", "metric", "change ± σ", "SQNR dB", "agreement %", "speed-up", "MB", "seconds", "peak RSS MB",
)  # fmt: skip
_LOWER_IS_BETTER = ("CER", "perplexity")
_CONTROL = "fp32 again"
_QUIET = 0.05  # the control may differ from 1 by this much


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    lines = [*_heading(report), "", *_table(report)]
    notes = [*_recipes(report), *_skipped(report), *_noise(report)]
    return "\n".join([*lines, "", *notes]) + "\n"


def _heading(report: Mapping[str, Any]) -> Iterator[str]:
    machine = report["machine"]
    yield (
        f"{machine['cpu']}, {report['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + (f"; the first {report['limit']} samples of each task" if report["limit"] else "")
        + "."
    )
    yield ""
    yield (
        "Change: quantized minus FP32, ± its paired bootstrap noise. Speed-up: median of FP32 time over the "
        "model's, all models of a task in turns in one process. Seconds and peak memory are those of the "
        "tool's process, calibration included. ↓: lower is better."
    )


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    yield "| " + " | ".join(HEAD) + " |"
    yield "|" + "|".join("---" if i < 2 else "---:" for i in range(len(HEAD))) + "|"
    for name, task in report["tasks"].items():
        for row in task["rows"]:
            yield "| " + " | ".join(_cells(name, row)) + " |"


def _cells(task: str, row: Mapping[str, Any]) -> list[str]:
    cost = [f"{row['seconds']:.1f}", f"{row['peak_rss_mb']:.0f}"] if "seconds" in row else ["", ""]
    if row.get("why"):
        return [task, row["tool"], str(row["why"]).replace("|", "\\|"), "", "", "", "", "", *cost]
    metric = row["name"] + (" ↓" if row["name"].startswith(_LOWER_IS_BETTER) else "")
    return [
        task, row["tool"], f"{row['value']:.2f} {metric}",
        f"{row['change']:+.2f} ± {row['change_sigma']:.2f}" if "change" in row else "",
        _decibels(row), "" if row.get("agreement %") is None else f"{row['agreement %']:.2f}",
        _speeds(row), f"{row['mb']:.2f}", *cost,
    ]  # fmt: skip


def _decibels(row: Mapping[str, Any]) -> str:
    if "sqnr_db" not in row:
        return ""
    return "equal" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"


def _speeds(row: Mapping[str, Any]) -> str:
    feeds: Mapping[str, Any] = row.get("latency", {})
    if row["tool"] == "FP32":
        return ", ".join(f"{times['ms']:.2f} ms ({feed})" for feed, times in feeds.items())
    shown = [f"{times['speedup']:.2f}x" for times in feeds.values()]
    return (
        ", ".join(shown)
        if len(shown) < 2
        else ", ".join(f"{speed} ({feed})" for speed, feed in zip(shown, feeds, strict=True))
    )


def _recipes(report: Mapping[str, Any]) -> Iterator[str]:
    """What each tool was told, where it says so: once for each distinct note."""
    told: dict[tuple[str, str], list[str]] = {}
    for name, task in report["tasks"].items():
        for row in task["rows"]:
            if row.get("note"):
                told.setdefault((row["tool"], row["note"]), []).append(name)
    for (tool, note), tasks in told.items():
        yield f"* {tool}, {', '.join(tasks)}: {note}."


def _skipped(report: Mapping[str, Any]) -> Iterator[str]:
    for tool, why in report["skipped"].items():
        yield f"* {tool}: skipped, {why}."


def _noise(report: Mapping[str, Any]) -> Iterator[str]:
    """The control: the FP32 model against itself."""
    off: list[str] = []
    controls: Sequence[tuple[str, float]] = [
        (f"{name}, {feed}", times[_CONTROL]["speedup"])
        for name, task in report["tasks"].items()
        for feed, times in task.get("latency", {}).items()
        if _CONTROL in times
    ]
    if not controls:
        return
    values = [speed for _, speed in controls]
    off = [f"{where}: {speed:.2f}" for where, speed in controls if abs(speed - 1) > _QUIET]
    text = f"* Control: FP32 against itself gave {min(values):.2f} to {max(values):.2f}."
    yield text + (f" Not to be trusted: {'; '.join(off)}." if off else "")
