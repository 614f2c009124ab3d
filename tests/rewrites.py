"""Before and after, as ONNX text: how passes are tested.

    assert_rewrites(
        DropIdentity(),
        before="g (float[N,4] x) => (float[N,4] y) { t = Identity(x) y = Relu(t) }",
        after="g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }",
    )

Graphs are compared with names taken out: nodes in order, who reads what, attributes, and the constants
that are read, with a tolerance for folded numbers. Names of inputs and outputs are part of the graph.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from qcompile.graph import io
from qcompile.graph.edit import graphs
from qcompile.run.session import Options, Session
from qcompile.step import Outcome, Pass, run_pass

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    Array = npt.NDArray[Any]

OPSET = 17
SIZE = 3  # of a dimension that the text leaves open


def parse(text: str, opset: int = OPSET, ir_version: int = 8) -> ir.Model:
    """The model of a graph in ONNX text; a header that sets the versions may be left out."""
    if not text.lstrip().startswith("<"):
        domains = f'"":{opset}, "com.microsoft":1'
        text = f"<ir_version: {ir_version}, opset_import: [{domains}]>\n{text}"
    return ir.from_onnx_text(text)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A graph without the names it was written with: lines of text, and the constants they name."""

    lines: tuple[str, ...]
    constants: tuple[Array, ...]


def picture(model: ir.Model) -> Picture:
    """What the graph computes, and how, whatever its inner names are."""
    names: dict[ir.Value, str] = {}
    constants: list[Array] = []
    lines: list[str] = []

    def name(value: ir.Value | None) -> str:
        if value is None:
            return "-"
        if value not in names:
            tensor = value.const_value
            if value.is_initializer() and tensor is not None and not value.is_graph_input():
                names[value] = f"c{len(constants)}:{tensor.dtype}{list(tensor.shape)}"
                constants.append(tensor.numpy())
            else:
                names[value] = f"v{len(names)}"
        return names[value]

    def draw(graph: ir.Graph, indent: str, *, named: bool) -> None:
        for value in (*graph.inputs, *graph.outputs) if named else ():
            names[value] = str(value.name)
        lines.append(f"{indent}inputs {[name(value) for value in graph.inputs]}")
        for node in graph:
            made = [name(v) if v.uses() or v.is_graph_output() else "_" for v in node.outputs]
            while made and made[-1] == "_":
                made.pop()
            read = [name(value) for value in node.inputs]
            while read and read[-1] == "-":
                read.pop()
            plain = {k: _plain(a) for k, a in sorted(node.attributes.items()) if not _graphs(a)}
            domain = node.domain if node.domain not in ("", "ai.onnx") else ""
            lines.append(f"{indent}{made} = {domain}:{node.op_type}{plain}({', '.join(read)})")
            for key, attr in sorted(node.attributes.items()):
                for inner in _graphs(attr):
                    lines.append(f"{indent}  {key}:")
                    draw(inner, f"{indent}    ", named=False)
        lines.append(f"{indent}outputs {[name(value) for value in graph.outputs]}")

    draw(model.graph, "", named=True)
    return Picture(tuple(lines), tuple(constants))


def _graphs(attr: ir.Attr) -> list[ir.Graph]:
    if attr.type == ir.AttributeType.GRAPH:
        return [attr.as_graph()]
    return list(attr.as_graphs()) if attr.type == ir.AttributeType.GRAPHS else []


def _plain(attr: ir.Attr) -> object:
    if isinstance(attr.value, float):
        return float(f"{attr.value:.5g}")
    return list(attr.value) if isinstance(attr.value, list | tuple) else attr.value


