"""A slice of the ONNX backend suite in every recipe, and that the tool finds what it is there to find."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import backend_cases
import backend_suite
import numpy as np
import onnx
import pytest
from backend_judge import Judge, Runner, usable
from backend_settings import SETTINGS, eager_target, untimed
from networks import from_text
from onnx import numpy_helper

from qcompile.plan.candidates import _FINDERS
from qcompile.targets.schema import load_target

if TYPE_CHECKING:
    from collections.abc import Sequence

# What can be integer, and what else a pass rewrites or has a word about.
TOUCHED = frozenset(_FINDERS) | {
    "AveragePool", "BatchNormalization", "Cast", "Div", "Einsum", "HardSwish", "Identity", "If",
    "LayerNormalization", "Softmax", "Sub",
}  # fmt: skip
STATIC = SETTINGS[2]


def test_a_slice_of_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One case for each operator and two of those that are touched, in one recipe after the other; products in all."""
    import qcompile.commands
    import qcompile.compiler  # noqa: F401

    for name, module in list(sys.modules.items()):  # put back at the end
        if name.startswith("qcompile") and hasattr(module, "race"):
            monkeypatch.setattr(module, "race", module.race)
    untimed()
    rows: list[backend_suite.Row] = []
    for number, name in enumerate(backend_cases.chosen(2, TOUCHED)):
        settings = SETTINGS
        if not backend_cases.operators(name) & {"Conv", "Gather", "Gemm", "LSTM", "MatMul"}:
            settings = settings[number % len(settings) :][:1]
        for case in backend_cases.variants(name):
            rows += backend_suite.answer(case, settings, tmp_path)
    assert backend_suite.bad(rows) == []
    found = Counter(row.outcome for row in rows)
    assert len({row.case for row in rows}) > 150
    assert found["right"] > 25
    assert found["nothing"] > 100
    assert found["refused"] > 5
    assert {r.setting for r in rows if r.outcome == "right"} == {s.name for s in SETTINGS}


def test_the_slice_is_always_the_same() -> None:
    names = backend_cases.chosen(2, {"Conv", "Gemm"})
    assert names == backend_cases.chosen(2, {"Conv", "Gemm"})
    ops = [backend_cases.operators(name) for name in names]
    assert sum(found == {"Conv"} for found in ops) == 2
    assert sum(found == {"Relu"} for found in ops) == 1


def case(name: str) -> backend_cases.Case:
    return next(c for c in backend_cases.variants(name.partition("+")[0]) if c.name == name)


def test_variants() -> None:
    found = {c.name: c for c in backend_cases.variants("node/test_gather_0")}
    assert [list(c.feed) for c in found.values()] == [["data", "indices"], ["data"], ["indices"]]
    deep = case("node/test_gemm_transposeB+deep")
    (weight,) = (numpy_helper.to_array(t) for t in deep.model.graph.initializer[:1])
    assert deep.feed["a"].shape == (3, 36)
    assert weight.shape == (4, 36)
    for one in (*found.values(), deep):
        Runner(one.model).run(one.feed)


def test_samples_keep_to_what_the_operator_takes() -> None:
    """acosh takes 1 and more: samples that were scaled below make NaN, and are not used."""
    one = case("node/test_acosh_example")
    calibrating, judging = backend_cases.samples(one)
    again, _ = backend_cases.samples(one)
    for a, b in zip(calibrating, again, strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])
    few, fresh, repeats = usable(Runner(one.model), calibrating, judging)
    assert repeats
    assert 1 < len(few) < len(calibrating)
    assert 1 <= len(fresh) <= len(judging)
    assert all((feed["x"] >= 1).all() for feed in (*few, *fresh))
    noise = from_text("g (float[8] x) => (float[8] y) { y = RandomNormalLike(x) }")
    feed = {"x": np.ones(8, np.float32)}
    assert usable(Runner(noise), [feed, feed], [feed]) == ([feed, feed], [feed], False)


# ---- the judge

FLOAT = from_text("g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }")
FEED = {"x": np.array([[1, -2, 3], [-4, 5, -6]], np.float32)}


