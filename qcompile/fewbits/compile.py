"""The driver for weights of a few bits: open, assign, solve, lower, verify. Each step on its own line."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from passes.fuse_rotary import FuseRotary
from passes.lower_nbits import Form, LowerNbits
from passes.smooth_linear import SmoothLinear
from qcompile.calib.split import Judges
from qcompile.decode import IDS, one_more
from qcompile.errors import NotFiniteError, RecipeError
from qcompile.fewbits.assign import Assignment, assign, others
from qcompile.fewbits.bad import check_samples
from qcompile.fewbits.fit import bytes_before, fit, too_large
from qcompile.fewbits.fold import fold_scales
from qcompile.fewbits.forms import LEVEL, form_of, options_of, raised
from qcompile.fewbits.scales import AWQ, find_scales
from qcompile.fewbits.sequential import Found, solve_in_order, solve_plain, tally
from qcompile.finish import latency_rows, peak_rss
from qcompile.graph import io
from qcompile.graph.documentation import documentation, restore
from qcompile.graph.edit import graphs
from qcompile.graph.skeleton import release
from qcompile.kv_apply import apply_kv_cache, with_cache
from qcompile.kv_session import open_session
from qcompile.opened import Opened
from qcompile.progress import Progress
from qcompile.provenance import describe, describe_data
from qcompile.recipe import Recipe
from qcompile.report import GOOD, INACCURATE, NOT_FASTER, Result, write_report
from qcompile.run.session import Feed, Session
from qcompile.search import timing_feeds
from qcompile.solve.smoothing import Smoothing
from qcompile.step import run_pass
from qcompile.verify.compare import Comparison
from qcompile.verify.kernels import optimized

_SAMPLES = 64  # calibration feeds that choose codes
_TOKENS = 12288  # of texts, in all of these; of a third more, SmolLM2 has 2 % less divergence, and takes a minute more
_JUDGED = _TOKENS // 4  # of the texts that judge them
_SCALED = 16  # calibration feeds that choose scales of inputs
_JUDGES = 8  # held-out feeds that judge them
_COMPARED = 4  # held-out feeds that the whole model is compared on: logits are large
_NEAREST = "rtn"  # it asks for no data
ONE_TOKEN = "one token"  # noqa: S105 - of a text
_SUFFIX = re.compile(r"_token_\d+$")
_KERNELS = ("MatMulNBits", "GatherBlockQuantized")
_FLOAT = (
    "MatMul",
    "FusedMatMul",
    "Gemm",
    "FusedGemm",
    "Conv",
    "FusedConv",
    "LSTM",
    "GRU",
    "Attention",
)


def compile_weights(
    opened: Opened, place: Path | None, report: str | Path | None, start: float, show: Progress
) -> Result:
    """The model with weights of `recipe.bits`, verified, written and described.

    Raises:
        ModelError: ORT refuses the result, or a weight holds NaN.
        RecipeError: a pattern matches nothing.
        LimitError: `max_size` or `bits_per_weight` is less than any result has.
        OutputError: the result cannot be written.
    """
    form = form_of(opened.recipe)
    if opened.recipe.skip_bad:
        check_samples(opened, show)
    try:
        prepared, assignment, found, balanced = _decide(opened, form, show)
    except NotFiniteError:
        check_samples(opened, show)  # which of them it is
        raise
    model = raised(prepared.clone(), opened.recipe, [scheme for _, scheme in assignment.chosen])
    weights = {name: blocked for name, (blocked, _) in found.items()}
    unfit = LowerNbits(weights, form).unfit(model)
    kept = {name: made for name, made in found.items() if name not in unfit}
    weights |= {name: made for name, (made, _) in fold_scales(model, kept, balanced).items()}
    outcome = run_pass(LowerNbits(weights, form, opened.recipe.accuracy_level), model)
    if opened.recipe.format != "qdq":
        run_pass(FuseRotary(opened.facts), model)
    restore(model, documentation(prepared))
    release(opened.original)  # and with it what was read of the prepared graph, to be solved
    with show.stage("loading the result"):
        session = opened.session  # of the same weights, and large
        if not opened.recipe.keeps_weights:
            session = Session(model, options_of(opened.recipe))
    kv = None
    if opened.recipe.kv_cache is not None:
        kv = apply_kv_cache(opened, model, session, show)
        model, session = kv.model, kv.session
    with show.stage("verifying"):
        reference = opened.reference()
        deployed = reference.compare(session, _COMPARED)
        exact = reference.compare(open_session(model, options_of(opened.recipe, "off")), 1)
        verdicts = _verdicts(model, weights, opened)
        feeds = latency_rows(opened, session, _one_token(opened))
    _describe(model, opened)
    # if the model is gone by now, nothing is written
    size = bytes_before(opened)
    if place is not None:
        with show.stage("writing"):
            io.save(model, place)
    left = [(item.name, item.node.op_type, why) for item, why in assignment.left]
    listed = {item.node for item, _ in (*assignment.chosen, *assignment.left)}
    left += others(prepared, listed)
    left += [(name, "MatMul", why) for name, why in outcome.skipped.items() if name in weights]
    result = _result(
        opened, place, (deployed, exact), verdicts, feeds, left, found, assignment, start, size
    )
    result = with_cache(result, kv)
    if report is not None:
        write_report(Path(report), result)
    return result


def _decide(
    opened: Opened, form: Form, show: Progress
) -> tuple[ir.Model, Assignment, Found, dict[str, Smoothing]]:
    """The float graph, the schemes of its matrices, their codes, and the scales of their inputs."""
    assignment = assign(opened.prepared, opened.recipe, opened.original)
    prepared = opened.prepared
    scales = _scales(opened, assignment, show)
    if scales:
        prepared = opened.prepared.clone()
        run_pass(SmoothLinear(scales), prepared)
        assignment = assign(prepared, opened.recipe, opened.original)
    if not assignment.chosen:
        return prepared, assignment, {}, {}
    if opened.recipe.shares_bits:
        assignment = fit(opened, prepared, assignment, form, show).assignment
    return prepared, assignment, *_solve(opened, prepared, assignment, show)


def _scales(opened: Opened, assignment: Assignment, show: Progress) -> dict[str, Smoothing]:
    """The scales of inputs that the algorithm begins with.

    Raises:
        RecipeError: it needs data, and there is none.
    """
    samples, chosen = opened.samples, assignment.chosen
    if opened.recipe.algorithm != AWQ:
        return {}
    if samples is None:
        raise RecipeError(
            "algorithm 'awq' scales weights by the inputs they meet: give calibration data with --data."
        )
    with show.stage("scaling inputs") as step:
        found = find_scales(
            opened.prepared, chosen, samples.few(_SCALED), _judges(samples), opened.facts, opened.recipe,
            lambda: step(1, None),
        )  # fmt: skip
    opened.notes.append(
        f"Inputs of {sum(len(one.nodes) for one in found.values())} of {len(chosen)} matrices are scaled, and what makes"
        " them by the inverse (AWQ); of the others no constant before takes the scale, or held-out samples do not gain."
    )
    return found


def _one_token(opened: Opened) -> list[tuple[str, Feed]]:
    """What times a decoder where no sample is a single token: one more behind the longest text held out."""
    feeds = [feed for feed in timing_feeds(opened) if IDS in feed and np.ndim(feed[IDS]) == 2]
    if not feeds:
        return []
    longest = max(feeds, key=lambda feed: np.size(feed[IDS]))
    step = one_more(opened.original, opened.session, longest)
    if step is None:
        return []
    return [(f"{ONE_TOKEN} after {np.shape(longest[IDS])[1]}", step)]


def _judges(samples: Judges) -> list[Feed]:
    feeds: list[Feed] = []
    tokens = 0
    for feed in itertools.islice(samples.held_out(), _JUDGES):
        tokens += _tokens(feed)
        if feeds and tokens > _JUDGED:
            break
        feeds.append(feed)
    return feeds


def _texts(samples: Judges) -> list[Feed]:
    """Feeds that choose codes: as many as minutes allow for."""
    feeds = samples.few(_SAMPLES)
    tokens = sum(map(_tokens, feeds))
    return feeds if tokens <= _TOKENS else samples.few(max(len(feeds) * _TOKENS // tokens, 1))


def _tokens(feed: Feed) -> int:
    return int(np.size(feed[IDS])) if IDS in feed else 0


def _solve(
    opened: Opened, prepared: ir.Model, assignment: Assignment, show: Progress
) -> tuple[Found, dict[str, Smoothing]]:
    """Codes of all matrices: by what they compute where there is data, else by themselves; and scales of their inputs."""
    chosen, recipe = assignment.chosen, opened.recipe
    with show.stage("solving weights", len(chosen)) as step:
        samples = opened.samples
        if samples is None or recipe.algorithm == _NEAREST:
            return solve_plain(chosen, recipe.algorithm, lambda: step(1, None)), {}
        found, scales = solve_in_order(
            prepared, chosen, _texts(samples), _judges(samples), opened.facts, recipe,
            lambda: step(1, None),
        )  # fmt: skip
    if scales:
        count = sum(len(one.nodes) for one in scales.values())
        opened.notes.append(
            f"Inputs of {count} of {len(chosen)} matrices are scaled, and constants before them by the inverse, so that"
            " blocks lose less; that costs no time."
        )
    return found, scales


def _verdicts(
    model: ir.Model, weights: Mapping[str, Any], opened: Opened
) -> tuple[list[dict[str, str]], Counter[str]]:
    """What the optimized graph runs for each matrix, and its operators."""
    graph = optimized(model, options_of(opened.recipe))
    kernels: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for scope in graphs(graph):
        for node in scope:
            counts[node.op_type] += 1
            name = _SUFFIX.sub("", node.name or "")
            if node.op_type in _KERNELS or name not in kernels:
                kernels[name] = node.op_type
    rows = []
    for name in weights:
        kernel = kernels.get(name, "")
        if (
            kernels.get(f"{name}_q") == "Gather"
        ):  # a portable table: codes are looked up, and multiplied
            kernel = "Gather"
        good = kernel in (*_KERNELS, "Gather")
        rows.append(
            {"node": name, "op": kernel, "form": "weight", "verdict": "integer" if good else "float",
             "kernel": kernel, "why": "" if good else "no kernel for weights of a few bits runs it"}
        )  # fmt: skip
    return rows, counts


def _describe(model: ir.Model, opened: Opened) -> None:
    recipe = opened.recipe
    describe(model, opened.target.name, recipe, opened.original)
    describe_data(model, opened)
    if recipe.bits is not None:
        told = ("bits", "block", "accuracy_level")
        if recipe.shares_bits:  # each node has its own bits and block
            told = ("bits_per_weight", "max_size", "accuracy_level")
        model.metadata_props.update({f"qcompile.{key}": str(getattr(recipe, key)) for key in told})


def _result(
    opened: Opened, place: Path | None, compared: tuple[Comparison, Comparison],
    verdicts: tuple[list[dict[str, str]], Counter[str]], feeds: list[dict[str, Any]],
    left: Sequence[tuple[str, str, str]], found: Found, assignment: Assignment, start: float, size: int,
) -> Result:  # fmt: skip
    deployed, exact = compared
    rows, counts = verdicts
    recipe = opened.recipe
    # a decoder reads its prompt once, and makes its tokens one by one: these decide
    single = [row for row in feeds if row["feed"].startswith(ONE_TOKEN)]
    worst = min(single or feeds, key=lambda row: row["speedup"])
    missed = [row for row in rows if row["verdict"] != "integer"]
    warnings = [*deployed.problems(), *deployed.remarks(recipe.sqnr_goal)]
    warnings += [
        f"{row['node']} runs as {row['kernel'] or 'nothing'}: {row['why']}." for row in missed[:5]
    ]
    if opened.samples is None:
        warnings.append(
            "No calibration data: weights were rounded by themselves, and errors and latency were measured on "
            "stand-in inputs; give samples with --data."
        )
    elif found:
        warnings += opened.few_judges()
    smaller = "the result is smaller, but"
    if recipe.keeps_weights:
        smaller = "the caches are smaller, but the result is"
    goal = None
    if opened.samples is not None and found and deployed.worst_db < recipe.sqnr_goal:
        goal = recipe.sqnr_goal
        warnings.append(
            f"The worst output slice has {deployed.worst_db:.1f} dB SQNR, below the goal of {goal:g} dB: "
            "judge the result by your own metric, or give some matrices more bits (--bits-for) or none (--keep-float)."
        )
    code, reason = GOOD, ""
    if deployed.problems():
        code = INACCURATE
    elif not found and not recipe.keeps_weights:
        code, reason = (
            NOT_FASTER,
            "nothing was quantized: "
            + (
                "{1} {0}: {2}".format(*left[0])
                if left
                else "the model has no product with constant weights"
            )
            + ".",
        )
    elif worst["speedup"] < 1.0:
        code, reason = (
            NOT_FASTER,
            f"{smaller} not faster than the float model: {worst['speedup']:.2f}x at {worst['feed']}.",
        )
    if reason:
        warnings.insert(0, reason)
    warnings += [
        f"At {row['feed']}, many tokens at once, it is slower than the float model: {row['speedup']:.2f}x."
        for row in feeds
        if single and row not in single and row["speedup"] < 1.0
    ]
    schemes = {item.name: str(scheme) for item, scheme in assignment.chosen}
    after = io.file_bytes(place) if place else 0
    if (large := too_large(recipe, size, after)) is not None:
        code, warnings = INACCURATE, [large, *warnings]
    return Result(
        model=None if opened.path is None else str(opened.path), output=None if place is None else str(place),
        target=opened.target.name, recipe=recipe.name, format=_format(recipe), ranges="none",
        seconds=time.perf_counter() - start, peak_rss_mb=peak_rss(),
        size_mb={"before": size / 1e6, "after": after / 1e6},
        latency={"fp32_ms": worst["fp32_ms"], "result_ms": worst["result_ms"], "speedup": worst["speedup"], "feeds": feeds},
        outputs=[{"name": name, "slices": [e.to_dict() for e in errors], "exact": [e.to_dict() for e in exact.outputs[name]]}
                 for name, errors in deployed.outputs.items()],
        kernels={"integer": sum(counts[op] for op in _KERNELS), "float": sum(counts[op] for op in _FLOAT),
                 "leftover_qdq": counts["QuantizeLinear"] + counts["DequantizeLinear"],
                 "operators": dict(counts.most_common()), "nodes": rows},
        kept_float=[{"node": name, "op": op, "why": why} for name, op, why in left],
        samples={"calibration": opened.samples.calibration_count if opened.samples else 0,
                 "held_out": opened.samples.held_out_count if opened.samples else 0},
        warnings=warnings, notes=[*opened.notes, *_notes(found, recipe.accuracy_level, opened)],
        next_command=f"qcompile verify {opened.path or 'MODEL.onnx'} {place or 'RESULT.onnx'} --data SAMPLES",
        exit_code=code, goal_missed=goal, plan=[
            {"node": name, "op": "", "form": "weight", "weight": schemes[name], "why": one.algorithm}
            for name, (_, one) in found.items()
        ],
    )  # fmt: skip


def _format(recipe: Recipe) -> str:
    return "qdq" if recipe.keeps_weights or form_of(recipe) == "portable" else "nbits"


def _notes(found: Found, level: int, opened: Opened) -> list[str]:
    if not found:
        return []
    counts = ", ".join(f"{name} {n}" for name, n in tally(found.values()).items())
    # matrices without error to begin with say nothing
    ratios = [one.error / one.rtn for _, one in found.values() if one.rtn > 0]
    plain = opened.samples is None or opened.recipe.algorithm == _NEAREST
    where = "of the weights" if plain else "on held-out samples"
    mean = sum(ratios) / max(len(ratios), 1)
    return [
        f"{len(found)} matrices ({counts}): {mean:.2f} of the error that rounding to nearest leaves, {where}; none is worse.",
        f"MatMulNBits runs at accuracy_level {level}: "
        + (
            "activations are rounded to 8 bits by blocks."
            if level == 4
            else "activations stay float."
        )
        + (
            f" ORT makes it of the portable format, at level 4 unless a session's configuration has another {LEVEL}."
            if form_of(opened.recipe) == "portable"
            else ""
        ),
    ]
