"""What a file says of itself: all that the float model said, and where it comes from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from language_models import language, texts
from networks import conv_net, samples, save
from onnx import helper

import qcompile
from qcompile import compile_model
from qcompile.calibrate import calibrate_model
from qcompile.graph import io
from qcompile.graph.digest import digest
from qcompile.provenance import options
from qcompile.recipe import BUILT_IN, Recipe
from qcompile.run.session import version

FEEDS = [{"x": image[None]} for image in samples(12)]
STATIC = {name: ("int8-static", {"format": name}) for name in ("qdq", "fused")}
FEW = {name: (name, {}) for name in ("int4", "int8-weights")}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {**STATIC, **FEW}


def dressed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with documentation and metadata wherever ONNX has room for it; outputs behind a kept Sin and a function."""
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    double = helper.make_function("org.local", "Double", ["a"], ["b"], body, model.opset_import)
    model.functions.append(double)
    graph, (y,) = model.graph, model.graph.output
    graph.node.append(helper.make_node("Sin", [y.name], ["s"], "/tail/Sin"))
    graph.node.append(
        helper.make_node("Double", ["s"], ["twice"], "/tail/Double", domain="org.local")
    )
    kept = helper.make_tensor_value_info("s", 1, ["N", "kept"])
    kept.doc_string = "about s"
    kept.metadata_props.add(key="v", value="s")
    graph.value_info.append(kept)
    graph.output.append(helper.make_tensor_value_info("twice", 1, None))
    note = graph.quantization_annotation.add(tensor_name="s")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="there")
    model.ir_version, model.model_version, model.domain = 10, 7, "org.example"
    model.producer_name, model.producer_version, model.doc_string = "exporter", "2.9", "about it"
    model.metadata_props.add(key="labels", value="cat,dog")
    for domain in ("org.local", "org.example.ops"):
        model.opset_import.add(domain=domain, version=3)
    graph.doc_string = "about the graph"
    graph.metadata_props.add(key="g", value="1")
    for item in (*graph.node, *graph.input, y):
        item.doc_string = f"about {item.name}"
        item.metadata_props.add(key="k", value=item.name)
    for weight in graph.initializer:
        weight.doc_string = f"about {weight.name}"
    return model


