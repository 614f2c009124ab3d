"""Whole compilations to weights of few bits: right, smaller, described; and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from decoders import decoder, text_feed
from language_models import language, texts
from networks import from_text, save
from numpy.typing import NDArray
from workbench import weight

from qcompile import compile_model
from qcompile.algo.rtn import rtn
from qcompile.cli import main
from qcompile.errors import RecipeError
from qcompile.fewbits import compile as driver
from qcompile.fewbits import large
from qcompile.fewbits.assign import Scheme
from qcompile.fewbits.forms import raised
from qcompile.fewbits.large import compile_large
from qcompile.fewbits.streams import even
from qcompile.graph import io
from qcompile.graph.digest import digest
from qcompile.recipe import BUILT_IN, Recipe
from qcompile.report import GOOD, NOT_FASTER, Result
from qcompile.run.session import Options, Session

Array = NDArray[Any]
INT4 = dataclasses.replace(BUILT_IN["int4"], bench_seconds=0.05)


def compiled(
    tmp_path: Path, recipe: Recipe = INT4, data: Any = None, **more: Any
) -> tuple[Result, onnx.ModelProto]:
    path = save(language(), tmp_path / "model.onnx")
    result = compile_model(path, data, recipe=recipe, **more)
    assert result.output is not None
    return result, onnx.load(result.output)


def kinds(model: onnx.ModelProto) -> list[str]:
    return [
        node.op_type
        for node in model.graph.node
        if node.op_type in ("MatMul", "MatMulNBits", "GatherBlockQuantized", "Gather")
    ]


def bits(model: onnx.ModelProto) -> dict[str, int]:
    return {
        node.name: attribute.i
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "bits"
    }


def test_all_matrices_and_one_payload_for_the_tied_table(tmp_path: Path) -> None:
    result, made = compiled(tmp_path, data=texts())
    assert result.output == str(tmp_path / "model.int4.onnx")
    assert kinds(made) == ["GatherBlockQuantized", *["MatMulNBits"] * 5]
    assert bits(made)["head"] == 8
    assert [bits(made)[f"{name}{i}"] for i in (0, 1) for name in ("up", "down")] == [4] * 4
    large_ones = [w for w in made.graph.initializer if np.prod(w.dims) >= 512 * 64]
    assert len(large_ones) == 1  # 8-bit codes of the table; those of 4 bits have half as many bytes
    assert result.size_mb["after"] < 0.4 * result.size_mb["before"]
    assert all(row["verdict"] == "integer" for row in result.kernels["nodes"])
    assert result.worst_db is not None
    assert result.worst_db > 15
    assert result.exit_code in (GOOD, NOT_FASTER)


def test_data_makes_it_better_than_rounding_to_nearest(tmp_path: Path) -> None:
    plain, _ = compiled(
        tmp_path, dataclasses.replace(INT4, algorithm="rtn", accuracy_level=0), texts()
    )
    best, _ = compiled(tmp_path, dataclasses.replace(INT4, accuracy_level=0), texts())
    assert plain.worst_db is not None
    assert best.worst_db is not None
    assert best.worst_db > plain.worst_db + 1
    note = next(note for note in best.notes if "none is worse" in note)
    assert "gptq" in note


def test_without_data(tmp_path: Path) -> None:
    result, made = compiled(tmp_path)
    assert bits(made)["up0"] == 4
    assert any(warning.startswith("No calibration data") for warning in result.warnings)


def test_the_codes_are_those_of_rounding_to_nearest(tmp_path: Path) -> None:
    _, made = compiled(
        tmp_path, dataclasses.replace(INT4, algorithm="rtn", block=16, symmetric=True)
    )
    node = next(node for node in made.graph.node if node.name == "up0")
    stored = {w.name: onnx.numpy_helper.to_array(w) for w in made.graph.initializer}
    wanted = rtn(weight(64, 256, seed=1).T, bits=4, block=16, symmetric=True)
    np.testing.assert_array_equal(stored[node.input[2]].reshape(wanted.scale.shape), wanted.scale)
    codes = stored[node.input[1]].reshape(256, -1)
    np.testing.assert_array_equal(codes & 15, wanted.codes[:, ::2])
    np.testing.assert_array_equal(codes >> 4, wanted.codes[:, 1::2])


def test_other_bits_and_float_for_some(tmp_path: Path) -> None:
    recipe = dataclasses.replace(INT4, bits_for=("up*=8", "head=4"), keep_float=("down1",))
    result, made = compiled(tmp_path, recipe)
    found = bits(made)
    assert (found["up0"], found["up1"], found["down0"]) == (8, 8, 4)
    assert "down1" not in found
    # the table is read by the head and by a lookup: both get the bits of the one with more
    assert found["head"] == 8
    assert [(row["node"], row["op"]) for row in result.kept_float] == [("down1", "MatMul")]


def test_a_table_that_is_no_head_has_the_bits_of_all(tmp_path: Path) -> None:
    model = from_text(
        "g (int64[b,s] ids) => (float[b,s,64] y) { e = Gather(table, ids) [dense] y = MatMul(e, w) }",
        table=weight(512, 64, scale=8.0), w=weight(64, 64),
    )  # fmt: skip
    result = compile_model(save(model, tmp_path / "m.onnx"), recipe=INT4)
    assert result.output is not None
    assert set(bits(onnx.load(result.output)).values()) == {4}


def test_int8_weights(tmp_path: Path) -> None:
    recipe = dataclasses.replace(BUILT_IN["int8-weights"], bench_seconds=0.05)
    result, made = compiled(tmp_path, recipe, texts())
    assert result.output == str(tmp_path / "model.int8.onnx")
    assert set(bits(made).values()) == {8}
    assert result.worst_db is not None
    assert result.worst_db > 35


def test_rounding_to_nearest_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data judges the result alone: the codes are those without data."""
    nearest = dataclasses.replace(INT4, algorithm="rtn")
    _, alone = compiled(tmp_path, nearest)
    monkeypatch.setattr("qcompile.fewbits.compile.solve_in_order", None)
    result, model = compiled(tmp_path, nearest, texts())
    assert [i.raw_data for i in model.graph.initializer] == [
        i.raw_data for i in alone.graph.initializer
    ]
    assert any(
        ": 1.00 of the error that rounding to nearest leaves, of the weights" in n
        for n in result.notes
    )


