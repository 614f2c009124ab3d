"""Statistics of a model's tensors against NumPy: one pass, several, in batches, with bad samples."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import parse
from statistic import F32, NAMES, NET, Feed, assert_same, by_hand, counts, feeds, needs, watch

from qcompile.calib import reading
from qcompile.calib.fold import fold
from qcompile.calib.histogram import Histogram
from qcompile.calib.observe import Settings, observe
from qcompile.errors import DataError
from qcompile.run.probe import probe
from qcompile.step import Need


@pytest.mark.parametrize("ragged", [False, True])
def test_against_numpy(ragged: bool) -> None:
    samples = feeds(ragged=ragged)
    found = watch(samples)
    assert (found.samples, found.passes, found.bad) == (5, 1, ())
    assert list(found.tensors) == list(NAMES)
    for name, stats in found.tensors.items():
        values = [by_hand(feed["x"])[name] for feed in samples]
        lows, highs = stats.extremes.lows, stats.extremes.highs
        np.testing.assert_allclose(lows, [v.min() for v in values], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(highs, [v.max() for v in values], rtol=1e-5, atol=1e-6)
        assert stats.count == sum(v.size for v in values)
    # no MatMul, no Conv: the last axis has the channels, and its length varies
    assert (found.tensors["b"].channels is None) == ragged
    whole = np.concatenate([by_hand(feed["x"])["b"].ravel() for feed in samples])
    exact = Histogram()
    exact.count(whole)
    assert counts(found.tensors["b"].histogram) == counts(exact)


def test_channels_about_convolutions() -> None:
    model = parse(
        "g (float[N,3,5,5] x) => (float[N,2,5,5] y) <float[2,3,1,1] w = {1, 2, 3, 4, 5, 6}> "
        "{ a = Relu(x) y = Conv(a, w) }"
    )
    samples = feeds(4, side=5)
    found = watch(samples, model, ("x", "a", "y")).tensors
    together = np.maximum(np.concatenate([feed["x"] for feed in samples]), 0)
    made = found["a"].channels
    assert made is not None
    assert (made.axis, made.count) == (1, 100)
    np.testing.assert_allclose(made.mean(), together.mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(
        made.second_moment(), np.square(together).mean(axis=(0, 2, 3)), rtol=1e-5
    )
    np.testing.assert_array_equal(made.peak(), together.max(axis=(0, 2, 3)))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("memory", "passes"), [(1, 6), (2 * 432, 3), (4 * 432, 2), (6 * 432, 1)])
def test_little_memory_takes_more_passes_and_finds_the_same(
    memory: int, passes: int, ragged: bool
) -> None:
    """A tensor of the first sample has 108 numbers, 432 bytes; ragged ones 2 x 3 x 2 x 7 or so."""
    samples = feeds(ragged=ragged)
    whole, parts = watch(samples), watch(samples, memory=memory if not ragged else memory * 7 // 18)
    assert parts.passes == passes
    assert parts.samples == whole.samples == 5
    assert_same(parts.tensors, whole.tensors, rtol=1e-12)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_nothing(workers: int) -> None:
    samples = feeds(12)
    assert_same(watch(samples, workers=workers).tensors, watch(samples).tensors)


def test_two_runs_are_the_same_to_the_bit() -> None:
    samples = feeds(9)
    first, second = (watch(samples, workers=2).tensors["d"].channels for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.sums.tobytes() == second.sums.tobytes()
    assert first.squares.tobytes() == second.squares.tobytes()


def test_only_what_is_asked_for() -> None:
    samples = feeds(2)
    wanted = {"b": Need("b"), "c": Need("c", histogram=True), "d": Need("d", channels=True)}
    found = observe(NET, wanted, lambda: enumerate(samples), {}).tensors
    assert [found[n].histogram is None for n in "bcd"] == [True, False, True]
    assert [found[n].channels is None for n in "bcd"] == [True, True, False]


def test_gram() -> None:
    model = parse(
        "g (float[N,3] x) => (float[N,2] y) <float[3,2] w = {1, 2, 3, 4, 5, 6}> { y = MatMul(x, w) }"
    )
    samples = [{"x": np.random.default_rng(i).normal(size=(4, 3)).astype(F32)} for i in range(5)]
    wanted = {"x": Need("x", gram=True)}
    made = observe(model, wanted, lambda: enumerate(samples), {}).tensors["x"]
    rows = np.concatenate([feed["x"] for feed in samples]).astype(np.float64)
    assert made.gram is not None
    np.testing.assert_allclose(made.gram, rows.T @ rows, rtol=1e-5)
    assert made.rows == 20


def test_the_model_is_not_changed() -> None:
    before = ir.to_onnx_text(NET)
    watch(feeds(2), memory=1)
    assert ir.to_onnx_text(NET) == before


def test_progress() -> None:
    """After each sample, the number of the pass and how many there are."""
    ticks: list[tuple[int, int]] = []
    samples = feeds(3)
    facts = probe(NET, samples[0])
    observe(
        NET, needs("a", "b", "c", channels=False, histogram=False), lambda: enumerate(samples), facts, Settings(900, workers=1),
        lambda number, passes: ticks.append((number, passes)),
    )  # fmt: skip
    assert ticks == [(0, 2)] * 3 + [(1, 2)] * 3


def test_without_samples() -> None:
    found = observe(NET, needs("a"), lambda: iter(()), {})
    assert found.samples == 0
    assert found.tensors["a"].count == 0


# ---- what is odd


LOG = parse("g (float[N] x) => (float[N] y) { a = Neg(x) b = Log(x) y = Add(a, b) }")


def numbered(*rows: tuple[int, list[float]]) -> list[tuple[int, Feed]]:
    return [(number, {"x": np.array(values, F32)}) for number, values in rows]


def test_nan_names_tensor_sample_and_index() -> None:
    samples = numbered((3, [1, 2]), (7, [0.5, -1]), (9, [-1, -1]))
    with pytest.raises(
        DataError, match=r"tensor 'b' is NaN at index \[1\] for sample 7 of the cal.*--skip-bad"
    ):
        observe(LOG, needs("a", "b"), lambda: samples, {})


@pytest.mark.parametrize("memory", [1, 1 << 20])
def test_bad_samples_can_be_left_out(memory: int) -> None:
    """Of every tensor alike, also of those that an earlier pass has seen."""
    samples = numbered((3, [1, 2]), (7, [0.5, -1]), (9, [-4, -1]), (11, [2, 3]))
    facts = probe(LOG, samples[0][1])
    found = observe(
        LOG, needs("a", "b"), lambda: samples, facts, Settings(memory, skip_bad=True, workers=1)
    )
    assert found.passes == (2 if memory == 1 else 1)
    assert [bad.sample for bad in found.bad] == [7, 9]
    assert found.samples == 2
    assert (found.tensors["a"].low, found.tensors["a"].high) == (-3, -1)
    assert found.tensors["a"].extremes.samples == found.tensors["b"].extremes.samples == 2


def test_no_good_sample() -> None:
    with pytest.raises(
        DataError, match=r"tensor 'b' is NaN .* and every other sample is bad as well"
    ):
        observe(
            LOG, needs("b"), lambda: numbered((0, [-1]), (1, [-2])), {}, Settings(skip_bad=True)
        )


def test_an_infinity_in_a_later_sample_is_bad() -> None:
    samples = numbered((0, [1, 2]), (1, [0, 1]))
    with pytest.raises(DataError, match=r"tensor 'b' is infinite at index \[0\] for sample 1"):
        observe(LOG, needs("b"), lambda: samples, {})


def test_an_infinity_in_every_sample_belongs_to_the_model() -> None:
    """So does one in the first: it is counted, and the range is that of the finite values."""
    samples = numbered((0, [0, 1, 4]), (1, [0, 0, 2]))
    made = observe(LOG, needs("b"), lambda: samples, {}).tensors["b"]
    assert (made.infinite, made.count, made.bounded) == (3, 3, False)
    assert (made.low, made.high) == (0, pytest.approx(np.log(4)))


@pytest.mark.parametrize("mask", ["-1e9", "-3e38"])
def test_with_a_mask_infinities_are_expected(mask: str) -> None:
    model = parse(
        f"g (float[N] x) => (float[N] z) <float m = {{{mask}}}> "
        "{ b = Log(x) c = Greater(x, b) y = Where(c, b, m) z = Softmax(y) }"
    )
    samples = numbered((0, [1, 2]), (1, [0, 1]))
    made = observe(model, needs("b", "z"), lambda: samples, {}).tensors
    assert (made["b"].infinite, made["z"].infinite) == (1, 0)


def test_empty_tensors_count_as_nothing() -> None:
    samples = [{"x": np.zeros((1, 3, 0, 4), F32)}, *feeds(1), {"x": np.zeros((1, 3, 2, 0), F32)}]
    made = watch(samples)
    assert made.samples == 3
    assert made.tensors["a"].extremes.samples == 1


def test_float16() -> None:
    model = parse("g (float16[N,3] x) => (float16[N,3] y) { a = Neg(x) y = Relu(a) }")
    samples = [
        {"x": np.array([[1, -2, 3]], np.float16)},
        {"x": np.array([[0.5, 6, 3]], np.float16)},
    ]
    made = watch(samples, model, ("a", "y")).tensors
    assert (made["a"].low, made["a"].high, made["y"].high) == (-6, 2, 2)


def test_shapes_that_follow_from_values() -> None:
    model = parse(
        "g (float[N] x) => (int64[1,M] i) { a = Neg(x) b = Relu(a) n = NonZero(b) i = Identity(n) }"
    )
    samples = [{"x": np.array(row, F32)} for row in ([1, -2, -3], [-1, -2, -3], [1, 1, 1])]
    made = watch(samples, model, ("a", "n")).tensors
    assert made["n"].count == 2 + 3
    assert made["a"].count == 9


def peak(count: int) -> int:
    """Bytes that were held at once, above what there was, when so many samples of 0.75 MB are observed."""
    one = np.random.default_rng(0).normal(size=(1, 3, 256, 256)).astype(F32)

    def samples() -> Iterator[tuple[int, Feed]]:
        yield from ((i, {"x": one}) for i in range(count))

    facts = probe(NET, {"x": one})
    tracemalloc.start()
    try:
        observe(NET, needs(*NAMES), samples, facts)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_samples() -> None:
    few, many = peak(30), peak(120)
    assert few > 65536 * 4  # NumPy's arrays are counted at all
    assert many < 1.5 * few  # how many batches wait at once is a matter of timing


def test_a_fold_is_what_a_run_leaves() -> None:
    x = feeds(1)[0]["x"]
    one = fold([x], Need("x", histogram=True, channels=True), -1, 4096)
    assert one is not None
    assert_same({"x": one}, {"x": watch([{"x": x}], names=("x",)).tensors["x"]})


def test_an_error_of_the_data_is_not_hidden() -> None:
    def broken() -> Iterator[tuple[int, Feed]]:
        yield from enumerate(feeds(3))
        raise DataError("the disk is gone.")

    with pytest.raises(DataError, match="the disk is gone"):
        observe(NET, needs("a"), broken, {})


# ---- what a review found


def test_infinities_are_trusted_in_the_first_good_sample_only() -> None:
    """Whatever stood before it, and whoever runs together with it."""
    rows = {"good": [1.0, 2.0], "nan": [-1.0, 1.0], "inf": [0.0, 1.0]}
    for words in ("nan good inf good", "good nan inf good", "nan nan good inf"):
        order = words.split()
        samples = numbered(*((i, rows[name]) for i, name in enumerate(order)))
        found = observe(LOG, needs("b"), samples.__iter__, {}, Settings(skip_bad=True))
        assert [bad.sample for bad in found.bad] == [i for i, n in enumerate(order) if n != "good"]
        assert found.tensors["b"].bounded


@pytest.mark.parametrize(
    ("workers", "memory", "threads"), [(1, 1 << 20, 1), (2, 1 << 20, 1), (2, 6 * 432, 2), (0, 1, 0)]
)
def test_threads_of_a_run(
    workers: int, memory: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One each while several run; alone, all that were allowed."""
    seen: set[int] = set()
    true = reading.Options

    def options(level: str, number: int, **more: bool) -> reading.Options:
        seen.add(number)
        return true(level, number, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(reading, "Options", options)
    watch(feeds(3), workers=workers, memory=memory)
    assert seen == {threads}
