"""Which layers cost accuracy, and what they save: one line for each place where a plan rounds.

The plan is the one that a compilation starts from: the fastest one, with the range method of least error, and with
scales folded and products smoothed where that helps, before any node is left float for accuracy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcompile import search
from qcompile.build import Format
from qcompile.compiler import begin
from qcompile.errors import ModelError
from qcompile.finish import kept_float
from qcompile.gains import border_gain, node_gains, timed_alone
from qcompile.harm import Harm, measure_harm, quantized
from qcompile.improve import improve
from qcompile.opened import Opened, open_model
from qcompile.plan.make import Request
from qcompile.plan.plan import Form, Plan
from qcompile.progress import Progress
from qcompile.recipe import Recipe
from qcompile.run.session import Feed
from qcompile.verify.latency import race, typical_feeds
from qcompile.verify.layerwise import Quantized, Unit, units_of
from qcompile.verify.metrics import MOST_DB
from qcompile.workshop import Ranging, Workshop

_SECONDS = 0.5  # of timing the float model
_SAME = 1e-4  # of the whole error, is the rounding of two ways to sum it up
BORDER = "border"  # form of a tensor that no integer node makes


@dataclasses.dataclass(frozen=True)
class Layer:
    """One line: an integer node, or a float tensor that is rounded because integer nodes read it.

    Attributes:
        name: of the node; of the tensor at a border.
        op: operator type; QuantizeLinear at a border.
        form: as the plan has it; `border`.
        own_db: decibels (SQNR) between the result and the error that this line alone adds to it, its inputs
            float; None if it adds none, or if that cannot be seen.
        inherited_db: the same for what comes with its inputs: power of the whole error in the quantized
            model less that of its own; None if there is none, or if that cannot be seen.
        share: of the noise-to-signal ratios that all lines bring to the output slice that each hurts most;
            they sum to 1. None if it was not measured.
        grouped: the share was measured for a group of neighbours, and split evenly.
        gained_ms: time of its float kernel less that of its integer kernel, and of what quantizing a border or
            making its result float again takes; None if nothing tells.
        gained: the same as a share of the float model's time.
    """

    name: str
    op: str
    form: str
    own_db: float | None = None
    inherited_db: float | None = None
    share: float | None = None
    grouped: bool = False
    gained_ms: float | None = None
    gained: float | None = None


@dataclasses.dataclass(frozen=True)
class Layers:
    """The table: layers in order of their share, then of the time they save.

    Attributes:
        model: as it was named.
        samples: calibration samples that errors were measured on; 0 without data.
        ranges: the range method.
        fp32_ms: one run of the float model.
        all_db: SQNR of the worst output slice with everything rounded at once; None without data.
        sum_db: the same if the lines' noise adds up.
        layers: the lines.
        kept_float: `node`, `op` and `why` of nodes that stay float though one might expect otherwise.
        notes: sentences.
    """

    model: str
    samples: int
    ranges: str
    fp32_ms: float
    all_db: float | None
    sum_db: float | None
    layers: tuple[Layer, ...]
    kept_float: tuple[Mapping[str, str], ...]
    notes: tuple[str, ...]

    def to_dict(self, limit: int | None = None) -> dict[str, Any]:
        """A JSON-able table, with the first `limit` lines."""
        return {
            **dataclasses.asdict(self),
            "layers": [dataclasses.asdict(x) for x in self.layers[:limit]],
        }


def inspect_layers(
    model: str, data: str | None, recipe: Recipe, progress: Progress, *, forms: Plan | None = None,
    stats: Path | None = None,
) -> Layers:  # fmt: skip
    """What every layer of a model costs in accuracy, and saves in time, if it is quantized.

    Args:
        model: path of the float model.
        data: samples, as for `compile_model`; None: only times are told.
        recipe: as for `compile_model`.
        progress: shows the stages.
        forms: an edited plan that fixes the forms of its nodes.
        stats: statistics in place of samples.

    Raises:
        QcompileError: as `compile_model`.
    """
    opened = open_model(model, data, recipe, None, progress, stats=stats)
    shop, request, plan = begin(opened, forms, progress)
    history, ranging = search.History(), Ranging("none")
    if opened.samples is not None and plan.quantizes:
        form: Format = "qdq" if recipe.format == "qdq" else "fused"
        best = search.choose_ranges(shop, plan, form, history)
        shop, request, best = improve(shop, request, best, opened, history)
        plan, ranging = best.plan, best.ranging
    given = quantized(shop, plan, ranging)
    units = units_of(given)
    lines = [*units, *_handing_on(given, units)]
    harm = _harm(shop, given, units, lines, history)
    feed = typical_feeds(search.timing_feeds(opened))[0][1]
    with progress.stage("timing"):
        fp32_ms = race({"fp32": opened.session}, feed, seconds=_SECONDS).ms["fp32"]
    gains = _gains(shop, request, given, lines, feed)
    rows = [_layer(given, line, harm, gains.get(line), fp32_ms) for line in lines]
    rows.sort(key=lambda row: (-(row.share or 0.0), -(row.gained_ms or 0.0)))
    return Layers(
        model, 0 if harm is None else harm.samples, ranging.method, fp32_ms,
        None if harm is None else decibels(harm.all),
        None if harm is None else decibels(math.fsum(harm.outputs.values())),
        tuple(rows), tuple(kept_float(shop, plan)),
        (*opened.notes, *history.notes, *_remarks(opened, given, lines, harm)),
    )  # fmt: skip


def _harm(
    shop: Workshop, given: Quantized, units: Sequence[Unit], lines: Sequence[Unit], history: search.History
) -> Harm | None:  # fmt: skip
    """What the units harm, and that the other lines harm nothing; None if it cannot be told."""
    if shop.samples is None or not units:
        return None
    try:
        found = measure_harm(shop, given, units)
    except ModelError as error:
        history.notes.append(f"Errors were not measured: {error}")
        return None
    silent = dict.fromkeys(lines[len(units) :], 0.0)
    return dataclasses.replace(found, outputs={**silent, **found.outputs})


def decibels(ratio: float | None) -> float | None:
    """SQNR of a noise-to-signal power ratio; None if there is no noise, or nothing that can be compared."""
    if ratio is None or math.isnan(ratio) or ratio <= 0.0:
        return None
    return -MOST_DB if math.isinf(ratio) else -10.0 * math.log10(ratio)


def _handing_on(given: Quantized, units: Sequence[Unit]) -> list[Unit]:
    """The integer nodes that round nothing."""
    seen = {unit.node for unit in units}
    planned = given.plan.of(Form.STATIC, Form.FREE)
    return [
        Unit(e.node, given.item(e.node).result.name or "") for e in planned if e.node not in seen
    ]


def _gains(
    shop: Workshop, request: Request, given: Quantized, lines: Sequence[Unit], feed: Feed
) -> dict[Unit, float]:  # fmt: skip
    """Nanoseconds that each line saves, as far as something tells."""
    by_node = node_gains(shop, request, given.plan)
    found = {
        line: by_node[line.node] if line.node else border_gain(shop, request, line.tensor)
        for line in lines
        if line.node in by_node or not line.node
    }
    return found | timed_alone(shop, given, [u for u in lines if u not in found], feed)


def _layer(
    given: Quantized, line: Unit, harm: Harm | None, ns: float | None, fp32_ms: float
) -> Layer:
    entry = given.plan.get(line.node) if line.node else None
    ms = None if ns is None else ns / 1e6
    layer = Layer(
        line.name, "QuantizeLinear" if entry is None else entry.op,
        BORDER if entry is None else entry.form.value, gained_ms=ms,
        gained=None if ms is None or not fp32_ms else ms / fp32_ms,
    )  # fmt: skip
    if harm is None:
        return layer
    own, total, noise = harm.own.get(line), harm.total.get(line), harm.outputs.get(line)
    inherited = None if own is None or total is None else total - own
    if inherited is not None and total is not None and inherited < _SAME * total:
        inherited = None
    whole = math.fsum(harm.outputs.values())
    share = None if noise is None else noise / whole if whole else 0.0
    return dataclasses.replace(
        layer, own_db=decibels(own), inherited_db=decibels(inherited), share=share, grouped=line in harm.grouped
    )  # fmt: skip


def _remarks(
    opened: Opened, given: Quantized, lines: Sequence[Unit], harm: Harm | None
) -> list[str]:
    found = []
    if not given.plan.quantizes:
        found.append("Nothing is quantized: there is nothing to blame.")
    elif opened.samples is None:
        found.append("No data: only times are told. Give samples with --data to see errors.")
    if harm is not None and harm.grouped:
        found.append(
            f"{len(harm.grouped)} layers that cost little were measured in groups of neighbours (~)."
        )
    if harm is not None and len(harm.outputs) < len(lines):
        found.append(
            f"The shares of {len(lines) - len(harm.outputs)} layers were not measured (-)."
        )
    return found
