"""Calibrations from Python: what is gathered of which models, kept, joined, and compiled from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import conv_net, from_text, made_model, samples, save, set_weight
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from workbench import weight

from qcompile import Recipe, Result, compile_model
from qcompile.calib import store
from qcompile.calib.split import Samples
from qcompile.calib.statistics import Statistics
from qcompile.calibrate import Calibration, calibrate_model
from qcompile.errors import DataError, RecipeError
from qcompile.survey import survey

Feed = dict[str, NDArray[Any]]
pytestmark = pytest.mark.usefixtures("clock")

QUICK = Recipe(threads=1, bench_seconds=0.01)
FIXED = dataclasses.replace(QUICK, format="qdq", sqnr_goal=0, ranges="mean")
SKIP = dataclasses.replace(QUICK, skip_bad=True)
WIDE = weight(64, 64)


class Listed(list[Feed]):
    description = "listed"


def pictures(count: int = 12) -> list[Feed]:
    return [{"x": x[None]} for x in samples(count)]


def lines(count: int = 12, *, low: float = 0.5, high: float = 1.0) -> list[Feed]:
    """Samples of `x` (1, 64)."""
    return [
        {"x": np.random.default_rng(i).uniform(low, high, (1, 64)).astype(np.float32)}
        for i in range(count)
    ]


def wide(nodes: str, **weights: Any) -> onnx.ModelProto:
    """`x (N, 64)` -> the nodes -> `y (N, 64)`, with a weight `w`."""
    return from_text(f"g (float[N,64] x) => (float[N,64] y) {{ {nodes} }}", w=WIDE, **weights)


def gathered(model: Any, data: Any, recipe: Recipe = QUICK, **more: Any) -> Statistics:
    return calibrate_model(model, data, recipe=recipe, **more).statistics


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small convolutional net in a file."""
    return save(conv_net(), tmp_path / "m.onnx")


# ---- the product


def test_what_a_calibration_is(model: Path) -> None:
    made = calibrate_model(model, pictures(), recipe=QUICK)
    assert isinstance(made, Calibration)
    assert made.output == model.with_suffix(".stats")
    assert (made.passes, made.notes) == (1, ())
    found = made.statistics
    assert (found.key.title, found.samples, found.skipped, found.forced) == ("m.onnx", 10, 0, ())
    assert found.key.versions.keys() == {"qcompile", "onnxruntime"}
    (shard,) = found.key.shards
    split = Samples(Listed(pictures()))
    assert (shard.description, shard.digest) == ("12 feeds of the Python list", split.digest)
    assert shard.samples == split.calibration_count == 10
    assert same_feeds(found.held, list(split.held_out()))
    assert same_feeds(found.few, split.few(16))
    again = store.load(model.with_suffix(".stats"))
    assert again.key == found.key
    assert list(again.tensors) == list(found.tensors)
    assert {"x", "r0"} <= set(found.tensors)
    assert all(stats.count > 0 for stats in found.tensors.values())


def same_feeds(ours: Any, theirs: Any) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(np.array_equal(a[name], b[name]) for a, b in pairs for name in b)


def test_two_runs_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("a.stats", "b.stats"):
        calibrate_model(model, pictures(), output=tmp_path / name, recipe=QUICK, gram=True)
    assert (tmp_path / "a.stats").read_bytes() == (tmp_path / "b.stats").read_bytes()
    assert not model.with_suffix(".stats").exists()


def test_the_memory_allowed_changes_nothing(model: Path) -> None:
    once = gathered(model, pictures())
    made = calibrate_model(model, pictures(), recipe=dataclasses.replace(QUICK, memory=30_000))
    assert made.passes > 1
    assert made.notes[0].startswith(f"The data was read {made.passes} times")
    for name, want in once.tensors.items():
        got = made.statistics.tensors[name]
        assert got.extremes.lows.tolist() == want.extremes.lows.tolist()
        assert got.channels is not None and want.channels is not None
        assert got.channels.axis == want.channels.axis
        np.testing.assert_allclose(got.channels.sums, want.channels.sums, rtol=1e-9)


def test_models_given_in_any_way(model: Path) -> None:
    made = [calibrate_model(given, pictures(4), recipe=QUICK) for given in (model, str(model), onnx.load(model))]  # fmt: skip
    assert [m.output for m in made] == [model.with_suffix(".stats")] * 2 + [None]
    assert [m.statistics.key.title for m in made] == ["m.onnx", "m.onnx", "a model in memory"]
    assert len({m.statistics.key.model for m in made}) == 1


