"""The trade-off between speed and accuracy as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_INCHES = (7.0, 4.5)
_DOTS = 120  # per inch


def draw_points(search: Mapping[str, Any], path: Path) -> None:
    """The points of a search: speed-up against SQNR, the front as a line, size as area; a PNG file.

    Args:
        search: `points` and `pareto` of a `Result`.
        path: the file; its folder exists.

    Raises:
        OSError: it cannot be written.
    """
    # kept out of the start of the program: it takes a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    points = search["points"]
    finite = [p["sqnr_db"] for p in points if p["sqnr_db"] is not None]
    top = max(finite, default=0.0) + 10.0  # where points without error stand

    def place(i: int) -> tuple[float, float]:
        db = points[i]["sqnr_db"]
        return points[i]["speedup"], top if db is None else db

    figure = Figure(figsize=_INCHES, dpi=_DOTS, layout="constrained")
    axes = figure.add_subplot()
    largest = max((p["size_mb"] for p in points), default=1.0)
    for i, point in enumerate(points):
        color = "tab:red" if point["misses"] else "tab:green"
        last = i == len(points) - 1
        area = 20 + 120 * point["size_mb"] / max(largest, 1e-9)
        axes.scatter(
            *place(i), s=area, color=color, edgecolors="black" if last else "none", zorder=3
        )
    front = sorted(map(place, search["pareto"]))
    axes.plot([x for x, _ in front], [y for _, y in front], color="tab:gray", linewidth=1)
    limit = search["limits"].get("min_sqnr")
    if limit is not None:
        axes.axhline(limit, color="tab:red", linestyle="--", linewidth=1)
    axes.set_xlabel("speed-up over the float model")
    axes.set_ylabel("SQNR of the worst output slice, dB")
    axes.set_title("green: within the limits; area: size; black edge: the result", fontsize=9)
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")
