"""Which layers cost accuracy: the table of `qcompile inspect --layers`, its numbers and its command."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from networks import conv_net, from_text, linear_net, rows, samples, save
from onnx import numpy_helper
from workbench import PAD, QUICK, images, weight, workbench

from qcompile import harm, layers
from qcompile.errors import ModelError
from qcompile.layers import Layers, decibels, inspect_layers
from qcompile.progress import Silent
from qcompile.verify.layerwise import units_of
from qcompile.workshop import Ranging

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Desk

pytestmark = pytest.mark.usefixtures("clock")
PLAIN = dataclasses.replace(QUICK, equalize=False, smooth=False, target="ort-cpu-x64-vnni")
COLUMNS = {
    "name", "op", "form", "own_db", "inherited_db", "share", "grouped", "gained_ms", "gained",
}  # fmt: skip


def table(
    folder: Path, model: onnx.ModelProto, feeds: list[dict[str, Any]] | None, **options: Any
) -> Layers:
    save(model, folder / "model.onnx")
    if feeds is not None:
        (folder / "data").mkdir()
        for i, feed in enumerate(feeds):
            np.savez(folder / "data" / f"{i:03}.npz", **feed)
    recipe = dataclasses.replace(PLAIN, **options)
    data = None if feeds is None else str(folder / "data")
    return inspect_layers(str(folder / "model.onnx"), data, recipe, Silent())


def net_with(change: dict[str, Any]) -> onnx.ModelProto:
    model = conv_net()
    for tensor in model.graph.initializer:
        if tensor.name in change:
            values = change[tensor.name](numpy_helper.to_array(tensor).copy())
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def wide(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One channel is a hundred times as large."""
    values[3] *= 100
    return values


