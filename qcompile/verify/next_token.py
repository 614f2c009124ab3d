"""How well a language model foretells texts: the loss of each next token, from samples with token ids."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.run.session import Feed
from qcompile.verify.compare import Runner

Array = npt.NDArray[Any]
IDS, MASK = "input_ids", "attention_mask"
MOST_TOKENS = 4096
_ROWS = 64  # of logits at once: vocabularies are large


@dataclasses.dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood over so many tokens, in nats."""

    mean: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """That many tokens are as likely as the right one, e to the mean; infinite beyond float64."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


def next_token_loss(
    runner: Runner, logits: str, feeds: Iterable[Feed], most: int = MOST_TOKENS
) -> Loss | None:
    """The loss of the tokens in the feeds, each told from those before it; None if there is nothing to tell.

    What `attention_mask` hides does not count. A feed of one token has none to tell.

    Args:
        runner: runs the feeds.
        logits: name of the output (batch, tokens, vocabulary) with scores of the next token at each one.
        feeds: with `input_ids` (batch, tokens), integers; those without it are passed over. Caches in them hold what
            stands before.
        most: no further feed is run once so many tokens were scored.
    """
    total, count = 0.0, 0
    for feed in feeds:
        if count >= most:
            break
        ids = feed.get(IDS)
        if ids is None or np.ndim(ids) != 2 or np.shape(ids)[1] < 2:
            continue
        scores = runner.run(feed, [logits])[0]
        if scores.shape[:2] != ids.shape or scores.ndim != 3 or ids.max() >= scores.shape[2]:
            return None
        told = shown(feed, ids.shape)[:, 1:] & shown(feed, ids.shape)[:, :-1]
        for row, wanted, counts in zip(scores[:, :-1], ids[:, 1:], told, strict=True):
            total += _loss(row[counts], wanted[counts])
        count += int(told.sum())
    return Loss(total / count, count) if count else None


def shown(feed: Feed, shape: tuple[int, ...]) -> Array:
    """Which tokens of a feed are text: the mask may begin with those in the caches."""
    mask = feed.get(MASK)
    if mask is None or np.ndim(mask) != 2 or np.shape(mask)[1] < shape[1]:
        return np.ones(shape, np.bool_)
    return np.broadcast_to(np.asarray(mask)[:, -shape[1] :] != 0, shape)


def _loss(scores: Array, wanted: Array) -> float:
    """Sum of -log p(wanted) over rows (tokens, vocabulary) of logits."""
    total = 0.0
    for start in range(0, len(scores), _ROWS):
        rows = scores[start : start + _ROWS].astype(np.float64)
        peak = rows.max(axis=1)
        norm = peak + np.log(np.exp(rows - peak[:, None]).sum(axis=1))
        chosen = rows[np.arange(len(rows)), wanted[start : start + _ROWS]]
        total += float((norm - chosen).sum())
    return total
