"""Whole compilations with bits shared out: within the size, better than the same bits for all, told, and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from language_models import language, texts
from networks import from_text, save
from workbench import weight

from qcompile import compile_model
from qcompile.cli import main
from qcompile.errors import LimitError
from qcompile.recipe import BUILT_IN, Recipe
from qcompile.report import GOOD, NOT_FASTER, Result

INT4 = dataclasses.replace(BUILT_IN["int4"], bench_seconds=0.02, threads=1)


def compiled(folder: Path, data: Any = None, **change: Any) -> Result:
    path = save(language(), folder / "model.onnx")
    return compile_model(path, data, recipe=dataclasses.replace(INT4, **change))


def schemes(result: Result) -> dict[str, str]:
    return {row["node"]: row["weight"] for row in result.plan}


def lost(result: Result) -> float:
    """Mean KL of the next word, in nats."""
    found = result.outputs[0]["slices"][0]["divergence"]
    assert isinstance(found, float)
    return found


@pytest.mark.parametrize("average", [3.0, 4.5, 6.0])
def test_bits_a_weight_are_kept_and_nearly_used(average: float, tmp_path: Path) -> None:
    result = compiled(tmp_path, texts(), bits_per_weight=average)
    assert result.output is not None
    made = onnx.load(result.output)
    stored = sum(
        onnx.numpy_helper.to_array(w).nbytes for w in made.graph.initializer if w.name.endswith(("_q", "_scale", "_zero_point"))
    )  # fmt: skip
    bits = 8 * stored / (512 * 64 + 4 * 64 * 256)
    assert average - 0.3 < bits <= average
    assert f"{bits:.3f} bits a weight" in next(n for n in result.notes if "bits a weight" in n)


def test_better_than_the_same_bits_for_all(tmp_path: Path) -> None:
    uniform = compiled(tmp_path, texts(), block=16, bits_for=("Gather=4", "head=4"))
    assert {w.partition(".")[0] for w in schemes(uniform).values()} == {"uint4"}
    shared = compiled(tmp_path, texts(), bits_per_weight=4 + (32 + 4) / 16)  # as many
    assert shared.size_mb["after"] <= uniform.size_mb["after"]
    assert lost(shared) < 0.6 * lost(uniform)


@pytest.mark.parametrize("with_data", [False, True])
def test_the_file_is_not_larger_than_allowed(with_data: bool, tmp_path: Path) -> None:
    result = compiled(tmp_path, texts() if with_data else None, max_size="0.07MB")
    assert 0.06 < result.size_mb["after"] <= 0.07
    assert result.exit_code in (GOOD, NOT_FASTER)
    assert len(set(schemes(result).values())) > 1
    assert schemes(result)["head"] == schemes(result)["Gather:e"]


def test_both_limits_and_a_share_of_the_float_model(tmp_path: Path) -> None:
    result = compiled(tmp_path, max_size="20%", bits_per_weight=3.5)
    assert result.size_mb["after"] <= 0.2 * result.size_mb["before"]
    note = next(n for n in result.notes if "bits a weight" in n)
    assert float(note.split()[0]) <= 3.5


def test_what_is_asked_for_is_kept(tmp_path: Path) -> None:
    result = compiled(
        tmp_path, bits_per_weight=5.0, bits_for=("up0=8",), keep_float=("down1",), block=32, symmetric=True
    )  # fmt: skip
    found = schemes(result)
    assert found["up0"] == "uint8.axis1/32.sym"
    assert "down1" not in found
    assert all(scheme.endswith("/32.sym") for scheme in found.values())


def test_a_layer_that_counts_gets_the_bits(tmp_path: Path) -> None:
    text = (
        "g (float[N,64] x) => (float[N,64] y) { [loud] a = MatMul(x, u) [quiet] b = MatMul(x, v) s = Mul(b, k) "
        "r = Add(a, s) y = Tanh(r) }"
    )
    model = from_text(
        text, u=weight(64, 64), v=weight(64, 64, seed=1), k=np.array(0.01, np.float32)
    )
    rng = np.random.default_rng(0)
    data = [{"x": rng.normal(size=(16, 64)).astype(np.float32)} for _ in range(10)]
    recipe = dataclasses.replace(INT4, bits_per_weight=6.0)
    found = schemes(compile_model(save(model, tmp_path / "m.onnx"), data, recipe=recipe))
    assert found["loud"].startswith("uint8")
    assert found["quiet"].startswith("uint2")


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        result = compiled(tmp_path / name, texts(), bits_per_weight=4.5, threads=0)
        assert result.output is not None
        made.append(Path(result.output).read_bytes())
    assert made[0] == made[1]


def test_too_small_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(LimitError, match=r"bits_per_weight is 2, .*; the least is 2\.510"):
        compiled(tmp_path, bits_per_weight=2.0)
    assert not list(tmp_path.glob("*.int4.onnx"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(language(), tmp_path / "model.onnx")
    words = [str(path), "--recipe", "int4", "--quiet", "--threads", "1"]
    assert main([*words, "--max-size", "0.07MB", "--report", str(tmp_path / "r")]) in (0, 4)
    assert "shared out by the error of their weights" in capsys.readouterr().out
    table = json.loads((tmp_path / "r" / "report.json").read_text())
    assert {row["weight"].partition(".")[0] for row in table["plan"]} <= {"uint2", "uint4", "uint8"}
    (tmp_path / "model.int4.onnx").unlink()
    assert main([*words, "--max-size", "0.01MB"]) == 3
    told = capsys.readouterr().err
    assert told.startswith("qcompile: no bits and blocks are small enough: max_size is 0.01MB; ")
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "model.int4.onnx").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--recipe", "int4", "--bits-per-weight", "9"], "bits_per_weight is 9: give 2 to 8"),
        (["--recipe", "int4", "--bits-per-weight", "many"], "'many' is not a number"),
        (["--bits-per-weight", "4"], "bits_per_weight is for weights of few bits: choose the recipe int4"),
        (["--recipe", "int4", "--max-size", "many"], "'many' is no limit"),
    ],
)  # fmt: skip
def test_mistakes(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(language(), tmp_path / "model.onnx")
    assert main([str(path), *words, "--quiet"]) == 2
    assert sentence in capsys.readouterr().err


def test_large_models_have_the_same_bits_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qcompile.compiler.is_large", lambda _: True)
    path = save(language(), tmp_path / "model.onnx")
    assert main([str(path), "--recipe", "int4", "--max-size", "1MB", "--quiet"]) == 2
    assert "leave bits_per_weight and max_size out" in capsys.readouterr().err


def test_a_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('bits = 4\nbits_per_weight = 4.5\nmax_size = "50%"\n')
    path = save(language(), tmp_path / "model.onnx")
    result = compile_model(path, recipe=tmp_path / "r.toml")
    assert len(set(schemes(result).values())) > 1
    assert Recipe(bits=4, bits_per_weight=4).shares_bits
    assert not Recipe(max_size="1MB").shares_bits  # the search of the 8-bit recipes
