"""What goes when nobody reads it, and what is put in the place of a node."""

import onnx_ir as ir
from lowering import constant
from rewrites import parse

from qcompile.graph.edit import Names
from qcompile.graph.linear import find_linears
from qcompile.graph.place import Steps, release

TEXT = f"""g (float[3,16] x) => (float[3,16] y) <{constant("w", 16, 16)}, {constant("b", 16)}, int64[2] s = {{4, 4}}> {{
    r = Reshape(b, s) t = Transpose(w) u = Identity(t) z = Identity(t) y = MatMul(x, z) }}"""


def model() -> ir.Model:
    return parse(TEXT)


def value(made: ir.Model, name: str) -> ir.Value:
    return next(v for node in made.graph for v in node.outputs if v.name == name)


def test_a_chain_goes_back_to_what_others_read() -> None:
    made = model()
    release(value(made, "u"))
    assert [node.outputs[0].name for node in made.graph] == ["r", "t", "z", "y"]
    release(value(made, "r"))
    assert [node.outputs[0].name for node in made.graph] == ["t", "z", "y"]
    assert list(made.graph.initializers) == ["w"]


def test_what_is_read_or_an_interface_stays() -> None:
    made = model()
    text = ir.to_onnx_text(made)
    for name in ("t", "z", "y"):
        release(value(made, name))
    for other in (made.graph.inputs[0], made.graph.initializers["w"], None):
        release(other)
    assert ir.to_onnx_text(made) == text


def test_steps_stand_before_the_node_under_fresh_names() -> None:
    made = model()
    (item,) = find_linears(made)
    item.node.name = "m"
    step = Steps(Names(made), item)
    axes = step.ints("axes", [0, 1])
    half = step.floats("half", 0.5)
    result = step("Clip", [item.node.inputs[0], None, half, None], "cut", main=True)
    again = step("Clip", [result, None, half], "cut")
    assert (axes.name, half.name, result.name, again.name) == (
        "m_axes",
        "m_half",
        "y_cut",
        "y_cut_1",
    )
    clip, other = result.producer(), again.producer()
    assert clip is not None
    assert other is not None
    assert (clip.name, other.name, len(clip.inputs)) == ("m", "m_cut_1", 3)
    assert list(made.graph)[-3:] == [clip, other, item.node]
    assert half.dtype == ir.DataType.FLOAT
