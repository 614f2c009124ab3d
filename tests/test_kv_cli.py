"""--kv-cache: whole compilations of decoders, what is told of their caches, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Desk
from decoders import decoder, text_feed
from numpy.typing import NDArray
from rewrites import parse

from qcompile import compile_model
from qcompile.decode import Decoder
from qcompile.errors import ModelError
from qcompile.fewbits import large
from qcompile.graph import io
from qcompile.graph.kv_cache import MARK, stored_caches
from qcompile.kv_session import KvSession, open_session
from qcompile.recipe import BUILT_IN
from qcompile.report import NOT_FASTER
from qcompile.run.session import Session

pytestmark = pytest.mark.usefixtures("clock")

WIDE = {"width": 32, "vocabulary": 64}  # matrices that are worth few bits
RNG = np.random.default_rng(7)
TEXTS = [RNG.integers(0, 64, n).tolist() for n in (40, 25, 12, 33, 18, 9)]


def put(desk: Desk, model: ir.Model, name: str = "dec.onnx", width: int = 32) -> None:
    """The model, and texts for it in `texts`."""
    io.save(model, desk / name)
    (desk / "texts").mkdir(exist_ok=True)
    for i, ids in enumerate(TEXTS):
        np.savez(desk / f"texts/{i}.npz", **text_feed(ids, width))


def compiled(desk: Desk, *words: str, code: int = 0) -> dict[str, Any]:
    done = desk.run("dec.onnx", "--data", "texts", "--json", *words)
    assert done.code == code, done
    table: dict[str, Any] = json.loads(done.out)
    return table


def types(path: Path) -> dict[str, int]:
    graph = onnx.load(path).graph
    return {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}


INT8, UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8


@pytest.mark.parametrize(
    ("words", "output", "op"),
    [
        (["--recipe", "int4", "--kv-cache", "int8"], "dec.int4.onnx", "MatMulNBits"),
        (["--recipe", "int8-weights", "--kv-cache", "int8"], "dec.int8.onnx", "MatMulNBits"),
        (["--recipe", "kv-cache"], "dec.kv-int8.onnx", "MatMul"),
        (["--recipe", "int8-dynamic", "--kv-cache", "int8"], "dec.int8.onnx", ""),
    ],
)
def test_one_command(desk: Desk, words: list[str], output: str, op: str) -> None:
    put(desk, decoder(**WIDE))  # type: ignore[arg-type]
    found = compiled(desk, *words, "--report", "r")
    assert found["output"] == output
    seen = types(desk / output)
    assert all(seen[name] == INT8 for name in ("past_k", "past_v", "present_k", "present_v"))
    assert op in ["", *(node.op_type for node in onnx.load(desk / output).graph.node)]
    kv = found["kv_cache"]
    assert (kv["kind"], kv["keys"], kv["caches"], kv["skipped"]) == ("int8", "int8", 2, {})
    assert kv["token_bytes"] == {"before": 2 * 2 * 32 * 4, "after": 2 * 2 * 32}
    assert kv["ratio"] == 0.25
    assert kv["scale_bytes"] == 2 * 2 * 32 * 4
    assert kv["tokens"] == sum(map(len, TEXTS[:5]))  # the last one is held out
    only = words == ["--recipe", "kv-cache"]
    names = {"fp32", "result", "tokens"} | (set() if only else {"float_cache"})
    assert set(kv["perplexity"]) == names
    assert kv["perplexity"]["tokens"] == len(TEXTS[5]) - 1
    before, after = (np.log(kv["perplexity"][name]) for name in ("fp32", "result"))
    assert after == pytest.approx(before, rel=0.1)
    assert kv["greedy"]["tokens"] == 200
    assert kv["greedy"]["prompt"] == len(TEXTS[5])
    assert set(kv["greedy"]["differs"]) == {"fp32"} if only else {"fp32", "float_cache"}
    told = (desk / "r" / "report.md").read_text()
    assert "## Caches of keys and values" in told
    assert "- 2 caches as int8: 512 -> 128 bytes a token (0.250x)" in told
    assert json.loads((desk / "r" / "report.json").read_text())["kv_cache"] == kv


def losses(model: Path | ir.Model, ids: list[int]) -> float:
    """Mean loss of the tokens from the second on, token by token, with codes as they are stored."""
    reader = Decoder(model, threads=1)
    return reader.surprise(ids, first=1, piece=1)


def test_figures_are_those_of_the_files(desk: Desk) -> None:
    put(desk, decoder(**WIDE))  # type: ignore[arg-type]
    kv = compiled(desk, "--recipe", "kv-cache", "--kv-cache", "int4")["kv_cache"]
    made = desk / "dec.kv-int4.onnx"
    for name, path in (("fp32", desk / "dec.onnx"), ("result", made)):
        assert np.log(kv["perplexity"][name]) == pytest.approx(losses(path, TEXTS[5]), rel=1e-4)
    first, second = (
        Decoder(path, threads=1).greedy(TEXTS[5], 200) for path in (desk / "dec.onnx", made)
    )
    wanted = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=True), 1) if a != b), None
    )
    assert kv["greedy"]["differs"]["fp32"] == wanted


def test_int8_weights_and_activations_beside_the_cache(desk: Desk) -> None:
    put(desk, decoder(**WIDE))  # type: ignore[arg-type]
    found = compiled(desk, "--kv-cache", "uint8", "--recipe", "int8")
    assert types(desk / "dec.int8.onnx")["past_k"] == UINT8
    assert found["kernels"]["integer"] >= 4
    assert found["kv_cache"]["kind"] == "uint8"


def test_people_are_told(desk: Desk) -> None:
    put(desk, decoder(**WIDE))  # type: ignore[arg-type]
    done = desk.run("dec.onnx", "--data", "texts", "--recipe", "int4", "--kv-cache", "int4")
    assert done.code == 0, done
    assert ", caches 5.3x smaller" in done.out.splitlines()[0]
    assert "2 caches as int4 (keys int8): 512 -> 96 bytes a token (0.188x)" in done.out
    assert "perplexity of 8 held-out tokens: " in done.out
    assert " with float caches: the caches cost " in done.out
    assert "greedy decoding of 200 tokens: " in done.out


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_group_query_attention(desk: Desk, kind: str) -> None:
    put(desk, decoder(**WIDE, grouped=True))  # type: ignore[arg-type]
    kv = compiled(desk, "--recipe", "int4", "--kv-cache", kind)["kv_cache"]
    assert kv["keys"] == kind
    assert kv["greedy"]["tokens"] == 200
    nodes = {node.op_type: node for node in onnx.load(desk / "dec.int4.onnx").graph.node}
    told = {a.name: a for a in nodes["GroupQueryAttention"].attribute}
    assert told["kv_cache_bit_width"].i == (8 if kind == "int8" else 4)
    assert told["k_quant_type"].s == told["v_quant_type"].s == b"PER_CHANNEL"
    before, after = (np.log(kv["perplexity"][name]) for name in ("float_cache", "result"))
    assert after == pytest.approx(before, rel=0.1)


def test_a_recipe_file_may_ask_for_it(desk: Desk) -> None:
    put(desk, decoder(**WIDE))  # type: ignore[arg-type]
    (desk / "r.toml").write_text('bits = 8\nkv_cache = "uint8"\n')
    assert compiled(desk, "--recipe", "r.toml")["kv_cache"]["kind"] == "uint8"
    (desk / "r.toml").write_text('kv_cache = "int7"\n')
    assert "'kv_cache' is 'int7', not one of int8, uint8, int4." in desk.refused(
        "dec.onnx", "--data", "texts", "--recipe", "r.toml"
    )


def test_no_cache_no_table(desk: Desk) -> None:
    put(desk, decoder(**WIDE))  # type: ignore[arg-type]
    assert compiled(desk, "--recipe", "int4")["kv_cache"] is None


# ---- the result is judged as any other


def test_verify_and_bench_take_the_result(desk: Desk) -> None:
    put(desk, decoder(**WIDE))  # type: ignore[arg-type]
    compiled(desk, "--recipe", "kv-cache", "--kv-cache", "int4")
    past = text_feed(TEXTS[0][:1], 32) | {
        "attention_mask": np.ones((1, 4), np.int64),
        "past_k": RNG.normal(size=(1, 2, 3, 32)).astype(np.float32),
        "past_v": RNG.normal(size=(1, 2, 3, 32)).astype(np.float32),
    }
    np.savez(desk / "past.npz", **past)
    for data in ("texts", "past.npz"):
        done = desk.run("verify", "dec.onnx", "dec.kv-int4.onnx", "--data", data, "--json")
        assert done.code == 0, done
        rows = {row["name"]: row["slices"][0] for row in json.loads(done.out)["outputs"]}
        assert rows["present_k"]["sqnr_db"] > 30
        assert 15 < rows["present_v"]["sqnr_db"] < 40
        assert rows["logits"]["sqnr_db"] > 10
        assert desk.run("bench", "dec.onnx", "dec.kv-int4.onnx", "--data", data).code == 0


def test_verify_refuses_integer_caches_of_others(desk: Desk) -> None:
    put(desk, decoder(**WIDE))  # type: ignore[arg-type]
    compiled(desk, "--recipe", "kv-cache")
    made = onnx.load(desk / "dec.kv-int8.onnx")
    kept = [entry for entry in made.metadata_props if entry.key != MARK]
    del made.metadata_props[:]
    made.metadata_props.extend(kept)
    onnx.save(made, desk / "other.onnx")
    said = desk.refused("verify", "dec.onnx", "other.onnx", "--data", "texts")
    assert "input 'past_k' is int8 in other.onnx and float32 in dec.onnx" in said


def test_float_caches_in_and_out(desk: Desk) -> None:
    model = decoder(**WIDE)  # type: ignore[arg-type]
    result = compile_model(
        model, [text_feed(ids, 32) for ids in TEXTS], output=desk / "o.onnx",
        recipe=BUILT_IN["kv-cache"],
    )  # fmt: skip
    assert result.kv_cache is not None
    made = io.load(desk / "o.onnx")
    session = open_session(made)
    assert isinstance(session, KvSession)
    assert {i.name: (i.dtype, i.shape[-1]) for i in session.inputs}["past_k"] == (np.float32, 32)
    feed = text_feed(TEXTS[0], 32)
    ours, theirs = session.run(feed), Session(model).run(feed)
    for got, wanted, info in zip(ours, theirs, session.outputs, strict=True):
        assert got.dtype == wanted.dtype == np.float32
        near(got, wanted, info.name)
    assert [c.past for c in stored_caches(made)] == ["past_k", "past_v"]


def near(got: NDArray[Any], wanted: NDArray[Any], name: str) -> None:
    reach = 0.02 if name != "logits" else 0.1
    assert np.abs(got - wanted).max() < reach * np.abs(wanted).max(), name


def test_what_is_told_of_caches_must_fit(desk: Desk) -> None:
    put(desk, decoder(**WIDE))  # type: ignore[arg-type]
    compiled(desk, "--recipe", "kv-cache")
    made = onnx.load(desk / "dec.kv-int8.onnx")
    for entry in made.metadata_props:
        if entry.key == MARK:
            entry.value = entry.value.replace("present_k_scale", "gone")
    onnx.save(made, desk / "other.onnx")
    said = desk.refused("verify", "dec.onnx", "other.onnx", "--data", "texts")
    assert f"the metadata {MARK} does not fit the graph (KeyError('gone'))" in said


# ---- what is refused, before any work is done


def test_wrong_input(desk: Desk) -> None:
    put(desk, decoder(**WIDE))  # type: ignore[arg-type]
    words = ["dec.onnx", "--recipe", "int4"]
    assert "--kv-cache: 'int2' is not one of int8, uint8, int4" in desk.refused(
        *words, "--kv-cache", "int2"
    )
    assert desk.refused(*words, "--kv-cache", "int8") == (
        "--kv-cache int8 takes its scales from samples: give texts with --data."
    )
    assert "are not searched for with kv_cache" in desk.refused(
        "dec.onnx", "--data", "texts", "--kv-cache", "int8", "--min-sqnr", "20"
    )
    assert "the recipe leaves all but caches float" in desk.refused(
        "dec.onnx", "--data", "texts", "--recipe", "kv-cache", "--stats", "s.stats"
    )
    assert desk.refused("m.onnx", "--data", "d.npz", "--kv-cache", "int8") == (
        "--kv-cache int8: no input is joined with new tokens into an output (past_key_values.0.key and the like)."
    )


def test_uint8_in_group_query_attention(desk: Desk) -> None:
    put(desk, decoder(**WIDE, grouped=True))  # type: ignore[arg-type]
    assert desk.refused(
        "dec.onnx", "--data", "texts", "--recipe", "int4", "--kv-cache", "uint8"
    ) == (
        "--kv-cache uint8: the cache 'past_k' cannot be stored so: GroupQueryAttention stores int8 or int4, not "
        "uint8; nor can 1 more."
    )


def test_a_cache_that_is_quantized_already(desk: Desk) -> None:
    for grouped, said in ((False, "Linear"), (True, "GroupQueryAttention with integer caches")):
        put(desk, decoder(**WIDE, grouped=grouped))  # type: ignore[arg-type]
        compiled(desk, "--recipe", "kv-cache", "-o", f"o{grouped}.onnx")
        told = desk.refused(f"o{grouped}.onnx", "--data", "texts", "--kv-cache", "int8")
        assert told.startswith("the model is already quantized: node ")
        assert f"{said}. Give the float model that it was made from." in told


def test_large_models_are_not_run(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    put(desk, decoder(**WIDE))  # type: ignore[arg-type]
    monkeypatch.setattr(large.io, "EXTERNAL_BYTES", 1000)
    said = desk.refused("dec.onnx", "--data", "texts", "--recipe", "int4", "--kv-cache", "int8")
    assert "is not run here, and --kv-cache takes its scales from runs: leave it out." in said


# ---- what cannot be told is said


def other(model: ir.Model) -> ir.Model:
    """The decoder with its ids under another name."""
    model.graph.inputs[0].name = "tokens"
    return model


def test_ids_of_another_name(desk: Desk) -> None:
    io.save(other(decoder()), desk / "dec.onnx")
    feeds = [text_feed([i % 11 for i in ids]) for ids in TEXTS]
    named = [{"tokens": feed.pop("input_ids"), **feed} for feed in feeds]
    result = compile_model(desk / "dec.onnx", named, recipe=BUILT_IN["kv-cache"])
    assert result.kv_cache is not None
    assert result.kv_cache["perplexity"] is None
    assert result.kv_cache["greedy"] is None
    told = " ".join(result.warnings)
    assert (
        "Perplexity with the int8 cache is not known: held-out samples have no 'input_ids'" in told
    )
    assert (
        "Tokens with the int8 cache were not compared: no held-out sample has 'input_ids'." in told
    )


def test_one_cache_of_two(desk: Desk) -> None:
    text = """g (float[1,2,S,4] k, float[1,2,P,4] past_a, float[1,2,P,4] past_b) => (float[1,2,T,4] y, float[1,2,T,4] present_a) {
        present_a = Concat<axis = 2>(past_a, k) c = Concat<axis = 2>(past_b, k) y = Mul(present_a, c) }"""
    empty = np.zeros((1, 2, 0, 4), np.float32)
    feeds = [
        {"k": RNG.normal(size=(1, 2, 5, 4)).astype(np.float32), "past_a": empty, "past_b": empty}
        for _ in range(3)
    ]
    result = compile_model(parse(text), feeds, recipe=BUILT_IN["kv-cache"])
    assert result.kv_cache is not None
    assert result.kv_cache["caches"] == 1
    assert (
        "The cache 'past_b' stays as it is: its Concat with the new tokens is no output of the graph."
        in result.warnings
    )


def test_slower_is_no_success(desk: Desk, clock: Any) -> None:
    put(desk, decoder(**WIDE))  # type: ignore[arg-type]
    clock(0.5)
    found = compiled(desk, "--recipe", "kv-cache", code=NOT_FASTER)
    assert found["warnings"][0].startswith("the caches are smaller, but the result is not faster")


def test_a_mark_that_is_no_table() -> None:
    model = decoder()
    model.metadata_props[MARK] = "[]"
    with pytest.raises(ModelError, match="does not fit the graph"):
        stored_caches(model)
