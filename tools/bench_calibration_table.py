"""The results of `bench_calibration.py` as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def markdown(report: Row) -> str:
    """The whole report."""
    lines = list(_heading(report))
    for name, found in report["tables"].items():
        lines += ["", *_TABLES[name](found)]
    if report["skipped"]:
        lines += ["", *(f"* {what}: skipped, {why}." for what, why in report["skipped"].items())]
    return "\n".join(lines) + "\n"


def _heading(report: Row) -> Iterator[str]:
    machine = report["machine"]
    yield (
        f"{machine['cpu']}, {report['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + ("; few samples, to try the bench itself" if report["quick"] else "")
        + "."
    )
    yield ""
    yield (
        f"Seconds and peak memory are those of whole processes. FP32 and qcompile ran in {report['repeat']} "
        "turns: medians of their seconds, and of the ratio within a turn; all others ran once. In memory: feeds "
        "that were read before, gathering (which loads the model that it observes) against `session.run` alone."
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a table, whose first column is text, and that of remarks."""
    yield "| " + " | ".join(head) + " |"
    yield (
        "|"
        + "|".join("---" if i == 0 or name == "remark" else "---:" for i, name in enumerate(head))
        + "|"
    )
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _number(row: Row, key: str, form: str) -> str:
    return "" if row.get(key) is None else format(row[key], form)


def _compared(rows: Iterable[Row]) -> Iterator[str]:
    """Tools side by side."""
    head = ("tool", "seconds", "ratio to FP32", "peak RSS MB", "remark")
    cells = [
        [
            row["tool"], _number(row, "seconds", ".2f"), "" if row.get("why") else _number(row, "ratio", ".2f"),
            _number(row, "peak_rss_mb", ".0f"), row.get("why") or _remark(row),
        ]
        for row in rows
    ]  # fmt: skip
    yield from table(head, cells)


def _remark(row: Row) -> str:
    """What else is known of a run."""
    said = []
    if "collect" in row:
        said.append(f"collecting {row['collect']:.2f} s, computing {row['compute']:.2f} s")
    if "methods" in row:
        bad = len(row["not_finite"])
        finite = "all finite" if not bad else f"{bad} tensors not finite"
        said.append(f"ranges by {len(row['methods'])} methods, {finite}")
    if row.get("tensors"):
        said.append(f"{row['tensors']} tensors")
    if row.get("passes"):
        said.append(f"{row['passes']} pass{'es' if row['passes'] > 1 else ''}")
    if row["tool"].startswith("NNCF"):
        known = row.get("statistics")
        part = "" if known is None else f"gathering statistics took {known:.2f} s of it"
        said += ["the whole of `nncf.quantize`", *filter(None, [part])]
        said += filter(None, [f"version {row['version']}" if "version" in row else ""])
    return "; ".join(said)


def _in_memory(found: Row) -> str:
    if found.get("why"):
        return f"In memory: {found['why']}."
    low, high = min(found["ratios"]), max(found["ratios"])
    return (
        f"In memory: FP32 {found['fp32']:.2f} s, gathering {found['gather']:.2f} s, of which {found['start']:.2f} s for "
        f"loading and the first feed; ratio {found['ratio']:.2f} ({low:.2f} to {high:.2f})."
    )


def _images(found: Row) -> Iterator[str]:
    yield f"## A. mobilenet_v2, {found['samples']} image files"
    yield ""
    yield from _compared(found["rows"])
    yield ""
    yield _in_memory(found["memory"])
    yield (
        "The tools read the same numbers from an image, but for "
        f"{max(found['difference'].values()):.1e} of rounding."
    )


def _growth(found: Row) -> Iterator[str]:
    yield "## B. Peak memory of `qcompile calibrate`"
    yield ""
    head = ("model", "samples", "peak RSS MB", "growth %", "seconds", "remark")
    cells = [
        [
            row["tool"], str(row["samples"]), f"{row['peak_rss_mb']:.1f}", f"{row['growth']:+.1f}",
            f"{row['seconds']:.1f}", row.get("why", ""),
        ]
        for row in found["rows"]
    ]  # fmt: skip
    yield from table(head, cells)


def _sentences(found: Row) -> Iterator[str]:
    yield f"## C. all-MiniLM-L6-v2, {found['samples']} sentences, each of its own length"
    yield ""
    yield from _compared(found["rows"])
    yield ""
    yield _in_memory(found["memory"])


def _cases(found: Row) -> Iterator[str]:
    yield "## D. Caches, states, and inputs of different sizes"
    yield ""
    head = (
        "model", "samples", "tensors", "passes", "FP32 s", "qcompile s", "ratio", "in memory", "FP32 MB", "qcompile MB",
        "ORT MinMax", "ORT Percentile",
    )  # fmt: skip
    yield from table(head, map(_case, found["cases"]))
    yield ""
    yield "In memory: the ratio, and in parentheses what loading and the first feed take of all gathering."


def _case(case: Row) -> list[str]:
    plain, mine, *others = case["rows"]
    memory = case["memory"]
    seconds = [row.get("why") or _number(row, "seconds", ".2f") for row in (plain, mine)]
    return [
        case["title"], str(case["samples"]), _number(mine, "tensors", "d"), _number(mine, "passes", "d"), *seconds,
        "" if mine.get("why") else _number(mine, "ratio", ".2f"),
        memory.get("why") or f"{memory['ratio']:.2f} ({memory['start']:.2f} of {memory['gather']:.2f} s)",
        *(_number(row, "peak_rss_mb", ".0f") for row in (plain, mine)),
        *(row.get("why") or f"{row['seconds']:.2f} s, {row['peak_rss_mb']:.0f} MB" for row in others),
    ]  # fmt: skip


def _methods(found: Row) -> Iterator[str]:
    yield f"## E. Ranges of all tensors of mobilenet_v2, from statistics of {found['samples']} images"
    yield ""
    rows = [
        [f"qcompile {name}", str(found["tensors"]), f"{seconds:.3f}"]
        for name, seconds in found["seconds"].items()
    ]
    rows += [
        [
            f"{row['tool']}, `compute_data`",
            _number(row, "tensors", "d"),
            row.get("why") or _number(row, "compute", ".3f"),
        ]
        for row in found["ort"]
    ]
    yield from table(("method", "tensors", "seconds"), rows)


_TABLES: dict[str, Callable[[Row], Iterator[str]]] = {
    "A": _images, "B": _growth, "C": _sentences, "D": _cases, "E": _methods,
}  # fmt: skip