def test_the_portable_format(tmp_path: Path) -> None:
    """Operators of ONNX alone, of which ORT makes the same kernels: not where a Relu follows, which is said."""
    portable = dataclasses.replace(INT4, format="qdq", accuracy_level=0, threads=1)
    result, model = compiled(tmp_path, portable, texts())
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 21)}
    assert result.format == "qdq"
    assert {node.domain for node in model.graph.node} == {""}
    codes = {i.data_type for i in model.graph.initializer if i.name.endswith(("_q", "_q_1"))}
    assert codes == {onnx.TensorProto.UINT4, onnx.TensorProto.UINT8}  # the table has 8 bits
    found = {row["node"]: row["kernel"] for row in result.kernels["nodes"]}
    assert found == {
        "up0": "MatMul", "down0": "MatMulNBits", "up1": "MatMul", "down1": "MatMulNBits", "head": "MatMulNBits", "Gather:e": "Gather",
    }  # fmt: skip
    assert [w for w in result.warnings if w.startswith("up0 runs as MatMul: ")]
    _, other = compiled(
        tmp_path, dataclasses.replace(portable, format="auto"), texts(), output=tmp_path / "b.onnx"
    )
    session, theirs = (Session(ir.from_proto(m), Options("off")) for m in (model, other))
    for feed in texts(3):
        np.testing.assert_allclose(session.run(feed)[0], theirs.run(feed)[0], rtol=1e-3, atol=1e-3)


def test_the_portable_format_of_two_bits_and_of_a_size(tmp_path: Path) -> None:
    portable = dataclasses.replace(INT4, format="qdq", threads=1)
    _, model = compiled(tmp_path, dataclasses.replace(portable, bits=2), texts())
    assert model.opset_import[0].version == 25
    small = dataclasses.replace(portable, max_size="0.12MB")
    result, _ = compiled(tmp_path, small, texts())
    assert 0.1 < result.size_mb["after"] <= 0.12


