"""Wrong input: one sentence that says what, where and what to do; exit 2; nothing is written."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Desk
from networks import conv_net, from_text, linear_net, rows, samples, save, set_weight
from onnx import helper

from qcompile.errors import PassError

pytestmark = pytest.mark.usefixtures("clock")

# ---- the model


def test_missing_model(desk: Desk) -> None:
    assert desk.refused("no.onnx") == "no.onnx does not exist: give the path of an ONNX model."
    assert "no/no.onnx does not exist" in desk.refused("no/no.onnx")
    for command in (
        ["plan", "no.onnx"],
        ["inspect", "no.onnx"],
        ["verify", "m.onnx", "no.onnx"],
        ["bench", "no.onnx", "m.onnx"],
    ):
        assert "no.onnx does not exist" in desk.refused(*command)


@pytest.mark.parametrize("place", [".", "..", "/", "a.onnx"])
def test_folder_as_model(desk: Desk, place: str) -> None:
    (desk / "a.onnx").mkdir()
    assert desk.refused(place) == f"{place} is a folder: give the path of the .onnx file inside it."


@pytest.mark.parametrize(
    "content", [b"", b"this is no model, but text", b"\x00" * 64, b"\x89PNG\r\n"]
)
def test_not_onnx(desk: Desk, content: bytes) -> None:
    (desk / "t.onnx").write_bytes(content)
    assert re.search(r"t\.onnx .*not an ONNX model", desk.refused("t.onnx", "--data", "d.npz"))


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_truncated(desk: Desk, share: float) -> None:
    whole = (desk / "m.onnx").read_bytes()
    (desk / "t.onnx").write_bytes(whole[: int(share * len(whole))])
    assert "t.onnx is not an ONNX model, or is truncated" in desk.refused("t.onnx")


def test_external_data(desk: Desk) -> None:
    save(conv_net(), desk / "e.onnx", data="e.data")
    assert desk.run("e.onnx", "--data", "d.npz").code == 0
    (desk / "e.int8.onnx").unlink()
    content = (desk / "e.data").read_bytes()
    (desk / "e.data").write_bytes(content[:100])
    message = desk.refused("e.onnx", "--data", "d.npz")
    assert message.startswith("the external data of tensor 'w0' is truncated: e.data has 100 bytes")
    (desk / "e.data").unlink()
    message = desk.refused("e.onnx", "--data", "d.npz")
    assert (
        message
        == "the external data of tensor 'w0' is missing: e.data does not exist. Put it beside e.onnx."
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["w1", "b0", "head", "gamma"])
def test_weight_that_is_no_number(desk: Desk, name: str, value: float) -> None:
    model = conv_net(norm=True)
    set_weight(model, name, value)
    save(model, desk / "n.onnx")
    message = desk.refused("n.onnx", "--data", "d.npz")
    assert message.startswith(f"weight {name!r} holds {value} at index (0")


def test_constant_node_that_is_no_number(desk: Desk) -> None:
    model = linear_net()
    (weight,) = (w for w in model.graph.initializer if w.name == "w1")
    model.graph.initializer.remove(weight)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w1"], value=weight))
    values = np.frombuffer(weight.raw_data, np.float32).copy()
    values[5] = np.nan
    model.graph.node[0].attribute[0].t.raw_data = values.tobytes()
    save(model, desk / "n.onnx")
    assert desk.refused("n.onnx").startswith("weight 'w1' holds nan at index (0, 5)")


def test_half_precision_weight_that_is_no_number(desk: Desk) -> None:
    model = conv_net(dtype=np.float16)
    set_weight(model, "w0", np.nan)
    save(model, desk / "n.onnx")
    assert "weight 'w0' holds nan" in desk.refused("n.onnx")


def test_masks_may_be_infinite(desk: Desk) -> None:
    text = """g (float[N,256] x) => (float[N,256] y) {
        h = MatMul(x, w) m = Add(h, mask) s = Softmax(m) y = MatMul(s, w)
    }"""
    mask = np.where(np.arange(256) < 4, -np.inf, 0).astype(np.float32)
    save(from_text(text, w=np.eye(256, dtype=np.float32), mask=mask), desk / "mask.onnx")
    assert desk.run("mask.onnx").code == 0


@pytest.mark.parametrize("format_name", ["qdq", "fused"])
def test_already_quantized(desk: Desk, format_name: str) -> None:
    desk.run("m.onnx", "--data", "d.npz", "-o", "q.onnx", "--format", format_name)
    message = desk.refused("q.onnx", "--data", "d.npz")
    assert message.startswith("the model is already quantized: node ")
    assert message.endswith("Give the float model that it was made from.")


def test_model_that_ort_cannot_load(desk: Desk) -> None:
    model = conv_net()
    model.graph.node[0].op_type, model.graph.node[0].domain = "Fancy", "mine"
    model.opset_import.append(helper.make_opsetid("mine", 1))
    save(model, desk / "c.onnx")
    message = desk.refused("c.onnx", "--data", "d.npz")
    assert message.startswith("ONNX Runtime refuses c.onnx: [ONNXRuntimeError]")
    assert "mine:Fancy(-1) is not a registered function/op" in message


def test_graph_with_a_loose_end(desk: Desk) -> None:
    model = conv_net()
    model.graph.node[0].input[0] = "nothing"
    save(model, desk / "c.onnx")
    assert "'nothing' is not a graph input" in desk.refused("c.onnx", "--data", "d.npz")


def test_input_that_is_no_tensor(desk: Desk) -> None:
    text = "g (seq(float[N,256]) s) => (float[M,256] y) { t = ConcatFromSequence<axis=0>(s) y = Relu(t) }"
    save(from_text(text), desk / "s.onnx")
    assert desk.refused("s.onnx").startswith("input 's' is no tensor of numbers or strings")


def test_float64(desk: Desk) -> None:
    save(conv_net(dtype=np.float64), desk / "f.onnx")
    np.savez(desk / "f.npz", x=samples(dtype=np.float64))
    for words in (["f.onnx"], ["f.onnx", "--data", "f.npz"]):
        message = desk.refused(*words)
        assert message == (
            "node '/conv0/Conv' is a Conv on float64, for which ONNX Runtime has no kernel: export the model in float32."
        )


def test_float64_that_ort_can_run(desk: Desk) -> None:
    text = "g (double[N,64] x) => (double[N,64] y) { y = MatMul(x, w) }"
    save(from_text(text, w=np.eye(64)), desk / "f.onnx")
    done = desk.run("f.onnx", "--json")
    assert done.code == 4
    (row,) = json.loads(done.out)["kept_float"]
    assert "float64" in row["why"]


def test_float16(desk: Desk) -> None:
    save(conv_net(dtype=np.float16), desk / "h.onnx")
    np.savez(desk / "h.npz", x=samples(dtype=np.float16))
    for words in (["h.onnx"], ["h.onnx", "--data", "h.npz"]):
        done = desk.run(*words, "--json")
        assert done.code == 4
        warning = json.loads(done.out)["warnings"][0]
        assert (
            warning
            == "nothing was quantized: Conv /conv0/Conv: works on float16, integer kernels take float32."
        )


def test_weight_without_elements(desk: Desk) -> None:
    text = "g (float[N,256] x) => (float[N,256] y, float[N,0] z) { z = MatMul(x, w0) y = MatMul(x, w1) }"
    model = from_text(text, w0=np.zeros((256, 0), np.float32), w1=np.eye(256, dtype=np.float32))
    save(model, desk / "z.onnx")
    assert desk.run("z.onnx").code == 0


def test_model_without_inputs(desk: Desk) -> None:
    text = "g () => (float[256,256] y) { y = MatMul(a, w) }"
    eye = np.eye(256, dtype=np.float32)
    save(from_text(text, a=eye, w=eye), desk / "n.onnx")
    assert desk.run("n.onnx").code in (0, 4)


# ---- the data


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": samples()}, "d2.npz has an array 'z', which is no input of the model (x): rename or drop it."),
        ({"X": samples()}, "d2.npz has an array 'X', which is no input of the model (x): rename or drop it."),
        (
            {"x": samples()[:, :2]},
            "d2.npz (sample 0): 'x' has shape [1, 2, 16, 16], the model wants float32[N, 3, 16, 16]: "
            "keep to the fixed dimensions.",
        ),
        (
            {"x": samples().astype(int)},
            "d2.npz (sample 0): 'x' holds int64, the model wants float32[N, 3, 16, 16]: convert the array.",
        ),
        ({"x": samples()[:0]}, "the calibration data holds no samples: check the source given with --data."),
    ],
)  # fmt: skip
def test_data_that_does_not_fit(desk: Desk, arrays: dict[str, Any], message: str) -> None:
    np.savez(desk / "d2.npz", **arrays)
    assert desk.refused("m.onnx", "--data", "d2.npz") == message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sample_that_is_no_number(desk: Desk, value: float) -> None:
    data = samples()
    data[3, 1, 2, 0] = value
    np.savez(desk / "d2.npz", x=data)
    assert desk.refused("m.onnx", "--data", "d2.npz") == (
        "d2.npz (sample 3): 'x' holds NaN or infinity, first at [0, 1, 2, 0]: correct the sample."
    )


@pytest.mark.parametrize("bad", [2, 4], ids=["calibrates", "judges"])
def test_nan_inside_the_model(desk: Desk, bad: int) -> None:
    model = conv_net()
    model.graph.node.insert(0, helper.make_node("Sqrt", ["x"], ["root"], "/root"))
    model.graph.node[1].input[0] = "root"
    save(model, desk / "n.onnx")
    data = np.abs(samples())
    data[bad] *= -1
    np.savez(desk / "d2.npz", x=data)
    message = desk.refused("n.onnx", "--data", "d2.npz")
    what = rf"(tensor|output) '\w+' is NaN for sample {bad} of the calibration data: "
    assert re.match(what, message)


def test_nan_inside_a_model_that_is_not_calibrated(desk: Desk) -> None:
    text = "g (float[N,256] x) => (float[N,256] y) { l = Log(x) y = MatMul(l, w) }"
    save(from_text(text, w=np.eye(256, dtype=np.float32)), desk / "n.onnx")
    data = np.abs(rows())
    data[9] = -1
    np.savez(desk / "d2.npz", x=data)
    assert desk.refused("n.onnx", "--data", "d2.npz").startswith(
        "output 'y' is NaN for sample 9 of"
    )
    done = desk.refused("verify", "n.onnx", "n.onnx", "--data", "d2.npz")
    assert done.startswith("output 'y' is NaN for sample 9: ")


def test_sample_that_does_not_run(desk: Desk) -> None:
    text = "g (int64[N,S] ids) => (float[N,S,256] y) { e = Gather(t, ids) y = MatMul(e, w) }"
    save(from_text(text, t=rows(50), w=rows(256)), desk / "e.onnx")
    np.savez(desk / "ids.npz", ids=np.full((4, 8), 1000))
    message = desk.refused("e.onnx", "--data", "ids.npz")
    assert message.startswith("the first sample of the calibration data does not run: ")
    assert "idx=1000" in message


def test_made_up_input_that_does_not_run(desk: Desk) -> None:
    text = "g (float[N,M] x) => (float[A,7] y) { r = Reshape(x, s) y = Relu(r) }"
    save(from_text(text, s=np.array([-1, 7])), desk / "r.onnx")
    message = desk.refused("r.onnx")
    assert message.startswith("a made-up input (give real ones with --data) does not run: ")


@pytest.mark.parametrize(
    ("name", "content", "words", "message"),
    [
        ("none", None, [], "there is no calibration data at 'none': give a file or folder that exists"),
        ("t.txt", "a text\n", [], "t.txt is text, which needs a tokenizer: set --tokenizer tokenizer.json."),
        ("t.txt", "a text\n", ["--tokenizer", "t.txt"], "text cannot fill input 'x' (float32[N, 3, 16, 16])"),
        ("t.csv", "1,2\n", [], "t.csv holds no calibration data: give a .npz, .npy, .txt or image file"),
        ("t.npz", "1,2\n", [], "t.npz is no array file that can be read"),
        ("t.png", "1,2\n", [], "t.png is no image that can be read"),
        ("t.jpg", "1,2\n", ["--size", "8x8"], "t.jpg"),
        ("no_such:feeds", None, [], "no_such:feeds: module 'no_such' cannot be imported"),
    ],
)  # fmt: skip
def test_source_that_is_none(
    desk: Desk, name: str, content: str | None, words: list[str], message: str
) -> None:
    if content is not None:
        (desk / name).write_text(content)
    said = desk.refused("m.onnx", "--data", name, *words)
    assert message in said


def test_wrong_tokenizer(desk: Desk) -> None:
    text = "g (int64[N,S] input_ids) => (float[N,S,64] y) { y = Gather(t, input_ids) }"
    save(from_text(text, t=np.ones((50, 64), np.float32)), desk / "e.onnx")
    (desk / "t.txt").write_text("a text\n")
    words = ["e.onnx", "--data", "t.txt"]
    assert "t.txt is text, which needs a tokenizer" in desk.refused(*words)
    message = desk.refused(*words, "--tokenizer", "t.txt")
    assert message.startswith("t.txt is no tokenizer that can be read (")


def test_empty_folder_as_data(desk: Desk) -> None:
    (desk / "empty").mkdir()
    assert "empty holds no calibration data" in desk.refused("m.onnx", "--data", "empty")


def test_function_that_gives_no_sample_or_fails(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (desk / "my_feeds.py").write_text(
        "import numpy as np\n"
        "def nothing():\n    return iter(())\n"
        "def broken():\n"
        "    yield {'x': np.zeros((1, 3, 16, 16), np.float32)}\n"
        "    raise KeyError('disk')\n"
    )
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert "holds no samples" in desk.refused("m.onnx", "--data", "my_feeds:nothing")
    message = desk.refused("m.onnx", "--data", "my_feeds:broken")
    assert "my_feeds:broken raised KeyError at sample 1" in message


# ---- options, recipes, plans, targets


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "MODEL.onnx is missing: see `qcompile --help`."),
        (["verify"], "FP32.onnx and QUANT.onnx is missing: see `qcompile verify --help`."),
        (["m.onnx", "--rangs", "mse"], "there is no option --rangs: see `qcompile --help`. Did you mean '--ranges'?"),
        (["m.onnx", "--out=x"], "there is no option --out: see `qcompile --help`."),
        (["m.onnx", "n.onnx"], "'n.onnx' is one word too many: see `qcompile --help`."),
        (["m.onnx", "-o"], "-o/--output needs a value: see `qcompile --help`."),
        (["-q", "plan", "m.onnx"], "the command comes first: qcompile plan ..."),
        (["m.onnx", "--ranges", "ms"], "--ranges: 'ms' is not one of auto, mean, minmax, percentile, mse, kl: see"),
        (["m.onnx", "--threads", "x"], "--threads: 'x' is not a whole number of 0 or more: see"),
        (["m.onnx", "--samples", "0"], "--samples: '0' is not a whole number of 1 or more: see"),
        (["m.onnx", "--min-sqnr", "nan"], "--min-sqnr: 'nan' is not a number: see"),
        (["m.onnx", "--size", "8x0"], "--size: '8x0' is not a size such as 224x224: see"),
        (["m.onnx", "--mean", "1,b"], "--mean: '1,b' is not a list of numbers such as 0.485,0.456,0.406: see"),
        (["bench", "m.onnx", "m.onnx", "--seconds", "0"], "--seconds: 0 is not above 0: see `qcompile bench --help`."),
        (["m.onnx", "--recipe", "int8-statc"], "there is no recipe 'int8-statc'. Did you mean 'int8-static'?"),
        (["m.onnx", "--target", "ort-cpu-x64-vnn"], "there is no target 'ort-cpu-x64-vnn'. Did you mean 'ort-cpu-x64-vnni'?"),
        (["m.onnx", "--keep-float", "/conv9/Conv"], "the pattern '/conv9/Conv' of --keep-float matches no node. The nearest names: "),
        (["m.onnx", "--keep-float", "re:("], "the pattern 're:(' of --keep-float is not a regular expression: "),
        (["m.onnx", "--plan", "no.json"], "plan no.json cannot be read: No such file or directory."),
    ],
)  # fmt: skip
def test_wrong_options(desk: Desk, words: list[str], message: str) -> None:
    assert message in desk.refused(*words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rangs = 'mse'", "recipe r.toml: unknown key 'rangs'. Did you mean 'ranges'?"),
        ("[data]\nsampels = 1", "recipe r.toml: unknown key 'data.sampels'. Did you mean 'samples'?"),
        ("[data.image]\ncrop = 'centre'", "recipe r.toml: 'data.image.crop' is 'centre', not one of center, none."),
        ("ranges = [", "recipe r.toml is not valid TOML: "),
    ],
)  # fmt: skip
def test_wrong_recipe(desk: Desk, text: str, message: str) -> None:
    (desk / "r.toml").write_text(text)
    assert message in desk.refused("m.onnx", "--data", "d.npz", "--recipe", "r.toml")


def _plan(**changes: Any) -> str:
    row = {"node": "/conv1/Conv", "op": "Conv", "form": "float"} | changes
    row = {key: value for key, value in row.items() if value is not None}
    return json.dumps({"version": 1, "target": "t", "activation": "a", "nodes": [row]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "plan p.json is not valid JSON: "),
        ("[]", "plan p.json is not a plan of version 1: write one with `qcompile plan`."),
        ('{"version": 2}', "plan p.json is not a plan of version 1"),
        ('{"version": 1}', "plan p.json lacks the key "),
        (_plan(form="flot"), "plan p.json: 'nodes[0].form' is 'flot', not one of static"),
        (_plan(form=3), "plan p.json: 'nodes[0].form' is 3, not one of static"),
        (_plan(form=None), "plan p.json lacks the key 'nodes[0].form'."),
        (_plan(why=["a"]), "plan p.json: 'nodes[0].why' is ['a'], expected text."),
        (_plan(frm="a"), "plan p.json: unknown key 'nodes[0].frm'. Did you mean 'form'?"),
        (_plan(node="/conv9/Conv"), "the plan has a node '/conv9/Conv' that the model has not"),
        (_plan().replace("[{", "[3, {"), "plan p.json: 'nodes[0]' is 3, expected a table."),
        (_plan().replace("[{", '[{"node": "/conv1/Conv", "op": "Conv", "form": "float"}, {'), "plan p.json has 2 entries for node '/conv1/Conv'"),
    ],
)  # fmt: skip
def test_wrong_plan(desk: Desk, text: str, message: str) -> None:
    (desk / "p.json").write_text(text)
    assert message in desk.refused("m.onnx", "--data", "d.npz", "--plan", "p.json")


# ---- the output


def test_missing_output_folder(desk: Desk) -> None:
    message = "the folder nowhere does not exist: create it, or change -o."
    assert desk.refused("m.onnx", "--data", "d.npz", "-o", "nowhere/q.onnx") == message
    assert desk.refused("plan", "m.onnx", "-o", "nowhere/p.json") == message


def test_output_that_is_the_input(desk: Desk) -> None:
    (desk / "link.onnx").symlink_to("m.onnx")
    os.link(desk / "m.onnx", desk / "hard.onnx")
    before = (desk / "m.onnx").read_bytes()
    for output in ("m.onnx", "./m.onnx", desk / "m.onnx", "link.onnx", "hard.onnx"):
        assert "is the input itself: choose another file with -o." in desk.refused(
            "m.onnx", "-o", output
        )
        assert "is the model itself: choose another" in desk.refused("plan", "m.onnx", "-o", output)
    assert (desk / "m.onnx").read_bytes() == before


def test_output_that_is_a_folder(desk: Desk) -> None:
    (desk / "q.onnx").mkdir()
    assert desk.refused("m.onnx", "-o", "q.onnx") == "q.onnx is a folder: name a file with -o."


def test_folder_that_cannot_be_written(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    true_access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: mode != os.W_OK and true_access(path, mode)
    )
    message = "m.int8.onnx cannot be written: check permissions, or choose another with -o."
    assert desk.refused("m.onnx", "--data", "d.npz") == message
    message = desk.refused("m.onnx", "-o", "/dev/null", "--report", "r")
    assert message.startswith("/dev/null cannot be written")


def test_full_disk(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path, __: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    message = desk.refused("m.onnx", "--data", "d.npz")
    assert message == "m.int8.onnx could not be written: No space left on device."


def test_report_that_cannot_be_written(desk: Desk) -> None:
    message = desk.refused("m.onnx", "--data", "d.npz", "--report", "d.npz")
    assert message == "the report cannot be written to d.npz: d.npz is a file."
    assert "d.npz is a file" in desk.refused("m.onnx", "--data", "d.npz", "--report", "d.npz/deep")


# ---- other ends


def test_models_that_do_not_belong_together(desk: Desk) -> None:
    save(from_text("g (float[N,4] x) => (float[N,4] z) { z = Relu(x) }"), desk / "z.onnx")
    save(from_text("g (float[N,4] a) => (float[N,4] y) { y = Relu(a) }"), desk / "a.onnx")
    for command in ("verify", "bench"):
        assert desk.refused(command, "m.onnx", "z.onnx") == (
            "z.onnx lacks the output 'y' of m.onnx: these are not the same model."
        )
        assert desk.refused(command, "m.onnx", "a.onnx") == (
            "a.onnx takes 'a', which m.onnx does not: these are not the same model."
        )


@pytest.mark.parametrize("place", ["qcompile.finish.race", "qcompile.graph.io.to_bytes"])
def test_interruption(desk: Desk, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    done = desk.run("m.onnx", "--data", "d.npz")
    assert (done.code, done.out, done.new) == (130, "", [])
    assert done.err == "qcompile: interrupted.\n"


@pytest.fixture(name="broken")
def make_broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    def set_error(error: Exception) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr("qcompile.commands.inspect_model", fail)

    return set_error


def test_full_disk_elsewhere(desk: Desk, broken: Callable[[Exception], None]) -> None:
    broken(OSError(28, "No space left on device", "/tmp/x"))
    assert desk.refused("inspect", "m.onnx") == "[Errno 28] No space left on device: '/tmp/x'"


def test_missing_packages(desk: Desk, broken: Callable[[Exception], None]) -> None:
    broken(ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"))
    assert desk.refused("inspect", "m.onnx") == (
        "ONNX Runtime is not installed: run `pip install qcompile-onnx[cpu]`, or [cuda] instead of [cpu]."
    )
    broken(ImportError("libgomp.so.1: cannot open shared object file", name="scipy._lib"))
    assert "cannot be imported (libgomp.so.1: cannot open" in desk.refused("inspect", "m.onnx")


def test_our_own_defects_keep_their_traceback(
    desk: Desk, broken: Callable[[Exception], None]
) -> None:
    broken(PassError("drop_identity changed the outputs"))
    with pytest.raises(PassError):
        desk.run("inspect", "m.onnx")


def test_debug_keeps_tracebacks(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_DEBUG", "1")
    with pytest.raises(Exception, match="does not exist"):
        desk.run("no.onnx")
