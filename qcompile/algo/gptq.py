"""GPTQ: weights are rounded one input after the other, and those that follow make up for the error.

Frantar et al. 2022, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers. The error of the
output of a row w is e H e' with e = w - w' and H = E[x x']. With H = R R', R upper triangular,

    e H e' = sum_j (sum_(i <= j) e_i R_ij)^2,

and term j is least, given those before, for w'_j next to

    w_j + sum_(i < j) e_i S_ij,      S_ij = R_ij / R_jj                                                    (1)

The paper has the Cholesky factor of the inverse of H and subtracts e_j from the weights that follow (its eq. 3, 4); the
codes are the same (a test compares with the inverse, updated column by column). Here nothing is inverted, and errors
are only read: a product of matrices for each block of inputs, one with a vector for each input. Where the factor is
read along the wrong axis, as several ports of the code do, all S are 0 and the result is that of rounding to nearest.

The scale of a block is chosen when its turn comes, from what is left of its weights: the continuous values that are best
for all its inputs given the errors so far, w_B + e_< S_<B inv(S_BB). If inputs are taken in the order of their power
("act-order"), a block's inputs have their turns apart; its scale is chosen before from the weights as they are, so that
blocks remain runs of consecutive inputs, as MatMulNBits has them. R_jj^2 is what an error of input j costs that no later
input makes up for; scales are searched by it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.algo.blocks import Blocked, check_scheme, check_weights, groups, width
from qcompile.algo.columns import Columns, ScaleType, nearest, powers
from qcompile.algo.rtn import search_columns, whole
from qcompile.errors import DataError, NotFiniteError

Array = npt.NDArray[Any]

DAMP = 0.01  # of the mean power, added to the power of each input: the paper's
_LAZY = 128  # inputs at once, between products of matrices: the paper's
_SKEW = (
    1e-3  # of the greatest power: H may differ from its transpose by so much, from sums in float32
)
_ROWS = 1 << 24  # weights at once: 64 MiB of float32


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """What `gptq` needs of H; one for all weights that read the same input.

    Attributes:
        order: in which inputs have their turns, int64 (K,).
        share: S of (1) in this order, float32 (K, K): upper triangular, 1 on the diagonal.
        left: R_jj^2, of mean 1, in this order, float32 (K,).
        damp: share of the mean power that was added.
        ordered: whether `order` is another one than 0, 1, ...
    """

    order: Array
    share: Array
    left: Array
    damp: float
    ordered: bool

    def scaled(self, scale: Array) -> Factor:
        """The factor of inputs that are divided by `scale`, (K,), positive: of D H D with D = diag(1 / scale), R is D R.

        What H was damped by is divided by the squares as well.
        """
        turned = np.asarray(scale, np.float64)[self.order]
        left = self.left / np.square(turned)
        share = self.share * turned.astype(np.float32)
        share /= turned.astype(np.float32)[:, None]
        return dataclasses.replace(
            self,
            share=share,
            left=(left / max(left.mean() if len(left) else 0.0, 1e-30)).astype(np.float32),
        )


def prepare(H: Array, *, order: bool = False, damp: float = DAMP) -> Factor:
    """Return the factor of `H`, damped more strongly, up to tenfold the mean power, where it is not definite.

    An input that is always 0 has a part of its own: its weights are rounded to nearest, not set to 0 as in the paper's
    code, since other data may bring it to life.

    Args:
        H: E[x x'] or a multiple of it, (K, K), symmetric and positive semidefinite.
        order: inputs of most power first ("act-order").
        damp: share of the mean power of live inputs, positive.

    Raises:
        ValueError: `H` is not square, or `damp` not positive.
        DataError: `H` is no second moment: NaN, infinite, not symmetric, or far from positive semidefinite.
    """
    if not 0 < damp < np.inf:
        raise ValueError(f"damp is {damp}: expected a positive share")
    gram = moment(H)
    power = np.diag(gram)
    turns = np.argsort(-power, kind="stable") if order else np.arange(len(gram))
    firm = gram[np.ix_(turns, turns)] if order else gram
    used = damp
    while True:
        try:
            root = _root(firm, used)
            break
        except np.linalg.LinAlgError:
            if used >= 10:
                raise DataError(
                    "the second moment of the input is not positive semidefinite: calibrate again."
                ) from None
            used *= 10
    diagonal = np.diag(root)
    left = np.square(diagonal)
    return Factor(
        turns,
        (root / diagonal).astype(np.float32),
        (left * (len(left) / max(left.sum(), 1e-30))).astype(np.float32),
        used,
        order,
    )


def gptq(
    W: Array, factor: Factor, *, bits: int, block: int | None, symmetric: bool, search: bool = True,
    scales: ScaleType = "float32",
) -> Blocked:  # fmt: skip
    """Return codes of little error in the output, for `factor` of the second moment of the input.

    Args:
        W: float (N, K).
        factor: of the input, K deep. If it is ordered, scales are chosen from `W` as it is.
        bits: 2 to 8.
        block: weights that share a scale; 0 or None for a row.
        symmetric: the zero points are 2**(bits - 1).
        search: scales of least error, each square weighted by `factor.left`; if not, of the whole range.
        scales: type whose values scales are rounded to.

    Raises:
        ValueError: an argument is out of range, or `factor` is of another depth.
        ModelError: `W` holds NaN or infinities.
    """
    check_scheme(bits, block)
    W = check_weights(W)
    count, depth = W.shape
    if len(factor.order) != depth:
        raise ValueError(
            f"weights {W.shape} read {depth} inputs, the factor has {len(factor.order)}"
        )
    codes = np.empty((count, depth), np.uint8)
    scale = np.empty((count, groups(depth, block)), np.float32)
    zero = np.empty(scale.shape, np.uint8)
    rows = max(_ROWS // max(depth, 1), 1)
    for first in range(0, count, rows):
        part = np.s_[first : first + rows]
        solver = _Solver(W[part], factor, block, (bits, symmetric, search, scales))
        codes[part], scale[part], zero[part] = solver.solve()
    return Blocked(codes, scale, zero, bits, block or 0)


class _Solver:
    """Rounds some rows. Layout (K, N), divided by a power of two for each row."""

    def __init__(
        self, W: Array, factor: Factor, block: int | None, scheme: tuple[int, bool, bool, ScaleType]
    ) -> None:
        """`scheme` is bits, symmetric, search, scales, as `gptq` has them."""
        self._factor = factor
        self._bits, self._symmetric, self._search, self._scales = scheme
        self._size = width(W.shape[1], block)
        self._unit = powers(np.abs(W).max(axis=1, initial=0))
        self._wanted = np.ascontiguousarray((W / self._unit[:, None]).T)
        self._codes = np.zeros(self._wanted.shape, np.float32)
        count = groups(W.shape[1], block)
        self._scale = np.ones((count, len(W)), np.float32)
        self._zero = np.zeros((count, len(W)), np.float32)
        if not self._wanted.size:
            self._scale[:] = self._unit  # no weights: a scale of 1 all the same

    def solve(self) -> tuple[Array, Array, Array]:
        """Codes (N, K), scales and zero points (N, G)."""
        depth = len(self._wanted)
        off = np.empty_like(self._wanted)  # e, in the order of turns
        if self._factor.ordered:
            self._choose_before()
            spans = [(first, min(first + _LAZY, depth)) for first in range(0, depth, _LAZY)]
        else:
            spans = [
                (first, min(first + self._size, depth)) for first in range(0, depth, self._size)
            ]
        for first, last in spans:
            if not self._factor.ordered:
                self._choose(first, last, off)
            for start in range(first, last, _LAZY):
                self._round(start, min(start + _LAZY, last), off)
        scale = (self._scale * self._unit).T
        return self._codes.T.astype(np.uint8), scale, self._zero.T.astype(np.uint8)

    def _round(self, first: int, last: int, off: Array) -> None:
        """Turns `first` to `last`, at most `_LAZY` of them."""
        order, share = self._factor.order[first:last], self._factor.share
        target = self._wanted[order]
        if first:
            target += share[:first, first:last].T @ off[:first]
        inside = np.ascontiguousarray(share[first:last, first:last].T)  # row j: S_ij for i < j
        mine = off[first:last]
        for j, k in enumerate(order):
            group = k // self._size
            scale, zero = self._scale[group], self._zero[group]
            if j:
                target[j] += inside[j, :j] @ mine[:j]
            made = nearest(target[j], scale, zero, self._bits, out=self._codes[k])
            np.subtract(made, zero, out=mine[j])
            mine[j] *= scale
            np.subtract(self._wanted[k], mine[j], out=mine[j])

    def _choose(self, first: int, last: int, off: Array) -> None:
        """The scale of the block of these inputs, from what is left of their weights."""
        values = self._wanted[first:last]
        if first:
            share = self._factor.share
            carried = share[:first, first:last].T @ off[:first]
            # e_B S_BB = -carried, transposed; then w - e_B
            values = values + np.linalg.solve(share[first:last, first:last].T, carried)
        self._set(first // self._size, values, self._factor.left[first:last])

    def _choose_before(self) -> None:
        """The scales of all blocks, from the weights as they are."""
        left = np.empty_like(self._factor.left)
        left[self._factor.order] = self._factor.left
        for group in range(len(self._scale)):
            part = np.s_[group * self._size : (group + 1) * self._size]
            self._set(group, self._wanted[part], left[part])

    def _set(self, group: int, values: Array, left: Array) -> None:
        if not values.size:
            return
        part = Columns(slice(None), values, self._unit)
        if self._search:
            found = search_columns(
                part,
                self._bits,
                symmetric=self._symmetric,
                weight=left[:, None],
                scales=self._scales,
            )
        else:
            found = whole(part, self._bits, symmetric=self._symmetric, scales=self._scales)
        self._scale[group], self._zero[group] = found


def moment(H: Array) -> Array:
    """H, float64, of greatest power 1, checked."""
    if H.ndim != 2 or H.shape[0] != H.shape[1]:
        raise ValueError(f"H is {H.shape}, not square")
    gram = np.asarray(H, np.float64)
    if not np.all(np.isfinite(gram)):
        raise NotFiniteError(
            "the second moment of the input holds NaN or infinities: calibrate again."
        )
    most = np.abs(gram).max(initial=0.0)
    if not most:
        return np.zeros_like(gram)
    gram = gram / most
    if np.diag(gram).max() < 1 - _SKEW or np.diag(gram).min() < 0:
        raise DataError(
            "the second moment of the input has no dominant, positive diagonal: calibrate again."
        )
    if np.abs(gram - gram.T).max() > _SKEW:
        raise DataError("the second moment of the input is not symmetric: calibrate again.")
    made: Array = (gram + gram.T) / 2
    return made


def _root(gram: Array, damp: float) -> Array:
    """R, upper triangular, with R R' = `gram` damped; raises LinAlgError if that is not definite."""
    power = np.diag(gram)
    live = power > 0
    mean = power[live].mean() if live.any() else 1.0
    firm = gram.copy()
    # an input that never lives gets the mean power, for a part of its own
    np.fill_diagonal(firm, np.where(live, power + damp * mean, mean))
    root: Array = np.linalg.cholesky(firm[::-1, ::-1])[::-1, ::-1]
    return root