@pytest.fixture(scope="module", params=RECIPES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dressed model, and what a recipe makes of it."""
    name, more = RECIPES[request.param]
    conv = name == "int8-static"
    model = dressed(conv_net() if conv else language(layers=1))
    recipe = dataclasses.replace(
        BUILT_IN[name], timing=False, bench_seconds=0.01, threads=1, **more
    )
    path = tmp_path_factory.mktemp("made") / "o.onnx"
    result = compile_model(model, FEEDS if conv else texts(12), output=path, recipe=recipe)
    assert result.kernels["integer"] >= 3
    return model, onnx.load(path)


def props(item: Any) -> dict[str, str]:
    return {prop.key: prop.value for prop in item.metadata_props}


def test_the_model_says_what_it_said(made: Any) -> None:
    before, after = made
    for field in ("doc_string", "domain", "model_version"):
        assert getattr(after, field) == getattr(before, field)
    assert props(after).items() >= {"labels": "cat,dog"}.items()
    assert after.ir_version >= before.ir_version
    assert props(after)["qcompile.source.producer"] == "exporter 2.9"
    assert (after.producer_name, after.producer_version) == ("qcompile", qcompile.__version__)


def test_opsets_are_imported_as_before(made: Any) -> None:
    before, after = ({o.domain: o.version for o in model.opset_import} for model in made)
    assert after.items() >= before.items()
    assert after.keys() - before.keys() <= {"com.microsoft"}


def test_functions_are_expanded(made: Any) -> None:
    """Not lost: their nodes stand in the graph."""
    _, after = made
    assert not after.functions
    (last,) = (node for node in after.graph.node if "twice" in node.output)
    assert (last.op_type, list(last.input)) == ("Add", ["s", "s"])


def test_the_graph_says_what_it_said(made: Any) -> None:
    before, after = (model.graph for model in made)
    assert (after.name, after.doc_string) == (before.name, "about the graph")
    assert props(after) == {"g": "1"}


def test_nodes_say_what_they_said(made: Any) -> None:
    """Also those that became integer kernels."""
    before, after = ({n.name: n for n in model.graph.node if n.name} for model in made)
    both = before.keys() & after.keys()
    assert {n.op_type for n in before.values()} - {before[n].op_type for n in both} <= {
        "Double", "Relu", "Transpose",
    }  # fmt: skip
    changed = [name for name in both if after[name].op_type != before[name].op_type]
    for name in both:
        assert after[name].doc_string == f"about {name}"
        assert props(after[name])["k"] == name
    fused = any("QLinear" in node.op_type or "Bits" in node.op_type for node in after.values())
    assert bool(changed) == fused


def test_inputs_and_outputs_say_what_they_said(made: Any) -> None:
    before, after = (model.graph for model in made)
    for kind in ("input", "output"):
        one, other = list(getattr(before, kind)), list(getattr(after, kind))
        assert [v.name for v in one] == [v.name for v in other]
        assert [v.doc_string for v in one] == [v.doc_string for v in other]
        assert [props(v) for v in one] == [props(v) for v in other]
        assert [v.type.tensor_type.elem_type for v in one] == [
            v.type.tensor_type.elem_type for v in other
        ]


def test_kept_tensors_say_what_they_said(made: Any) -> None:
    """The type, the names of axes, and the annotation of a tensor; the documentation of a weight."""
    before, after = (model.graph for model in made)
    infos = ({v.name: v for v in graph.value_info} for graph in (before, after))
    one, other = (found["s"] for found in infos)
    assert one == other
    assert list(before.quantization_annotation) == list(after.quantization_annotation)
    weights = {w.name: w.doc_string for w in before.initializer}
    kept = [w for w in after.initializer if w.name in weights]
    assert kept
    assert all(w.doc_string == weights[w.name] for w in kept)


# ---- where it comes from


def compiled(folder: Path, data: Any = FEEDS, **more: Any) -> dict[str, str]:
    folder.mkdir()
    path, out = save(conv_net(), folder / "m.onnx"), folder / "o.onnx"
    more = {"timing": False, "bench_seconds": 0.01, "format": "fused", **more}
    stats = more.pop("stats", None)
    compile_model(path, data, output=out, recipe=Recipe(**more), stats=stats)
    return {k: v for k, v in props(onnx.load(out)).items() if k.startswith("qcompile.")}


def test_where_a_file_comes_from(tmp_path: Path) -> None:
    told = compiled(tmp_path / "a", keep_float=("/conv0/Conv",), threads=1)
    assert told["qcompile.version"] == qcompile.__version__
    assert told["qcompile.onnxruntime"] == version()
    assert told["qcompile.source.sha256"] == digest(io.load(tmp_path / "a" / "m.onnx"))
    assert told["qcompile.data.samples"] == "10"
    assert json.loads(told["qcompile.options"]) == {
        "timing": False, "format": "fused", "keep_float": ["/conv0/Conv"],
    }  # fmt: skip
    hashes = [told[f"qcompile.{key}.sha256"] for key in ("source", "data", "ranges")]
    assert all(len(found) == 64 for found in hashes)
    assert str(tmp_path) not in json.dumps(told)


def test_what_changes_the_result_changes_what_is_told(tmp_path: Path) -> None:
    one = compiled(tmp_path / "one", threads=1)
    assert compiled(tmp_path / "same", threads=2, memory=1 << 20) == one
    others = compiled(tmp_path / "data", FEEDS[::-1])
    assert others["qcompile.data.sha256"] != one["qcompile.data.sha256"]
    assert others["qcompile.source.sha256"] == one["qcompile.source.sha256"]
    ranges = compiled(tmp_path / "ranges", ranges="percentile:90")
    assert ranges["qcompile.ranges.sha256"] != one["qcompile.ranges.sha256"]
    assert ranges["qcompile.data.sha256"] == one["qcompile.data.sha256"]


def test_statistics_tell_the_data_that_they_are_of(tmp_path: Path) -> None:
    direct = compiled(tmp_path / "direct")
    path = tmp_path / "direct" / "m.onnx"
    calibrate_model(path, FEEDS, output=tmp_path / "m.stats", recipe=Recipe())
    stored = compiled(tmp_path / "stored", None, stats=tmp_path / "m.stats")
    for key in ("qcompile.data.sha256", "qcompile.data.samples"):
        assert stored[key] == direct[key]


def test_without_data_nothing_is_told_of_it(tmp_path: Path) -> None:
    told = compiled(tmp_path / "none", None)
    assert not any("data" in key or key == "qcompile.ranges.sha256" for key in told)


def test_weights_outside_of_the_file_count(tmp_path: Path) -> None:
    inside = io.load(save(conv_net(), tmp_path / "in.onnx"))
    outside = io.load(save(conv_net(), tmp_path / "out.onnx", data="w.bin"))
    assert digest(inside) == digest(outside)
    size = np.fromfile(tmp_path / "w.bin", np.uint8)
    size[100] ^= 1
    size.tofile(tmp_path / "w.bin")
    assert digest(io.load(tmp_path / "out.onnx")) != digest(inside)


def a_metric(session: Any) -> float:
    return float(bool(session))


def test_options_hold_no_paths(tmp_path: Path) -> None:
    data = dataclasses.replace(Recipe().data, tokenizer=tmp_path / "tokenizer.json")
    recipe = Recipe(data=data, target=str(tmp_path / "mine.toml"), metric=a_metric, max_drop="1%")
    assert options(recipe) == {
        "data": {"tokenizer": "tokenizer.json"}, "target": "mine.toml", "metric": "a_metric", "max_drop": "1%",
    }  # fmt: skip
    assert options(Recipe(threads=7)) == {}
