"""Patterns of `--keep-float`, and what an edited plan fixes."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qcompile.errors import RecipeError
from qcompile.keep import fixed_forms, match_patterns, unmet
from qcompile.plan.plan import Form, NodePlan, Plan

GRAPH = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
g (float[N,4] x, bool b) => (float[N,4] y) {
    a = Relu(x) c = Sigmoid(a) d = Add(a, c) e = Add(d, d)
    y = If (b) <
        then_branch = t () => (float[N,4] q) { q = Exp(e) },
        else_branch = f () => (float[N,4] q) { q = Log(e) }
    >
}"""
NAMES = {
    "a": "/block/act/Relu",
    "c": "/block/act/Sigmoid",
    "d": "/block/add",
    "e": "/blocks/add[0]",
}


@pytest.fixture
def model() -> ir.Model:
    model = ir.from_onnx_text(GRAPH)
    for node in model.graph.all_nodes():
        value = node.outputs[0].name or ""
        node.name = NAMES.get(value, f"{node.op_type}:{value}")
    return model


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("/block/add", ["/block/add"]),
        ("/block", ["/block/act/Relu", "/block/act/Sigmoid", "/block/add"]),
        ("/block/", ["/block/act/Relu", "/block/act/Sigmoid", "/block/add"]),
        ("Add", ["/block/add", "/blocks/add[0]"]),
        ("c", ["/block/act/Sigmoid"]),
        ("*/act/*", ["/block/act/Relu", "/block/act/Sigmoid"]),
        ("/blocks/add[0]", ["/blocks/add[0]"]),
        ("/block?/*", ["/blocks/add[0]"]),
        ("re:/(Relu|add)$", ["/block/act/Relu", "/block/add"]),
        ("re:^/blocks", ["/blocks/add[0]"]),
        ("Exp", ["Exp:q"]),
        ("*", ["/block/act/Relu", "/block/act/Sigmoid", "/block/add", "/blocks/add[0]", "If:y", "Exp:q", "Log:q"]),
    ],
)  # fmt: skip
def test_patterns(model: ir.Model, pattern: str, names: list[str]) -> None:
    kept = match_patterns(model, [pattern])
    assert sorted(kept.why) == sorted(names)
    assert set(kept.why.values()) == {f"kept float by {pattern!r}"}
    assert kept.notes == ()


def test_no_patterns(model: ir.Model) -> None:
    assert match_patterns(model, []).why == {}


def test_several_patterns(model: ir.Model) -> None:
    assert match_patterns(model, ["Relu", "/block/add"]).why == {
        "/block/act/Relu": "kept float by 'Relu'",
        "/block/add": "kept float by '/block/add'",
    }


@pytest.mark.parametrize(
    "pattern", ["/block/ad", "relu", "block", "/block/act/Rel", "Conv", "re:xyz", "*.zip"]
)
def test_a_pattern_that_matches_nothing(model: ir.Model, pattern: str) -> None:
    with pytest.raises(RecipeError, match="of --keep-float matches no node") as found:
        match_patterns(model, ["Add", pattern], model)
    assert repr(pattern) in str(found.value)
    if pattern == "/block/ad":
        assert "The nearest names: '/block/add', " in str(found.value)
    if pattern == "re:xyz":
        assert "nearest" not in str(found.value)


def test_a_regular_expression_that_is_none(model: ir.Model) -> None:
    with pytest.raises(
        RecipeError, match=r"'re:\*' of --keep-float is not a regular expression: nothing"
    ):
        match_patterns(model, ["re:*"])


def test_original_names_stay_valid(model: ir.Model) -> None:
    original = model.clone()
    graph = model.graph
    relu, sigmoid, add = list(graph)[:3]
    sigmoid.replace_input_with(0, graph.inputs[0])
    add.replace_input_with(0, graph.inputs[0])
    graph.remove(relu)
    kept = match_patterns(model, ["/block/act/Relu"], original)
    assert kept.why == {}
    assert kept.notes == (
        "The pattern '/block/act/Relu' of --keep-float names Relu '/block/act/Relu', folded into other "
        "nodes or away, so there is nothing left to keep float.",
    )
    assert match_patterns(model, ["/block/act"], original).notes == ()  # one of two is there


def test_what_took_the_place_of_a_node_stays_float(model: ir.Model) -> None:
    original = model.clone()
    sigmoid, add = list(model.graph)[1:3]
    sigmoid.name, sigmoid.op_type, add.name = "fused", "Tanh", "fused_add"
    kept = match_patterns(model, ["/block/act/Sigmoid", "Sigmoid"], original)
    assert kept.why == {"fused": "kept float by 'Sigmoid'"}
    assert len(kept.notes) == 2
    assert kept.notes[0].endswith("nodes; 'fused' now computes that and stays float.")


def plan(*rows: tuple[str, str, Form]) -> Plan:
    return Plan("t", "a", tuple(NodePlan(node, op, form, why="why") for node, op, form in rows))


def test_forms_of_a_plan(model: ir.Model) -> None:
    given = plan(("/block/add", "Add", Form.FLOAT), ("Exp:q", "Exp", Form.STATIC))
    assert fixed_forms(given, model) == {"/block/add": Form.FLOAT, "Exp:q": Form.STATIC}
    with pytest.raises(
        RecipeError, match=r"a node '/block/ad' that the model has not.* '/block/add'\?"
    ):
        fixed_forms(plan(("/block/ad", "Add", Form.FLOAT)), model)


def test_forms_that_could_not_be(model: ir.Model) -> None:
    made = plan(("a", "Relu", Form.FLOAT), ("b", "Conv", Form.STATIC), ("c", "Relu", Form.ABSORBED))
    assert unmet({"a": Form.STATIC, "b": Form.STATIC, "c": Form.STATIC}, made) == [
        "a (Relu) was set to static and is float: why."
    ]
    assert unmet({"a": Form.FLOAT, "b": Form.FLOAT, "c": Form.ABSORBED}, made) == []
    assert unmet({}, made) == []
