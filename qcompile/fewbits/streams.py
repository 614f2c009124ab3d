"""What passes from part to part of a graph, for every sample: in the float model, and in the quantized one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes.lower_nbits import LowerNbits
from passes.smooth_linear import MARK, SmoothLinear
from qcompile.algo.blocks import Blocked
from qcompile.algo.drift import Behind, Drift
from qcompile.fewbits.cut import Part, part_model
from qcompile.recipe import Recipe
from qcompile.run.probe import Fact
from qcompile.run.session import Feed, Options, Session
from qcompile.solve.smoothing import Smoothing
from qcompile.step import run_pass

Array = npt.NDArray[Any]

Tap = tuple[str, str]
"""The value that a matrix reads, and the one that its output is added to; empty if there is none."""

_KEPT = 1 << 29  # bytes of what a part makes for all samples, in one model, that are kept
_ROWS = 4096  # whose products are summed in float32, and then in float64
_LEVEL = (
    0  # of MatMulNBits here: float activations, many rows at once, are faster than rounded ones
)
_SHARE = 0.1  # of the median power of rows, that no row is taken to have less than


class Streams:
    """Runs parts in turn. Memory is that of one part, and of what passes for all samples, twice.

    Attributes:
        facts: sizes and types.
        scales: of the inputs of matrices, by name of the input: codes are those of weights that are multiplied by them.
            What passes is never scaled.
        workers: threads.
    """

    def __init__(
        self, prepared: ir.Model, facts: Mapping[str, Fact], recipe: Recipe, feeds: Sequence[Feed], judges: int
    ) -> None:  # fmt: skip
        """From the number `judges` on, samples are held out."""
        self._prepared, self.facts, self._recipe = prepared, facts, recipe
        self._float: list[dict[str, Array]] = [dict(feed) for feed in feeds]
        self._ours: list[dict[str, Array]] = [dict(feed) for feed in feeds]
        self._judges = judges
        self.scales: dict[str, Smoothing] = {}
        self._inside: tuple[str, ...] = ()  # what is kept of a part while its matrices are solved
        self.workers = max(1, recipe.threads or os.cpu_count() or 1)

    def begin(self, part: Part, names: Sequence[str]) -> None:
        """Run the float part once for these values and for what it makes, where they are few bytes for all samples.

        Else it runs whenever some of them are asked for. So does the quantized part, which runs from where it was before
        to where its next matrices are.
        """
        wanted = [n for n in dict.fromkeys([*names, *part.makes]) if n not in self._float[0]]
        size = sum(4 * self.facts[n].elements for n in wanted if n in self.facts) * len(self._float)
        self._inside = tuple(wanted) if size <= _KEPT else ()
        if self._inside:
            session = self._session(part, wanted, {})
            for state in self._float:
                state.update(zip(wanted, session.run(state), strict=True))

    def drifts(
        self, part: Part, taps: Sequence[Tap], weights: Mapping[str, Blocked]
    ) -> dict[Tap, tuple[Drift, Drift]]:
        """Moments of inputs in a part, with these of its matrices quantized: of samples that choose, and held out.

        Where no sample is held out, those that choose judge.
        """
        names = list(dict.fromkeys(name for tap in taps for name in tap if name))
        alone = self._judges >= len(self._float)
        sums = [(_Sums(off=alone), _Sums(off=True)) for _ in taps]
        theirs = self._reader(part, names, {}, self._float)
        ours = self._reader(part, names, weights, self._ours)
        needed = {*part.makes, *(behind for _, behind in taps)}
        for number, (x, z) in enumerate(zip(self._float, self._ours, strict=True)):
            side = int(number >= self._judges)
            wanted, given = theirs(x), ours(z)
            z.update((name, given[name]) for name in self._inside if name in given)
            for (name, behind), both in zip(taps, sums, strict=True):
                stream = (wanted[behind], given[behind]) if behind else None
                both[side].add(wanted[name], given[name], stream)
            for name in set(names) & set(self._inside) & x.keys() - needed:
                del x[name]  # it has been asked for
        return {
            tap: (choose.drift(), (choose if alone else judge).drift())
            for tap, (choose, judge) in zip(taps, sums, strict=True)
        }

    def advance(self, part: Part, weights: Mapping[str, Blocked], needed: AbstractSet[str]) -> None:
        """What passes on is what the part makes, with float matrices and with quantized ones.

        Args:
            part: whose matrices are solved.
            weights: their codes.
            needed: what later parts read; the rest is forgotten.
        """
        if not part.makes:
            return
        for states, codes in ((self._float, {}), (self._ours, weights)):
            read = self._reader(part, part.makes, codes, states)
            for state in states:
                state.update(read(state))
                for name in state.keys() - needed:
                    del state[name]

    def _reader(
        self, part: Part, names: Sequence[str], weights: Mapping[str, Blocked], states: Sequence[Mapping[str, Array]]
    ) -> Callable[[Mapping[str, Array]], dict[str, Array]]:  # fmt: skip
        """What gives these values for a state: those that it holds as they are, the others by running the part."""
        missing = [name for name in names if name not in states[0]]
        there = [name for name in self._inside if name in states[0]]
        rest = dataclasses.replace(part, reads=tuple(dict.fromkeys((*part.reads, *there))))
        session = self._session(rest, missing, weights) if missing else None

        def read(state: Mapping[str, Array]) -> dict[str, Array]:
            made = {name: state[name] for name in names if name in state}
            if session is not None:
                made |= zip(missing, session.run(state), strict=True)
            return made

        return read

    def _session(self, part: Part, names: Sequence[str], weights: Mapping[str, Blocked]) -> Session:
        model = part_model(self._prepared, part, names, self.facts)
        there = {node.name or "" for node in model.graph} & weights.keys()
        scales = {
            tensor: dataclasses.replace(one, nodes=nodes)
            for tensor, one in self.scales.items()
            if (nodes := tuple(name for name in one.nodes if name in there))
        }
        if scales:
            for node in model.graph:
                node.metadata_props.pop(MARK, None)
            run_pass(SmoothLinear(scales, there), model)
        if weights:  # float activations: of many rows at once, products are then faster
            run_pass(LowerNbits(weights, accuracy_level=0), model)
        return Session(model, Options("all", threads=self._recipe.threads))


def even(rows: Array) -> Array:
    """A factor for each of the rows, float32 (rows, 1), that brings them to nearly the same power.

    A few tokens of a language model, above all the first one, are thousands of times as large as the others. A
    normalization stands behind every layer, so that their errors count no more; their squares would hide all others.
    On SmolLM2 this is worth 7 % of what rounding to nearest loses.

    Args:
        rows: float32 (rows, K).
    """
    power = np.square(rows, dtype=np.float64).mean(axis=1)
    usual = float(np.median(power)) if len(rows) else 0.0
    factor: Array = (1 / np.sqrt(power + _SHARE * usual + 1e-30)).astype(np.float32)
    return factor[:, None]


class _Sums:
    """Sums of the second moments of rows of even power."""

    def __init__(self, *, off: bool) -> None:
        """`off`: also those that errors take."""
        self._sums: dict[str, Array] = {}
        self._count = 0
        self._off = off
        self._waiting: list[tuple[Array, Array, Array | None]] = []

    def add(self, wanted: Array, given: Array, stream: tuple[Array, Array] | None) -> None:
        """Count x and z, (..., K), and what their outputs are added to, (..., N), of both models."""
        x, z = _flat(wanted), _flat(given)
        behind = None if stream is None else tuple(map(_flat, stream))
        # an error counts by what it is added to: the normalization behind sees the sum
        factor = even(z if behind is None else behind[1])
        z, lost = z * factor, (x - z) * factor
        away = None if behind is None else (behind[0] - behind[1]) * factor
        self._waiting.append((z, lost, away))
        self._count += len(z)
        if sum(len(rows[0]) for rows in self._waiting) >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        """Add the products of the rows that wait: of many at once, since sums in float64 take as long as products of few."""
        if not self._waiting:
            return
        z, lost = (np.concatenate([rows[i] for rows in self._waiting]) for i in (0, 1))
        behind = [rows[2] for rows in self._waiting if rows[2] is not None]
        self._waiting = []
        products = {"H": z.T @ z, "cross": lost.T @ z}
        if self._off:
            products["off"] = lost.T @ lost
        if behind:
            away = np.concatenate(behind)
            products["behind.cross"] = away.T @ z
            if self._off:
                products |= {"behind.tied": away.T @ lost, "behind.off": np.vdot(away, away)}
        for name, product in products.items():
            wide = np.asarray(product, np.float64)
            if name in self._sums:
                self._sums[name] += wide
            else:
                self._sums[name] = wide.copy()

    def drift(self) -> Drift:
        """Their means."""
        self._flush()
        mean = {name: total / max(self._count, 1) for name, total in self._sums.items()}
        behind = None
        if "behind.cross" in mean:
            off = float(mean.get("behind.off", 0.0))
            behind = Behind(mean["behind.cross"], mean.get("behind.tied"), off)
        return Drift(mean["H"], mean["cross"], mean.get("off"), behind)


def _flat(values: Array) -> Array:
    """The values as float32 (rows, K)."""
    return np.asarray(values, np.float32).reshape(-1, values.shape[-1])
