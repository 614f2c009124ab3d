"""Which tensors are observed, and how much of each is asked for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from networks import from_text, made_model
from onnx import TensorProto, helper, numpy_helper
from rewrites import parse, random_feed
from workbench import costless, weight

from qcompile.calib.histogram import Histogram
from qcompile.calib.observe import Observed
from qcompile.calib.reading import Bad
from qcompile.calib.stats import TensorStats
from qcompile.calibrate import calibrate_model
from qcompile.graph import io
from qcompile.plan.candidates import Candidate
from qcompile.plan.make import Request, find_candidates, make_plan
from qcompile.plan.plan import Form
from qcompile.plan.tensors import Coding, coding
from qcompile.recipe import Recipe
from qcompile.run.probe import Fact, probe
from qcompile.solve.needs import everything, named, notes_on, source_of, unobserved, wanted
from qcompile.step import Need, Outcome, Pass

NONE = Coding({})
CONV = (
    "g (float[N,2,4,4] x) => (float[N,2,4,4] y) <float[2,2,3,3] k = {"
    + ", ".join(str(i % 5) for i in range(36))
    + "}, float[2,2,1,1] l = {1, 2, 3, 4}> "
    "{ [c] a = Conv<pads = [1, 1, 1, 1]>(x, k) [r] r = Relu(a) [d] y = Conv(r, l) }"
)
RENAMED = CONV.replace("[d] y = Conv(r, l)", "[i] i = Identity(r) [d] y = Conv(i, l)")
FOUR = "float[4,4] w = {" + ", ".join(str(i) for i in range(16)) + "}"


def coded(text: str) -> tuple[ir.Model, Coding, dict[str, Fact]]:
    """The graph as it is, everything in it integer that can be."""
    model = parse(text)
    facts = dict(probe(model, random_feed(model)))
    target = costless()
    found = find_candidates(model, target, facts)
    forms = {
        name: Form.FREE if item.role == "free" else Form.STATIC
        for name, item in found.items()
        if isinstance(item, Candidate) and item.role not in ("dynamic", "recurrent", "embedding")
    }
    plan = make_plan(model, target, facts, Request(forms=forms), found)
    return model, coding(model, plan, found), facts


def asked(text: str, *, gram: bool = False) -> dict[str, str]:
    """What `everything` asks of each tensor of a graph without codes, by the first letters."""
    model = parse(text)
    facts = probe(model, random_feed(model))
    found = everything(model, NONE, facts, gram=gram)
    assert all(need.tensor == name for name, need in found.items())
    return {name: letters(need) for name, need in found.items()}


def letters(need: Need) -> str:
    given = {"h": need.histogram, "c": need.channels, "g": need.gram}
    return "".join(letter for letter, asked in given.items() if asked)


def value(model: ir.Model, name: str) -> ir.Value:
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    return next(v for v in values if v.name == name)


# ---- the same numbers under another name


@pytest.mark.parametrize(
    "node",
    [
        "Reshape(r, s)", "Transpose<perm = [1, 0]>(r)", "Flatten(r)", "Identity(r)", "Squeeze(r, o)",
        "Unsqueeze(r, o)",
    ],
)  # fmt: skip
def test_what_only_renames(node: str) -> None:
    model = parse(
        f"g (float[1,4] x, int64[2] s) => (float[A,B] y) <int64[1] o = {{0}}> "
        f"{{ r = Relu(x) t = {node} y = Identity(t) }}"
    )
    assert source_of(value(model, "t")).name == "r"
    assert source_of(value(model, "y")).name == "r"
    assert source_of(value(model, "r")).name == "r"
    assert source_of(value(model, "x")).name == "x"


@pytest.mark.parametrize("node", ["Relu(r)", "Cast<to = 1>(r)", "MaxPool(r)", "Slice(r, s, s)"])
def test_what_does_more(node: str) -> None:
    model = parse(f"g (float[1,4] x, int64[2] s) => (float[A,B] t) {{ r = Relu(x) t = {node} }}")
    assert source_of(value(model, "t")).name == "t"


def test_constants_are_not_sources() -> None:
    """Of a weight that is moved about there is no observation: it is no tensor of the samples."""
    model = parse(
        f"g (float[4,4] x) => (float[4,4] y) <{FOUR}> {{ t = Transpose(w) y = MatMul(x, t) }}"
    )
    assert source_of(value(model, "t")).name == "t"


# ---- what a plan takes


def test_wanted_of_a_plan() -> None:
    model, tensors, _ = coded(CONV)
    assert {v.name for v in tensors.tensors} == {"x", "r", "y"}
    found = wanted(model, tensors, ["x", "r"], histogram=False)
    assert {name: letters(need) for name, need in found.items()} == {"x": "c", "r": "c", "y": ""}
    found = wanted(model, tensors, ["x"], histogram=True)
    assert {name: letters(need) for name, need in found.items()} == {"x": "hc", "r": "h", "y": "h"}


class Asking(Pass):
    name = "asking"

    def needs(self, model: ir.Model) -> list[Need]:
        return [Need("a", channels=True), Need("r", gram=True)]

    def apply(self, model: ir.Model) -> Outcome:
        return Outcome()


def test_passes_ask_as_well() -> None:
    model, tensors, facts = coded(CONV)
    found = wanted(model, tensors, [], [Asking()], histogram=True)
    shown = {name: letters(need) for name, need in found.items()}
    assert shown == {"x": "h", "r": "hg", "y": "h", "a": "c"}
    more = everything(model, tensors, facts, [Asking()], gram=False)
    assert letters(more["a"]) == "c"
    assert letters(more["r"]) == "hcg"


def test_renamed_tensors_are_observed_once() -> None:
    model, tensors, facts = coded(RENAMED)
    for found in (wanted(model, tensors, [], histogram=True), everything(model, tensors, facts, gram=False)):  # fmt: skip
        assert letters(found["r"]).startswith("h")
        assert "h" not in letters(found.get("i", Need("i")))


# ---- all that may be asked for later


def test_everything_holds_what_any_plan_wants() -> None:
    model, tensors, facts = coded(CONV)
    found = everything(model, tensors, facts, gram=False)
    assert {name: letters(need) for name, need in found.items()} == dict.fromkeys("xry", "hc")
    for name, need in wanted(model, tensors, ["x", "r"], histogram=True).items():
        assert found[name] == found[name] | need


def test_inputs_of_what_weighs() -> None:
    assert asked(CONV) == {"x": "hc", "r": "hc"}
    text = f"g (float[N,4] x) => (float[N,4] y) <{FOUR}> {{ r = Relu(x) y = MatMul(r, w) z = Tanh(y) }}"
    assert asked(text) == {"r": "hc"}
    both = "g (float[N,4] x, float[4,N] z) => (float[N,N] y) { y = MatMul(x, z) }"
    assert asked(both) == {"x": "hc", "z": "hc"}
    nothing = "g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }"
    assert asked(nothing) == {}


def test_a_renamed_input_gives_channels_and_its_source_the_histogram() -> None:
    text = f"g (float[N,2,2] x) => (float[N,4] y) <{FOUR}> {{ f = Flatten(x) y = MatMul(f, w) }}"
    assert asked(text) == {"x": "h", "f": "c"}
    assert asked(text, gram=True) == {"x": "h", "f": "cg"}


def test_numbers_that_are_no_floats() -> None:
    text = "g (int32[N,4] x, int32[4,4] w) => (int32[N,4] y) { y = MatMul(x, w) }"
    assert asked(text, gram=True) == {}


@pytest.mark.parametrize(
    ("nodes", "gram"),
    [
        ("y = MatMul(x, w)", True), ("y = Gemm(x, w)", True), ("y = Gemm<transB = 1>(x, w)", True),
        ("y = Gemm<transA = 1>(x, w)", False), ("y = MatMul(w, x)", False), ("y = MatMul(x, x)", False),
        ('y = Einsum<equation = "ij,jk->ik">(x, w)', False),
    ],
)  # fmt: skip
def test_where_there_are_rows(nodes: str, gram: bool) -> None:
    text = f"g (float[4,4] x) => (float[4,4] y) <{FOUR}> {{ {nodes} }}"
    assert "g" not in asked(text)["x"]
    assert ("g" in asked(text, gram=True)["x"]) == gram


@pytest.mark.parametrize(
    ("shape", "group", "gram"),
    [((3, 4, 1, 1), 1, True), ((3, 4, 3, 3), 1, False), ((3, 4, 1, 3), 1, False), ((4, 2, 1, 1), 2, False)],
)  # fmt: skip
def test_rows_of_convolutions(shape: tuple[int, ...], group: int, gram: bool) -> None:
    kernel = numpy_helper.from_array(weight(*shape), "k")
    node = helper.make_node("Conv", ["x", "k"], ["y"], "conv", group=group)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", None, None, None]) for n in "xy"]  # fmt: skip
    ends[0].type.tensor_type.shape.dim[1].dim_value = 4
    model = io.load(made_model(helper.make_graph([node], "g", ends[:1], ends[1:], [kernel])))
    facts = probe(model, random_feed(model, given={"x": weight(1, 4, 5, 5)}))
    needs = everything(model, NONE, facts, gram=True)
    assert letters(needs["x"]) == ("hcg" if gram else "hc")
    told = unobserved(model, needs)
    # without any X'X nothing is missing
    assert told == {}
    other = {"x": Need("x"), "z": Need("z", gram=True)}
    assert list(unobserved(model, other)) == ([] if gram else ["conv"])


def test_the_rows_that_are_gathered() -> None:
    """X'X of all rows that a weight is multiplied with, as NumPy has it."""
    model = from_text(
        "g (float[N,4,5,6] x, float[N,3,8] z) => (float[N,8,5,6] y, float[A,8] o) "
        "{ r = Relu(x) y = Conv(r, k) q = MatMul(z, w) f = Reshape(q, s) o = Gemm(f, w, b) }",
        k=weight(8, 4, 1, 1), w=weight(8, 8), b=weight(8), s=np.array([-1, 8]),
    )  # fmt: skip
    feeds = [
        {"x": weight(1, 4, 5, 6, seed=i, scale=5), "z": weight(1 + i % 2, 3, 8, seed=i, scale=5)}
        for i in range(7)
    ]
    recipe = Recipe(threads=1)
    found = calibrate_model(model, feeds, held_out=0, gram=True, recipe=recipe).statistics
    x = np.concatenate([f["x"].transpose(0, 2, 3, 1).reshape(-1, 4) for f in feeds]).clip(0)
    z = np.concatenate([f["z"].reshape(-1, 8) for f in feeds])
    for name, rows in {"r": x, "z": z, "f": z @ weight(8, 8)}.items():
        stats = found.tensors[name]
        assert stats.gram is not None and stats.gram.dtype == np.float64
        assert stats.rows == len(rows)
        wanted = rows.astype(np.float64).T @ rows
        np.testing.assert_allclose(stats.gram, wanted, rtol=1e-4, atol=1e-4)
    assert found.unobserved == {}
    plain = calibrate_model(model, feeds, held_out=0, recipe=recipe).statistics
    assert all(stats.gram is None for stats in plain.tensors.values())