def test_the_portable_format_of_a_large_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    portable = dataclasses.replace(INT4, format="qdq")
    monkeypatch.setattr("qcompile.fewbits.forms.io.EXTERNAL_BYTES", 1000)
    model = ir.from_proto(language())
    scheme = Scheme(4, 32, symmetric=False)
    with pytest.raises(
        RecipeError, match=r"needs opset 21, the model has \d+, and is too large to be raised"
    ):
        raised(model, portable, [scheme])
    assert raised(model, INT4, [scheme]) is model
    with pytest.raises(RecipeError, match="for operators of ONNX Runtime: leave out --format qdq"):
        compile_large(Path("m.onnx"), tmp_path / "o.onnx", portable, None, 0.0, None, data=False)  # type: ignore[arg-type]


def test_the_report(tmp_path: Path) -> None:
    _, made = compiled(tmp_path, report=tmp_path / "report")
    table = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {row["weight"] for row in table["plan"]} == {
        "uint4.axis1/32.asym",
        "uint8.axis1/32.asym",
    }
    assert "MatMul" in (tmp_path / "report" / "report.md").read_text()
    meta = {prop.key: prop.value for prop in made.metadata_props}
    assert meta["qcompile.bits"] == "4"
    assert meta["qcompile.recipe"] == "int4"


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    _, first = compiled(tmp_path, data=texts())
    _, second = compiled(tmp_path, data=texts())
    assert first.SerializeToString() == second.SerializeToString()


def test_a_model_without_matrices(tmp_path: Path) -> None:
    path = save(from_text("g (float[4] x) => (float[4] y) { y = Neg(x) }"), tmp_path / "m.onnx")
    result = compile_model(path, recipe=INT4)
    assert result.exit_code == NOT_FASTER
    assert "nothing was quantized" in result.warnings[0]


def test_rows_of_any_size_count_alike() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(50, 8)).astype(np.float32)
    rows[0] *= 1e4
    made = rows * even(rows)
    power = np.square(made).mean(axis=1)
    assert power.max() <= 1.0
    assert power[0] == power.max()
    assert power.min() > 0.3
    np.testing.assert_allclose(rows * 1e-3 * even(rows * 1e-3), made, rtol=1e-4)
    assert np.isfinite(even(np.zeros((3, 8), np.float32))).all()


# ---- large models


def test_large_models_go_from_file_to_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "is_large", lambda _: True)
    monkeypatch.setattr("qcompile.compiler.is_large", lambda _: True)
    result, made = compiled(tmp_path, data=texts(), report=tmp_path / "report")
    assert result.exit_code == GOOD
    assert bits(made)["up0"] == 4
    told = {prop.key: prop.value for prop in made.metadata_props}
    assert told["qcompile.source.sha256"] == digest(io.load(tmp_path / "model.onnx"))
    assert told["qcompile.recipe"] == "int4"
    assert made.producer_name == "qcompile"
    assert any("The data was not used" in warning for warning in result.warnings)
    assert result.verdict().startswith("not timed")
    assert (tmp_path / "report" / "report.md").exists()


def test_large_models_have_no_second_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompile.compiler.is_large", lambda _: True)
    with pytest.raises(RecipeError, match="'gptq' is not one of auto, rtn and search"):
        compiled(tmp_path, dataclasses.replace(INT4, algorithm="gptq"))


