"""Statistics joined: as if all samples had been one source, and never of what does not belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import conv_net, linear_net, rows, samples, set_weight
from numpy.typing import NDArray

from qcompile.calib import store
from qcompile.calib.histogram import Histogram
from qcompile.calib.split import MOST_HELD_OUT, TUNING
from qcompile.calib.statistics import (
    Key,
    Shard,
    Statistics,
    check_data,
    check_model,
    check_versions,
    merge,
    settle,
)
from qcompile.calib.stats import Extremes, TensorStats
from qcompile.calibrate import calibrate_model
from qcompile.errors import DataError
from qcompile.recipe import Recipe

Feed = dict[str, NDArray[Any]]
VERSIONS = {"qcompile": "1.0", "onnxruntime": "1.23"}
A, B, C = "a" * 64, "b" * 64, "c" * 64


def stats(*values: float) -> TensorStats:
    """Of one sample of these values."""
    array = np.array(values, np.float32)
    low, high = float(array.min()), float(array.max())
    seen = Extremes(1, low, high, array.min(keepdims=True), array.max(keepdims=True))
    made = TensorStats(array.size, low, high, seen, histogram=Histogram())
    assert made.histogram is not None
    made.histogram.count(array)
    return made


def made(
    *values: float, model: str = A, data: str = B, names: Sequence[str] = ("t",), held: int = 1, few: int = 1,
    **more: Any,
) -> Statistics:  # fmt: skip
    """Statistics of tensors with these values; the feeds hold the first letter of the data's digest."""
    key = Key(
        model, "m.onnx", (Shard(f"folder {data[0]}", data, 1),), more.pop("versions", VERSIONS)
    )
    feeds = [{"x": np.array([f"{data[0]}{i}"], object)} for i in range(max(held, few))]
    tensors = {name: stats(*values or (1.0,)) for name in names}
    return Statistics(key, tensors, 1, held=feeds[:held], few=feeds[:few], **more)


def labels(feeds: Sequence[Feed]) -> list[str]:
    return [feed["x"][0] for feed in feeds]


# ---- shards are as good as the whole


def split_feeds(kind: str) -> tuple[Any, list[Feed]]:
    if kind == "conv":
        return conv_net(convs=2, channels=8), [{"x": x[None]} for x in samples(14)]
    return linear_net(), [{"x": x[None]} for x in rows(14)]


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_shards_joined_are_the_whole(kind: str, tmp_path: Path) -> None:
    model, feeds = split_feeds(kind)
    recipe = Recipe(threads=1)
    whole = calibrate_model(model, feeds, recipe=recipe, held_out=0, gram=True).statistics
    files = []
    for i, part in enumerate((feeds[:4], feeds[4:5], feeds[5:])):
        files.append(tmp_path / f"{i}.stats")
        calibrate_model(model, part, output=files[-1], recipe=recipe, held_out=0, gram=True)
    joined = calibrate_model(model, merged=files, output=tmp_path / "all.stats")
    assert (joined.passes, joined.notes) == (0, ())
    found = store.load(tmp_path / "all.stats")
    assert [shard.samples for shard in found.key.shards] == [4, 1, 9]
    assert found.samples == whole.samples == 14
    assert found.key.model == whole.key.model
    assert list(found.tensors) == list(whole.tensors)
    for name, want in whole.tensors.items():
        assert_same_counts(found.tensors[name], want)
        assert_same_moments(found.tensors[name], want)


def assert_same_counts(got: TensorStats, want: TensorStats) -> None:
    """What adds up exactly."""
    for name in ("count", "low", "high", "infinite", "rows"):
        assert getattr(got, name) == getattr(want, name)
    assert got.extremes.samples == want.extremes.samples
    np.testing.assert_array_equal(got.extremes.lows, want.extremes.lows, strict=True)
    np.testing.assert_array_equal(got.extremes.highs, want.extremes.highs, strict=True)
    assert (got.histogram is None) == (want.histogram is None)
    if got.histogram is not None and want.histogram is not None:
        assert got.histogram.zeros == want.histogram.zeros
        bins, wanted = got.histogram.bins(), want.histogram.bins()
        for name in ("low", "high", "counts"):
            np.testing.assert_array_equal(getattr(bins, name), getattr(wanted, name))
    assert (got.channels is None) == (want.channels is None)
    if got.channels is not None and want.channels is not None:
        for name in ("axis", "count", "square_count"):
            assert getattr(got.channels, name) == getattr(want.channels, name)
        np.testing.assert_array_equal(got.channels.lows, want.channels.lows, strict=True)
        np.testing.assert_array_equal(got.channels.highs, want.channels.highs, strict=True)


