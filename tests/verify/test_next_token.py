"""The loss of next tokens, by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from qcompile.verify.next_token import Loss, next_token_loss

WORDS = 5


class Table:
    """A bigram model: logits are a row of a table for each id."""

    def __init__(self) -> None:
        self.logits = np.random.default_rng(0).normal(size=(WORDS, WORDS)).astype(np.float32)
        self.runs = 0

    def run(self, feed: Any, outputs: Sequence[str] | None = None) -> list[Any]:
        """The logits."""
        assert outputs == ["logits"]
        self.runs += 1
        return [self.logits[feed["input_ids"]]]

    def loss(self, first: int, then: int) -> float:
        """Of one token."""
        row = self.logits[first].astype(np.float64)
        return float(np.log(np.exp(row).sum()) - row[then])


def feed(ids: list[list[int]], **more: Any) -> dict[str, Any]:
    return {"input_ids": np.array(ids, np.int64), **more}


def test_mean_over_all_tokens_of_all_samples() -> None:
    table = Table()
    found = next_token_loss(table, "logits", [feed([[0, 1, 2]]), feed([[3, 4], [4, 4]])])
    wanted = [table.loss(*pair) for pair in ((0, 1), (1, 2), (3, 4), (4, 4))]
    assert found is not None
    assert found.tokens == 4
    assert found.mean == pytest.approx(np.mean(wanted), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(np.mean(wanted)), rel=1e-6)


@pytest.mark.parametrize(
    ("mask", "pairs"),
    [
        ([[1, 1, 1, 0]], [(0, 1), (1, 2)]),  # padded behind
        ([[0, 1, 1, 1]], [(1, 2), (2, 3)]),  # padded before
        ([[1, 1, 1, 1, 1, 0, 1]], [(0, 1)]),  # three tokens in the caches
        ([[1]], [(0, 1), (1, 2), (2, 3)]),  # tells nothing of these tokens
    ],
)
def test_what_the_mask_hides_does_not_count(
    mask: list[list[int]], pairs: list[tuple[int, int]]
) -> None:
    table = Table()
    found = next_token_loss(
        table, "logits", [feed([[0, 1, 2, 3]], attention_mask=np.array(mask, np.int64))]
    )
    assert found is not None
    assert found.tokens == len(pairs)
    assert found.mean == pytest.approx(np.mean([table.loss(*pair) for pair in pairs]), rel=1e-6)


def test_rows_are_taken_in_pieces() -> None:
    table, ids = Table(), np.random.default_rng(1).integers(0, WORDS, 200).tolist()
    found = next_token_loss(table, "logits", [feed([ids])])
    wanted = np.mean([table.loss(a, b) for a, b in itertools.pairwise(ids)])
    assert found == Loss(pytest.approx(wanted, rel=1e-6), 199)


def test_enough_is_enough() -> None:
    table = Table()
    found = next_token_loss(table, "logits", [feed([[0, 1, 2, 3]])] * 5, most=4)
    assert found is not None
    assert (found.tokens, table.runs) == (6, 2)


def test_nothing_to_tell() -> None:
    table = Table()
    assert next_token_loss(table, "logits", [feed([[1]]), {"x": np.ones(3)}]) is None
    assert table.runs == 0
    assert next_token_loss(table, "logits", []) is None


def test_what_is_no_logits() -> None:
    class Narrow(Table):
        """Has one id more than scores."""

        def run(self, feed: Any, outputs: Sequence[str] | None = None) -> list[Any]:
            """Too few scores."""
            return [super().run(feed, outputs)[0][..., :4]]

    assert next_token_loss(Narrow(), "logits", [feed([[4, 4]])]) is None


def test_a_loss_beyond_floats_is_infinite() -> None:
    assert Loss(1000.0, 1).perplexity == math.inf
