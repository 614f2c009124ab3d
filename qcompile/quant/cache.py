"""Codes of a decoder's key and value cache: one scale for each head and channel.

    int8    code = clip(rint((x - offset) / scale), -128, 127)              x' = code * scale + offset
    uint8   code = clip(rint((x - offset) / scale) + 128, 0, 255)           x' = (code - 128) * scale + offset
    int4    code = clip(rint((x - offset) / scale) + 8, 0, 15)              x' = (code - 8) * scale + offset

in float32, ties to even; two codes of int4 share a byte, see `Packing`. Only int4 values have an offset other than
0: with 8 bits there is nothing left to gain, and a range that follows the samples on both sides saturates more often
in texts that were not seen (SmolLM2, uint8: perplexity +1.6 % against -0.1 %). The offset is a whole number of
scales, so that 0 has a code: the first token, which many heads look at when they look for nothing, has values
near 0 (Xiao et al. 2023, arXiv:2309.17453, section 3.1).

Keys have channels that are large in every token, so that scales by channel cost least (KIVI, Liu et al. 2024,
arXiv:2402.02750, section 3; KVQuant, Hooper et al. 2024, arXiv:2401.18079). But rotary embeddings (Su et al. 2021,
arXiv:2104.09864, equation 34) turn pairs of channels with the position, slow ones over thousands of tokens. A range
seen on short texts is not that of long ones; what stays is the length of a pair, which `turned` gives (SmolLM2,
int8 from texts of 256 tokens, read to 1792: perplexity +5.5 % without it).
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qcompile.quant.affine import SCALE_FLOOR, ZERO_RANGE_SCALE

if TYPE_CHECKING:
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]

Kind = Literal["int8", "uint8", "int4"]
KINDS: tuple[Kind, ...] = ("int8", "uint8", "int4")

_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


class Packing(enum.Enum):
    """Which two of D channels share a byte of an int4 cache, the first one in the low bits.

    HALVES: d and d + D/2, which operators of ONNX take apart with one Concat.
    PAIRS: 2d and 2d + 1, as GroupQueryAttention of ONNX Runtime stores them (measured on 1.32).
    """

    HALVES = "halves"
    PAIRS = "pairs"


@dataclasses.dataclass(frozen=True)
class CacheParams:
    """How one cache tensor (batch, heads, tokens, width) is stored.

    Attributes:
        kind: the codes.
        scale: float32 (heads, width), positive.
        offset: float32 (heads, width), the value of the middle code, a whole number of scales; None: 0.
    """

    kind: Kind
    scale: F32
    offset: F32 | None = None

    @property
    def zero(self) -> int:
        """The middle code, of 0 if there is no offset."""
        return {"int8": 0, "uint8": 128, "int4": 8}[self.kind]

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return {"int8": (-128, 127), "uint8": (0, 255), "int4": (0, 15)}[self.kind]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored tensor."""
        return np.dtype(np.int8 if self.kind == "int8" else np.uint8)

    @property
    def stored_width(self) -> int:
        """The last dimension of the stored tensor."""
        width = int(self.scale.shape[1])
        return width // 2 if self.kind == "int4" else width


def choose_cache(
    lo: F32, hi: F32, kind: Kind, *, seen: F32 | None = None, centred: bool = False
) -> CacheParams:
    """Parameters that cover `lo`..`hi`; int4 without an offset clips them where that makes the error of `seen` least.

    Clipping is for keys, whose lengths of pairs are far above most values; for values it does harm, since what
    stands out there counts (SmolLM2, int4 values: perplexity +3.6 % with clipping, -0.1 % without).

    Args:
        lo: float32 (heads, width), the least value of each head and channel.
        hi: the greatest, of the same shape.
        kind: the codes.
        seen: float32 (heads, tokens, width), values that the error of int4 is taken over; without them the
            whole range is covered.
        centred: int4 has an offset. Not for keys: what lies on one side of 0 turns to the other one with the
            position.

    Raises:
        ValueError: a bound is not finite, or `lo` is above `hi`.
    """
    if not (np.isfinite(lo).all() and np.isfinite(hi).all()) or np.any(lo > hi):
        raise ValueError("the range of a cache is not finite, or its ends are exchanged")
    if kind != "int4":
        return CacheParams(kind, _positive(np.maximum(np.abs(lo), np.abs(hi)) / np.float32(127)))
    if not centred:
        full = CacheParams(kind, _positive(np.maximum(np.abs(lo), np.abs(hi)) / np.float32(7)))
        return full if seen is None else _shrunk(full, seen)
    low, high = np.minimum(lo, 0), np.maximum(hi, 0)
    scale = _positive((high - low) / np.float32(15))
    steps = np.rint(low / scale + np.float32(8))  # the lowest code is -8
    return CacheParams(kind, scale, np.asarray(steps * scale, np.float32))


