"""Matrices solved part after part: each sees the inputs that the quantized parts before it make.

For each part of the graph (`qcompile.fewbits.cut`) the float nodes run on what passes into it, to gather the second
moment of the inputs of its matrices; these are solved; then the part runs again with its codes, and what passes to the
next part is that. Half of this is what GPTQ does (Frantar et al. 2022); inputs of float layers alone would let the
errors of all layers add up unseen. Memory is that of one part, of what passes for all samples, and of the codes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes.lower_nbits import LowerNbits
from qcompile.algo.blocks import Blocked
from qcompile.algo.choose import Factors, Tally, solve_blocks
from qcompile.fewbits.assign import Scheme
from qcompile.fewbits.cut import Part, cut, part_model
from qcompile.graph.edit import attribute
from qcompile.graph.linear import Linear
from qcompile.recipe import Recipe
from qcompile.run.probe import Fact
from qcompile.run.session import Feed, Options, Session
from qcompile.step import run_pass

Array = npt.NDArray[Any]
Chosen = tuple[Linear, Scheme]
Found = dict[str, tuple[Blocked, Tally]]


def solve_plain(
    chosen: Sequence[Chosen], algorithm: str, tick: Callable[[], object] = lambda: None
) -> Found:
    """Codes by the weights alone, by node name; readers of one matrix share them.

    Raises:
        RecipeError: the algorithm is not known, or needs data.
    """
    found: Found = {}
    made: dict[object, tuple[Blocked, Tally]] = {}
    for item, scheme in chosen:
        assert item.weight is not None
        key = item.weight.key
        if key not in made:
            made[key] = _solve(item, scheme, algorithm, None, None)
        found[item.name] = made[key]
        tick()
    return found


_SHARE = 0.1  # of the median power of rows, that no row is taken to have less than
_DATALESS = ("auto", "all", "rtn", "search", "kquant", "hqq")


def solve_in_order(
    prepared: ir.Model, chosen: Sequence[Chosen], samples: Sequence[Feed], held_out: Sequence[Feed],
    facts: Mapping[str, Fact], recipe: Recipe, tick: Callable[[], object] = lambda: None,
) -> Found:  # fmt: skip
    """Codes by what the matrices compute, by node name.

    Args:
        prepared: the float graph, sorted; not changed.
        chosen: matrices and their schemes. Tables and what stands in bodies is solved by its weights alone, but a table
            that is a head as well by the inputs of the head.
        samples: feeds that choose codes.
        held_out: feeds that judge which algorithm was best for a matrix.
        facts: sizes and types.
        recipe: algorithm, accuracy level, threads and memory.
        tick: called after each matrix.
    """
    last: dict[object, str] = {}  # who decides on a matrix that several nodes read
    for item, _ in chosen:
        assert item.weight is not None
        if _tap(item, prepared) or item.weight.key not in last:
            last[item.weight.key] = item.name
    deciding = [c for c in chosen if c[0].weight and last[c[0].weight.key] == c[0].name]
    tapped = [c for c in deciding if _tap(c[0], prepared)]
    plain = recipe.algorithm if recipe.algorithm in _DATALESS else "auto"
    found = solve_plain([c for c in deciding if not _tap(c[0], prepared)], plain, tick)
    parts = cut(prepared, [item.node for item, _ in tapped], facts)
    place = {id(node): i for i, node in enumerate(prepared.graph)}
    run = _Runner(prepared, facts, recipe, [*samples, *held_out], len(samples))
    for part in parts:
        inside = [c for c in tapped if part.first <= place[id(c[0].node)] < part.last]
        found |= run.solve(part, inside, tick)
        names = [i.name for i, _ in deciding if part.first <= place.get(id(i.node), -1) < part.last]
        run.advance(part, {name: found[name][0] for name in names if name in found})
    for item, _ in chosen:
        assert item.weight is not None
        found[item.name] = found[last[item.weight.key]]
    return found


class _Runner:
    """What passes from part to part, for every sample."""

    def __init__(
        self, prepared: ir.Model, facts: Mapping[str, Fact], recipe: Recipe, feeds: Sequence[Feed], judges: int
    ) -> None:  # fmt: skip
        """From the number `judges` on, samples are held out."""
        self._prepared, self._facts, self._recipe = prepared, facts, recipe
        self._state: list[dict[str, Array]] = [dict(feed) for feed in feeds]
        self._judges = judges
        self._workers = max(1, recipe.threads or os.cpu_count() or 1)

    def solve(self, part: Part, chosen: Sequence[Chosen], tick: Callable[[], object]) -> Found:
        """The codes of a part's matrices."""
        taps = {item.name: _tap(item, self._prepared) for item, _ in chosen}
        names = list(dict.fromkeys(taps.values()))
        ours, theirs = self._moments(part, names)
        factors = {name: Factors(H) for name, H in ours.items()}

        def one(pair: Chosen) -> tuple[str, tuple[Blocked, Tally]]:
            item, scheme = pair
            tap = taps[item.name]
            made = _solve(item, scheme, self._recipe.algorithm, factors[tap], theirs.get(tap))
            tick()
            return item.name, made

        with ThreadPoolExecutor(self._workers) as pool:
            return dict(pool.map(one, chosen))

    def advance(self, part: Part, weights: Mapping[str, Blocked]) -> None:
        """What passes on is what the part makes with its codes."""
        if not part.makes:
            return
        model = part_model(self._prepared, part, part.makes, self._facts)
        run_pass(LowerNbits(weights, accuracy_level=self._recipe.accuracy_level), model)
        session = self._session(model)
        for state in self._state:
            made = session.run(state)
            state.update(zip(part.makes, made, strict=True))

    def _moments(
        self, part: Part, names: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """E[x x'], float64 (K, K), of the inputs by name: of samples that choose, and of those held out."""
        session = self._session(part_model(self._prepared, part, names, self._facts))
        sums = ({}, {})  # type: tuple[dict[str, Array], dict[str, Array]]
        counts = ({}, {})  # type: tuple[dict[str, int], dict[str, int]]
        for number, state in enumerate(self._state):
            side = int(number >= self._judges)
            for name, x in zip(names, session.run(state), strict=True):
                rows = even(np.asarray(x, np.float32).reshape(-1, x.shape[-1]))
                product = rows.T @ rows
                if name in sums[side]:
                    sums[side][name] += product
                else:
                    sums[side][name] = product.astype(np.float64)
                counts[side][name] = counts[side].get(name, 0) + len(rows)
        ours, theirs = (
            {name: total / max(count[name], 1) for name, total in found.items()}
            for found, count in zip(sums, counts, strict=True)
        )
        return ours, theirs

    def _session(self, model: ir.Model) -> Session:
        return Session(model, Options("all", threads=self._recipe.threads))


def even(rows: Array) -> Array:
    """The rows, float32 (rows, K), brought to nearly the same power, a new array.

    A few tokens of a language model, above all the first one, are thousands of times as large as the others. A
    normalization stands behind every layer, so that their errors count no more; their squares would hide all others.
    On SmolLM2 this is worth 7 % of what rounding to nearest loses.
    """
    power = np.square(rows).mean(axis=1, dtype=np.float64)
    usual = float(np.median(power)) if len(rows) else 0.0
    scale = 1 / np.sqrt(power + _SHARE * usual + 1e-30)
    made: Array = rows * scale[:, None].astype(np.float32)
    return made


def _tap(item: Linear, model: ir.Model) -> str:
    """The input whose last axis the matrix reduces, by name; empty if there is none in the main graph."""
    node = item.node
    plain = item.kind == "matmul" and not item.left
    plain |= item.kind == "gemm" and not attribute(node, "transA", 0)
    x = node.inputs[item.x] if plain else None
    return x.name or "" if x is not None and node.graph is model.graph else ""


def _solve(
    item: Linear, scheme: Scheme, algorithm: str, H: Factors | None, judge: Array | None
) -> tuple[Blocked, Tally]:
    return solve_blocks(
        item.read(), bits=scheme.bits, block=scheme.block, symmetric=scheme.symmetric,
        algorithm=algorithm, H=H, held_out_H=judge,
    )  # fmt: skip


def tally(found: Iterable[tuple[Blocked, Tally]]) -> dict[str, int]:
    """How many matrices each algorithm won, most frequent first."""
    counts: dict[str, int] = {}
    for _, one in found:
        counts[one.algorithm] = counts.get(one.algorithm, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))
