"""Wrong options, recipes, plans and outputs: one sentence; exit 2; nothing is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Desk
from networks import from_text, save

from qcompile.errors import PassError

pytestmark = pytest.mark.usefixtures("clock")

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
        (["m.onnx", "--ranges", "ms"], "--ranges: 'ms' is not one of auto, minmax, mean, moving-average, percentile, mse, kl: see"),
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
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qcompile.graph.wire.write", full)
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


def test_output_that_is_something_else_that_is_read(desk: Desk) -> None:
    before = (desk / "d.npz").read_bytes()
    sentence = desk.refused("m.onnx", "--data", "d.npz", "-o", "d.npz")
    assert "is the calibration data itself: choose another file with -o." in sentence
    assert (desk / "d.npz").read_bytes() == before
    (desk / "p.json").write_text("{}")
    assert "is named as text" in desk.refused("m.onnx", "--data", "d.npz", "-o", "p.json")


def test_data_function_that_exits(desk: Desk) -> None:
    (desk / "leaver.py").write_text("import sys\ndef feeds():\n    sys.exit(3)\n")
    assert "ended the program" in desk.refused("m.onnx", "--data", "leaver:feeds")
