"""Limits of size, latency and accuracy, as people write them: `4`, `4MB`, `50%`."""

from __future__ import annotations

import dataclasses
import math
import re

from qcompile.errors import RecipeError

_TEXT = re.compile(r"\s*([0-9.eE+-]+)\s*(%|[a-zA-Z]*)\s*")


@dataclasses.dataclass(frozen=True)
class Limit:
    """A number, or with `relative` a share of what the float model has."""

    value: float
    relative: bool = False

    def of(self, reference: float) -> float:
        """The limit for a float model that has `reference`."""
        return self.value * abs(reference) if self.relative else self.value

    def __str__(self) -> str:
        return f"{100 * self.value:g}%" if self.relative else f"{self.value:g}"


def parse_limit(text: str | float, name: str, unit: str = "") -> Limit:
    """The limit that `text` spells: a number, with `%` a share, with `unit` behind it if one likes.

    Raises:
        RecipeError: it is no number of 0 or more; `name` is named.
    """
    found = _TEXT.fullmatch(str(text))
    known = ("", "%", unit.lower())
    try:
        value = float(found[1]) if found is not None else math.nan
    except ValueError:
        value = math.nan
    if found is None or not math.isfinite(value) or value < 0 or found[2].lower() not in known:
        example = f"5 or 5{unit}" if unit else "0.01"
        raise RecipeError(
            f"{name} is {str(text)!r}: give a number as {example}, or a share as 50%."
        )
    return Limit(value / 100, relative=True) if found[2] == "%" else Limit(value)
