"""What a model takes, whether it may be compiled, and made-up feeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from networks import from_text

from qcompile.calib.data import InputSpec
from qcompile.errors import DataError, ModelError
from qcompile.graph import io
from qcompile.inputs import check_compilable, input_specs, running, stand_in
from qcompile.run.session import Session

W = np.eye(4, dtype=np.float32)
GRAPH = "g (float[N,4] x) => (float[N,4] y) {{ {} }}"


def model(nodes: str, **weights: Any) -> ir.Model:
    return io.load(from_text(GRAPH.format(nodes), **weights))


def with_value(value: float, where: int = 5, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    values = W.astype(dtype).copy()
    values.flat[where] = value
    return values


def test_input_specs() -> None:
    text = "g (float[1,?,S] x, int64[N] ids, string[2] s, bool[] b) => (float[1,?,S] y) { y = Relu(x) }"
    found = input_specs(Session(io.load(from_text(text))), io.load(from_text(text)))
    assert found == [
        InputSpec("x", np.dtype(np.float32), (1, None, "S")),
        InputSpec("ids", np.dtype(np.int64), ("N",)),
        InputSpec("s", np.dtype(object), (2,)),
        InputSpec("b", np.dtype(bool), None),
    ]


def test_input_that_is_no_tensor() -> None:
    text = "g (seq(float[N]) s) => (float[M] y) { y = ConcatFromSequence<axis=0>(s) }"
    loaded = io.load(from_text(text))
    with pytest.raises(ModelError, match=r"input 's' is no tensor of numbers or strings"):
        input_specs(Session(loaded), loaded)


@pytest.mark.parametrize(
    "nodes",
    [
        "y = MatMul(x, w)",
        "y = Gemm(x, w)",
        "t = Transpose(w) y = MatMul(x, t)",
        "i = Identity(w) t = Cast<to=1>(i) y = MatMul(x, t)",
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_must_be_numbers(nodes: str, value: float) -> None:
    with pytest.raises(
        ModelError, match=rf"weight 'w' holds {value} at index \(1, 1\): mend or export"
    ):
        check_compilable(model(nodes, w=with_value(value)))


@pytest.mark.parametrize(
    ("nodes", "value"),
    [
        ("y = Add(x, w)", np.inf),
        ("a = Add(x, w) y = MatMul(x, a)", -np.inf),
        ("t = Transpose(w) y = Mul(x, t)", np.inf),
    ],
)
def test_masks_may_be_infinite(nodes: str, value: float) -> None:
    check_compilable(model(nodes, w=with_value(value)))
    with pytest.raises(ModelError, match="weight 'w' holds nan"):
        check_compilable(model(nodes, w=with_value(np.nan)))


def test_what_is_no_weight() -> None:
    one = np.float32(np.nan)
    check_compilable(model("m = IsNaN(x) y = Where(m, w, x)", w=one))
    check_compilable(model("y = Relu(x)", w=with_value(np.nan)))  # nobody reads it
    check_compilable(model("z = MatMul(x, w) y = Relu(x)", w=np.zeros((4, 0), np.float32)))
    check_compilable(model("y = Gather(x, w)", w=np.zeros(2, np.int64)))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_weights_of_other_widths(dtype: Any) -> None:
    nodes = "c = Cast<to=1>(w) y = MatMul(x, c)"
    check_compilable(model(nodes, w=with_value(1.0, dtype=dtype)))
    with pytest.raises(ModelError, match="weight 'w' holds inf"):
        check_compilable(model(nodes, w=with_value(np.inf, dtype=dtype)))


def test_a_table_of_bfloat16_with_nan() -> None:
    """NumPy would warn."""
    made = model("c = Cast<to=1>(w) y = Add(x, c)", w=W)
    values = ir.DataType.BFLOAT16.numpy().type
    made.graph.initializers["w"].const_value = ir.Tensor(with_value(np.nan, dtype=values), name="w")
    with pytest.raises(ModelError, match="weight 'w' holds nan at index"):
        check_compilable(made)


def test_weights_that_bodies_read() -> None:
    text = """g (float[N,4] x, bool b) => (float[N,4] y) { y = If (b) <
        then_branch = t () => (float[N,4] q) { q = MatMul(x, w) },
        else_branch = f () => (float[N,4] q) { q = Log(x) }
    > }"""
    with pytest.raises(ModelError, match=r"weight 'w' holds inf at index \(1, 1\)"):
        check_compilable(io.load(from_text(text, w=with_value(np.inf))))


@pytest.mark.parametrize(
    "nodes",
    [
        "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)",
        "q, t, u = DynamicQuantizeLinear(x) y = DequantizeLinear(q, t, u)",
    ],
)
def test_quantized_models(nodes: str) -> None:
    weights = {"s": np.float32(1), "z": np.uint8(0)}
    with pytest.raises(
        ModelError, match=r"the model is already quantized: node .+ is a \w*QuantizeLinear\. Give"
    ):
        check_compilable(model(nodes, **weights))


def test_float64_convolution() -> None:
    text = "g (double[1,1,4,4] x) => (double[1,1,4,4] y) { y = Conv(x, w) }"
    with pytest.raises(
        ModelError, match="node 'y' is a Conv on float64, for which ONNX Runtime has no kernel"
    ):
        check_compilable(io.load(from_text(text, w=np.ones((1, 1, 1, 1)))))


def test_what_does_not_run() -> None:
    with pytest.raises(DataError, match=r"^sample 3 does not run: bad$"), running("sample 3"):
        raise ModelError("bad")
    with running("sample 3"):
        pass


def test_stand_in() -> None:
    f32, i64 = np.dtype(np.float32), np.dtype(np.int64)
    feed = stand_in(
        [
            InputSpec("x", f32, (None, 3, 8, "W")),
            InputSpec("ids", i64, ("N", "S")),
            InputSpec("past_key", f32, ("N", 4, "P", 16)),
            InputSpec("flag", np.dtype(bool), ()),
            InputSpec("text", np.dtype(object), (2,)),
            InputSpec("given", f32, (2,), required=False),
            InputSpec("none", f32, (0, 4)),
        ]
    )
    assert {name: (value.shape, value.dtype) for name, value in feed.items()} == {
        "x": ((1, 3, 8, 64), f32), "ids": ((1, 64), i64), "past_key": ((1, 4, 0, 16), f32),
        "flag": ((), np.dtype(bool)), "text": ((2,), np.dtype(object)), "none": ((0, 4), f32),
    }  # fmt: skip
    assert (feed["ids"] == 1).all()
    again = stand_in([InputSpec("x", f32, (None, 3, 8, "W"))])
    assert (again["x"] == feed["x"]).all()


def test_inputs_too_large_to_be_made_up() -> None:
    specs = [InputSpec("x", np.dtype(np.float32), (None, 1 << 15, 1 << 15))]
    with pytest.raises(
        DataError,
        match=r"input 'x' of shape \[1, 32768, 32768\] is too large to be made up: give samples",
    ):
        stand_in(specs)
    free = [InputSpec("x", np.dtype(np.float32), (1 << 15, 1 << 15), required=False)]
    assert stand_in(free) == {}
