"""Runs a decoder with its cache: token by token, or a text in pieces. The cache may be of any type."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from qcompile.errors import DataError, ModelError
from qcompile.graph import io
from qcompile.graph.kv_cache import Cache, find_caches
from qcompile.run.session import Feed, Options, Session

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]

IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"


class Decoder:
    """A decoder loaded for batch 1, and the cache of the tokens that it has read."""

    def __init__(
        self, model: ir.Model | Path, *, threads: int = 0, session: Session | None = None
    ) -> None:
        """The cache is empty.

        Args:
            model: takes `input_ids` and, if it likes, `attention_mask` and `position_ids`, int64 or int32, beside
                its caches; its first other output holds logits (1, tokens, vocabulary).
            threads: of ORT.
            session: of the model, if there is one already.

        Raises:
            ModelError: there is no cache, an input that cannot be filled, or ORT refuses the model.
        """
        opened = model if isinstance(model, ir.Model) else io.load(model)
        graph = opened.graph
        caches, reasons = find_caches(opened)
        if not caches or reasons:
            raise ModelError(f"the model cannot be decoded with a cache: {no_cache(reasons)}.")
        self._caches = caches
        known = {IDS, MASK, POSITIONS, *(cache.name for cache in caches)}
        others = [v.name for v in graph.inputs if v.name not in known and not v.is_initializer()]
        if others or all(v.name != IDS for v in graph.inputs):
            raise ModelError(
                f"the model takes {', '.join(map(str, others)) or 'no ' + IDS}: a decoder takes {IDS}, {MASK}, "
                f"{POSITIONS} and its caches."
            )
        self._session = session or Session(model, Options("all", threads=threads))
        self._types = {item.name: item.dtype for item in self._session.inputs}
        presents = [cache.present.name or "" for cache in caches]
        logits = [item.name for item in self._session.outputs if item.name not in presents]
        self._outputs = [*logits[:1], *presents]
        self.reset()

    def reset(self) -> None:
        """The cache is empty."""
        self.past: dict[str, npt.NDArray[Any]] = {
            cache.name: np.zeros(_empty(cache), self._types[cache.name]) for cache in self._caches
        }
        self.length = 0

    @property
    def cache_bytes(self) -> int:
        """What the cache takes."""
        return sum(values.nbytes for values in self.past.values())

    def read(self, ids: Sequence[int]) -> F32:
        """The logits (tokens, vocabulary) after each of the tokens, which are in the cache now.

        Raises:
            ModelError: ORT cannot run the model.
        """
        start, stop = self.length, self.length + len(ids)
        plain = {
            IDS: np.array([ids], np.int64), MASK: np.ones((1, stop), np.int64),
            POSITIONS: np.arange(start, stop, dtype=np.int64)[None],
        }  # fmt: skip
        feed = {
            name: plain[name].astype(self._types[name]) for name in plain if name in self._types
        }
        logits, *presents = self._session.run({**feed, **self.past}, self._outputs)
        self.past = dict(zip(self.past, presents, strict=True))
        self.length = stop
        return np.asarray(logits[0], np.float32)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that follow, each the likeliest, from an empty cache."""
        return list(itertools.islice(self.follow(prompt), count))

    def follow(self, prompt: Sequence[int]) -> Iterator[int]:
        """The tokens that follow without end, each the likeliest, from an empty cache.

        Raises:
            ModelError: ORT cannot run the model, as where it has no more positions.
        """
        self.reset()
        token = int(self.read(prompt)[-1].argmax())
        while True:
            yield token
            token = int(self.read([token])[-1].argmax())

    def surprise(self, ids: Sequence[int], *, first: int, piece: int) -> float:
        """Mean negative log-likelihood of the tokens from `first` on, read through the cache.

        The tokens before `first` are read at once, the others in pieces, so that all of them but those of the
        same piece come out of the cache.

        Raises:
            DataError: there are no tokens from `first` on, or none before it.
        """
        if not 0 < first < len(ids):
            raise DataError(f"{len(ids)} tokens, scored from number {first}: give a longer text.")
        self.reset()
        last, total = self.read(ids[:first])[-1:], 0.0
        for start in range(first, len(ids), piece):
            part = list(ids[start : start + piece])
            logits = self.read(part)
            seen = np.concatenate([last, logits[:-1]]).astype(
                np.float64
            )  # what foretells each token
            peak = seen.max(axis=1)
            norm = peak + np.log(np.exp(seen - peak[:, None]).sum(axis=1))
            total += float((norm - seen[np.arange(len(part)), part]).sum())
            last = logits[-1:]
        return total / (len(ids) - first)