@pytest.mark.parametrize(("held_out", "held", "calibrated"), [(0, 0, 12), (1, 1, 11), (None, 2, 10), (99, 6, 6)])  # fmt: skip
def test_held_out(held_out: int | None, held: int, calibrated: int) -> None:
    found = gathered(wide("y = MatMul(x, w)"), lines(), held_out=held_out)
    assert (len(found.held), found.samples) == (held, calibrated)
    assert len(found.few) == (calibrated if held else 0)


# ---- compiled from


def compiled(model: Path, name: str, recipe: Recipe = FIXED, **more: Any) -> tuple[bytes, Result]:
    place = model.with_name(name)
    result = compile_model(model, output=place, recipe=recipe, **more)
    return place.read_bytes(), result


def assert_compiles_alike(model: Path, data: Any, recipe: Recipe, **more: Any) -> None:
    """From statistics of the data comes what comes from the data."""
    file = calibrate_model(model, data, recipe=FIXED).output
    wanted, first = compiled(model, "a.onnx", recipe, data=data, **more)
    got, second = compiled(model, "b.onnx", recipe, stats=file, **more)
    assert got == wanted
    assert second.samples == first.samples
    assert second.outputs == first.outputs
    assert "static" in {row["form"] for row in first.plan}


@pytest.mark.parametrize("ranges", ["mean", "percentile:99", "auto"])
def test_statistics_compile_as_the_data_does(model: Path, ranges: str) -> None:
    assert_compiles_alike(model, pictures(), dataclasses.replace(FIXED, ranges=ranges))


def test_a_reshape_that_stays_float(tmp_path: Path) -> None:
    """Behind it a tensor has the histogram of the one before."""
    net = from_text(
        "g (float[N,768] x) => (float[N,32,16,16] y) <int64[4] s = {0, 3, 16, 16}> "
        "{ r = Reshape(x, s) c = Conv<pads = [1, 1, 1, 1]>(r, k) d = Relu(c) t = Reshape(d, z) u = Reshape(t, v) "
        "y = Conv<pads = [1, 1, 1, 1]>(u, l) }",
        k=weight(32, 3, 3, 3), l=weight(32, 32, 3, 3), z=np.array([0, 32, 256]), v=np.array([0, 32, 16, 16]),
    )  # fmt: skip
    data = [{"x": x.reshape(1, -1)} for x in samples(12)]
    recipe = dataclasses.replace(FIXED, ranges="percentile:99", keep_float=("Reshape",))
    assert_compiles_alike(save(net, tmp_path / "m.onnx"), data, recipe)


def test_nodes_kept_float_later(tmp_path: Path) -> None:
    """A Relu that no Conv absorbs any more reads a tensor that the first plan did not need."""
    model = save(conv_net(), tmp_path / "m.onnx")
    stats = calibrate_model(model, pictures(), recipe=FIXED).output
    recipe = dataclasses.replace(FIXED, keep_float=("/conv1/Conv",))
    _, result = compiled(model, "a.onnx", recipe, stats=stats)
    forms = {row["node"]: row["form"] for row in result.plan}
    assert (forms["/conv1/Conv"], forms["/conv2/Conv"]) == ("float", "static")


def test_data_given_as_well(model: Path) -> None:
    stats = calibrate_model(model, pictures(), recipe=FIXED).output
    assert stats is not None
    alone, _ = compiled(model, "a.onnx", stats=stats)
    both, result = compiled(model, "b.onnx", stats=stats, data=pictures())
    assert alone == both
    assert not any("statistics" in note for note in result.notes)
    other = pictures(5)
    with pytest.raises(DataError) as caught:
        compiled(model, "c.onnx", stats=stats, data=other)
    ours = store.load(stats).key.shards[0].digest[:12]
    theirs = Samples(Listed(other)).digest[:12]
    sentence = (
        f"{stats} was gathered on other data: 12 feeds of the Python list ({ours}), and this is "
        f"5 feeds of the Python list ({theirs})"
    )
    assert str(caught.value).startswith(f"{sentence}. ")
    assert not model.with_name("c.onnx").exists()
    _, result = compiled(model, "c.onnx", stats=stats, data=other, force=True)
    assert f"{sentence} (forced)." in result.notes
    assert result.samples["held_out"] == 1


def test_statistics_without_samples(model: Path) -> None:
    stats = calibrate_model(model, pictures(), recipe=FIXED, held_out=0).output
    with pytest.raises(DataError, match=r"came without held-out samples .* with --data too\.$"):
        compiled(model, "a.onnx", stats=stats)
    _, result = compiled(model, "a.onnx", stats=stats, data=pictures())
    assert result.samples["held_out"] == 2


