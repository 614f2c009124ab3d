"""Rounding by reconstruction: codes of least error in a layer's output, not in its weights.

AdaRound (Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization, eq. 13) shows that what
rounding does to a layer's output is a quadratic form. With a row w of the weights, its codes q and its scale s

    E |w x - s q x|^2 = (w - s q) H (w - s q)',      H = E[x x']

so rows are independent of one another and all that data says is in H. In units of a code, e = w / s - q, one
code alone is best moved by

    q_k += round((e H)_k / H_kk)

which never raises the error. Coordinate descent (Behdin et al. 2023, QuantEase; van Baalen et al. 2024, CDQuant)
does this for one coordinate after the other, those of most power first, for all rows at once, with e H kept up to
date: within a block of coordinates when it is needed, beyond it by one product of matrices a block. It ends where no
single move helps, which depends on where it starts: `sequential` codes are a better start than the nearest ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BLOCK = 64  # coordinates whose moves are carried to all others at once
_DAMP = 1e-6  # of the greatest power: makes H definite
_SMALL = 64  # depth up to which many groups are worked on together, one coordinate at a time


def nearest(W: Array, scale: Array | float, qmin: int, qmax: int) -> Array:
    """The codes next to the weights, int32 as W.

    Args:
        W: (..., O, K), float.
        scale: (..., O), or one for all.
        qmin: the least code.
        qmax: the greatest code.
    """
    codes: Array = np.clip(np.rint(_in_codes(W, scale)), qmin, qmax).astype(np.int32)
    return codes


def error(W: Array, codes: Array, scale: Array | float, H: Array) -> Array:
    """(w - s q) H (w - s q)' of each row, float64 (..., O).

    Args:
        W: (..., O, K), float.
        codes: as W, relative to the zero point.
        scale: (..., O), or one for all.
        H: (..., K, K).
    """
    off = (_in_codes(W, scale) - codes) * _column(scale)
    result: Array = np.einsum("...k,...k->...", np.matmul(off, np.asarray(H, np.float64)), off)
    return result


def coordinate_descent(
    W: Array, scale: Array | float, H: Array, qmin: int, qmax: int, iterations: int = 4,
    start: Array | None = None,
) -> Array:  # fmt: skip
    """Codes that no single move makes better, int32 (O, K); no row is worse off than with those of the start.

    Args:
        W: weights, (O, K), float.
        scale: (O,), or one for all.
        H: E[x x'], symmetric and positive semidefinite, (K, K). An input that is always 0 keeps the codes of the start.
        qmin: the least code, relative to the zero point.
        qmax: the greatest one.
        iterations: times that every coordinate is looked at, at most.
        start: codes to start from, (O, K); by default the nearest ones.
    """
    first = None if start is None else start[None]
    rows = _per_row(W, scale)[None]
    codes: Array = batched(W[None], rows, H[None], qmin, qmax, iterations, first)[0]
    return codes


def batched(
    W: Array, scale: Array | float, H: Array, qmin: int, qmax: int, iterations: int = 4,
    start: Array | None = None,
) -> Array:  # fmt: skip
    """As `coordinate_descent` for groups that have inputs of their own, as depthwise convolutions have.

    Args:
        W: (G, O, K), float.
        scale: (G, O), or one for all.
        H: of each group, (G, K, K).
        qmin: as above.
        qmax: as above.
        iterations: as above.
        start: (G, O, K).

    Returns:
        int32 (G, O, K).
    """
    if start is None:
        start = nearest(W, scale, qmin, qmax)
    wanted = _in_codes(W, scale)
    order, gram = _sorted(H)
    codes = _take(start, order).astype(np.float64)
    off = _take(wanted, order) - codes
    descend = _together if W.shape[2] <= _SMALL else _in_blocks
    moved = _put(descend(gram, off, codes, qmin, qmax, iterations), order)
    return _better(wanted, H, start, moved)


def sequential(W: Array, scale: Array | float, H: Array, qmin: int, qmax: int) -> Array:
    """Codes found one coordinate after the other, int32 (G, O, K); no row is worse off than with the nearest ones.

    What rounding a coordinate does is made up for by those that come after it, as if they were no integers. That
    is GPTQ (Frantar et al. 2022). Here without its inverse of H: with H = R R', R upper triangular,

        e H e' = sum_j (sum_(i <= j) e_i R_ij)^2

    and term j is made least by q_j = round(w_j / s + sum_(i < j) e_i R_ij / R_jj).

    Args:
        W: (G, O, K), float.
        scale: (G, O), or one for all.
        H: of each group, (G, K, K).
        qmin: the least code, relative to the zero point.
        qmax: the greatest one.
    """
    wanted = _in_codes(W, scale)
    order, gram = _sorted(H)
    moved = _put(_ahead(gram, _take(wanted, order), qmin, qmax), order)
    return _better(wanted, H, nearest(W, scale, qmin, qmax), moved)


def _sorted(H: Array) -> tuple[Array, Array]:
    """Coordinates by falling diagonal, (G, K), and H in this order and of order 1, whatever the data."""
    power = np.einsum("gkk->gk", H)
    order = np.argsort(-power, axis=1, kind="stable")
    unit = np.maximum(power.max(axis=1, initial=0.0), np.finfo(np.float64).tiny)
    groups = np.arange(len(H))[:, None, None]
    gram: Array = H[groups, order[:, :, None], order[:, None, :]] / unit[:, None, None]
    return order, gram


def _take(rows: Array, order: Array) -> Array:
    """(G, O, K) -> (G, K, O) in this order: what is worked on at once is contiguous."""
    taken: Array = rows.transpose(0, 2, 1)[np.arange(len(rows))[:, None], order]
    return taken


def _put(columns: Array, order: Array) -> Array:
    """What `_take` does, undone."""
    rows = np.empty_like(columns)
    rows[np.arange(len(columns))[:, None], order] = columns
    return rows.transpose(0, 2, 1)


def _better(wanted: Array, H: Array, start: Array, moved: Array) -> Array:
    """Rows of `moved` where they are better, int32: rounding of sums must not make one worse."""
    better = error(wanted, moved, 1.0, H) < error(wanted, start, 1.0, H)
    codes: Array = np.where(better[..., None], moved, start).astype(np.int32)
    return codes


def _ahead(gram: Array, wanted: Array, qmin: int, qmax: int) -> Array:
    """The codes of `sequential`: (G, K, K), (G, K, O) -> (G, K, O)."""
    depth = gram.shape[1]
    kind = np.float64 if depth <= _SMALL else np.float32
    root = _root(gram)
    share = (root / np.einsum("gkk->gk", root)[:, None]).astype(kind)
    codes, off = np.empty_like(wanted), np.empty(wanted.shape, kind)
    for first in range(0, depth, _BLOCK):
        last = min(first + _BLOCK, depth)
        carried = np.matmul(share[:, :first, first:last].transpose(0, 2, 1), off[:, :first])
        for k in range(first, last):
            near = np.matmul(share[:, None, first:k, k], off[:, first:k])[:, 0]
            wish = wanted[:, k] + carried[:, k - first] + near
            codes[:, k] = np.clip(np.rint(wish), qmin, qmax)
            off[:, k] = wanted[:, k] - codes[:, k]
    return codes


def _root(gram: Array) -> Array:
    """R of H = R R', damped as much as it takes: rounding of sums may leave H indefinite."""
    eye, damp = np.eye(gram.shape[1]), _DAMP
    while damp <= 1:
        try:
            root: Array = np.linalg.cholesky((gram + damp * eye)[:, ::-1, ::-1])[:, ::-1, ::-1]
        except np.linalg.LinAlgError:
            damp *= 10
        else:
            return root
    return np.broadcast_to(eye, gram.shape)  # each coordinate for itself


def _together(
    gram: Array, off: Array, start: Array, qmin: int, qmax: int, iterations: int
) -> Array:
    """Moves of all groups at once: (G, K, K), (G, K, O), (G, K, O) -> (G, K, O)."""
    codes = start.copy()
    pull = np.matmul(gram, off)
    inverse = _inverse(np.einsum("gkk->gk", gram))[..., None]
    for _ in range(iterations):
        still = True
        for k in range(codes.shape[1]):
            wish = np.clip(codes[:, k] + np.rint(pull[:, k] * inverse[:, k]), qmin, qmax)
            step = wish - codes[:, k]
            if step.any():
                still = False
                codes[:, k] = wish
                pull -= gram[:, :, k, None] * step[:, None, :]
        if still:
            break
    return codes


def _in_blocks(
    gram: Array, off: Array, start: Array, qmin: int, qmax: int, iterations: int
) -> Array:
    """The same for deep groups, one after the other, in float32."""
    codes = start.copy()
    for group, own in enumerate(codes):
        H = gram[group].astype(np.float32)
        pull = H @ off[group].astype(np.float32)
        for _ in range(iterations):
            if not _sweep(H, pull, own, qmin, qmax):
                break
    return codes


def _sweep(H: Array, pull: Array, codes: Array, qmin: int, qmax: int) -> bool:
    """One look at every coordinate, (K, O) in place; whether any moved."""
    inverse = _inverse(np.diag(H))
    moved = False
    for first in range(0, len(H), _BLOCK):
        block = slice(first, min(first + _BLOCK, len(H)))
        inside = H[block, block]
        steps = np.zeros((len(inside), codes.shape[1]), np.float32)
        for i, step in enumerate(steps):
            k = first + i
            here = pull[k] - inside[i, :i] @ steps[:i]
            wish = np.clip(codes[k] + np.rint(here * inverse[k]), qmin, qmax)
            np.subtract(wish, codes[k], out=step, casting="same_kind")
            codes[k] = wish
        if steps.any():
            moved = True
            pull -= H[:, block] @ steps
    return moved


def _inverse(power: Array) -> Array:
    """1 / H_kk, and 0 for an input that is always 0: its code is not moved."""
    return np.divide(1.0, power, out=np.zeros_like(power), where=power > 0)


def _per_row(W: Array, scale: Array | float) -> Array:
    return np.broadcast_to(np.asarray(scale, np.float64), W.shape[:-1])


def _column(scale: Array | float) -> Array:
    wide = np.asarray(scale, np.float64)
    return wide[..., None] if wide.ndim else wide


def _in_codes(W: Array, scale: Array | float) -> Array:
    """Weights in units of a code, float64."""
    result: Array = np.asarray(W, np.float64) / _column(scale)
    return result