def assert_same_moments(got: TensorStats, want: TensorStats) -> None:
    """What adds up to the rounding of float64."""
    assert got.extremes.low_sum == pytest.approx(want.extremes.low_sum, rel=1e-12)
    assert got.extremes.high_sum == pytest.approx(want.extremes.high_sum, rel=1e-12)
    if got.channels is not None and want.channels is not None:
        scale = np.sqrt(want.channels.squares * want.channels.square_count)
        assert (np.abs(got.channels.sums - want.channels.sums) <= 1e-12 * scale).all()
        np.testing.assert_allclose(got.channels.squares, want.channels.squares, rtol=1e-12)
    if want.gram is not None:
        assert got.gram is not None
        np.testing.assert_allclose(got.gram, want.gram, atol=1e-12 * want.gram.max(), rtol=0)


# ---- order


def test_parts_follow_each_other_in_order() -> None:
    first = made(1, -3, unobserved={"n": "in a body"}, skipped=2)
    second = made(0.5, 7, data=C, unobserved={"n": "in a body", "k": "no X'X"}, skipped=1)
    found = merge([("one", first), ("two", second)])
    assert found.key == dataclasses.replace(
        first.key, shards=(*first.key.shards, *second.key.shards)
    )
    assert (found.samples, found.skipped, found.forced) == (2, 3, ())
    assert found.unobserved == {"n": "in a body", "k": "no X'X"}
    tensor = found.tensors["t"]
    assert (tensor.count, tensor.low, tensor.high) == (4, -3, 7)
    assert tensor.extremes.lows.tolist() == [-3, 0.5]
    back = merge([("two", second), ("one", first)])
    assert back.tensors["t"].extremes.lows.tolist() == [0.5, -3]
    assert [shard.digest for shard in back.key.shards] == [C, B]
    assert (back.tensors["t"].low, back.tensors["t"].count) == (-3, 4)


def test_parts_are_not_changed() -> None:
    first, second = made(1, -3), made(0.5, 7, data=C)
    merge([("one", first), ("two", second), ("three", made(9, data="d" * 64))])
    for part, wanted in ((first, made(1, -3)), (second, made(0.5, 7, data=C))):
        assert_same_counts(part.tensors["t"], wanted.tensors["t"])
        assert len(part.key.shards) == 1


def test_one_part() -> None:
    found = merge([("one", made(1, 2))])
    assert (found.samples, found.key) == (1, made().key)
    assert_same_counts(found.tensors["t"], stats(1, 2))


# ---- samples that come along


def test_held_out_samples_take_turns() -> None:
    parts = [
        ("one", made(held=3, few=2)), ("two", made(held=1, few=4, data=C)), ("three", made(held=0, few=0, data=A)),
    ]  # fmt: skip
    found = merge(parts)
    assert labels(found.held) == ["b0", "c0", "b1", "b2"]
    assert labels(found.few) == ["b0", "c0", "b1", "c1", "c2", "c3"]


@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_no_more_samples_than_one_source_has(counts: list[int]) -> None:
    digests = [f"{i}" * 64 for i in range(len(counts))]
    found = merge([(d, made(data=d, held=n, few=n)) for d, n in zip(digests, counts, strict=True)])
    assert len(found.held) == min(sum(counts), MOST_HELD_OUT)
    assert len(found.few) == min(sum(counts), TUNING)
    taken = [labels(found.held).count(f"{d[0]}{0}") for d in digests]
    assert taken == [min(n, 1) for n in counts]  # every part has its say
    assert len(set(labels(found.held))) == len(found.held)


def test_samples_to_judge_on() -> None:
    judges = made(held=3, few=2).judges()
    assert (judges.held_out_count, judges.calibration_count) == (3, 1)
    assert labels(list(judges.held_out())) == ["b0", "b1", "b2"]
    with pytest.raises(
        DataError, match=r"without held-out samples to judge a result on: give .* --data too\."
    ):
        made(held=0, few=1).judges()


# ---- what does not belong together

