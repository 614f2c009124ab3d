"""The float model and a result on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rewrites import parse

import qcompile.verify.compare
from qcompile.errors import DataError
from qcompile.run.session import Feed, Options, Session
from qcompile.verify.compare import Comparison, Reference
from qcompile.verify.metrics import Error, Part

Array = NDArray[Any]
TEXT = "g (float[N,4] x) => (float[N,4] y, int64[N] i) <float c = {{{c}}}> {{ y = Mul(x, c) i = ArgMax<axis = 1, keepdims = 0>(y) }}"


def session(text: str) -> Session:
    return Session(parse(text), Options(threads=1))


def feeds(count: int = 4, *, ragged: bool = False) -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(1 + i * ragged, 4)).astype(np.float32)} for i in range(count)]


def reference(
    samples: list[dict[str, Array]], text: str = TEXT.format(c=2), **parts: list[Part]
) -> Reference:
    return Reference(session(text), lambda: iter(samples), parts)


class Fixed:
    """Answers with what a function makes of the outputs of a session."""

    def __init__(self, change: Any, text: str = TEXT.format(c=2)) -> None:
        self._session, self._change = session(text), change

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[Array]:
        return list(self._change(*self._session.run(feed, outputs)))


@pytest.mark.parametrize("ragged", [False, True])
def test_errors_of_every_output_over_all_samples(ragged: bool) -> None:
    samples = feeds(ragged=ragged)
    found = reference(samples).compare(session(TEXT.format(c=2.02)))
    assert found.samples == 4
    (y,), (i,) = found.outputs["y"], found.outputs["i"]
    assert y.sqnr_db == pytest.approx(40, abs=1e-3)
    assert y.count == sum(feed["x"].size for feed in samples)
    assert i.agreement == 1
    assert found.worst_db == y.sqnr_db
    assert found.noise_to_signal == pytest.approx(1e-4, rel=1e-3)
    assert found.problems() == found.remarks() == []


def test_the_same_model() -> None:
    found = reference(feeds()).compare(session(TEXT.format(c=2)))
    assert found.worst_db == np.inf
    assert found.noise_to_signal == 0


def test_parts_are_judged_beside_the_whole() -> None:
    left = Part("left", 1, 0, 1)
    ref = reference(feeds(), y=[Part("all"), left])
    found = ref.compare(Fixed(lambda y, i: (np.where(np.arange(4) < 1, y + 1, y), i)))
    whole, part = found.outputs["y"]
    assert part.part is left
    assert part.noise == whole.noise
    assert found.worst_db == part.sqnr_db < whole.sqnr_db


def test_a_limit() -> None:
    """As many samples as that, the first ones."""
    ref = reference(feeds(10))
    assert ref.compare(session(TEXT.format(c=3)), 3).samples == 3
    assert ref.compare(session(TEXT.format(c=3)), 3).outputs["y"][0].count == 12
    assert ref.compare(session(TEXT.format(c=3))).samples == 10


def test_reference_outputs_are_kept_and_do_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[object] = []
    true_run = Session.run
    ref = reference(feeds(4))

    def run(self: Session, feed: Feed, outputs: Sequence[str] | None = None) -> list[Array]:
        runs.append(self)
        return true_run(self, feed, outputs)

    other = session(TEXT.format(c=2.1))
    monkeypatch.setattr(Session, "run", run)
    first = ref.compare(other, 2).worst_db
    assert len(runs) == 2 + 2
    ref.compare(other)
    assert len(runs) == 4 + 2 + 4
    assert ref.compare(other, 2).worst_db == first
    assert len(runs) == 10 + 2
    assert ref.compare(Fixed(lambda y, i: (y * 0, i), TEXT.format(c=2)), 2).worst_db == 0
    assert ref.compare(other, 2).worst_db == first


def test_large_outputs_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that fit are, whatever comes after."""
    monkeypatch.setattr(qcompile.verify.compare, "_CACHE_BYTES", 60)  # each has 16 + 8 bytes
    ref = reference(feeds(5))
    wanted = reference(feeds(5)).compare(session(TEXT.format(c=2.1)))
    for _ in range(2):
        found = ref.compare(session(TEXT.format(c=2.1)))
        assert found.outputs["y"][0].noise == pytest.approx(wanted.outputs["y"][0].noise)


# ---- what is lost


def test_values_that_are_not_finite() -> None:
    found = reference(feeds()).compare(Fixed(lambda y, i: (np.where(y > y.min(), y, np.inf), i)))
    assert found.worst_db == -np.inf
    assert found.noise_to_signal == 1e30
    assert found.problems() == ["output 'y': 4 values are lost: not finite, or in no place."]


def test_an_output_that_is_constant() -> None:
    found = reference(feeds()).compare(Fixed(lambda y, i: (np.ones_like(y), i)))
    assert found.problems() == ["output 'y' is constant: all its information is lost."]


def test_another_number_of_rows_is_not_compared() -> None:
    """Of boxes that were found, a result may find more or less."""

    def shorter(y: Array, i: Array) -> tuple[Array, Array]:
        return (y[:-1], i) if y[0, 0] < 0 else (y, i)

    samples = feeds(6, ragged=True)
    short = sum(feed["x"][0, 0] < 0 for feed in samples)
    assert 0 < short < 6
    found = reference(samples).compare(Fixed(shorter))
    assert found.problems() == []
    assert found.worst_db == np.inf
    (error,) = found.outputs["y"]
    assert error.unlike == short
    assert found.remarks() == [
        f"output 'y' has another shape than that of the float model for {short} of 6 samples and was not compared there: "
        "judge the result by your own metric."
    ]


