"""The affine map: properties, and an obvious version of it one element at a time."""

from __future__ import annotations

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile.quant import affine
from qcompile.quant.affine import choose, dequantize, fake_quantize, quantize, slabs
from qcompile.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor
from qcompile.quant.ranges import weight_params
from qcompile.quant.scheme import QTYPES, QParams, Scheme

SPELLINGS = [
    "uint8.tensor.asym",
    "int8.tensor.asym",
    "int8.tensor.sym",
    "int8.tensor.sym.narrow",
    "int8.tensor.sym.7bit",
    "uint8.tensor.asym.7bit",
    "uint8.tensor.sym",
    "uint16.tensor.asym",
    "int16.tensor.sym",
    "int16.tensor.asym",
    "int4.tensor.sym",
    "uint4.tensor.asym",
    "uint4.tensor.sym",
    "int2.tensor.sym.narrow",
    "uint2.tensor.asym",
]
SCHEMES = [Scheme.parse(text) for text in SPELLINGS]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
MODERATE = st.floats(-(2.0**100), 2.0**100, width=32)
TINY = float(np.finfo(np.float32).tiny)


def params(scheme: str, scale: object, zero: object = 0) -> QParams:
    parsed = Scheme.parse(scheme)
    return QParams(np.asarray(scale, np.float32), np.asarray(zero, parsed.qtype.dtype), parsed)


def tolerance(scheme: Scheme, lo: float, hi: float) -> float:
    """What float32 may add to half a scale, in ulps of the bound of greatest magnitude.

    1 if symmetric: half an ulp for the quotient (the highest code lies just below a power of two)
    and half for the product. 4 if not: the rounding of hi - lo, of the scale and of qmin -
    lo / scale also moves the ends of what the codes cover (2.5 measured, uint16).
    """
    ulp = float(np.spacing(np.float32(max(-lo, hi, TINY))))
    return ulp if scheme.symmetric else 4 * ulp


@settings(database=None, deadline=None, derandomize=True)
@given(st.sampled_from(SCHEMES), MODERATE, MODERATE, st.floats(0, 1))
def test_inside_the_range_the_error_is_half_a_scale(
    scheme: Scheme, a: float, b: float, at: float
) -> None:
    lo, hi = min(a, b, 0.0), max(a, b, 0.0)
    chosen = choose(lo, hi, scheme)
    x = np.array([lo, hi, np.clip(lo + at * (hi - lo), lo, hi)], np.float32)
    error = np.abs(fake_quantize(x, chosen).astype(np.float64) - x)
    assert error.max() <= float(chosen.scale) / 2 + tolerance(scheme, lo, hi)


@settings(database=None, deadline=None, derandomize=True)
@given(st.sampled_from(SCHEMES), FINITE, FINITE)
def test_choose_gives_a_usable_scale_for_any_range(scheme: Scheme, a: float, b: float) -> None:
    chosen = choose(min(a, b), max(a, b), scheme)
    assert chosen.scale.dtype == np.float32
    assert np.isfinite(chosen.scale)
    assert chosen.scale >= affine.SCALE_FLOOR
    assert scheme.qmin <= int(chosen.zero) <= scheme.qmax
    ends = dequantize(np.array([scheme.qmin, scheme.qmax], scheme.qtype.dtype), chosen)
    assert np.isfinite(ends).all()
    assert fake_quantize(np.zeros(1, np.float32), chosen)[0] == 0  # zero is a code, exactly
    if scheme.symmetric:
        assert chosen.zero == scheme.middle


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 1e-30, 1.0, 1e30, 3.4e38])
def test_ranges_of_any_magnitude(scheme: Scheme, magnitude: float) -> None:
    for lo, hi in ((0.0, magnitude), (-magnitude, 0.0), (-magnitude, magnitude)):
        chosen = choose(lo, hi, scheme)
        # Beyond the limit codes saturate, as outside any range.
        ends = np.clip([lo, hi, 0], -affine.RANGE_LIMIT, affine.RANGE_LIMIT)
        x = ends.astype(np.float32)
        error = np.abs(fake_quantize(x, chosen).astype(np.float64) - x)
        within = float(chosen.scale) / 2 + tolerance(scheme, float(x[0]), float(x[1]))
        assert error.max() <= within


def test_choose_follows_its_formulas() -> None:
    asym = choose(-1.0, 3.0, Scheme.parse("uint8.tensor.asym"))
    assert asym.scale == np.float32(4) / np.float32(255)
    assert asym.zero == 64  # rint(63.75)
    sym = choose(-2.0, 1.0, Scheme.parse("int8.tensor.sym"))
    assert sym.scale == np.float32(2) / np.float32(127)
    assert sym.zero == 0
    assert choose(5.0, 6.0, Scheme.parse("uint8.tensor.asym")).zero == 0  # widened to hold 0
    assert choose(-6.0, -5.0, Scheme.parse("uint8.tensor.asym")).zero == 255
    fewer = choose(-1.0, 1.0, Scheme.parse("int8.axis0.sym.7bit"))
    assert fewer.scale == np.float32(1) / np.float32(63)


