"""Whole compilations from Python: small models of three kinds, judged apart from the compiler."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from networks import conv_net, from_text, linear_net, rows, samples, save
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from regressions.case import session
from workbench import QUICK, weight

from qcompile import Recipe, Result, compile_model
from qcompile.calib.split import Samples
from qcompile.errors import DataError, ModelError, QcompileError, RecipeError
from qcompile.graph import io
from qcompile.plan.plan import load_plan
from qcompile.report import GOOD, INACCURATE, NOT_FASTER

Array = NDArray[Any]
Feed = dict[str, Array]
pytestmark = pytest.mark.usefixtures("clock")


def transformer(width: int = 128, words: int = 600) -> onnx.ModelProto:
    """`ids`, `mask` (b, s) -> a lookup, one block of attention and GELU, mean -> `y` (b, width)."""
    w = {name: weight(width, width, seed=i) for i, name in enumerate(("q", "k", "v", "o"))}
    w |= {"up": weight(width, 4 * width, seed=5), "down": weight(4 * width, width, seed=6)}
    nodes = """
        e = Gather(table, ids) n = LayerNormalization(e, one, none)
        q0 = MatMul(n, q) q1 = Add(q0, bq) k0 = MatMul(n, k) v0 = MatMul(n, v)
        q2 = Reshape(q1, heads) k2 = Reshape(k0, heads) v2 = Reshape(v0, heads)
        q3 = Transpose<perm = [0, 2, 1, 3]>(q2) k3 = Transpose<perm = [0, 2, 3, 1]>(k2) v3 = Transpose<perm = [0, 2, 1, 3]>(v2)
        s0 = MatMul(q3, k3) s1 = Mul(s0, scale) f = Cast<to = 1>(mask) g = Sub(unit, f) h = Mul(g, low) h1 = Unsqueeze(h, axes)
        s2 = Add(s1, h1) p = Softmax<axis = -1>(s2) c0 = MatMul(p, v3) c1 = Transpose<perm = [0, 2, 1, 3]>(c0)
        c2 = Reshape(c1, flat) c3 = MatMul(c2, o) r = Add(c3, e) m = LayerNormalization(r, one, none)
        u0 = MatMul(m, up) u1 = Add(u0, bu) d0 = Div(u1, root) d1 = Erf(d0) d2 = Add(d1, unit) d3 = Mul(u1, d2) d4 = Mul(d3, half)
        z0 = MatMul(d4, down) z = Add(z0, r) y = ReduceMean<axes = [1], keepdims = 0>(z)"""
    return from_text(
        f"g (int64[b,s] ids, int64[b,s] mask) => (float[b,{width}] y) {{ {nodes} }}",
        table=weight(words, width, scale=np.sqrt(words)), one=np.ones(width, np.float32), none=np.zeros(width, np.float32),
        bq=weight(width), bu=weight(4 * width), heads=np.array([0, 0, 4, width // 4], np.int64),
        flat=np.array([0, 0, width], np.int64), axes=np.array([1, 2], np.int64), scale=np.float32((width // 4) ** -0.5),
        unit=np.float32(1), half=np.float32(0.5), root=np.float32(2**0.5), low=np.float32(np.finfo(np.float32).min), **w,
    )  # fmt: skip


def sentences(count: int = 16, seed: int = 0) -> list[Feed]:
    """Of 3 to 24 tokens; some are padded."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(3, 25))
        mask = np.ones((1, length), np.int64)
        mask[0, int(rng.integers(2, length + 1)) :] = 0
        made.append({"ids": rng.integers(0, 600, (1, length)), "mask": mask})
    return made


def pictures(count: int = 15) -> list[Feed]:
    return [{"x": x[None]} for x in samples(count)]


def lines(count: int = 15) -> list[Feed]:
    return [{"x": x[None]} for x in rows(count)]


