"""Scales of inputs that normalizations and products before the matrices take (AWQ)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import from_text, save
from numpy.typing import NDArray
from workbench import weight

from qcompile import compile_model
from qcompile.cli import main
from qcompile.errors import RecipeError
from qcompile.recipe import BUILT_IN
from qcompile.report import Result

Array = NDArray[Any]
SEARCH = dataclasses.replace(
    BUILT_IN["int4"], bench_seconds=0.05, algorithm="search", accuracy_level=0
)
SCALED = dataclasses.replace(SEARCH, algorithm="awq")


def network() -> onnx.ModelProto:
    """A norm whose gain differs much by channel, two products that read it, a product of both, and one behind."""
    gain = np.exp(np.random.default_rng(5).normal(size=64) * 1.5).astype(np.float32)
    text = (
        "g (float[b,64] x) => (float[b,64] y) { n = LayerNormalization(x, gain, none) "
        "[gate] p = MatMul(n, g) s = Sigmoid(p) [up] u = MatMul(n, v) m = Mul(s, u) [down] y = MatMul(m, d) }"
    )
    return from_text(
        text, gain=gain, none=np.zeros(64, np.float32), g=weight(64, 256), v=weight(64, 256, seed=1),
        d=weight(256, 64, seed=2),
    )  # fmt: skip


def rows(count: int = 40) -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(16, 64)).astype(np.float32)} for _ in range(count)]


def compiled(tmp_path: Path, recipe: Any, model: onnx.ModelProto | None = None) -> Result:
    path = save(model or network(), tmp_path / "model.onnx")
    return compile_model(path, rows(), recipe=recipe)


def test_scales_lower_the_error_and_cost_no_node(tmp_path: Path) -> None:
    plain, scaled = compiled(tmp_path, SEARCH), compiled(tmp_path, SCALED)
    assert plain.worst_db is not None
    assert scaled.worst_db is not None
    assert scaled.worst_db > plain.worst_db + 1
    assert scaled.output is not None
    kinds = [node.op_type for node in onnx.load(scaled.output).graph.node]
    assert sorted(kinds) == sorted(
        ["LayerNormalization", "MatMulNBits", "Sigmoid", "MatMulNBits", "Mul", "MatMulNBits"]
    )
    assert any("3 of 3 matrices are scaled" in note for note in scaled.notes)


def test_what_nothing_can_take_is_not_scaled(tmp_path: Path) -> None:
    """The inputs of the first product are those of the model; those of the second one come through a Tanh."""
    model = from_text(
        "g (float[b,64] x) => (float[b,64] y) { [a] p = MatMul(x, g) t = Tanh(p) [b] y = MatMul(t, d) }",
        g=weight(64, 256), d=weight(256, 64, seed=2),
    )  # fmt: skip
    result = compiled(tmp_path, SCALED, model)
    assert any("0 of 2 matrices are scaled" in note for note in result.notes)
    plain = compiled(tmp_path, SEARCH, model)
    assert result.worst_db == pytest.approx(plain.worst_db)


def test_it_needs_data(tmp_path: Path) -> None:
    path = save(network(), tmp_path / "model.onnx")
    with pytest.raises(RecipeError, match="'awq' scales weights by the inputs they meet"):
        compile_model(path, recipe=SCALED)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(network(), tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", np.concatenate([row["x"][None] for row in rows(10)]))
    main([str(path), "--recipe", "int4", "--algorithm", "awq", "--data", str(tmp_path / "x.npy")])
    assert "(AWQ)" in capsys.readouterr().out
    assert (tmp_path / "model.int4.onnx").exists()
