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
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.errors import DataError

Array = npt.NDArray[Any]

_DAMPS = (0.001, 0.01, 0.1)  # of the mean power, added to that of each input; GPTQ has 0.01


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

    def error(self, W: Array, made: Array) -> float:
        """Return E |W x + d - V z|^2 / N, the mean squared error of an output; d is 0 if nothing is behind it.

        Args:
            W: weights of the float layer, (N, K).
            made: V, (N, K).

        Raises:
            ValueError: `off` is not known.
        """
        if self.off is None:
            raise ValueError("errors need the second moment of x - z")
        wide = np.asarray(W, np.float64)
        rest = wide - made
        total = np.vdot(rest @ self.H, rest) + 2 * np.vdot(rest, self.missing(wide))
        total += np.vdot(wide @ self.off, wide)
        if self.behind is not None:
            if self.behind.tied is None:
                raise ValueError("errors need the moment of d with x - z")
            total += 2 * np.vdot(wide, self.behind.tied) + self.behind.off
        return max(float(total), 0.0) / max(len(wide), 1)

    def missing(self, W: Array) -> Array:
        """Return E[(W (x - z) + d) z'], float64 (N, K): what the output lacks, as far as z tells.

        Args:
            W: weights of the float layer, (N, K).
        """
        made: Array = np.asarray(W, np.float64) @ self.cross
        return made if self.behind is None else made + self.behind.cross


def aim(W: Array, drift: Drift, judge: Drift | None = None) -> tuple[Array, float]:
    """Return the weights to round, float32 (N, K), and the share of the way from W to T, 0 to 1: 0 if nothing helps.

    Args:
        W: weights of the float layer, (N, K).
        drift: moments of data that T is made from.
        judge: of other data, which decide on the damping and the share; by default `drift` itself.

    Raises:
        DataError: H holds NaN or infinities.
    """
    wide, H = np.asarray(W, np.float64), np.asarray(drift.H, np.float64)
    missing = drift.missing(wide)
    if not (np.isfinite(H).all() and np.isfinite(missing).all()):
        raise DataError("the second moment of the input holds NaN or infinities: calibrate again.")
    power = np.diag(H)
    if not np.any(missing) or not np.any(power):
        return np.asarray(W, np.float32), 0.0
    judge = drift if judge is None else judge
    needed = judge.missing(wide)
    best: Array = np.zeros_like(wide)
    gain, share = 0.0, 0.0
    for damp in _DAMPS:
        firm = H + np.diag(np.where(power > 0, damp * power.mean(), power.mean()))
        way = np.linalg.solve(firm, missing.T).T
        # E |W (x - z) + d - s way z|^2 is a parabola in s
        top, least = np.vdot(needed, way), np.vdot(way @ judge.H, way)
        s = float(np.clip(top / least, 0, 1)) if least > 0 else 0.0
        if s * (2 * top - s * least) > gain:
            best, gain, share = way, float(s * (2 * top - s * least)), s
    made: Array = (wide + share * best).astype(np.float32)
    return made, share