KINDS = {
    "cnn": (conv_net, pictures, {"static", "absorbed"}, 25.0),
    "mlp": (linear_net, lines, {"dynamic"}, 25.0),
    "transformer": (transformer, sentences, {"dynamic", "weight"}, 22.0),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def compiled(kind: str, folder: Path, **more: Any) -> tuple[onnx.ModelProto, list[Feed], Result]:
    make, data, _, _ = KINDS[kind]
    model, feeds = make(), data()
    return model, feeds, compile_model(model, feeds, output=folder / "o.onnx", recipe=QUICK, **more)


# ---- the result


def test_documented_fields(kind: str, tmp_path: Path) -> None:
    _, feeds, result = compiled(kind, tmp_path)
    assert isinstance(result, Result)
    assert (result.model, result.output) == (None, str(tmp_path / "o.onnx"))
    assert result.exit_code == GOOD
    assert result.recipe == "int8"
    assert result.format in ("fused", "qdq")
    assert result.seconds > 0
    assert result.peak_rss_mb > 10
    assert result.size_mb["after"] < result.size_mb["before"]
    assert result.latency.keys() == {"fp32_ms", "result_ms", "speedup", "feeds"}
    assert result.latency["speedup"] == 2.0
    calibration = Samples(feeds)
    assert result.samples == {
        "calibration": calibration.calibration_count,
        "held_out": calibration.held_out_count,
    }
    assert result.kernels.keys() == {"integer", "float", "leftover_qdq", "operators", "nodes"}
    assert result.kernels["integer"] > 0
    wanted = KINDS[kind][2]
    assert wanted <= {row["form"] for row in result.plan}
    assert {v["verdict"] for v in result.kernels["nodes"]} == {"integer"}
    assert all(row.keys() == {"node", "op", "why"} for row in result.kept_float)
    assert result.next_command.startswith("qcompile ")
    assert result.worst_db is not None
    assert result.worst_db > KINDS[kind][3]
    table = json.loads(result.to_json())
    assert table.keys() == {field.name for field in dataclasses.fields(Result)}


def independent(
    model: onnx.ModelProto, result: onnx.ModelProto, feeds: list[Feed], level: str
) -> dict[str, float]:
    """SQNR, cosine and largest error of the only output."""
    plain, ours = session(model, "all"), session(result, level)
    y = np.concatenate([plain.run(None, feed)[0].ravel() for feed in feeds]).astype(np.float64)
    z = np.concatenate([ours.run(None, feed)[0].ravel() for feed in feeds]).astype(np.float64)
    return {
        "sqnr_db": float(10 * np.log10(np.square(y).sum() / np.square(z - y).sum())),
        "cosine": float(y @ z / np.linalg.norm(y) / np.linalg.norm(z)),
        "max_abs_error": float(np.abs(z - y).max()),
    }


def test_the_errors_told_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    """Deployed and as written, on the samples that calibrated nothing."""
    model, feeds, result = compiled(kind, tmp_path)
    held = [feeds[i] for i in Samples(feeds).held_out_numbers]
    written = onnx.load(tmp_path / "o.onnx")
    (output,) = result.outputs
    for level, told in (("all", output["slices"]), ("off", output["exact"])):
        found = independent(model, written, held[:4] if level == "off" else held, level)
        assert told[0]["slice"] == "all"
        assert told[0]["sqnr_db"] == pytest.approx(found["sqnr_db"], abs=0.02)
        assert told[0]["cosine"] == pytest.approx(found["cosine"], abs=1e-5)
        assert told[0]["max_abs_error"] == pytest.approx(found["max_abs_error"], rel=1e-3)


def test_accurate_on_samples_never_seen(kind: str, tmp_path: Path) -> None:
    model, _, _ = compiled(kind, tmp_path)
    fresh = {
        "cnn": [{"x": x[None]} for x in samples(40)[30:]],
        "mlp": [{"x": x[None]} for x in rows(40)[30:]],
        "transformer": sentences(10, seed=9),
    }
    found = independent(model, onnx.load(tmp_path / "o.onnx"), fresh[kind], "all")
    assert found["sqnr_db"] > KINDS[kind][3] - 4


def test_the_same_file_twice(kind: str, tmp_path: Path) -> None:
    """Speeds are given here; all else is the compiler's."""
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        compiled(kind, tmp_path / name)
        files.append((tmp_path / name / "o.onnx").read_bytes())
    assert files[0] == files[1]


# ---- the model given


def test_what_is_given_is_not_changed(kind: str) -> None:
    make, data, _, _ = KINDS[kind]
    proto, feeds = make(), data()
    before, copies = (
        proto.SerializeToString(),
        [{k: v.copy() for k, v in feed.items()} for feed in feeds],
    )
    compile_model(proto, feeds, recipe=QUICK)
    assert proto.SerializeToString() == before
    for feed, copy in zip(feeds, copies, strict=True):
        for name in feed:
            np.testing.assert_array_equal(feed[name], copy[name])
    model = ir.from_proto(make())
    text = ir.to_onnx_text(model)
    names = [t.const_value.name for t in model.graph.initializers.values()]  # type: ignore[union-attr]
    compile_model(model, feeds, recipe=QUICK)
    assert ir.to_onnx_text(model) == text
    assert [t.const_value.name for t in model.graph.initializers.values()] == names  # type: ignore[union-attr]


def test_constants_of_nodes_are_not_renamed() -> None:
    """The tensor of a Constant node may have no name; as an initializer it gets one."""
    proto = from_text("g (float[N,256] x) => (float[N,64] y) { y = MatMul(x, w) }")
    value = numpy_helper.from_array(weight(256, 64))
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=value))
    before = proto.SerializeToString()
    model = ir.from_proto(onnx.ModelProto.FromString(before))
    text = ir.to_proto(model).SerializeToString()
    compile_model(proto, lines(4), recipe=QUICK)
    assert proto.SerializeToString() == before
    compile_model(model, lines(4), recipe=QUICK)
    assert ir.to_proto(model).SerializeToString() == text


