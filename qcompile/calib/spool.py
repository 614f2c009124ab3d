"""Samples from Python: a module's function, an iterable, a calibration data reader."""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.calib.feeds import Feed, InputSpec, Sample, Source, check_feed, only_input
from qcompile.calib.stored import row, split
from qcompile.errors import DataError, nearest


def load_function(source: str, purpose: str) -> Callable[..., Any]:
    """The user's module:function; the current folder can be imported from.

    Raises:
        DataError: there is none; `purpose` says what it should do.
    """
    module_name, _, name = source.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's own code runs here, and below
        raise DataError(
            f"{source}: module {module_name!r} cannot be imported"
            f" ({type(error).__name__}: {error}): name one as in my_data:feeds."
        ) from error
    finally:
        sys.path.remove(folder)
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(
            f"{source}: module {module_name!r} has no function {name!r}: name one that"
            f" {purpose}.{nearest(name, vars(module))}"
        )
    return function  # type: ignore[no-any-return]  # callable() is all that is known of it


def call_function(source: str) -> object:
    """What the user's module:function returns.

    Raises:
        DataError: there is none, or it fails.
    """
    function = load_function(source, "returns an iterable of feeds")
    try:
        return function()
    except Exception as error:
        raise DataError(
            f"{source}: the function raised {type(error).__name__}: {error}; correct it."
        ) from error


def from_python(
    source: object,
    label: str,
    inputs: Sequence[InputSpec],
    samples: int | None,
    *,
    finite: bool = True,
) -> Source:
    """Lists are read in place; all else is spooled, as it may be one-shot or shuffled."""
    if isinstance(source, np.ndarray):
        source = {only_input(inputs, label).name: source}
    if isinstance(source, Mapping):
        arrays = {name: np.asarray(value) for name, value in source.items()}
        count, rows = split(arrays, inputs)
        source = [row(arrays, index, rows) for index in range(count)]
    if isinstance(source, (list, tuple)):
        feeds = list(source)
        return Source(
            f"{len(feeds)} feeds of {label}",
            lambda: ((f"sample {index} of {label}", feed) for index, feed in enumerate(feeds)),
            lambda: len(feeds),
        )
    if not hasattr(source, "get_next") and not hasattr(source, "__iter__"):
        raise DataError(
            f"{label} is no calibration data: give a path, an iterable of feeds (dicts of arrays"
            " by input name), or a reader with get_next()."
        )
    spool = _Spool(_pull(source, label), inputs, samples, finite=finite)
    return Source(label, spool.samples, spool.count)


def _pull(source: Any, label: str) -> Iterator[Sample]:
    """Each feed of a reader or an iterable; what the user's own code raises is a DataError."""
    count = 0
    try:
        if hasattr(source, "rewind"):
            source.rewind()
        for feed in _read(source) if hasattr(source, "get_next") else source:
            yield f"sample {count} of {label}", feed
            count += 1
    except Exception as error:
        raise DataError(
            f"{label} raised {type(error).__name__} at sample {count}: {error}; correct it."
        ) from error


def _read(reader: Any) -> Iterator[object]:
    """The feeds of an onnxruntime CalibrationDataReader."""
    while (feed := reader.get_next()) is not None:
        yield feed


class _Spool:
    """Samples of a one-shot source, each kept in a temporary folder from when it is first reached."""

    def __init__(
        self,
        samples: Iterator[Sample],
        inputs: Sequence[InputSpec],
        limit: int | None,
        *,
        finite: bool = True,
    ) -> None:
        self._pending = islice(samples, limit)
        self._inputs, self._finite = tuple(inputs), finite
        self._kept: list[tuple[str, list[str]]] = []  # place and names of each sample there
        self._error: DataError | None = None  # what ended the source; every pass must meet it
        self._folder = Path(tempfile.mkdtemp(prefix="qcompile-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def samples(self) -> Iterator[Sample]:
        index = 0
        while index < len(self._kept) or self._advance():
            where, names = self._kept[index]
            with np.load(self._folder / f"{index}.npz") as arrays:
                feed = dict(zip(names, arrays.values(), strict=True))
            yield where, feed
            index += 1

    def count(self) -> int:
        while self._advance():
            pass
        return len(self._kept)

    def _advance(self) -> bool:
        """Whether there was one more sample; it is in the folder now."""
        if self._error:
            raise self._error
        try:
            for where, feed in self._pending:
                names = self._keep(check_feed(feed, self._inputs, where, finite=self._finite))
                self._kept.append((where, names))
                return True
        except DataError as error:
            self._error = error
            raise
        return False

    def _keep(self, feed: Feed) -> list[str]:
        """The names of the arrays, which are now the next file of the folder."""
        arrays = [a.astype(np.str_) if a.dtype == object else a for a in feed.values()]
        try:
            np.savez(self._folder / f"{len(self._kept)}.npz", *arrays)
        except OSError as error:
            raise DataError(
                f"samples cannot be kept in {self._folder} ({error}): free space there,"
                " or set TMPDIR to another folder."
            ) from error
        return list(feed)
