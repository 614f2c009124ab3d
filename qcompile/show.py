"""Tables on stdout for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qcompile.errors import printable
from qcompile.plan.plan import Plan
from qcompile.report import POINT_COLUMNS, Result, cache_lines, grouped_float, point_rows, sized

if TYPE_CHECKING:
    from qcompile.layers import Layers

_WORST = 6  # output slices shown
_TENSORS = 12  # of a calibration
_LAYERS = 20
SHOWN = "mse"  # the range method whose ranges are shown


class _Console(Console):
    """A console whose reader may leave early."""

    def __init__(self) -> None:
        super().__init__(highlight=False, soft_wrap=True, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text, its control characters spelled out, whoever named what it tells of."""
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)

    def on_broken_pipe(self) -> None:
        """Raises: BrokenPipeError, where rich would end the program."""
        raise BrokenPipeError


def show_result(result: Result) -> None:
    """The result as a short table a person understands."""
    console = _Console()
    style = "green" if result.exit_code == 0 else "red"
    console.print(f"[{style}]{escape(result.verdict())}[/]")
    if result.output:
        console.print(f"wrote {escape(result.output)}")
    table = Table(show_edge=False, pad_edge=False)
    for title in ("", "FP32", "result", ""):
        table.add_column(title, justify="left" if not title else "right")
    table.add_row(
        "size",
        f"{result.size_mb['before']:.2f} MB",
        f"{result.size_mb['after']:.2f} MB",
        sized(result.size_mb["before"], result.size_mb["after"]),
    )
    for row in result.latency["feeds"]:
        table.add_row(
            f"latency {row['feed']}",
            f"{row['fp32_ms']:.2f} ms",
            f"{row['result_ms']:.2f} ms",
            f"{row['speedup']:.2f}x",
        )
    console.print(table)
    _show_slices(console, result.outputs)
    for line in () if result.kv_cache is None else cache_lines(result.kv_cache):
        console.print(escape(line))
    kernels = result.kernels
    console.print(
        f"kernels: {kernels['integer']} integer, {kernels['float']} float Conv/MatMul-like, "
        f"{kernels['leftover_qdq']} Q/DQ at run time  (format {result.format}, ranges {result.ranges})"
    )
    _show_float(console, result.kept_float)
    if result.search is not None:
        _show_points(console, result.search)
    for sentence in result.warnings:
        console.print(f"[yellow]warning:[/] {escape(sentence)}")
    for sentence in result.notes:
        console.print(f"note: {escape(sentence)}")
    console.print(
        f"target {result.target}, {result.samples['calibration']} calibration and {result.samples['held_out']} held-out "
        f"samples, {result.seconds:.1f} s, {result.peak_rss_mb:.0f} MB"
    )
    console.print(f"next: {escape(result.next_command)}")


def _show_float(console: Console, kept: Sequence[Mapping[str, str]]) -> None:
    """What stayed float, by operator and reason."""
    rows = grouped_float(kept)
    if rows:
        console.print("left float:")
        for op, why, count, node in rows:
            console.print(f"  {count:>4} {op:<16} {escape(why)}  ({escape(node)})")


def _show_points(console: Console, search: Mapping[str, Any]) -> None:
    """The points of a search that no other beats, and the result; all columns are in the report."""
    rows = point_rows(search)
    scored = any(point["metric"] is not None for point in search["points"])
    left_out = {"result", "float", *(() if scored else ("metric",))}
    columns = [i for i, title in enumerate(POINT_COLUMNS, 1) if title not in left_out]
    table = Table(show_edge=False, pad_edge=False)
    for title in ("trade-off", *(POINT_COLUMNS[i - 1] for i in columns)):
        side: Literal["left", "right"] = "left" if title in ("trade-off", "limits") else "right"
        table.add_column(title, justify=side, no_wrap=True)
    last = len(rows) - 1
    for i in (*(i for i in search["pareto"] if i != last), last):
        table.add_row("the result" if i == last else "", *(escape(rows[i][c]) for c in columns))
    console.print(table)
    console.print(f"{len(rows)} results were compiled, run and timed")


def _show_slices(console: Console, outputs: list[dict[str, Any]]) -> None:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("output")
    for title in ("SQNR", "cosine", "same decision"):
        table.add_column(title, justify="right")
    rows = [(o["name"], s) for o in outputs for s in o["slices"]]
    worst = sorted(
        rows, key=lambda r: float("inf") if r[1]["sqnr_db"] is None else r[1]["sqnr_db"]
    )[:_WORST]
    # the first output is what a model is made for
    shown = worst if not rows or rows[0] in worst else [rows[0], *worst[:-1]]
    for name, part in rows:
        if (name, part) not in shown:
            continue
        where = name if part["slice"] == "all" else f"{name} {part['slice']}"
        same = "" if part["agreement"] is None else f"{part['agreement']:.2%}"
        sqnr = "equal" if part["sqnr_db"] is None else f"{part['sqnr_db']:.1f} dB"
        table.add_row(escape(where), sqnr, f"{part['cosine']:.5f}", same)
    console.print(table)
    if len(rows) > len(shown):
        console.print(f"  ... and {len(rows) - len(shown)} slices with less error")


def show_outputs(facts: Mapping[str, Any]) -> None:
    """The table of `qcompile verify`."""
    console = _Console()
    _show_slices(console, facts["outputs"])
    console.print(f"{facts['samples']} sample{'s' * (facts['samples'] != 1)}")
    for sentence in facts["warnings"]:
        console.print(f"[yellow]warning:[/] {escape(sentence)}")