MISMATCHES = {
    "model": (
        {"model": C},
        "two was gathered on another model: m.onnx (cccccccccccc), and this is m.onnx of one (aaaaaaaaaaaa)",
    ),
    "qcompile": (
        {"versions": VERSIONS | {"qcompile": "2.0"}},
        "two was gathered with qcompile 2.0, and this is qcompile 1.0",
    ),
    "onnxruntime": (
        {"versions": {"qcompile": "1.0"}},
        "two was gathered with onnxruntime unknown, and this is onnxruntime 1.23",
    ),
    "data": (
        {"data": B},
        "one and two hold the same data, folder b (bbbbbbbbbbbb), which would count twice",
    ),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_mismatch(kind: str, tmp_path: Path) -> None:
    change, sentence = MISMATCHES[kind]
    parts = [("one", made(1)), ("two", made(**({"data": C} | change)))]
    with pytest.raises(DataError) as caught:
        merge(parts)
    assert str(caught.value) == f"{sentence}. Gather anew, or use it all the same with --force."
    found = merge(parts, force=True)
    assert found.forced == (f"{sentence} (forced).",)
    assert found.samples == 2
    store.save(found, tmp_path / "x.stats")
    again = store.load(tmp_path / "x.stats")
    assert again.forced == found.forced
    last = merge([("x", again), ("y", made(data="d" * 64))])
    assert last.forced == found.forced  # it stays known


def test_all_mismatches_are_recorded() -> None:
    parts = [("one", made()), ("two", made(model=C)), ("three", made(versions={}, data=A))]
    assert len(merge(parts, force=True).forced) == 4


@pytest.mark.parametrize("names", [["t", "u"], ["u"], []])
@pytest.mark.parametrize("force", [False, True])
def test_different_tensors(names: list[str], force: bool) -> None:
    parts = [("one", made()), ("two", made(names=names, data=C))]
    odd = "t" if "t" not in names else "u"
    with pytest.raises(DataError, match=f"only one of one and two knows tensor '{odd}': gather"):
        merge(parts, force=force)


def test_the_order_of_tensors_does_not_matter() -> None:
    found = merge([("one", made(names="tuv")), ("two", made(names="vut", data=C))])
    assert list(found.tensors) == ["t", "u", "v"]


def test_another_model_in_files(tmp_path: Path) -> None:
    model, feeds = conv_net(convs=1, channels=4), [{"x": x[None]} for x in samples(6)]
    calibrate_model(model, feeds[:3], output=tmp_path / "a.stats")
    set_weight(model, "w0", 5)
    calibrate_model(model, feeds[3:], output=tmp_path / "b.stats")
    one, two = (store.load(tmp_path / name).key.model[:12] for name in ("a.stats", "b.stats"))
    with pytest.raises(DataError, match=rf"b\.stats was .* another model: .*{two}.*{one}"):
        merge([(n, store.load(tmp_path / n)) for n in ("a.stats", "b.stats")])


# ---- the checks by themselves


def test_what_fits_gives_no_sentence() -> None:
    found = made()
    assert check_model(found, "x", A, "other name.onnx") == []
    assert check_versions(found, "x", VERSIONS) == []
    assert check_data(found, "x", B, "another folder") == []
    both = merge([("one", found), ("two", made(data=C))])
    assert check_data(both, "x", B, "") == check_data(both, "x", C, "") == []


def test_sentences_name_both_sides() -> None:
    (sentence,) = check_model(made(), "x.stats", C, "other.onnx")
    assert sentence == (
        "x.stats was gathered on another model: m.onnx (aaaaaaaaaaaa), and this is other.onnx (cccccccccccc)"
    )
    both = merge([("one", made()), ("two", made(data=C))])
    (sentence,) = check_data(both, "x.stats", A, "my folder")
    assert sentence == (
        "x.stats was gathered on other data: folder b (bbbbbbbbbbbb) and folder c (cccccccccccc), and this is "
        "my folder (aaaaaaaaaaaa)"
    )
    assert len(check_versions(made(), "x", {"qcompile": "3", "onnxruntime": "4"})) == 2


def test_settle() -> None:
    assert settle([], force=False) == settle([], force=True) == ()
    assert settle(["a", "b"], force=True) == ("a (forced).", "b (forced).")
    with pytest.raises(
        DataError, match=r"^a\. Gather anew, or use it all the same with --force\.$"
    ):
        settle(["a", "b"], force=False)


def test_images_that_were_read_in_another_way(statistics_of_images: list[Statistics]) -> None:
    one, other = statistics_of_images
    with pytest.raises(DataError, match="were not read alike: A, and B"):
        merge([("a", one), ("b", other)])
    assert merge([("a", one), ("b", other)], force=True).forced


@pytest.fixture
def statistics_of_images() -> list[Statistics]:
    def made(digest: str, manner: str) -> Statistics:
        key = Key("m", "m.onnx", (Shard("images", digest, 1, manner),), {})
        return Statistics(key, {}, 1)

    return [made("1", "A"), made("2", "B")]


def test_second_moments_of_one_part_alone() -> None:
    one, two = made(1, data=B), made(2, data=C)
    gram = dataclasses.replace(two.tensors["t"], gram=np.eye(1), rows=1)
    other = dataclasses.replace(two, tensors={"t": gram})
    assert merge([("one", one), ("two", two)]).tensors["t"].gram is None
    with pytest.raises(
        DataError,
        match=r"only one of one and two holds X'X of all its tensors: gather both with --gram, or both without\.",
    ):
        merge([("one", one), ("two", other)])
