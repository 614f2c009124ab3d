"""What errors of each matrix do to the outputs of the model: measured in one sweep over its parts.

The model is cut where only few values pass (`qcompile.fewbits.cut`), and parts run in turn, each loaded once:

* a part runs with each of its matrices rounded to nearest alone, which tells what that does to what the part passes on;
* for some matrices, rounded as they will be, what is passed on then runs through all later parts, float ones, which tells what such an
  error does to the outputs: the KL divergence of next tokens or classes where outputs are scores of such, else the relative error.

Layers of a model are much alike, so a matrix is followed to the outputs at some depths only, and between these the ratio of the two is
interpolated, for each kind of matrix apart: errors of the same size differ by their kind. So some dozens of runs of the model
measure what a run for each matrix would, and second moments of inputs come along. Errors of 2 bits are so large that they cost more than
in proportion: of each kind one matrix is followed with 2 bits as well.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from passes.lower_nbits import LowerNbits
from qcompile.algo.blocks import Blocked, some
from qcompile.algo.choose import Factors
from qcompile.fewbits.assign import Scheme
from qcompile.fewbits.cut import Part, cut, part_model
from qcompile.fewbits.damage import (
    errors,
    output_error,
    places,
    reference,
    reference_errors,
    rounded,
    some_rows,
)
from qcompile.fewbits.sequential import tap
from qcompile.fewbits.share import Matrix
from qcompile.fewbits.streams import even
from qcompile.graph.linear import Linear
from qcompile.recipe import Recipe
from qcompile.run.probe import Fact
from qcompile.run.session import Feed, Options, Session
from qcompile.step import run_pass
from qcompile.verify.metrics import divergence
from qcompile.verify.slices import decides

Array = npt.NDArray[Any]
State = dict[str, Array]
Trial = tuple[str, int]  # a node, and the bits of its matrix

_FOLLOWED = 32  # nodes whose errors are followed to the outputs, about
_LAST = 4  # nodes of the last part that are, too
_BLOCK = 64  # of the matrices that are followed
_ROOM = 1 << 28  # bytes that the values which pass on may take for these
_POSITIONS = 128  # of an output that are compared, spread evenly: logits are large


@dataclasses.dataclass(frozen=True)
class Effect:
    """What the reference rounding of the matrix that a node reads does.

    Attributes:
        part: the number of the node's part.
        passed: error of what the part passes on, or, of the last part, of the outputs.
        base: error of the rows that stand for the matrix, at the node's output.
        alone: error of these rows themselves.
    """

    part: int
    passed: float
    base: float
    alone: float


def measured_costs(
    prepared: ir.Model, found: Sequence[Matrix], samples: Sequence[Feed], judges: Sequence[Feed],
    facts: Mapping[str, Fact], recipe: Recipe, tick: Callable[[], object] = lambda: None,
) -> list[list[float]]:  # fmt: skip
    """What each scheme of each matrix is expected to cost the outputs, never below 0.

    Args:
        prepared: the float graph, sorted; not changed.
        found: its matrices.
        samples: feeds for the second moments.
        judges: feeds, others if there are any, on which errors are measured. Two are enough.
        facts: sizes and types.
        recipe: algorithm and threads.
        tick: called after each part.
    """
    sweep = _Sweep(prepared, found, judges or samples[:1], facts, recipe)
    sweep.run(samples, tick)
    made: list[list[float] | None] = []
    relative: list[tuple[list[float], float]] = []
    for one in found:
        row, W = [0.0] * len(one.schemes), some_rows(one.readers[0])
        size = float(np.square(W).sum(dtype=np.float64)) or 1.0
        decider = one.decider(prepared)
        if decider.name not in sweep.errors:
            sweep.errors[decider.name] = errors(W, one.schemes, recipe.algorithm)
        outputs = sweep.errors[decider.name]
        plain = errors(W, one.schemes, "search")  # what GPTQ adds to these, lookups hardly feel
        effects = {i.name: sweep.effects[i.name] for i in one.readers if i.name in sweep.effects}
        for name, effect in effects.items():
            mine = outputs if name == decider.name else plain
            usual = effect.base if name == decider.name else effect.alone
            row = [
                cost + e * sweep.unit(name, scheme.bits) * effect.base / usual
                if usual > 0
                else cost
                for cost, e, scheme in zip(row, mine, one.schemes, strict=True)
            ]
        relative.append(([e / size for e in plain], sum(row)))
        made.append(row if effects else None)
    return _with_unknown(made, relative)


def _with_unknown(
    made: Sequence[list[float] | None], relative: Sequence[tuple[list[float], float]]
) -> list[list[float]]:
    """The costs; matrices that were not measured, in bodies, cost what relative errors of weights cost the others."""
    ratios = [
        cost / sum(r) for row, (r, cost) in zip(made, relative, strict=True) if row and sum(r)
    ]
    usual = float(np.median(ratios)) if ratios else 1.0
    return [
        [usual * e for e in r] if row is None else row
        for row, (r, _) in zip(made, relative, strict=True)
    ]


class _Sweep:
    """The parts, what passes between them for each feed, and what was found.

    `errors` has the errors of all schemes by the name of the node whose inputs decide on them; `effects` those of all nodes.
    """

    def __init__(
        self, prepared: ir.Model, found: Sequence[Matrix], judges: Sequence[Feed],
        facts: Mapping[str, Fact], recipe: Recipe,
    ) -> None:  # fmt: skip
        self.effects: dict[str, Effect] = {}
        self.errors: dict[str, list[float]] = {}
        self._prepared, self._facts, self._recipe = prepared, facts, recipe
        self._deciding = {one.decider(prepared).name: one for one in found}
        nodes = list(prepared.graph)
        place = {node: i for i, node in enumerate(nodes)}
        readers = [item for one in found for item in one.readers if item.node in place]
        readers.sort(key=lambda item: place[item.node])
        self._parts = cut(prepared, [item.node for item in readers], facts, whole=True)
        self._inside = [
            [item for item in readers if part.first <= place[item.node] < part.last]
            for part in self._parts
        ]
        self._kind = {
            item.name: (tuple(n.op_type for n in nodes[part.first : part.last]), number, item.shape)
            for part, inside in zip(self._parts, self._inside, strict=True)
            for number, item in enumerate(inside)
        }
        first = self._parts[-1].first if self._parts else len(nodes)
        outputs = [
            value
            for value in prepared.graph.outputs
            if (node := value.producer()) in place and place[node] >= first
            if value.name in facts and facts[value.name].is_float  # type: ignore[index]
        ]
        scores = [value for value in outputs if decides(value, facts)]
        self._outputs = {v.name or "": decides(v, facts) for v in scores or outputs}
        self._clean: list[State] = [dict(feed) for feed in judges]
        self._followed: dict[Trial, list[State]] = {}
        self._left: dict[Trial, float] = {}  # error of the rows that stand for the matrix
        self._lost: dict[Trial, float] = {}  # of the outputs

    def run(self, samples: Sequence[Feed], tick: Callable[[], object]) -> None:
        """All parts in turn."""
        states: list[State] = [dict(feed) for feed in samples]
        inputs = {value.name or "" for value in self._prepared.graph.inputs}
        follow = self._to_follow()
        for number, part in enumerate(self._parts):
            final = number + 1 == len(self._parts)
            makes = tuple(self._outputs) if final else part.makes
            items = self._inside[number]
            taps = {item.name: tap(item, self._prepared) for item in items}
            names = list(dict.fromkeys(name for name in taps.values() if name))
            session = self._session(part, [*names, *makes], {})
            passed_on = () if final else makes
            moments = self._moments(session, states, names, passed_on)
            judging = self._moments(session, self._clean, names, ())
            self._solve(number, items, taps, moments, judging)
            if not makes:
                tick()
                continue
            clean = [session.run(state, list(makes)) for state in self._clean]
            for trial, stream in self._followed.items():
                results = [session.run(state, list(makes)) for state in stream]
                if final:
                    self._lost[trial] = self._error(clean, results, makes, final=True)
                _update(stream, results, passed_on)
            for item in items:
                results = self._run(part, makes, item, reference(item.read()))
                error = self._error(clean, results, makes, final=final)
                self.effects[item.name] = dataclasses.replace(self.effects[item.name], passed=error)
                for bits in follow.get(item.name, ()):
                    tapped = taps[item.name]
                    made = self._try(item, bits, moments.get(tapped), judging.get(tapped))
                    results = self._run(part, makes, item, made)
                    if final:
                        self._lost[item.name, bits] = self._error(clean, results, makes, final=True)
                    else:
                        self._followed[item.name, bits] = [dict(state) for state in self._clean]
                        _update(self._followed[item.name, bits], results, passed_on)
            _update(self._clean, clean, passed_on)
            needed = {name for later in self._parts[number + 1 :] for name in later.reads} | inputs
            for state in (*states, *self._clean, *(s for t in self._followed.values() for s in t)):
                for name in state.keys() - needed:
                    del state[name]
            tick()

    def unit(self, name: str, bits: int) -> float:
        """What a unit of error at a node's output costs the outputs of the model, if its matrix has so many bits."""
        few = 2 if bits == 2 else 4  # the errors of 8 bits are small, too
        effect, local = self.effects[name], self._local(name)
        if (name, few) in self._lost:
            return self._price((name, few))
        every, alike = {}, {}
        for trial, lost in self._lost.items():
            if trial[1] == 4 and lost > 0 and self._local(trial[0]) > 0:
                ratio = self._price(trial) / self._local(trial[0])
                every[self.effects[trial[0]].part] = ratio
                if self._kind[trial[0]] == self._kind[name]:
                    alike[self.effects[trial[0]].part] = ratio
        points = alike or every
        if not points:
            return local
        parts = sorted(points)
        ratio = float(np.exp(np.interp(effect.part, parts, [np.log(points[p]) for p in parts])))
        return local * ratio * (self._excess(name) if few == 2 else 1.0)

    def _excess(self, name: str) -> float:
        """How much more a unit of error costs with 2 bits than with 4: of its kind, or of all."""
        every, alike = [], []
        for other, bits in self._lost:
            if bits == 2 and self._lost.get((other, 4), 0.0) > 0:
                factor = self._price((other, 2)) / self._price((other, 4))
                every.append(factor)
                if self._kind[other] == self._kind[name]:
                    alike.append(factor)
        return float(np.median(alike or every or [1.0]))

    def _price(self, trial: Trial) -> float:
        return self._lost[trial] / self._left[trial] if self._left[trial] > 0 else 0.0

    def _local(self, name: str) -> float:
        """What a unit of error at a node's output does to what its part passes on."""
        effect = self.effects[name]
        return effect.passed / effect.base if effect.base > 0 else 0.0

    def _to_follow(self) -> dict[str, tuple[int, ...]]:
        """The nodes whose errors run on to the outputs, with bits: some of each kind, spread evenly, and all of the last part."""
        kinds: dict[object, list[str]] = {}
        for inside in self._inside[:-1]:
            for item in inside:
                kinds.setdefault(self._kind[item.name], []).append(item.name)
        passing = max(
            (sum(self._facts[n].elements for n in part.makes if n in self._facts) for part in self._parts),
            default=0,
        )  # fmt: skip
        most = max(1, min(_FOLLOWED, _ROOM // max(4 * passing * len(self._clean), 1)))
        each = max(1, most // max(len(kinds), 1))
        found: dict[str, tuple[int, ...]] = {}
        for names in list(kinds.values())[:most]:
            ends = np.linspace(0, len(names) - 1, min(len(names), each)).round().astype(int)
            found |= {names[i]: (4,) for i in np.unique(ends)}
            found[names[ends[len(ends) // 2]]] = (4, 2)
        last = self._inside[-1][-_LAST:] if self._inside else []
        return found | {item.name: (4, 2) for item in last}

    def _try(self, item: Linear, bits: int, H: Array | None, judge: Array | None) -> Blocked:
        """A whole matrix rounded as it will be, and the error of the rows that stand for it."""
        W = item.read()
        scheme = Scheme(bits, _BLOCK, self._recipe.symmetric)
        made = rounded(W, scheme, self._recipe.algorithm, None if H is None else Factors(H))
        taken = places(len(W))
        off = some_rows(item) - made.rows(taken).dequantize()
        error = float(np.square(off).sum(dtype=np.float64))
        self._left[item.name, bits] = error if judge is None else output_error(off, judge)
        return made

    def _run(
        self, part: Part, makes: Sequence[str], item: Linear, made: Blocked
    ) -> list[list[Array]]:
        """What the part makes of each feed with this matrix."""
        session = self._session(part, makes, {item.name: made})
        return [session.run(state, list(makes)) for state in self._clean]

    def _solve(
        self, number: int, items: Sequence[Linear], taps: Mapping[str, str], moments: Mapping[str, Array],
        judging: Mapping[str, Array],
    ) -> None:  # fmt: skip
        """The errors of all schemes, of the matrices that nodes of a part decide on, and of the reference."""
        factors = {name: Factors(H) for name, H in moments.items()}
        for factor in factors.values():
            factor.get(order=False)  # before threads ask for it

        def one(item: Linear) -> None:
            judge, W = judging.get(taps[item.name]), some_rows(item)
            base, alone = reference_errors(W, judge)
            self.effects[item.name] = Effect(number, 0.0, base, alone)
            if item.name in self._deciding:
                schemes = self._deciding[item.name].schemes
                self.errors[item.name] = errors(
                    W, schemes, self._recipe.algorithm, factors.get(taps[item.name]), judge
                )

        workers = self._recipe.threads or os.cpu_count() or 1
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, items))

    def _moments(
        self, session: Session, states: Sequence[State], names: Sequence[str], makes: Sequence[str]
    ) -> dict[str, Array]:
        """E[x x'] of the taps, float64, of even rows; the states then hold what the part makes, if that is asked for."""
        sums: dict[str, Array] = {}
        count = dict.fromkeys(names, 0)
        for state in states if names or makes else ():
            results = session.run(state, [*names, *makes])
            for name, x in zip(names, results, strict=False):
                rows = np.asarray(x, np.float32).reshape(-1, x.shape[-1])
                rows = rows * even(rows)
                product = (rows.T @ rows).astype(np.float64)
                sums[name] = sums[name] + product if name in sums else product
                count[name] += len(rows)
            _update([state], [results[len(names) :]], makes)
        return {name: total / max(count[name], 1) for name, total in sums.items()}

    def _session(self, part: Part, makes: Sequence[str], weights: Mapping[str, Blocked]) -> Session:
        """The part, with these weights, activations float."""
        model = part_model(self._prepared, part, makes, self._facts)
        if weights:
            run_pass(LowerNbits(weights, accuracy_level=0), model)
        return Session(model, Options("all", threads=self._recipe.threads))

    def _error(
        self, clean: Sequence[Sequence[Array]], made: Sequence[Sequence[Array]], names: Sequence[str], *, final: bool
    ) -> float:  # fmt: skip
        """The mean over positions of what was lost, all values together."""
        total, count = 0.0, 0
        for wanted, found in zip(clean, made, strict=True):
            for name, y, z in zip(names, wanted, found, strict=True):
                if y.dtype.kind == "f" and y.shape == z.shape and y.size:
                    lost = _lost(y, z, self._outputs[name] if final else "")
                    total, count = total + float(lost.sum()), count + len(lost)
        return total * len(names) / max(count, 1)


def _update(
    states: Sequence[State], results: Sequence[Sequence[Array]], names: Sequence[str]
) -> None:
    for state, values in zip(states, results, strict=True):
        state.update(zip(names, values, strict=False))


def _lost(y: Array, z: Array, kind: str) -> Array:
    """By position: KL divergence in nats of scores of classes, or the mean squared error of rows of even power."""
    wide = y.shape[-1] if y.ndim else 1
    rows, others = y.reshape(-1, wide), z.reshape(-1, wide)
    if kind:
        taken = some(len(rows), _POSITIONS)
        return divergence(rows[taken], others[taken], logits=kind == "logits")
    rows, others = (np.nan_to_num(np.asarray(a, np.float32)) for a in (rows, others))
    made: Array = np.square((others - rows) * even(rows)).mean(axis=1, dtype=np.float64)
    return made