def one_more(model: ir.Model, session: Session, feed: Feed) -> Feed | None:
    """The feed of one further token, behind those of `feed`; None if the model is no decoder with caches alone.

    Args:
        model: tells the caches.
        session: of the model; runs `feed`.
        feed: with `input_ids` (batch, tokens), integers.

    Raises:
        ModelError: ORT cannot run the model.
    """
    caches, reasons = find_caches(model)
    ids = feed.get(IDS)
    others = feed.keys() - {IDS, MASK, POSITIONS, *(cache.name for cache in caches)}
    if not caches or reasons or others or ids is None or np.ndim(ids) != 2 or not np.size(ids):
        return None
    presents = session.run(feed, [cache.present.name or "" for cache in caches])
    step = {IDS: ids[:, -1:], **{c.name: p for c, p in zip(caches, presents, strict=True)}}
    if MASK in feed:
        step[MASK] = np.concatenate([feed[MASK], np.ones_like(feed[MASK][:, :1])], axis=1)
    if POSITIONS in feed:
        step[POSITIONS] = feed[POSITIONS][:, -1:] + 1
    return {name: step[name] for name in feed}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two decoders on the same text.

    Attributes:
        tokens: how many were decoded greedily.
        differs: the first token, from 1, that is another one; None: all are the same.
        surprise: mean negative log-likelihood of the texts, of the reference and of the other; NaN without texts.
    """

    tokens: int
    differs: int | None
    surprise: tuple[float, float]

    @property
    def perplexity(self) -> tuple[float, float]:
        """Of the reference and of the other."""
        return math.exp(self.surprise[0]), math.exp(self.surprise[1])

    @property
    def change(self) -> float:
        """Of the perplexity, as a share of the reference's."""
        return math.expm1(self.surprise[1] - self.surprise[0])

    def __str__(self) -> str:
        same = "the same" if self.differs is None else f"another from token {self.differs} on"
        text = f"greedy decoding of {self.tokens} tokens is {same}"
        if math.isnan(self.change):
            return text
        before, after = self.perplexity
        return f"{text}; perplexity {before:.3f} -> {after:.3f} ({100 * self.change:+.2f} %)"


def compare(
    reference: Decoder, other: Decoder, prompt: Sequence[int], texts: Sequence[Sequence[int]], *,
    tokens: int = 200, first: int = 128, piece: int = 64,
) -> Comparison:  # fmt: skip
    """How `other` differs in greedy decoding after `prompt`, and in perplexity over `texts`.

    Raises:
        DataError: a text is too short.
    """
    ours, theirs = other.greedy(prompt, tokens), reference.greedy(prompt, tokens)
    differs = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True), 1) if a != b), None
    )
    surprises = [
        [decoder.surprise(ids, first=first, piece=piece) for ids in texts]
        for decoder in (reference, other)
    ]
    before, after = (float(np.mean(found)) if found else math.nan for found in surprises)
    return Comparison(tokens, differs, (before, after))


def no_cache(reasons: dict[str, str]) -> str:
    """Why no input, or not every one, is a cache."""
    if not reasons:
        return (
            "no input is joined with new tokens into an output (past_key_values.0.key and the like)"
        )
    name, reason = next(iter(reasons.items()))
    more = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    return f"input {name!r} is no cache: {reason}{more}"


def _empty(cache: Cache) -> tuple[int, int, int, int]:
    if cache.heads is None or cache.width is None:
        raise ModelError(
            f"the shape {cache.past.shape} of cache {cache.name!r} leaves heads or width open: fix them."
        )
    return (1, cache.heads, 0, cache.width)
