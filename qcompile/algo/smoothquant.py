"""SmoothQuant and outlier channels kept float, for products whose input is quantized at run time.

Xiao et al. 2023, SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, eq. 4:

    x W = (x / s) (s W),      s_k = max|x_k|^alpha / max|W_k|^(1 - alpha)

Channels that tower over the rest even so can stay float (Dettmers et al. 2022, LLM.int8()), with K the set of them:

    x W = Q(x without K) Q(W without K) + x_K W_K

Alpha and K are searched by the error that quantization then leaves in the product, measured on rows of real inputs.
Rows count alike, whatever their size: a LayerNorm behind makes them equal, and a few rows of an encoder are a
hundred times as large as the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.quant.affine import dequantize, quantize
from qcompile.quant.ranges import weight_params
from qcompile.quant.scheme import Scheme

Array = npt.NDArray[Any]

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
KEPT = 4  # channels that may stay float
COLUMNS = 384  # of the weights, that errors are measured on
_GAIN = 0.1  # of the error on held-out rows, that smoothing must save, and channels kept float once more
_TOWER = 4.0  # times the 99th percentile of the peaks, that a channel kept float reaches
_FLOOR = 1e-5  # of the greatest: channels that are nearly zero are not blown up without end
_SHARE = 0.1  # of the mean power of a row, that its own power is never taken to be less than
_WORK = 1 << 27  # multiplications that the error of one scale may take
_LEAST = 8  # rows of a sample, whatever they take
_TOP = 8  # of the rows of a sample, one in so many is among its largest


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """What one sample puts into a product.

    Attributes:
        rows: float32 (rows, K), some of its rows.
        low, high: float32 (K,), the least and the greatest value of each channel over all its rows: they, not the
            rows kept, set the scale of its codes.
    """

    rows: Array
    low: Array
    high: Array

    @classmethod
    def of(cls, x: Array, most: int | None = None) -> Sample:
        """At most so many rows of `x`, float32 (rows, K), copied: evenly spread ones, and a few of the largest."""
        low, high = x.min(axis=0, initial=0.0), x.max(axis=0, initial=0.0)
        if most is None or len(x) <= most:
            return cls(np.array(x, np.float32), low, high)
        top = most // _TOP
        largest = np.argsort(-np.maximum(x.max(axis=1), -x.min(axis=1)), kind="stable")[:top]
        spread = np.linspace(0, len(x) - 1, most - top).astype(np.int64)
        return cls(np.asarray(x[np.union1d(largest, spread)], np.float32), low, high)


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The result of `search`.

    Attributes:
        scale: s, float32 (K,); 1 for channels that are kept.
        alpha: that made it; None if only channels are kept, s is 1.
        keep: channels kept float, ascending.
        before, after: relative error on held-out rows without and with it.
    """

    scale: Array
    alpha: float | None
    keep: tuple[int, ...]
    before: float
    after: float


def scales(peak: Array, reach: Array, alpha: float) -> Array:
    """peak^alpha / reach^(1 - alpha), float32 (K,), of geometric mean 1; zeros count as nearly zero.

    Args:
        peak: largest magnitude of each input channel, (K,).
        reach: largest magnitude of each row of the weights, (K,).
        alpha: 0 leaves the weights equal, 1 the activations.
    """
    x, w = (
        np.maximum(np.asarray(a, np.float64), _FLOOR * max(a.max(initial=0.0), 1e-30))
        for a in (peak, reach)
    )
    log = alpha * np.log(x) - (1 - alpha) * np.log(w)
    made: Array = np.exp(log - log.mean()).astype(np.float32)
    return made


def outliers(peak: Array, most: int = KEPT) -> tuple[int, ...]:
    """The channels whose peaks tower over the rest, at most so many, the largest of them; ascending."""
    if peak.size <= most:
        return ()
    largest = np.argsort(-peak, kind="stable")[:most]
    # of the rest: among few channels, the percentile of all would be an outlier itself
    usual = np.percentile(np.delete(peak, largest), 99)
    return tuple(sorted(int(k) for k in largest if peak[k] > _TOWER * usual))


