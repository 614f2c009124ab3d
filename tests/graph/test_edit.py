import numpy as np
import onnx_ir as ir
import pytest
from rewrites import parse, picture

from qcompile.graph import edit
from qcompile.graph.edit import Names

W = "float[2,2,1,1] w = {1, 2, 3, 4}"


def values(model: ir.Model) -> dict[str, ir.Value]:
    found = {str(v.name): v for graph in edit.graphs(model) for node in graph for v in node.outputs}
    for graph in edit.graphs(model):
        found |= {str(v.name): v for v in (*graph.inputs, *graph.initializers.values())}
    return found


IF = """g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> { t = Add(x, w)
    [if] y = If(c) <then_branch = a () => (float[2] p) <float[2] v = {3, 4}> { [inner] s = Add(t, v) p = Neg(s) },
                    else_branch = b () => (float[2] q) { q = Neg(x) }> }"""


def test_names_are_fresh_in_every_scope() -> None:
    names = Names(parse(IF))
    assert [names.fresh(n) for n in ("x", "w", "v", "s", "inner", "new", "new")] == [
        "x_1", "w_1", "v_1", "s_1", "inner_1", "new", "new_1",
    ]  # fmt: skip


def test_what_is_constant() -> None:
    text = "g (float[2] x, float[2] d = {5, 6}) => (float[2] y) <float[2] w = {1, 2}> { t = Add(x, w) y = Mul(t, d) }"
    found = values(parse(text))
    assert np.array_equal(edit.array(found["w"]), [1, 2])  # type: ignore[arg-type]
    assert [edit.array(v) for v in (None, found["x"], found["d"], found["t"])] == [None] * 4


@pytest.mark.parametrize(
    ("constant", "number"),
    [
        ("float w = {2.5}", 2.5),
        ("float[1,1] w = {2.5}", 2.5),
        ("int64[1] w = {7}", 7.0),
        ("float[2] w = {1, 2}", None),
        ('string w = {"2"}', None),
        ("bool w = {1}", None),
    ],
)
def test_a_number(constant: str, number: float | None) -> None:
    found = values(parse(f"g (float[2] x) => (float[2] y) <{constant}> {{ y = Add(x, w) }}"))
    assert edit.scalar(found["w"]) == number
    assert edit.scalar(None) is None
    assert edit.scalar(found["x"]) is None


def test_the_only_reader() -> None:
    model = parse(
        """g (float[2] x, bool c) => (float[2] y, float[2] o) {
        a = Neg(x) [reader] o = Neg(a) s = Add(x, x) t = Neg(s) u = Neg(s)
        v = Add(t, u) y = If(c) <then_branch = p () => (float[2] yes) { [inner] yes = Neg(v) },
                   else_branch = q () => (float[2] no) { no = Neg(x) }> }"""
    )
    found = values(model)
    readers = {name: edit.sole_user(found[name]) for name in ("a", "o", "s", "v")}
    assert {k: None if v is None else v.name for k, v in readers.items()} == {
        "a": "reader", "o": None, "s": None, "v": "inner",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "rank"),
    [
        ("y = Conv(x, w)", 4),
        ("t = Conv(x, w) u = Relu(t) v = Mul(u, t) y = Concat<axis = 1>(v, t)", 4),
        ("y = Shape(x)", None),
        ("t = Shape(x) y = Neg(t)", None),
        ("y = Flatten(x)", 2),
        ("t = Flatten(x) y = Add(x, t)", 4),
        ("t = Shape(x) y = Add(t, t)", None),
        ("y = Relu(x)", 4),
    ],
)
def test_the_rank_of_a_value(nodes: str, rank: int | None) -> None:
    found = values(parse(f"g (float[1,2,3,3] x) => (float[N] z) <{W}> {{ {nodes} z = Neg(y) }}"))
    assert edit.rank(found["y"]) == rank
    assert edit.rank(None) is None


def test_the_rank_is_looked_for_in_few_steps() -> None:
    nodes = " ".join(f"t{i + 1} = Relu(t{i})" for i in range(12))
    found = values(parse(f"g (float[2] t0) => (float[2] y) {{ {nodes} y = Neg(t12) }}"))
    assert edit.rank(found["t8"]) == 1
    assert edit.rank(found["t9"]) is None
    doubled = " ".join(f"t{i + 1} = Add(t{i}, t{i})" for i in range(300))
    found = values(
        parse(f"g (float[2] x) => (float[2] y) {{ t0 = Neg(x) {doubled} y = Neg(t300) }}")
    )
    assert edit.rank(found["t300"]) is None
    assert edit.dtype(found["t300"]) is None


@pytest.mark.parametrize(
    ("nodes", "kind"),
    [
        ("y = Conv(x, w)", "FLOAT"),
        ("t = Neg(x) y = Mul(t, w)", "FLOAT"),
        ("y = Cast<to = 11>(x)", None),
        ("t = Neg(x) y = Relu(t)", None),
    ],
)
def test_the_type_of_a_value(nodes: str, kind: str | None) -> None:
    model = parse(f"g (float[1,2,3,3] x) => (float[N] z) <{W}> {{ {nodes} z = Neg(y) }}")
    found = values(model)
    found["x"].type = ir.TensorType(ir.DataType.UNDEFINED)
    assert edit.dtype(found["y"]) == (None if kind is None else ir.DataType[kind])
    assert edit.dtype(None) is None