def test_a_path_a_string_a_proto_and_a_model_are_alike(tmp_path: Path) -> None:
    path = save(conv_net(), tmp_path / "m.onnx")
    files = []
    for number, given in enumerate((path, str(path), conv_net(), ir.load(path), io.load(path))):
        place = tmp_path / f"{number}.onnx"
        compile_model(given, pictures(8), output=place, recipe=QUICK)
        files.append(place.read_bytes())
    assert len(set(files)) == 1


def test_without_output_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compile_model(conv_net(), pictures(4), recipe=QUICK).output is None
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_no_model() -> None:
    with pytest.raises(ModelError):
        compile_model(onnx.ModelProto(), pictures(4), recipe=QUICK)


# ---- data


def test_no_data_is_said_loudly_and_nothing_is_static() -> None:
    """Only forms that need no ranges; what stays float for want of data is counted."""
    mixed = from_text(
        "g (float[N,3,16,16] x) => (float[N,64] y) "
        "{ [c] c = Conv<pads = [1, 1, 1, 1]>(x, k) [r] r = Relu(c) [f] f = Flatten(r) [m] y = MatMul(f, w) }",
        k=weight(8, 3, 3, 3), w=weight(2048, 64),
    )  # fmt: skip
    result = compile_model(mixed, recipe=QUICK)
    forms = {row["node"]: row["form"] for row in result.plan}
    assert forms["c"] == forms["r"] == "float"
    assert forms["m"] == "dynamic"
    assert result.samples == {"calibration": 0, "held_out": 0}
    assert (
        "No calibration data: 1 Conv nodes stay float. Give samples with --data to quantize them."
        in result.warnings
    )
    assert any("measured on stand-in inputs, not on real ones" in w for w in result.warnings)
    assert result.exit_code == GOOD
    assert result.next_command.endswith("--data FOLDER_OF_SAMPLES")


def test_no_data_for_a_model_of_convolutions() -> None:
    result = compile_model(conv_net(), recipe=QUICK)
    assert result.exit_code == NOT_FASTER
    assert (
        "nothing was quantized: Conv /conv0/Conv and 2 more like it need calibration data, give it with --data."
        in result.warnings
    )


def test_static_forms_turned_off() -> None:
    result = compile_model(conv_net(), pictures(6), recipe=dataclasses.replace(QUICK, static=False))
    assert not {"static", "free"} & {row["form"] for row in result.plan}
    assert {row["why"] for row in result.kept_float if row["op"] == "Conv"} == {
        "static quantization is off"
    }


def test_dynamic_forms_turned_off() -> None:
    result = compile_model(linear_net(), lines(6), recipe=dataclasses.replace(QUICK, dynamic=False))
    assert {row["form"] for row in result.plan} == {"float"}
    assert result.exit_code == NOT_FASTER


