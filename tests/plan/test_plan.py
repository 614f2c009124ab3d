"""Plans as data: JSON, text, and files that were edited wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import RecipeError
from qcompile.plan.plan import Form, NodePlan, Plan, load_plan

NODES = (
    NodePlan("/conv0/Conv", "Conv", Form.STATIC, "int8.axis0.sym", "integer kernel"),
    NodePlan("/conv0/Relu", "Relu", Form.ABSORBED, why="part of /conv0/Conv"),
    NodePlan(
        "/head/MatMul",
        "MatMul",
        Form.DYNAMIC,
        "int8.axis1.sym",
        "integer kernel, scale found at run time",
    ),
    NodePlan('a "name", with\nodd ünicode', "Softmax", Form.FLOAT, why="slow"),
)
PLAN = Plan("ort-cpu-x64-vnni", "uint8.tensor.asym", NODES)


def written(folder: Path, plan: Plan) -> Path:
    path = folder / "plan.json"
    path.write_text(plan.to_json(), "utf-8")
    return path


def test_there_and_back(tmp_path: Path) -> None:
    assert load_plan(written(tmp_path, PLAN)) == PLAN
    assert load_plan(written(tmp_path, Plan("t", "a", ()))) == Plan("t", "a", ())


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    nodes=st.lists(
        st.builds(NodePlan, texts, texts, st.sampled_from(Form), texts, texts),
        unique_by=lambda e: e.node,
    )
)
def test_any_plan_there_and_back(
    nodes: list[NodePlan], tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = Plan("t", "a", tuple(nodes))
    assert load_plan(written(tmp_path_factory.mktemp("plan"), plan)) == plan


def test_one_node_a_line() -> None:
    """So that an editor and a diff show nodes."""
    lines = PLAN.to_json().splitlines()
    assert len(lines) == 2 + len(NODES)
    assert json.loads(lines[1].rstrip(","))["node"] == "/conv0/Conv"


WRONG: dict[str, tuple[Any, str]] = {
    "another version": ({"version": 2}, "is not a plan of version 1"),
    "a list": ([1], "is not a plan of version 1"),
    "an unknown key": ({"extra": 1}, "extra"),
    "a missing key": ({"target": None}, "target"),
    "an unknown form": (
        {"nodes": [{"node": "n", "op": "Conv", "form": "statik"}]},
        "Did you mean 'static'?",
    ),
    "an unknown key of a node": (
        {"nodes": [{"node": "n", "op": "Conv", "form": "float", "whi": ""}]},
        "Did you mean 'why'?",
    ),
    "nodes that are none": ({"nodes": "all"}, "nodes"),
    "a node twice": (
        {"nodes": [{"node": "n", "op": "Conv", "form": "float"}] * 2},
        "has 2 entries for node 'n': keep one.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_plans_edited_wrongly(name: str, tmp_path: Path) -> None:
    change, sentence = WRONG[name]
    table = json.loads(PLAN.to_json())
    if isinstance(change, dict):
        table = {k: v for k, v in {**table, **change}.items() if v is not None}
    else:
        table = change
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(table), "utf-8")
    with pytest.raises(RecipeError) as caught:
        load_plan(path)
    assert str(caught.value).startswith(f"plan {path}")
    assert sentence in str(caught.value)


def test_no_json_at_all(tmp_path: Path) -> None:
    path = tmp_path / "edited.json"
    path.write_text(PLAN.to_json()[:-4], "utf-8")
    with pytest.raises(RecipeError, match="is not valid JSON"):
        load_plan(path)


def test_entries_by_name_and_form() -> None:
    assert PLAN["/conv0/Relu"] is NODES[1]
    assert PLAN.get("/conv0/Relu") is NODES[1]
    assert PLAN.get("no") is None
    assert PLAN.get(None) is None
    with pytest.raises(KeyError):
        PLAN["no"]
    assert PLAN.of(Form.DYNAMIC, Form.STATIC) == [NODES[0], NODES[2]]
    assert PLAN.quantizes
    assert not Plan("t", "a", NODES[3:]).quantizes
    assert Plan("t", "a", (NodePlan("g", "Gather", Form.WEIGHT),)).quantizes


def test_as_text() -> None:
    lines = Plan("t", "a", NODES[:3]).show().splitlines()
    assert len(lines) == 4
    starts = [
        line.find(word)
        for line, word in zip(lines, ("form", "static", "absorbed", "dynamic"), strict=True)
    ]
    assert len(set(starts)) == 1
    assert lines[1].split() == [
        "/conv0/Conv",
        "Conv",
        "static",
        "int8.axis0.sym",
        "integer",
        "kernel",
    ]
    assert not any(line != line.rstrip() for line in lines)


def test_a_long_name_does_not_widen_the_column() -> None:
    plan = Plan(
        "t", "a", (NodePlan("n" * 200, "Conv", Form.FLOAT), NodePlan("m", "Conv", Form.FLOAT))
    )
    lines = plan.show().splitlines()
    assert lines[1].startswith("n" * 200 + "  Conv")
    assert lines[2].index("Conv") == 62
