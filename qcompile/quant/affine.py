"""The one affine map between floats and codes, equal to ONNX Runtime bit for bit.

    codes = saturate(rint(x / scale) + zero)          QuantizeLinear
    x'    = (codes - zero) * scale                    DequantizeLinear

in float32, divided (not multiplied by 1 / scale, which rounds differently near ties), ties to the
even code. Measured on ONNX Runtime 1.32, CPU: `tests/quant/test_affine_ort.py`.

Large arrays are worked on in slabs of about `SLAB` elements, so that temporaries stay small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qcompile.quant.granularity import Granularity, PerBlock
from qcompile.quant.scheme import QParams, Scheme

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

SLAB = 1 << 18
"""Elements worked on at once: 1 MiB of float32, which stays in a core's second-level cache."""

SCALE_FLOOR = np.float32(2.0**-63)
"""The smallest scale that `choose` gives, about 1.1e-19.

The product of two scales (of an int32 bias, of an accumulator) is then at least 2**-126, the
smallest normal float32: never denormal, which devices flush to 0. And x / scale stays finite up to
|x| = 2**65. A range this narrow is noise; its values still lie within half a scale of their codes.
"""

LEAST_WEIGHT = 2.0**-56
"""Weights that are all smaller have no 8-bit codes: the least scale leaves them less than 7 bits."""

ZERO_RANGE_SCALE = np.float32(1.0)
"""The scale of a range that holds 0 only.

Any scale is exact there. 1 keeps bias / (scale_x * scale_w) small for a channel of zero weights,
where `SCALE_FLOOR` would saturate the int32 bias.
"""

RANGE_LIMIT = 2.0**126
"""Bounds are cut to this magnitude, a quarter of the largest float32.

hi - lo and every (codes - zero) * scale then stay finite in float32.
"""


def too_small(weight: npt.NDArray[np.floating]) -> str:
    """Why a weight has no codes, for being all but zero; empty if it has, or is zero."""
    most = float(max(weight.max(initial=0.0), -weight.min(initial=0.0)))
    if not 0 < most < LEAST_WEIGHT:
        return ""
    return f"its weights are at most {most:.2g}, too small for scales of 8 bits"


def quantize(x: npt.NDArray[np.floating], params: QParams) -> npt.NDArray[Any]:
    """Return the codes of `x`, as QuantizeLinear would; NaN becomes the lowest code.

    ONNX leaves NaN open; the lowest code is what ONNX Runtime gives on x86, for all types.
    Infinities saturate. A scheme with `bits` or `narrow` saturates to its own, smaller range.

    Args:
        x: any shape and float type; converted to float32 first, slab by slab.
        params: of a shape that fits `x`.

    Returns:
        A new array of the shape of `x` and of the scheme's code type.

    Raises:
        ValueError: the parameters do not fit the shape of `x`.
    """
    scheme = params.scheme
    _check_fit(params, x.shape)
    codes = np.empty(x.shape, scheme.qtype.dtype)
    for index in slabs(x.shape, scheme.granularity):
        # Overflow is meant: a huge x over a small scale is inf, and saturates as it should.
        with np.errstate(over="ignore"):
            part = np.asarray(x[index], np.float32)
            scale, zero = _spread(params, index, part.shape)
            work: npt.NDArray[Any] = np.empty(part.shape, np.float32)
            np.divide(part, scale, out=work)
        np.rint(work, out=work)
        if scheme.qtype.bits == 32:
            work = work.astype(np.float64)  # float32 does not hold 2**31 - 1
        work += zero  # exact: what is not below 2**24 saturates
        np.fmax(work, scheme.qmin, out=work)  # fmax prefers a number to NaN
        np.fmin(work, scheme.qmax, out=work)
        codes[index] = work
    return codes


def dequantize(codes: npt.NDArray[Any], params: QParams) -> npt.NDArray[np.float32]:
    """Return the float32 values of `codes`, as DequantizeLinear would; a new array.

    Args:
        codes: any shape, of the scheme's code type.
        params: of a shape that fits `codes`.

    Raises:
        ValueError: the parameters do not fit the shape of `codes`, or these have another type.
    """
    scheme = params.scheme
    _check_fit(params, codes.shape)
    if codes.dtype != scheme.qtype.dtype:
        raise ValueError(f"codes of {scheme} are {scheme.qtype.dtype}, not {codes.dtype}")
    x = np.empty(codes.shape, np.float32)
    for index in slabs(codes.shape, scheme.granularity):
        part = codes[index].astype(np.int32)  # differences of codes would wrap in their own type
        scale, zero = _spread(params, index, part.shape)
        # Overflow to inf is meant: so large a scale comes from a model, never from choose.
        with np.errstate(over="ignore"):
            x[index] = (part - zero).astype(np.float32) * scale
    return x