class Product:
    """A product on rows of some samples, in float, and how far off its quantized form is."""

    def __init__(self, samples: Sequence[Sample], weight: Array, scheme: Scheme) -> None:
        """`weight` is float32 (K, N), and `scheme` how it is quantized."""
        self._weight, self._scheme = weight, scheme
        counts = [len(sample.rows) for sample in samples]
        self._owner = np.repeat(np.arange(len(samples)), counts)
        self._rows = np.concatenate([sample.rows for sample in samples])
        self._low = np.stack([sample.low for sample in samples])
        self._high = np.stack([sample.high for sample in samples])
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # what is infinite has no error to compare
            self._result = self._rows @ weight
            power = np.square(self._result, dtype=np.float64).sum(axis=1)
        sums = np.bincount(self._owner, power, len(samples))
        mean = sums / np.maximum(counts, 1)
        self._power = power + _SHARE * mean[self._owner] + 1e-30

    def error(self, scale: Array | None = None, keep: Sequence[int] = ()) -> float:
        """The error of Q(x / s) Q(s W), relative to the power of x W, mean over rows.

        Args:
            scale: s, float32 (K,); None for 1.
            keep: channels that stay float.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return self._error(scale, list(keep))

    def _error(self, scale: Array | None, kept: list[int]) -> float:
        inverse = np.ones(len(self._weight), np.float32) if scale is None else 1 / scale
        weight = self._weight if scale is None else self._weight * scale[:, None]
        if kept:
            inverse, weight = inverse.copy(), weight.copy()
            inverse[kept], weight[kept] = 0, 0
        params = weight_params(weight, self._scheme)
        codes, step = self._codes(inverse)
        made = (codes @ dequantize(quantize(weight, params), params)) * step
        if kept:
            made += self._rows[:, kept] @ self._weight[kept]
        made -= self._result
        noise = np.square(made, dtype=np.float64).sum(axis=1)
        return float((noise / self._power).mean()) if len(noise) else 0.0

    def _codes(self, inverse: Array) -> tuple[Array, Array]:
        """What DynamicQuantizeLinear makes of x / s: codes less zero point (rows, K), and scales (rows, 1)."""
        low = np.minimum((self._low * inverse).min(axis=1), 0)
        high = np.maximum((self._high * inverse).max(axis=1), 0)
        step = ((high - low) / np.float32(255)).astype(np.float32)
        safe = np.where(step > 0, step, np.float32(1))  # all zero: codes are 0 at any scale
        zero = np.clip(np.rint(-low / safe), 0, 255)[self._owner, None]
        own = safe[self._owner, None]
        codes = self._rows * inverse
        codes /= own
        np.rint(codes, out=codes)
        np.clip(codes, -zero, 255 - zero, out=codes)
        return codes, own


def row_budget(weights: Sequence[Array], samples: int, rows: int) -> int:
    """How many rows of each sample make the search quick, at most `rows`.

    Args:
        weights: of the products, (K, N) each.
        samples: their number.
        rows: that would be enough.
    """
    columns = min(COLUMNS, sum(int(w.shape[1]) for w in weights))
    fit: int = _WORK // (len(weights[0]) * columns * max(samples, 1))
    return min(rows, max(_LEAST, fit))


def dynamic_error(
    samples: Sequence[Sample], weight: Array, scheme: Scheme, scale: Array | None = None,
    keep: Sequence[int] = (),
) -> float:  # fmt: skip
    """The relative error of the product of `samples` and `weight`, float32 (K, N); see `Product.error`."""
    return Product(samples, weight, scheme).error(scale, keep)


def search(
    samples: Sequence[Sample], held_out: Sequence[Sample], weights: Sequence[Array], scheme: Scheme, *,
    alphas: Sequence[float] = ALPHAS, most: int = KEPT, columns: int = COLUMNS,
) -> Found | None:  # fmt: skip
    """The scale of least error for all products that read the same input; None if it does not help.

    It helps if it saves a tenth of the error on held-out rows. Channels stay float if that saves another tenth.

    Args:
        samples: of the input, that choose.
        held_out: other ones, that judge.
        weights: of the products, float32 (K, N) each.
        scheme: of the weights.
        alphas: to try.
        most: channels that may stay float, 0 for none.
        columns: of the weights, that errors are measured on.
    """
    if not sum(len(s.rows) for s in samples) or not sum(len(s.rows) for s in held_out):
        return None
    peak = np.max([np.maximum(-s.low, s.high) for s in samples], axis=0)
    reach = np.max([np.abs(w).max(axis=1, initial=0.0) for w in weights], axis=0)
    if not (np.isfinite(peak).all() and peak.max(initial=0.0) > 0 and reach.max() > 0):
        return None
    thin = _thinned(weights, columns)
    chosen, judge = Product(samples, thin, scheme), Product(held_out, thin, scheme)
    made = {alpha: scales(peak, reach, alpha) for alpha in alphas}
    alpha = min(made, key=lambda a: chosen.error(made[a]))
    before, after = judge.error(), judge.error(made[alpha])
    best = Found(made[alpha], alpha, (), before, after)
    split = _split(chosen, judge, peak, made, most, before)
    if split is not None and split.after < (1 - _GAIN) * min(before, after):
        best = split
    return best if best.after < (1 - _GAIN) * before else None


def _split(
    chosen: Product, judge: Product, peak: Array, made: dict[float, Array], most: int, before: float
) -> Found | None:
    """The best with channels kept float; None if no channel towers over the others."""
    tried: list[tuple[float, float | None, Array, tuple[int, ...]]] = []
    plain = np.ones(peak.shape, np.float32)
    for alpha, scale in ((None, plain), *made.items()):
        keep = outliers(peak / scale, most)
        if keep:
            own = scale.copy()
            own[list(keep)] = 1
            tried.append((chosen.error(own, keep), alpha, own, keep))
    if not tried:
        return None
    _, alpha, scale, keep = min(tried, key=lambda item: item[0])
    return Found(scale, alpha, keep, before, judge.error(scale, keep))


def _thinned(weights: Sequence[Array], columns: int) -> Array:
    """Evenly spread columns of all weights, side by side."""
    step = -(-sum(w.shape[1] for w in weights) // columns)
    return np.concatenate([w[:, ::step] for w in weights], axis=1)
