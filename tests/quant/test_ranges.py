"""Parameters of weights, against loops over groups and factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.quant import affine
from qcompile.quant.affine import choose, fake_quantize
from qcompile.quant.granularity import PerAxis, PerBlock, PerTensor
from qcompile.quant.ranges import SHRINKS, squared_error, weight_params, weight_params_mse
from qcompile.quant.scheme import QParams, Scheme

if TYPE_CHECKING:
    from collections.abc import Iterator

WHERE = ["tensor", "axis0", "axis1", "axis0/3", "axis1/4", "axis1/5", "axis1/64"]


def weights(seed: int = 0) -> npt.NDArray[np.float32]:
    """A (6, 20) array with outliers, one row of zeros and one of tiny values."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(2, size=(6, 20)).astype(np.float32)
    w[2] = 0
    w[4] *= np.float32(1e-12)
    return w


def groups(
    w: npt.NDArray[Any], scheme: Scheme
) -> Iterator[tuple[tuple[int, ...], npt.NDArray[Any]]]:
    """Each index of a scale, and the elements that it holds for, flat."""
    granularity = scheme.granularity
    for at in np.ndindex(granularity.params_shape(w.shape)):
        match granularity:
            case PerTensor():
                yield at, w.reshape(-1)
            case PerAxis(axis):
                yield at, np.take(w, at[0], axis=axis).reshape(-1)
            case PerBlock(axis, size):
                where = [slice(i, i + 1) for i in at]
                where[axis] = slice(at[axis] * size, (at[axis] + 1) * size)
                yield at, w[tuple(where)].reshape(-1)


def alone(used: QParams, at: tuple[int, ...]) -> QParams:
    """The parameters of one group, per tensor."""
    scheme = Scheme(
        used.scheme.qtype,
        PerTensor(),
        symmetric=used.scheme.symmetric,
        bits=used.scheme.bits,
        narrow=used.scheme.narrow,
    )
    return QParams(np.asarray(used.scale[at]), np.asarray(used.zero[at]), scheme)


def loss(group: npt.NDArray[np.float32], used: QParams) -> float:
    return float(
        sum(
            (float(a) - float(b)) ** 2
            for a, b in zip(group, fake_quantize(group, used), strict=True)
        )
    )


@pytest.mark.parametrize("end", ["asym", "sym", "sym.7bit.narrow"])
@pytest.mark.parametrize("where", WHERE)
def test_each_group_gets_the_parameters_of_its_own_range(where: str, end: str) -> None:
    w, scheme = weights(), Scheme.parse(f"int8.{where}.{end}")
    used = weight_params(w, scheme)
    for at, group in groups(w, scheme):
        one = alone(used, at)
        expected = choose(float(group.min()), float(group.max()), one.scheme)
        assert (one.scale, one.zero) == (expected.scale, expected.zero)


@pytest.mark.parametrize("slab", [16, 1 << 18])
@pytest.mark.parametrize("spelling", ["int4.{}.sym", "int8.{}.sym.narrow", "uint4.{}.sym"])
@pytest.mark.parametrize("where", WHERE)
def test_mse_finds_what_the_loop_finds(
    where: str, spelling: str, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affine, "SLAB", slab)
    w, scheme = weights(), Scheme.parse(spelling.format(where))
    full, best = weight_params(w, scheme), weight_params_mse(w, scheme)
    error = squared_error(w, best)
    for at, group in groups(w, scheme):
        lo, hi = float(group.min()), float(group.max())
        one = alone(best, at).scheme
        tried = [choose(lo * f, hi * f, one) for f in (1.0, *SHRINKS)]
        losses = [loss(group, t) for t in tried]
        # float64 sums in another order: 1e-12 of the sum is thousands of times their rounding
        assert float(error[at]) == pytest.approx(min(losses), rel=1e-12, abs=0)
        assert losses[0] == pytest.approx(loss(group, alone(full, at)), rel=1e-12, abs=0)
        assert float(error[at]) <= losses[0] * (1 + 1e-12)
        assert best.scale[at] in [t.scale for t in tried]


@settings(database=None, deadline=None, derandomize=True, max_examples=50)
@given(
    st.integers(0, 2**32),
    st.sampled_from(["int8", "int4", "uint4", "int2"]),
    st.sampled_from(WHERE),
    st.lists(st.floats(0.01, 1), max_size=4),
)
def test_mse_is_never_worse_than_the_full_range(
    seed: int, qtype: str, where: str, factors: list[float]
) -> None:
    w, scheme = weights(seed), Scheme.parse(f"{qtype}.{where}.sym")
    best = squared_error(w, weight_params_mse(w, scheme, factors))
    assert (best <= squared_error(w, weight_params(w, scheme))).all()


def test_mse_cuts_an_outlier_off() -> None:
    w = np.append(np.linspace(-1, 1, 999), 1.6).astype(np.float32)
    scheme = Scheme.parse("int4.tensor.sym")
    full, best = weight_params(w, scheme), weight_params_mse(w, scheme)
    assert best.scale < full.scale
    assert squared_error(w, best) < 0.8 * squared_error(w, full)


def test_zero_channels_have_scale_one_and_no_error() -> None:
    w, scheme = np.zeros((3, 4), np.float32), Scheme.parse("int4.axis0.sym")
    for used in (weight_params(w, scheme), weight_params_mse(w, scheme)):
        assert used.scale.tolist() == [1, 1, 1]
        assert squared_error(w, used).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
@pytest.mark.parametrize("where", ["tensor", "axis0", "axis0/2", "axis1/3"])
def test_weights_without_elements(shape: tuple[int, int], where: str) -> None:
    w, scheme = np.zeros(shape, np.float32), Scheme.parse(f"int8.{where}.sym")
    for used in (weight_params(w, scheme), weight_params_mse(w, scheme)):
        assert used.scale.shape == scheme.granularity.params_shape(shape)
        assert (used.scale == 1).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("where", WHERE)
def test_other_float_types(dtype: type[Any], where: str) -> None:
    w, scheme = (weights() / 16).astype(dtype), Scheme.parse(f"int8.{where}.sym")
    same = w.astype(np.float32)
    for find in (weight_params, weight_params_mse):
        np.testing.assert_array_equal(find(w, scheme).scale, find(same, scheme).scale)


def test_what_cannot_be_done_is_refused() -> None:
    w = weights()
    with pytest.raises(ValueError, match="no axis 2"):
        weight_params(w, Scheme.parse("int8.axis2.sym"))
    with pytest.raises(ValueError, match=r"for symmetric schemes, not uint8\.axis0\.asym"):
        weight_params_mse(w, Scheme.parse("uint8.axis0.asym"))
    for factor in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="not all above 0 and at most 1"):
            weight_params_mse(w, Scheme.parse("int8.axis0.sym"), [0.9, factor])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    w = weights()
    w[3, 7] = bad
    for find in (weight_params, weight_params_mse):
        with pytest.raises(ValueError, match=rf"is {bad} at index \(3,\)"):
            find(w, Scheme.parse("int8.axis0.sym"))
