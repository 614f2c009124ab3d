"""Quantizes the key and value caches of a decoder: ranges from samples, then `QuantizeKvCache`."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from passes.quantize_kv_cache import QuantizeKvCache
from qcompile.decode import no_cache
from qcompile.errors import DataError, ModelError, RecipeError, nearest
from qcompile.graph.kv_cache import TOKENS_AXIS, Cache, find_caches
from qcompile.quant.cache import KINDS, CacheParams, Kind, choose_cache, turned
from qcompile.run.session import Feed, Options, Session
from qcompile.step import run_pass

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]

MEMORY = 128 << 20
"""Bytes of cache values kept, of all caches together, to take the error of int4 over."""


@dataclasses.dataclass(frozen=True)
class KvReport:
    """What became of the caches.

    Attributes:
        kind: of their codes, as it was asked for.
        keys: of the codes of keys.
        changed: names of the inputs that are integers now.
        skipped: names of those that are not, and why.
        token_bytes: of one token in all caches, before and after.
        scale_bytes: of scales and offsets, once a model.
        tokens: that the ranges were taken over.
    """

    kind: Kind
    keys: Kind
    changed: tuple[str, ...]
    skipped: Mapping[str, str]
    token_bytes: tuple[int, int]
    scale_bytes: int
    tokens: int

    @property
    def ratio(self) -> float:
        """Bytes of a token after, by bytes before."""
        return self.token_bytes[1] / self.token_bytes[0]

    def __str__(self) -> str:
        before, after = self.token_bytes
        keys = "" if self.keys == self.kind else f" (keys {self.keys})"
        text = (
            f"{len(self.changed)} caches as {self.kind}{keys}: {before} -> {after} bytes a token ({self.ratio:.3f}x), "
            f"{self.scale_bytes} bytes of scales, from {self.tokens} tokens"
        )
        for name, reason in self.skipped.items():
            text += f"\n{name} stays as it is: {reason}"
        return text


def quantize_kv_cache(
    model: ir.Model,
    feeds: Iterable[Feed],
    *,
    kind: Kind = "int8",
    key_kind: Kind | None = None,
    threads: int = 0,
    session: Session | None = None,
) -> tuple[ir.Model, KvReport]:
    """A copy of the model whose caches are integers, and what was done.

    Args:
        model: a decoder with float32 caches; not changed.
        feeds: calibration samples; caches in them may be empty. Texts as long as those that will be decoded
            are best, since what lies outside of the ranges seen saturates.
        kind: int8, uint8, or int4, two in a byte.
        key_kind: of keys; None: as `kind`, but int8 beside int4 values, unless GroupQueryAttention stores both
            alike. SmolLM2 loses up to 0.6 % of perplexity with int8 keys, and 13 % with int4 ones.
        threads: of ORT.
        session: of the model, if there is one already.

    Raises:
        RecipeError: there is no such kind.
        ModelError: the model has no cache that can be quantized; the message says why.
        DataError: there are no samples, or a cache is empty, NaN or infinite.
    """
    caches, reasons = quantizable(model, kind)
    session = session or Session(model, Options("all", threads=threads, pattern=False))
    ranges, tokens = _observe(session, caches, feeds, sampled="int4" in (kind, key_kind))
    params = {
        cache.name: _params(cache, seen, kind, key_kind)
        for cache, seen in zip(caches, ranges, strict=True)
    }
    made = model.clone()
    outcome = run_pass(QuantizeKvCache(params), made)
    return made, _report(kind, outcome.changed, {**reasons, **outcome.skipped}, params, tokens)


def quantizable(model: ir.Model, kind: Kind) -> tuple[list[Cache], dict[str, str]]:
    """The caches that can be stored so, and by name of the past input why another one cannot.

    Raises:
        RecipeError: there is no such kind.
        ModelError: there is none; the message says why.
    """
    if kind not in KINDS:
        raise RecipeError(
            f"--kv-cache {kind} is unknown: give one of {', '.join(KINDS)}.{nearest(kind, KINDS)}"
        )
    caches, reasons = find_caches(model)
    if not caches:
        raise ModelError(f"--kv-cache {kind}: {no_cache(reasons)}.")
    trial = {
        cache.name: CacheParams(kind, np.ones((cache.heads, cache.width), np.float32))
        for cache in caches
        if cache.heads and cache.width
    }
    skipped = dict.fromkeys(
        (cache.name for cache in caches), "its shape leaves heads or width open"
    )
    reasons |= {name: why for name, why in skipped.items() if name not in trial}
    outcome = run_pass(QuantizeKvCache(trial), model.clone())
    reasons |= {name: why for name, why in outcome.skipped.items() if name in trial}
    if not outcome.changed:
        name, reason = next((name, reasons[name]) for name in skipped)
        more = f"; nor can {len(caches) - 1} more" if len(caches) > 1 else ""
        raise ModelError(
            f"--kv-cache {kind}: the cache {name!r} cannot be stored so: {reason}{more}."
        )
    return [cache for cache in caches if cache.name not in reasons], reasons


def _params(cache: Cache, seen: _Seen, kind: Kind, key_kind: Kind | None) -> CacheParams:
    if not cache.is_key:
        return choose_cache(seen.lo, seen.hi, kind, centred=cache.form == "concat")
    if key_kind is None:
        key_kind = "int8" if kind == "int4" and cache.form == "concat" else kind
    return choose_cache(seen.lo, seen.hi, key_kind, seen=seen.values)


def _report(
    kind: Kind, changed: list[str], skipped: Mapping[str, str], params: Mapping[str, CacheParams],
    tokens: int,
) -> KvReport:  # fmt: skip
    used = [params[name] for name in changed]
    before = sum(4 * int(p.scale.size) for p in used)
    after = sum(int(p.scale.shape[0]) * p.stored_width for p in used)
    scales = sum(p.scale.nbytes + (0 if p.offset is None else p.offset.nbytes) for p in used)
    keys = next((params[name].kind for name in changed if params[name].kind != kind), kind)
    return KvReport(kind, keys, tuple(changed), dict(skipped), (before, after), scales, tokens)


class _Seen:
    """Range of each head and channel of one cache, of keys at any position, and the values of the first tokens if they are kept."""

    def __init__(self, name: str, room: int, *, turns: bool) -> None:
        self.lo: F32 = np.zeros(0, np.float32)
        self.hi: F32 = np.zeros(0, np.float32)
        self._name, self._room, self._turns = name, room, turns
        self._kept: list[F32] = []

    def add(self, new: npt.NDArray[Any], where: str) -> None:
        """New tokens (batch, heads, tokens, width)."""
        if not new.size:
            return
        axes = (0, TOKENS_AXIS)
        if self._turns:
            hi = turned(new).max(axis=axes)
            lo = -hi
        else:
            lo, hi = new.min(axis=axes), new.max(axis=axes)
        if not (np.isfinite(lo).all() and np.isfinite(hi).all()):
            raise DataError(
                f"{where} makes NaN or infinity in the cache {self._name!r}: the float model itself fails "
                "there. Mend or remove that sample."
            )
        self.lo = np.minimum(self.lo, lo) if self.lo.size else lo
        self.hi = np.maximum(self.hi, hi) if self.hi.size else hi
        # (batch, heads, tokens, width) -> (heads, batch * tokens, width)
        rows = np.moveaxis(new, 0, 1).reshape(new.shape[1], -1, new.shape[3])
        size = 4 * new.shape[1] * new.shape[3]
        fits = min(rows.shape[1], self._room // size)
        if fits:
            self._kept.append(rows[:, :fits].copy())
            self._room -= fits * size

    @property
    def values(self) -> F32 | None:
        """Values (heads, tokens, width), if they were kept."""
        return np.concatenate(self._kept, axis=1) if self._kept else None


def _observe(
    session: Session, caches: list[Cache], feeds: Iterable[Feed], *, sampled: bool
) -> tuple[list[_Seen], int]:
    """What the samples put into the caches, by cache, and how many tokens that was."""
    names = [cache.present.name or "" for cache in caches]
    room = MEMORY // len(caches) if sampled else 0
    seen = [_Seen(cache.present.name or "", room, turns=cache.is_key) for cache in caches]
    tokens = 0
    for number, feed in enumerate(feeds, 1):
        presents = session.run(feed, names)
        for cache, present, mine in zip(caches, presents, seen, strict=True):
            past = np.shape(feed[cache.name])[TOKENS_AXIS] if cache.name in feed else 0
            # a cache that is a buffer of fixed length does not grow: all of it may be new
            new = present[:, :, past if past < present.shape[TOKENS_AXIS] else 0 :]
            mine.add(new, f"sample {number}")
        tokens += math.prod(new.shape[:1]) * int(new.shape[TOKENS_AXIS])
    empty = next((mine for mine in seen if not mine.lo.size), None)
    if empty is not None:
        raise DataError("the samples put no token into the caches: give at least one text.")
    return seen, tokens
