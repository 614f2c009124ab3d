"""The errors of qcompile: each class says whose fault it is.

A message is one sentence: what was found, where (node, tensor, file, key), and what to do.
The command line prints it without a traceback and exits with 2, with 3 for `LimitError`; `PassError` has a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QcompileError(Exception):
    """Any failure that qcompile explains. Catch this one to catch them all."""


class ModelError(QcompileError):
    """The model cannot be read, is not valid, or holds what no quantized form can express."""


class RefusedError(ModelError):
    """ONNX Runtime does not load a model: the user's, or what became of it."""


class DataError(QcompileError):
    """The calibration data does not fit the model, or holds NaN or infinities."""


class NotFiniteError(DataError):
    """A moment of data holds NaN or infinities, of whichever sample."""


class RecipeError(QcompileError):
    """An option, recipe, plan or target is wrong."""


class LimitError(QcompileError):
    """No result can keep a limit: exit code 3, and nothing is written."""


class OutputError(QcompileError):
    """The result cannot be written where it should go."""


class PassError(QcompileError):
    """A pass broke its own contract: a defect of qcompile, not of its input."""


def no_room(folder: object, reason: object) -> OutputError:
    """The error of a temporary file that could not be written to `folder`."""
    return OutputError(
        f"a temporary file could not be written to {folder} ({reason}): free space there, or set TMPDIR"
        " to another folder."
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name closest to `word`; empty if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def printable(text: str) -> str:
    """The text on one line, its control characters spelled out: names of a model must not steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def brief(error: BaseException) -> str:
    """The first line of what an error says, cut short: libraries quote what they were given, whole."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".")
