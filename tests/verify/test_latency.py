"""Which feeds are timed, and what a race tells; no time is asserted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rewrites import parse

import qcompile.verify.latency
from qcompile.run.session import Options, Session
from qcompile.verify.latency import describe, race, typical_feeds

Feed = dict[str, NDArray[Any]]


def tokens(count: int, past: int = 0) -> Feed:
    return {
        "input_ids": np.zeros((1, count), np.int64), "attention_mask": np.ones((1, count + past), np.int64),
        "past_key_values.0.key": np.zeros((1, 4, past, 16), np.float32),
    }  # fmt: skip


def images(*sides: int) -> list[Feed]:
    return [{"x": np.zeros((1, 3, side, side), np.float32)} for side in sides]


def chosen(feeds: list[Feed]) -> list[str]:
    return [name for name, _ in typical_feeds(feeds)]


def test_the_middle_one() -> None:
    assert chosen(images(32)) == ["1x3x32x32"]
    assert chosen(images(36, 32, 30)) == ["1x3x32x32"]
    assert chosen(images(30, 32)) == ["1x3x32x32"]
    assert typical_feeds(images(32))[0][1]["x"].shape == (1, 3, 32, 32)


def test_the_smallest_as_well_if_it_is_much_smaller() -> None:
    assert chosen(images(32, 16, 40)) == ["1x3x32x32", "1x3x16x16"]
    assert chosen(images(32, 23, 40)) == ["1x3x32x32"]


def test_a_decoder_is_timed_on_prefill_and_on_one_token() -> None:
    """However large its cache is at that token."""
    feeds = [tokens(64), tokens(1, 500), tokens(48), tokens(80), tokens(1, 900)]
    assert chosen(feeds) == ["1x48", "1x1"]


def test_feeds_of_caches_only() -> None:
    feeds = [{"past": np.zeros((1, size))} for size in (4, 100, 50)]
    assert chosen(feeds) == ["1x50", "1x4"]


@pytest.mark.parametrize(
    ("feed", "shown"),
    [({}, "no input"), ({"x": np.float32(1)}, "scalar"), ({"x": np.zeros((2, 0))}, "2x0")],
)
def test_shapes_in_words(feed: Feed, shown: str) -> None:
    assert describe(feed) == shown


class Clock:
    """Sessions that take so long, on a clock that only they move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(qcompile.verify.latency.time, "perf_counter", lambda: self.now)

    def session(self, *seconds: float) -> Any:
        times = iter(seconds)
        last = [0.0]
        clock = self

        class Timed:
            runs = 0

            def run(self, feed: object) -> None:
                Timed.runs += 1
                last[0] = next(times, last[0])
                clock.now += last[0]

        return Timed()


def test_medians_and_ratios_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that changes its speed all the time changes the times, not the ratio."""
    clock = Clock(monkeypatch)
    a, b = [10.0, 20.0, 30.0] * 10, [30.0, 10.0, 20.0] * 10
    found = race({"a": clock.session(*a), "b": clock.session(*b)}, {}, seconds=600.0)
    assert found.rounds % 3 == 0
    assert found.speedup == {
        "a": 1.0,
        "b": pytest.approx(1.5),
    }  # of 1/3, 2 and 1.5; the medians are equal
    assert found.ms == {"a": pytest.approx(20_000), "b": pytest.approx(20_000)}


def test_the_first_rounds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = race(
        {"a": clock.session(9, 9, 9, 0.01), "b": clock.session(1, 1, 1, 0.02)}, {}, seconds=100
    )
    assert found.speedup["b"] == pytest.approx(0.5)


def test_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    few = clock.session(0.01)
    assert race({"a": few}, {}, seconds=0.05).rounds == 12
    assert few.runs == 15
    assert race({"a": clock.session(0.01)}, {}, seconds=1.0).rounds == pytest.approx(97, abs=1)
    assert race({"a": clock.session(0.001)}, {}, seconds=10.0, most=50).rounds == 47


def test_very_slow_models_run_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    slow = clock.session(5.0)
    assert race({"a": slow}, {}, seconds=1.0).rounds == 2
    assert slow.runs == 3


def test_a_real_race() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Neg(x) }")
    session = Session(model, Options(threads=1))
    found = race({"a": session, "b": session}, {"x": np.ones(4, np.float32)}, seconds=0.01)
    assert found.speedup["a"] == 1
    assert found.speedup["b"] > 0
    assert found.ms["a"] > 0
