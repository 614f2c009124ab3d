"""Cases that are about the command and its data, not about a graph (N23, N24, T12, T15, T18, T20, T21)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Desk
from networks import linear_net, rows, save
from onnx import helper, numpy_helper
from regressions import types_and_values
from regressions.case import Truth, feeds
from regressions.recipes import RECIPES, small_models_pay

from qcompile import DataError, RecipeError, compile_model
from qcompile.recipe import Recipe

QUICK = Recipe(threads=1, bench_seconds=0.01, sqnr_goal=0)
pytestmark = pytest.mark.usefixtures("_small_models_pay")


@pytest.fixture
def _small_models_pay() -> Iterator[None]:
    with small_models_pay():
        yield


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("pattern", ["nope", "re:^nope$"])
def test_n23_a_pattern_that_matches_nothing(recipe: str, pattern: str) -> None:
    chosen = dataclasses.replace(RECIPES[recipe].recipe, keep_float=(pattern,))
    data = [{"x": rows()}] if RECIPES[recipe].data else None
    with pytest.raises(RecipeError, match=r"nope.*matches no node"):
        compile_model(linear_net(), data, recipe=chosen)


@pytest.mark.parametrize("recipe", RECIPES)
def test_n24_t20_twice_on_the_same_model(recipe: str, tmp_path: Path) -> None:
    model, way = linear_net(), RECIPES[recipe]
    data = [{"x": row[None]} for row in rows()] if way.data else None
    made = []
    for name in ("a.onnx", "b.onnx"):
        compile_model(model, data, output=tmp_path / name, recipe=way.recipe)
        made.append(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert made[0] == made[1]


def test_t12_a_sparse_weight_in_a_file(tmp_path: Path) -> None:
    case = types_and_values.sparse(flat=True)
    onnx.save(case.model, tmp_path / "m.onnx")
    result = compile_model(tmp_path / "m.onnx", feeds(case, 6, 0), recipe=QUICK)
    assert result.exit_code == 0
    assert min(Truth(case, 4).errors(onnx.load(tmp_path / "m.int8.onnx")).values()) > 25


@pytest.mark.parametrize("recipe", ["no data", "int4, no data"])
@pytest.mark.parametrize("place", ["file", "constant"])
def test_t15_weights_outside_of_the_initializers(recipe: str, place: str, tmp_path: Path) -> None:
    """Small ones; `test_stream` and `tools/bench_large.py` have those beyond 2 GB."""
    model, path = linear_net(), tmp_path / "m.onnx"
    if place == "constant":
        for tensor in list(model.graph.initializer):
            node = helper.make_node("Constant", [], [tensor.name], value=tensor)
            model.graph.node.insert(0, node)
        del model.graph.initializer[:]
    save(model, path, data="weights.bin" if place == "file" else None)
    result = compile_model(path, recipe=RECIPES[recipe].recipe, output=tmp_path / "o.onnx")
    assert len([v for v in result.kernels["nodes"] if v["verdict"] == "integer"]) == 2
    floats = [w for w in onnx.load(tmp_path / "o.onnx").graph.initializer if w.data_type == 1]
    assert all(numpy_helper.to_array(w).size < 256 * 256 for w in floats)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "no samples"),
        ([{"z": rows()}], "'z'"),
        ([{"x": rows()[:, :7]}], "'x'"),
    ],
)
@pytest.mark.parametrize("recipe", [name for name, way in RECIPES.items() if way.data])
def test_t18_data_that_does_not_fit(recipe: str, data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        compile_model(linear_net(), data, recipe=RECIPES[recipe].recipe)


def test_t18_float64_is_taken_as_float32(tmp_path: Path) -> None:
    made = []
    for kind in (np.float32, np.float64):
        path = tmp_path / f"{np.dtype(kind)}.onnx"
        data = [{"x": row[None].astype(kind)} for row in rows()]
        compile_model(linear_net(), data, output=path, recipe=QUICK)
        made.append(path.read_bytes())
    assert made[0] == made[1]


def test_t21_spaces_and_a_folder_that_is_only_read(desk: Desk) -> None:
    folder = desk / "my models"
    folder.mkdir()
    save(linear_net(), folder / "a model.onnx")
    np.savez(folder / "some data.npz", x=rows())
    folder.chmod(0o500)
    try:
        done = desk.run(
            "my models/a model.onnx", "--data", "my models/some data.npz", "-o", "the result.onnx",
        )  # fmt: skip
        assert done.code in (0, 4), done
        assert done.new == ["work/the result.onnx"]
    finally:
        folder.chmod(0o700)
