"""Constants behind chains of operators, against ONNX Runtime."""

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lowering import constant
from rewrites import parse, run

from qcompile.graph.chain import Stored, _stored, follow

W = constant("w", 2, 3, 4)


def last(text: str, opset: int = 17) -> tuple[ir.Model, Stored | str | None]:
    """The model, and what its last node reads first."""
    model = parse(text, opset)
    return model, follow(model.graph[-1].inputs[0])


CHAINS = {
    "nothing": "v = Identity(w)",
    "identity": "a = Identity(w) v = Identity(a)",
    "transpose": "v = Transpose<perm = [2, 0, 1]>(w)",
    "transpose_by_default": "v = Transpose(w)",
    "two_transposes": "a = Transpose<perm = [2, 0, 1]>(w) v = Transpose<perm = [0, 2, 1]>(a)",
    "reshape": "v = Reshape(w, s)",
    "reshape_of_a_transpose": "a = Transpose(w) v = Reshape(a, s)",
    "reshape_with_0": "v = Reshape(w, t)",
    "flatten": "v = Flatten<axis = 2>(w)",
    "flatten_from_the_end": "v = Flatten<axis = -1>(w)",
    "unsqueeze": "v = Unsqueeze(w, p)",
    "squeeze": "a = Unsqueeze(w, p) v = Squeeze(a, p)",
    "squeeze_all": "a = Unsqueeze(w, p) v = Squeeze(a)",
    "cast": "a = Cast<to = 10>(w) v = Cast<to = 1>(a)",
    "constant": "a = Constant<value = float[2] {1, 2}>() v = Identity(a)",
    "constant_floats": "a = Constant<value_floats = [1.0, 2.0]>() v = Identity(a)",
    "constant_float": "a = Constant<value_float = 3.0>() v = Identity(a)",
    "shape_from_a_constant": "c = Constant<value = int64[2] {3, 8}>() v = Reshape(w, c)",
}


@pytest.mark.parametrize("case", CHAINS)
def test_chains(case: str) -> None:
    model, found = (
        last(f"""g () => (float[A] y) <{W}, int64[2] s = {{4, -1}}, int64[3] t = {{0, 0, 4}}, int64[1] p = {{1}}>
        {{ {CHAINS[case]} y = Identity(v) }}""")
    )
    assert isinstance(found, Stored)
    (want,) = run(model, {})
    assert found.shape == found.moved_shape() == want.shape
    np.testing.assert_array_equal(found.read(), want)
    assert found.read().dtype == np.float32


@pytest.mark.parametrize(
    ("nodes", "opset"),
    [
        ("v = Unsqueeze<axes = [1]>(w)", 11),
        ("a = Unsqueeze<axes = [0]>(w) v = Squeeze<axes = [0]>(a)", 11),
    ],
)
def test_older_opsets(nodes: str, opset: int) -> None:
    model, found = last(f"g () => (float[A] y) <{W}> {{ {nodes} y = Identity(v) }}", opset)
    assert isinstance(found, Stored)
    np.testing.assert_array_equal(found.read(), run(model, {})[0])


@pytest.mark.parametrize(
    ("face", "nodes", "wanted"),
    [
        (f"(float[3] x) => (float[A] y) <{W}>", "v = Relu(x)", None),
        (f"(float[3] x) => (float[A] y) <{W}>", "v = Exp(w)", None),
        (f"(float[3] x, {W}) => (float[A] y)", "v = Identity(w)", "'w' is also a graph input"),
        (f"(int64[2] n) => (float[A] y) <{W}>", "v = Reshape(w, n)", "a shape that is computed"),
        (
            "() => (float[A] y) <int8[2] w = {1, 2}>",
            "v = Cast<to = 1>(w)",
            "cast from INT8 to FLOAT",
        ),
        (f"() => (float[A] y) <{W}>", "v = Cast<to = 11>(w)", "cast from FLOAT to DOUBLE"),
    ],
)
def test_no_constants(face: str, nodes: str, wanted: str | None) -> None:
    _, found = last(f"g {face} {{ {nodes} y = Identity(v) }}")
    if wanted is None:
        assert found is None
    else:
        assert isinstance(found, str)
        assert wanted in found


PERMS = st.permutations(range(3)).map(tuple)
MOVES = st.lists(
    st.one_of(
        PERMS.map(lambda p: ("transpose", p)),
        st.permutations((2, 3, 4)).map(lambda s: ("reshape", tuple(s))),
    ),
    max_size=6,
)


@given(MOVES)
def test_moves_are_merged_and_mean_the_same(moves: list[tuple[str, tuple[int, ...]]]) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    root = ir.Value(name="w", const_value=ir.Tensor(values))
    assert root.const_value is not None
    found, want = Stored(root, root.const_value, (), (), (2, 3, 4)), values
    for kind, numbers in moves:
        found = found.transposed(*numbers) if kind == "transpose" else found.reshaped(*numbers)
        want = want.transpose(numbers) if kind == "transpose" else want.reshape(numbers)
    np.testing.assert_array_equal(found.read(), want)
    assert found.moved_shape() == found.shape == want.shape
    kinds = [kind for kind, _ in found.moves]
    assert all(a != b for a, b in itertools.pairwise(kinds))
    assert ("transpose", (0, 1, 2)) not in found.moves


def test_a_weight_in_a_file_is_mapped(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    (tmp_path / "w.bin").write_bytes(bytes(64) + values.tobytes())
    tensor = ir.ExternalTensor(
        "w.bin",
        64,
        values.nbytes,
        ir.DataType.FLOAT,
        shape=ir.Shape([4, 6]),
        name="w",
        base_dir=tmp_path,
    )
    graph = ir.Graph([], [], nodes=[])
    value = ir.Value(
        name="w", const_value=tensor, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4, 6])
    )
    graph.register_initializer(value)
    found = follow(value)
    assert isinstance(found, Stored)
    read = found.transposed(1, 0).read()
    np.testing.assert_array_equal(read, values.T)
    assert np.shares_memory(read, tensor.numpy())


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("finite", [True, False])
def test_every_float16_is_widened_exactly(*, turned: bool, finite: bool) -> None:
    values = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 256)
    values = np.where(np.isfinite(values) | (not finite), values, np.float16(0))
    stored = _stored(ir.Value(name="w"), ir.Tensor(values))
    wide = (stored.transposed(1, 0) if turned else stored).read()
    assert wide.dtype == np.float32
    wanted = (values.T if turned else values).astype(np.float32)
    np.testing.assert_array_equal(wide.view(np.int32), wanted.view(np.int32))
