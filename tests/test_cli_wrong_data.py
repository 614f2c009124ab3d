"""Wrong data: one sentence that says what, where and what to do; exit 2; nothing is written."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest
from conftest import Desk
from networks import conv_net, from_text, rows, samples, save
from onnx import helper

pytestmark = pytest.mark.usefixtures("clock")


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
    what = rf"(tensor|output) '\w+' is NaN( at index \[[\d, ]*\])? for sample {bad} of the calibration data: "
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
