"""Decoding with a cache: the same as reading all at once, with float and with integer caches."""

from __future__ import annotations

import math

import numpy as np
import pytest
from decoders import VOCABULARY, attention, decoder, text_feed
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import parse, run

from qcompile.decode import Comparison, Decoder, compare, one_more
from qcompile.errors import DataError, ModelError
from qcompile.kv import quantize_kv_cache
from qcompile.run.session import Session

TEXT = [int(i) for i in np.random.default_rng(3).integers(0, VOCABULARY, 24)]
FLOAT = Decoder(decoder(), threads=1)


def logits(ids: list[int]) -> np.ndarray:
    """Of all tokens, read at once by the float model."""
    found: np.ndarray = run(decoder(), text_feed(ids))[0][0]
    return found


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
@settings(deadline=None, max_examples=20)
def test_pieces_give_what_the_whole_gives(pieces: list[int]) -> None:
    FLOAT.reset()
    ends = np.cumsum(pieces)
    parts = [FLOAT.read(TEXT[end - size : end]) for end, size in zip(ends, pieces, strict=True)]
    wanted = logits(TEXT[: ends[-1]])
    np.testing.assert_allclose(np.concatenate(parts), wanted, rtol=1e-4, atol=1e-4)
    assert FLOAT.length == ends[-1]
    assert FLOAT.cache_bytes == 2 * 2 * 4 * 4 * ends[-1]


def test_greedy_tokens_are_those_of_reading_everything_again() -> None:
    ids = TEXT[:3]
    for _ in range(8):
        ids = [*ids, int(logits(ids)[-1].argmax())]
    assert FLOAT.greedy(TEXT[:3], 8) == ids[3:]


def test_surprise_is_the_mean_over_the_tokens_scored() -> None:
    table = logits(TEXT).astype(np.float64)
    table -= np.log(np.exp(table).sum(axis=1, keepdims=True))
    wanted = -np.mean([table[i - 1, TEXT[i]] for i in range(5, len(TEXT))])
    for piece in (1, 4, 50):
        assert FLOAT.surprise(TEXT, first=5, piece=piece) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_step_by_step_equals_prefill_with_integer_caches(kind: str) -> None:
    made, _ = quantize_kv_cache(decoder(), [text_feed(TEXT)], kind=kind)  # type: ignore[arg-type]
    other = Decoder(made, threads=1)
    whole = other.read(TEXT)
    other.reset()
    steps = np.concatenate([other.read([token]) for token in TEXT])
    # old codes are copied, not rounded again, so that only the order of sums differs
    np.testing.assert_allclose(steps, whole, rtol=1e-4, atol=1e-4)
    assert 0 < np.abs(whole - logits(TEXT)).max() < 0.05 * np.abs(whole).max()
    assert other.cache_bytes == 2 * 2 * 4 * len(TEXT)


def test_a_model_is_the_same_as_itself() -> None:
    found = compare(FLOAT, FLOAT, TEXT[:3], [TEXT], tokens=10, first=4, piece=5)
    assert found.differs is None
    assert found.change == 0
    assert "10 tokens is the same; perplexity" in str(found)


def test_another_model_is_told_apart() -> None:
    other = Decoder(decoder(seed=1), threads=1)
    found = compare(FLOAT, other, TEXT[:3], [], tokens=10)
    ours, theirs = other.greedy(TEXT[:3], 10), FLOAT.greedy(TEXT[:3], 10)
    assert found.differs is not None
    assert ours[: found.differs - 1] == theirs[: found.differs - 1]
    assert ours[found.differs - 1] != theirs[found.differs - 1]
    assert str(found).endswith(f"is another from token {found.differs} on")


def test_a_comparison_in_words() -> None:
    found = Comparison(200, None, (math.log(20), math.log(21)))
    assert found.perplexity == pytest.approx((20, 21))
    assert str(found).endswith("perplexity 20.000 -> 21.000 (+5.00 %)")


@pytest.mark.parametrize("first", [0, len(TEXT)])
def test_a_text_that_is_too_short(first: int) -> None:
    with pytest.raises(DataError, match=f"24 tokens, scored from number {first}"):
        FLOAT.surprise(TEXT, first=first, piece=1)


def test_models_that_are_no_decoders() -> None:
    with pytest.raises(ModelError, match="no input is joined with new tokens"):
        Decoder(parse("g (float[1,2] x) => (float[1,2] y) { y = Neg(x) }"))
    with pytest.raises(ModelError, match="the model takes q, k, v: a decoder takes input_ids"):
        Decoder(attention())
    with pytest.raises(ModelError, match="'past' is no cache: Neg reads it"):
        Decoder(parse("g (float[1,2,P,4] past) => (float[1,2,P,4] y) { y = Neg(past) }"))


def test_a_cache_of_unknown_width() -> None:
    text = """g (int64[1,2,S,4] input_ids, float[1,2,P,W] past) => (int64[1,2,S,4] y, float[1,2,T,W] present) {
        y = Neg(input_ids) e = Cast<to = 1>(y) present = Concat<axis = 2>(past, e) }"""
    with pytest.raises(ModelError, match="of cache 'past' leaves heads or width open: fix them"):
        Decoder(parse(text))


def test_one_more_token_behind_a_feed() -> None:
    model = decoder()
    session = Session(model)
    ids = np.array([[1, 2, 3, 4]])
    cache = np.zeros((1, 2, 0, 4), np.float32)
    feed = {"input_ids": ids[:, :3], "attention_mask": np.ones((1, 3), np.int64), "past_k": cache, "past_v": cache}  # fmt: skip
    step = one_more(model, session, feed)
    assert step is not None
    assert {name: v.shape for name, v in step.items()} == {
        "input_ids": (1, 1), "attention_mask": (1, 4), "past_k": (1, 2, 3, 4), "past_v": (1, 2, 3, 4),
    }  # fmt: skip
    # the same as if all had been read at once
    step["input_ids"] = ids[:, 3:]
    whole = session.run(
        {**feed, "input_ids": ids, "attention_mask": np.ones((1, 4), np.int64)}, ["logits"]
    )[0]
    np.testing.assert_allclose(session.run(step, ["logits"])[0][0, 0], whole[0, -1], rtol=1e-4)


def test_no_further_token_without_ids_or_caches() -> None:
    model = decoder()
    session = Session(model)
    assert one_more(model, session, {}) is None
    plain = parse("g (int64[B,S] input_ids) => (float[B,S] y) { y = Cast<to = 1>(input_ids) }")
    assert one_more(plain, Session(plain), {"input_ids": np.ones((1, 2), np.int64)}) is None
