"""What ORT runs of networks as users build them (section 4.4): counts in the optimized graph, not milliseconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from networks import from_text
from regressions.case import PAD, floats, normal, random

from qcompile import RecipeError, Result, compile_model
from qcompile.recipe import BUILT_IN
from qcompile.targets.schema import detect

pytestmark = [
    pytest.mark.usefixtures("clock"),
    pytest.mark.skipif(
        detect().name != "ort-cpu-x64-vnni", reason="counts of CPUs with VNNI, as the target says"
    ),
]
CONV = f"Conv<{PAD}>"


def silu() -> onnx.ModelProto:
    text, x = "", "x"
    for i in range(4):
        text += f"c{i} = {CONV}({x}, w{i}) s{i} = Sigmoid(c{i}) m{i} = Mul(c{i}, s{i}) "
        x = f"m{i}"
    return from_text(
        f"g (float[1,64,20,20] x) => (float[1,64,1,1] y) {{ {text} y = GlobalAveragePool(m3) }}",
        **{f"w{i}": normal(64, 64, 3, 3, seed=i, scale=1.5) for i in range(4)},
    )


def residual() -> onnx.ModelProto:
    text, x = "", "x"
    for i in range(3):
        text += (
            f"a{i} = {CONV}({x}, v{i}) r{i} = Relu(a{i}) b{i} = {CONV}(r{i}, w{i}) s{i} = Add(b{i}, {x}) "
            f"o{i} = Relu(s{i}) "
        )
        x = f"o{i}"
    weights = {f"v{i}": normal(64, 64, 3, 3, seed=i) for i in range(3)}
    weights |= {f"w{i}": normal(64, 64, 3, 3, seed=9 + i) for i in range(3)}
    return from_text(
        f"g (float[1,64,20,20] x) => (float[1,64,20,20] y) {{ {text} y = Identity(o2) }}", **weights
    )


def mlp() -> onnx.ModelProto:
    return from_text(
        "g (float[32,192] x) => (float[32,192] y) { h = MatMul(x, v) r = Relu(h) m = MatMul(r, w) y = Add(m, x) }",
        v=normal(192, 768), w=normal(768, 192, seed=1),
    )  # fmt: skip


def compiled(model: onnx.ModelProto, name: str = "int8", *, data: bool = True) -> dict[str, int]:
    """Operators of the optimized graph, with the target that this machine resolves to."""
    recipe = dataclasses.replace(BUILT_IN[name], threads=1, bench_seconds=0.01)
    shape = tuple(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)
    feed = floats(x=shape)
    result: Result = compile_model(
        model, [feed(random(i)) for i in range(6)] if data else None, recipe=recipe
    )
    assert result.target == "ort-cpu-x64-vnni"
    assert result.exit_code == 0
    counts: dict[str, int] = result.kernels["operators"]
    return counts


def test_p1_silu() -> None:
    found = compiled(silu())
    wanted = {"QLinearConv": 4, "QLinearSigmoid": 4, "QLinearMul": 4, "QuantizeLinear": 1}
    wanted |= {"ConvInteger": 0, "Conv": 0, "FusedConv": 0}
    assert {op: found.get(op, 0) for op in wanted} == wanted


def test_p2_residual() -> None:
    found = compiled(residual())
    wanted = {"QLinearConv": 6, "QLinearAdd": 3, "ConvInteger": 0, "Conv": 0, "FusedConv": 0}
    assert {op: found.get(op, 0) for op in wanted} == wanted


@pytest.mark.parametrize("data", [True, False])
def test_p3_p4_products(data: bool) -> None:
    """Scales are found as the model runs, with data as well: the target says that this is the faster form."""
    found = compiled(mlp(), data=data)
    wanted = {"DynamicQuantizeMatMul": 2, "MatMul": 0, "FusedMatMul": 0}
    assert {op: found.get(op, 0) for op in wanted} == wanted


@pytest.mark.parametrize("network", [silu, residual, mlp])
@pytest.mark.parametrize("name", ["int8-dynamic", "int4", "int8-weights"])
def test_p5_no_convolution_is_quantized_as_it_runs(
    name: str, network: Callable[[], onnx.ModelProto]
) -> None:
    recipe = dataclasses.replace(BUILT_IN[name], threads=1, bench_seconds=0.01)
    model = network()
    shape: Any = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    data = [{"x": random(i).normal(size=shape).astype(np.float32)} for i in range(3)]
    assert "ConvInteger" not in compile_model(model, data, recipe=recipe).kernels["operators"]


def test_p6_a_target_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"there is no target 'ort-cuda'\."):
        compile_model(mlp(), target="ort-cuda")