def test_statistics_of_another_model(model: Path) -> None:
    stats = calibrate_model(model, pictures(), recipe=FIXED).output
    other = conv_net()
    set_weight(other, "w0", 2.0)
    save(other, model.with_name("other.onnx"))
    match = r"m\.stats was gathered on another model: m\.onnx \(\w{12}\), and this is other\.onnx \(\w{12}\)"
    with pytest.raises(DataError, match=match):
        compiled(model.with_name("other.onnx"), "a.onnx", stats=stats)
    _, result = compiled(model.with_name("other.onnx"), "a.onnx", stats=stats, force=True)
    assert "another model" in result.notes[0]


def test_that_one_sample_served_for_both_is_still_known(model: Path) -> None:
    stats = calibrate_model(model, pictures(1), recipe=FIXED).output
    _, first = compiled(model, "a.onnx", data=pictures(1))
    _, second = compiled(model, "b.onnx", stats=stats)
    assert "Only one sample" in first.warnings[0]
    assert "Only one sample" in " ".join(second.warnings)


# ---- models and samples of many kinds


def test_ragged_shapes() -> None:
    rng = np.random.default_rng(0)
    net = from_text("g (float[N,S,64] x) => (float[N,S,64] y) { y = MatMul(x, w) }", w=WIDE)
    data = [{"x": rng.normal(size=(1 + i % 2, 1 + i % 5, 64)).astype("f4")} for i in range(11)]
    stats = gathered(net, data, held_out=0).tensors["x"]
    values = np.concatenate([feed["x"].reshape(-1, 64) for feed in data])
    assert stats.count == values.size
    assert (stats.low, stats.high) == (values.min(), values.max())
    assert stats.extremes.samples == 11
    assert stats.channels is not None
    np.testing.assert_allclose(stats.channels.mean(), values.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats.channels.peak(), np.abs(values).max(axis=0))


def test_several_inputs_of_several_types(tmp_path: Path) -> None:
    net = from_text(
        "g (int64[N,S] ids, float[N,S,64] x, string[N] s, bool[N] b) => (float[N,S,64] y, string[N] t, bool[N] u) "
        "{ e = Gather(table, ids) a = Add(e, x) y = MatMul(a, w) t = Identity(s) u = Not(b) }",
        w=WIDE, table=weight(10, 64),
    )  # fmt: skip
    data = [
        {"ids": np.full((1, 3), i), "x": np.full((1, 3, 64), i, "f4"), "s": np.array([f"é{i}"], object),
         "b": np.array([i % 2 == 0])} for i in range(6)
    ]  # fmt: skip
    found = gathered(net, data, output=tmp_path / "m.stats")
    assert set(found.tensors) >= {"a"}
    (held,) = store.load(tmp_path / "m.stats").held
    assert {name: value.dtype for name, value in held.items()} == {
        "ids": np.int64, "x": np.float32, "s": object, "b": bool,
    }  # fmt: skip
    assert held["s"].tolist() == ["é5"]


def test_bodies_are_named_as_unobserved() -> None:
    ends = [helper.make_tensor_value_info(name, 1, ["N", 64]) for name in ("t", "e", "x", "y")]
    then = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["t"], "in")], "t", [], ends[:1])  # fmt: skip
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["e"])], "e", [], ends[1:2])
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0), helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["h"], "choice", then_branch=then, else_branch=other),
        helper.make_node("MatMul", ["h", "w"], ["y"], "out"),
    ]  # fmt: skip
    weights = [numpy_helper.from_array(WIDE, "w"), numpy_helper.from_array(np.float32(40), "zero")]
    net = made_model(helper.make_graph(nodes, "g", ends[2:3], ends[3:], weights))
    found = gathered(net, lines())
    assert "h" in found.tensors
    assert found.unobserved == {
        "in": "MatMul in a body of If, Loop or Scan: only the main graph is observed"
    }


def test_float16() -> None:
    data = [{"x": x[None]} for x in samples(6, dtype=np.float16)]
    found = gathered(conv_net(convs=1, channels=8, dtype=np.float16), data, held_out=0)
    values = np.concatenate([feed["x"] for feed in data])
    assert (found.tensors["x"].low, found.tensors["x"].high) == (values.min(), values.max())
    assert found.tensors["x"].count == values.size


@pytest.mark.parametrize("empty", [[3], range(8)])
def test_tensors_without_values(empty: Any, tmp_path: Path) -> None:
    data = [{"x": np.ones((0 if i in empty else 1, 64), "f4")} for i in range(8)]
    found = gathered(wide("y = MatMul(x, w)"), data, held_out=0, output=tmp_path / "m.stats")
    assert found.samples == 8
    assert found.tensors["x"].count == 64 * (8 - len(empty))
    assert store.load(tmp_path / "m.stats").tensors["x"].count == found.tensors["x"].count
    json.dumps(survey(found), allow_nan=False)


