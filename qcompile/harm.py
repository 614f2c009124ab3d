"""What every unit of a plan adds to the error: of its own result, and of the model's outputs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qcompile.build import build
from qcompile.calib.taps import with_outputs
from qcompile.errors import ModelError
from qcompile.graph.edit import nodes
from qcompile.plan.plan import Plan
from qcompile.progress import Progress
from qcompile.quant.scheme import Scheme
from qcompile.run.session import Options, Session
from qcompile.tune import scores
from qcompile.verify.compare import Reference
from qcompile.verify.layerwise import Quantized, Unit, own_errors, sites_of, total_errors
from qcompile.verify.sensitivity import Meter, Site, made_by_codes, measure_units, switched
from qcompile.workshop import Ranging, Workshop

logger = logging.getLogger(__name__)
_SAMPLES = 8  # calibration samples that errors are measured on, at most
_RUNS = 360  # of samples, one for each unit: with more units there are fewer samples
_LARGE = 160  # units: above, groups of neighbours first
_GROUPS = 48
_SINGLE = 64
_ALONE = 24  # nodes that are measured in a model of their own


@dataclasses.dataclass(frozen=True)
class Harm:
    """Noise-to-signal power ratios, by unit; units that could not be measured are missing.

    Attributes:
        own: that the unit alone adds to its result, on float inputs.
        total: of its result in the quantized model.
        outputs: that the unit alone brings to the output slice that it hurts most.
        grouped: units that were measured with their neighbours only, and share that evenly.
        all: of the worst output slice with all units together; None if it cannot be told.
        samples: that all was measured on.
    """

    own: Mapping[Unit, float]
    total: Mapping[Unit, float]
    outputs: Mapping[Unit, float]
    grouped: frozenset[Unit]
    all: float | None
    samples: int


def quantized(shop: Workshop, plan: Plan, ranging: Ranging) -> Quantized:
    """The plan solved; biases make up for rounded weights, not for rounded inputs."""
    solution = shop.solve(plan, dataclasses.replace(ranging, shift=False))
    return Quantized(
        shop.prepared, plan, shop.found, shop.coding(plan), solution, shop.target.saturating
    )


def measure_harm(shop: Workshop, given: Quantized, units: Sequence[Unit]) -> Harm:
    """The errors of all units, of which there is one at least, on a few calibration samples.

    Raises:
        ModelError: ORT refuses a graph that measures.
    """
    assert shop.samples is not None
    samples = max(1, min(_SAMPLES, _RUNS // len(units)))
    feeds = shop.samples.few(samples)
    threads, names = shop.recipe.threads, scores(shop.prepared)
    code_type = ir.DataType(Scheme.parse(given.plan.activation).qtype.onnx_type)
    model, sites = switched(
        given.prepared, given.plan, given.found, given.coding, given.solution.weights, code_type,
        by_weight=True,
    )  # fmt: skip
    with shop.progress.stage("errors of layers"):
        own = own_errors(given, units, feeds, threads=threads)
        total = total_errors(given, (model, sites), units, feeds, shop.facts, threads=threads)
    _as_read(model, given, sites, names)
    reference = shop.tuning_reference(names, feeds)
    parts = {unit: found for unit in units if (found := sites_of(given, unit, sites))}
    outputs: dict[Unit, float] = {}
    whole: float | None = None
    grouped: frozenset[Unit] = frozenset()
    if parts:
        meter = Meter(
            with_outputs(model, names), sites, given.solution.params, reference,
            samples=samples, threads=threads,
        )  # fmt: skip
        outputs, grouped = _by_switch(meter, parts, shop.progress)
        whole = meter.noise(range(len(sites)))
    lonely = [unit for unit in units if unit not in parts]
    if lonely:  # no switches for these
        session = _built(shop, given, given.plan, names)
        whole = None if session is None else reference.compare(session, samples).noise_to_signal
        outputs |= _by_model(shop, given, lonely[:_ALONE], reference, names, samples)
    return Harm(own, total, outputs, grouped, whole, len(feeds))


def _by_model(
    shop: Workshop, given: Quantized, units: Sequence[Unit], reference: Reference, names: Sequence[str],
    samples: int,
) -> dict[Unit, float]:  # fmt: skip
    """The noise that each node brings to these outputs, in a model where it alone is quantized."""
    found = {}
    with shop.progress.stage("errors of single nodes", len(units)) as step:
        for unit in units:
            session = alone(shop, given, unit, names)
            if session is not None:
                found[unit] = reference.compare(session, samples).noise_to_signal
            step(1, None)
    return found


def _by_switch(
    meter: Meter, parts: Mapping[Unit, Sequence[int]], progress: Progress
) -> tuple[dict[Unit, float], frozenset[Unit]]:
    """The noise that each unit brings to the outputs, and which were measured in groups only."""
    units, count = list(parts), len(parts)
    large = count > _LARGE
    groups, most = (_GROUPS, _SINGLE) if large else (count, count)
    with progress.stage("errors of outputs", groups) as step:
        noise, measured = measure_units(
            meter.noise, [parts[unit] for unit in units], groups=groups, share=0.9, most=most,
            tick=lambda: step(1, None),
        )  # fmt: skip
    grouped = frozenset() if not large else frozenset(units) - {units[i] for i in measured}
    return dict(zip(units, noise, strict=True)), grouped


def alone(shop: Workshop, given: Quantized, unit: Unit, outputs: Sequence[str]) -> Session | None:
    """The model with this node alone quantized; None if ORT refuses it."""
    kept = {unit.node, *(node.name or "" for node in given.item(unit.node).absorbed)}
    others = [node.name or "" for node in nodes(given.prepared) if node.name not in kept]
    plan = given.plan.keep_float(others, "another node is measured")
    return _built(shop, given, plan, outputs)


def _built(shop: Workshop, given: Quantized, plan: Plan, outputs: Sequence[str]) -> Session | None:
    """A plan's model with these outputs; None if ORT refuses it, or if one of them has no float form in it."""
    try:
        model = build(given.prepared, plan, given.solution, shop.target, shop.facts, "fused")
        if not {*outputs} <= {v.name for node in model.graph for v in node.outputs}:
            return None
        return Session(with_outputs(model, outputs), Options("all", threads=shop.recipe.threads))
    except ModelError as error:
        logger.warning("a plan is not measured: %s", error)
        return None


def _as_read(
    model: ir.Model, given: Quantized, sites: Sequence[Site], names: Sequence[str]
) -> None:
    """Names of scores are those of what their readers see: behind the switch, where codes make them.

    Switches of outputs have the outputs' names already; those before a last Softmax or Sigmoid do not.
    """
    values = {v.name: v for node in model.graph for v in node.outputs}
    roots = {v.name: v for v in given.coding.roots}
    for site in sites:
        moved = site.result not in ("", site.name) and site.name in names
        if moved and made_by_codes(roots[site.name], given.plan):
            values[site.name].name, values[site.result].name = site.result, site.name
