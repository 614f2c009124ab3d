"""The best of all ways to round the weights of a layer, judged on data that chose nothing.

On inputs that hardly correlate, GPTQ fits the calibration data and is worse than rounding to nearest on other data, so
each layer is judged on its own. Plain rounding to nearest is always a candidate: the result is never worse than it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.algo.blocks import Blocked, check_weights, deviation, some
from qcompile.algo.columns import ScaleType
from qcompile.algo.drift import Drift, Wanted, aim
from qcompile.algo.gptq import Factor, gptq, prepare
from qcompile.algo.hqq import hqq
from qcompile.algo.kquant import kquant
from qcompile.algo.polish import polish
from qcompile.algo.rtn import rtn, search
from qcompile.errors import RecipeError, nearest

Array = npt.NDArray[Any]

PLAIN = ("rtn", "search", "kquant", "hqq")
"""Algorithms that need weights alone; `search` and `kquant` use the power of the input if it is known."""

SECOND = ("gptq", "gptq-order", "gptq-polish", "gptq-firm")
"""Algorithms that need E[x x']: inputs in their order, by power, polished, and polished with stronger damping."""

QUICK = ("rtn", "gptq", "search")
"""What "auto" tries, the last one where some rows show that it is better than GPTQ. On SmolLM2 polishing left perplexity
as it was (27.62 for 27.60), and inputs in order of power made it worse (28.66), though errors of layers were smaller."""

_AIMED = ("search", *SECOND)
_ROWS = 64  # of a weight, on which "search" must be better than GPTQ to be tried on all
_FINE = 8  # bits, at which second moments have nothing left to save
_FIRM = 0.05  # damping of `gptq-firm`: better where there is little data


@dataclasses.dataclass(frozen=True)
class Tally:
    """How candidates did.

    Attributes:
        algorithm: of the result.
        error: of the result, as `blocks.error` has it for the moment that judged.
        rtn: the error of plain rounding to nearest.
        tried: each candidate and its error relative to `rtn`, in the order they were tried; 1 if both are 0.
        share: of the way to weights that make up for errors of earlier layers, see `drift`; 0 without such.
    """

    algorithm: str
    error: float
    rtn: float
    tried: tuple[tuple[str, float], ...]
    share: float = 0.0


class Factors:
    """Factors of E[x x'], each made when it is first asked for: one object for all weights that read the input."""

    def __init__(self, H: Array) -> None:
        """`H` is (K, K)."""
        self._H = H
        self._scaled: dict[bytes, Factors] = {}
        self._made: dict[tuple[bool, float], Factor] = {}

    def get(self, *, order: bool, damp: float = 0.01) -> Factor:
        """The factor, as `gptq.prepare` gives it.

        Raises:
            ValueError, DataError: as `gptq.prepare`.
        """
        key = order, damp
        if key not in self._made:
            self._made[key] = prepare(self.H, order=order, damp=damp)
        return self._made[key]

    @property
    def H(self) -> Array:  # noqa: N802 - as everybody calls it
        """E[x x'], (K, K)."""
        return self._H

    def scaled(self, scale: Array) -> Factors:
        """Those of inputs that are divided by `scale`, (K,); what they are damped by is that of these."""
        return self._scaled.setdefault(scale.tobytes(), _ScaledFactors(self, scale))


class _ScaledFactors(Factors):
    """Made from the factors of inputs as they are."""

    def __init__(self, base: Factors, scale: Array) -> None:
        super().__init__(base.H)
        self._base, self._scale = base, scale

    @property
    def H(self) -> Array:  # noqa: N802 - as everybody calls it
        made: Array = self._H / self._scale
        made /= self._scale[:, None]
        return made

    def get(self, *, order: bool, damp: float = 0.01) -> Factor:
        key = order, damp
        if key not in self._made:
            self._made[key] = self._base.get(order=order, damp=damp).scaled(self._scale)
        return self._made[key]


def solve_blocks(
    W: Array, *, bits: int, block: int | None, symmetric: bool, algorithm: str = "auto",
    H: Array | Factors | None = None, held_out_H: Array | None = None, scales: ScaleType = "float32",
    drift: tuple[Drift, Drift] | None = None, scale: Array | None = None,
) -> tuple[Blocked, Tally]:  # fmt: skip
    """Return the codes of least error among the candidates, and how all did; the first of equals.

    Args:
        W: float (N, K).
        bits: 2 to 8.
        block: weights that share a scale; 0 or None for a row.
        symmetric: the zero points are 2**(bits - 1).
        algorithm: one of `PLAIN` and `SECOND`, which is then compared with "rtn" alone; "auto" for those of `QUICK` or,
            without moments, `PLAIN`; or "all".
        H: E[x x'], (K, K), or `Factors` of it where several weights read the input; or E[x^2] alone, (K,), without
            `SECOND`. None: errors are those of the weights.
        held_out_H: the same of data that judges; by default `H` itself, which favours what fits it most closely.
        scales: type whose values scales are rounded to.
        drift: how inputs of the float model differ, in the data that chooses and in that which judges. `SECOND` and "search"
            then round weights that make up for it (`drift.aim`), and errors are those from the float layer on float inputs.
        scale: float32 (K,), positive: codes are those of `W` with its columns multiplied by it, for inputs divided by it.
            Rounding to nearest of `W` as it is remains what errors are compared with, but is none of the candidates.

    Raises:
        RecipeError: no such algorithm, or it needs an `H` that is not given.
        ValueError, ModelError, DataError: as the algorithms.
    """
    W = check_weights(W)
    factors = H if isinstance(H, Factors) else None
    known = H.H if isinstance(H, Factors) else H
    if factors is None and known is not None and known.ndim == 2:
        factors = Factors(known)
    names = _names(algorithm, bits, full=factors is not None)
    judging = known if held_out_H is None else held_out_H
    if judging is not None and not np.any(judging):
        judging = None  # inputs that are always 0 judge nothing
    judge = _Judge(W, judging, None if drift is None else Wanted(W, drift[1]))
    kept: tuple[str, Blocked, float] | None = None
    errors: list[tuple[str, float]] = []
    wanted, share = W, 0.0
    if drift is not None:
        wanted, share = aim(W, drift[0], judge.wanted)
    power = None if known is None else np.diag(known) if known.ndim == 2 else known
    plain = _Candidates(W, bits, block, symmetric, scales, factors, power)
    run = dataclasses.replace(plain, W=wanted) if share else plain
    nearby = plain.make(PLAIN[0])
    base = judge.error(nearby)
    errors.append((PLAIN[0], base))
    if scale is None:
        kept = PLAIN[0], nearby, base
    else:
        plain, run = plain.scaled(scale), run.scaled(scale)
        judge = dataclasses.replace(judge, scale=scale)
    few = some(len(W), _ROWS)
    for name in names if names == PLAIN[:1] and kept is None else names[1:]:
        if name == "search" and names == QUICK and kept is not None and kept[0] == "gptq":
            better = judge.better(run.rows(few).make(name), kept[1], few)
            if not better:  # what is worse on these rows is not tried on the others
                continue
        made = (run if name in _AIMED else plain).make(name)
        found = judge.error(made)
        errors.append((name, found))
        if kept is None or found < kept[2]:
            kept = name, made, found
    assert kept is not None  # there is a name
    tried = tuple((name, _ratio(found, base)) for name, found in dict(errors).items())
    return kept[1], Tally(kept[0], kept[2], base, tried, share)


@dataclasses.dataclass(frozen=True, eq=False)
class _Judge:
    """Errors of candidates on data that judges; codes are those of weights whose columns are multiplied by `scale`."""

    W: Array
    H: Array | None
    wanted: Wanted | None
    scale: Array | None = None

    def error(self, made: Blocked) -> float:
        """As `Tally.error`."""
        values = self._values(made)
        if self.wanted is None:
            return deviation(self.W - values.astype(np.float64), self.H)
        return self.wanted.error(values)

    def better(self, few: Blocked, other: Blocked, rows: Array) -> bool:
        """Whether some rows, rounded, are better than the same rows of `other`."""
        pair = self._values(few), self._values(other.rows(rows))
        if self.wanted is None:
            mine, theirs = (deviation(self.W[rows] - v.astype(np.float64), self.H) for v in pair)
        else:
            mine, theirs = (self.wanted.part(values, rows) for values in pair)
        return mine < theirs

    def _values(self, made: Blocked) -> Array:
        values: Array = made.dequantize()
        if self.scale is not None:
            values /= self.scale
        return values


@dataclasses.dataclass(eq=False)
class _Candidates:
    """Runs algorithms by name on one weight; what two of them share is made once."""

    W: Array
    bits: int
    block: int | None
    symmetric: bool
    scales: ScaleType
    factors: Factors | None
    power: Array | None
    ordered: Blocked | None = dataclasses.field(default=None, init=False)

    def scaled(self, scale: Array) -> _Candidates:
        """The same for weights whose columns are multiplied by `scale`, and inputs divided by it."""
        return dataclasses.replace(
            self,
            W=self.W * scale,
            factors=None if self.factors is None else self.factors.scaled(scale),
            power=None if self.power is None else self.power / np.square(scale),
        )

    def rows(self, which: Array) -> _Candidates:
        """The same for some of the rows."""
        return dataclasses.replace(self, W=self.W[which])

    def make(self, name: str) -> Blocked:
        W, power, scales = self.W, self.power, self.scales
        bits, block, symmetric = self.bits, self.block, self.symmetric
        makers: dict[str, Callable[[], Blocked]] = {
            "rtn": lambda: rtn(W, bits=bits, block=block, symmetric=symmetric, scales=scales),
            "search": lambda: search(
                W, bits=bits, block=block, symmetric=symmetric, power=power, scales=scales
            ),
            "kquant": lambda: kquant(
                W, bits=bits, block=block, symmetric=symmetric, power=power, scales=scales
            ),
            "hqq": lambda: hqq(W, bits=bits, block=block, symmetric=symmetric, scales=scales),
            "gptq": lambda: self._gptq(order=False),
            "gptq-order": lambda: self._gptq(order=True),
            "gptq-polish": lambda: self._polished(self._gptq(order=True)),
            "gptq-firm": lambda: self._polished(self._gptq(order=True, damp=_FIRM)),
        }
        return makers[name]()

    def _gptq(self, *, order: bool, damp: float = 0.01) -> Blocked:
        if order and damp != _FIRM and self.ordered is not None:
            return self.ordered
        assert self.factors is not None  # _names saw to it
        made = gptq(
            self.W,
            self.factors.get(order=order, damp=damp),
            bits=self.bits,
            block=self.block,
            symmetric=self.symmetric,
            scales=self.scales,
        )
        if order and damp != _FIRM:
            self.ordered = made
        return made

    def _polished(self, start: Blocked) -> Blocked:
        assert self.factors is not None
        return polish(self.W, start, self.factors.H, scales=self.scales)


def _names(algorithm: str, bits: int, *, full: bool) -> tuple[str, ...]:
    """The candidates, "rtn" first."""
    if algorithm == "auto":
        return PLAIN[:2] if bits >= _FINE else QUICK if full else PLAIN
    if algorithm == "all":
        return (*PLAIN, *SECOND) if full else PLAIN
    known = (*PLAIN, *SECOND)
    if algorithm not in known:
        raise RecipeError(
            f"{algorithm!r} is no algorithm for blocks of weights; expected 'auto', 'all' or one of "
            f"{', '.join(known)}." + nearest(algorithm, ("auto", "all", *known))
        )
    if algorithm in SECOND and not full:
        raise RecipeError(
            f"{algorithm!r} needs the second moment of the input: give calibration data, "
            f"or choose one of {', '.join(PLAIN)}."
        )
    return tuple(dict.fromkeys(("rtn", algorithm)))


def _ratio(found: float, base: float) -> float:
    return found / base if base > 0 else 1.0
