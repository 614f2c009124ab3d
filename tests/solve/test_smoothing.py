from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import parse, random_feed

from qcompile.algo.smoothquant import Sample, dynamic_error
from qcompile.quant.scheme import Scheme
from qcompile.run.probe import probe
from qcompile.solve.smoothing import Fold, linear_groups, matrix, solve_smoothing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Array = NDArray[Any]

SIX = ", ".join(map(str, range(1, 7)))
W = f"float[6,2] w = {{{', '.join(map(str, range(1, 13)))}}}"
B = f"float[6] b = {{{SIX}}}"


def square(name: str, k: int = 6, n: int = 6) -> str:
    numbers = np.random.default_rng(k + n).integers(-9, 10, k * n)
    return f"float[{k},{n}] {name} = {{{', '.join(map(str, numbers))}}}"


def place(body: str, constants: str = "", head: str = "g (float[1,5,6] x) => (float[1,5,2] y)") -> Fold | None:  # fmt: skip
    """Where the scale of the tensor that `[p]` reads goes."""
    model = parse(f"{head} <{W}, {B}{constants and ', ' + constants}> {{ {body} }}")
    (group,), refused = linear_groups(model, probe(model, random_feed(model)), ["p"])
    assert refused == {}
    return group.place


def test_products_that_read_one_tensor_are_a_group() -> None:
    model = parse(f"""g (float[5,6] x) => (float[5,2] y) <{W}> {{
        r = Relu(x) [p] a = MatMul(r, w) [q] b = Gemm(r, w) [s] c = MatMul(x, w) d = Add(a, b) y = Add(c, d) }}""")
    groups, refused = linear_groups(model, {}, ["p", "q", "s"])
    assert {g.tensor: g.nodes for g in groups} == {"r": ("p", "q"), "x": ("s",)}
    assert refused == {}


def test_what_cannot_be_smoothed() -> None:
    model = parse(f"""g (float[5,6] x, bool c, float[6,2] d) => (float[5,2] y, float[5,2] z) <{W}> {{
        [relu] r = Relu(x) [dyn] z = MatMul(r, d)
        y = If(c) <then_branch = t () => (float[5,2] a) {{ [inner] a = MatMul(r, w) }},
                   else_branch = e () => (float[5,2] b) {{ b = MatMul(r, w) }}> }}""")
    groups, refused = linear_groups(model, {}, ["relu", "dyn", "inner", "nowhere"])
    assert groups == []
    assert refused == {
        "relu": "it is no product",
        "dyn": "its weight is no constant matrix",
        "inner": "it is in a body of If, Loop or Scan",
        "nowhere": "it is not in the graph",
    }


@pytest.mark.parametrize(
    ("body", "constants", "node"),
    [
        ("[n] t = LayerNormalization(x, b, b)", "", "n"),
        ("[n] t = SimplifiedLayerNormalization(x, b)", "", "n"),
        ("[n] t = Mul(b, x)", "", "n"),
        ("[m] u = Mul(x, b) [n] t = Add(u, b)", "", "n"),
        ("[n] t = MatMul(x, v)", square("v"), "n"),
        ("[m] u = MatMul(x, v) [n] t = Add(b, u)", square("v"), "n"),
        ("[n] u = MatMul(x, v) t = LeakyRelu(u)", square("v"), "n"),
        ("[n] u = MatMul(x, v) t = Mul(u, half)", f"{square('v')}, float half = {{0.5}}", "n"),
        ("[n] u = MatMul(x, v) t = Div(u, half)", f"{square('v')}, float half = {{0.5}}", "n"),
        ("g = Sigmoid(x) [n] u = MatMul(x, v) t = Mul(u, g)", square("v"), "n"),
        ("g = Sigmoid(x) [n] u = MatMul(x, v) s = Shape(u) t = Mul(u, g)", square("v"), "n"),
    ],
)  # fmt: skip
def test_places(body: str, constants: str, node: str) -> None:
    found = place(f"{body} [p] y = MatMul(t, w)", constants)
    assert found is not None
    assert found.node == node
    assert found.channels == tuple(range(6))


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("t = Relu(x)", ""),  # nothing before it
        ("u = MatMul(x, v) t = Sigmoid(u)", square("v")),  # not linear
        ("u = MatMul(x, v) t = Mul(u, u)", square("v")),  # the scale squared
        ("u = MatMul(x, v) g = Sigmoid(u) t = Mul(u, g)", square("v")),
        ("u = MatMul(x, v) t = Add(u, x)", square("v")),
        ("u = MatMul(x, v) t = Add(u, one)", f"{square('v')}, float one = {{1}}"),
        ("u = MatMul(x, v) t = Add(u, full)", f"{square('v')}, {square('full', 5, 6)}"),
        ("t = Mul(x, full)", square("full", 5, 6)),
        ("u = MatMul(x, v) r = Relu(u) t = Softmax(r)", square("v")),
        # a channel that is there twice
        (
            "u = MatMul(x, v) t = Gather<axis = -1>(u, twice)",
            f"{square('v')}, int64[6] twice = {{0, 0, 1, 2, 3, 4}}",
        ),
    ],
)
def test_a_mul_is_needed(body: str, constants: str) -> None:
    assert place(f"{body} [p] y = MatMul(t, w)", constants) is None


