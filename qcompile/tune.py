"""Spends measured sensitivity: better ranges where they matter, float where nothing else helps."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompile.calib.ranges import METHODS
from qcompile.calib.split import TUNING
from qcompile.calib.taps import with_outputs
from qcompile.errors import ModelError
from qcompile.graph.edit import is_op
from qcompile.plan.plan import Plan
from qcompile.quant.scheme import QParams, Scheme
from qcompile.run.session import Feed
from qcompile.verify.local import LocalErrors, best_methods
from qcompile.verify.sensitivity import Meter, Noise, improve_ranges, measure, switched
from qcompile.workshop import Attempt, Ranging, Workshop

logger = logging.getLogger(__name__)

_LOCAL = 4  # held-out samples that ranges are chosen on, tensor by tensor
_SAMPLES = 3  # calibration samples that sensitivities are measured on
_LARGE = 160  # sites: above, one sample and groups only, so that the time stays linear in the graph
_GROUPS = 24
_SINGLE = 40  # sites that are measured one by one
_TENSORS = 12  # tensors whose range is searched one by one


@dataclasses.dataclass
class Sensitivity:
    """The noise of a plan's sites, and the meter that measured it; kept for later plans."""

    noise: Noise
    meter: Meter


def sensitivity(
    shop: Workshop, plan: Plan, ranging: Ranging, attempt: Attempt | None = None
) -> Sensitivity | None:
    """Noise by site of the main graph; None if ORT does not load the switched model.

    Where there is an attempt already, its errors tell which samples to measure on.
    """
    # biases that make up for the inputs' error would be wrong where a switch is off
    solution = shop.solve(plan, dataclasses.replace(ranging, shift=False))
    code_type = ir.DataType(Scheme.parse(plan.activation).qtype.onnx_type)
    model, sites = switched(
        shop.prepared, plan, shop.found, shop.coding(plan), solution.weights, code_type
    )
    if not sites:
        return None
    outputs = scores(shop.prepared)
    samples, single = (_SAMPLES, _SINGLE) if len(sites) <= _LARGE else (1, 0)
    assert shop.samples is not None
    try:
        feeds = shop.samples.few(samples) if attempt is None else telling(shop, attempt, samples)
        meter = Meter(
            with_outputs(model, outputs), sites, solution.params,
            shop.tuning_reference(outputs, feeds), samples=samples, threads=shop.recipe.threads,
        )  # fmt: skip
        with shop.progress.stage("measuring sensitivity", _GROUPS) as step:
            noise = measure(meter, groups=_GROUPS, most=single, tick=lambda: step(1, None))
    except ModelError as error:
        logger.warning("sensitivities were not measured: %s", error)
        return None
    return Sensitivity(noise, meter)


def telling(shop: Workshop, attempt: Attempt, count: int) -> list[Feed]:
    """Calibration samples that tell where errors come from: of a few, the one of most error, and such as have less, to the median.

    Noise adds up over samples, and often most of it is that of some: what they are sensitive to, others may not be.
    """
    assert shop.samples is not None
    feeds = shop.samples.few(TUNING)
    noise = [
        shop.reference.on(lambda feed=feed: iter([feed])).compare(attempt.session).noise_to_signal  # type: ignore[misc]
        for feed in feeds
    ]
    order = sorted(range(len(feeds)), key=lambda i: -noise[i])
    places = np.linspace(0, len(feeds) // 2, min(count, len(feeds))).astype(int)
    return [feeds[order[i]] for i in dict.fromkeys(places.tolist())]


def scores(model: ir.Model) -> list[str]:
    """The outputs, but what goes into a final Softmax or Sigmoid in place of what comes out.

    Probabilities hide small errors and blow up large ones: a few decisions that flip would outweigh all
    else that a handful of samples tells.
    """
    names = []
    for value in model.graph.outputs:
        node = value.producer()
        source = (
            node.inputs[0] if is_op(node, "Softmax", "Sigmoid", "LogSoftmax") and node else None
        )
        made = source is not None and source.producer() is not None and source.graph is model.graph
        names.append((source.name if made and source is not None else value.name) or "")
    return list(dict.fromkeys(names))


def local_ranges(shop: Workshop, plan: Plan) -> dict[str, str]:
    """For each root the range method that leaves least error in what its readers make of it, on held-out samples."""
    tables = {name: shop.parameters(plan, Ranging(name)) for name in METHODS}
    code_type = ir.DataType(Scheme.parse(plan.activation).qtype.onnx_type)
    try:
        meter = LocalErrors(
            shop.prepared, plan, shop.coding(plan), code_type, threads=shop.recipe.threads
        )
        errors = meter.measure(tables, shop.held_out(_LOCAL))
    except ModelError as error:
        logger.warning("ranges were not chosen by tensor: %s", error)
        return {}
    return best_methods(errors, meter.roots)


def tune_ranges(shop: Workshop, best: Attempt, found: Sensitivity) -> dict[str, str]:
    """Range methods for single tensors, by root name, where they beat the general one on the outputs."""
    others = [m for m in shop.methods if m != best.ranging.method]
    tables = {m: shop.parameters(best.plan, Ranging(m)) for m in others}

    def alternatives(name: str) -> Iterator[tuple[str, QParams]]:
        yield from ((m, table[name]) for m, table in tables.items())

    with shop.progress.stage("tuning ranges", _TENSORS * len(others)) as step:
        return improve_ranges(
            found.meter, found.noise, alternatives, most=_TENSORS, tick=lambda: step(1, None)
        )


def by_tensor(shop: Workshop, plan: Plan, noise: Noise) -> dict[str, float]:
    """Noise by site, and that of tensors which share codes, if they were rounded to codes of their own.

    A narrower range has finer steps, and the power of rounding errors is that of the steps squared.
    """
    found = dict(noise.sites)
    for value, coded in shop.coding(plan).tensors.items():
        root, own = (shop.stats.get(v.name or "") for v in (coded.root, value))
        if value is not coded.root and root is not None and own is not None and root.span > 0:
            finer = own.span / (abs(coded.factor) * root.span)
            found[value.name or ""] = (
                noise.sites.get(coded.root.name or "", 0.0) * min(finer, 1.0) ** 2
            )
    return found
