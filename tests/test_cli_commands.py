"""The commands beside compilation, end to end on small models."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import Desk
from networks import conv_net, from_text, linear_net, rows, save

pytestmark = pytest.mark.usefixtures("clock")


def test_plan_is_printed(desk: Desk) -> None:
    done = desk.run("plan", "m.onnx")
    assert (done.code, done.new, done.err) == (0, [], "")
    lines = done.out.splitlines()
    assert lines[0].split() == ["node", "op", "form", "weight", "why"]
    assert [line.split()[0] for line in lines[1:3]] == ["/conv0/Conv", "/conv0/Relu"]
    table = json.loads(desk.run("plan", "m.onnx", "--json").out)
    assert set(table) == {"version", "target", "activation", "nodes"}
    assert len(table["nodes"]) == len(lines) - 1


def test_plan_is_written_edited_and_obeyed(desk: Desk) -> None:
    done = desk.run("plan", "m.onnx", "--data", "d.npz", "-o", "my plan.json")
    assert done.new == ["work/my plan.json"]
    assert done.out.rstrip().endswith("then: qcompile m.onnx --plan 'my plan.json'")
    text = (desk / "my plan.json").read_text("utf-8")
    table = json.loads(text)
    forms = {row["node"]: row["form"] for row in table["nodes"]}
    assert forms["/conv2/Conv"] == "static"
    same = desk.compiled("--plan", "my plan.json")
    assert {row["node"]: row["form"] for row in same["plan"]} == forms
    for row in table["nodes"]:
        if row["node"] == "/conv2/Conv":
            row["form"] = "float"
    (desk / "my plan.json").write_text(json.dumps(table), "utf-8")
    edited = desk.compiled("--plan", "my plan.json")
    (row,) = (row for row in edited["plan"] if row["node"] == "/conv2/Conv")
    assert (row["form"], row["why"]) == ("float", "set in the plan")
    assert any(row["node"] == "/conv1/Conv" and row["form"] == "static" for row in edited["plan"])
    assert not any(row["node"] == "/conv2/Conv" for row in edited["kernels"]["nodes"])
    shown = json.loads(desk.run("plan", "m.onnx", "--plan", "my plan.json", "--json").out)
    assert {r["node"]: r["form"] for r in shown["nodes"]}["/conv2/Conv"] == "float"


def test_plan_that_asks_for_what_cannot_be(desk: Desk) -> None:
    table = json.loads(desk.run("plan", "m.onnx", "--json").out)
    for row in table["nodes"]:
        if row["node"] in ("/conv0/Conv", "/head/MatMul"):
            row["form"] = "static"
    (desk / "p.json").write_text(json.dumps(table))
    result = desk.compiled("--plan", "p.json")
    forms = {row["node"]: row["form"] for row in result["plan"]}
    assert forms["/conv0/Conv"] == "static"
    assert forms["/head/MatMul"] == "float"
    (note,) = (note for note in result["notes"] if "was set to" in note)
    assert note.startswith(
        "/head/MatMul (MatMul) was set to static and is float: too small to gain"
    )


def test_inspect(desk: Desk) -> None:
    table = json.loads(desk.run("inspect", "m.onnx", "--json").out)
    assert set(table) == {
        "model", "mb", "opset", "inputs", "outputs", "nodes", "operators", "weights_mb", "functions",
        "graphs", "quantized_nodes", "sha256", "made",
    }  # fmt: skip
    assert table["inputs"] == {"x": "float32[N, 3, 16, 16]"}
    assert table["operators"]["Conv"] == 3
    assert table["quantized_nodes"] == 0
    done = desk.run("inspect", "m.onnx")
    assert (done.code, done.new, done.err) == (0, [], "")
    assert "float32[N, 3, 16, 16]" in done.out
    desk.compiled("--format", "qdq")
    result = json.loads(desk.run("inspect", "m.int8.onnx", "--json").out)
    assert result["quantized_nodes"] >= 4
    assert table["made"] == {}
    assert result["made"]["qcompile.source.sha256"] == table["sha256"] != result["sha256"]


def test_verify(desk: Desk) -> None:
    desk.compiled()
    words = ["verify", "m.onnx", "m.int8.onnx", "--data", "d.npz"]
    done = desk.run(*words, "--json")
    table = json.loads(done.out)
    assert (done.code, done.new, done.err) == (0, [], "")
    assert set(table) == {"fp32", "quantized", "samples", "outputs", "warnings"}
    assert table["samples"] == 10
    assert table["outputs"][0]["slices"][0]["sqnr_db"] > 30
    assert table["outputs"][0]["exact"][0]["sqnr_db"] > 30
    shown = desk.run(*words)
    assert "10 samples" in shown.out
    assert "SQNR" in shown.out
    limited = desk.run(*words, "--min-sqnr", "200", "--json")
    assert limited.code == 3
    assert "the limit is 200 dB" in json.loads(limited.out)["warnings"][0]
    made_up = desk.run("verify", "m.onnx", "m.onnx")
    assert made_up.code == 0
    assert "1 sample\n" in made_up.out
    assert "equal" in made_up.out
    assert "measured on stand-in inputs" in made_up.out


def test_verify_says_what_is_dead(desk: Desk) -> None:
    text = "g (float[N,256] x) => (float[N,256] y) { z = Sub(x, x) y = Relu(z) }"
    save(linear_net(), desk / "l.onnx")
    save(from_text(text), desk / "dead.onnx")
    np.savez(desk / "l.npz", x=rows())
    done = desk.run("verify", "l.onnx", "dead.onnx", "--data", "l.npz", "--json")
    assert done.code == 3
    assert json.loads(done.out)["warnings"] == [
        "output 'y' is constant: all its information is lost."
    ]


def test_bench(desk: Desk) -> None:
    words = ["bench", "m.onnx", "m.onnx", "--data", "d.npz", "--seconds", "0.1"]
    done = desk.run(*words, "--json")
    table = json.loads(done.out)
    assert (done.code, done.new, done.err) == (0, [], "")
    assert set(table) == {"latency", "size_mb", "inputs"}
    assert table["latency"] == [
        {"feed": "1x3x16x16", "fp32_ms": 2.0, "quantized_ms": 1.0, "speedup": 2.0, "rounds": 3}
    ]
    assert table["inputs"] == "data"
    assert "speedup 2.0" in desk.run(*words).out
    assert json.loads(desk.run(*words[:3], "--json").out)["inputs"] == "stand-in"


def test_targets(desk: Desk) -> None:
    table = json.loads(desk.run("targets", "--json").out)
    assert [row["name"] for row in table["targets"]] == [
        "ort-cpu-arm64", "ort-cpu-x64-avx2", "ort-cpu-x64-vnni",
    ]  # fmt: skip
    assert sum(row["this_machine"] for row in table["targets"]) <= 1
    assert "ort-cpu-x64-vnni" in desk.run("targets").out


def test_a_command_is_a_command_even_beside_a_file_of_its_name(desk: Desk) -> None:
    save(conv_net(), desk / "targets")
    assert "targets" in json.loads(desk.run("targets", "--json").out)
    assert desk.run("./targets", "--data", "d.npz", "--json").new == ["work/targets.int8.onnx"]