@pytest.mark.parametrize(
    "body",
    [
        "t = Mul(x, b) [p] u = MatMul(t, w) r = ReduceMean<axes = [-1]>(t) y = Add(u, r)",
        "t = Mul(x, b) [p] u = MatMul(t, w) [other] v = MatMul(t, w) y = Add(u, v)",  # float
        "u = Mul(x, b) t = Relu(u) [p] v = MatMul(t, w) r = ReduceMean<axes = [-1]>(u) y = Add(v, r)",
    ],
)
def test_other_readers(body: str) -> None:
    assert place(body) is None


def test_a_graph_output_keeps_its_values() -> None:
    head = "g (float[1,5,6] x) => (float[1,5,2] y, float[1,5,6] t)"
    assert place("t = Mul(x, b) [p] y = MatMul(t, w)", head=head) is None
    head = head.replace(" t)", " u)")
    assert place("u = Mul(x, b) t = Relu(u) [p] y = MatMul(t, w)", head=head) is None


HEADS = "int64[4] split = {0, 0, 2, 3}, int64[3] join = {0, 0, 6}"
TURN = "Transpose<perm = [0, 2, 1, 3]>"
KEYS = (
    f"q0 = Reshape(x, split) q = {TURN}(q0) k = Transpose<perm = [0, 2, 3, 1]>(q0) a = MatMul(q, k)"
)


def attention(values: str, after: str = f"o1 = {TURN}(o) t = Reshape(o1, join)") -> str:
    return f"{KEYS} {values} o = MatMul(a, v3) {after} [p] y = MatMul(t, w)"


def test_through_an_attention() -> None:
    values = f"v0 = MatMul(x, v) [n] v1 = Add(v0, b) v2 = Reshape(v1, split) v3 = {TURN}(v2)"
    found = place(attention(values), f"{square('v')}, {HEADS}")
    assert found is not None
    assert (found.node, found.channels) == ("n", tuple(range(6)))


def test_channels_in_another_order() -> None:
    values = f"[n] v1 = MatMul(x, v) v2 = Reshape(v1, split) v3 = {TURN}(v2)"
    after = "o1 = Transpose<perm = [0, 2, 3, 1]>(o) t = Reshape(o1, join)"
    found = place(attention(values, after), f"{square('v')}, {HEADS}")
    assert found is not None
    assert found.channels == (0, 3, 1, 4, 2, 5)


@pytest.mark.parametrize(
    "values",
    [
        # heads out of places: channels and places mix
        "v1 = MatMul(x, v) v3 = Reshape(v1, wrong)",
        # what it multiplies with, not what is multiplied
        f"v1 = MatMul(x, v) v2 = Reshape(v1, split) v4 = {TURN}(v2) v3 = Softmax(v4)",
        f"v1 = MatMul(x, v) r = Relu(v1) z = Reshape(r, split) v2 = Reshape(v1, split) v4 = {TURN}(v2) v5 = {TURN}(z) v3 = Sub(v4, v5)",
    ],
)
def test_channels_that_are_mixed(values: str) -> None:
    constants = f"{square('v')}, {HEADS}, int64[4] wrong = {{1, 2, 5, 3}}"
    assert place(attention(values), constants) is None


def test_places_of_unknown_shape() -> None:
    model = parse(f"""g (float[1,5,6] x) => (float[1,5,2] y) <{W}, {square("v")}, {HEADS}> {{
        {attention(f"v1 = MatMul(x, v) v2 = Reshape(v1, split) v3 = {TURN}(v2)")} }}""")
    (group,), _ = linear_groups(model, {}, ["p"])
    assert group.place is None


QKV = f"{square('v', 6, 18)}, {HEADS}, int64[5] three = {{0, 0, 3, 2, 3}}"
PICK = (
    "z = Reshape(m, three) zt = Transpose<perm = [2, 0, 3, 1, 4]>(z) {picks} kt = Transpose<perm = [0, 1, 3, 2]>(k) "
    f"a = MatMul(q, kt) o = MatMul(a, v3) o1 = {TURN}(o) t = Reshape(o1, join) [p] y = MatMul(t, w)"
)


def picks(values: str) -> str:
    return f"q = Gather(zt, zero) k = Gather(zt, one) v3 = Gather(zt, {values})"


NUMBERS = "int64 zero = {0}, int64 one = {1}, int64 two = {2}"


def test_the_values_of_a_fused_projection() -> None:
    body = "[n] m = MatMul(x, v) " + PICK.format(picks=picks("two"))
    found = place(body, f"{QKV}, {NUMBERS}")
    assert found is not None
    assert found.channels == tuple(range(12, 18))


def test_values_that_are_keys_as_well() -> None:
    body = "[n] m = MatMul(x, v) " + PICK.format(picks=picks("one"))
    assert place(body, f"{QKV}, {NUMBERS}") is None


