"""How weights of a few bits are stored: by operators of ONNX Runtime, or of ONNX alone."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from passes.lower_nbits import Form
from qcompile.errors import RecipeError
from qcompile.fewbits.assign import Scheme
from qcompile.graph import io
from qcompile.graph.documentation import documentation, restore
from qcompile.recipe import Recipe
from qcompile.run.session import Level, Options

LEVEL = "session.qdq_matmulnbits_accuracy_level"
"""The entry of a session's configuration that MatMulNBits gets its accuracy level from where ORT makes it of Q/DQ."""

_OPSET, _OF_TWO = 21, 25  # with blocks; with codes of 2 bits


def form_of(recipe: Recipe) -> Form:
    """The form that a recipe asks for."""
    return "portable" if recipe.format == "qdq" else "nbits"


def options_of(recipe: Recipe, level: Level = "all") -> Options:
    """How sessions run a result."""
    portable = form_of(recipe) == "portable"
    config = ((LEVEL, str(recipe.accuracy_level)),) if portable else ()
    return Options(level, threads=recipe.threads, config=config)


def raised(model: ir.Model, recipe: Recipe, schemes: Iterable[Scheme]) -> ir.Model:
    """The model at an opset that has the operators of its form.

    Raises:
        RecipeError: it is too large for onnx's converter.
        ModelError: the converter cannot raise it.
    """
    opset = max((_OF_TWO if scheme.bits == 2 else _OPSET for scheme in schemes), default=1)
    has = model.opset_imports.get("", 1)
    if form_of(recipe) == "nbits" or has >= opset:
        return model
    if io.weight_bytes(model) >= io.EXTERNAL_BYTES:
        raise RecipeError(
            f"the portable format needs opset {opset}, the model has {has}, and is too large to be raised: export it at "
            f"opset {opset}, or leave out --format qdq."
        )
    said = documentation(model)
    made = io.convert_opset(model, opset)
    restore(made, said)
    return made
