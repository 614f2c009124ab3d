"""Sessions of ONNX Runtime: what they tell, what they refuse, and where their files are."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from lowering import constant
from rewrites import parse

from qcompile.errors import ModelError
from qcompile.graph import io
from qcompile.run.session import Options, Session, TensorInfo, version

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
NET = "g (float[N,4] x, int64[2] i, float w) => (float[N,4] y, bool[N,4] p) <float w = {2}> { y = Mul(x, w) p = Greater(y, w) r = Relu(y) }"
FEED = {"x": np.array([[1, -2, 3, 0.5]], np.float32), "i": np.zeros(2, np.int64)}


def test_inputs_and_outputs() -> None:
    session = Session(parse(NET))
    assert session.inputs == (TensorInfo("x", F32, ("N", 4)), TensorInfo("i", I64, (2,)))
    assert session.outputs == (
        TensorInfo("y", F32, ("N", 4)),
        TensorInfo("p", np.dtype(np.bool_), ("N", 4)),
    )


def test_types_that_numpy_cannot_hold() -> None:
    model = parse(
        "g (seq(float[2]) s, bfloat16[2] b, string[2] t, float16[2] h) => (float[2] y, string[2] u) { z = Constant<value_int = 0>() y = SequenceAt(s, z) u = Identity(t) }"
    )
    found = {info.name: info.dtype for info in Session(model).inputs}
    assert found == {"s": None, "b": None, "t": np.dtype(object), "h": np.dtype(np.float16)}


@pytest.mark.parametrize("level", ["off", "basic", "extended", "all"])
def test_runs_at_every_level(level: str) -> None:
    y, p = Session(parse(NET), Options(level, threads=1)).run(FEED)  # type: ignore[arg-type]
    assert y.tolist() == [[2, -4, 6, 1]]
    assert p.tolist() == [[False, False, True, False]]


def test_outputs_by_name_in_the_order_asked_for() -> None:
    session = Session(parse(NET))
    p, y = session.run(FEED, ["p", "y"])
    assert (p.dtype, y.dtype) == (np.bool_, np.float32)
    assert len(session.run(FEED, ["y"])) == 1


def test_what_the_model_does_not_take_is_ignored() -> None:
    assert len(Session(parse(NET)).run({**FEED, "other": np.zeros(3)})) == 2


@pytest.mark.parametrize(
    ("feed", "part"),
    [({"x": FEED["x"]}, "i"), ({**FEED, "x": np.zeros((1, 5), np.float32)}, "x"), ({**FEED, "x": np.zeros((1, 4))}, "double")],
)  # fmt: skip
def test_feeds_that_do_not_fit(feed: dict[str, np.ndarray], part: str) -> None:
    with pytest.raises(ModelError, match="ONNX Runtime cannot run the model: ") as caught:
        Session(parse(NET)).run(feed)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 360


def test_models_that_ort_refuses(tmp_path: Path) -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = nowhere.Unknown(x) }")
    with pytest.raises(ModelError, match=r"ONNX Runtime refuses the model: .*Unknown"):
        Session(model)
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=f"ONNX Runtime refuses {path}: "):
        Session(path)


def test_a_file_and_a_model_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    ir.save(parse(NET), path)
    ours, theirs = Session(path).run(FEED), Session(parse(NET)).run(FEED)
    np.testing.assert_array_equal(ours[0], theirs[0])


def test_levels_are_what_they_say(tmp_path: Path) -> None:
    """Off runs the graph as it is written; all fuses."""
    text = f"g (float[1,4,8,8] x) => (float[1,4,8,8] y) <{constant('k', 4, 4, 1, 1)}> {{ a = Conv(x, k) y = Relu(a) }}"
    ops = {}
    for level in ("off", "all"):
        path = tmp_path / f"{level}.onnx"
        Session(parse(text), Options(level, optimized=path))  # type: ignore[arg-type]
        ops[level] = [node.op_type for node in ir.load(path).graph]
    assert ops["off"] == ["Conv", "Relu"]
    assert ops["all"] == ["FusedConv"] or "Conv" in ops["all"][0]
    assert len(ops["all"]) == 1 or "Relu" not in ops["all"]


def test_options_reach_ort(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ort.SessionOptions] = []
    true_session = ort.InferenceSession

    def create(
        model: object, options: ort.SessionOptions, providers: list[str]
    ) -> ort.InferenceSession:
        seen.append(options)
        assert providers == ["CPUExecutionProvider"]
        return true_session(model, options, providers=providers)

    monkeypatch.setattr(ort, "InferenceSession", create)
    Session(parse(NET), Options("basic", threads=3, config=(("session.qdqisint8allowed", "1"),)))
    (options,) = seen
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.qdqisint8allowed") == "1"
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert not options.enable_profiling


def test_large_models_go_through_a_file_that_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protobuf stops at 2 GiB."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(io, "EXTERNAL_BYTES", 4)
    model = parse(
        f"g (float[2,4] x) => (float[2,4] y) <{constant('w', 4, 4)}> {{ y = MatMul(x, w) }}"
    )
    session = Session(model, Options(threads=1))
    assert session.run({"x": np.zeros((2, 4), np.float32)})[0].shape == (2, 4)
    del session
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_which_version() -> None:
    assert version() == ort.__version__


def test_a_model_that_fails_on_its_input() -> None:
    session = Session(parse("g (float[N] x, int64[1] i) => (float[M] y) { y = Gather(x, i) }"))
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot run the model: .*Gather"):
        session.run({"x": np.ones(3, np.float32), "i": np.array([7])})
