"""Weights for inputs that quantized layers before have changed: the aim is still what the float layer computes.

With x the input in the float model, z the one that the quantized model gives, and V the weights that are sought,

    E |W x - V z|^2  =  E |(W - V) z + W (x - z)|^2
                     =  tr((T - V) H (T - V)') + const,    T = W + W C inv(H),   H = E[z z'],   C = E[(x - z) z']

so that rounding T in place of W, with the same H, makes up for what the layers before have lost. (Li et al. 2025, GPTAQ:
Efficient Finetuning-Free Quantization for Asymmetric Calibration, and Arai and Ichikawa 2025, Quantization Error
Propagation, have this aim for GPTQ.) Where the output is added to what other layers have made, and these have lost d, the
layer that is rounded now can make up for that, too: T = W + (W C + E[d z']) inv(H). C is estimated from few rows, and T fits them too well. So H is damped,
and only a share of the way from W to T is gone: what is best for rows that T was not made from.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from qcompile.algo.blocks import some
from qcompile.errors import DataError, NotFiniteError

Array = npt.NDArray[Any]

_DAMPS = (0.001, 0.01, 0.1)  # of the mean power, added to that of each input; GPTQ has 0.01
_ROWS = 96  # of the weights, spread evenly, that the damping is chosen by
_ALL = slice(None)
_WEIGHTS = 1 << 22  # at once: 32 MiB of float64
_MOST = 10  # damping at which no moment is indefinite


@dataclasses.dataclass(frozen=True, eq=False)
class Behind:
    """Moments of d, what a value lacks that the output of a layer is added to.

    Attributes:
        cross: E[d z'], (N, K).
        tied: E[d (x - z)'], (N, K); None where no errors are asked for.
        off: E |d|^2, of all N together.
    """

    cross: Array
    tied: Array | None = None
    off: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Drift:
    """Second moments of the input z of a quantized model, and of what it lacks to the float model's x.

    Attributes:
        H: E[z z'], (K, K).
        cross: E[(x - z) z'], (K, K).
        off: E[(x - z) (x - z)'], (K, K); None where no errors are asked for.
        behind: where the output is added to a value that lacks d, of all, to the float model's.
    """

    H: Array
    cross: Array
    off: Array | None = None
    behind: Behind | None = None
    _factors: dict[float, Any] = dataclasses.field(default_factory=dict, repr=False)
    _lock: Any = dataclasses.field(default_factory=threading.Lock, repr=False)

    def undone(self, missing: Array, damp: float) -> Array:
        """Return what weights must gain to give what the output lacks, float64 (N, K).

        Args:
            missing: as `missing` gives it.
            damp: share of the mean power of inputs that is added to that of each.
        """
        with self._lock:
            if damp not in self._factors:  # one factor for all weights that read the input
                self._factors[damp] = _factor(np.asarray(self.H, np.float64), damp)
        made: Array = scipy.linalg.cho_solve(self._factors[damp], missing.T, check_finite=False).T
        return made

    def missing(self, W: Array, rows: slice | Array = _ALL) -> Array:
        """Return E[(W (x - z) + d) z'], float64 (n, K): what the output lacks, as far as z tells.

        Args:
            W: some rows of the weights of the float layer, (n, K).
            rows: which ones.
        """
        made: Array = np.asarray(W, np.float64) @ self.cross
        return made if self.behind is None else made + self.behind.cross[rows]


class Wanted:
    """What a float layer gives on some data, and how far from it others are. Some rows of weights are worked on at once."""

    def __init__(self, W: Array, drift: Drift) -> None:
        """`W` are the weights of the layer, (N, K)."""
        self._W, self._drift = W, drift
        self._missing = np.empty(W.shape, np.float32)
        for rows in _pieces(W):
            self._missing[rows] = drift.missing(W[rows], rows)
        self._fast = drift.H.astype(np.float32)
        self._others: float | None = None  # terms of the error that the weights have no part in

    def error(self, made: Array) -> float:
        """Return E |W x + d - V z|^2 / N of V = `made`, (N, K); d is 0 if nothing is behind the output.

        Raises:
            ValueError: the drift has not all moments for it.
        """
        if self._others is None:
            self._others = self._find_others()
        total = self._others
        total += sum(self.part(made[rows], rows) for rows in _pieces(made))
        return max(total, 0.0) / max(len(made), 1)

    def part(self, made: Array, rows: Array | slice) -> float:
        """Return what some rows, (n, K), add to the error of all, but for what is the same whatever they are."""
        rest = np.asarray(self._W[rows], np.float64) - made
        total = float(np.vdot(rest @ self._drift.H, rest))
        return total + 2 * float(np.vdot(rest, self._missing[rows]))

    def terms(self, way: Array, rows: Array | slice) -> Array:
        """Return a and b, (2,): with s of a way from the weights, the error of some rows falls by s (2 a - s b).

        Args:
            way: float32, what these rows of the weights gain at s = 1, (n, K).
            rows: which of the N rows these are.
        """
        return np.array(
            [np.vdot(self._missing[rows], way), np.vdot(way @ self._fast, way)], np.float64
        )

    def _find_others(self) -> float:
        drift, total = self._drift, 0.0
        if drift.off is None:
            raise ValueError("errors need the second moment of x - z")
        if drift.behind is not None:
            if drift.behind.tied is None:
                raise ValueError("errors need the moment of d with x - z")
            total += 2 * float(np.vdot(self._W, drift.behind.tied)) + drift.behind.off
        for rows in _pieces(self._W):
            wide = np.asarray(self._W[rows], np.float64)
            total += float(np.vdot(wide @ drift.off, wide))
        return total


def aim(W: Array, drift: Drift, judge: Drift | Wanted | None = None) -> tuple[Array, float]:
    """Return the weights to round, float32 (N, K), and the share of the way from W to T, 0 to 1: 0 if nothing helps.

    Args:
        W: weights of the float layer, (N, K).
        drift: moments of data that T is made from.
        judge: of other data, which decide on the damping and the share; by default `drift` itself.

    Raises:
        DataError: H holds NaN or infinities, or is no second moment.
    """
    moments = [drift.H, drift.cross, *([] if drift.behind is None else [drift.behind.cross])]
    if not all(np.isfinite(moment).all() for moment in moments):
        raise NotFiniteError(
            "the second moment of the input holds NaN or infinities: calibrate again."
        )
    if not any(map(np.any, moments[1:])) or not np.any(np.diag(drift.H)):
        return np.asarray(W, np.float32), 0.0
    judge = drift if judge is None else judge
    wanted = judge if isinstance(judge, Wanted) else Wanted(W, judge)
    taken = some(len(W), _ROWS)
    few = drift.missing(W[taken], taken)
    gains = {
        damp: _best(wanted.terms(drift.undone(few, damp).astype(np.float32), taken))[1]
        for damp in _DAMPS
    }
    damp = max(gains, key=gains.__getitem__)
    made, terms = np.empty(W.shape, np.float32), np.zeros(2)
    for rows in _pieces(W):
        made[rows] = drift.undone(drift.missing(W[rows], rows), damp)
        terms += wanted.terms(made[rows], rows)
    share, gain = _best(terms)
    if gain <= 0:
        return np.asarray(W, np.float32), 0.0
    made *= np.float32(share)
    made += W
    return made, share


def _best(terms: Array) -> tuple[float, float]:
    """The share of a way that lowers the error most, 0 to 1, and by how much it does: a parabola, see `Wanted.terms`."""
    a, b = map(float, terms)
    s = min(max(a / b, 0.0), 1.0) if b > 0 else 0.0
    return s, s * (2 * a - s * b)


def _pieces(W: Array) -> list[slice]:
    """Rows that are worked on at once, all of them in turn."""
    step = max(_WEIGHTS // max(W.shape[1], 1), 1)
    return [slice(first, first + step) for first in range(0, len(W), step)]


def _factor(H: Array, damp: float) -> tuple[Array, bool]:
    """The Cholesky factor of H, damped more strongly where sums in float32 have left it indefinite."""
    power = np.diag(H)
    while True:
        firm = H + np.diag(np.where(power > 0, damp * power.mean(), power.mean()))
        try:
            made: tuple[Array, bool] = scipy.linalg.cho_factor(
                firm, overwrite_a=True, check_finite=False
            )
        except np.linalg.LinAlgError:
            if damp >= _MOST:
                raise DataError(
                    "the second moment of the input is not positive semidefinite: calibrate again."
                ) from None
            damp *= 10
        else:
            return made
