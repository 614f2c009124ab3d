"""Times of kernels: which pieces are alike, whose time is whose, and that they serve a plan."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from lowering import constant, eager
from networks import conv_net, samples
from rewrites import parse, random_feed
from workbench import workbench

from qcompile import timing
from qcompile.errors import ModelError
from qcompile.pieces import Collection, Piece, cut_out
from qcompile.plan.candidates import Candidate
from qcompile.plan.make import Request, find_candidates, make_plan
from qcompile.prepare import prepare
from qcompile.run.cache import Cache, open_cache
from qcompile.run.probe import Fact, probe
from qcompile.run.profile import Kernel
from qcompile.targets.schema import Boundary
from qcompile.timing import Border, KernelTimes, kernel_times
from qcompile.workshop import Workshop

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import onnx

TARGET = eager()


@dataclasses.dataclass(frozen=True)
class Case:
    """A prepared model with its candidates."""

    model: ir.Model
    facts: Mapping[str, Fact]
    found: Mapping[str, Candidate | str]

    def pieces(self) -> dict[str, Piece]:
        return dict(cut_out(self.found, TARGET, self.facts))

    def times(self, **options: Any) -> KernelTimes:
        return kernel_times(self.model, self.found, TARGET, self.facts, threads=1, **options)

    @property
    def coverable(self) -> set[str]:
        """Candidates that no other one absorbs."""
        items = {n: c for n, c in self.found.items() if isinstance(c, Candidate)}
        absorbed = {node.name for item in items.values() for node in item.absorbed}
        return set(items) - absorbed


def case(model: str | onnx.ModelProto, **given: Any) -> Case:
    made = parse(model) if isinstance(model, str) else ir.from_proto(model)
    feed = random_feed(made, 0, given)
    prepared, _ = prepare(made)
    facts = probe(prepared, feed)
    return Case(prepared, facts, find_candidates(prepared, TARGET, facts))


def graph(body: str, *constants: str, channels: int = 4, side: int = 8) -> str:
    shape = f"float[1,{channels},{side},{side}]"
    return f"g ({shape} x) => (float[N,C,H,W] y) <{', '.join(constants)}> {{ {body} }}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def key(text: str, node: str = "n") -> str:
    return case(text).pieces()[node].key


CONV = graph("[n] y = Conv(x, k)", constant("k", 4, 4, 1, 1))


def test_equal_nodes_have_equal_signatures() -> None:
    """Names and weights are nothing to a kernel."""
    renamed = graph("t = Abs(x) [m] y = Conv(t, w)", constant("w", 4, 4, 1, 1, seed=3))
    assert key(renamed, "m") == key(CONV)


@pytest.mark.parametrize(
    "other",
    [
        graph("[n] y = Conv(x, k)", constant("k", 8, 4, 1, 1)),
        graph("[n] y = Conv(x, k)", constant("k", 4, 4, 1, 1), side=9),
        graph("[n] y = Conv(x, k, b)", constant("k", 4, 4, 1, 1), constant("b", 4)),
        graph("[n] y = Conv<strides = [2, 2]>(x, k)", constant("k", 4, 4, 1, 1)),
        graph("[n] y = Conv<pads = [1, 1, 1, 1]>(x, k)", constant("k", 4, 4, 3, 3)),
        graph("[n] y = Conv<group = 4>(x, k)", constant("k", 4, 1, 1, 1)),
        graph("[n] a = Conv(x, k) y = Relu(a)", constant("k", 4, 4, 1, 1)),
        graph("a = Conv(x, l) [n] y = Conv(a, k)", constant("k", 4, 4, 1, 1), constant("l", 4, 4, 1, 1)),
    ],
    ids=["outputs", "side", "bias", "stride", "kernel", "group", "absorbs", "layout"],
)  # fmt: skip
def test_different_nodes_have_different_signatures(other: str) -> None:
    assert key(other) != key(CONV)


def test_integer_constants_matter() -> None:
    text = "g (float[4,6] x) => (float[N,M] y) <int64[2] i = {0, 1}> { [n] y = Gather<axis = 1>(x, i) }"
    assert key(text) != key(text.replace("{0, 1}", "{0, 5}"))


def test_operands_that_are_one_tensor() -> None:
    twice = graph("[n] y = Mul(x, x)")
    assert key(twice) != key(graph("a = Abs(x) [n] y = Mul(a, x)"))


def test_the_target_s_scheme_matters() -> None:
    made = case(CONV)
    other = dataclasses.replace(TARGET, activation="int16.tensor.asym")
    assert dict(cut_out(made.found, other, made.facts))["n"].key != made.pieces()["n"].key


def test_unknown_shapes_are_left_out() -> None:
    made = case(CONV)
    facts = {name: dataclasses.replace(fact, shape=None) for name, fact in made.facts.items()}
    assert dict(cut_out(made.found, TARGET, facts)) == {}


def test_computed_operands_are_left_out() -> None:
    made = case(
        "g (float[2,6] x, int64[2] s) => (float[N,M] y) { [n] a = Reshape(x, s) [m] y = Sigmoid(a) }",
        s=np.array([3, 4]),
    )
    assert isinstance(made.found["n"], Candidate)
    assert set(made.pieces()) == {"m"}


def test_max_pool_needs_something_channels_last() -> None:
    alone = graph("[n] y = MaxPool<kernel_shape = [2, 2]>(x)")
    behind = graph(
        "a = Conv(x, k) [n] y = MaxPool<kernel_shape = [2, 2]>(a)", constant("k", 4, 4, 1, 1)
    )
    assert "n" not in case(alone).pieces()
    assert case(behind).pieces()["n"].fed


def test_what_is_part_of_the_conv_before_it() -> None:
    text = graph(
        "a = Conv(x, k) [s] b = LeakyRelu(a) c = Conv(b, k) d = Conv(x, k) [n] y = Add(c, d)",
        constant("k", 4, 4, 1, 1),
    )
    pieces = case(text).pieces()
    assert pieces["s"].merged
    assert pieces["n"].summed
    assert not pieces["n"].merged


def test_a_model_of_pieces_runs() -> None:
    """As float, with names that tell whose a node is; and constants that matter are the model's own."""
    from qcompile.run.session import Session

    made = case(
        graph("[r] a = Reshape(x, s) [n] y = Conv(x, k)", constant("k", 4, 4, 1, 1), "int64[2] s = {4, 64}")
        .replace("y)", "y, float[N,M] a)", 1)
    )  # fmt: skip
    collection = Collection(made.model.opset_imports)
    pieces = made.pieces()
    for number, name in enumerate(("r", "n")):
        collection.add(number, pieces[name])
    results = Session(collection.model).run(collection.feed)
    assert [result.shape for result in results] == [(4, 64), (1, 4, 8, 8)]
    assert [node.name for node in collection.model.graph] == ["k0f0", "k0", "k1f0", "k1"]


