"""The public face: its names, and that each is documented."""

from __future__ import annotations

import inspect

import pytest

import qcompile

NAMES = [
    "DataError", "ModelError", "OutputError", "PassError", "Plan", "QcompileError", "Recipe",
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
        _ = qcompile.compile_modle  # type: ignore[attr-defined]


def test_options_of_compile_model() -> None:
    signature = inspect.signature(qcompile.compile_model)
    assert list(signature.parameters) == [
        "model", "data", "output", "recipe", "target", "plan", "report", "progress",
    ]  # fmt: skip
    kinds = [p.kind for p in signature.parameters.values()]
    assert kinds[2:] == [inspect.Parameter.KEYWORD_ONLY] * 6
