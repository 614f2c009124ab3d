"""Calibration and held-out samples: disjoint, the same each time, and few enough in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import qcompile.calib.split
from qcompile.calib.split import MOST_HELD_OUT, TUNING, Samples, StoredSamples, digest_of
from qcompile.errors import DataError

Feed = dict[str, NDArray[Any]]


class Source:
    """Samples that hold their own number; counts how many were made."""

    def __init__(self, count: int, size: int = 1) -> None:
        self.count, self.size, self.made = count, size, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Feed]:
        for number in range(self.count):
            self.made += 1
            yield {"x": np.full(self.size, number, np.float32)}


def numbers(feeds: Iterator[Feed] | list[Feed]) -> list[int]:
    return [int(feed["x"][0]) for feed in feeds]


COUNTS = {
    1: (1, 1),
    2: (1, 1),
    5: (4, 1),
    9: (8, 1),
    10: (8, 2),
    20: (16, 4),
    100: (80, 20),
    1000: (976, 24),
}


@pytest.mark.parametrize("count", COUNTS)
def test_counts(count: int) -> None:
    samples = Samples(Source(count))
    assert (samples.calibration_count, samples.held_out_count) == COUNTS[count]
    assert len(list(samples.calibration())) == samples.calibration_count
    assert len(list(samples.held_out())) == samples.held_out_count
    assert samples.shared == (count == 1)


@given(count=st.integers(2, 400))
def test_disjoint_and_complete(count: int) -> None:
    samples = Samples(Source(count))
    seen = [number for number, _ in samples.calibration()]
    held = numbers(samples.held_out())
    assert sorted([*seen, *held]) == list(range(count))
    assert held == samples.held_out_numbers == sorted(held)
    gaps = np.diff([-1, *held, count])
    assert gaps.max() <= -(-count // len(held)) + 1  # spread over the source
    assert len(seen) == samples.calibration_count


def test_a_number_belongs_to_its_feed() -> None:
    samples = Samples(Source(30))
    assert all(int(feed["x"][0]) == number for number, feed in samples.calibration())


def test_one_sample_serves_for_both() -> None:
    samples = Samples(Source(1))
    assert numbers(feed for _, feed in samples.calibration()) == [0]
    assert numbers(samples.held_out()) == [0]
    assert numbers(samples.few(5)) == [0]


def test_the_same_each_time() -> None:
    first, second = Samples(Source(100)), Samples(Source(100))
    assert first.held_out_numbers == second.held_out_numbers
    before = numbers(first.held_out())
    list(first.calibration())
    assert numbers(first.held_out()) == before


def test_no_samples() -> None:
    with pytest.raises(DataError, match="the calibration data holds no samples"):
        Samples(Source(0))


def test_held_out_feeds_are_kept_on_the_way() -> None:
    source = Source(50)
    samples = Samples(source)
    list(samples.calibration())
    assert source.made == 50
    assert numbers(samples.held_out()) == samples.held_out_numbers
    assert numbers(samples.held_out()) == samples.held_out_numbers
    assert source.made == 50


def test_a_pass_that_was_broken_off_keeps_nothing() -> None:
    samples = Samples(Source(50))
    next(samples.calibration())
    assert numbers(samples.held_out()) == samples.held_out_numbers


def test_large_feeds_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qcompile.calib.split, "_CACHE_BYTES", 4 * 1000 * 3)
    source = Source(50, size=1000)
    samples = Samples(source)
    list(samples.calibration())
    assert numbers(samples.held_out()) == samples.held_out_numbers
    assert source.made == 100
    assert len(samples.few(16)) == 3


@given(count=st.integers(2, 200), most=st.integers(1, 40))
def test_a_few_to_tune_on(count: int, most: int) -> None:
    """Spread over the calibration samples; none of them is held out."""
    samples = Samples(Source(count))
    few = numbers(samples.few(most))
    assert len(few) == min(most, samples.calibration_count)
    assert not set(few) & set(samples.held_out_numbers)
    assert few == sorted(set(few))
    if len(few) > 1:
        assert few[-1] - few[0] >= (count - 1) * (len(few) - 1) / len(few) / 2


def test_a_few_are_read_once() -> None:
    source = Source(50)
    samples = Samples(source)
    assert samples.few(4) == samples.few(4)
    assert numbers(samples.few(2)) != numbers(samples.few(4))
    assert source.made == 50


@given(count=st.integers(1, 200), most=st.integers(1, TUNING))
def test_stored_samples_give_the_same_few(count: int, most: int) -> None:
    """Of the `TUNING` that are stored so many are taken as of the whole source."""
    samples = Samples(Source(count))
    stored = StoredSamples(list(samples.held_out()), samples.few(TUNING), samples.calibration_count)
    assert numbers(stored.few(most)) == numbers(samples.few(most))
    assert numbers(stored.held_out()) == numbers(samples.held_out())
    assert stored.calibration_count == samples.calibration_count
    assert stored.held_out_count == samples.held_out_count == len(stored.held_out_numbers)


def test_the_first() -> None:
    source = Source(50)
    assert int(Samples(source).first()["x"][0]) == 0
    assert source.made == 1


def test_the_first_of_stored_samples() -> None:
    held, few = list(Source(2)), [{"x": np.full(1, 7.0)}]
    assert numbers([StoredSamples(held, few, 9).first()]) == [7]
    assert numbers([StoredSamples(held, [], 9).first()]) == [0]
    stored = StoredSamples(held, few, 9)
    assert numbers(stored.held_out()) == numbers(stored.held_out()) == [0, 1]
    assert stored.held_out_numbers == [0, 1]
    assert not stored.shared


# ---- how many are held out


@pytest.mark.parametrize(
    ("count", "most", "held"),
    [
        (1, 0, 0),
        (1, 1, 1),
        (1, 9, 1),
        (2, 0, 0),
        (30, 0, 0),
        (30, 1, 1),
        (30, 4, 4),
        (30, 9, 9),
        (30, 99, 15),
    ],
)
def test_at_most_so_many_are_held_out(count: int, most: int, held: int) -> None:
    samples = Samples(Source(count), most)
    assert samples.held_out_count == held == len(list(samples.held_out()))
    seen = [number for number, _ in samples.calibration()]
    assert len(seen) == samples.calibration_count
    assert samples.shared == (count == 1 and most > 0)
    if not samples.shared:
        assert sorted([*seen, *samples.held_out_numbers]) == list(range(count))
    assert numbers(samples.held_out()) == samples.held_out_numbers


def test_most_that_are_held_out_unasked() -> None:
    assert Samples(Source(1000)).held_out_count == MOST_HELD_OUT
    assert Samples(Source(1000), 1000).held_out_count == 500


# ---- bad samples


@pytest.mark.parametrize("read", [False, True])
def test_what_is_left_out_is_in_neither_part(read: bool) -> None:
    source = Source(20)
    samples = Samples(source)
    held = samples.held_out_numbers
    if read:
        list(samples.calibration())
        assert numbers(samples.few(99))
    bad = {0, 1, held[1]}
    samples.leave_out(bad)
    wanted = [number for number in held if number != held[1]]
    assert (samples.calibration_count, samples.held_out_count) == (14, 3)
    assert samples.held_out_numbers == wanted == numbers(samples.held_out())
    assert [(n, int(f["x"][0])) for n, f in samples.numbered()] == [(n, n) for n in wanted]
    for _ in range(2):
        seen = [number for number, _ in samples.calibration()]
        assert sorted([*seen, *wanted, *bad]) == list(range(20))
    assert not bad & set(numbers(samples.few(99)))
    samples.leave_out(bad)
    assert (samples.calibration_count, samples.held_out_count) == (14, 3)
    assert numbers(samples.held_out()) == wanted


def test_to_leave_nothing_out_changes_nothing() -> None:
    source = Source(20)
    samples = Samples(source)
    few = samples.few(4)
    samples.leave_out(set())
    assert samples.few(4) == few
    assert source.made == 20


def test_all_held_out_samples_may_be_bad() -> None:
    samples = Samples(Source(20))
    list(samples.calibration())
    samples.leave_out(set(samples.held_out_numbers))
    assert samples.held_out_count == 0
    assert list(samples.held_out()) == list(samples.numbered()) == []
    assert samples.calibration_count == 16 == len(list(samples.calibration()))


def test_the_numbered_ones_are_held_out() -> None:
    samples = Samples(Source(30))
    assert [n for n, _ in samples.numbered()] == samples.held_out_numbers
    assert all(int(feed["x"][0]) == number for number, feed in samples.numbered())


# ---- the digest of the data


class Listed(list[Feed]):
    description = "listed"


def digest(*feeds: Feed) -> str:
    return digest_of(Listed(feeds))


def test_the_digest_is_that_of_the_data_however_it_is_split() -> None:
    whole = digest_of(Source(30))
    assert len(whole) == 64
    for most in (None, 0, 3):
        samples = Samples(Source(30), most)
        list(samples.calibration())
        assert samples.digest == whole
    assert digest_of(Source(29)) != whole
    assert digest_of(Source(30, size=2)) != whole


def test_the_digest_comes_with_the_first_pass() -> None:
    source = Source(30)
    samples = Samples(source)
    list(samples.calibration())
    made = samples.digest
    assert source.made == 30
    samples.leave_out({0, *samples.held_out_numbers[:1]})
    list(samples.calibration())
    assert samples.digest == made
    fresh = Samples(source)
    next(fresh.calibration())  # a pass that is broken off tells nothing
    assert fresh.digest == fresh.digest == made
    assert source.made == 30 + 30 + 1 + 30


def test_each_number_name_type_and_shape_is_in_the_digest() -> None:
    x = np.arange(6, dtype=np.float32)
    other = x.copy()
    other[5] = np.nextafter(other[5], np.float32(9))
    feeds = [
        [{"x": x}], [{"y": x}], [{"x": x.reshape(2, 3)}], [{"x": x.astype(np.float64)}], [{"x": other}],
        [{"x": x.view(np.int32)}], [{"x": x}, {"x": other}], [{"x": other}, {"x": x}],
        [{"x": x, "y": other}], [{"x": other, "y": x}], [{"x": x[:3]}, {"x": x[3:]}], [{"x": x[:0]}], [],
    ]  # fmt: skip
    assert len({digest(*feed) for feed in feeds}) == len(feeds)


def test_the_digest_does_not_see_how_arrays_lie_in_memory() -> None:
    x = np.arange(6.0).reshape(2, 3)
    wanted = digest({"x": x, "y": np.zeros(1)})
    assert digest({"y": np.zeros(1), "x": x}) == wanted
    assert digest({"x": np.asfortranarray(x), "y": np.zeros(1)}) == wanted
    assert digest({"x": np.tile(x, 2)[:, :3], "y": np.zeros(1)}) == wanted


@pytest.mark.parametrize("make", [np.array, lambda v: np.array(v, object)])
def test_the_digest_of_texts(make: Any) -> None:
    texts = [["a", "b"], ["ab", ""], ["a", "B"], [["a"], ["b"]], ["é", "b"]]
    assert len({digest({"x": make(text)}) for text in texts}) == len(texts)
    assert digest({"x": make(["a", "b"])}) == digest({"x": make(["a", "b"])})


def test_the_digest_of_numbers_without_a_shape_and_of_bfloat16() -> None:
    half = np.dtype(ml_dtypes.bfloat16)
    one, two = np.array(1, half), np.array(2, half)
    assert len({digest({"x": v}) for v in (one, two, np.array(1.0), one.view(np.uint16))}) == 4