@pytest.mark.parametrize(
    ("text", "integer", "outcome", "why"),
    [
        ("g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }", 0, "nothing", ""),
        ("g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }", 1, "right", "0.00 of the bound"),
        ("g (float[2,3] x) => (float[2,3] y) <float k = {1.005}> { r = Relu(x) y = Mul(r, k) }", 1, "right", ""),
        ("g (float[2,3] x) => (float[2,3] y) <float k = {1.005}> { r = Relu(x) y = Mul(r, k) }", 0, "wrong", "at most 0.0005"),
        ("g (float[2,3] x) => (float[2,3] y) <float k = {1.1}> { r = Relu(x) y = Mul(r, k) }", 1, "wrong", "output y, sample 0, optimization off: error 0.242 in 5"),
        ("g (float[2,3] x) => (float[2,3] y) { r = Relu(x) z = Sub(x, x) y = Div(r, z) }", 1, "wrong", "error inf"),
        ("g (float[2,3] x) => (float[3,2] y) { r = Relu(x) y = Transpose(r) }", 1, "wrong", "error inf"),
        ("g (float[2,3] x) => (float[2,3] z) { z = Relu(x) }", 1, "invalid", "not [('x', 'tensor(float)', 2), ('y', 'tensor(float)', 2)]"),
        ("g (float[2,3] x) => (double[2,3] y) { r = Relu(x) y = Cast<to = 11>(r) }", 1, "invalid", "tensor(double)"),
        ("g (float[2,3] x) => (float[2,3] y) { y = Relu(x, x) }", 1, "invalid", "checker: "),
        ("g (float[2,3] x) => (float[2,3] y) <float[4] k = {1, 2, 3, 4}> { r = Relu(x) y = Add(r, k) }", 1, "invalid", "does not load: "),
    ],
)  # fmt: skip
def test_what_the_judge_says(
    tmp_path: Path, text: str, integer: int, outcome: str, why: str
) -> None:
    onnx.save(from_text(text), tmp_path / "m.onnx")
    verdict = Judge(FLOAT, [FEED], [FEED], repeats=True)(
        tmp_path / "m.onnx", integer, None, calibrated=True
    )
    assert verdict.outcome == outcome, verdict
    assert why in verdict.why


def test_what_saturates_excuses_its_own_sample_alone(tmp_path: Path) -> None:
    """Samples within and beyond what calibrated (0 to 4): only beyond may the result be cut, and only where it is calibrated."""
    cut = "g (float[2] x) => (float[2] y) <float k = {0}, float most = {4}> { r = Relu(x) y = Clip(r, k, most) }"
    off = "g (float[2] x) => (float[2] y) <float k = {0.9}> { r = Relu(x) y = Mul(r, k) }"
    low, high = ({"x": np.array([-1, most], np.float32)} for most in (4, 6))
    model = from_text("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    for text, feeds, calibrated, outcome in (
        (cut, [low, high], True, "right"), (cut, [low, high], False, "wrong"), (off, [high], True, "right"),
        (off, [low, high], True, "wrong"),
    ):  # fmt: skip
        onnx.save(from_text(text), tmp_path / "m.onnx")
        judge = Judge(model, [low], feeds, repeats=True)
        verdict = judge(tmp_path / "m.onnx", 1, None, calibrated=calibrated)
        assert verdict.outcome == outcome, verdict
    assert "sample 0" in verdict.why


def test_flags_may_differ_where_rounding_flips_them(tmp_path: Path) -> None:
    """Of 100 numbers around zero one or two are rounded to it; all of them are not."""
    text = "g (float[100] x) => (bool[100] y) <float k = {{0}}, float f = {{{}}}> {{ s = Mul(x, f) y = Greater(s, k) }}"
    feed = {"x": np.linspace(-1, 1, 100, dtype=np.float32)}
    judge = Judge(from_text(text.format(1)), [feed], [feed], repeats=True)
    for factor, outcome in ((2, "right"), (-1, "wrong")):
        onnx.save(from_text(text.format(factor)), tmp_path / "m.onnx")
        assert judge(tmp_path / "m.onnx", 1, None, calibrated=True).outcome == outcome


# ---- what a compilation answers


