"""Samples in groups: the same statistics whether they run one by one or several at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rewrites import parse
from statistic import F32, Feed, assert_same, needs

from qcompile.calib import reading
from qcompile.calib.batches import Batch, batch_size, batches, may_run_together
from qcompile.calib.observe import Settings, observe
from qcompile.calib.reading import Runner
from qcompile.run.probe import Fact, probe

ROWS = parse(
    "g (float[N,8] x) => (float[N,4] y) "
    f"<float[8,4] w = {{{', '.join(str(i % 7 - 3) for i in range(32))}}}> {{ a = MatMul(x, w) y = Relu(a) }}"
)


def samples(count: int, *sizes: int) -> list[tuple[int, Feed]]:
    sizes = sizes or (1,)
    return [
        (i, {"x": np.random.default_rng(i).normal(size=(sizes[i % len(sizes)], 8)).astype(F32)})
        for i in range(count)
    ]


@given(st.integers(0, 40), st.integers(1, 9))
def test_all_samples_in_order_the_first_alone(count: int, size: int) -> None:
    made = list(batches(samples(count), lambda _: size))
    assert [number for batch in made for number in batch.numbers] == list(range(count))
    assert [len(batch.numbers) for batch in made[:1]] == [1] * bool(count)
    assert all(len(batch.numbers) == size for batch in made[1:-1])


def test_sizes() -> None:
    assert batch_size(0, 1 << 30) == batch_size(1000, 1 << 30) == 16
    assert batch_size(4 << 20, 1 << 30) == 4
    assert batch_size(4 << 20, 16 << 20) == 1
    assert batch_size(1 << 30, 1) == 1


def test_alike() -> None:
    numbers, feeds = zip(*samples(3, 2, 2, 5), strict=True)
    assert Batch(numbers[:2], feeds[:2]).alike
    assert not Batch(numbers, feeds).alike
    assert Batch(numbers[:2], feeds[:2]).joined()["x"].shape == (4, 8)
    assert list(Batch(numbers, feeds).singles)[1] == (1, feeds[1])


@pytest.mark.parametrize(
    ("inputs", "small", "together"),
    [("float[N,8] x", True, True), ("float[1,8] x", True, False), ("float[N,8] x, float[2] t", True, False),
     ("float x", True, False), ("float[N,8] x", False, False)],
)  # fmt: skip
def test_which_models_may_run_several(inputs: str, small: bool, together: bool) -> None:
    model = parse(f"g ({inputs}) => (float[A] y) {{ y = Neg(x) }}")
    facts = {"y": Fact(np.dtype(F32), (1000 if small else 1 << 30,))}
    assert may_run_together(model, facts) == together


def runner() -> Runner:
    facts = probe(ROWS, samples(1)[0][1])
    return Runner(ROWS, list(needs("x", "a", "y").values()), facts, counted=4096, threads=1)


def test_together_if_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a whole batch replace single ones once they gave the same bits twice."""
    made = runner()
    runs: list[int] = []
    true_run = reading._Loaded.run

    def counting(self: Any, feed: Feed) -> list[NDArray[Any]]:
        runs.append(len(feed["x"]))
        return true_run(self, feed)

    monkeypatch.setattr(reading._Loaded, "run", counting)
    for start in range(1, 13, 4):
        numbers, feeds = zip(*samples(16)[start : start + 4], strict=True)
        assert made.read(Batch(numbers, feeds)) is not None
    assert made.together
    assert runs == [1, 1, 1, 1, 4, 4] * 2 + [4]


def test_not_if_a_bit_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner()
    true_run = reading._Loaded.run

    def unlike(self: Any, feed: Feed) -> list[NDArray[Any]]:
        return [values + F32(len(feed["x"]) > 1) for values in true_run(self, feed)]

    monkeypatch.setattr(reading._Loaded, "run", unlike)
    numbers, feeds = zip(*samples(4), strict=True)
    found = made.read(Batch(numbers, feeds))
    assert not made.together
    assert found is not None
    assert found[0].high == max(float(feed["x"].max()) for feed in feeds)


@pytest.mark.parametrize("sizes", [(1,), (3,), (2, 2, 5), (1, 2, 3, 4)])
def test_the_statistics_are_the_same(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given_samples = samples(30, *sizes)
    facts = probe(ROWS, given_samples[0][1])

    def found(**settings: Any) -> Any:
        return observe(
            ROWS, needs("x", "a", "y"), lambda: given_samples, facts, Settings(**settings)
        )

    several = found()
    assert several.together
    monkeypatch.setattr(reading, "may_run_together", lambda *_: False)
    apart = found()
    assert not apart.together
    assert_same(several.tensors, apart.tensors, rtol=1e-12)


def test_a_model_that_mixes_its_samples_runs_them_one_by_one() -> None:
    model = parse(
        "g (float[N,8] x) => (float[N,8] y) { m = ReduceMax<keepdims = 1>(x) y = Div(x, m) }"
    )
    given_samples = samples(12)
    facts = probe(model, given_samples[0][1])
    made = observe(model, needs("m", "y"), lambda: given_samples, facts)
    assert not made.together
    assert made.tensors["m"].count == 12