def test_for_real() -> None:
    """All candidates have times, whatever they are; a plan takes them; the second call measures none."""
    made = case(conv_net())
    ticks: list[tuple[int, int | None]] = []
    times = made.times(tick=lambda done, total: ticks.append((done, total)))
    assert set(times.nodes) == made.coverable
    assert all(a >= 0 and b >= 0 for a, b in times.nodes.values())
    assert times.nodes["/conv0/Conv"][0] > 0
    assert times.nodes["/conv1/Conv"] == times.nodes["/conv2/Conv"]
    assert 0.5 <= times.border <= 4
    assert min(times.each.quantize) > 0
    distinct = len({piece.key for piece in made.pieces().values()})
    assert (times.measured, times.cached) == (distinct, 0)
    assert ticks[0] == (0, distinct)
    assert sum(done for done, _ in ticks) == distinct
    request = Request(measured=times.nodes, border=times.border)
    plan = make_plan(made.model, TARGET, made.facts, request, made.found)
    assert {entry.node for entry in plan.nodes} == set(made.found)
    again = made.times()
    assert (again.measured, again.cached) == (0, distinct)
    assert (again.nodes, again.border, again.each) == (times.nodes, times.border, times.each)


WEIGHTS = [
    constant("k", 16, 16, 1, 1),
    constant("m", 16, 16),
    constant("d", 16),
    "float two = {2.0}",
    "int64[2] f = {1, 16}",
]
ROLES = (
    f"g (float[1,16,8,8] x) => (float[N,C,H,W] y, float[N,M] z) <{', '.join(WEIGHTS)}> {{ "
    "[conv] a = Conv(x, k) [act] b = Relu(a) [max] c = MaxPool<kernel_shape = [1, 1]>(b) [free] d2 = Mul(c, two) "
    "[gate] e = Sigmoid(d2) [mul] h = Mul(d2, e) [cat] i = Concat<axis = 1>(h, c) [move] y = Transpose<perm = [0, 2, 3, 1]>(i) "
    "[pool] j = GlobalAveragePool(h) [flat] l = Reshape(j, f) [dyn] o = MatMul(l, m) [bias] z = Add(o, d) }"
)  # fmt: skip


