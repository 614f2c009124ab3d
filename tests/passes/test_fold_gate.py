import onnx_ir as ir
import pytest
from rewrites import assert_refuses, assert_rewrites, parse

from passes.fold_gate import FoldGate

HEAD = "g (float[1,2,3,3] x) => (float[1,2,3,3] y)"
POOL = "p = GlobalAveragePool(x) g = HardSigmoid(p)"


@pytest.mark.parametrize("product", ["Mul(x, g)", "Mul(g, x)"])
@pytest.mark.parametrize("total", ["Add(x, m)", "Add(m, x)"])
def test_a_residual_around_a_gate(product: str, total: str) -> None:
    after = product.replace("g", "h")
    outcome = assert_rewrites(
        FoldGate(),
        before=f"{HEAD} {{ {POOL} m = {product} [add] y = {total} }}",
        after=f"{HEAD} <float one = {{1}}> {{ {POOL} h = Add(g, one) y = {after} }}",
    )
    assert outcome.changed == ["add"]


def test_a_longer_way_from_the_pooling() -> None:
    w = "float[2,2,1,1] w = {1, 2, 3, 4}"
    chain = "p = GlobalMaxPool(x) c = Conv(p, w) r = Relu(c) g = Sigmoid(r)"
    assert_rewrites(
        FoldGate(),
        before=f"{HEAD} <{w}> {{ {chain} m = Mul(x, g) s = Add(x, m) y = Relu(s) }}",
        after=f"{HEAD} <{w}, float one = {{1}}> {{ {chain} h = Add(g, one) s = Mul(x, h) y = Relu(s) }}",
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("g = Sigmoid(x) m = Mul(x, g) y = Add(x, m)", "not known to be smaller"),
        (f"{POOL} m = Mul(x, g) s = Add(x, m) y = Add(s, m)", "the product is read elsewhere"),
        (f"{POOL} m = Mul(x, g) s = Add(x, m) y = Add(s, g)", "the gate is read elsewhere"),
    ],
)
def test_refusals(body: str, reason: str) -> None:
    assert_refuses(FoldGate(), f"{HEAD} {{ {body} }}", reason)


def test_a_product_that_the_graph_returns() -> None:
    text = f"g (float[1,2,3,3] x) => (float[1,2,3,3] y, float[1,2,3,3] m) {{ {POOL} m = Mul(x, g) y = Add(x, m) }}"
    assert_refuses(FoldGate(), text, "the product is read elsewhere")


def test_a_gate_of_another_graph() -> None:
    text = f"""g (float[1,2,3,3] x, bool c) => (float[1,2,3,3] y) {{ {POOL}
        y = If(c) <then_branch = t () => (float[1,2,3,3] u) {{ m = Mul(x, g) u = Add(x, m) }},
                   else_branch = e () => (float[1,2,3,3] v) {{ v = Neg(x) }}> }}"""
    assert_refuses(FoldGate(), text, "the gate is read elsewhere")


@pytest.mark.parametrize(
    "body", [f"{POOL} m = Mul(x, g) y = Sub(x, m)", "y = Add(x, x)", "m = Mul(x, x) y = Neg(m)"]
)
def test_other_sums(body: str) -> None:
    assert_refuses(FoldGate(), f"{HEAD} {{ {body} }}")


def test_the_one_has_the_type_of_the_activation() -> None:
    model = parse("g (double[1,2,3,3] x) => (double[1,2,3,3] y) { s = Neg(x) t = Relu(s) p = GlobalAveragePool(t) g = Sigmoid(p) m = Mul(t, g) y = Add(t, m) }")  # fmt: skip
    model.graph.inputs[0].type = None
    assert_refuses(FoldGate(), model, "its type is unknown")
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
    assert_refuses(
        FoldGate(), model, "its type is unknown"
    )  # Neg is no operator that is looked through
    model.graph[0].outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
    FoldGate().apply(model)
    (one,) = model.graph.initializers.values()
    assert one.dtype == ir.DataType.DOUBLE
