"""What the probe found, and how it is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from probe_timing import Times, fit, fit_line

from qcompile.targets.schema import Cost, OpRow, Target


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Nanoseconds that the target file expects: of the kernels, and of the models with their borders."""

    float_ns: float
    int8_ns: float
    float_wall_ns: float
    int8_wall_ns: float
    size: tuple[float, float, float]  # multiply-accumulates, output elements, input elements

    @property
    def speedup(self) -> float:
        """Of the kernel; NaN where both forms are free."""
        return self.float_ns / self.int8_ns if self.int8_ns else float("nan")

    @property
    def wall_speedup(self) -> float:
        """Of the model."""
        return self.float_wall_ns / self.int8_wall_ns if self.int8_wall_ns else float("nan")


@dataclasses.dataclass(frozen=True)
class RowResult:
    """What became of one case of a row.

    Attributes:
        row, case: what was run.
        context: the node stands between Convs.
        problem: why the row does not hold, "" if it does.
        kernels: operator types of the optimized graph.
        sqnr_db: of the result against the float model, the worst output.
        codes_off: greatest distance from the exact Q/DQ form, in codes (in 1e-4 of the largest value
            for kernels that write floats; NaN for those that no Q/DQ form describes).
        times: None if they were not taken.
        predicted: None if there is nothing to run.
    """

    row: OpRow
    case: str
    problem: str
    context: bool = False
    kernels: tuple[str, ...] = ()
    sqnr_db: float = float("nan")
    codes_off: float = float("nan")
    times: Times | None = None
    predicted: Prediction | None = None

    @property
    def name(self) -> str:
        """The row, as in the target file."""
        return f"{self.row.type} {self.row.variant}".strip()


_HEAD = (
    "row",
    "case",
    "kernel",
    "dB",
    "float us",
    "(row)",
    "int8 us",
    "(row)",
    "x",
    "(row)",
    "model x",
    "(row)",
)


def _cells(result: RowResult) -> list[str]:
    times, predicted = result.times, result.predicted
    kernel = "+".join(k for k in dict.fromkeys(result.kernels) if k in result.row.kernels)
    cells = [
        result.name,
        result.case,
        "FAILS" if result.problem else kernel,
        f"{result.sqnr_db:.1f}",
    ]
    if times is None or predicted is None:
        return cells + [""] * (len(_HEAD) - len(cells))
    numbers = (
        times.float_ns / 1000, predicted.float_ns / 1000, times.int8_ns / 1000, predicted.int8_ns / 1000,
        times.speedup, predicted.speedup, times.wall_speedup, predicted.wall_speedup,
    )  # fmt: skip
    return cells + [_number(n) for n in numbers]


def _number(value: float) -> str:
    return "-" if not np.isfinite(value) else f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def table(results: Sequence[RowResult]) -> str:
    """The results as aligned text."""
    lines = [list(_HEAD), *map(_cells, results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def fitted(results: Sequence[RowResult]) -> Iterator[str]:
    """For each row the costs that would explain what was measured, as they stand in a target file.

    Where there are cases beside a Conv, those alone: there ORT runs the kernel in its own layout.
    """
    for row in dict.fromkeys(result.row for result in results):
        own = [
            r for r in results if r.row is row and r.times is not None and r.predicted is not None
        ]
        own = [r for r in own if r.context] or own
        sizes = [r.predicted.size for r in own if r.predicted]
        parts = [
            (label, cost, fit(cost, sizes, [getattr(r.times, f"{label}_ns") for r in own]))
            for label, cost in (("float", row.float), ("int8", row.int8))
        ]
        shown = "  ".join(f"{label} = {_cost(new)} (is {_cost(old)})" for label, old, new in parts)
        yield f"{row.type} {row.variant}".strip().ljust(20) + shown


def borders(results: Sequence[RowResult], target: Target) -> Iterator[str]:
    """What Q, DQ and the change of layout cost, as the target file's [boundary] says it."""
    says = {
        "QuantizeLinear": ("quantize", target.boundary.quantize),
        "DequantizeLinear": ("dequantize", target.boundary.dequantize),
        "Transpose": ("layout", target.boundary.layout),
    }
    for op, (key, old) in says.items():
        points = [p[1:] for r in results if r.times for p in r.times.borders if p[0] == op]
        slope, start = fit_line(points)
        yield f"{key:<20}{slope:.3g} (is {old:.3g}), and {start:.0f} ns a node"


def _cost(cost: Cost) -> str:
    terms = {key: value for key, value in dataclasses.asdict(cost).items() if value}
    return "{ " + ", ".join(f"{key} = {value:.3g}" for key, value in terms.items()) + " }"