def deaf(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What reads it does not look at the large channel, which would else be all of the signal."""
    values[:, 3] = 0
    return values


def cnn_samples(count: int = 12) -> list[dict[str, Any]]:
    return [{"x": x[None]} for x in samples(count)]


# ---- numbers


def test_lines(tmp_path: Path) -> None:
    found = table(tmp_path, conv_net(), cnn_samples())
    assert {row.name for row in found.layers} == {"/conv1/Conv", "/conv2/Conv", "/pool", "r0"}
    shares = [row.share for row in found.layers]
    assert None not in shares
    assert math.fsum(share or 0 for share in shares) == pytest.approx(1)
    assert shares == sorted(shares, key=lambda share: -(share or 0))
    assert found.samples == 8
    assert not any(row.grouped for row in found.layers)
    (border,) = (row for row in found.layers if row.form == "border")
    assert (border.name, border.op, border.inherited_db) == ("r0", "QuantizeLinear", None)
    assert border.gained_ms is not None and border.gained_ms < 0
    assert found.fp32_ms == 2
    assert [row["node"] for row in found.kept_float] == ["/conv0/Conv", "/head/MatMul"]
    by_name = {row.name: row for row in found.layers}
    first, second = (by_name[f"/conv{i}/Conv"].inherited_db for i in (1, 2))
    assert first is not None and second is not None
    assert 20 < second < first  # errors pile up
    assert found.all_db == pytest.approx(found.sum_db, abs=2)


def test_a_planted_bad_conv_tops_the_table(tmp_path: Path) -> None:
    """Its other channels drown in the steps of one that is a hundred times as large."""
    change = {"w1": wide, "b1": wide, "w2": deaf}
    found = table(tmp_path, net_with(change), cnn_samples())
    first, second = found.layers[:2]
    assert first.name == "/conv1/Conv"
    assert first.share is not None and second.share is not None
    assert first.share > 0.9
    assert second.share < 0.1


def test_a_bad_weight_tops_the_table(tmp_path: Path) -> None:
    """A scale for each output channel serves a large one; a large input channel drowns the others."""

    def loud(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        values[:, 3] *= 1000
        return values

    def quiet(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        values[3] = 0
        return values

    found = table(tmp_path, net_with({"w1": quiet, "b1": quiet, "w2": loud}), cnn_samples())
    assert found.layers[0].name == "/conv2/Conv"
    assert found.layers[0].own_db is not None and found.layers[0].own_db < 10
    assert found.layers[0].share is not None and found.layers[0].share > 0.9


def test_bad_channels_that_are_mended_are_not_blamed(tmp_path: Path) -> None:
    """With the scales folded into weights that a compilation would fold."""
    change = {"w1": wide, "b1": wide, "w2": deaf}
    bare = table(tmp_path, net_with(change), cnn_samples())
    (tmp_path / "other").mkdir()
    mended = table(tmp_path / "other", net_with(change), cnn_samples(), equalize=True)
    assert mended.all_db is not None and bare.all_db is not None
    assert mended.all_db > bare.all_db + 8  # both with searched rounding
    assert any("channel scales folded" in note for note in mended.notes)


def test_dynamic_nodes(tmp_path: Path) -> None:
    found = table(tmp_path, linear_net(), [{"x": x[None]} for x in rows()])
    assert [row.form for row in found.layers] == ["dynamic", "dynamic"]
    assert math.fsum(row.share or 0 for row in found.layers) == pytest.approx(1)
    by_input = {row.op + str(row.inherited_db is None): row for row in found.layers}
    assert set(by_input) == {"MatMulTrue", "MatMulFalse"}  # the first one reads the float input
    assert all(row.own_db is not None and row.own_db > 25 for row in found.layers)


def test_without_data_times_alone(tmp_path: Path) -> None:
    found = table(tmp_path, linear_net(), None)
    assert [(row.share, row.own_db, row.inherited_db) for row in found.layers] == [(None,) * 3] * 2
    assert all(row.gained_ms is not None for row in found.layers)
    assert (found.samples, found.all_db, found.sum_db) == (0, None, None)
    assert "No data: only times are told. Give samples with --data to see errors." in found.notes


def test_nothing_to_blame(tmp_path: Path) -> None:
    model = from_text("g (float[N,4] x) => (float[N,4] y) { y = Tanh(x) }")
    found = table(tmp_path, model, [{"x": np.ones((1, 4), np.float32)}] * 3)
    assert found.layers == ()
    assert found.notes[-1] == "Nothing is quantized: there is nothing to blame."


def test_many_layers_are_measured_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harm, "_LARGE", 2)
    monkeypatch.setattr(harm, "_RUNS", 8)
    monkeypatch.setattr(harm, "_GROUPS", 2)
    monkeypatch.setattr(harm, "_SINGLE", 1)
    found = table(tmp_path, conv_net(), cnn_samples())
    assert found.samples == 2
    grouped = [row for row in found.layers if row.grouped]
    assert grouped
    assert len({row.share for row in grouped}) == 1
    assert any("groups of neighbours (~)" in note for note in found.notes)
    assert math.fsum(row.share or 0 for row in found.layers) == pytest.approx(1)


def test_a_graph_that_ort_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelError("no such graph.")

    monkeypatch.setattr(layers, "measure_harm", refuse)
    found = table(tmp_path, conv_net(), cnn_samples())
    assert "Errors were not measured: no such graph." in found.notes
    assert {row.share for row in found.layers} == {None}


def lstm_net(where: str) -> onnx.ModelProto:
    """An LSTM, in the main graph or in both bodies of an If."""
    node = "h, last = LSTM<hidden_size = 256>(x, w, r)"
    inside = """c = If (flag) <
        then_branch = one () => (float[4,1,1,256] a) { [lstm] a, b = LSTM<hidden_size = 256>(x, w, r) },
        else_branch = two () => (float[4,1,1,256] d) { d = Identity(zeros) }>"""
    text = node + " y = Identity(h)" if where == "main" else inside + " y = Identity(c)"
    rng = np.random.default_rng(3)
    return from_text(
        f"g (float[4,1,64] x, bool flag) => (float[4,1,1,256] y) {{ {text} }}",
        w=rng.normal(0, 0.1, (1, 1024, 64)).astype(np.float32),
        r=rng.normal(0, 0.1, (1, 1024, 256)).astype(np.float32),
        zeros=np.zeros((4, 1, 1, 256), np.float32),
    )


@pytest.mark.parametrize("where", ["main", "body"])
def test_nodes_that_have_no_switch(tmp_path: Path, where: str) -> None:
    """They are measured, and timed, in a model where they alone are quantized."""
    rng = np.random.default_rng(4)
    feeds = [
        {"x": rng.normal(size=(4, 1, 64)).astype(np.float32), "flag": np.array(True)}
        for _ in range(6)
    ]
    found = table(tmp_path, lstm_net(where), feeds)
    (row,) = found.layers
    assert (row.op, row.share) == ("LSTM", 1.0)
    assert row.gained_ms == pytest.approx(1.0)  # of 2 ms, at twice the speed
    assert row.inherited_db is None
    assert (row.own_db is None) == (where == "body")
    assert row.own_db is None or row.own_db == pytest.approx(found.all_db, abs=0.1)
    assert found.sum_db == pytest.approx(found.all_db)


def test_embeddings(tmp_path: Path) -> None:
    model = from_text(
        "g (int64[N,4] ids) => (float[N,4,256] y) { [rows] e = Gather(t, ids) [mul] m = MatMul(e, w) y = Tanh(m) }",
        t=weight(512, 256, scale=16.0), w=weight(256, 256, seed=1),
    )  # fmt: skip
    rng = np.random.default_rng(5)
    found = table(tmp_path, model, [{"ids": rng.integers(0, 512, (1, 4))} for _ in range(6)])
    by_name = {row.name: row for row in found.layers}
    assert by_name["rows"].form == "weight"
    assert by_name["rows"].gained_ms is None
    assert by_name["rows"].own_db is not None and by_name["rows"].own_db > 30
    assert by_name["rows"].inherited_db is None
    inherited, own = by_name["mul"].inherited_db, by_name["rows"].own_db
    assert inherited == pytest.approx(own, abs=2)


def test_what_a_last_sigmoid_reads_counts() -> None:
    """The rounding of the last sum, which only the Sigmoid behind it sees."""
    model = from_text(
        f"g (float[N,4,8,8] x) => (float[N,4,8,8] y) {{ [body] c = Conv<{PAD}>(x, l) [gate] y = Sigmoid(c) }}",
        l=weight(4, 4, 3, 3),
    )  # fmt: skip
    made = workbench(model, images())
    given = harm.quantized(made.shop, made.draft, Ranging("minmax"))
    units = units_of(given)
    assert [unit.name for unit in units] == ["body", "gate", "x"]
    found = harm.measure_harm(made.shop, given, units)
    share = found.outputs[units[0]] / sum(found.outputs.values())
    assert 0.2 < share < 0.9
    assert found.outputs[units[1]] < 1e-9  # what is judged is the Sigmoid's input


@pytest.mark.parametrize(
    ("ratio", "db"),
    [(0.01, 20.0), (1.0, 0.0), (0.0, None), (None, None), (math.nan, None), (math.inf, -300.0)],
)
def test_decibels(ratio: float | None, db: float | None) -> None:
    assert decibels(ratio) == (None if db is None else pytest.approx(db))


# ---- the command


def test_the_table_is_printed(desk: Desk) -> None:
    done = desk.run("inspect", "m.onnx", "--layers", "--data", "d.npz")
    assert (done.code, done.new, done.err) == (0, [], "")
    lines = done.out.splitlines()
    assert lines[0].split() == [
        "share", "own", "inherited", "gained", "form", "operator", "layer"
    ]  # fmt: skip
    assert any(line.endswith("/conv1/Conv") for line in lines)
    assert "all layers together" in done.out
    assert "left float:" in done.out
    few = desk.run("inspect", "m.onnx", "--layers", "--data", "d.npz", "--limit", "1").out
    assert "more:" in few.splitlines()[2]
    assert few.splitlines()[1].split()[0].endswith("%")


def test_the_table_as_json(desk: Desk) -> None:
    words = ["inspect", "m.onnx", "--layers", "--data", "d.npz", "--json"]
    found = json.loads(desk.run(*words).out)
    assert set(found) == {
        "model", "samples", "ranges", "fp32_ms", "all_db", "sum_db", "layers", "kept_float", "notes",
    }  # fmt: skip
    assert all(set(row) == COLUMNS for row in found["layers"])
    assert len(found["layers"]) > 3
    assert len(json.loads(desk.run(*words, "--limit", "2").out)["layers"]) == 2


def test_choices_are_obeyed(desk: Desk) -> None:
    words = ["inspect", "m.onnx", "--layers", "--data", "d.npz", "--json"]
    found = json.loads(desk.run(*words, "--keep-float", "/conv1/Conv").out)
    assert "/conv1/Conv" not in {row["name"] for row in found["layers"]}
    assert "/conv1/Conv" in {row["node"] for row in found["kept_float"]}
    found = json.loads(desk.run(*words, "--ranges", "minmax").out)
    assert found["ranges"] == "minmax"


def test_statistics_in_place_of_data(desk: Desk) -> None:
    desk.run("calibrate", "m.onnx", "--data", "d.npz", "-o", "m.stats")
    words = ["inspect", "m.onnx", "--layers", "--json"]
    stored = json.loads(desk.run(*words, "--stats", "m.stats").out)
    read = json.loads(desk.run(*words, "--data", "d.npz").out)
    assert [row["share"] for row in stored["layers"]] == pytest.approx(
        [row["share"] for row in read["layers"]]
    )
    assert desk.refused("inspect", "m.stats", "--layers") == (
        "m.stats holds statistics: qcompile inspect MODEL.onnx --layers --stats m.stats"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "d.npz"], "--data is for --layers: add that, or leave it out."),
        (["--limit", "3"], "--limit is for --layers: add that, or leave it out."),
        (["--keep-float", "x"], "--keep-float is for --layers: add that, or leave it out."),
        (["--no-smooth"], "--no-smooth is for --layers: add that, or leave it out."),
        (["--layers", "--limit", "0"], "--limit: '0' is not a whole number of 1 or more: see `qcompile inspect --help`."),
        (["--layers", "--keep-float", "none/such"], "keep_float"),
    ],
)  # fmt: skip
def test_wrong_words(desk: Desk, words: list[str], sentence: str) -> None:
    told = desk.refused("inspect", "m.onnx", *words)
    assert told == sentence or (not sentence.endswith(".") and "none/such" in told)


def test_samples_of_another_model(desk: Desk) -> None:
    np.savez(desk / "wrong.npz", z=samples())
    told = desk.refused("inspect", "m.onnx", "--layers", "--data", "wrong.npz")
    assert told.startswith("wrong.npz has an array 'z'")