def show_calibration(facts: Mapping[str, Any], model: str) -> None:
    """What statistics hold: the tensors whose values spread most first."""
    console = _Console()
    console.print(
        f"{len(facts['tensors'])} tensors of {escape(facts['model'])}, {facts['samples']} sample"
        + "s" * (facts["samples"] != 1)
        + (f", {facts['skipped']} bad ones left out" if facts["skipped"] else "")
    )
    for shard in facts["data"]:
        console.print(f"  {shard['samples']} from {escape(shard['description'])}")
    ranked = sorted(facts["tensors"], key=lambda row: -(row["spread"] or 0.0))
    line = "{:>20} {:>9} {:>5} {:>20}  {}".format
    console.print(line("seen", "deviation", "zeros", f"by {SHOWN}", "tensor, widest spread first"))
    for row in ranked[:_TENSORS]:
        low, high = row["ranges"][SHOWN]
        seen = f"{row['min']:.4g} .. {row['max']:.4g}"
        deviation, zeros = _or_dash(row["deviation"], ".3g"), _or_dash(row["zeros"], ".0%")
        text = line(seen, deviation, zeros, f"{low:.4g} .. {high:.4g}", row["name"])
        console.print(text, markup=False)
    if len(ranked) > _TENSORS:
        console.print(
            f"  ... and {len(ranked) - _TENSORS} more (--json has all, and the ranges by every method)"
        )
    for name, why in list(facts["unobserved"].items())[:_WORST]:
        console.print(f"not observed: {escape(name)}: {escape(why)}")
    for sentence in facts.get("notes", ()):
        console.print(f"note: {escape(sentence)}")
    if facts.get("output"):
        console.print(
            f"wrote {escape(facts['output'])}: {facts['held_out']} held-out samples are in it, for judging"
        )
        data = "" if facts["held_out"] else " --data OTHER_SAMPLES"
        command = shlex.join(["qcompile", model, "--stats", facts["output"]])
        console.print(f"next: {escape(command + data)}")


def show_layers(found: Layers, limit: int | None) -> None:
    """The table of `qcompile inspect --layers`: what costs most first."""
    console = _Console()
    line = "{:>7} {:>9} {:>9} {:>10} {:>6}  {:<8} {:<16} {}".format
    titles = ("share", "own", "inherited", "gained", "", "form", "operator", "layer")
    console.print(line(*titles), markup=False)
    for row in found.layers[: limit or _LAYERS]:
        share = _or_dash(row.share, ".1%") + "~" * row.grouped
        errors = (_or_dash(db, ".1f", " dB") for db in (row.own_db, row.inherited_db))
        gains = _or_dash(row.gained_ms, ".3f", " ms"), _or_dash(row.gained, ".1%")
        console.print(line(share, *errors, *gains, row.form, row.op, row.name), markup=False)
    rest = found.layers[limit or _LAYERS :]
    if rest:
        left, ms = (
            sum(values)
            for values in zip(*((r.share or 0.0, r.gained_ms or 0.0) for r in rest), strict=True)
        )
        told = f"{left:.1%} of the error, " if found.samples else ""
        console.print(f"  ... and {len(rest)} more: {told}{ms:.3f} ms gained (--limit N shows N)")
    if found.samples:
        together, apart = (_or_dash(db, ".1f", " dB") for db in (found.all_db, found.sum_db))
        console.print(
            f"worst output slice, all layers together {together} SQNR; by the sum of the shares {apart}"
            f"  ({found.samples} calibration samples, ranges {found.ranges})"
        )
    total = sum(row.gained_ms or 0.0 for row in found.layers)
    console.print(f"gained {total:.3f} ms of the {found.fp32_ms:.3f} ms of the float model")
    _show_float(console, found.kept_float)
    for sentence in found.notes:
        console.print(f"note: {escape(sentence)}")


def _or_dash(value: float | None, how: str, unit: str = "") -> str:
    return "-" if value is None else format(value, how) + unit


def show_plan(plan: Plan, model: str, output: Path | None) -> None:
    """The plan, one node a line, and how to go on if it was written."""
    console = _Console()
    console.print(plan.show(), markup=False)
    if output is not None:
        command = shlex.join(["qcompile", model, "--plan", str(output)])
        console.print(f'wrote {escape(str(output))}: set nodes to "float", then: {escape(command)}')


def show_targets(facts: Mapping[str, Any]) -> None:
    """The targets, one a line."""
    console = _Console()
    for row in facts["targets"]:
        mark = "*" if row["this_machine"] else " "
        console.print(f"{mark} {row['name']:<20} {row['title']}", markup=False)
    console.print("* this machine: what --target auto takes", markup=False)


def show_table(facts: Mapping[str, Any], indent: int = 0) -> None:
    """Any nested table, one entry a line."""
    console = _Console()
    pad = " " * indent
    for key, value in facts.items():
        if isinstance(value, Mapping):
            console.print(f"{pad}{key}:", markup=False)
            show_table(value, indent + 2)
        elif isinstance(value, list):
            for row in value:
                shown = ", ".join(f"{k} {v}" for k, v in row.items())
                console.print(f"{pad}{key}: {shown}", markup=False)
        else:
            console.print(f"{pad}{key:<{max(1, 24 - indent)}} {value}", markup=False)
