"""Calibration and held-out samples: disjoint, the same each time, and few enough in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import qcompile.calib.split
from qcompile.calib.split import Samples
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
    assert samples.few(4) is samples.few(4)
    assert source.made == 50
    assert numbers(samples.few(2)) != numbers(samples.few(4))


def test_the_first() -> None:
    source = Source(50)
    assert int(Samples(source).first()["x"][0]) == 0
    assert source.made == 1
