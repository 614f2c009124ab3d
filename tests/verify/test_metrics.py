"""Errors of outputs against NumPy, sample by sample."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from qcompile.verify import metrics
from qcompile.verify.metrics import Error, Part, divergence

Array = NDArray[Any]
F32 = np.float32


def error(*pairs: tuple[Any, Any], part: Part | None = None) -> Error:
    made = Error(part or Part("all"))
    for y, z in pairs:
        made.add(np.asarray(y), np.asarray(z))
    return made


def noisy(
    seed: int = 0, shape: tuple[int, ...] = (4, 10), noise: float = 0.1
) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    y = rng.normal(size=shape).astype(F32)
    return y, (y + rng.normal(size=shape) * noise).astype(F32)


@pytest.mark.parametrize("decides", ["", "logits"])
def test_pieces_of_a_large_output_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, decides: Any
) -> None:
    y, z = noisy(shape=(3, 7, 10))
    z[2, 4, 1], y[0, 0, 0] = np.nan, np.inf
    part = Part("all", decides=decides)
    whole = error((y, z), part=part)
    monkeypatch.setattr(metrics, "_AT_ONCE", 25)  # 2 rows
    pieces = error((y, z), part=part)
    assert (pieces.bad, pieces.same, pieces.decisions, pieces.count) == (1, whole.same, 21, 210)
    assert len(pieces.samples) == 1
    assert pieces.sqnr_db == pytest.approx(whole.sqnr_db)
    assert pieces.cosine == pytest.approx(whole.cosine)
    assert pieces.largest == whole.largest
    assert pieces.lost == pytest.approx(whole.lost)


# ---- floats


def test_all_samples_are_one_vector() -> None:
    pairs = [noisy(seed, (2 + seed, 10), 0.1 * (1 + seed)) for seed in range(3)]
    made = error(*pairs)
    y, z = (np.concatenate([p[i].ravel() for p in pairs]).astype(np.float64) for i in (0, 1))
    assert made.sqnr_db == pytest.approx(10 * np.log10((y**2).sum() / ((z - y) ** 2).sum()))
    assert made.cosine == pytest.approx(y @ z / np.linalg.norm(y) / np.linalg.norm(z))
    assert made.largest == pytest.approx(np.abs(z - y).max())
    assert made.count == y.size
    assert not made.bad
    assert not made.dead


@given(scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e18]), noise=st.floats(0.001, 0.5))
def test_the_unit_does_not_matter(scale: float, noise: float) -> None:
    y, z = noisy(noise=noise)
    first = error((y, z))
    scaled = error((y * F32(scale), z * F32(scale)))
    assert scaled.sqnr_db == pytest.approx(first.sqnr_db, abs=1e-3)
    assert scaled.cosine == pytest.approx(first.cosine, abs=1e-6)


def test_equal_outputs() -> None:
    y, _ = noisy()
    made = error((y, y))
    assert made.sqnr_db == math.inf
    assert made.to_dict() == {
        "slice": "all", "sqnr_db": None, "cosine": 1.0, "max_abs_error": 0.0, "agreement": 1.0, "divergence": None, "dead": False,
    }  # fmt: skip


def test_outputs_of_zeros() -> None:
    zeros = np.zeros((2, 3), F32)
    assert error((zeros, zeros)).cosine == 1
    assert error((zeros, zeros + 1)).cosine == 0
    assert error((zeros, zeros + 1)).sqnr_db <= -300
    assert math.isfinite(error((zeros, zeros + 1)).sqnr_db)


def test_agreement_of_the_largest_entry() -> None:
    y = [[1, 2, 3], [3, 2, 1], [0, 5, 0]]
    z = [[1, 3, 2], [3, 2, 1], [0, 5, 4]]
    assert error((F32(y), F32(z))).agreement == pytest.approx(2 / 3)
    assert error((F32([y, y]), F32([z, y]))).agreement == pytest.approx(5 / 6)


@pytest.mark.parametrize("shape", [(5,), (5, 1), ()])
def test_no_decisions_where_there_is_no_choice(shape: tuple[int, ...]) -> None:
    assert error((np.ones(shape, F32), np.ones(shape, F32))).agreement is None


def test_slices_decide_nothing() -> None:
    y, z = noisy()
    assert error((y, z), part=Part("left", 1, 0, 4)).agreement is None


def test_nothing_added() -> None:
    made = error((np.zeros((0, 3), F32), np.zeros((0, 3), F32)))
    assert (made.count, made.dead, made.sqnr_db) == (0, False, math.inf)


# ---- what is lost


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_lost(value: float) -> None:
    y, z = noisy()
    z[0, 0] = value
    made = error((y, z))
    assert made.bad == 1
    wanted = ((z - y)[1:] ** 2).sum() + ((z - y)[0, 1:] ** 2).sum() + y[0, 0] ** 2
    assert made.noise == pytest.approx(wanted, rel=1e-5)


def test_infinities_of_the_reference_are_no_errors() -> None:
    y, z = F32([[-np.inf, 1, 2]]), F32([[-np.inf, 1, 2]])
    assert error((y, z)).to_dict()["sqnr_db"] is None
    assert error((y, F32([[-1e9, 1, 2]]))).bad == 0


def test_a_slice_that_has_nothing_of_the_reference() -> None:
    rng = np.random.default_rng(0)
    y, other = (rng.normal(size=(4, 50)).astype(F32) for _ in range(2))
    assert error((y, other)).unrelated
    assert error((y, -y)).unrelated
    assert error((y * F32(1e-20), other)).unrelated
    assert error((y * F32(1e-30), other * F32(1e-29))).unrelated
    assert not error((y * F32(1e-7), other * F32(1e-7))).unrelated  # what cancels in float32
    assert error((y, other)).drop == 1.0
    for result in (y, y + F32(0.9) * other, F32(1e-3) * y, F32(3) * y):  # noise alone does not tell
        assert not error((y, result)).unrelated
    assert not error((y[:1, :3], other[:1, :3])).unrelated  # too few to tell
    assert not error((y * 0, other)).unrelated


def test_a_slice_of_tiny_values_dies_as_others_do() -> None:
    y = np.random.default_rng(0).normal(size=(4, 8)).astype(F32)
    for scale in (1e-19, 1e-30, 1e-41):
        small = (y * scale).astype(F32)
        assert error((small, np.zeros_like(y))).dead
        assert not error((small, small)).dead


def test_a_dead_slice() -> None:
    y, _ = noisy()
    assert error((y, np.zeros_like(y))).dead
    assert error((y, np.full_like(y, 0.3))).dead
    assert not error((y, y * F32(1e-3))).dead
    constant = np.full_like(y, 7)
    assert not error((constant, constant)).dead
    assert not error((constant, np.zeros_like(y))).dead
    assert not error((y[:1, :1], np.zeros((1, 1), F32))).dead


def test_a_slice_that_is_dead_in_every_sample_but_not_the_same() -> None:
    y, _ = noisy()
    assert not error((y, np.zeros_like(y)), (y, np.ones_like(y))).dead


# ---- integers and flags


def test_indices_and_flags_are_the_same_or_not() -> None:
    """The distance of two indices says nothing."""
    for kind in (np.int64, np.int32):
        near, far = (
            error((np.arange(8, dtype=kind), np.array([0, 1, 2, 3, 4, 5, 6, last], kind)))
            for last in (8, 1000)
        )
        assert near.sqnr_db == far.sqnr_db == pytest.approx(10 * np.log10(8))
        assert near.cosine == near.agreement == 7 / 8
    flags = error((np.array([True, False]), np.array([True, True])))
    assert flags.sqnr_db == pytest.approx(10 * np.log10(2))
    assert error((np.arange(8), np.arange(8))).sqnr_db == math.inf
    assert not error((np.arange(8), np.zeros(8, np.int64))).dead


def test_pixels_have_a_magnitude() -> None:
    y, z = np.array([100, 200, 250], np.uint8), np.array([101, 199, 250], np.uint8)
    assert error((y, z)).sqnr_db == pytest.approx(10 * np.log10((100**2 + 200**2 + 250**2) / 2))
    assert error((y, z)).largest == 1


# ---- parts


@given(
    values=npst.arrays(F32, st.tuples(*[st.integers(1, 5)] * 3), elements=st.floats(-9, 9, width=32)),
    axis=st.integers(0, 2), cut=st.integers(0, 5),
)  # fmt: skip
def test_two_parts_are_the_whole(values: Array, axis: int, cut: int) -> None:
    size = values.shape[axis]
    assume(cut <= size)
    result = values + F32(0.5)
    parts = [
        error((values, result), part=Part("p", axis, a, b)) for a, b in ((0, cut), (cut, size))
    ]
    whole = error((values, result))
    for field in ("power", "noise", "dot", "power_result", "count", "total"):
        assert sum(getattr(p, field) for p in parts) == pytest.approx(
            getattr(whole, field), rel=1e-9, abs=1e-9
        )


def test_a_part_is_a_view() -> None:
    values = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(Part("p", 1, 1, 3).of(values), values[:, 1:3])
    assert Part("p", 1, 1, 3).of(values).base is not None
    assert Part("all").of(values) is values


# ---- scores of classes


@pytest.mark.parametrize("logits", [True, False])
def test_divergence(logits: bool) -> None:
    y, z = noisy(shape=(6, 5), noise=0.5)

    def share(a: Array) -> Array:
        wide = np.exp(a.astype(np.float64))
        return wide / wide.sum(axis=-1, keepdims=True)

    p, q = share(y), share(z)
    wanted = [
        sum(a * math.log(a / b) for a, b in zip(r, s, strict=True))
        for r, s in zip(p, q, strict=True)
    ]
    found = divergence(y, z, logits=True) if logits else divergence(p, q, logits=False)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_saturated_scores_have_little_noise_and_much_divergence() -> None:
    """The SQNR of scores alone misleads: cut off at the top, more is right, and the order is lost."""
    y = np.tile(np.array([[9.0, 8.8, -9.0, -9.0]], F32), (8, 1))
    cut = np.minimum(y, 8.8)
    noise = y + np.array([[0.3, 0.3, 0.3, 0.3]], F32)
    part = Part("all", decides="logits")
    first, second = error((y, cut), part=part), error((y, noise), part=part)
    assert first.sqnr_db > second.sqnr_db
    assert first.divergence is not None
    assert second.divergence is not None
    assert first.divergence > 100 * second.divergence


def test_what_is_lost() -> None:
    y, z = noisy(shape=(8, 10), noise=0.4)
    decided = error((y, z), part=Part("all", decides="logits"))
    assert decided.drop == pytest.approx((y.argmax(-1) != z.argmax(-1)).mean())
    assert error((y, z)).drop == pytest.approx(1 - error((y, z)).cosine)
    assert error((y, np.zeros_like(y))).drop == 1.0
    assert error((y, np.full_like(y, np.nan)), part=Part("all", decides="logits")).drop == 1.0