# ---- the command line


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(language(), tmp_path / "model.onnx")
    code = main([str(path), "--recipe", "int4", "--block", "64", "--bits-for", "head=8", "--quiet"])
    out = capsys.readouterr().out
    assert code in (0, 4)
    assert (tmp_path / "model.int4.onnx").exists()
    assert "matrices" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--bits", "3"], "'3' is not one of 2, 4, 8"),
        (["--block", "64"], "block is for weights of few bits: choose the recipe int4"),
        (["--bits", "4", "--bits-for", "head"], "write PATTERN=BITS"),
        (["--bits", "4", "--bits-for", "nobody=8"], "matches no node"),
        (["--bits", "4", "--algorithm", "gptq"], "needs the second moment of the input"),
        (["--bits", "4", "--algorithm", "gtpq"], "'gtpq' is not one of"),
        (["--bits", "4", "--max-drop", "1%"], "are not searched for with weights of few bits"),
    ],
)
def test_mistakes(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(language(), tmp_path / "model.onnx")
    assert main([str(path), *words, "--quiet"]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert not list(tmp_path.glob("*.int4.onnx"))


def test_a_broken_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.onnx").write_bytes(b"junk")
    assert main([str(tmp_path / "b.onnx"), "--recipe", "int4", "--quiet"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("qcompile: ")
    assert "b.onnx" in told
    assert len(told.splitlines()) == 1


def test_an_error_above_the_goal_is_told() -> None:
    """One channel of the activation is 200 times as large, and its weights as much smaller."""
    large = np.where(np.arange(32) == 3, 200, 1).astype(np.float32)
    model = from_text(
        "g (float[N,32] x) => (float[N,32] y) { h = Mul(x, k) y = MatMul(h, w) }",
        k=large, w=weight(32, 32) / large[:, None],
    )  # fmt: skip
    rng = np.random.default_rng(0)
    data = [{"x": rng.normal(size=(8, 32)).astype(np.float32)} for _ in range(10)]
    recipe = dataclasses.replace(INT4, bits=8, bits_for=("MatMul=8",))
    told = compile_model(model, data, recipe=recipe)
    assert told.goal_missed == 18
    assert any("below the goal of 18 dB" in warning for warning in told.warnings)
    content = compile_model(model, data, recipe=dataclasses.replace(recipe, sqnr_goal=3.0))
    assert content.goal_missed is None
    assert not any("below the goal" in warning for warning in content.warnings)
    for result in (told, content):
        assert any(
            warning.startswith("Only 2 samples were held out") for warning in result.warnings
        )


def test_what_has_no_kernel_is_named() -> None:
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,4,6,6] y) { [c] y = Conv(x, w) }",
        w=np.ones((4, 4, 3, 3), np.float32),
    )
    result = compile_model(model, recipe=INT4)
    why = "kernels for weights of few bits take no Conv"
    assert result.kept_float == [{"node": "c", "op": "Conv", "why": why}]
    assert result.warnings[0] == f"nothing was quantized: Conv c: {why}."


# ---- decoders are timed token by token


def test_a_decoder_is_judged_by_one_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens at once may be slower: that is said, and is no failure."""

    def rows(opened: Any, session: Any, more: Any) -> list[dict[str, Any]]:
        (name, feed) = more[0]
        assert name == "one token after 24"
        assert {key: value.shape[-2:] for key, value in feed.items() if "past" in key} == {
            "past_k": (24, 16), "past_v": (24, 16),
        }  # fmt: skip
        return [
            {"feed": "1x24", "fp32_ms": 1.0, "result_ms": 2.0, "speedup": 0.5, "rounds": 3},
            {"feed": name, "fp32_ms": 3.0, "result_ms": 1.0, "speedup": 3.0, "rounds": 3},
        ]

    monkeypatch.setattr("qcompile.fewbits.compile.latency_rows", rows)
    monkeypatch.setattr("qcompile.fewbits.assign._LEAST", 1)
    path = tmp_path / "model.onnx"
    ir.save(decoder(width=16, vocabulary=64), path)
    feeds = [text_feed(list(row["ids"][0] % 64), width=16) for row in texts()]
    result = compile_model(path, feeds, recipe=dataclasses.replace(INT4, sqnr_goal=0.0))
    assert result.latency["speedup"] == 3.0
    assert result.exit_code == GOOD, result.warnings
    assert any("At 1x24, many tokens at once, it is slower" in text for text in result.warnings)


def test_plans_and_statistics_are_for_other_recipes(tmp_path: Path) -> None:
    path = save(language(), tmp_path / "model.onnx")
    with pytest.raises(
        RecipeError, match=r"plans and statistics are for 8-bit activations: leave them out"
    ):
        compile_model(path, recipe=INT4, stats=tmp_path / "s.stats")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("size", "texts_", "judges"), [(512, 24, 6), (20, 40, 8), (5000, 2, 1), (0, 40, 8)]
)
def test_texts_are_bounded_in_tokens(size: int, texts_: int, judges: int) -> None:
    feed = {"input_ids": np.zeros((1, size), np.int64)} if size else {"x": np.zeros((1, 9))}
    samples: Any = SimpleNamespace(
        few=lambda most: [feed] * min(most, 40), held_out=lambda: iter([feed] * 20)
    )
    assert len(driver._texts(samples)) == texts_
    assert len(driver._judges(samples)) == judges