def test_nothing_to_observe() -> None:
    net = from_text("g (int64[N] x) => (int64[N] y) { y = Add(x, x) }")
    made = calibrate_model(net, [{"x": np.arange(3)}], recipe=QUICK)
    assert (dict(made.statistics.tensors), made.statistics.samples, made.passes) == ({}, 1, 0)
    assert made.notes == ("Nothing could be observed: the main graph has no node with weights.",)
    with pytest.raises(RecipeError, match="there is nothing to gather: give samples with --data"):
        calibrate_model(net, recipe=QUICK)


# ---- bad samples


def spoiled(bad: Any, count: int = 12) -> list[Feed]:
    """Lines with a -1 at [0, 3] in these samples."""
    data = lines(count)
    for number in bad:
        data[number]["x"][0, 3] = -1
    return data


ROOT = "r = Sqrt(x) y = MatMul(r, w)"
LOG = "b = Relu(x) s = Log(b) y = MatMul(s, w)"


@pytest.mark.parametrize("bad", [0, 4])
def test_nan(bad: int, tmp_path: Path) -> None:
    match = rf"^tensor 'r' is NaN at index \[0, 3\] for sample {bad} of the calibration data: .* --skip-bad\.$"
    with pytest.raises(DataError, match=match):
        gathered(wide(ROOT), spoiled([bad]), output=tmp_path / "m.stats")
    assert not (tmp_path / "m.stats").exists()


@pytest.mark.parametrize("bad", [[2], [0], [2, 4], [11], [2, 11], [5, 11]])
def test_bad_samples_are_skipped(bad: list[int]) -> None:
    """Of 12 samples the last and one in the middle are held out; those must be good as well."""
    made = calibrate_model(wide(ROOT), spoiled(bad), recipe=SKIP)
    found = made.statistics
    assert found.skipped == len(bad)
    assert found.samples + len(found.held) == 12 - len(bad)
    assert found.tensors["r"].extremes.samples == found.samples
    assert str(len(bad)) in made.notes[0]
    kept = {float(feed["x"].min()) for feed in (*found.held, *found.few)}
    assert min(kept, default=0) >= 0


def test_all_samples_are_bad() -> None:
    with pytest.raises(DataError, match=r"sample 0 .*, and every other sample is bad as well\.$"):
        gathered(wide(ROOT), spoiled(range(12)), SKIP)


def test_an_infinity_of_one_sample() -> None:
    match = r"^tensor 's' is infinite at index \[0, 3\] for sample 4 of the calibration data"
    with pytest.raises(DataError, match=match):
        gathered(wide(LOG), spoiled([4]))
    found = gathered(wide(LOG), spoiled([4]), SKIP)
    assert (found.skipped, found.tensors["s"].infinite) == (1, 0)


@pytest.mark.parametrize("number", [5, 11])
def test_an_infinity_of_a_held_out_sample(number: int) -> None:
    found = gathered(wide(LOG), spoiled([number]), SKIP)
    assert (found.skipped, len(found.held)) == (1, 1)


def test_an_infinity_of_all_samples() -> None:
    found = gathered(wide(LOG), spoiled(range(12)), held_out=0)
    assert (found.samples, found.skipped, found.tensors["s"].infinite) == (12, 0, 12)
    assert not found.tensors["s"].bounded
    assert found.tensors["s"].count == 12 * 63
    json.dumps(survey(found), allow_nan=False)


@pytest.mark.parametrize("mask", [-1e9, -np.inf])
def test_an_infinity_in_a_model_with_masks(mask: float) -> None:
    """A constant like that says that infinities may be meant."""
    text = LOG.replace("y = ", "m = Where(never, mask, s) y = ").replace("(s, w)", "(m, w)")
    more = {"never": np.array(False), "mask": np.float32(mask)}
    assert gathered(wide(text, **more), spoiled([4])).tensors["m"].infinite == 1


@pytest.mark.parametrize("mask", [-1e9, float(np.finfo(np.float32).min), -np.inf])
def test_masks(mask: float) -> None:
    """What is observed of a tensor with some of it masked out can be shown."""
    net = from_text(
        "g (float[N,64] x, bool[N,64] hide) => (float[N,64] y) { t = Where(hide, mask, x) y = MatMul(t, w) }",
        w=WIDE / 1000, mask=np.float32(mask),
    )  # fmt: skip
    data = [feed | {"hide": np.arange(64)[None] > 20 + i} for i, feed in enumerate(lines())]
    found = gathered(net, data)
    assert (found.samples, found.tensors["t"].extremes.samples) == (10, 10)
    assert not found.tensors["t"].bounded
    json.dumps(survey(found), allow_nan=False)
