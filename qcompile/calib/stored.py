"""Arrays in `.npz` and `.npy` files, or in memory, as samples.

A stored array file (or a dict of arrays) holds one feed, unless its arrays share their leading
length N and either

* each has one dimension more than its input: sample i is `array[i]`; or
* each has its input's rank, each input's leading dimension is 1 or dynamic (and not called by two
  names), and some array has rank 2 or more: sample i is `array[i:i+1]`.

A fixed leading dimension other than 1 therefore keeps a batch whole.
"""

from __future__ import annotations

import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from qcompile.calib.feeds import Feed, InputSpec, Sample, only_input
from qcompile.errors import DataError, brief, no_room

_UNPACKED, _RATIO = 1 << 30, 100  # what a `.npz` may unpack to: bytes, and times its own size
# The header of an array is a Python literal, which numpy splits into tokens.
_UNREADABLE = (
    OSError, EOFError, ValueError, TypeError, RuntimeError, OverflowError, SyntaxError, tokenize.TokenError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
Shapes = Mapping[str, tuple[int, ...]]


def stored_samples(path: Path, inputs: Sequence[InputSpec]) -> Iterator[Sample]:
    with _mapped(path, inputs) as arrays:
        count, rows = split(arrays, inputs)
        for index in range(count):
            where = f"{path} (sample {index})" if count > 1 else str(path)
            yield where, row(arrays, index, rows)


def stored_count(path: Path, inputs: Sequence[InputSpec]) -> int:
    with _mapped(path, inputs) as arrays:
        return split(arrays, inputs)[0]


@contextmanager
def _mapped(path: Path, inputs: Sequence[InputSpec]) -> Iterator[Feed]:
    """The arrays of a file by name, mapped from disk: those of a `.npz` are unpacked there first."""
    load = partial(np.lib.format.open_memmap, mode="r")
    try:
        if path.suffix.lower() == ".npy":
            yield {only_input(inputs, str(path)).name: load(path)}
            return
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            zipfile.ZipFile(path) as archive,
        ):
            arrays: Feed = {}
            size = sum(member.file_size for member in archive.infolist())
            if size > max(_UNPACKED, _RATIO * path.stat().st_size):
                raise DataError(
                    f"{path} unpacks to {size} bytes, more than {_RATIO} times its own: save it with np.savez."
                )
            for index, name in enumerate(archive.namelist()):
                copy = Path(folder, str(index))
                with archive.open(name) as member:
                    _unpack(member, copy)
                arrays[name.removesuffix(".npy")] = load(copy)
            yield arrays
    except _UNREADABLE as error:
        raise DataError(
            f"{path} is no array file that can be read ({brief(error)}): save numbers or strings"
            " with np.save or np.savez, without pickled objects."
        ) from error


def _unpack(member: IO[bytes], copy: Path) -> None:
    """Raises: OutputError if there is no room for the copy."""
    try:
        with copy.open("wb") as file:
            while part := member.read(1 << 20):  # what is wrong with the archive is no OSError
                file.write(part)
    except OSError as error:
        raise no_room(copy.parent, error.strerror) from error


def split(arrays: Feed, inputs: Sequence[InputSpec]) -> tuple[int, Shapes]:
    """How many samples the arrays hold, and their shapes in one sample: see the module's page."""
    shapes = {name: array.shape for name, array in arrays.items()}
    dims = {s.name: s.shape for s in inputs if s.shape is not None and s.name in shapes}
    counts = {shape[0] if shape else None for shape in shapes.values()}
    if len(dims) == len(shapes) and len(counts) == 1 and (count := counts.pop()) is not None:
        extra = {len(shape) - len(dims[name]) for name, shape in shapes.items()}
        if extra == {1}:
            return count, {name: shape[1:] for name, shape in shapes.items()}
        leads = {dim[0] for dim in dims.values() if dim}
        if (
            extra == {0}
            and any(len(shape) > 1 for shape in shapes.values())
            and all(lead == 1 or not isinstance(lead, int) for lead in leads)
            and sum(isinstance(lead, str) and lead != "" for lead in leads) <= 1
        ):
            return count, {name: (1, *shape[1:]) for name, shape in shapes.items()}
    return 1, shapes


def row(arrays: Feed, index: int, rows: Shapes) -> Feed:
    """Copies of the arrays, or of their parts at `index`, with the shapes of `rows`."""
    return {
        name: np.array(array if array.shape == rows[name] else array[index]).reshape(rows[name])
        for name, array in arrays.items()
    }
