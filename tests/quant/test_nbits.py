"""Payloads of weight-only operators, read by ONNX Runtime."""

import numpy as np
import onnx_ir as ir
import pytest
from few_bits import random_blocked
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rewrites import parse, run

from qcompile.algo.blocks import Blocked
from qcompile.quant import nbits
from qcompile.quant.nbits import Layout
from qcompile.quant.pack import pack
from qcompile.quant.scheme import QType

# (N, K): whole blocks, a last block that is not, one row, less than a block, more rows than one.
SHAPES = [(7, 64), (5, 72), (1, 64), (3, 8), (1, 17), (33, 264)]
KINDS = [(bits, block) for bits in (2, 4, 8) for block in (16, 32, 64, 128, 256)]


def layout(made: Blocked, *, symmetric: bool) -> Layout:
    rows, depth = made.codes.shape
    return Layout(rows, depth, made.bits, made.block, symmetric)


def give(model: ir.Model, **values: np.ndarray | ir.TensorProtocol) -> ir.Model:
    for name, values_of in values.items():
        tensor = ir.tensor(values_of, name=name) if isinstance(values_of, np.ndarray) else values_of
        model.graph.register_initializer(
            ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape),
                const_value=tensor,
            )
        )
        for node in model.graph:
            for i, value in enumerate(node.inputs):
                if value is not None and value.name == name:
                    node.replace_input_with(i, model.graph.initializers[name])
    return model


def product(made: Blocked, x: np.ndarray, *, symmetric: bool, level: str = "all") -> np.ndarray:
    how = layout(made, symmetric=symmetric)
    zero = "" if symmetric else ", z"
    text = f"""g (float[M,{how.depth}] x) => (float[M,{how.rows}] y) {{ y = com.microsoft.MatMulNBits<K = {how.depth},
        N = {how.rows}, bits = {how.stored}, block_size = {how.size}, accuracy_level = 1>(x, b, s{zero}) }}"""
    values = {"b": nbits.product_codes(made.codes, how), "s": nbits.spread(made.scale, how)}
    assert values["b"].shape == how.product_shape
    if not symmetric:
        values["z"] = nbits.packed_zeros(made.zero, how)
        assert values["z"].shape == how.zeros_shape
    return run(give(parse(text), **values), {"x": x}, level)[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), KINDS)
def test_matmul_nbits_reads_the_weights(bits: int, block: int, *, symmetric: bool) -> None:
    rng = np.random.default_rng(bits * block)
    for rows, depth in SHAPES:
        made = random_blocked(rng, rows, depth, bits, block, symmetric=symmetric)
        x = rng.standard_normal((3, depth)).astype(np.float32)
        want = x.astype(np.float64) @ made.dequantize().T.astype(np.float64)
        unit = (
            np.abs(x) @ np.abs(made.dequantize()).T
        )  # float32 sums round by this much times 2**-24
        assert np.all(np.abs(product(made, x, symmetric=symmetric) - want) <= 1e-6 * unit)


