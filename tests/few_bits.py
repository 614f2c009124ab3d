"""Weights of a few bits for tests, and models whose float weights are exactly these."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from rewrites import assert_close, assert_same_interface, parse, random_feed, run

from passes.lower_nbits import Form, LowerNbits
from passes.name_nodes import NameNodes
from qcompile.algo.blocks import Blocked, groups, width
from qcompile.graph import io
from qcompile.graph.edit import graphs, is_op, nodes
from qcompile.graph.linear import Linear, find_linears
from qcompile.run.session import Level, Options, Session
from qcompile.step import run_pass

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from qcompile.step import Outcome


def blocked(
    W: npt.NDArray[Any], bits: int = 4, block: int = 16, *, symmetric: bool = True
) -> Blocked:
    """W (N, K) rounded to nearest, with scales that are powers of two: codes times scales are exact in float16 too."""
    size, count = width(W.shape[1], block), groups(W.shape[1], block)
    padded = np.zeros((len(W), count * size), np.float32)
    padded[:, : W.shape[1]] = W
    parts = padded.reshape(len(W), count, size)
    low, high = np.minimum(parts.min(2), 0), np.maximum(parts.max(2), 0)
    middle, most = 1 << (bits - 1), (1 << bits) - 1
    reach = np.maximum(-low, high) / max(middle - 1, 1) if symmetric else (high - low) / most
    scale = np.exp2(np.ceil(np.log2(np.maximum(reach, 2.0**-12)))).astype(np.float32)
    zero = np.full(scale.shape, middle) if symmetric else np.clip(np.rint(-low / scale), 0, most)
    codes = np.clip(np.rint(parts / scale[..., None]) + zero[..., None], 0, most).reshape(
        padded.shape
    )
    return Blocked(
        codes[:, : W.shape[1]].astype(np.uint8), scale, zero.astype(np.uint8), bits, block
    )


def random_blocked(
    rng: np.random.Generator, rows: int, depth: int, bits: int, block: int, *, symmetric: bool
) -> Blocked:
    """Random codes, scales and zero points."""
    shape = (rows, groups(depth, block))
    zero = np.full(shape, 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, shape)
    scale = (rng.random(shape) + 0.1).astype(np.float32) * rng.choice(
        np.array([-1, 1], np.float32), shape
    )
    codes = rng.integers(0, 1 << bits, (rows, depth))
    return Blocked(codes.astype(np.uint8), scale, zero.astype(np.uint8), bits, block)


def snapped(
    model: ir.Model, bits: int = 4, block: int = 16, *, symmetric: bool = True
) -> dict[str, Blocked]:
    """Weights by node name; the model's float weights become what these say, so that both compute the same."""
    _own(model)
    weights: dict[str, Blocked] = {}
    made: dict[object, Blocked] = {}
    for item in find_linears(model):
        if item.reason is None and item.weight is not None:
            if item.weight.key not in made:
                made[item.weight.key] = solved = blocked(
                    item.read(), bits, block, symmetric=symmetric
                )
                _put(item, solved.dequantize())
            weights[item.name] = made[item.weight.key]
    return weights


def _put(item: Linear, values: npt.NDArray[Any]) -> None:
    """The stored numbers become `values` (N, K), moved back."""
    assert item.weight is not None
    root: npt.NDArray[Any] = item.weight.tensor.numpy()
    shapes = [root.shape]
    for kind, numbers in item.weight.moves:
        shapes.append(numbers if kind == "reshape" else tuple(shapes[-1][axis] for axis in numbers))
    for (kind, numbers), shape in zip(
        reversed(item.weight.moves), reversed(shapes[:-1]), strict=True
    ):
        values = (
            values.reshape(shape) if kind == "reshape" else values.transpose(np.argsort(numbers))
        )
    root[...] = values


def _own(model: ir.Model) -> None:
    """Constants that can be written."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            assert value.const_value is not None
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
        for node in graph:
            if is_op(node, "Constant") and "value" in node.attributes:
                values = node.attributes["value"].as_tensor().numpy().copy()
                node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(values))


def named(text: str, opset: int = 21) -> ir.Model:
    """The model of a text, its nodes named."""
    model = parse(text, opset, 10)
    run_pass(NameNodes(), model)
    return model


def narrow(text: str, kind: ir.DataType, *names: str) -> ir.Model:
    """The model with these inputs, outputs and constants of another float type."""
    model = named(text)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        if value.name in names:
            value.type = ir.TensorType(kind)
            if value.const_value is not None:
                value.const_value = ir.Tensor(
                    value.const_value.numpy().astype(kind.numpy()), name=value.name
                )
    return model


def lowered(
    text: str | ir.Model,
    form: Form = "nbits",
    *,
    bits: int = 4,
    block: int = 16,
    symmetric: bool = True,
    opset: int = 21,
    given: Mapping[str, np.ndarray] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> tuple[ir.Model, Outcome]:
    """The model with everything lowered that can be; it computes the same, and a second run changes nothing."""
    model = named(text, opset) if isinstance(text, str) else text
    weights = snapped(model, bits, block, symmetric=symmetric)
    before, feed = model.clone(), random_feed(model, given=given)
    wanted = run(before, feed)
    step = LowerNbits(weights, form, accuracy_level=1)
    outcome = run_pass(step, model)
    assert outcome.changed
    assert io.check(model) is None
    assert_same_interface(before, model)
    config = (("session.qdq_matmulnbits_accuracy_level", "1"),)  # or activations have 8 bits
    levels: tuple[Level, ...] = ("off", "basic", "all")
    for level in levels:
        found = Session(model, Options(level, threads=1, config=config)).run(feed)
        assert_close(found, wanted, rtol=rtol, atol=atol)
    text_after = ir.to_onnx_text(model)
    assert run_pass(step, model).changed == []
    assert ir.to_onnx_text(model) == text_after
    return model, outcome


def ops(model: ir.Model) -> list[str]:
    """The types of the nodes of all graphs."""
    return [node.op_type for node in nodes(model)]


def stored(model: ir.Model) -> set[str]:
    """The names of the initializers of all graphs."""
    return {name for graph in graphs(model) for name in graph.initializers}
