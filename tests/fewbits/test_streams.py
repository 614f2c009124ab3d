"""What passes between the parts of a model, and what the outputs of matrices are added to."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from language_models import language, texts
from networks import from_text
from workbench import weight

from qcompile.fewbits import sequential, streams
from qcompile.fewbits.assign import assign
from qcompile.graph.linear import find_linears
from qcompile.recipe import BUILT_IN
from qcompile.run.probe import probe

if TYPE_CHECKING:
    import onnx

INT4 = dataclasses.replace(BUILT_IN["int4"], threads=1)


def behind(model: onnx.ModelProto, feed: dict[str, Any]) -> dict[str, str]:
    graph = ir.serde.deserialize_model(model)
    facts = probe(graph, feed)
    chosen = [(item, None) for item in find_linears(graph)]
    mine = {item.node for item, _ in chosen}
    level = sequential._levels(chosen, graph.graph)  # type: ignore[arg-type]
    return {item.name: sequential._behind(item, level, mine, facts) for item, _ in chosen}


def added(body: str, **more: Any) -> dict[str, str]:
    weights = {"a": weight(64, 64), "b": weight(64, 64, seed=1), "c": weight(64, 64, seed=2)} | more
    model = from_text(f"g (float[n,64] x) => (float[n,64] y) {{ {body} }}", **weights)
    return behind(model, {"x": np.ones((3, 64), np.float32)})


def test_the_stream_behind_a_product() -> None:
    found = behind(language(), texts(1)[0])
    assert {name: found[name] for name in ("up0", "down0", "up1", "down1", "head")} == {
        "up0": "", "down0": "e", "up1": "", "down1": "x0", "head": ""
    }  # fmt: skip


def test_a_bias_may_come_between() -> None:
    bias = np.ones(64, np.float32)
    assert added("[m] p = MatMul(x, a) q = Add(p, k) y = Add(q, x)", k=bias)["m"] == "x"
    assert added("[m] p = MatMul(x, a) q = Add(k, p) y = Relu(q)", k=bias)["m"] == ""
    assert (
        added("[m] p = MatMul(x, a) q = Add(k, p) r = Add(q, k) y = Add(x, r)", k=bias)["m"] == ""
    )


def test_what_is_not_there_yet_is_no_stream() -> None:
    both = added("[m] p = MatMul(x, a) r = Relu(x) [n] q = MatMul(r, b) y = Add(p, q)")
    assert both == {"m": "", "n": ""}  # each waits for the other one
    late = added(
        "[m] p = MatMul(x, a) [n] q = MatMul(x, b) r = Relu(q) [o] s = MatMul(r, c) y = Add(p, s)"
    )
    assert late["m"] == ""
    assert late["o"] == "p"  # solved before


def test_a_product_that_others_read_has_no_stream() -> None:
    assert added("[m] p = MatMul(x, a) r = Add(p, x) y = Mul(r, p)")["m"] == ""
    assert added("[m] p = MatMul(x, a) y = Add(p, p)")["m"] == ""
    small = added("[m] p = MatMul(x, a) r = ReduceMean<keepdims = 1>(x) y = Add(p, r)")
    assert small["m"] == ""  # of another shape


def solved(monkeypatch: pytest.MonkeyPatch, kept: int) -> tuple[sequential.Found, int]:
    graph = ir.serde.deserialize_model(language())
    feeds = texts(12)
    facts = probe(graph, feeds[0])
    monkeypatch.setattr(streams, "_KEPT", kept)
    runs = 0
    plain = streams.Session.run

    def run(self: Any, *args: Any) -> Any:
        nonlocal runs
        runs += 1
        return plain(self, *args)

    monkeypatch.setattr(streams.Session, "run", run)
    chosen = assign(graph, INT4, graph).chosen
    found, _ = sequential.solve_in_order(graph, chosen, feeds[:8], feeds[8:], facts, INT4)
    monkeypatch.undo()
    return found, runs


def test_float_parts_run_once_where_what_they_make_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    (found, runs), (other, more) = (solved(monkeypatch, kept) for kept in (1 << 29, 0))
    assert runs < more
    for name, (blocked, tally) in found.items():
        np.testing.assert_array_equal(blocked.codes, other[name][0].codes)
        assert tally == other[name][1]