def answered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: Any, name: str = "node/test_relu"
) -> Sequence[backend_suite.Row]:
    monkeypatch.setattr("qcompile.compile_model", compiled, raising=False)
    return list(backend_suite.answer(case(name), [STATIC], tmp_path))


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        ("ModelError('the model is quantized: give another.')", "refused"),
        ("ModelError('two\\nlines.')", "crashed"),
        ("ModelError('no sentence')", "crashed"),
        ("ModelError('ONNX Runtime refuses the model: it.')", "crashed"),
        ("PassError('a contract is broken.')", "crashed"),
        ("ZeroDivisionError('x')", "crashed"),
        ("RuntimeWarning('divided by zero')", "crashed"),
    ],
)
def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, outcome: str) -> None:
    import warnings

    import qcompile

    thrown = eval(error, vars(qcompile) | {"RuntimeWarning": RuntimeWarning})

    def fails(*_: object, **__: object) -> None:
        if isinstance(thrown, Warning):
            warnings.warn(thrown, stacklevel=1)
        raise thrown

    rows = answered(monkeypatch, tmp_path, fails)
    assert [row.outcome for row in rows] == [outcome] * 2, rows
    assert len(backend_suite.bad(rows)) == (2 if outcome == "crashed" else 0)


def test_a_file_beside_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompile import ModelError

    def half(*_: object, output: Path, **__: object) -> None:
        output.write_bytes(b"half")
        raise ModelError("the disk is full: make room.")

    rows = answered(monkeypatch, tmp_path, half)
    assert "a file was written" in rows[0].why


def test_models_that_onnx_runtime_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are counted apart, if they are refused: a crash stays one."""
    from qcompile import ModelError

    name = "node/test_adagrad"  # of ai.onnx.preview.training

    def refuses(*_: object, **__: object) -> None:
        raise ModelError("ONNX Runtime refuses the model")

    def crashes(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    assert answered(monkeypatch, tmp_path, refuses, name)[0].outcome == "not ORT"
    assert answered(monkeypatch, tmp_path, crashes, name)[0].outcome == "crashed"


def test_the_eager_target(tmp_path: Path) -> None:
    target = load_target(str(eager_target(tmp_path)))
    assert not target.fits_here()
    assert all(row.min_macs == row.min_bytes == 0 for row in target.op)
    assert {row.kernel for row in target.op} >= {"QLinearConv", "QLinearAdd"}


# ---- processes and pages


def test_a_case_that_takes_too_long_and_one_that_dies() -> None:
    rows = backend_suite.run(["node/test_abs"], [STATIC], 1, seconds=0.01)
    assert [(row.outcome, row.why) for row in rows] == [("crashed", "no answer after 0.01 s")]
    rows = backend_suite.run(["none/such"], [STATIC], 1)
    assert [(row.outcome, row.why[:16]) for row in rows] == [("crashed", "the process died")]


def test_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = backend_suite.Row("node/test_x", "int4", True, "right", "0.5 of the bound", 36.0)
    rows = [
        row,
        dataclasses.replace(row, eager=False, outcome="nothing"),
        dataclasses.replace(row, case="node/test_x+weights", outcome="wrong", why="off."),
    ]
    monkeypatch.setattr(backend_suite, "run", lambda *_: rows)
    words = ["backend_suite.py", "--case", "node/test_abs", "--json", str(tmp_path / "j")]
    monkeypatch.setattr(sys, "argv", [*words, "--markdown", str(tmp_path / "m")])
    assert backend_suite.main() == 1
    page = (tmp_path / "m").read_text("utf-8")
    assert "| int4 | eager | 2 | 1 | 0 | 0 | 1 | 0 | 0 | 0 |" in page
    assert "| int4 | usual | 1 | 0 | 1 | 0 | 0 | 0 | 0 | 0 |" in page
    assert "1 cases of onnx" in page
    assert "wrong: node/test_x+weights, int4, eager: off." in page
    assert len(json.loads((tmp_path / "j").read_text("utf-8"))) == 3
    assert "wrong: node/test_x+weights" in capsys.readouterr().out


def test_rows_of_earlier_runs_fill_what_was_not_run(tmp_path: Path) -> None:
    row = backend_suite.Row("node/test_abs", "int8", True, "right", "", 1.0)
    other = dataclasses.replace(row, case="node/test_abs+weights")
    old = [dataclasses.replace(row, outcome="wrong"), dataclasses.replace(other, outcome="wrong"),
           dataclasses.replace(row, setting="int4"), dataclasses.replace(row, case="light/light_vgg19")]  # fmt: skip
    backend_suite.write(tmp_path / "j", old)
    found = backend_suite.merged([[row], backend_suite.read(tmp_path / "j")])
    assert found == [row, old[2], old[3]]  # +weights of the old run goes with its case


def test_no_such_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["backend_suite.py", "--case", "none/*"])
    with pytest.raises(SystemExit, match="2"):
        backend_suite.main()
