"""Strict reading of TOML and JSON tables into dataclasses: every key and every value is checked."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import re
import reprlib
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from qcompile.errors import RecipeError, nearest

T = TypeVar("T")
_DOTS = 100  # in a line of TOML, outside of strings
_STRING = re.compile(r"""\"[^"\n]*\"|'[^'\n]*'""")
_MOST = (1 << 63) - 1  # of whole numbers: what counts them takes no more
_NOUNS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def read_toml(text: str, where: str) -> dict[str, Any]:
    """The table that `text` spells.

    Raises:
        RecipeError: it is not TOML; the sentence begins with `where`.
    """
    bare = _STRING.sub("", text)  # tomllib takes memory with the square of the parts of a key
    if any(line.count(".") > _DOTS for line in bare.splitlines()):
        raise RecipeError(f"{where} is nested too deeply.")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise RecipeError(f"{where} is nested too deeply.") from error
    except ValueError as error:  # TOMLDecodeError, and numbers of thousands of digits
        raise RecipeError(f"{where} is not valid TOML: {error}.") from error


def read_text(path: Path, where: str) -> str:
    """The text of a file.

    Raises:
        RecipeError: it cannot be read, or is not UTF-8; the sentence begins with `where`.
    """
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise RecipeError(f"{where} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where} is not text in UTF-8: {error}.") from error


def fill(kind: type[T], table: object, where: str, path: str = "") -> T:
    """A `kind` (a dataclass) with the values of `table`, where `path` leads to it.

    Raises:
        RecipeError: a key is unknown or missing, or a value is of the wrong kind or is refused by the
            dataclass; names `where`, the key and what was expected.
    """
    if not isinstance(table, Mapping):
        raise RecipeError(f"{where}{_key(path)} is {_shown(table)}, expected a table.")
    hints = _hints(kind)  # type: ignore[arg-type]  # a class is hashable
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise RecipeError(
                f"{where}: unknown key {_join(path, key)!r}.{nearest(str(key), fields)}"
                f" Known here: {', '.join(fields)}."
            )
    for name, field in fields.items():
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if name not in table and not optional:
            raise RecipeError(f"{where} lacks the key {_join(path, name)!r}.")
    values = {
        key: convert(hints[key], value, where, _join(path, key)) for key, value in table.items()
    }
    try:
        return kind(**values)
    except RecipeError as error:  # from the dataclass itself
        raise RecipeError(f"{where}{_key(path)}: {error}") from error


def convert(hint: Any, value: object, where: str, path: str) -> Any:
    """`value` as the type that `hint` spells.

    Raises:
        RecipeError: it is of another kind.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(
            [option for option in options if option is not types.NoneType], value, where, path
        )
    if origin is Literal or (isinstance(hint, type) and issubclass(hint, enum.Enum)):
        known = list(options) if origin is Literal else [member.value for member in hint]
        if not any(value == member and type(value) is type(member) for member in known):
            words = list(map(str, known))
            raise RecipeError(
                f"{where}{_key(path)} is {_shown(value)}, not one of {', '.join(words)}."
                f"{nearest(str(value), words) if isinstance(value, str) else ''}"
            )
        return value if origin is Literal else hint(value)
    if dataclasses.is_dataclass(hint):
        return fill(hint, value, where, path)  # type: ignore[arg-type]
    if origin is tuple:
        return _many(options, value, where, path)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where}{_key(path)} is {_shown(value)}, expected a table.")
        return {
            key: convert(options[1], item, where, _join(path, key)) for key, item in value.items()
        }
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, int) and abs(value) > _MOST:
        raise RecipeError(f"{where}{_key(path)} is {_shown(value)}, which is too large.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise RecipeError(
            f"{where}{_key(path)} is {_shown(value)}, expected {_NOUNS.get(hint, 'text')}."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}{_key(path)} is {value}, expected a finite number.")
    return value


def _one_of(hints: list[Any], value: object, where: str, path: str) -> Any:
    for hint in hints[:-1]:
        try:
            return convert(hint, value, where, path)
        except RecipeError:
            continue
    return convert(hints[-1], value, where, path)


def _many(hints: tuple[Any, ...], value: object, where: str, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise RecipeError(f"{where}{_key(path)} is {_shown(value)}, expected a list.")
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(value)
    if len(hints) != len(value):
        raise RecipeError(f"{where}{_key(path)} has {len(value)} entries, expected {len(hints)}.")
    return tuple(
        convert(hint, item, where, f"{path}[{i}]")
        for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _shown(value: object) -> str:
    """A value as Python writes it, cut short where it is long or deep."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _key(path: str) -> str:
    return f": {path!r}" if path else ""
