"""The public face: its names, and that each is documented."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Desk
from networks import conv_net, linear_net, rows, samples

import qcompile

NAMES = [
    "DataError", "LimitError", "ModelError", "OutputError", "PassError", "Plan", "QcompileError", "Recipe",
    "RecipeError", "Result", "Target", "__version__", "compile_model", "load_plan", "load_recipe",
    "load_target",
]  # fmt: skip


def test_names() -> None:
    assert qcompile.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_there_and_documented(name: str) -> None:
    value = getattr(qcompile, name)
    if name == "__version__":
        assert value.count(".") == 2
        return
    assert inspect.getdoc(value)
    assert "_make_repr" not in (inspect.getdoc(value) or "")
    if not inspect.isclass(value):
        parameters = inspect.signature(value).parameters.values()
        assert all(p.annotation is not inspect.Parameter.empty for p in parameters)


def test_errors_are_one_family() -> None:
    family = [name for name in NAMES if name.endswith("Error")]
    assert all(issubclass(getattr(qcompile, name), qcompile.QcompileError) for name in family)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'qcompile' has no attribute 'compile_modle'"):
        _ = qcompile.compile_modle


def test_options_of_compile_model() -> None:
    signature = inspect.signature(qcompile.compile_model)
    assert list(signature.parameters) == [
        "model", "data", "output", "recipe", "target", "plan", "report", "progress", "stats", "force",
    ]  # fmt: skip
    kinds = [p.kind for p in signature.parameters.values()]
    assert kinds[2:] == [inspect.Parameter.KEYWORD_ONLY] * 8


class Reader:
    """As ORT's CalibrationDataReader."""

    def __init__(self) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = iter([{"x": x[None]} for x in samples(4)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


@pytest.mark.usefixtures("clock")
def test_models_and_data_in_memory(desk: Desk) -> None:
    before = desk.files()
    proto = conv_net()
    content = proto.SerializeToString()
    stacked = qcompile.compile_model(proto, {"x": samples(4)})
    listed = qcompile.compile_model(proto, [{"x": x[None]} for x in samples(4)])
    read = qcompile.compile_model(ir.from_proto(proto), Reader())
    assert stacked.exit_code == listed.exit_code == read.exit_code == 0
    assert stacked.worst_db == listed.worst_db == read.worst_db
    assert stacked.model is stacked.output is None
    assert proto.SerializeToString() == content
    assert desk.files() == before


@pytest.mark.usefixtures("clock")
def test_results_of_models_in_memory_can_be_written(desk: Desk) -> None:
    plan = None
    for name in ("a.onnx", "b.onnx"):
        result = qcompile.compile_model(
            linear_net(), {"x": rows()}, output=desk / name, recipe=qcompile.Recipe(format="fused"),
            plan=plan, target="ort-cpu-x64-vnni", report=desk / "r",
        )  # fmt: skip
        assert result.output == str(desk / name)
        plan = qcompile.load_plan(desk / "r" / "plan.json")
    assert (desk / "a.onnx").read_bytes() == (desk / "b.onnx").read_bytes()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "no.onnx"}, qcompile.ModelError),
        ({"data": 3}, qcompile.DataError),
        ({"data": {"z": rows()}}, qcompile.DataError),
        ({"recipe": "int9"}, qcompile.RecipeError),
        ({"target": "pdp-11"}, qcompile.RecipeError),
        ({"output": "no/q.onnx"}, qcompile.OutputError),
    ],
)
def test_errors_say_whose_fault_it_is(
    desk: Desk, options: dict[str, object], error: type[Exception]
) -> None:
    before = desk.files()
    with pytest.raises(error):
        qcompile.compile_model(**{"model": conv_net(), **options})  # type: ignore[arg-type]
    assert desk.files() == before