def test_a_range_of_zeros_has_scale_one() -> None:
    chosen = choose(np.zeros(2), np.array([0.0, 1.0]), Scheme.parse("int8.axis0.asym"))
    np.testing.assert_array_equal(chosen.scale, np.array([1, 1 / 255], np.float32))
    np.testing.assert_array_equal(chosen.zero, [-128, -128])


def test_a_range_too_narrow_has_the_floor_as_scale() -> None:
    chosen = choose(-1e-38, 1e-38, Scheme.parse("int8.tensor.sym"))
    assert chosen.scale == affine.SCALE_FLOOR
    assert affine.SCALE_FLOOR * affine.SCALE_FLOOR >= TINY  # a bias scale is not denormal


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_bounds_of_any_float_type(dtype: type[Any]) -> None:
    bounds = np.array([-1, -2], dtype), np.array([1, 0.5], dtype)
    chosen = choose(*bounds, Scheme.parse("int8.axis0.sym"))
    np.testing.assert_array_equal(chosen.scale, np.array([1, 2], np.float32) / np.float32(127))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bounds_that_are_not_finite_are_named(bad: float) -> None:
    with pytest.raises(ValueError, match=f"^lo is {bad}$"):
        choose(bad, 1.0, Scheme.parse("int8.tensor.sym"))
    with pytest.raises(ValueError, match=rf"^hi is {bad} at index \(1,\)$"):
        choose(np.zeros(2), np.array([0, bad]), Scheme.parse("int8.axis0.sym"))


def test_bounds_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^lo is above hi at index \(1, 0\)$"):
        choose(np.array([[0], [2.0]]), np.array([[0], [1.0]]), Scheme.parse("int4.axis1/2.sym"))
    with pytest.raises(ValueError, match=r"lo \(2,\) and hi \(\) differ in shape"):
        choose(np.zeros(2), 1.0, Scheme.parse("int8.axis0.sym"))


@settings(database=None, deadline=None, derandomize=True)
@given(st.sampled_from(SCHEMES), st.floats(2.0**-60, 2.0**50, width=32), st.floats(1, 2.0**50))
def test_outside_the_range_codes_saturate(scheme: Scheme, scale: float, factor: float) -> None:
    used = QParams(
        np.asarray(scale, np.float32), np.asarray(scheme.middle, scheme.qtype.dtype), scheme
    )
    reach = scale * 2.0**scheme.qtype.bits * factor
    x = np.array([-reach, reach, -np.inf, np.inf, np.nan], np.float32)
    low, high = scheme.qmin, scheme.qmax
    assert quantize(x, used).tolist() == [low, high, low, high, low]


def test_a_quotient_that_overflows_saturates() -> None:
    x = np.array([3e38, -3e38], np.float32)
    assert quantize(x, params("int8.tensor.sym", 1e-40)).tolist() == [127, -128]


def test_int32_saturates_at_its_own_ends() -> None:
    x = np.array([2.0**31, -(2.0**31), 3e38, -3e38, 2147483520, np.nan], np.float32)
    ends = [2**31 - 1, -(2**31)]
    codes = quantize(x, params("int32.tensor.sym", 1.0))
    assert codes.tolist() == [*ends, *ends, 2147483520, -(2**31)]


def test_ties_go_to_the_even_code() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32)
    assert quantize(x, params("int8.tensor.asym", 1.0, 1)).tolist() == [1, 3, 3, 1, -1]