def turned(x: F32) -> F32:
    """The greatest magnitude that each element can take if its channel pair turns, whichever pairs there are.

    Pairs are d and d + width/2, or 2d and 2d + 1 (interleaved); the larger length counts. A new array.

    Args:
        x: float32 (..., width); an odd width has no pairs.
    """
    width = x.shape[-1]
    if width % 2:
        return np.abs(x)
    half = np.hypot(x, np.roll(x, width // 2, axis=-1))
    near = np.hypot(x, x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape))
    longest: F32 = np.maximum(half, near)
    return longest


def _shrunk(full: CacheParams, seen: F32) -> CacheParams:
    """With each scale times the factor that makes the squared error over `seen` least."""
    scale, least = full.scale.copy(), _error(seen, full)
    for shrink in _SHRINKS[1:]:
        smaller = _positive(full.scale * np.float32(shrink))
        error = _error(seen, CacheParams(full.kind, smaller))
        better = error < least
        scale[better], least[better] = smaller[better], error[better]
    return CacheParams(full.kind, scale)


def encode(
    x: npt.NDArray[np.floating], params: CacheParams, packing: Packing = Packing.HALVES
) -> npt.NDArray[Any]:
    """The stored tensor of float values (..., heads, tokens, width); a new array of `params.dtype`."""
    codes = _codes(np.asarray(x, np.float32), params)
    if params.kind != "int4":
        return codes.astype(params.dtype)
    low, high = _apart(codes.astype(np.uint8), packing)
    return np.asarray(low | (high << np.uint8(4)))


def decode(codes: npt.NDArray[Any], params: CacheParams, packing: Packing = Packing.HALVES) -> F32:
    """The float32 values (..., heads, tokens, width) of a stored tensor; a new array."""
    if params.kind == "int4":
        low, high = codes & np.uint8(15), codes >> np.uint8(4)
        joined = np.empty((*codes.shape[:-1], 2 * codes.shape[-1]), np.uint8)
        first, second = _apart(joined, packing)
        first[...], second[...] = low, high
        codes = joined
    return _values(codes.astype(np.float32), params)


def _apart(
    codes: npt.NDArray[np.uint8], packing: Packing
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Views of the channels in the low and in the high bits."""
    if packing is Packing.PAIRS:
        return codes[..., 0::2], codes[..., 1::2]
    half = codes.shape[-1] // 2
    return codes[..., :half], codes[..., half:]


def _codes(x: F32, params: CacheParams) -> F32:
    """The codes, as float32."""
    if params.offset is not None:
        x = x - _spread(params.offset)
    with np.errstate(over="ignore"):  # what is far outside saturates
        codes = np.rint(x / _spread(params.scale)) + np.float32(params.zero)
    clipped: F32 = np.clip(codes, *params.code_range)
    return clipped


def _values(codes: F32, params: CacheParams) -> F32:
    values: F32 = (codes - np.float32(params.zero)) * _spread(params.scale)
    return values if params.offset is None else values + _spread(params.offset)


def _error(seen: F32, params: CacheParams) -> npt.NDArray[np.float64]:
    """Squared error of each head and channel, float64 (heads, width)."""
    gap = _values(_codes(seen, params), params) - seen
    return np.asarray(np.square(gap).sum(axis=1, dtype=np.float64))


def _spread(values: F32) -> F32:
    return values[:, None, :]  # (heads, tokens, width)


def _positive(scale: npt.NDArray[np.floating]) -> F32:
    """At least the floor of all scales; a range of 0 only has the scale that `affine` gives it."""
    found = np.where(scale > 0, np.maximum(scale, SCALE_FLOOR), ZERO_RANGE_SCALE)
    return found.astype(np.float32)
