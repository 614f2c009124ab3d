"""Products with an 8-bit weight alone: built, verified, timed, searched for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from lowering import constant, eager
from networks import from_text
from rewrites import parse, run
from workbench import QUICK, weight, workbench

from qcompile import compile_model
from qcompile.build import Solution, build
from qcompile.plan.make import Request, find_candidates, make_plan
from qcompile.plan.plan import Form, load_plan
from qcompile.quant.affine import dequantize
from qcompile.run.probe import probe
from qcompile.run.session import Options
from qcompile.solve.weights import solve_weights
from qcompile.timing import _ROWS, kernel_times
from qcompile.verify.kernels import optimized, verdicts
from qcompile.workshop import Workshop

TIMED = Workshop.timed  # before the tests' own fixture replaces it
HERE = eager()
FORMS = {
    "plain": f"[p] y = MatMul(x, w) }} #{constant('w', 72, 32)}",
    "bias behind": f"[p] t = MatMul(x, w) [a] y = Add(t, b) }} #{constant('w', 72, 32)}, {constant('b', 32)}",
    "gemm": f"[p] y = Gemm<alpha = -0.5, beta = 2.0, transB = 1>(x, w, b) }} #{constant('w', 32, 72)}, {constant('b', 32)}",
}  # fmt: skip


def product(form: str, rows: int = 2) -> Any:
    nodes, _, constants = FORMS[form].partition("#")
    return parse(f"g (float[{rows},72] x) => (float[{rows},32] y) <{constants}> {{ {nodes.strip()}")


@pytest.mark.parametrize("form", FORMS)
def test_the_result_is_that_of_the_rounded_weight(form: str) -> None:
    """72 rows: the last block is shorter. The kernel rounds its input to 8 bits, block by block."""
    model = product(form)
    rng = np.random.default_rng(3)
    feed = {"x": rng.normal(size=(2, 72)).astype(np.float32)}
    facts = probe(model, feed)
    found = find_candidates(model, HERE, facts)
    plan = make_plan(model, HERE, facts, Request(forms={"p": Form.WEIGHT}), found)
    assert plan["p"].form is Form.WEIGHT
    weights = solve_weights(plan, found, {}, {}, saturating=True)
    assert weights["p"].params.scale.shape == (3, 32)
    made = build(model, plan, Solution({}, weights), HERE, facts, "fused")
    (node,) = made.graph
    assert (node.op_type, node.name) == ("MatMulNBits", "p")
    assert {k: node.attributes[k].value for k in ("K", "N", "bits", "block_size", "accuracy_level")} == {
        "K": 72, "N": 32, "bits": 8, "block_size": 32, "accuracy_level": 4,
    }  # fmt: skip
    back = dequantize(weights["p"].codes, weights["p"].params)  # alpha in it
    bias = model.graph.initializers["b"].const_value.numpy() if form != "plain" else 0
    wanted = feed["x"] @ back + (2 * bias if form == "gemm" else bias)
    (got,) = run(made, feed)
    assert np.abs(got - wanted).max() < 0.01 * np.abs(wanted).max()
    (want,) = run(model, feed)
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
    kernels = verdicts(optimized(made, Options("all", threads=1)), made, plan, found)
    assert [(v.verdict, v.kernel) for v in kernels.nodes] == [("integer", "MatMulNBits")]


def test_few_rows_are_timed_and_remembered() -> None:
    few, many = product("bias behind"), product("plain", _ROWS + 1)
    for model, timed in ((few, {"p"}), (many, set())):
        facts = probe(model, {"x": np.zeros((int(model.graph.inputs[0].shape[0]), 72), np.float32)})
        found = find_candidates(model, HERE, facts)
        assert kernel_times(model, found, HERE, facts, threads=1).by_block == {}
        times = kernel_times(model, found, HERE, facts, threads=1, by_block=True)
        assert set(times.by_block) == timed
        assert all(ns > 0 for ns in times.by_block.values())
        again = kernel_times(model, found, HERE, facts, threads=1, by_block=True)
        assert again.by_block == times.by_block


def decoder_like(rows: str = "1") -> onnx.ModelProto:
    return from_text(
        f"g (float[{rows},64] x) => (float[{rows},64] y) {{ [one] h = MatMul(x, v) r = Tanh(h) [two] y = MatMul(r, w) }}",
        v=weight(64, 256), w=weight(256, 64, seed=1),
    )  # fmt: skip


def rows(*counts: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(4)
    return [{"x": rng.normal(size=(count, 64)).astype(np.float32)} for count in counts]


def test_a_compilation_asks_for_these_times_where_all_samples_have_one_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def times(*_: Any, **options: Any) -> Any:
        asked.append(options["by_block"])
        return kernel_times(*_, **{**options, "seconds": 0.0})

    monkeypatch.setattr("qcompile.workshop.kernel_times", times)
    monkeypatch.setattr("qcompile.targets.schema.Target.fits_here", lambda _: True)
    portable = dataclasses.replace(QUICK, format="qdq")
    cases = (([1] * 10, QUICK), ([1] * 9 + [7], QUICK), ([1] * 10, portable))
    for counts, recipe in cases:
        bench = workbench(decoder_like("N"), rows(*counts), recipe)
        TIMED(bench.shop, bench.request)
    assert asked == [True, False, False]


def test_a_plan_of_weights_alone_compiles(tmp_path: Path) -> None:
    """Set in an edited plan: it is verified as integer, has no portable form, and less error than dynamic."""
    feeds = rows(*[1] * 12)
    recipe = dataclasses.replace(QUICK, smooth=False, rounding=False)
    bench = workbench(decoder_like(), feeds, recipe)
    wanted = tmp_path / "plan.json"
    wanted.write_text(bench.draft.to_json().replace('"dynamic"', '"weight"'), "utf-8")
    dynamic = compile_model(decoder_like(), feeds, recipe=recipe, plan=bench.draft)
    done = compile_model(decoder_like(), feeds, recipe=recipe, plan=load_plan(wanted))
    assert [row["form"] for row in done.plan if row["op"] == "MatMul"] == ["weight"] * 2
    assert {row["kernel"] for row in done.kernels["nodes"]} == {"MatMulNBits"}
    assert {row["verdict"] for row in done.kernels["nodes"]} == {"integer"}
    assert done.format == "fused"
    assert done.worst_db is not None
    assert dynamic.worst_db is not None
    assert done.worst_db > dynamic.worst_db


def test_the_portable_form_has_none(tmp_path: Path) -> None:
    recipe = dataclasses.replace(QUICK, format="qdq")
    bench = workbench(decoder_like(), rows(*[1] * 8), recipe)
    wanted = tmp_path / "plan.json"
    wanted.write_text(bench.draft.to_json().replace('"dynamic"', '"weight"'), "utf-8")
    done = compile_model(decoder_like(), rows(*[1] * 8), recipe=recipe, plan=load_plan(wanted))
    assert [row["form"] for row in done.plan if row["op"] == "MatMul"] == ["dynamic"] * 2
    assert "the portable format has no such product; use --format fused or auto" in done.notes[0]
    assert "MatMulNBits" not in done.kernels["operators"]


def test_a_limit_of_noise_is_kept_with_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic products break the limit, float ones are slower: what is between is found and measured."""
    monkeypatch.setattr(
        Workshop, "timed",
        lambda _, request: dataclasses.replace(
            request, measured=dict.fromkeys(("one", "two"), (90000.0, 10000.0)), by_block=dict.fromkeys(("one", "two"), 30000.0)
        ),
    )  # fmt: skip
    recipe = dataclasses.replace(QUICK, smooth=False, rounding=False)
    feeds = rows(*[1] * 12)
    plain = compile_model(decoder_like(), feeds, recipe=recipe)
    assert {row["form"] for row in plain.plan if row["op"] == "MatMul"} == {"dynamic"}
    assert plain.worst_db is not None
    limit = plain.worst_db + 2
    done = compile_model(decoder_like(), feeds, recipe=dataclasses.replace(recipe, min_sqnr=limit))
    assert "weight" in {row["form"] for row in done.plan if row["op"] == "MatMul"}
    assert done.worst_db is not None
    assert done.worst_db >= limit
