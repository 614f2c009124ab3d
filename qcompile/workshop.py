"""One compilation's working state: everything that the attempts at a result share."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes.absorb_bias import AbsorbBias
from passes.bound_masks import BoundMasks
from passes.scale_channels import ScaleChannels
from qcompile.build import Format, Solution, build
from qcompile.calib.moments import rounding_shift
from qcompile.calib.observe import Observed, Settings, observe
from qcompile.calib.ranges import AUTO, method, needs_histogram
from qcompile.calib.reading import Bad
from qcompile.calib.split import TUNING, Judges, Samples
from qcompile.calib.statistics import Statistics
from qcompile.calib.stats import TensorStats
from qcompile.calib.taps import with_outputs
from qcompile.plan.candidates import Candidate
from qcompile.plan.make import Request, find_candidates, make_plan
from qcompile.plan.plan import Form, Plan
from qcompile.plan.tensors import Coding, coding
from qcompile.prepare import PASSES
from qcompile.progress import Progress
from qcompile.quant.scheme import QParams, Scheme
from qcompile.recipe import Recipe
from qcompile.run.probe import Fact
from qcompile.run.session import Feed, Options, Session, quick_level
from qcompile.solve.activations import grid_of, solve_activations
from qcompile.solve.needs import named, notes_on, wanted
from qcompile.solve.weights import InputMoments, Weight, solve_weights
from qcompile.step import Need, Pass
from qcompile.targets.schema import Target
from qcompile.timing import kernel_times
from qcompile.verify.compare import Comparison, Reference
from qcompile.verify.slices import concat_behind, parts_of

_SHIFT_SAMPLES = 16
_SHAPES = 24  # held-out samples whose shapes are compared
_DROWNED = 16.0  # ranges of parts of an output: 4 of the 8 bits of the smaller one are lost
LARGE = 400  # static nodes: in larger graphs fewer things are tried, so that seconds stay seconds


@dataclasses.dataclass(frozen=True)
class Ranging:
    """How activation ranges and biases are found.

    Attributes:
        method: name of one of `qcompile.calib.ranges`, for all tensors but those in `single`.
        single: method of single tensors, by root name.
        shift: biases are corrected for the mean error of the inputs, not only of the weights.
        rounded: weights whose codes were searched for, by node name.
    """

    method: str
    single: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shift: bool = False
    rounded: Mapping[str, Weight] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Attempt:
    """A built model, and what was found out about it."""

    plan: Plan
    ranging: Ranging
    form: Format
    model: ir.Model
    session: Session
    comparison: Comparison | None = None
    speedup: float = 0.0

    @property
    def noise(self) -> float:
        """Noise-to-signal ratio of the worst output slice, 0 before it was judged."""
        return 0.0 if self.comparison is None else self.comparison.noise_to_signal

    @property
    def divergence(self) -> float | None:
        """Mean KL divergence of outputs with scores of classes, if there are any."""
        return None if self.comparison is None else self.comparison.divergence

    @property
    def differing(self) -> int:
        """Decisions that differ from the float model's, 0 before it was judged."""
        return 0 if self.comparison is None else self.comparison.differing

    @property
    def db(self) -> float:
        """SQNR of the worst output slice, infinite before it was judged."""
        return float("inf") if self.comparison is None else self.comparison.worst_db


