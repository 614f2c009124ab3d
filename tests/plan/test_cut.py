"""The plan against an enumeration of all assignments, on random graphs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import from_text
from rewrites import parse

from qcompile.graph import io
from qcompile.plan.candidates import Candidate
from qcompile.plan.cost import plan_cost
from qcompile.plan.make import Request, border_costs, find_candidates, make_plan, node_costs
from qcompile.plan.plan import Form, Plan
from qcompile.run.probe import Fact
from qcompile.targets.schema import Boundary, Target, load_target

STATIC = ("conv", "binary", "unary", "pool", "concat", "same", "free")
SHIPPED = load_target("ort-cpu-x64-vnni")
# Costs in whole tens of nanoseconds, so that the network's integers are exact.
EXACT = dataclasses.replace(SHIPPED, boundary=Boundary(10, 20, 10, 100))
BEHIND = ("Conv", "Add", "Concat", "MaxPool")  # what may stand before an integer MaxPool


@dataclasses.dataclass(frozen=True)
class Graph:
    """A model of 4-D tensors, its facts, and its candidates."""

    text: str
    model: ir.Model
    facts: Mapping[str, Fact]
    found: Mapping[str, Candidate | str]

    def __repr__(self) -> str:
        return self.text

    @property
    def static(self) -> dict[str, Candidate]:
        """Candidates that decide for themselves: not those that another one absorbs."""
        items = {
            n: c for n, c in self.found.items() if isinstance(c, Candidate) and c.role in STATIC
        }
        absorbed = {node.name for item in items.values() for node in item.absorbed}
        return {name: item for name, item in items.items() if name not in absorbed}


OPS = (
    "Conv", "ConvRelu", "Relu", "Sigmoid", "Neg", "Mul", "Plus", "MaxPool", "Add", "Concat", "Transpose", "Split",
)  # fmt: skip


@st.composite
def random_graphs(draw: st.DrawFn, most: int = 9, side: int = 4) -> Graph:
    """Operators in a row, each reading any values before it."""
    channels = {"x": 4}
    lines, weights, read = [], {}, set()
    hidden: dict[str, int] = {}  # values that one node alone reads
    for i in range(draw(st.integers(2, most))):
        op = draw(st.sampled_from(OPS))
        a = draw(st.sampled_from(sorted(channels)))
        c = channels[a]
        v = f"v{i}"
        made = {v: c}
        if op in ("Conv", "ConvRelu"):
            made = {v: draw(st.sampled_from([2, 4]))}
            w = f"w{c}x{made[v]}"
            weights[w] = f"float[{made[v]},{c},1,1] {w} = {{{', '.join(['1'] * made[v] * c)}}}"
            line = f"{v} = Conv({a}, {w})"
            if op == "ConvRelu":
                hidden[f"t{i}"] = made[v]
                line = f"t{i} = Conv({a}, {w}) [r{i}] {v} = Relu(t{i})"
        elif op == "Add":
            b = draw(st.sampled_from([n for n, size in sorted(channels.items()) if size == c]))
            read.add(b)
            line = f"{v} = Add({a}, {b})"
        elif op == "Concat":
            b = draw(st.sampled_from(sorted(channels)))
            read.add(b)
            made = {v: c + channels[b]}
            line = f"{v} = Concat<axis = 1>({a}, {b})"
        elif op == "Split" and c % 2 == 0:
            made = {v: c // 2, f"{v}b": c // 2}
            line = f"{v}, {v}b = Split<axis = 1>({a})"
        else:
            form = {
                "Mul": f"Mul({a}, two)", "Plus": f"Add({a}, two)",
                "MaxPool": f"MaxPool<kernel_shape = [1, 1]>({a})", "Transpose": f"Transpose<perm = [0, 1, 3, 2]>({a})",
            }  # fmt: skip
            plain = "Neg" if op == "Split" else op
            line = f"{v} = {form.get(op, f'{plain}({a})')}"
        lines.append(f"[n{i}] {line}")
        read.add(a)
        channels |= made
    extra = draw(st.sets(st.sampled_from(sorted(channels)), max_size=2))
    outputs = [n for n in channels if n != "x" and (n not in read or n in extra)]
    shown = ", ".join(f"float[1,{channels[n]},H,W] {n}" for n in outputs)
    constants = ", ".join([*weights.values(), "float two = {2}"])
    text = f"g (float[1,4,H,W] x) => ({shown}) <{constants}> {{ {' '.join(lines)} }}"
    return graph(text, {n: (1, c, side, side) for n, c in (channels | hidden).items()})


def graph(text: str, shapes: Mapping[str, tuple[int, ...]], target: Target = EXACT) -> Graph:
    model = parse(text, opset=13)
    facts = {name: Fact(np.dtype(np.float32), shape) for name, shape in shapes.items()}
    return Graph(text, model, facts, find_candidates(model, target, facts))


def allowed(made: Graph, integer: set[str], request: Request) -> bool:
    """Whether an assignment keeps to the rules, costs apart."""
    makers = {item.result: name for name, item in made.static.items()}
    for name, item in made.static.items():
        forced = request.forms.get(name) in (Form.STATIC, Form.FREE)
        barred = name in request.keep_float or request.forms.get(name) is Form.FLOAT
        barred |= request.only is not None and name not in request.only
        if (forced and name not in integer) or (barred and name in integer):
            return False
        if item.node.op_type == "MaxPool" and name in integer:
            maker = makers.get(item.data[0])
            if maker not in integer or made.static[maker].node.op_type not in BEHIND:
                return False
    return True


def total(made: Graph, integer: set[str], request: Request, target: Target) -> float:
    """Nanoseconds of an assignment, in words: kernels, borders, noise."""
    ns = 0.0
    chosen = {name: made.static[name] for name in integer}
    for name, item in made.static.items():
        as_float, as_int = node_costs(item, made.facts)
        as_float, as_int = request.measured.get(name, (as_float * request.gain, as_int))
        ns += as_int if name in integer else as_float
    by_codes = {v for item in chosen.values() for v in (item.result, *item.node.outputs[1:])}
    as_codes = {v for item in chosen.values() for v in item.data}
    gone = {node.name for item in chosen.values() for node in item.absorbed}
    values = [*made.model.graph.inputs, *(v for node in made.model.graph for v in node.outputs)]
    for value in values:
        to_codes, to_float = (request.border * c for c in border_costs(value, target, made.facts))
        readers = [use.node for use in value.uses() if use.node.name not in gone]
        as_float = value.is_graph_output() or any(
            node.name not in integer or value not in chosen[node.name or ""].data
            for node in readers
        )
        ns += to_codes if value in as_codes and value not in by_codes else 0.0
        ns += to_float if value in by_codes and as_float else 0.0
    handed_on = {
        v for item in chosen.values() if item.role in ("same", "free") for v in item.node.outputs
    }
    rounded = (by_codes | as_codes) - handed_on
    return ns + request.price * sum(request.noise.get(v.name or "", 0.0) for v in rounded)


def subsets(names: list[str]) -> Iterator[set[str]]:
    for flags in itertools.product((False, True), repeat=len(names)):
        yield {name for name, flag in zip(names, flags, strict=True) if flag}


def planned(plan: Plan) -> set[str]:
    return {entry.node for entry in plan.of(Form.STATIC, Form.FREE)}


def assert_least(made: Graph, request: Request, target: Target, slack: float = 0.0) -> Plan:
    """The plan keeps to the rules and no assignment costs less."""
    plan = make_plan(made.model, target, made.facts, request, made.found)
    ours = planned(plan)
    assert allowed(made, ours, request)
    least = min(
        total(made, names, request, target)
        for names in subsets(sorted(made.static))
        if allowed(made, names, request)
    )
    assert total(made, ours, request, target) <= least + slack
    return plan


tens = st.integers(0, 60).map(lambda n: 10.0 * n)


@st.composite
def requests(draw: st.DrawFn, made: Graph) -> Request:
    """Measured costs, a few nodes fixed, noise on the tensors of the plan with everything integer."""
    names = sorted(made.static)
    pools = [n for n in names if made.static[n].node.op_type == "MaxPool"]
    tensors = ["x", *(v.name or "" for node in made.model.graph for v in node.outputs)]
    some: Any = st.sets(st.sampled_from(names), max_size=2) if names else st.just(set())
    fixed = draw(some) - set(pools)
    kept = draw(some) - fixed
    only = draw(st.none() | st.sets(st.sampled_from(names)) if names else st.none())
    return Request(
        measured={n: (draw(tens), draw(tens)) for n in names},
        forms={n: Form.FREE if made.static[n].role == "free" else Form.STATIC for n in fixed if only is None}
        | {n: Form.FLOAT for n in kept if draw(st.booleans())},
        keep_float=dict.fromkeys(kept, "so"), only=only, border=draw(st.sampled_from([1.0, 2.0])),
        price=draw(st.sampled_from([0.0, 10.0])), noise={name: draw(st.integers(0, 40)) for name in tensors},
    )  # fmt: skip


@settings(max_examples=60)
@given(made=random_graphs(), data=st.data())
def test_no_assignment_costs_less(made: Graph, data: st.DataObject) -> None:
    assert_least(made, data.draw(requests(made)), EXACT)


@settings(max_examples=60)
@given(made=random_graphs(), data=st.data())
def test_the_cost_of_a_plan_is_that_of_its_assignment(made: Graph, data: st.DataObject) -> None:
    request = data.draw(requests(made))
    plan = make_plan(made.model, EXACT, made.facts, request, made.found)
    bare = dataclasses.replace(request, price=0.0)
    cost = plan_cost(plan, made.found, EXACT, made.facts, request)
    assert round(cost - total(made, planned(plan), bare, EXACT), 6) == 0


@settings(max_examples=60)
@given(made=random_graphs(most=7), data=st.data(), most=st.integers(0, 120))
def test_no_assignment_within_the_noise_costs_less(
    made: Graph, data: st.DataObject, most: int
) -> None:
    """Noise is a whole number here, and the limit lies between two."""
    drawn = data.draw(requests(made))
    request = dataclasses.replace(drawn, price=0.0, most_noise=most + 0.5, forms={})
    plan = make_plan(made.model, EXACT, made.facts, request, made.found)
    ours = planned(plan)
    assert allowed(made, ours, request)
    priced = dataclasses.replace(request, price=1.0)

    def figures(names: set[str]) -> tuple[float, float]:
        ns = total(made, names, request, EXACT)
        return ns, total(made, names, priced, EXACT) - ns

    every = [
        figures(names) for names in subsets(sorted(made.static)) if allowed(made, names, request)
    ]
    ns, noise = figures(ours)
    assert noise < request.most_noise
    assert ns <= min(n for n, z in every if z < request.most_noise) * 1.002 + 1e-3


@settings(max_examples=25)
@given(made=random_graphs(most=8, side=56), gain=st.sampled_from([0.5, 1.0, 2.0]))
def test_no_assignment_costs_less_on_a_shipped_target(made: Graph, gain: float) -> None:
    """Its costs are rounded to 10 ns, each of them."""
    assert_least(made, Request(gain=gain), SHIPPED, slack=10.0 * 6 * len(made.static))


@settings(max_examples=40)
@given(made=random_graphs(), data=st.data())
def test_every_node_has_a_form_that_fits(made: Graph, data: st.DataObject) -> None:
    """Absorbed nodes follow the node that absorbs them; the plan has each node once, in graph order."""
    request = data.draw(requests(made))
    plan = make_plan(made.model, EXACT, made.facts, request, made.found)
    assert [entry.node for entry in plan.nodes] == [node.name for node in made.model.graph]
    assert all(entry.why for entry in plan.nodes)
    by_absorbed = {node.name: name for name, item in made.static.items() for node in item.absorbed}
    for entry in plan.nodes:
        if entry.form is Form.ABSORBED:
            assert plan[by_absorbed[entry.node]].form is Form.STATIC
        if entry.form is Form.STATIC:
            item = made.static[entry.node]
            assert [plan[n.name or ""].form for n in item.absorbed] == [Form.ABSORBED] * len(
                item.absorbed
            )
            assert bool(entry.weight) == (item.role == "conv")
        if entry.node in request.keep_float:
            assert (entry.form, entry.why) == (Form.FLOAT, "so")


# ---- by hand

ROW = "g (float[1,4,H,W] x) => (float[1,4,H,W] y) <float[4,4,1,1] w = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, float two = {2}>"
FOUR = (1, 4, 4, 4)  # 64 elements: 1380 ns to codes, 2020 back, in rank 4, on EXACT


def row(nodes: str) -> Graph:
    return graph(f"{ROW} {{ {nodes} }}", dict.fromkeys("xabcdefy", FOUR))


def forms(made: Graph, request: Request) -> str:
    """The first letter of each form: s, f(ree), -, a."""
    plan = make_plan(made.model, EXACT, made.facts, request, made.found)
    letters = {
        Form.FLOAT: "-",
        Form.STATIC: "s",
        Form.FREE: "f",
        Form.ABSORBED: "a",
        Form.DYNAMIC: "d",
        Form.WEIGHT: "w",
    }
    return "".join(letters[entry.form] for entry in plan.nodes)


def test_border_costs() -> None:
    made = row("[n] y = Conv(x, w)")
    x = made.model.graph.inputs[0]
    assert border_costs(x, EXACT, made.facts) == (100 + 64 * 20, 100 + 64 * 30)
    flat = {"x": Fact(np.dtype(np.float32), (8, 8))}
    assert border_costs(x, EXACT, flat) == (100 + 64 * 10, 100 + 64 * 20)
    assert border_costs(x, EXACT, {}) == (100, 100)


def test_an_island_must_pay_for_its_borders() -> None:
    made = row("[n] y = Conv(x, w)")
    borders = 1380 + 2020
    assert forms(made, Request(measured={"n": (borders + 20, 10)})) == "s"
    assert forms(made, Request(measured={"n": (borders, 10)})) == "-"
    assert forms(made, Request(measured={"n": (borders + 20, 10)}, border=2.0)) == "-"


def test_a_chain_pays_together() -> None:
    made = row("[m] a = Conv(x, w) [n] y = Conv(a, w)")
    assert forms(made, Request(measured={"m": (2000, 0), "n": (2000, 0)})) == "ss"
    assert forms(made, Request(measured={"m": (1600, 0), "n": (1600, 0)})) == "--"


def test_codes_are_made_once_for_all_readers() -> None:
    made = graph(
        f"{ROW.replace('=> (float[1,4,H,W] y)', '=> (float[1,4,H,W] a, float[1,4,H,W] b, float[1,4,H,W] y)')} "
        "{ [l] a = Conv(x, w) [m] b = Conv(x, w) [n] y = Conv(x, w) }",
        dict.fromkeys("xaby", FOUR),
    )  # fmt: skip
    each = 2020 + 1380 / 3
    assert forms(made, Request(measured=dict.fromkeys("lmn", (each + 10, 0)))) == "sss"
    assert forms(made, Request(measured=dict.fromkeys("lmn", (each - 10, 0)))) == "---"


def test_floats_are_made_once_for_all_readers() -> None:
    made = row(
        "[m] a = Conv(x, w) [b] b = Neg(a) [c] c = Neg(a) [d] d = Sub(b, c) [e] y = Sub(d, a)"
    )
    assert forms(made, Request(measured={"m": (1380 + 2020 + 10, 0)})) == "s----"


def test_a_free_node_carries_codes_through() -> None:
    made = row("[m] a = Conv(x, w) [f] b = Mul(a, two) [n] y = Conv(b, w)")
    assert forms(made, Request(measured={"m": (1800, 0), "n": (1800, 0), "f": (0, 0)})) == "sfs"
    assert (
        forms(made, Request(measured={"m": (1800, 0), "n": (1800, 0)}, keep_float={"f": "so"}))
        == "---"
    )


def test_max_pool_only_behind_what_runs_channels_last() -> None:
    cheap = {"m": (9000, 0), "p": (9000, 0), "n": (9000, 0)}
    pool = "MaxPool<kernel_shape = [1, 1]>"
    assert (
        forms(
            row(f"[m] a = Conv(x, w) [p] b = {pool}(a) [n] y = Conv(b, w)"), Request(measured=cheap)
        )
        == "sss"
    )
    assert (
        forms(row(f"[m] a = Neg(x) [p] b = {pool}(a) [n] y = Conv(b, w)"), Request(measured=cheap))
        == "--s"
    )
    assert (
        forms(
            row(f"[m] a = Sigmoid(x) [p] b = {pool}(a) [n] y = Conv(b, w)"), Request(measured=cheap)
        )
        == "s-s"
    )
    behind_float = Request(measured=cheap, keep_float={"m": "so"})
    assert (
        forms(row(f"[m] a = Conv(x, w) [p] b = {pool}(a) [n] y = Conv(b, w)"), behind_float)
        == "--s"
    )


def test_max_pool_behind_what_is_dearer_as_integer() -> None:
    """It would gain, but not by as much as it would lose in front of it."""
    pool = "MaxPool<kernel_shape = [1, 1]>"
    made = row(f"[m] a = Conv(x, w) [p] b = {pool}(a) [n] y = Conv(b, w)")
    costs = {"p": (9000, 0), "n": (9000, 0)}
    assert forms(made, Request(measured={**costs, "m": (0, 90_000)})) == "--s"
    assert forms(made, Request(measured={**costs, "m": (0, 8000)})) == "sss"


def test_gain_is_for_costs_that_were_not_measured() -> None:
    made = row("[m] a = Sigmoid(x) [n] y = Sigmoid(a)")
    assert forms(made, Request(gain=1e4)) == "ss"
    assert forms(made, Request(gain=1e4, measured={"m": (100, 0), "n": (100, 0)})) == "--"


def test_noise_of_what_saturation_absorbs() -> None:
    """That of the tensor behind it: the one before it is never rounded."""
    made = row("[m] a = Conv(x, w) [r] y = Relu(a)")
    gain = {"m": (9000, 0)}
    assert forms(made, Request(measured=gain, price=1.0, noise={"a": 1e9})) == "sa"
    assert forms(made, Request(measured=gain, price=1.0, noise={"y": 1e9})) == "--"


def test_noise_of_rounded_weights() -> None:
    """That of a node, beside that of its tensor; it counts whether it has a price or a limit."""
    made = row("[m] a = Conv(x, w) [r] y = Relu(a)")
    request = Request(measured={"m": (9000, 0)}, noise={"y": 1.0}, weights={"m": 2.0})
    assert forms(made, dataclasses.replace(request, price=1e4)) == "--"
    assert forms(made, dataclasses.replace(request, price=1e3)) == "sa"
    assert forms(made, dataclasses.replace(request, most_noise=2.9)) == "--"
    assert forms(made, dataclasses.replace(request, most_noise=3.1)) == "sa"
    assert (
        forms(made, dataclasses.replace(request, most_noise=2.9, forms={"m": Form.STATIC})) == "sa"
    )


def test_products_share_the_limit_of_noise() -> None:
    """They have no borders; those that save most for their noise are taken."""
    shape = (32, 64)
    text = (
        "g (float[32,64] x) => (float[32,64] y) "
        "{ [m] a = MatMul(x, w) [s] b = Softmax(a) [n] y = MatMul(b, v) }"
    )
    weights = {name: np.ones((64, 64), np.float32) for name in "wv"}
    model = io.load(from_text(text, opset=13, **weights))
    facts = {name: Fact(np.dtype(np.float32), shape) for name in "xaby"}
    made = Graph(text, model, facts, find_candidates(model, EXACT, facts))
    request = Request(
        measured={"m": (9000, 1000), "n": (5000, 1000)},
        noise={"m": 3.0, "n": 2.0},
        weights={"n": 1.0},
    )
    for most, expected in ((2.9, "---"), (3.1, "d--"), (5.9, "d--"), (6.1, "d-d")):
        assert forms(made, dataclasses.replace(request, most_noise=most)) == expected
    assert forms(made, request) == "d-d"
    assert forms(made, dataclasses.replace(request, most_noise=9.0, dynamic=False)) == "---"


def test_noise_is_paid_where_codes_are_made() -> None:
    """By the node that makes them, or by a QuantizeLinear; once, however many read them or hand them on."""
    made = row("[m] a = Conv(x, w) [f] b = Mul(a, two) [n] y = Conv(b, w)")
    gain = {"m": (9000, 0), "f": (0, 0), "n": (9000, 0)}
    # the whole chain gains 18000 - 1380 - 2020, one Conv alone 9000 - 1380 - 2020
    for noise in ({"a": 8990.0}, {"x": 8990.0}, {"y": 8990.0}, {"x": 4500.0, "a": 4490.0}):
        assert forms(made, Request(measured=gain, price=1.0, noise=noise)) == "sfs"
        tenth = {name: value / 10 for name, value in noise.items()}
        assert forms(made, Request(measured=gain, price=10.0, noise=tenth)) == "sfs"
    assert forms(made, Request(measured=gain, price=1.0, noise={"b": 1e9})) == "sfs"
    assert forms(made, Request(measured=gain, noise={"a": 1e9})) == "sfs"  # no price
    assert forms(made, Request(measured=gain, price=1.0, noise={"y": 9010})) == "s--"
    assert forms(made, Request(measured=gain, price=1.0, noise={"x": 1e6, "a": 100})) == "--s"
    assert (
        forms(made, Request(measured=gain, price=1.0, noise=dict.fromkeys("xaby", 5000))) == "---"
    )


def test_what_hands_codes_on_need_not_share_their_noise() -> None:
    """Behind a float node that moves or scales values, they are rounded anew."""
    made = row("[m] a = Conv(x, w) [f] b = Mul(a, two) [n] y = Conv(b, w)")
    gain = {"m": (9000, 0), "f": (0, 0), "n": (9000, 0)}
    assert forms(made, Request(measured=gain, price=1.0, noise={"a": 1e6})) == "--s"
    assert forms(made, Request(measured=gain, price=1.0, noise={"a": 1e6, "b": 1e6})) == "---"


def test_the_best_of_two_ways_to_cut() -> None:
    """A node in the middle that is dearer as integer still costs less than two borders."""
    made = row("[m] a = Conv(x, w) [s] b = Sigmoid(a) [n] y = Conv(b, w)")
    convs = {"m": (90000, 0), "n": (90000, 0)}
    assert forms(made, Request(measured={**convs, "s": (0, 3390)})) == "sss"
    assert forms(made, Request(measured={**convs, "s": (0, 3410)})) == "s-s"
