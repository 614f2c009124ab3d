"""Recipes: every option of a compilation, from defaults, a TOML file and the command line.

Unknown keys are errors that offer the nearest known one.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from qcompile.calib.data import DataOptions, ImageOptions
from qcompile.errors import RecipeError, nearest

Ranges = Literal["auto", "mean", "minmax", "percentile", "mse", "kl"]
Format = Literal["auto", "qdq", "fused"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to do, apart from the model and its data.

    Attributes:
        name: shown in reports.
        target: a target's name, a target file, or `auto` for this machine.
        ranges: how activation ranges are chosen; `auto` tries several on held-out samples.
        format: `qdq` is portable Q/DQ, `fused` writes ORT's integer operators, `auto` takes the faster.
        keep_float: patterns of node names or operator types that stay float.
        static, dynamic: whether these forms may be used at all.
        bias_correction: correct biases for the mean error of quantization.
        weight_search: search weight scales by squared error instead of taking the full range.
        sqnr_goal: decibels on held-out samples that the compiler tries to reach by leaving the most
            harmful nodes float, as long as the result stays faster than float; 0 turns it off.
        min_sqnr: decibels that must be reached; missing them is exit code 3. None: no limit.
        threads: intra-op threads for all runs; 0 leaves it to ORT.
        bench_seconds: how long each timing lasts.
        data: where samples come from is given apart; this is how they are read.
    """

    name: str = "int8"
    target: str = "auto"
    ranges: Ranges = "auto"
    format: Format = "auto"
    keep_float: tuple[str, ...] = ()
    static: bool = True
    dynamic: bool = True
    bias_correction: bool = True
    weight_search: bool = False
    sqnr_goal: float = 20.0
    min_sqnr: float | None = None
    threads: int = 0
    bench_seconds: float = 1.0
    data: DataOptions = dataclasses.field(default_factory=DataOptions)


BUILT_IN: Mapping[str, Recipe] = {
    "int8": Recipe(),
    "int8-static": Recipe(name="int8-static", dynamic=False),
    "int8-dynamic": Recipe(name="int8-dynamic", static=False),
}


def load_recipe(source: str | Path | Recipe | None) -> Recipe:
    """The built-in recipe of that name, or that of a TOML file.

    Raises:
        RecipeError: no such recipe, not TOML, an unknown key or a value of the wrong kind.
    """
    if isinstance(source, Recipe):
        return source
    if source is None:
        return Recipe()
    if str(source) in BUILT_IN:
        return BUILT_IN[str(source)]
    path = Path(source)
    if not path.exists():
        known = list(BUILT_IN)
        raise RecipeError(
            f"there is no recipe {str(source)!r}.{nearest(str(source), known)} Known: {', '.join(known)}; or give a .toml file."
        )
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not valid TOML: {error}.") from error
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}.") from error
    table.setdefault("name", path.stem)
    return _fill(Recipe, table, f"recipe {path}")


def _fill(kind: type[Any], table: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise RecipeError(f"{where}: unknown key {key!r}.{nearest(key, hints)}")
        values[key] = _convert(hints[key], value, f"{where}, key {key!r}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}.") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where} must be a table.")
        return _fill(hint, value, where)  # type: ignore[arg-type]
    options = get_args(hint)
    if options and all(isinstance(option, str) for option in options):
        if value not in options:
            raise RecipeError(
                f"{where} is {value!r}, not one of {', '.join(options)}.{nearest(str(value), options)}"
            )
        return value
    if isinstance(value, list):
        return tuple(value)
    kinds = [option for option in (options or (hint,)) if isinstance(option, type)]
    if Path in kinds and isinstance(value, str):
        return Path(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wrong_bool = isinstance(value, bool) and bool not in kinds
    if kinds and (wrong_bool or not isinstance(value, tuple(kinds))):
        wanted = " or ".join(k.__name__ for k in kinds if k is not type(None))
        raise RecipeError(f"{where} is {value!r}, expected {wanted}.")
    return value


__all__ = ["BUILT_IN", "Format", "ImageOptions", "Ranges", "Recipe", "load_recipe"]
