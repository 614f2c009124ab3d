"""Wrong models: one sentence that says what, where and what to do; exit 2; nothing is written."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from conftest import Desk
from networks import conv_net, from_text, linear_net, samples, save, set_weight
from onnx import helper

pytestmark = pytest.mark.usefixtures("clock")


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
