from rewrites import assert_same_interface, parse, random_feed, run

from passes.name_nodes import NameNodes

TEXT = """g (float[N,4] x, bool c) => (float[N,4] y) {
    t = Relu(x) [mine] u = Relu(t) [mine] v = Neg(u)
    y = If(c) <then_branch = a () => (float[N,4] p) { [mine] o = Relu(v) p = Neg(o) },
               else_branch = b () => (float[N,4] q) { q = Neg(v) }> }"""


def test_every_node_has_a_name_of_its_own() -> None:
    model = parse(TEXT)
    before = model.clone()
    outcome = NameNodes().apply(model)
    found = [node.name for graph in model.graphs() for node in graph]
    assert found == ["Relu:t", "mine", "mine_1", "If:y", "mine_2", "Neg:p", "Neg:q"]
    assert outcome.changed == ["Relu:t", "mine_1", "If:y", "mine_2", "Neg:p", "Neg:q"]
    assert_same_interface(before, model)
    assert NameNodes().apply(model).changed == []
    run(model, random_feed(model))  # ORT refuses two nodes of one name


def test_a_name_given_later_is_not_taken() -> None:
    model = parse(
        "g (float[4] x) => (float[4] y) { t = Relu(x) [Relu_t] u = Neg(t) [u] y = Neg(u) }"
    )
    model.graph[1].name = "Relu:t"
    NameNodes().apply(model)
    assert [node.name for node in model.graph] == ["Relu:t_1", "Relu:t", "u"]


def test_a_value_without_a_name_gets_one() -> None:
    model = parse("g (float[4] x) => (float[4] y) { t = Relu(x) y = Neg(t) }")
    model.graph[0].outputs[0].name = None
    NameNodes().apply(model)
    assert model.graph[0].outputs[0].name == "value"
    assert model.graph[0].name == "Relu:value"
