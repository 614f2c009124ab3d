"""Layers of a result that are run alone: good ones pass, and every kind of damage is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from few_bits import narrow
from lowering import constant
from rewrites import parse

from passes.lower_nbits import LowerNbits
from qcompile.algo.rtn import rtn
from qcompile.errors import PassError
from qcompile.graph import io
from qcompile.graph.linear import Linear, find_linears
from qcompile.quant.nbits import unpack_rows
from qcompile.spot import SpotCheck, check_layers, relative
from qcompile.step import run_pass

TEXT = f"""g (float[3,64] x, int64[2] i) => (float[3,24] y, float[2,48] z, float[3,20] u)
    <{constant("w", 64, 24)}, {constant("e", 30, 48)}, {constant("v", 64, 20)}> {{
    [product] y = MatMul(x, w) [table] z = Gather(e, i) [scaled] u = Gemm<alpha = 0.5>(x, v) }}"""


def both(
    bits: int = 4, block: int = 32, *, symmetric: bool = True, model: ir.Model | None = None
) -> tuple[ir.Model, list[tuple[Linear, float]]]:
    """The model with weights of few bits, and the float layers with their errors."""
    given = parse(TEXT) if model is None else model
    half = any(v.dtype == ir.DataType.FLOAT16 for v in given.graph.initializers.values())
    weights, layers = {}, []
    for item in find_linears(given):
        W = item.read()
        made = rtn(
            W, bits=bits, block=block, symmetric=symmetric, scales="float16" if half else "float32"
        )
        weights[item.name] = made
        layers.append((item, relative(made.dequantize(), W)))
    result = given.clone()
    run_pass(LowerNbits(weights), result)
    return result, layers


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 0), (4, 16), (8, 64)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_that_are_good(bits: int, block: int, *, symmetric: bool) -> None:
    model, layers = both(bits, block, symmetric=symmetric)
    found = check_layers(model, layers, 8)
    assert [check.node for check in found] == ["product", "table", "scaled"]
    for check, (_, error) in zip(found, layers, strict=True):
        assert check.weight == pytest.approx(error, rel=1e-3)
        assert check.output == pytest.approx(error, rel=0.3, abs=1e-4)


def test_float16() -> None:
    given = narrow(
        f"g (float[3,64] x) => (float[3,24] y) <{constant('w', 64, 24)}> {{ [product] y = MatMul(x, w) }}",
        ir.DataType.FLOAT16, "x", "y", "w",
    )  # fmt: skip
    (check,) = check_layers(*both(model=given), 1)
    assert check.output == pytest.approx(check.weight, rel=0.3)


@pytest.mark.parametrize(("most", "names"), [(0, []), (1, ["product"]), (2, ["product", "scaled"])])
def test_some_are_chosen(most: int, names: list[str]) -> None:
    assert [check.node for check in check_layers(*both(), most)] == names


def _moved(held: np.ndarray) -> np.ndarray:
    return np.roll(held, 1, axis=0)


DAMAGE: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "codes of other rows": ("w_q", _moved),
    "codes in the other half of a byte": ("w_q", lambda held: (held << 4) | (held >> 4)),
    "scales of other rows": ("w_scale", _moved),
    "scales of another sign": ("w_scale", np.negative),
    "rows of the table": ("e_q", _moved),
    "scales of the table": ("e_scale", lambda held: held * np.float32(1.2)),
    "scales without alpha": ("v_scale", lambda held: held * np.float32(2)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name: str) -> None:
    model, layers = both()
    tensor, spoil = DAMAGE[name]
    value = model.graph.initializers[tensor]
    assert value.const_value is not None
    value.const_value = ir.Tensor(
        np.ascontiguousarray(spoil(value.const_value.numpy())), name=tensor
    )
    with pytest.raises(PassError, match="these should agree"):
        check_layers(model, layers, 8)


def test_a_kernel_that_reads_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qcompile.spot.unpack_rows", lambda *given: unpack_rows(*given)[:, ::-1].copy()
    )
    model, layers = both()
    with pytest.raises(PassError, match="these should agree"):
        check_layers(model, layers, 1)


def test_a_layer_that_is_missing() -> None:
    model, layers = both()
    with pytest.raises(PassError, match="no node of few bits named 'product'"):
        check_layers(parse(TEXT), layers, 1)
    del model


def test_zeros() -> None:
    given = parse(TEXT)
    for value in given.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.Tensor(np.zeros_like(value.const_value.numpy()), name=value.name)
    assert {check.output for check in check_layers(*both(model=given), 3)} == {0.0}


def test_layers_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers = both(symmetric=False)
    monkeypatch.setattr(io, "EXTERNAL_BYTES", 1)
    io.save(model, tmp_path / "m.onnx")
    monkeypatch.undo()
    found = check_layers(io.load(tmp_path / "m.onnx"), layers, 3)
    assert found == check_layers(model, layers, 3)
    assert all(isinstance(check, SpotCheck) for check in found)


def test_codes_that_a_caller_may_change_are_refused() -> None:
    model, layers = both()
    codes = next(node for node in model.graph if node.name == "product").inputs[1]
    assert codes is not None
    model.graph.inputs.append(codes)
    with pytest.raises(PassError, match=r"product.* reads codes that are not constant"):
        check_layers(model, layers, 8)