def sized(*factors: float) -> list[dict[str, Array]]:
    """Samples of these sizes."""
    return [
        {"x": feed["x"] * np.float32(f)}
        for feed, f in zip(feeds(len(factors)), factors, strict=True)
    ]


def stepped(y: Array, i: Array) -> tuple[Array, Array]:
    """A step for all samples, as codes have."""
    return np.round(y / 0.1) * 0.1, i


def test_a_sample_that_is_far_worse_than_all_together_is_told() -> None:
    """Of samples that differ a hundredfold the large ones decide; what is lost of the small ones must be said."""
    found = reference(sized(1, 100, 1)).compare(Fixed(stepped))
    (y,) = found.outputs["y"]
    assert len(y.by_sample) == 3
    low = min(y.by_sample)
    assert low < 35
    assert y.by_sample[1] > 60
    assert y.sqnr_db > 60
    assert found.remarks(40) == [
        f"output 'y' has less than the goal of 40 dB SQNR in 2 of 3 samples, {low:.1f} dB in the worst, and {y.sqnr_db:.1f} dB "
        "in all together: judge the result by your own metric on every kind of input."
    ]
    assert found.remarks() == found.remarks(low - 0.1) == []  # good enough in each
    assert found.remarks(y.sqnr_db + 0.1) == []  # the goal is missed, which is said elsewhere


def test_samples_that_differ_a_little_are_not_told() -> None:
    found = reference(sized(1, 1.5, 1)).compare(Fixed(stepped))
    (y,) = found.outputs["y"]
    assert min(y.by_sample) < y.sqnr_db
    assert found.remarks(y.sqnr_db) == []


@pytest.mark.parametrize("factor", [0, 1e-6])
def test_silence_has_no_sqnr_of_its_own(factor: float) -> None:
    found = reference(sized(1, factor, 1)).compare(Fixed(lambda y, i: (y + 0.1, i)))
    (y,) = found.outputs["y"]
    assert len(y.by_sample) == 2
    assert found.remarks(y.sqnr_db) == []


def test_equal_samples_have_no_noise() -> None:
    same = reference(sized(1, 100)).compare(session(TEXT.format(c=2)))
    assert same.outputs["y"][0].by_sample == []
    assert same.remarks(18) == []


def test_another_rank_is_an_error() -> None:
    found = reference(feeds()).compare(Fixed(lambda y, i: (y[0], i)))
    assert found.worst_db == -np.inf
    assert found.problems()


def test_indices_that_differ() -> None:
    found = reference(feeds(8)).compare(Fixed(lambda y, i: (y, np.where(y[0, 0] < 0, i, i + 1))))
    (error,) = found.outputs["i"]
    assert error.agreement is not None
    assert 0 < error.agreement < 1
    assert found.worst_db == pytest.approx(-10 * np.log10(1 - error.agreement))


def test_nan_in_the_reference_names_the_sample() -> None:
    samples = feeds(3)
    samples[1]["x"] = -np.ones((1, 4), np.float32)
    root = "g (float[N,4] x) => (float[N,4] y) { a = Abs(x) b = Sqrt(x) c = Mul(x, a) y = Sqrt(c) }"
    samples[0]["x"] = samples[2]["x"] = np.ones((1, 4), np.float32)
    ref = Reference(session(root), lambda: iter(samples), {}, lambda n: f"sample {10 * n} of these")
    with pytest.raises(
        DataError, match="output 'y' is NaN for sample 10 of these: the float model itself fails"
    ):
        ref.compare(session(root))
    assert Reference(session(root), lambda: iter(samples), {}).compare(session(root)).samples == 3


def test_what_is_no_number_is_left_out() -> None:
    text = "g (string[2] s, float[2] x) => (string[2] t, float[2] y) { t = Identity(s) y = Neg(x) }"
    samples = [{"s": np.array(["a", "b"], object), "x": np.ones(2, np.float32)}]
    found = Reference(session(text), lambda: iter(samples), {}).compare(session(text))
    assert found.outputs["t"][0].count == 0
    assert found.worst_db == np.inf


def test_sequences_are_left_out() -> None:
    text = (
        "g (float[2] x) => (seq(float[2]) s, float[2] y) { s = SequenceConstruct(x, x) y = Neg(x) }"
    )
    samples = [{"x": np.ones(2, np.float32)}]
    found = Reference(session(text), lambda: iter(samples), {}).compare(session(text))
    assert found.worst_db == np.inf


def test_sequences_of_several_shapes_are_left_out() -> None:
    text = (
        "g (float[3] x) => (seq(float[?]) s, float[3] y) <int64[2] n = {1, 2}> "
        "{ s = SplitToSequence(x, n) y = Neg(x) }"
    )
    samples = [{"x": np.ones(3, np.float32)}]
    found = Reference(session(text), lambda: iter(samples), {}).compare(session(text))
    assert found.worst_db == np.inf
    assert found.outputs["y"][0].count == 3


def test_nothing_compared() -> None:
    empty = Comparison({"y": [Error(Part("all"))]}, 0)
    assert empty.worst_db == np.inf
    assert empty.noise_to_signal == 0