def test_any_iterable_of_feeds() -> None:
    """Lists, generators, arrays, a reader of ONNX Runtime: all the same."""

    class Reader:
        def __init__(self) -> None:
            self._left = iter(pictures(8))

        def get_next(self) -> Feed | None:
            return next(self._left, None)

    given = [pictures(8), (feed for feed in pictures(8)), samples(8), {"x": samples(8)}, Reader()]
    results = [compile_model(conv_net(), data, recipe=QUICK) for data in given]
    assert {r.worst_db for r in results} == {results[0].worst_db}


def test_nan_in_the_data_names_the_sample() -> None:
    feeds = pictures(6)
    feeds[3]["x"][0, 1, 2, 3] = np.nan
    with pytest.raises(DataError, match="sample 3"):
        compile_model(conv_net(), feeds, recipe=QUICK)


def test_a_model_that_makes_nan_names_tensor_and_sample() -> None:
    model = from_text(
        "g (float[N,256] x) => (float[N,64] y) { r = Sqrt(x) [m] y = MatMul(r, w) }",
        w=weight(256, 64),
    )
    feeds = [{"x": np.abs(feed["x"])} for feed in lines(6)]
    held = Samples(feeds).held_out_numbers[0]
    feeds[held]["x"][0, 0] = -1
    with pytest.raises(
        DataError, match=f"output 'y' is NaN for sample {held} of the calibration data"
    ):
        compile_model(model, feeds, recipe=QUICK)


# ---- options


def test_a_plan_that_was_edited(tmp_path: Path) -> None:
    compile_model(conv_net(), pictures(6), recipe=QUICK, report=tmp_path)
    plan = load_plan(tmp_path / "plan.json")
    edited = plan.keep_float(["/conv1/Conv"], "mine")
    result = compile_model(conv_net(), pictures(6), recipe=QUICK, plan=edited)
    forms = {row["node"]: row for row in result.plan}
    assert forms["/conv1/Conv"]["form"] == "float"
    assert forms["/conv1/Conv"]["why"] == "set in the plan"
    assert forms["/conv2/Conv"]["form"] == "static"
    again = compile_model(conv_net(), pictures(6), recipe=QUICK, plan=plan)
    assert [row["form"] for row in again.plan] == [entry.form for entry in plan.nodes]


def test_a_plan_of_another_model(tmp_path: Path) -> None:
    compile_model(linear_net(), lines(6), recipe=QUICK, report=tmp_path)
    with pytest.raises(RecipeError, match="the plan has a node 'MatMul:h' that the model has not"):
        compile_model(conv_net(), pictures(6), recipe=QUICK, plan=load_plan(tmp_path / "plan.json"))


def test_options_reach_the_result() -> None:
    recipe = Recipe(
        name="mine",
        ranges="kl",
        format="qdq",
        keep_float=("/conv0",),
        threads=1,
        bench_seconds=0.01,
    )
    result = compile_model(conv_net(), pictures(6), recipe=recipe, target="ort-cpu-x64-avx2")
    assert (result.recipe, result.ranges, result.format, result.target) == (
        "mine",
        "kl",
        "qdq",
        "ort-cpu-x64-avx2",
    )
    forms = {row["node"]: row["form"] for row in result.plan}
    assert forms["/conv0/Conv"] == "float"
    assert forms["/conv1/Conv"] == "static"


def test_exit_codes_of_speed_and_accuracy(clock: Any) -> None:
    clock(0.9)
    assert compile_model(conv_net(), pictures(6), recipe=QUICK).exit_code == NOT_FASTER
    demanding = dataclasses.replace(QUICK, min_sqnr=150.0)
    assert compile_model(conv_net(), pictures(6), recipe=demanding).exit_code == INACCURATE
    clock(1.3)
    assert compile_model(conv_net(), pictures(6), recipe=QUICK).exit_code == GOOD


def test_all_errors_are_of_one_kind() -> None:
    for given, data in (
        (conv_net(), []),
        (conv_net(), [{"z": 1}]),
        ("no.onnx", None),
        (conv_net(), [{"x": np.zeros(3)}]),
    ):
        with pytest.raises(QcompileError):
            compile_model(given, data, recipe=QUICK)
