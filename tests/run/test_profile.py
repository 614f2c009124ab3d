"""Times by node: who is in the profile, under which name, and which runs count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from lowering import constant
from rewrites import parse

import qcompile.run.profile
from qcompile.errors import ModelError
from qcompile.run.profile import base_name, profile

NET = parse(
    f"g (float[1,4,8,8] x, bool p) => (float[1,4,8,8] y) <{constant('k', 4, 4, 1, 1)}> {{ [conv] a = Conv(x, k) [gate] s = Sigmoid(a) "
    "[mul] m = Mul(a, s) [if] y = If <then_branch = one () => (float[1,4,8,8] t) { [inner] t = Neg(m) }, "
    "else_branch = two () => (float[1,4,8,8] e) { [other] e = Abs(m) }> (p) }"
)
FEED = {"x": np.ones((1, 4, 8, 8), np.float32), "p": np.array(True)}


@pytest.mark.parametrize(
    ("name", "base"),
    [("conv", "conv"), ("conv_nchwc", "conv"), ("conv_token_12", "conv"), ("conv_int", "conv"), ("/a/b_token_1_x", "/a/b_token_1_x"),
     ("token_12", "token_12")],
)  # fmt: skip
def test_names_before_ort_renamed_them(name: str, base: str) -> None:
    assert base_name(name) == base


def test_nodes_and_operators() -> None:
    found = profile(NET, FEED, threads=1, runs=3)
    assert found.operators["If"] > 0
    assert found.operators["Neg"] > 0
    assert "Abs" not in found.operators
    assert found.nodes["inner"] > 0
    assert any(name in found.nodes for name in ("conv", "a"))  # ORT renames what it fuses
    assert sum(found.nodes.values()) == pytest.approx(sum(found.operators.values()))


def test_from_a_file(tmp_path: Path) -> None:
    import onnx_ir as ir

    path = tmp_path / "m.onnx"
    ir.save(NET, path)
    assert (
        profile(path, FEED, threads=1, runs=1).operators.keys()
        == profile(NET, FEED, threads=1, runs=1).operators.keys()
    )
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_feed_that_does_not_fit() -> None:
    with pytest.raises(ModelError, match="cannot run the model"):
        profile(NET, {"x": FEED["x"]}, threads=1)


class Recorded:
    """A session whose profile is written beforehand."""

    events: ClassVar[list[dict[str, Any]]] = []
    runs = 0

    def __init__(self, model: object, options: Any) -> None:
        self._path = Path(f"{options.profile}.json")
        Recorded.runs = 0

    def run(self, feed: object) -> None:
        Recorded.runs += 1

    def end_profiling(self) -> Path:
        self._path.write_text(json.dumps(self.events), "utf-8")
        return self._path


def event(name: str, op: str, microseconds: float, cat: str = "Node") -> dict[str, Any]:
    return {"cat": cat, "name": name, "dur": microseconds, "args": {"op_name": op}}


def test_means_without_the_first_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nanoseconds a run; a body that runs twice a run counts twice, nodes of one name add up."""
    monkeypatch.setattr(qcompile.run.profile, "Session", Recorded)
    Recorded.events = [
        *(event("conv_kernel_time", "Conv", us) for us in (900, 900, 10, 20, 30)),
        *(event("conv_nchwc_kernel_time", "ReorderOutput", us) for us in (900, 900, 1, 1, 1)),
        *(event("inner_kernel_time", "Neg", us) for us in (900, 900, 900, 900, 2, 4, 2, 4, 2, 4)),
        event("conv_fence_before", "Conv", 5000), event("model_run", "", 99999, "Session"),
    ]  # fmt: skip
    found = profile(NET, {}, threads=1, runs=3)
    assert Recorded.runs == 3 + 2
    assert found.nodes == {"conv": pytest.approx(21_000), "inner": pytest.approx(6000)}
    assert found.operators == {
        "Conv": pytest.approx(20_000),
        "ReorderOutput": pytest.approx(1000),
        "Neg": pytest.approx(6000),
    }