class Workshop:
    """The prepared model, its facts and statistics, and how a plan becomes a measured attempt."""

    def __init__(
        self, prepared: ir.Model, target: Target, facts: Mapping[str, Fact], recipe: Recipe,
        samples: Judges | None, reference: Reference, progress: Progress,
        stored: Statistics | None = None,
    ) -> None:  # fmt: skip
        self.prepared, self.target, self.facts, self.recipe = prepared, target, facts, recipe
        self.samples, self.reference, self.progress = samples, reference, progress
        self.found = find_candidates(prepared, target, facts)
        self.steps: Sequence[Pass] = (
            *PASSES,
            BoundMasks(facts),
            ScaleChannels(facts),
            AbsorbBias(facts),
        )  # whose needs are gathered
        self.stored = stored  # gathered before, in place of samples that calibrate
        self.stats: Mapping[str, TensorStats] = {}
        self.lacking: frozenset[str] = frozenset()  # coded tensors of which nothing is known
        self.methods: tuple[str, ...] = ("minmax",)
        self.widely: Plan | None = None  # that was calibrated
        self.needs: Mapping[str, Need] = {}
        self.observed: Mapping[str, TensorStats] = {}
        self._shifts: dict[tuple[str, float, int], npt.NDArray[np.float64]] = {}

    def plan(self, request: Request) -> Plan:
        """The cheapest plan within a request."""
        return make_plan(self.prepared, self.target, self.facts, request, self.found)

    def only_fused(self, plan: Plan) -> bool:
        """Whether the plan has nodes that no operator of ONNX is at its opset: LSTM, products with 8-bit weights alone."""
        items = ((self.found[e.node], e.form) for e in plan.of(Form.DYNAMIC, Form.WEIGHT))
        only = {(Form.DYNAMIC, "recurrent"), (Form.WEIGHT, "dynamic")}
        return any(
            isinstance(item, Candidate) and (form, item.role) in only for item, form in items
        )

    def coding(self, plan: Plan) -> Coding:
        """The coded tensors of a plan."""
        return coding(self.prepared, plan, self.found)

    def widest(self, request: Request) -> Plan:
        """A plan of more integer nodes than seem to pay: measured times may turn out in their favour.

        Where no node at all seems to pay as a static one, none will.
        """
        draft = self.plan(request)
        if not draft.of(Form.STATIC, Form.FREE):
            return draft
        return self.plan(dataclasses.replace(request, gain=6.0, border=0.2))

    def timed(self, request: Request) -> Request:
        """The request with this machine's times of kernels in place of the target's costs.

        Targets of another machine keep their costs, and so does one whose recipe has no timing.
        """
        if not (self.recipe.timing and self.target.fits_here()):
            return request
        with self.progress.stage("timing kernels") as step:
            times = kernel_times(
                self.prepared, self.found, self.target, self.facts, threads=self.recipe.threads,
                by_block=self.recipe.format != "qdq" and self._one_shape(), tick=lambda *_: step(1, None),
            )  # fmt: skip
        return dataclasses.replace(
            request, measured=times.nodes, border=times.border, by_block=times.by_block
        )

    def _one_shape(self) -> bool:
        """Whether all held-out samples have the shapes of the first: what is best for one is best for all."""
        shapes = {
            tuple((name, value.shape) for name, value in sorted(feed.items()))
            for feed in self.held_out(_SHAPES)
        }
        return len(shapes) == 1

    def calibrate(self, plan: Plan) -> tuple[str, ...]:
        """Statistics of every tensor that the plan, or any with fewer integer nodes, may need; notes on them.

        Raises:
            DataError: a tensor holds NaN, or stored statistics lack one.
        """
        ranges = self.recipe.ranges
        several = AUTO if len(plan.of(Form.STATIC)) <= LARGE else ("mean",)
        self.methods = several if ranges == "auto" else (ranges,)
        self.widely = plan
        self.needs = wanted(
            self.prepared, self.coding(plan), self._conv_inputs(plan), self.steps,
            histogram=any(map(needs_histogram, self.methods)),
        )  # fmt: skip
        if self.stored is not None:
            self._keep(self.stored.tensors)
            return self.stored.forced
        found = self.observe(self.needs)
        self._keep(found.tensors)
        return notes_on(found, self.recipe.memory)

    def _keep(self, tensors: Mapping[str, TensorStats]) -> None:
        assert self.widely is not None
        self.observed = tensors
        self.stats, self.lacking = named(self.coding(self.widely), tensors)

    def variant(self, prepared: ir.Model, facts: Mapping[str, Fact]) -> Workshop:
        """The same for a graph that computes the same, with the statistics known so far.

        Those of tensors whose values are others now must be replaced: see `replace`.
        """
        other = copy.copy(self)
        other.prepared, other.facts = prepared, facts
        other.found = find_candidates(prepared, self.target, facts)
        other._shifts = {}  # noqa: SLF001 - a copy of itself
        other.replace({})
        return other

    def observe_again(self, names: AbstractSet[str]) -> Mapping[str, TensorStats]:
        """Statistics of these tensors as they are in this graph, as far as a plan needs them.

        Where statistics came stored, of the few samples that came with them.
        """
        needs = {name: need for name, need in self.needs.items() if name in names}
        if not needs:
            return {}
        if self.stored is None:
            return self.observe(needs, "observing what was rescaled").tensors
        assert self.samples is not None
        few = list(enumerate(self.samples.few(TUNING)))
        settings = Settings(self.recipe.memory, self.recipe.threads)
        return observe(self.prepared, needs, lambda: few, self.facts, settings).tensors

    def replace(self, tensors: Mapping[str, TensorStats]) -> None:
        """These statistics take the place of others."""
        if self.widely is not None:
            self._keep({**self.observed, **tensors})

    def observe(self, needs: Mapping[str, Need], title: str = "calibrating") -> Observed:
        """One streaming run over the calibration samples.

        Raises:
            DataError: a tensor holds NaN or an infinity that is no mask.
        """
        assert isinstance(self.samples, Samples)
        samples, recipe = self.samples, self.recipe
        settings = Settings(recipe.memory, recipe.threads, skip_bad=recipe.skip_bad)
        total = samples.calibration_count
        with self.progress.stage(title, total) as step:
            found = observe(
                self.prepared, needs, samples.calibration, self.facts, settings,
                lambda number, passes: step(1, total * passes if number == 0 else None),
            )  # fmt: skip
            if recipe.skip_bad:  # those held out must be good as well
                judged = self._judged(needs, found.infinite)
                samples.leave_out({bad.sample for bad in found.bad})
                found = dataclasses.replace(found, bad=(*found.bad, *judged))
        return found

    def drop_bad(self) -> tuple[str, ...]:
        """Leaves out held-out samples that are bad, where nothing is calibrated; notes on them."""
        if not isinstance(self.samples, Samples):
            return ()
        outputs = [value.name or "" for value in self.prepared.graph.outputs]
        floats = [n for n in outputs if n in self.facts and self.facts[n].is_float]
        bad = self._judged({name: Need(name) for name in floats}, None)
        return notes_on(Observed({}, 0, 1, bad), self.recipe.memory)

    def _judged(
        self, needs: Mapping[str, Need], infinite: frozenset[str] | None
    ) -> tuple[Bad, ...]:
        """The bad ones of the held-out samples, which are left out from now on."""
        assert isinstance(self.samples, Samples)
        settings = Settings(
            self.recipe.memory,
            self.recipe.threads,
            skip_bad=True,
            allow_all_bad=True,
            infinite=infinite,
        )
        found = observe(self.prepared, needs, self.samples.numbered, self.facts, settings)
        self.samples.leave_out({bad.sample for bad in found.bad})
        return found.bad

    def _conv_inputs(self, plan: Plan) -> set[str]:
        names = set()
        for entry in plan.of(Form.STATIC):
            item = self.found[entry.node]
            if isinstance(item, Candidate) and item.role == "conv":
                names.add(item.data[0].name or "")
        return names

    def unusable(self) -> dict[str, str]:
        """Nodes that read or make a tensor no scale can serve, and why they cannot be static."""
        why = dict.fromkeys(self.lacking, "is not in the statistics")
        why |= {
            name: "is infinite in the calibration data"
            if stats.infinite
            else f"reaches {max(stats.low, stats.high, key=abs):g} in the calibration data"
            for name, stats in self.stats.items()
            if not stats.bounded
        }
        reasons = {}
        for name, item in self.found.items():
            if isinstance(item, Candidate) and item.role not in (
                "dynamic",
                "recurrent",
                "embedding",
            ):
                for value in (*item.data, item.result):
                    if value.name in why:
                        reasons[name] = f"tensor {value.name!r} {why[value.name]}"
        return reasons | self._drowned()

    def _drowned(self) -> dict[str, str]:
        """Concats behind an output, of parts so different in range that one scale would lose some."""
        reasons = {}
        for output in self.prepared.graph.outputs:
            node, _ = concat_behind(output, self.facts) or (None, ())
            seen = [self.stats.get(v.name or "") for v in (node.inputs if node else ()) if v]
            spans = [s.span for s in seen if s is not None and s.span > 0]
            if node is not None and spans and max(spans) > _DROWNED * min(spans):
                ratio = max(spans) / min(spans)
                reasons[node.name or ""] = f"the ranges of its inputs differ {ratio:.0f}-fold"
        return reasons

    def solve(self, plan: Plan, ranging: Ranging) -> Solution:
        """Scales, zero points, codes and corrected biases."""
        params = self.parameters(plan, ranging)
        moments: dict[str, InputMoments] = {}
        if self.recipe.bias_correction and self.samples is not None:
            inputs = [n for n in self._conv_inputs(plan) if self.stats[n].channels is not None]
            shifts = self._shift({n: params[n] for n in sorted(inputs)}) if ranging.shift else {}
            moments = {
                n: InputMoments(channels.mean(), shifts.get(n))
                for n in inputs
                if (channels := self.stats[n].channels) is not None and channels.axis == 1
            }
        weights = solve_weights(
            plan,
            self.found,
            params,
            moments,
            saturating=self.target.saturating,
            search=self.recipe.weight_search,
            rounded=ranging.rounded,
        )
        return Solution(params, weights)

    def parameters(self, plan: Plan, ranging: Ranging) -> dict[str, QParams]:
        """Parameters of all coded tensors."""
        grid = grid_of(Scheme.parse(plan.activation))
        single = {
            n: method(m)(self.stats[n], grid) for n, m in ranging.single.items() if n in self.stats
        }
        return solve_activations(plan, self.coding(plan), self.stats, ranging.method, single)

    def tuning_reference(self, outputs: Sequence[str], feeds: Sequence[Feed]) -> Reference:
        """These values of the float graph on a few calibration samples: tuning must not see those held out."""
        options = Options(quick_level(self.prepared), threads=self.recipe.threads)
        session = Session(with_outputs(self.prepared, outputs), options)
        parts = {
            value.name or "": parts_of(value, self.facts) for value in self.prepared.graph.outputs
        }
        return Reference(session, lambda: iter(feeds), parts)

    def held_out(self, most: int) -> list[Feed]:
        """The first held-out feeds."""
        return [] if self.samples is None else list(itertools.islice(self.samples.held_out(), most))

    def _shift(self, params: Mapping[str, QParams]) -> dict[str, npt.NDArray[np.float64]]:
        """Mean rounding error of the tensors' channels; remembered, as attempts share most parameters."""
        assert self.samples is not None
        keys = {name: (name, float(p.scale), int(p.zero)) for name, p in params.items()}
        new = {name: p for name, p in params.items() if keys[name] not in self._shifts}
        if new:
            feeds = self.samples.few(_SHIFT_SAMPLES)
            found = rounding_shift(
                self.prepared, new, feeds, self.facts, threads=self.recipe.threads
            )
            self._shifts.update((keys[name], shift) for name, shift in found.items())
        return {name: self._shifts[key] for name, key in keys.items() if key in self._shifts}

    def attempt(self, plan: Plan, ranging: Ranging, form: Format) -> Attempt:
        """The plan solved, built and loaded.

        Raises:
            ModelError: ORT refuses the result.
        """
        solution = self.solve(plan, ranging)
        model = build(self.prepared, plan, solution, self.target, self.facts, form)
        return Attempt(
            plan, ranging, form, model, Session(model, Options("all", threads=self.recipe.threads))
        )

    def judge(self, attempt: Attempt, limit: int | None = None) -> Comparison:
        """The error of an attempt on held-out samples, deployed."""
        attempt.comparison = self.reference.compare(attempt.session, limit)
        return attempt.comparison