@pytest.mark.parametrize(
    ("constant", "number"),
    [("float c = {3}", 3.0), ("float[1] c = {3}", 3.0), ("float[1,1] c = {3}", 3.0), ("float[1,1,1] c = {3}", None), ("float[2] c = {3, 3}", None)],
)  # fmt: skip
@pytest.mark.parametrize("op", ["Add(x, c)", "Add(c, x)"])
def test_an_operation_with_a_number(constant: str, number: float | None, op: str) -> None:
    model = parse(f"g (float[2,2] x) => (float[2,2] y) <{constant}> {{ y = {op} }}")
    found = edit.with_number(model.graph[0])
    assert found == (None if number is None else (model.graph.inputs[0], number))


def test_an_operation_on_constants() -> None:
    model = parse("g (float[2] x) => (float[2] y) <float c = {3}> { t = Add(c, c) y = Add(x, t) }")
    assert edit.with_number(model.graph[0]) is None


def test_a_scalar_stays_a_scalar() -> None:
    model = parse(IF)
    value = edit.add_initializer(model.graph, Names(model), "n", np.array(2, np.float32))
    assert value.shape == ir.Shape([])
    assert model.graph.initializers["n"] is value


def test_where_a_node_goes() -> None:
    model = parse("g (float[2] x) => (float[2] y) { t = Neg(x) y = Relu(t) }")
    names, (neg, relu) = Names(model), model.graph
    x = model.graph.inputs[0]
    edit.add_node(names, "Exp", [x], before=relu, name="before", output="o")
    edit.add_node(names, "Exp", [x], after=neg, name="after", output="o")
    edit.add_node(names, "Exp", [x], graph=model.graph, name="last", output="o")
    edit.add_node(names, "Exp", [x], name="nowhere", output="o")
    assert [node.name for node in model.graph][1:4:2] == ["after", relu.name]
    assert [node.op_type for node in model.graph] == ["Neg", "Exp", "Exp", "Relu", "Exp"]
    assert [node.outputs[0].name for node in model.graph] == ["t", "o_1", "o", "y", "o_2"]


def test_replace_keeps_the_name_of_an_output() -> None:
    model = parse("g (float[2] x) => (float[2] y) { t = Neg(x) y = Relu(t) u = Exp(y) }")
    neg, relu, exp = model.graph
    edit.replace(relu.outputs[0], neg.outputs[0])
    assert neg.outputs[0].name == "y"
    assert model.graph.outputs[0] is neg.outputs[0]
    assert exp.inputs[0] is neg.outputs[0]
    assert neg.outputs[0].shape == ir.Shape([2])


def test_supersede_keeps_the_name_of_any_value() -> None:
    model = parse("g (float[2] x) => (float[2] y) { t = Neg(x) u = Exp(x) y = Relu(t) }")
    neg, exp, relu = model.graph
    edit.supersede(neg.outputs[0], exp.outputs[0])
    model.graph.remove(neg, safe=True)
    assert relu.inputs[0] is exp.outputs[0]
    assert exp.outputs[0].name == "t"


def test_an_output_that_is_replaced_twice_leaves_two_names() -> None:
    # ORT: "Duplicate definition of name (y__replaced)", as both were still read
    model = parse(
        "g (float[2] x) => (float[2] y) { t = Neg(x) u = Exp(x) y = Relu(t) z = Add(t, u) }"
    )
    neg, exp, relu, _ = model.graph
    edit.replace(relu.outputs[0], neg.outputs[0])
    edit.replace(neg.outputs[0], exp.outputs[0])
    names = [value.name for node in model.graph for value in node.outputs]
    assert exp.outputs[0].name == "y"
    assert len(set(names)) == len(names)


def test_what_may_take_the_place_of_an_output() -> None:
    model = parse(
        "g (float[2] x) => (float[2] y, float[2] z) <float[2] w = {1, 2}> { t = Neg(x) y = Relu(t) z = Add(x, w) }"
    )
    found = values(model)
    allowed = {name: edit.can_replace(found["y"], found[name]) for name in ("t", "x", "w", "z")}
    assert allowed == {"t": True, "x": False, "w": False, "z": False}
    assert all(edit.can_replace(found["t"], found[name]) for name in ("x", "w", "z"))


def test_nodes_of_all_graphs_in_order_while_they_go() -> None:
    model = parse(IF)
    seen = []
    for node in edit.nodes(model):
        seen.append(node.op_type)
        if node.name == "inner":
            node.op_type = "Sub"
    assert seen == ["Add", "If", "Add", "Neg", "Neg"]
    assert [graph.name for graph in edit.graphs(model)] == ["g", "a", "b"]


def test_what_nobody_reads_goes() -> None:
    model = parse(
        """g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}, float[2] dead = {1, 2}> { t = Add(x, w) n = Neg(t)
        y = If(c) <then_branch = a () => (float[2] p) <float[2] v = {3, 4}, float[2] gone = {1, 2}> { p = Add(x, v) },
                   else_branch = b () => (float[2] q) { e = Exp(x) q = Neg(x) }> }"""
    )
    edit.drop_unread(model)
    wanted = parse(
        """g (float[2] x, bool c) => (float[2] y) {
        y = If(c) <then_branch = a () => (float[2] p) <float[2] v = {3, 4}> { p = Add(x, v) },
                   else_branch = b () => (float[2] q) { q = Neg(x) }> }"""
    )
    assert picture(model).lines == picture(wanted).lines
    assert [list(graph.initializers) for graph in edit.graphs(model)] == [[], ["v"], []]
