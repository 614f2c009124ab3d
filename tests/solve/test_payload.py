"""Payloads: stored once, and made once a file."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from few_bits import blocked, random_blocked
from lowering import constant
from rewrites import parse

from qcompile.algo.blocks import Blocked
from qcompile.errors import PassError
from qcompile.graph.edit import Names
from qcompile.graph.linear import Linear, find_linears
from qcompile.quant.nbits import unpack_rows
from qcompile.solve.payload import Deferred, Payload, Source, Store, Style, as_source

TEXT = f"""g (float[3,32] x) => (float[3,24] y, float[3,8] z) <{constant("w", 32, 24)}, {constant("v", 32, 8)}>
    {{ y = MatMul(x, w) z = MatMul(x, v) }}"""


def two() -> tuple[ir.Model, Store, list[Linear]]:
    model = parse(TEXT)
    return model, Store(Names(model)), find_linears(model)


def source(item: Linear, given: Blocked | Deferred) -> Source:
    made = as_source(item, given)
    assert isinstance(made, Source)
    return made


def values(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def test_equal_weights_are_stored_once_a_style() -> None:
    model, store, (item, _) = two()
    a, b = (source(item, blocked(item.read())) for _ in range(2))
    first = store.payload(item, a, "product")
    assert store.payload(item, b, "product") is first
    others = [
        store.payload(item, a, "table"), store.payload(item, a, "portable"),
        store.payload(item, a, "product", 2.0), store.payload(item, source(item, blocked(item.read(), 8)), "product"),
    ]  # fmt: skip
    assert len({payload.codes for payload in (first, *others)}) == 5
    assert len(model.graph.initializers) == 2 + 10
    np.testing.assert_array_equal(values(others[2].scale), 2 * values(first.scale))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 0, 32])
def test_the_numbers_of_each_style(block: int, *, symmetric: bool) -> None:
    rng = np.random.default_rng(block)
    model = parse(
        f"g (float[3,40] x) => (float[3,24] y) <{constant('w', 40, 24)}> {{ y = MatMul(x, w) }}"
    )
    (item,) = find_linears(model)
    made = random_blocked(rng, 24, 40, 4, block, symmetric=symmetric)
    want, size = made.dequantize(), source(item, made).layout.size

    def stored(style: Style) -> Payload:
        return Store(Names(model)).payload(item, source(item, made), style)

    def dequantized(codes: np.ndarray, payload: Payload, middle: int) -> np.ndarray:
        scale = values(payload.scale)
        zero = np.full(scale.shape, middle, np.float32)
        if payload.zero is not None:
            zero = unpack_rows(values(payload.zero), 4, scale.shape[1]).astype(np.float32)
        grown = [np.repeat(part, size, axis=1)[:, : codes.shape[1]] for part in (zero, scale)]
        return ((codes.astype(np.float32) - grown[0]) * grown[1])[:, :40]

    product, table, portable = (stored(style) for style in ("product", "table", "portable"))  # type: ignore[arg-type]
    rows = values(product.codes).reshape(24, -1)
    np.testing.assert_array_equal(
        dequantized(unpack_rows(rows, 4, rows.shape[1] * 2), product, 8), want
    )
    np.testing.assert_array_equal(
        dequantized(unpack_rows(values(table.codes), 4, 40), table, 8), want
    )
    codes, scale = (
        values(portable.codes).astype(np.float32),
        np.repeat(values(portable.scale), size, axis=0)[:40],
    )
    zero = (
        0
        if portable.zero is None
        else np.repeat(values(portable.zero).astype(np.float32), size, axis=0)[:40]
    )
    np.testing.assert_array_equal(((codes - zero) * scale).T, want)
    assert portable.codes.dtype == (ir.DataType.INT4 if symmetric else ir.DataType.UINT4)


@pytest.mark.parametrize("style", ["product", "portable"])
def test_deferred_weights_are_made_once_a_file(tmp_path: Path, style: Style) -> None:
    model, store, items = two()
    calls: list[str] = []
    for item in items:
        made = blocked(item.read(), symmetric=False)

        def make(made: Blocked = made, name: str = item.name) -> Blocked:
            calls.append(name)
            return made

        store.payload(item, source(item, Deferred(4, 16, symmetric=False, make=make)), style)
    assert calls == []
    for value in ("w", "v"):
        del model.graph.initializers[value]
    for item in items:
        model.graph.remove(item.node)
    model.graph.outputs.clear()
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    assert calls == [items[0].name, items[1].name]
    again = ir.load(tmp_path / "m.onnx")
    for name, value in model.graph.initializers.items():
        np.testing.assert_array_equal(values(again.graph.initializers[name]), values(value))


def test_weights_of_another_shape_and_of_no_kernel() -> None:
    _, _, (item, other) = two()
    with pytest.raises(PassError, match="MatMul"):
        as_source(other, blocked(item.read()))
    with pytest.raises(PassError, match=r"\(24, 32\), its weight is \(8, 32\)"):
        as_source(other, lambda: blocked(item.read()))
    assert (
        as_source(item, blocked(item.read(), block=24))
        == "blocks of 24 weights: the kernels take multiples of 16"
    )


def test_deferred_weights_of_another_shape() -> None:
    _, store, (item, other) = two()
    late = Deferred(4, 16, symmetric=True, make=lambda: blocked(item.read()))
    payload = store.payload(other, source(other, late), "product")
    with pytest.raises(PassError, match="said to be"):
        values(payload.codes)
