"""Words of the command line: a parser that tells what is wrong in one sentence, and readers of values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from qcompile.errors import RecipeError, nearest
from qcompile.limits import parse_limit
from qcompile.version import __version__

RANGES = ("auto", "minmax", "mean", "moving-average", "percentile", "mse", "kl")


class Parser(argparse.ArgumentParser):
    """A parser that raises one sentence where argparse ends the process."""

    def __init__(self, prog: str, words: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=prog, usage=f"{prog} {words}".rstrip(), description=description, epilog=epilog,
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        self.add_argument("--version", action="version", version=f"qcompile {__version__}")

    def error(self, message: str) -> NoReturn:
        """Raises: RecipeError, always."""
        text = message.removeprefix("argument ").replace(
            ": expected one argument", " needs a value"
        )
        missing = text.removeprefix("the following arguments are required: ")
        if missing != text:
            text = f"{missing.replace(', ', ' and ')} is missing"
        raise RecipeError(f"{text}: see `{self.prog} --help`.")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The values that `words` give.

        Raises:
            RecipeError: a word is unknown, missing, or no value of its option.
        """
        args, unknown = self.parse_known_args(words)
        if not unknown:
            return args
        option = unknown[0].partition("=")[0]
        if option.startswith("-"):
            hint = nearest(option, self._option_string_actions)
            raise RecipeError(f"there is no option {option}: see `{self.prog} --help`.{hint}")
        raise RecipeError(f"{unknown[0]!r} is one word too many: see `{self.prog} --help`.")


def range_method(text: str) -> str:
    """The name of a range method."""
    if text not in RANGES and not text.startswith("percentile:"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(RANGES)}")
    return text


def byte_count(text: str) -> int:
    """Bytes, of `512MB` or the like."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    size = 0 if match is None else int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MB or 2GB")
    return size


def add_choice(
    parser: argparse._ActionsContainer,
    name: str,
    known: Sequence[str] | Sequence[int],
    help_text: str,
) -> None:
    """An option whose value is one of `known`."""
    words = {str(value): value for value in known}

    def choice(text: str) -> str | int:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(words)}")
        return words[text]

    parser.add_argument(name, type=choice, metavar="|".join(words), help=help_text)


def at_least(least: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` on."""

    def whole(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return whole


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def above_zero(text: str) -> float:
    """A number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def image_size(text: str) -> tuple[int, int]:
    """Height and width, of `224x224` or one number."""
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 224x224")
    return int(parts[0]), int(parts[-1])


def number_list(text: str) -> tuple[float, ...]:
    """Numbers, of a text with commas between them."""
    try:
        return tuple(map(number, text.split(",")))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers such as 0.485,0.456,0.406"
        ) from error


def limit(name: str, unit: str = "") -> Callable[[str], str]:
    """A reader of limits: a number, with `unit` behind it if one likes, or a share with %."""

    def read(text: str) -> str:
        try:
            parse_limit(text, name, unit)
        except RecipeError as error:
            hint = str(error).partition(": ")[2].rstrip(".")
            raise argparse.ArgumentTypeError(f"{text!r} is no limit: {hint}") from error
        return text

    return read
