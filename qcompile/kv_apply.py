"""The step of a compilation that makes caches integers, and what that costs: bytes, perplexity, tokens."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.decode import Decoder
from qcompile.errors import ModelError
from qcompile.graph.kv_cache import find_caches, stored_caches
from qcompile.kv import KvReport, quantize_kv_cache
from qcompile.kv_session import KvSession
from qcompile.opened import Opened
from qcompile.progress import Progress
from qcompile.report import Result
from qcompile.run.session import Feed, Options, Session
from qcompile.verify.next_token import IDS, Loss, next_token_loss, shown

_SAMPLES = 64  # calibration feeds that ranges are taken over
_PROMPT, _GREEDY = 32, 200  # tokens
_MOST_RISE = 0.01  # of perplexity, by the caches alone: beyond, there is a warning


@dataclasses.dataclass(frozen=True)
class KvOutcome:
    """A model with integer caches.

    Attributes:
        model: the result.
        session: of it; takes and returns float caches.
        table: JSON-able: `kind`, `keys`, `caches`, `skipped`, `token_bytes`, `scale_bytes`, `ratio`, `tokens`,
            `perplexity` and `greedy`: see `Result.kv_cache`.
        warnings: sentences.
    """

    model: ir.Model
    session: KvSession
    table: dict[str, Any]
    warnings: tuple[str, ...]


def apply_kv_cache(
    opened: Opened, model: ir.Model, session: Session, progress: Progress
) -> KvOutcome:
    """A copy of the compiled model whose caches are as the recipe says, compared with it and with the float model.

    Args:
        opened: the float model, the samples and the recipe.
        model: what was compiled, its caches float; not changed.
        session: of it.
        progress: shows the stages.

    Raises:
        ModelError: no cache can be stored so, or ORT refuses the result.
        DataError: the samples put nothing into the caches, NaN or infinities.
    """
    recipe, samples = opened.recipe, opened.samples
    assert recipe.kv_cache is not None
    assert samples is not None
    with progress.stage("quantizing caches"):
        made, report = quantize_kv_cache(
            model, samples.few(_SAMPLES), kind=recipe.kv_cache, session=session
        )
        plain = Session(made, Options("all", threads=recipe.threads))
    result = KvSession(plain, stored_caches(made))
    with progress.stage("comparing texts"):
        models = {"fp32": opened.original, "float_cache": model, "result": made}
        sessions = {"fp32": opened.session, "float_cache": session, "result": result}
        if recipe.keeps_weights:  # what has float caches is the float model itself
            del models["float_cache"], sessions["float_cache"]
        losses, no_loss = _losses(opened, sessions)
        greedy, no_greedy = _greedy(models, {**sessions, "result": plain}, samples.held_out())
    table = {**_bytes(report), "perplexity": losses, "greedy": greedy}
    warnings = [
        f"Perplexity with the {report.kind} cache is not known: {no_loss}." if no_loss else "",
        f"Tokens with the {report.kind} cache were not compared: {no_greedy}." if no_greedy else "",
        _rise(report, losses),
        _skipped(report),
    ]
    return KvOutcome(made, result, table, tuple(filter(None, warnings)))


def with_cache(result: Result, kv: KvOutcome | None) -> Result:
    """The result, told of its caches, if they were made integers."""
    if kv is None:
        return result
    warnings = [*result.warnings, *kv.warnings]
    return dataclasses.replace(result, kv_cache=kv.table, warnings=warnings)


def _bytes(report: KvReport) -> dict[str, Any]:
    before, after = report.token_bytes
    return {
        "kind": report.kind, "keys": report.keys, "caches": len(report.changed),
        "skipped": dict(report.skipped), "token_bytes": {"before": before, "after": after},
        "scale_bytes": report.scale_bytes, "ratio": report.ratio, "tokens": report.tokens,
    }  # fmt: skip


def _losses(opened: Opened, sessions: Mapping[str, Session]) -> tuple[dict[str, Any] | None, str]:
    """Perplexity of each on the held-out samples, and how many tokens that are; or why it is not known."""
    assert opened.samples is not None
    logits = _logits(opened.original)
    if logits is None:
        return None, "the model has no output but its caches"
    found: dict[str, Loss] = {}
    for name, session in sessions.items():
        loss = next_token_loss(session, logits, opened.samples.held_out())
        if loss is None:
            return None, (
                f"held-out samples have no {IDS!r} of several tokens, or the output {logits!r} no logits"
                " (batch, tokens, vocabulary) for them"
            )
        found[name] = loss
    tokens = found["fp32"].tokens
    values = {name: loss.perplexity for name, loss in found.items()}
    if not all(map(math.isfinite, values.values())):
        return None, "the loss is not finite"
    return {**values, "tokens": tokens}, ""


def _logits(model: ir.Model) -> str | None:
    presents = {cache.present.name for cache in find_caches(model)[0]}
    return next((v.name for v in model.graph.outputs if v.name not in presents), None)


def _greedy(
    models: Mapping[str, ir.Model], sessions: Mapping[str, Session], feeds: Iterator[Feed]
) -> tuple[dict[str, Any] | None, str]:
    """By name of each model but the last, the first token from 1 that the last one has otherwise; None: none has."""
    prompt = next((ids for ids in map(_ids, feeds) if len(ids)), [])
    if not prompt:
        return None, f"no held-out sample has {IDS!r}"
    try:
        decoders = {name: Decoder(model, session=sessions[name]) for name, model in models.items()}
        texts = {name: _follow(one, prompt) for name, one in decoders.items()}
    except ModelError as error:
        return None, str(error).rstrip(".")
    ours = texts["result"]
    count = min(map(len, texts.values()))
    if not count:
        return None, "the model does not run on an empty cache"
    differs = {
        name: next((i for i, (a, b) in enumerate(zip(text, ours, strict=False), 1) if a != b), None)
        for name, text in texts.items()
        if name != "result"
    }
    return {"prompt": len(prompt), "tokens": count, "differs": differs}, ""


def _follow(decoder: Decoder, prompt: list[int]) -> list[int]:
    """Tokens after the prompt, as many as the model has positions for."""
    made: list[int] = []
    try:
        made.extend(
            itertools.islice(decoder.follow(prompt), _GREEDY)
        )  # keeps what came before an error
    except ModelError:
        if not made:
            raise
    return made


def _ids(feed: Feed) -> list[int]:
    ids = feed.get(IDS)
    if ids is None or np.ndim(ids) != 2:
        return []
    ids = np.asarray(ids)
    return [int(i) for i in ids[0][shown(feed, ids.shape)[0]][:_PROMPT]]


def _rise(report: KvReport, losses: Mapping[str, Any] | None) -> str:
    """A warning, if the caches alone cost much."""
    if losses is None:
        return ""
    before, after = losses.get("float_cache", losses["fp32"]), losses["result"]
    if after <= before * (1 + _MOST_RISE):
        return ""
    more = " Longer texts, or int8, may mend that." if report.kind != "int8" else (
        " Calibrate on texts like those that will be decoded, and as long."
    )  # fmt: skip
    return f"The {report.kind} cache raises perplexity by {after / before - 1:.1%}.{more}"


def _skipped(report: KvReport) -> str:
    if not report.skipped:
        return ""
    name, why = next(iter(report.skipped.items()))
    more = f", and {len(report.skipped) - 1} more" if len(report.skipped) > 1 else ""
    return f"The cache {name!r} stays as it is: {why}{more}."