@pytest.mark.parametrize(
    ("select", "found"),
    [
        ("c, t = Split<axis = -1>(m, sizes)", tuple(range(12, 18))),
        ("c = Slice(m, start, mid, last) t = Slice(m, mid, end, last)", tuple(range(12, 18))),
        ("c = Slice(m, start, end, last) t = Slice(m, mid, end, last)", None),  # overlap
        ("c = Slice(m, start, mid, last, two) t = Slice(m, mid, end, last)", None),  # strides
    ],
)
def test_parts_of_a_projection(select: str, found: tuple[int, ...] | None) -> None:
    constants = f"""{square("v", 6, 18)}, int64[2] sizes = {{12, 6}}, int64[1] start = {{0}}, int64[1] mid = {{12}},
        int64[1] end = {{18}}, int64[1] last = {{-1}}, int64[1] two = {{2}}"""
    body = f"[n] m = MatMul(x, v) {select} r = ReduceMean<axes = [-1]>(c) [p] u = MatMul(t, w) y = Add(u, r)"
    made = place(body, constants)
    assert (None if made is None else made.channels) == found


def with_weight(model: ir.Model, name: str, values: Array) -> None:
    model.graph.initializers[name].const_value = ir.tensor(values, name=name)
    model.graph.initializers[name].shape = ir.Shape(values.shape)


def network() -> ir.Model:
    """`x (1, N, 32)` -> gamma -> `q`, `k` -> product -> `o`."""
    model = parse("""g (float[1,N,32] x) => (float[1,N,24] y) <float[1] c = {0}, float[1] wq = {0}, float[1] wk = {0}, float[1] wo = {0}> {
        [gamma] h = Mul(x, c) [q] a = MatMul(h, wq) [k] b = MatMul(h, wk) m = Mul(a, b) [o] y = MatMul(m, wo) }""")  # fmt: skip
    rng = np.random.default_rng(3)
    with_weight(model, "c", (1.2 ** np.arange(32)).astype(np.float32))
    for name, shape in (("wq", (32, 16)), ("wk", (32, 16)), ("wo", (16, 24))):
        with_weight(model, name, rng.normal(size=shape).astype(np.float32))
    return model


def feeds(count: int, seed: int, rows: int = 20) -> list[Mapping[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(1, rows, 32)).astype(np.float32)} for _ in range(count)]


@pytest.mark.parametrize("saturating", [False, True])
def test_smoothings_are_those_of_the_inputs(saturating: bool) -> None:
    model, ours, theirs = network(), feeds(6, 0), feeds(3, 1)
    facts = probe(model, ours[0])
    found = solve_smoothing(model, facts, ["q", "k", "o"], ours, theirs, saturating=saturating)
    item = found["h"]
    assert set(found) <= {"h", "m"}
    assert (item.tensor, item.nodes, item.fold, item.rank) == ("h", ("q", "k"), "gamma", 3)
    joined = np.concatenate([matrix(model.graph[1]), matrix(model.graph[2])], axis=1)
    gamma = model.graph.initializers["c"].const_value.numpy()
    held = [Sample.of((feed["x"] * gamma)[0]) for feed in theirs]
    scheme = Scheme.parse("int8.axis1.sym.7bit" if saturating else "int8.axis1.sym")
    before, after = (dynamic_error(held, joined, scheme, s) for s in (None, item.scale))
    assert item.error_before == pytest.approx(before, rel=1e-3)
    assert item.error_after == pytest.approx(after, rel=1e-3)
    assert after < 0.5 * before


def test_memory_bounds_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ours, theirs = network(), feeds(4, 0), feeds(2, 1)
    facts = probe(model, ours[0])

    def solve() -> dict[str, list[float]]:
        found = solve_smoothing(model, facts, ["q", "k", "o"], ours, theirs, saturating=False)
        return {name: item.scale.tolist() for name, item in found.items()}

    whole = solve()
    monkeypatch.setattr("qcompile.solve.smoothing._MEMORY", 1)
    assert solve() == whole
    assert whole


def test_few_rows_of_long_samples() -> None:
    model, ours, theirs = network(), feeds(3, 0, 400), feeds(2, 1, 400)
    facts = probe(model, ours[0])
    some, all_ = (
        solve_smoothing(model, facts, ["q"], ours, theirs, saturating=False, rows=rows)["h"]
        for rows in (32, 400)
    )
    assert some.error_after == pytest.approx(all_.error_after, rel=0.3)
    assert some.error_after != all_.error_after
    # float readers are in the way
    assert some.fold == ""


def test_inputs_that_are_not_finite_are_left() -> None:
    model, ours = network(), feeds(3, 0)
    facts = probe(model, ours[0])
    ours[0]["x"][0, 0, 0] = np.inf  # type: ignore[index]
    with np.errstate(all="ignore"):
        found = solve_smoothing(model, facts, ["q", "k"], ours, feeds(2, 1), saturating=False)
    assert found == {}


def test_nothing_to_smooth() -> None:
    assert solve_smoothing(network(), {}, [], feeds(1, 0), feeds(1, 1), saturating=False) == {}
