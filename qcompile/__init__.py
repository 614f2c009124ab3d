"""Compiles ONNX models into verified, faster quantized ones for ONNX Runtime.

    result = qcompile.compile_model("model.onnx", data="samples/", output="model.int8.onnx")
    print(result.verdict(), result.exit_code)

Names are imported when they are first used, so that `import qcompile` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qcompile.errors import (
    DataError,
    LimitError,
    ModelError,
    OutputError,
    PassError,
    QcompileError,
    RecipeError,
)
from qcompile.version import __version__

if TYPE_CHECKING:
    from qcompile.compiler import compile_model
    from qcompile.plan.plan import Plan, load_plan
    from qcompile.recipe import Recipe, load_recipe
    from qcompile.report import Result
    from qcompile.targets.schema import Target, load_target

_LAZY = {
    "compile_model": "qcompile.compiler", "Plan": "qcompile.plan.plan", "load_plan": "qcompile.plan.plan",
    "Recipe": "qcompile.recipe", "load_recipe": "qcompile.recipe", "Result": "qcompile.report",
    "Target": "qcompile.targets.schema", "load_target": "qcompile.targets.schema",
}  # fmt: skip

__all__ = [
    "DataError", "LimitError", "ModelError", "OutputError", "PassError", "Plan", "QcompileError", "Recipe",
    "RecipeError", "Result", "Target", "__version__", "compile_model", "load_plan", "load_recipe",
    "load_target",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'qcompile' has no attribute {name!r}")
    import importlib  # noqa: PLC0415 - only when a name is used

    return getattr(importlib.import_module(_LAZY[name]), name)
