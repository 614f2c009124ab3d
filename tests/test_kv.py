"""Caches of whole decoders: ranges from samples, what is reported, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from decoders import HEADS, VOCABULARY, WIDTH, attention, decoder, grouped, text_feed
from rewrites import parse

from qcompile.decode import Decoder, compare
from qcompile.errors import DataError, ModelError, RecipeError
from qcompile.kv import quantize_kv_cache
from qcompile.quant.cache import turned

RNG = np.random.default_rng(5)
TEXTS = [[int(i) for i in RNG.integers(0, VOCABULARY, n)] for n in (30, 1, 12)]
FEEDS = [text_feed(ids) for ids in TEXTS]


def scale(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def keys(ids: list[int]) -> np.ndarray:
    """What the float model puts into its cache of keys."""
    reader = Decoder(decoder(), threads=1)
    reader.read(ids)
    return reader.past["past_k"]


def test_scales_cover_what_the_samples_put_into_the_cache() -> None:
    model = decoder()
    text = ir.to_onnx_text(model)
    made, report = quantize_kv_cache(model, FEEDS)
    assert ir.to_onnx_text(model) == text
    peaks = np.max([turned(keys(ids)).max(axis=(0, 2)) for ids in TEXTS], axis=0)
    np.testing.assert_allclose(scale(made, "present_k_scale")[0, :, 0] * 127, peaks, rtol=1e-5)
    assert report.changed == ("past_k", "past_v")
    assert report.skipped == {}
    assert report.token_bytes == (4 * 2 * HEADS * WIDTH, 2 * HEADS * WIDTH)
    assert report.scale_bytes == 4 * 2 * HEADS * WIDTH
    assert report.tokens == sum(map(len, TEXTS))
    assert str(report).startswith(
        "2 caches as int8: 64 -> 16 bytes a token (0.250x), 64 bytes of scales, from 43 tokens"
    )


def test_tokens_of_the_past_are_not_counted_again() -> None:
    reader = Decoder(decoder(), threads=1)
    reader.read(TEXTS[0])
    feed: dict[str, Any] = {
        "input_ids": np.array([TEXTS[2]]), "attention_mask": np.ones((1, 42), np.int64), **reader.past,
    }  # fmt: skip
    made, report = quantize_kv_cache(decoder(), [feed])
    assert report.tokens == len(TEXTS[2])
    np.testing.assert_array_less(0, scale(made, "present_v_scale"))


@pytest.mark.parametrize(("kind", "ratio"), [("int8", 1 / 4), ("uint8", 1 / 4), ("int4", 3 / 16)])
def test_perplexity_stays_close(kind: Any, ratio: float) -> None:
    made, report = quantize_kv_cache(decoder(), FEEDS, kind=kind)
    assert report.ratio == ratio
    found = compare(
        Decoder(decoder(), threads=1), Decoder(made, threads=1), TEXTS[2], TEXTS[:1],
        tokens=20, first=4, piece=6,
    )  # fmt: skip
    assert abs(found.change) < (0.3 if kind == "int4" else 0.01), found


def test_keys_beside_int4_values_are_int8() -> None:
    made, report = quantize_kv_cache(decoder(), FEEDS, kind="int4")
    assert {v.name: v.dtype for v in made.graph.inputs if "past" in str(v.name)} == {
        "past_k": ir.DataType.INT8, "past_v": ir.DataType.UINT8,
    }  # fmt: skip
    assert "2 caches as int4 (keys int8): 64 -> 12 bytes a token" in str(report)
    assert "present_v_offset" in made.graph.initializers
    assert "present_k_offset" not in made.graph.initializers


def test_keys_may_be_int4_too() -> None:
    made, report = quantize_kv_cache(decoder(), FEEDS, kind="int4", key_kind="int4")
    assert report.ratio == 1 / 8
    peaks = np.max([turned(keys(ids)).max(axis=(0, 2)) for ids in TEXTS], axis=0)
    scales = scale(made, "present_k_scale")[0, :, 0]
    assert np.all(scales <= peaks / 7 * 1.0001)
    assert np.any(scales < peaks / 7 * 0.9)  # clipped


def test_group_query_attention_has_no_offsets() -> None:
    rng = np.random.default_rng(0)
    feed: dict[str, Any] = {
        "q": rng.normal(size=(1, 5, 32)).astype(np.float32),
        "k": rng.normal(size=(1, 5, 16)).astype(np.float32),
        "v": rng.normal(size=(1, 5, 16)).astype(np.float32),
        "past_k": np.zeros((1, 2, 0, 8), np.float32), "past_v": np.zeros((1, 2, 0, 8), np.float32),
        "last": np.array([4], np.int32), "total": np.array(5, np.int32),
    }  # fmt: skip
    made, report = quantize_kv_cache(grouped(), [feed], kind="int4")
    assert report.changed == ("past_k", "past_v")
    assert made.graph.node(0).attributes["kv_cache_bit_width"].value == 4


def test_the_same_samples_give_the_same_model() -> None:
    first, second = (quantize_kv_cache(decoder(), FEEDS, kind="int4")[0] for _ in range(2))
    assert ir.to_onnx_text(first) == ir.to_onnx_text(second)


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(RecipeError, match=r"--kv-cache int16 is unknown.*Did you mean 'int"):
        quantize_kv_cache(decoder(), FEEDS, kind="int16")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no input is joined with new tokens"):
        quantize_kv_cache(parse("g (float[1,2] x) => (float[1,2] y) { y = Neg(x) }"), [])
    with pytest.raises(ModelError, match="'past' is no cache: Neg reads it"):
        quantize_kv_cache(
            parse("g (float[1,2,P,4] past) => (float[1,2,P,4] y) { y = Neg(past) }"), []
        )
    with pytest.raises(DataError, match="put no token into the caches"):
        quantize_kv_cache(decoder(), [])
    made, _ = quantize_kv_cache(decoder(), FEEDS)
    with pytest.raises(
        ModelError, match="it holds INT8, not float32: it is quantized already; nor can 1 more"
    ):
        quantize_kv_cache(made, FEEDS)


def test_nan_in_a_cache_is_an_error() -> None:
    ones = np.ones((1, 2, 1, 4), np.float32)
    empty = np.zeros((1, 2, 0, 4), np.float32)
    feed = {"q": ones, "k": ones * np.float32(np.nan), "v": ones, "past_k": empty, "past_v": empty}
    with pytest.raises(DataError, match="sample 1 makes NaN or infinity in the cache 'present_k'"):
        quantize_kv_cache(attention(), [feed])