def test_every_role_for_real() -> None:
    made = case(ROLES)
    times = made.times()
    assert set(times.nodes) == made.coverable
    assert {"conv", "max", "free", "gate", "mul", "cat", "move", "pool", "flat", "dyn"} <= set(
        times.nodes
    )
    assert times.nodes["free"][1] == 0
    for name in ("conv", "max", "mul", "pool", "dyn"):
        assert min(times.nodes[name]) > 0


def test_nothing_is_kept_without_a_cache(folder: Path) -> None:
    made = case(CONV)
    for _ in range(2):
        times = made.times(cache=False)
        assert (times.measured, times.cached) == (1, 0)
    assert not folder.exists()


def test_no_names_are_kept(folder: Path) -> None:
    made = case(conv_net())
    made.times()
    (path,) = folder.iterdir()
    table = json.loads(path.read_text("utf-8"))
    assert table.keys() == {"format", "machine", "times"}
    keys = {piece.key for piece in made.pieces().values()}
    assert table["times"].keys() == {*keys, f"border {TARGET.activation}"}
    assert all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)


def test_no_time_left() -> None:
    times = case(conv_net()).times(seconds=0.0)
    assert (times.nodes, times.measured, times.cached) == ({}, 0, 0)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Microseconds by operator type in place of a profile; node names of the models that were run come back."""

    def planted(times: dict[str, float], refuse: str = "") -> list[list[str]]:
        runs: list[list[str]] = []

        def kernels(model: ir.Model, *_: object, **__: object) -> list[Kernel]:
            runs.append([node.name or "" for node in model.graph])
            if any(node.op_type == refuse for node in model.graph):
                raise ModelError(f"no {refuse}")
            return [
                Kernel(node.name or "", node.op_type, (), (1000 * times.get(node.op_type, 0.0),) * 4)
                for node in model.graph
            ]  # fmt: skip

        monkeypatch.setattr(timing, "kernels", kernels)
        return runs

    return planted


@pytest.mark.parametrize(("integer", "form"), [(900.0, "float"), (10.0, "static")])
def test_what_was_measured_decides(
    integer: float, form: str, plant: Callable[..., list[list[str]]]
) -> None:
    plant({"Conv": 300.0, "QLinearConv": integer, "GlobalAveragePool": 5.0})
    made = case(conv_net())
    times = made.times()
    assert times.nodes["/conv1/Conv"] == pytest.approx((300_000, 1000 * integer), abs=2000)
    request = Request(measured=times.nodes)
    plan = make_plan(made.model, TARGET, made.facts, request, made.found)
    assert {plan[f"/conv{i}/Conv"].form.value for i in range(3)} == {form}


def test_what_ort_refuses_is_left_out(plant: Callable[..., list[list[str]]]) -> None:
    """The others are measured all the same."""
    plant({"Conv": 100.0}, refuse="GlobalAveragePool")
    made = case(conv_net())
    times = made.times()
    assert set(times.nodes) == made.coverable - {"/pool"}
    assert times.measured == len({p.key for n, p in made.pieces().items() if n != "/pool"})
    assert made.times().cached == times.measured


def test_the_costliest_come_first(
    plant: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_CHUNK_NS", 0.0)
    made = case(conv_net())
    costs = {piece.key: piece.cost for piece in made.pieces().values()}
    order: list[float] = []
    add = Cache.add

    def spy(cache: Cache, entries: Mapping[str, tuple[float, ...]]) -> None:
        order.extend(costs[key] for key in entries if key in costs)
        add(cache, entries)

    monkeypatch.setattr(Cache, "add", spy)
    plant({})
    made.times()
    assert len(order) == len(costs)
    assert order == sorted(order, reverse=True)


def test_models_of_pieces_are_bounded(
    plant: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model for all, or where memory is short one for each; each is run as float and as integer."""
    made = case(conv_net())
    runs = plant({})
    made.times(cache=False)
    assert len(_of_pieces(runs)) == 2
    monkeypatch.setattr(timing, "_CHUNK_BYTES", 1)
    runs.clear()
    made.times(cache=False)
    assert len(_of_pieces(runs)) == 2 * len({piece.key for piece in made.pieces().values()})


def _of_pieces(runs: list[list[str]]) -> list[list[str]]:
    return [names for names in runs if any(name.startswith("k0") for name in names)]


