"""The commands beside compilation: plan, inspect, verify, bench."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.calib.data import open_data
from qcompile.calib.split import Samples
from qcompile.errors import ModelError, RecipeError
from qcompile.graph import io
from qcompile.graph.digest import digest
from qcompile.graph.edit import graphs
from qcompile.graph.publish import check_apart, check_writable, write_text
from qcompile.inputs import MADE_UP, input_specs, running, stand_in
from qcompile.kv_session import open_session, timed
from qcompile.opened import open_model
from qcompile.plan.make import make_plan
from qcompile.plan.plan import Plan, load_plan
from qcompile.progress import Progress
from qcompile.provenance import PREFIX
from qcompile.recipe import Recipe
from qcompile.report import GOOD, INACCURATE
from qcompile.run.probe import probe
from qcompile.run.session import Feed, Options, Session, TensorInfo
from qcompile.targets.schema import detect, load_target, target_names
from qcompile.verify.compare import Reference
from qcompile.verify.latency import race, typical_feeds
from qcompile.verify.slices import parts_of


def plan_model(
    model: str, data: str | None, recipe: Recipe, progress: Progress, *,
    forms: Path | None = None, output: Path | None = None,
) -> Plan:  # fmt: skip
    """The plan for a model, without calibration; written to `output`, if that is given.

    Args:
        model: path of the float model.
        data: the shapes are those of its first sample; None: of a made-up input.
        recipe: as for `compile_model`.
        progress: shows the stages.
        forms: an edited plan that fixes the forms of its nodes.
        output: receives the plan as JSON.

    Raises:
        QcompileError: as `compile_model`.
    """
    fixed = None if forms is None else load_plan(forms)
    if output is not None:
        data_file = None if data is None else Path(data)
        check_apart(output, {"the model": Path(model), "the calibration data": data_file})
        io.check_outside(Path(output), Path(model))
        check_writable(output)
    opened = open_model(model, data, recipe, None, progress)
    request = dataclasses.replace(opened.request(fixed), calibrated=True)
    plan = make_plan(opened.prepared, opened.target, opened.facts, request)
    if output is not None:
        write_text(output, plan.to_json())
    return plan


def list_targets() -> dict[str, Any]:
    """The targets that ship with qcompile, and which one fits this machine."""
    try:
        here = detect().name
    except RecipeError:
        here = ""
    names = target_names()
    return {
        "targets": [
            {"name": name, "title": load_target(name).title, "this_machine": name == here}
            for name in names
        ]
    }


def inspect_model(path: str) -> dict[str, Any]:
    """What a model is: inputs, outputs, operators, weights by type, its hash, whether it is quantized and how it was made.

    Raises:
        ModelError: it cannot be read or loaded.
    """
    model = io.load(path)
    session = Session(Path(path), Options("off"))
    ops: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for graph in graphs(model):
        ops.update(node.op_type for node in graph)
        for value in graph.initializers.values():
            if value.const_value is not None:
                weights[str(value.const_value.dtype)] += value.const_value.nbytes
    quantized = sum(
        n
        for op, n in ops.items()
        if "Quantize" in op or "QLinear" in op or "Integer" in op or "NBits" in op
    )
    return {
        "model": path, "mb": round(io.file_bytes(Path(path)) / 1e6, 3),
        "opset": {domain or "ai.onnx": number for domain, number in model.opset_imports.items()},
        "inputs": {i.name: _spell(i) for i in session.inputs}, "outputs": {o.name: _spell(o) for o in session.outputs},
        "nodes": sum(ops.values()), "operators": dict(ops.most_common()),
        "weights_mb": {kind: round(size / 1e6, 3) for kind, size in weights.most_common()},
        "sha256": digest(model), "made": {k: v for k, v in sorted(model.metadata_props.items()) if k.startswith(PREFIX)},
        "functions": len(model.functions), "graphs": sum(1 for _ in graphs(model)), "quantized_nodes": quantized,
    }  # fmt: skip


def _spell(info: TensorInfo) -> str:
    return f"{info.dtype or '?'}[{', '.join('?' if d is None else str(d) for d in info.shape)}]"


def verify_models(
    fp32: str, quantized: str, data: str | None, recipe: Recipe, progress: Progress
) -> tuple[dict[str, Any], int]:
    """Errors of a quantized model on all samples, deployed and exact, and the exit code.

    Raises:
        QcompileError: a file is wrong, or the two models have different outputs.
    """
    model = io.load(fp32)
    float_session, session = _pair(fp32, quantized, recipe)
    exact = open_session(Path(quantized), Options("off", threads=recipe.threads))
    feeds, stood_in, feed = _feeds(model, float_session, data, recipe)
    with running(MADE_UP if stood_in else "the first sample"):
        facts = probe(model, feed)
    parts = {value.name or "": parts_of(value, facts) for value in model.graph.outputs}
    where = None if stood_in else "sample {}".format
    reference = Reference(float_session, feeds, parts, where)
    with progress.stage("comparing"):
        deployed, plain = reference.compare(session), reference.compare(exact)
    outputs = [
        {
            "name": n,
            "slices": [e.to_dict() for e in errors],
            "exact": [e.to_dict() for e in plain.outputs[n]],
        }
        for n, errors in deployed.outputs.items()
    ]
    warnings = [*deployed.problems(), *deployed.remarks(recipe.sqnr_goal)]
    if stood_in:
        warnings.append(
            "No data: measured on stand-in inputs, not on real ones. Give samples with --data."
        )
    missed = recipe.min_sqnr is not None and deployed.worst_db < recipe.min_sqnr
    if missed:
        warnings.insert(
            0,
            f"the worst output slice has {deployed.worst_db:.1f} dB SQNR, the limit is {recipe.min_sqnr:g} dB.",
        )
    table = {
        "fp32": fp32,
        "quantized": quantized,
        "samples": deployed.samples,
        "outputs": outputs,
        "warnings": warnings,
    }
    return table, INACCURATE if missed or deployed.problems() else GOOD


def bench_models(
    fp32: str, quantized: str, data: str | None, recipe: Recipe, seconds: float, progress: Progress
) -> dict[str, Any]:
    """Latency of two models run in turn, on the typical feeds.

    Raises:
        QcompileError: a file is wrong, or the two models have different outputs.
    """
    model = io.load(fp32)
    float_session, session = _pair(fp32, quantized, recipe)
    feeds, stood_in, _ = _feeds(model, float_session, data, recipe)
    rows = []
    with progress.stage("timing"):
        chosen = typical_feeds(list(feeds()))
        for name, feed in chosen:
            timing = race(
                {"fp32": float_session, "quantized": timed(session, feed)},
                feed,
                seconds=seconds / len(chosen),
                most=5000,
            )
            rows.append({"feed": name, "fp32_ms": round(timing.ms["fp32"], 4), "quantized_ms": round(timing.ms["quantized"], 4),
                         "speedup": round(timing.speedup["quantized"], 4), "rounds": timing.rounds})  # fmt: skip
    sizes = {
        "fp32": round(io.file_bytes(Path(fp32)) / 1e6, 3),
        "quantized": round(io.file_bytes(Path(quantized)) / 1e6, 3),
    }
    return {"latency": rows, "size_mb": sizes, "inputs": "stand-in" if stood_in else "data"}


def _pair(fp32: str, quantized: str, recipe: Recipe) -> tuple[Session, Session]:
    options = Options("all", threads=recipe.threads)
    io.load(quantized)
    first, second = Session(Path(fp32), options), open_session(Path(quantized), options)
    _same_inputs(fp32, first, quantized, second)
    missing = {o.name for o in first.outputs} - {o.name for o in second.outputs}
    if missing:
        raise ModelError(
            f"{quantized} lacks the output {min(missing)!r} of {fp32}: these are not the same model."
        )
    more = {i.name for i in second.inputs} - {i.name for i in first.inputs}
    if more:
        raise ModelError(
            f"{quantized} takes {min(more)!r}, which {fp32} does not: these are not the same model."
        )
    return first, second


def _same_inputs(fp32: str, first: Session, quantized: str, second: Session) -> None:
    """Raises ModelError if an input of both has two types."""
    types = {info.name: info.dtype for info in first.inputs}
    for info in second.inputs:
        if types.get(info.name, info.dtype) != info.dtype:
            raise ModelError(
                f"input {info.name!r} is {info.dtype} in {quantized} and {types[info.name]} in {fp32}: only integer "
                "caches that qcompile made can be compared with float ones."
            )


def _feeds(
    model: ir.Model, session: Session, data: str | None, recipe: Recipe
) -> tuple[Callable[[], Iterator[Feed]], bool, Feed]:
    """What starts a pass over the samples, whether they are made up, and the first one."""
    specs = input_specs(session, model)
    if data is None:
        feed = stand_in(specs)
        return (lambda: iter([feed])), True, feed
    source = open_data(data, specs, recipe.data)
    first = Samples(source).first()  # refuses an empty source
    return (lambda: iter(source)), False, first
