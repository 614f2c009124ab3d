"""Scales of inputs that are found with the codes, and taken from the constants before."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from language_models import language, texts
from networks import from_text
from workbench import weight

from passes.lower_nbits import LowerNbits
from passes.smooth_linear import MARK
from qcompile import compile_model
from qcompile.errors import PassError
from qcompile.fewbits import sequential
from qcompile.fewbits.assign import Assignment, assign
from qcompile.fewbits.fold import fold_scales
from qcompile.fewbits.sequential import Found, solve_in_order
from qcompile.recipe import BUILT_IN
from qcompile.run.probe import probe
from qcompile.run.session import Options, Session
from qcompile.solve.smoothing import Smoothing
from qcompile.step import run_pass

INT4 = dataclasses.replace(BUILT_IN["int4"], threads=1)
FEEDS = texts(16)


def graph_of(model: onnx.ModelProto) -> ir.Model:
    return ir.serde.deserialize_model(model)


def solved(
    graph: ir.Model, feeds: list[dict[str, Any]] = FEEDS, **changes: Any
) -> tuple[Assignment, Found, dict[str, Smoothing]]:
    recipe = dataclasses.replace(INT4, **changes)
    chosen = assign(graph, recipe, graph)
    cut = len(feeds) * 3 // 4
    facts = probe(graph, feeds[0])
    found, scales = solve_in_order(graph, chosen.chosen, feeds[:cut], feeds[cut:], facts, recipe)
    return chosen, found, scales


def outputs(model: ir.Model, feed: dict[str, Any]) -> np.ndarray:
    made: np.ndarray = Session(model, Options("off", threads=1)).run(feed)[0]
    return made


def with_codes(graph: ir.Model, found: Found) -> ir.Model:
    run_pass(LowerNbits({name: made for name, (made, _) in found.items()}, accuracy_level=0), graph)
    return graph


def effective(
    model: onnx.ModelProto, names: dict[str, str], found: Found, scales: dict[str, Smoothing]
) -> ir.Model:
    """The float model with the weights, (K, N), that codes and scales stand for; nothing else is changed."""
    by_node = {node: one.scale for one in scales.values() for node in one.nodes}
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for stored in made.graph.initializer:
        if stored.name in names:
            node = names[stored.name]
            W = found[node][0].dequantize() / by_node.get(node, np.float32(1))
            value = W if stored.name == "table" else np.ascontiguousarray(W.T)
            stored.CopyFrom(onnx.numpy_helper.from_array(value, stored.name))
    return graph_of(made)


WEIGHTS = {"u0": "up0", "d0": "down0", "u1": "up1", "d1": "down1", "table": "head"}


def test_the_model_computes_what_codes_and_scales_stand_for() -> None:
    model = uneven()
    _, found, scales = solved(graph_of(model))
    folds = {tensor: one.place.node for tensor, one in scales.items() if one.place}
    # scales of `up` go into normalizations, of `down` past the Relu into the rows of `up`; the head keeps 8 bits
    assert {"r0": "up0", "r1": "up1"}.items() <= folds.items()
    assert set(folds) <= {"n0", "r0", "n1", "r1"}
    graph = graph_of(model)
    folded = fold_scales(graph, found, scales)
    assert all(folded[name][0].codes is found[name][0].codes for name in found)
    assert not np.array_equal(folded["up0"][0].scale, found["up0"][0].scale)
    true = outputs(effective(model, WEIGHTS, found, scales), FEEDS[-1])
    got = outputs(with_codes(graph, folded), FEEDS[-1])
    np.testing.assert_allclose(got, true, rtol=1e-3, atol=1e-4 * np.abs(true).max())


def test_scales_pay() -> None:
    """On held-out texts, in the whole model, against the same without scales and against rounding to nearest."""
    model = uneven()
    true = outputs(graph_of(model), FEEDS[-1])

    def error(algorithm: str, *, balanced: bool) -> float:
        with pytest.MonkeyPatch.context() as patch:
            if not balanced:
                patch.setattr(sequential, "_BALANCED", ())
            _, found, scales = solved(graph_of(model), algorithm=algorithm)
        graph = graph_of(model)
        assert bool(scales) == (balanced and algorithm == "auto")
        off = outputs(with_codes(graph, fold_scales(graph, found, scales)), FEEDS[-1]) - true
        return float(np.square(off).mean())

    scaled, bare, nearest = (
        error("auto", balanced=True), error("auto", balanced=False), error("rtn", balanced=True),
    )  # fmt: skip
    assert scaled < 0.9 * bare
    assert bare < 0.7 * nearest


def uneven() -> onnx.ModelProto:
    """`language` with columns of very different sizes."""
    model = language()
    rng = np.random.default_rng(5)
    for stored in model.graph.initializer:
        if stored.name in WEIGHTS and stored.name != "table":
            W = onnx.numpy_helper.to_array(stored)
            rows = np.exp(rng.normal(0, 1, (len(W), 1))).astype(np.float32)
            stored.CopyFrom(onnx.numpy_helper.from_array(W * rows, stored.name))
    return model


def test_a_matrix_that_stays_float_takes_scales_too() -> None:
    model = uneven()
    _, found, scales = solved(graph_of(model), keep_float=("up0",))
    assert "up0" not in found
    assert scales["r0"].place is not None
    graph = graph_of(model)
    folded = fold_scales(graph, found, scales)
    names = {stored: node for stored, node in WEIGHTS.items() if node in found}
    true = outputs(effective(model, names, found, scales), FEEDS[-1])
    got = outputs(with_codes(graph, folded), FEEDS[-1])
    np.testing.assert_allclose(got, true, rtol=1e-3, atol=1e-4 * np.abs(true).max())


def test_without_scales_nothing_changes() -> None:
    graph = graph_of(language())
    before = ir.serde.serialize_model(graph).SerializeToString()
    found: Found = {}
    assert fold_scales(graph, found, {}) is found
    assert ir.serde.serialize_model(graph).SerializeToString() == before


def test_a_scale_that_ends_worse_than_rounding_to_nearest_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def bad(weights: Any, *_: Any, **__: Any) -> tuple[np.ndarray, float]:
        return np.resize(np.float32([1e-3, 1e3]), weights[0].shape[1]), 0.5

    graph = graph_of(language())
    _, plain, _ = without(monkeypatch, graph)
    monkeypatch.setattr(sequential, "balance", bad)
    _, found, scales = solved(graph)
    assert scales == {}
    for name, (made, tally) in found.items():
        assert tally.error <= tally.rtn
        np.testing.assert_array_equal(made.codes, plain[name][0].codes)


def without(monkeypatch: pytest.MonkeyPatch, graph: ir.Model) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "_BALANCED", ())
        return solved(graph)


def test_a_limit_of_size_is_not_spent_on_copies_of_constants() -> None:
    """The normalizations of `language` share their constants; rows of matrices need no copy."""
    _, _, scales = solved(graph_of(uneven()), max_size="0.2MB")
    assert {one.place.node for one in scales.values() if one.place} <= {"up0", "up1"}
    assert scales


def test_what_others_read_or_has_8_bits_is_not_scaled() -> None:
    rows = {name: weight(64, 64, seed=i) for i, name in enumerate("abc")} | {
        "g": np.ones(64, np.float32)
    }
    text = "[r] z = MatMul(x, c) [s] n = Mul(z, g) [p] a1 = MatMul(n, a) [q] b1 = MatMul(n, b) y = Add(a1, b1)"
    feeds = [
        {"x": np.random.default_rng(i).normal(size=(40, 64)).astype(np.float32)} for i in range(8)
    ]
    rows["c"] *= np.exp(np.random.default_rng(9).normal(0, 1.5, 64)).astype(np.float32)
    head = "g (float[n,64] x) => (float[n,64] y)"
    model = graph_of(from_text(f"{head} {{ {text} }}", **rows))
    assert set(solved(model, feeds)[2]) == {"n"}
    assert solved(model, feeds, bits=8)[2] == {}
    # one of the two has other bits: there is no scale for both
    assert solved(model, feeds, bits_for=("p=8",))[2] == {}
    read = graph_of(
        from_text(f"{head} {{ {text} }}".replace("Add(a1, b1)", "Sum(a1, b1, n)"), **rows)
    )
    assert solved(read, feeds)[2] == {}


SHARED = "[s] n = Mul(x, g) [p] y = MatMul(n, a) r = Relu(x) m = Mul(r, h) [q] z = MatMul(m, a)"


def test_a_matrix_that_others_read_has_no_scale() -> None:
    """Its codes meet inputs that nobody divides: 7 dB instead of 18."""
    rng = np.random.default_rng(0)
    rows = np.exp(rng.normal(0, 1.5, (64, 1))).astype(np.float32)
    weights = {
        "a": weight(64, 64) * rows,
        "g": np.ones(64, np.float32),
        "h": np.full(64, 2, np.float32),
    }
    head = "g (float[n,64] x) => (float[n,64] y, float[n,64] z)"
    model = graph_of(from_text(f"{head} {{ {SHARED} }}", **weights))
    feeds = [{"x": rng.normal(size=(40, 64)).astype(np.float32)} for _ in range(8)]
    assert solved(model, feeds)[2] == {}


def test_a_product_that_gets_no_codes_keeps_its_input() -> None:
    """Portable 2-bit codes of 66 rows run wrongly in ORT, so that it stays float, with weights as they were."""
    rng = np.random.default_rng(0)
    W = weight(64, 66) * np.exp(rng.normal(0, 1, (64, 1))).astype(np.float32)
    text = "g (float[n,64] x) => (float[n,66] y) { z = Relu(x) n = Mul(z, g) [p] y = MatMul(n, a) }"
    model = from_text(text, a=W, g=np.ones(64, np.float32))
    feeds = [{"x": rng.normal(size=(40, 64)).astype(np.float32)} for _ in range(8)]
    recipe = dataclasses.replace(INT4, bits=2, block=64, format="qdq", bench_seconds=0.05)
    result = compile_model(model, feeds, recipe=recipe)
    assert result.worst_db > 100
    assert [row["node"] for row in result.kept_float] == ["p"]


def test_marks_that_a_model_came_with_do_not_hinder() -> None:
    model = uneven()
    for node in model.graph.node:
        entry = node.metadata_props.add()
        entry.key, entry.value = MARK, "0.5"
    _, found, scales = solved(graph_of(model))
    graph = graph_of(model)
    folded = fold_scales(graph, found, scales)
    true = outputs(effective(model, WEIGHTS, found, scales), FEEDS[-1])
    got = outputs(with_codes(graph, folded), FEEDS[-1])
    np.testing.assert_allclose(got, true, rtol=1e-3, atol=1e-4 * np.abs(true).max())


def test_a_scale_that_cannot_be_applied_is_a_defect() -> None:
    model = uneven()
    _, found, scales = solved(graph_of(model))
    tensor = next(iter(scales))
    broken = {tensor: dataclasses.replace(scales[tensor], nodes=("head",))}
    with pytest.raises(PassError, match="was not applied"):
        fold_scales(graph_of(model), found, broken)
