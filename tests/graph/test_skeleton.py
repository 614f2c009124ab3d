"""Models without their weights: nothing is lost, whoever holds them, and ORT finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from lowering import constant
from rewrites import parse

from qcompile.graph import io
from qcompile.graph.skeleton import release, skeleton
from qcompile.run import probe as probing
from qcompile.run import session as sessions
from qcompile.run.probe import probe
from qcompile.run.session import Options, Session

# weights in the graph and in a body, a small one, one that bodies read from outside, and one that callers may feed
TEXT = f"""g (float[N,32] x, bool on, float[500] shift) => (float[N,32] y, float[500] z)
    <{constant("w", 32, 32)}, {constant("small", 32)}, {constant("half", 32, 32)}, {constant("shift", 500)}> {{
    a = MatMul(x, w) b = Mul(a, small) z = Neg(shift)
    y = If(on) <then_branch = t () => (float[N,32] p) <{constant("inner", 32, 32)}> {{ p = MatMul(b, inner) }},
                else_branch = e () => (float[N,32] q) {{ q = MatMul(b, half) }}> }}"""
FEEDS: list[dict[str, Any]] = [
    {"x": np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32), "on": np.array(on)}
    for on in (True, False)
]
WANTED = [Session(parse(TEXT)).run(feed) for feed in FEEDS]


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SHARED_BYTES", 0)
    monkeypatch.setattr(probing, "SHARED_BYTES", 0)


def files(folder: Path, form: str) -> ir.Model:
    """The model, its weights in memory, in its own file, in a file beside it, or in two folders."""
    if form == "memory":
        return parse(TEXT)
    path = folder / "m.onnx"
    if form == "inside":
        io.save(parse(TEXT), path)
        return io.load(path, mapped=True)
    ir.save(parse(TEXT), path, external_data="w.data", size_threshold_bytes=100)
    model = io.load(path)
    if form == "apart":
        (folder / "more").mkdir()
        tensor = model.graph.initializers["half"].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        (folder / "more" / "w.data").write_bytes((folder / "w.data").read_bytes())
        tensor.base_dir = folder / "more"
    return model


@pytest.mark.parametrize("form", ["memory", "inside", "beside", "apart"])
@pytest.mark.parametrize("level", ["off", "all"])
def test_sessions_compute_the_same(tmp_path: Path, form: str, level: Any) -> None:
    model = files(tmp_path, form)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    session = Session(model, Options(level, arena=False, shared=True))
    assert {n: v.const_value for n, v in model.graph.initializers.items()} == before
    release(model)
    for feed, wanted in zip(FEEDS, WANTED, strict=True):
        for got, exact in zip(session.run(feed), wanted, strict=True):
            np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)
    fed = session.native.run(["z"], {**FEEDS[0], "shift": np.ones(500, np.float32)})[0]
    assert np.all(fed == -1)  # it may still be fed


def test_what_is_in_the_bytes_and_what_is_not(tmp_path: Path) -> None:
    bones = skeleton(files(tmp_path, "memory"))
    assert set(bones.weights) == {"w", "half"}
    assert bones.folder is None
    bones = skeleton(files(tmp_path, "apart"))
    assert set(bones.weights) == {"half"}
    assert bones.folder == tmp_path.resolve()
    whole = len(io.to_bytes(parse(TEXT)))
    assert len(bones.data) < whole - 2 * 4 * 32 * 32 + 1000


def test_arrays_outlive_the_release(tmp_path: Path) -> None:
    model = files(tmp_path, "beside")
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    seen = tensor.numpy()
    release(model)
    other = parse(TEXT).graph.initializers["w"].const_value
    assert other is not None
    np.testing.assert_array_equal(seen, other.numpy())
    np.testing.assert_array_equal(tensor.numpy(), seen)


@pytest.mark.parametrize("form", ["memory", "inside"])
def test_shapes_are_those_of_small_models(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = probe(files(tmp_path, form), FEEDS[0])
    monkeypatch.undo()
    assert found == probe(parse(TEXT), FEEDS[0])