def one_at_a_time(x: npt.NDArray[np.float32], used: QParams) -> npt.NDArray[Any]:
    """Codes by the definition: one element, one scale, Python's integers."""
    granularity, codes = used.scheme.granularity, np.empty(x.shape, used.zero.dtype)
    for at in np.ndindex(x.shape):
        match granularity:
            case PerTensor():
                group: tuple[int, ...] = ()
            case PerAxis(axis):
                group = (at[axis],)
            case PerBlock(axis, size):
                group = tuple(i // size if d == axis else i for d, i in enumerate(at))
        code = round(float(x[at] / used.scale[group])) + int(used.zero[group])
        codes[at] = min(max(code, used.scheme.qmin), used.scheme.qmax)
    return codes


@pytest.mark.parametrize("slab", [1, 5, 20, 1 << 18])
@pytest.mark.parametrize(
    "where", ["tensor", "axis0", "axis1", "axis2", "axis0/2", "axis1/3", "axis2/4", "axis1/99"]
)
def test_slabs_change_nothing(where: str, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affine, "SLAB", slab)
    x = np.random.default_rng(1).normal(size=(3, 7, 5)).astype(np.float32)
    used = weight_params(x, Scheme.parse(f"uint8.{where}.asym"))
    codes = quantize(x, used)
    np.testing.assert_array_equal(codes, one_at_a_time(x, used), strict=True)
    turned = np.asfortranarray(x)
    np.testing.assert_array_equal(quantize(turned, used), codes)
    scale, zero = (
        np.broadcast_to(used.scheme.granularity.spread(p, x.shape), x.shape)
        for p in (used.scale, used.zero)
    )
    expected = (codes.astype(np.int32) - zero).astype(np.float32) * scale
    np.testing.assert_array_equal(dequantize(codes, used), expected, strict=True)


@settings(database=None, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.sampled_from([PerTensor(), PerBlock(0, 2), PerBlock(0, 4), PerBlock(0, 20)]),
    st.integers(1, 40),
)
@example((7, 2), PerBlock(0, 2), 6)  # 3 rows would fit, and split a block
def test_slabs_cover_an_array_once(
    shape: tuple[int, ...], granularity: Granularity, limit: int
) -> None:
    if not shape:
        granularity = PerTensor()
    seen = np.zeros(shape, int)
    size = granularity.size if isinstance(granularity, PerBlock) else 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affine, "SLAB", limit)
        for index in slabs(shape, granularity):
            seen[index] += 1
            assert seen[index].size <= max(limit, size)
            assert all(s.start % size == 0 for s in index[:1])
    assert (seen == 1).all()


def test_temporaries_are_bounded() -> None:
    x = np.zeros(1 << 24, np.float32)
    used = params("uint8.tensor.asym", 0.1, 3)
    tracemalloc.start()
    try:
        codes = quantize(x, used)
        _, peak = tracemalloc.get_traced_memory()
        assert peak - codes.nbytes < 16 * affine.SLAB
        tracemalloc.reset_peak()
        held, _ = tracemalloc.get_traced_memory()
        dequantized = dequantize(codes, used)
        _, peak = tracemalloc.get_traced_memory()
        assert peak - held - dequantized.nbytes < 16 * affine.SLAB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0)])
def test_arrays_without_axes_or_elements(shape: tuple[int, ...]) -> None:
    x = np.full(shape, 2.0, np.float32)
    used = params("int8.tensor.asym", 0.5, 1)
    codes = quantize(x, used)
    assert (codes.shape, codes.dtype) == (shape, np.dtype(np.int8))
    assert (codes == 5).all()
    np.testing.assert_array_equal(dequantize(codes, used), x, strict=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_float_types_are_converted_first(dtype: type[Any]) -> None:
    x = np.random.default_rng(2).normal(size=50).astype(dtype)
    used = params("int8.tensor.sym", 0.01)
    np.testing.assert_array_equal(quantize(x, used), quantize(x.astype(np.float32), used))


def test_a_float64_beyond_float32_saturates() -> None:
    assert quantize(np.array([1e300, -1e300]), params("int8.tensor.sym", 1.0)).tolist() == [
        127,
        -128,
    ]


def test_differences_of_codes_do_not_wrap() -> None:
    used = params("int8.tensor.asym", 1.0, 127)
    assert dequantize(np.array([-128], np.int8), used).tolist() == [-255]
    used = params("uint16.tensor.asym", 1.0, 65535)
    assert dequantize(np.array([0], np.uint16), used).tolist() == [-65535]


def test_a_scale_from_a_model_may_overflow() -> None:
    assert dequantize(np.array([127], np.int8), params("int8.tensor.sym", 3e38)).tolist() == [
        np.inf
    ]


@settings(database=None, deadline=None, derandomize=True)
@given(st.sampled_from(list(QTYPES)), hnp.arrays(np.float32, 6, elements=MODERATE))
def test_fake_quantize_twice_is_once(qtype: str, x: npt.NDArray[np.float32]) -> None:
    scheme = Scheme.parse(f"{qtype}.axis0/4.sym")
    if scheme.qtype.bits == 32:
        return  # codes above 2**24 have more digits than their float32 values
    used = weight_params(x, scheme)
    once = fake_quantize(x, used)
    np.testing.assert_array_equal(fake_quantize(once, used), once)


def test_parameters_that_do_not_fit_are_refused() -> None:
    x = np.zeros((2, 5), np.float32)
    used = params("int8.axis1/2.sym", np.ones((2, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"scale of shape \(2, 3\), not \(2, 2\)"):
        quantize(x, used)
    with pytest.raises(ValueError, match=r"scale of shape \(2, 3\), not \(2, 2\)"):
        dequantize(x.astype(np.int8), used)
    with pytest.raises(ValueError, match="no axis 2"):
        quantize(x, params("int8.axis2.sym", [1.0], [0]))
    with pytest.raises(ValueError, match="are int8, not uint8"):
        dequantize(x.astype(np.uint8), params("int8.tensor.sym", 1.0))