# ---- what cannot be observed


def test_bodies() -> None:
    body = parse(f"g (float[N,4] x) => (float[N,4] t) <{FOUR}> {{ t = MatMul(x, w) }}")
    model = parse("g (bool c, float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    node = body.graph[0]
    node.name = "inner"
    body.graph.inputs.clear()
    node.replace_input_with(0, model.graph.inputs[1])
    attribute = ir.AttrGraph("then_branch", body.graph)
    model.graph.append(ir.node("If", [model.graph.inputs[0]], {"then_branch": attribute}))
    found = unobserved(model, {})
    assert found == {
        "inner": "MatMul in a body of If, Loop or Scan: only the main graph is observed"
    }


# ---- by the names of a plan


def test_renamed_tensors_have_the_statistics_of_their_source() -> None:
    _, tensors, _ = coded(RENAMED)
    known = {name: TensorStats(count=i) for i, name in enumerate("xry", 1)}
    found, lacking = named(tensors, known)
    assert found["i"] is known["r"]
    assert not lacking
    assert list(known) == ["x", "r", "y"]


def test_a_renamed_tensor_has_a_histogram_wherever_it_was_gathered() -> None:
    """`everything` asks it of the source, and channels of the renamed tensor: methods need both."""
    _, tensors, _ = coded(RENAMED)
    known = {name: TensorStats(count=9, histogram=Histogram(9)) for name in "xry"}
    own = TensorStats(count=9, low=-1)
    found, _ = named(tensors, known | {"i": own})
    assert found["i"].low == -1
    assert found["i"].histogram is known["r"].histogram


def test_statistics_that_lack_a_tensor() -> None:
    _, tensors, _ = coded(CONV)
    known = {"x": TensorStats(), "y": TensorStats()}
    found, lacking = named(tensors, known)
    assert (list(found), lacking) == (["x", "y"], {"r"})


# ---- notes


def test_notes() -> None:
    assert notes_on(Observed({}, 5, 1), 1 << 28) == ()
    (note,) = notes_on(Observed({}, 5, 3), 64 << 20)
    assert note == (
        "The data was read 3 times, to observe no more than 64 MB at once (--memory allows more)."
    )
    bad = tuple(Bad(i, "t", (0, i), float("nan")) for i in range(5))
    (note,) = notes_on(Observed({}, 5, 1, bad[:2]), 1)
    assert note == (
        "2 bad samples were left out: tensor 't' is NaN at index [0, 0] for sample 0 of the calibration data; "
        "tensor 't' is NaN at index [0, 1] for sample 1 of the calibration data."
    )
    (note,) = notes_on(Observed({}, 5, 1, bad), 1)
    assert note.startswith("5 bad samples were left out: ")
    assert note.endswith("for sample 2 of the calibration data; and 2 more.")


def test_one_bad_sample_and_little_memory_read_well() -> None:
    bad = Bad(3, "t", (), float("inf"))
    two = notes_on(Observed({}, 5, 2, (bad,)), 20_000)
    assert "0 MB" not in two[0]
    assert two[1] == (
        "1 bad sample was left out: tensor 't' is infinite for sample 3 of the calibration data."
    )
