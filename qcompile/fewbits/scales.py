"""Scales of inputs that the constants before take, so that weights that large inputs meet are rounded more finely.

Lin et al. 2023, AWQ (`qcompile.algo.awq`): W x = (W diag(s)) (x / s). What makes x takes 1 / s where that costs nothing: the
gain of a normalization, the columns of the product before, through activation-free paths and attention
(`qcompile.solve.smoothing`). Where nothing can take it, there is no scale.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.algo.awq import Scaled, find_scale
from qcompile.calib.taps import with_outputs
from qcompile.fewbits.assign import Scheme
from qcompile.fewbits.streams import even
from qcompile.graph.linear import Linear
from qcompile.recipe import Recipe
from qcompile.run.probe import Fact
from qcompile.run.session import Feed, Options, Session
from qcompile.solve.smoothing import LinearGroup, Smoothing, linear_groups, matrix

Array = npt.NDArray[Any]
AWQ = "awq"  # the algorithm by name: these scales, then those of blocks that are best for the power of inputs
_FINE = 8  # bits, from which on nothing is left to gain
_ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
_ROWS = 256
_MEMORY = 1 << 28  # bytes of second moments at once


def find_scales(
    prepared: ir.Model, chosen: Sequence[tuple[Linear, Scheme]], samples: Sequence[Feed],
    held_out: Sequence[Feed], facts: Mapping[str, Fact], recipe: Recipe,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Smoothing]:  # fmt: skip
    """The scales that lower the error of their matrices on held-out samples, for `passes.smooth_linear`.

    Args:
        prepared: the float graph; not changed. It runs once on each sample for so many moments as memory holds.
        chosen: matrices and their schemes; only those that the pass can scale count, and of those that read one tensor
            all or none.
        samples: feeds that choose a scale.
        held_out: feeds that judge it.
        facts: shapes, which tell where channels go.
        recipe: threads, of runs and of searches.
        tick: called after each group.
    """
    schemes = {item.name: scheme for item, scheme in chosen}
    nodes = {node.name or "": node for node in prepared.graph}
    groups = [
        group
        for group in linear_groups(prepared, facts, schemes)[0]
        if group.place is not None
        and len({schemes[name] for name in group.nodes}) == 1
        and schemes[group.nodes[0]].bits < _FINE
    ]
    found: dict[str, Smoothing] = {}

    def one(group: LinearGroup, H: Array, judge: Array) -> tuple[LinearGroup, Scaled]:
        scheme = schemes[group.nodes[0]]
        made = find_scale(
            [_some(matrix(nodes[name]).T) for name in group.nodes], H, judge, bits=scheme.bits,
            block=scheme.block, symmetric=scheme.symmetric, clip=True, alphas=_ALPHAS,
        )  # fmt: skip
        tick()
        return group, made

    for some in _within(groups, nodes):
        moments = _moments(prepared, some, samples, held_out, recipe)
        with ThreadPoolExecutor(recipe.threads or os.cpu_count() or 1) as pool:
            for group, made in pool.map(lambda g: one(g, *moments[g.tensor]), some):  # noqa: B023
                if made.alpha:
                    found[group.tensor] = Smoothing(
                        group.tensor, group.nodes, made.scale, made.alpha, group.place,
                        error_before=made.before, error_after=made.after,
                    )  # fmt: skip
    return found


def _some(W: Array) -> Array:
    """Up to `_ROWS` rows of a matrix, evenly spread: they tell the best exponent as well as all."""
    return W[:: -(-len(W) // _ROWS)]


def _within(groups: Sequence[LinearGroup], nodes: Mapping[str, ir.Node]) -> list[list[LinearGroup]]:
    """Groups whose moments fit the memory together; at least one."""
    made: list[list[LinearGroup]] = []
    room = 0
    for group in groups:
        need = 2 * 8 * len(matrix(nodes[group.nodes[0]])) ** 2
        if not made or need > room:
            made.append([])
            room = _MEMORY
        made[-1].append(group)
        room -= need
    return made


def _moments(
    prepared: ir.Model, groups: Sequence[LinearGroup], samples: Sequence[Feed], held_out: Sequence[Feed],
    recipe: Recipe,
) -> dict[str, tuple[Array, Array]]:  # fmt: skip
    """E[x x'], float64 (K, K), by the name of x: of the samples that choose, and of those that judge."""
    names = [group.tensor for group in groups]
    options = Options("all", threads=recipe.threads, in_order=True)
    session = Session(with_outputs(prepared, names), options)
    sums: tuple[dict[str, Array], dict[str, Array]] = ({}, {})
    for side, feeds in enumerate((samples, held_out or samples)):
        for feed in feeds:
            for name, x in zip(names, session.run(feed, names), strict=True):
                rows = np.asarray(x, np.float32).reshape(-1, x.shape[-1])
                rows = rows * even(rows)
                product = (rows.T @ rows).astype(np.float64)
                sums[side][name] = sums[side][name] + product if name in sums[side] else product
    return {name: (sums[0][name], sums[1][name]) for name in names}