@pytest.mark.parametrize(
    ("bits", "block"), [(3, 16), (5, 32), (6, 16), (7, 64), (4, 48), (4, 0), (8, 0), (4, 512)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_bits_and_blocks_that_no_kernel_has(bits: int, block: int, *, symmetric: bool) -> None:
    rng = np.random.default_rng(bits)
    for rows, depth in [*SHAPES, (2, 700)]:
        made = random_blocked(rng, rows, depth, bits, block, symmetric=symmetric)
        x = np.eye(depth, dtype=np.float32)
        np.testing.assert_array_equal(product(made, x, symmetric=symmetric), made.dequantize().T)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [*KINDS, (3, 16), (4, 48), (4, 0)])
def test_gather_block_quantized_reads_the_weights(
    bits: int, block: int, *, symmetric: bool
) -> None:
    rng = np.random.default_rng(bits + block)
    zero = "" if symmetric else ", z"
    for rows, depth in SHAPES:
        made = random_blocked(rng, rows, depth, bits, block, symmetric=symmetric)
        how = layout(made, symmetric=symmetric)
        text = f"""g (int64[I] i) => (float[I,D] y) {{ y = com.microsoft.GatherBlockQuantized<bits = {how.stored},
            block_size = {how.size}, gather_axis = 0, quantize_axis = 1>(d, i, s{zero}) }}"""
        values = {"d": nbits.table_codes(made.codes, how), "s": nbits.spread(made.scale, how)}
        assert values["d"].shape == how.table_shape
        if not symmetric:
            values["z"] = nbits.packed_zeros(made.zero, how)
        (got,) = run(give(parse(text), **values), {"i": np.arange(rows)})
        assert got.shape == (rows, how.table_shape[1] * 8 // how.stored)
        np.testing.assert_array_equal(got[:, :depth], made.dequantize())
        if depth == how.groups * how.size:  # one payload for both operators
            both = nbits.product_codes(made.codes, how).reshape(how.table_shape)
            np.testing.assert_array_equal(values["d"], both)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [*KINDS, (3, 32), (4, 0)])
def test_dequantize_linear_reads_the_weights(bits: int, block: int, *, symmetric: bool) -> None:
    rng = np.random.default_rng(bits + block)
    zero = "" if symmetric else ", z"
    for rows, depth in SHAPES:
        made = random_blocked(rng, rows, depth, bits, block, symmetric=symmetric)
        how = layout(made, symmetric=symmetric)
        kind = how.portable_type
        text = f"""g (float[M,{depth}] x) => (float[M,{rows}] y) {{
            w = DequantizeLinear<axis = 0, block_size = {how.size}>(q, s{zero}) y = MatMul(x, w) }}"""

        def tensor(values: np.ndarray, kind: QType = kind) -> ir.TensorProtocol:
            return ir.PackedTensor(
                pack(values, kind), ir.DataType(kind.onnx_type), shape=values.shape
            )

        codes = nbits.portable_codes(made.codes, how)
        held = codes if kind.bits == 8 else tensor(codes)
        values: dict[str, np.ndarray | ir.TensorProtocol] = {
            "q": held,
            "s": nbits.spread(made.scale, how).T.copy(),
        }
        if not symmetric:
            zeros = nbits.spread(made.zero, how).T.copy()
            values["z"] = zeros if kind.bits == 8 else tensor(zeros)
        model = give(parse(text, 25, 13), **values)
        (got,) = run(model, {"x": np.eye(depth, dtype=np.float32)})
        np.testing.assert_array_equal(got, made.dequantize().T)


@given(
    st.sampled_from([2, 4, 8]).flatmap(
        lambda bits: st.tuples(
            st.just(bits),
            arrays(
                np.uint8,
                st.tuples(st.integers(0, 5), st.integers(1, 19)),
                elements=st.integers(0, (1 << bits) - 1),
            ),
            st.integers(0, 9),
        )
    )
)
def test_rows_come_back(case: tuple[int, np.ndarray, int]) -> None:
    bits, codes, more = case
    wide = codes.shape[1] + more
    data = nbits.pack_rows(codes, bits, wide)
    assert data.shape == (len(codes), -(-wide * bits // 8))
    back = nbits.unpack_rows(data, bits, wide)
    np.testing.assert_array_equal(back[:, : codes.shape[1]], codes)
    assert not back[:, codes.shape[1] :].any()
    for row, packed in zip(codes, data, strict=True):  # slowly: one number of many digits
        number = sum(int(code) << (bits * place) for place, code in enumerate(row))
        assert int.from_bytes(packed.tobytes(), "little") == number


def test_many_rows_are_packed_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (37, 21)).astype(np.uint8)
    whole = nbits.pack_rows(codes, 4)
    monkeypatch.setattr(nbits, "SLAB", 50)
    np.testing.assert_array_equal(nbits.pack_rows(codes, 4), whole)


@pytest.mark.parametrize(
    ("bits", "block", "reason"),
    [
        (1, 16, "codes of 1 bits"),
        (9, 16, "codes of 9 bits"),
        (4, 8, "blocks of 8"),
        (4, 24, "blocks of 24"),
    ],
)
def test_what_no_kernel_takes(bits: int, block: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Layout(4, 64, bits, block, symmetric=True)


@pytest.mark.parametrize(
    ("block", "depth", "size", "count"),
    [
        (0, 8, 16, 1),
        (0, 17, 32, 1),
        (0, 700, 256, 3),
        (48, 96, 16, 6),
        (512, 1024, 256, 4),
        (64, 65, 64, 2),
    ],
)
def test_the_block_that_is_stored(block: int, depth: int, size: int, count: int) -> None:
    how = Layout(1, depth, 4, block, symmetric=True)
    assert (how.size, how.groups) == (size, count)