def fake_quantize(x: npt.NDArray[np.floating], params: QParams) -> npt.NDArray[np.float32]:
    """Return `x` with the rounding and saturation that quantizing costs it; a new array.

    Raises:
        ValueError: the parameters do not fit the shape of `x`.
    """
    return dequantize(quantize(x, params), params)


def choose(
    lo: float | npt.NDArray[np.floating], hi: float | npt.NDArray[np.floating], scheme: Scheme
) -> QParams:
    """Return the parameters that cover `lo`..`hi` and 0 with all the scheme's codes.

    Symmetric: scale = max(|lo|, |hi|) / (qmax - zero), zero = the middle code.
    Asymmetric: scale = (hi - lo) / (qmax - qmin), zero = rint(qmin - lo / scale), float32.
    Values within the bounds then lie within half a scale of their codes, but for float32 rounding:
    1 ulp of the bound of greatest magnitude, 4 if asymmetric. An int32 code has more digits than a
    float32, so its values are those of float32.

    Args:
        lo: lower bounds, of the shape that the scheme's scale has for the tensor.
        hi: upper bounds, of the same shape.
        scheme: which codes there are.

    Returns:
        Parameters of the same shape, the scale at least `SCALE_FLOOR`.

    Raises:
        ValueError: a bound is NaN or infinite, `lo` is above `hi`, or their shapes differ.
    """
    low, high = _bound("lo", lo), _bound("hi", hi)
    if low.shape != high.shape:
        raise ValueError(f"lo {low.shape} and hi {high.shape} differ in shape")
    if np.any(low > high):
        raise ValueError(f"lo is above hi{_first(low > high)}")
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    scale: npt.NDArray[Any]
    if scheme.symmetric:
        scale = np.maximum(-low, high) / np.float32(scheme.qmax - scheme.middle)
    else:
        scale = (high - low) / np.float32(scheme.qmax - scheme.qmin)
    scale = np.where(high > low, np.maximum(scale, SCALE_FLOOR), ZERO_RANGE_SCALE)
    if scheme.symmetric:
        zero = np.full(low.shape, scheme.middle, scheme.qtype.dtype)
    else:
        codes = np.clip(np.rint(scheme.qmin - low / scale), scheme.qmin, scheme.qmax)
        zero = np.asarray(codes, scheme.qtype.dtype)
    return QParams(np.asarray(scale), zero, scheme)


def slabs(shape: tuple[int, ...], granularity: Granularity) -> Iterator[tuple[slice, ...]]:
    """Yield parts of an array of `shape`, in memory order, that cover it once.

    Each has at most `SLAB` elements, or one block along the axis if that is more, and none splits
    a block. Every slice has a start and a stop.
    """
    units = [1] * len(shape)
    if isinstance(granularity, PerBlock):
        units[granularity.axis] = granularity.size
    return _split(shape, units, SLAB)


def _split(shape: tuple[int, ...], units: list[int], limit: int) -> Iterator[tuple[slice, ...]]:
    if not shape:
        yield ()
        return
    inner = int(np.prod(shape[1:], dtype=np.int64))
    unit = units[0]
    step = max(unit, limit // max(inner, 1) // unit * unit)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        for rest in _split(shape[1:], units[1:], max(limit // (stop - start), 1)):
            yield (slice(start, stop), *rest)


def _spread(
    params: QParams, index: tuple[slice, ...], shape: tuple[int, ...]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The scale and zero that broadcast against the part `index`, which has `shape`."""
    granularity = params.scheme.granularity
    where = granularity.params_index(index)
    return (
        granularity.spread(np.asarray(params.scale[where]), shape),
        granularity.spread(np.asarray(params.zero[where]), shape),
    )


def _check_fit(params: QParams, shape: tuple[int, ...]) -> None:
    expected = params.scheme.granularity.params_shape(shape)
    if params.scale.shape != expected:
        raise ValueError(
            f"{params.scheme} of a tensor {shape} needs a scale of shape {expected}, "
            f"not {params.scale.shape}"
        )


def _bound(name: str, value: float | npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    array = np.asarray(value, np.float64)  # the limit is not a float16
    if not np.all(np.isfinite(array)):
        wrong = ~np.isfinite(array)
        raise ValueError(f"{name} is {array[wrong][0]}{_first(wrong)}")
    return np.asarray(np.clip(array, -RANGE_LIMIT, RANGE_LIMIT), np.float32)


def _first(wrong: npt.NDArray[np.bool_]) -> str:
    """` at index (3,)` for the first true element; empty for an array without axes."""
    if not wrong.ndim:
        return ""
    return f" at index {tuple(int(i) for i in np.argwhere(wrong)[0])}"