def random_feed(
    model: ir.Model, seed: int = 0, given: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """Normal floats, zeros and ones for booleans, small integers; open dimensions have size `SIZE`."""
    rng = np.random.default_rng(seed)
    feed: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.name is not None
        if given is not None and value.name in given:
            feed[value.name] = given[value.name]
            continue
        if value.is_initializer():  # an input with a default
            continue
        assert value.dtype is not None
        shape = [d if isinstance(d, int) else SIZE for d in value.shape or ()]
        kind = value.dtype.numpy()
        if kind.kind == "f":
            feed[value.name] = (rng.standard_normal(shape) * 2).astype(kind)
        else:
            feed[value.name] = rng.integers(0, 2, shape).astype(kind)
    return feed


def run(model: ir.Model, feed: Mapping[str, Array], level: str = "off") -> list[Array]:
    """The outputs, as the graph is written unless another level is asked for."""
    return Session(model, Options(level, threads=1)).run(feed)  # type: ignore[arg-type]


def assert_same_picture(model: ir.Model, wanted: ir.Model, rtol: float = 1e-5) -> None:
    """The two graphs are the same but for inner names, and for `rtol` in their constants."""
    got, want = picture(model), picture(wanted)
    assert "\n".join(got.lines) == "\n".join(want.lines)
    for ours, theirs in zip(got.constants, want.constants, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-7)


def assert_rewrites(
    step: Pass,
    before: str | ir.Model,
    after: str | ir.Model,
    *,
    float_preserving: bool = True,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    opset: int = OPSET,
    feed: Mapping[str, Array] | None = None,
) -> Outcome:
    """The pass makes `after` of `before`, once and for all, and the result is valid and equal.

    Args:
        step: the pass.
        before: graph text, or a model.
        after: graph text, or a model.
        float_preserving: outputs in ORT, without its optimizations, agree on random inputs.
        rtol: for outputs, relative.
        atol: for outputs, of their greatest magnitude.
        opset: of both texts.
        feed: inputs that must not be random.
    """
    model = parse(before, opset) if isinstance(before, str) else before.clone()
    original = model.clone()
    assert io.check(original) is None
    inputs = random_feed(original, given=feed)
    wanted = run(original, inputs) if float_preserving else []
    outcome = run_pass(step, model)
    assert_same_picture(model, parse(after, opset) if isinstance(after, str) else after)
    assert outcome.changed
    assert io.check(model) is None
    assert_same_interface(original, model)
    if float_preserving:
        assert_close(run(model, inputs), wanted, rtol=rtol, atol=atol)
    text = ir.to_onnx_text(model)
    again = run_pass(step, model)
    assert again.changed == []
    assert ir.to_onnx_text(model) == text
    return outcome


def assert_refuses(
    step: Pass, model: str | ir.Model, reason: str | None = None, *, opset: int = OPSET
) -> None:
    """The pass leaves the model as it is, and says `reason` of a node; None: it says nothing."""
    model = parse(model, opset) if isinstance(model, str) else model.clone()
    text = ir.to_onnx_text(model)
    outcome = run_pass(step, model)
    assert ir.to_onnx_text(model) == text
    assert outcome.changed == []
    if reason is None:
        assert outcome.skipped == {}
    else:
        assert [found for found in outcome.skipped.values() if reason in found], outcome.skipped


def assert_same_interface(before: ir.Model, after: ir.Model) -> None:
    """Inputs and outputs have the same names, types and shapes; names are unique in every graph."""
    for ours, theirs in (
        (after.graph.inputs, before.graph.inputs), (after.graph.outputs, before.graph.outputs),
    ):  # fmt: skip
        assert [(v.name, v.dtype, v.shape) for v in ours] == [
            (v.name, v.dtype, v.shape) for v in theirs
        ]
    seen: set[str] = set()
    for graph in graphs(after):
        made = [value.name for node in graph for value in node.outputs if value.name]
        named = [*graph.initializers, *made]
        named += [str(v.name) for v in graph.inputs if v.name not in graph.initializers]
        assert len(named) == len(set(named))
        assert not seen & set(named)
        seen |= set(named)


def assert_close(
    ours: list[Array], theirs: list[Array], *, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Outputs agree: `atol` counts in units of the greatest magnitude of each output."""
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        unit = float(np.abs(want).max(initial=0.0)) or 1.0
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol * unit)