def test_numbers_of_another_kind_are_no_times() -> None:
    made = case(CONV)
    open_cache(1).add({made.pieces()["n"].key: (1.0, 2.0, 3.0)})
    assert made.times().measured == 1


def test_a_conv_that_adds() -> None:
    """The Add took what one Conv took longer than its twin, and what it took itself."""
    text = graph("c = Conv(x, k) d = Conv(x, k) [n] y = Add(c, d)", constant("k", 4, 4, 1, 1))
    piece = case(text).pieces()["n"]
    took = timing._Took(own=500.0, feeders={"f0": 9000.0, "f1": 7000.0})
    assert timing._float_ns(piece, took, Border()) == 2500.0


MOVES = graph(
    "a = Conv(x, k) [n] b = Gather<axis = 1>(a, i) y = Conv(b, l)",
    constant("k", 4, 4, 1, 1), constant("l", 4, 2, 1, 1), "int64[2] i = {0, 2}",
)  # fmt: skip


def test_layout_changes_that_a_node_makes_necessary() -> None:
    """Gather works in neither layout: its 4x8x8 operand and its 2x8x8 result are moved."""
    piece = case(MOVES).pieces()["n"]
    assert piece.moved == [256, 128]
    border = Border((0.0,) * 4, (0.0,) * 4, (10.0,) * 4, (100.0,) * 4)
    assert timing._float_ns(piece, timing._Took(own=1.0), border) == 201.0
    assert timing._float_ns(piece, timing._Took(own=1.0, blocked=True), border) == 1.0
    assert timing._int_ns(piece, timing._Took(own=1.0, shape=(1, 2, 8, 8)), border) == 21.0
    assert timing._int_ns(piece, timing._Took(own=1.0, shape=(1, 8, 8, 2)), border) == 1.0


@pytest.mark.parametrize(
    ("times", "ns"),
    [((9000.0, 10_000.0, 90_000.0), 10_500.0), ((1000.0, 2000.0, 1000.0, 400_000.0), 4000 / 3 + 500), ((), 500.0)],
)  # fmt: skip
def test_a_typical_time(times: tuple[float, ...], ns: float) -> None:
    """The median, and near the profiler's tick the mean without the slowest; half a tick was cut off."""
    assert timing._typical(times) == pytest.approx(ns)


@pytest.mark.parametrize(
    ("rank", "each", "factor"),
    [(2, 10.0, 2.0), (4, 10.0, 2.5), (2, 0.1, 0.5), (2, 1000.0, 4.0), (2, 0.0, 0.5)],
)
def test_the_factor_on_borders(rank: int, each: float, factor: float) -> None:
    """Q and DQ are expected to take 10 ns together, 20 for images, which change their layout three times."""
    boundary = Boundary(0.0, 0.0, 0.0, 5.0 if rank == 2 else 10.0)
    target = dataclasses.replace(TARGET, boundary=boundary)
    shape = (1, 64, 7, 7) if rank == 4 else (64, 49)
    value = ir.Value(name="v")
    border = Border(*[(each,) * 4] * 4)
    assert border.factor(target, {"v": Fact(np.dtype(np.float32), shape)}, [value]) == factor


def test_no_borders_no_factor() -> None:
    assert Border().factor(TARGET, {}, [ir.Value(name="v")]) == 1.0


def test_borders_between_and_beyond_the_sizes() -> None:
    border = Border((100.0, 200.0, 300.0, 400.0))
    sizes = [64 * side * side for side in (7, 20, 56, 112)]
    assert border.ns(border.quantize, 1) == 100.0
    assert border.ns(border.quantize, sizes[1]) == 200.0
    assert border.ns(border.quantize, (sizes[1] + sizes[2]) // 2) == pytest.approx(250.0)
    assert border.ns(border.quantize, 3 * sizes[3]) == pytest.approx(1200.0)
    assert border.ns(border.reorder, 1) == 0.0


TIMED = Workshop.timed  # before the tests' own fixture replaces it


def test_a_compilation_plans_with_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = workbench(conv_net(), [{"x": image[None]} for image in samples()])
    request = TIMED(bench.shop, bench.request)
    assert {"/conv0/Conv", "/conv1/Conv", "/conv2/Conv"} <= request.measured.keys()
    assert all(min(pair) >= 0 for pair in request.measured.values())
    assert request.border > 0
    elsewhere = dataclasses.replace(bench.request)
    monkeypatch.setattr(type(bench.shop.target), "fits_here", lambda target: False)
    assert TIMED(bench.shop, elsewhere) is elsewhere  # another machine's costs are the target's
