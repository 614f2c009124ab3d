"""Calibration data: every accepted source becomes one ordered, re-iterable `Data` of checked feeds.

A stored array file (or a dict of arrays) holds one feed, unless its arrays share their leading
length N and either

* each has one dimension more than its input: sample i is `array[i]`; or
* each has its input's rank, each input's leading dimension is 1 or dynamic (and not called by two
  names), and some array has rank 2 or more: sample i is `array[i:i+1]`.

A fixed leading dimension other than 1 therefore keeps a batch whole.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.images import SUFFIXES, ImageOptions, open_images
from qcompile.calib.tokens import open_texts
from qcompile.errors import DataError, RecipeError, nearest

__all__ = ["Data", "DataOptions", "Feed", "ImageOptions", "InputSpec", "check_feed", "open_data"]

Feed = dict[str, NDArray[Any]]
Sample = tuple[str, object]  # where it stands, for messages, and the feed as it was given
Shapes = Mapping[str, tuple[int, ...]]
KINDS = {".npz": ".npz", ".npy": ".npy", ".txt": "text"} | dict.fromkeys(SUFFIXES, "image")


@dataclass(frozen=True)
class InputSpec:
    """One input of the model, read from the graph.

    `dtype` is object for strings. In `shape` a name or None is a dynamic dimension, and a negative
    number becomes None; a `shape` of None has unknown rank. Not `required`: an initializer is its
    default.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None
    required: bool = True

    def __post_init__(self) -> None:
        if self.shape is not None:
            dims = (None if isinstance(dim, int) and dim < 0 else dim for dim in self.shape)
            object.__setattr__(self, "shape", tuple(dims))

    def __str__(self) -> str:
        dims = ("...",) if self.shape is None else self.shape
        shown = ", ".join("?" if dim in (None, "") else str(dim) for dim in dims)
        return f"{'string' if self.dtype == object else self.dtype}[{shown}]"


@dataclass(frozen=True)
class DataOptions:
    """How to read a source: the first `samples` of it (None: all), images and text so."""

    samples: int | None = None
    image: ImageOptions = field(default_factory=ImageOptions)
    tokenizer: Path | None = None
    max_tokens: int = 128


@dataclass(frozen=True)
class _Source:
    """Samples not yet checked: `samples()` starts a pass, always over the same ones."""

    description: str
    samples: Callable[[], Iterator[Sample]]
    count: Callable[[], int]
    notes: tuple[str, ...] = ()


class Data:
    """Checked samples: the same ones, in the same order, at each iteration, one in memory at a time.

    `description` says in one line where they are from, `notes` what was guessed, a sentence each.
    """

    def __init__(self, source: _Source, inputs: Sequence[InputSpec], samples: int | None) -> None:
        limit = "" if samples is None else f", at most {samples} samples"
        self.description = source.description + limit
        self.notes = source.notes
        self._source = source
        self._inputs = tuple(inputs)
        self._samples = samples

    def __iter__(self) -> Iterator[Feed]:
        """Each feed in the order of the inputs and with their dtypes; arrays may be read-only.

        Raises:
            DataError: a sample cannot be read or does not fit the model, or there is none.
        """
        empty = True
        for where, feed in islice(self._source.samples(), self._samples):
            empty = False
            yield check_feed(feed, self._inputs, where)
        if empty:
            raise DataError(f"{self.description}: there is no sample in it, give at least one.")

    def __len__(self) -> int:
        """Number of samples; may open each file, count lines, or exhaust a one-shot source."""
        count = self._source.count()
        return count if self._samples is None else min(count, self._samples)


def open_data(
    source: str | Path | Iterable[object] | object,
    inputs: Sequence[InputSpec],
    options: DataOptions,
    *,
    normalizes: bool = False,
) -> Data:
    """`source` as samples for a model with these inputs; the samples are checked when iterated.

    With `normalizes` the graph itself scales pixels, so the guess is that it wants them raw.

    Raises:
        RecipeError: an option is wrong or has no meaning for this model.
        DataError: there is no such source, or it cannot feed these inputs.
    """
    if options.samples is not None and options.samples < 1:
        raise RecipeError(f"--samples is {options.samples}: give 1 or more, or leave it out.")
    if not isinstance(source, (str, Path)):
        label = f"the Python {type(source).__name__}"
        found = _from_python(source, label, inputs, options.samples)
    elif Path(source).exists():
        found = _from_path(Path(source), inputs, options, normalizes=normalizes)
    elif isinstance(source, str) and source.partition(":")[2].isidentifier():  # not C:\data
        found = _from_python(_call(source), source, inputs, options.samples)
    else:
        raise DataError(
            f"There is no calibration data at {str(source)!r}: give a file or folder that exists,"
            " or module:function."
        )
    return Data(found, inputs, options.samples)


def check_feed(feed: object, inputs: Sequence[InputSpec], where: str) -> Feed:
    """`feed` as arrays of the inputs' dtypes, in the order of the inputs.

    An array without a name goes to the only required input. Arrays may share memory with `feed`.

    Raises:
        DataError: a name, shape, type or value does not fit; the sentence begins with `where`.
    """
    if not isinstance(feed, Mapping):
        if not hasattr(feed, "__array__"):
            raise DataError(
                f"{where} is a {type(feed).__name__}: give a dict of arrays by input name,"
                " without labels."
            )
        feed = {_only(inputs, where).name: feed}
    names = [spec.name for spec in inputs]
    for name in feed:
        if name not in names:
            raise DataError(
                f"{where} has an array {name!r}, which is no input of the model"
                f" ({', '.join(names)}): rename or drop it.{nearest(str(name), names)}"
            )
    missing = [spec.name for spec in inputs if spec.required and spec.name not in feed]
    if missing:
        raise DataError(f"{where} lacks the required input {', '.join(missing)}: add the array.")
    given = [spec for spec in inputs if spec.name in feed]
    return {spec.name: _fit(feed[spec.name], spec, f"{where}: {spec.name!r}") for spec in given}


def _fit(value: object, spec: InputSpec, place: str) -> NDArray[Any]:
    """`value` as an array of the input's dtype."""
    try:
        array: NDArray[Any] = np.asarray(value)
    except Exception as error:  # the owner of the value, torch or a list, raises what it likes
        raise DataError(f"{place} is no array ({error}): give a NumPy array.") from error
    if array.dtype == f"V{spec.dtype.itemsize}" and spec.dtype.kind == "V":
        array = array.view(spec.dtype)  # .npy files forget the names of bfloat16 and its like
    wanted = array.shape if spec.shape is None else spec.shape
    got = f"{place} has shape {list(array.shape)}, the model wants {spec}"
    if array.ndim != len(wanted):
        lead = array.ndim + 1 == len(wanted)
        raise DataError(f"{got}: {'add the leading (batch) dimension' if lead else 'reshape it'}.")
    pairs = zip(wanted, array.shape, strict=True)
    if any(isinstance(want, int) and want != dim for want, dim in pairs):
        raise DataError(f"{got}: keep to the fixed dimensions.")
    kind = _kind(array.dtype)
    if array.dtype == object and not all(isinstance(item, str) for item in array.flat):
        kind = "mixed objects"
    if kind != _kind(spec.dtype):
        raise DataError(f"{place} holds {array.dtype}, the model wants {spec}: convert the array.")
    if kind == "float" and not np.isfinite(array).all():
        first = np.argwhere(~np.isfinite(array))[0].tolist()
        raise DataError(f"{place} holds NaN or infinity, first at {first}: correct the sample.")
    with np.errstate(over="ignore"):
        result: NDArray[Any] = np.asarray(array, dtype=spec.dtype, order="C")
    held = np.isfinite(result) if kind == "float" else result == array
    if not held.all():
        low, high = array.min(), array.max()
        raise DataError(
            f"{place} holds values from {low} to {high}, which {spec.dtype} cannot hold:"
            " scale or correct them."
        )
    return result


def _kind(dtype: np.dtype[Any]) -> str:
    """Float, int or string, whatever the width; any other type by its own name."""
    kinds = {"float": ("float", "bfloat"), "int": ("int", "uint", "bool")}
    kinds["string"] = ("str", "object")
    return next((kind for kind, names in kinds.items() if dtype.name.startswith(names)), dtype.name)


def _only(inputs: Sequence[InputSpec], where: str) -> InputSpec:
    """The one input that an array without a name goes to."""
    wanted = [spec for spec in inputs if spec.required] or list(inputs)
    if len(wanted) != 1:
        raise DataError(
            f"{where} fits only a model with one required input, and this one has"
            f" {', '.join(spec.name for spec in wanted) or 'none'}:"
            " give arrays by input name, in .npz files or dicts."
        )
    return wanted[0]


def _from_path(
    path: Path, inputs: Sequence[InputSpec], options: DataOptions, *, normalizes: bool
) -> _Source:
    kinds: dict[str, list[Path]] = {}
    for file in _files(path) if path.is_dir() else [path]:
        kind = KINDS.get(file.suffix.lower())
        if kind and (kind != "text" or file == path):  # text in a folder: labels, a README
            kinds.setdefault(kind, []).append(file)
    if not kinds:
        raise DataError(
            f"{path} holds no calibration data: give a .npz, .npy, .txt or image file,"
            " or a folder of .npz, .npy or image files."
        )
    if len(kinds) > 1:
        counts = " and ".join(f"{len(files)} {kind}" for kind, files in sorted(kinds.items()))
        raise DataError(f"{path} mixes {counts} files: keep one kind in a folder.")
    ((kind, files),) = kinds.items()
    description = f"{len(files)} {kind} file{'s' * (len(files) > 1)} of {path}"
    if kind == "text":
        texts = open_texts(path, inputs, options.tokenizer, options.max_tokens)
        return _Source(str(path), texts.samples, texts.count, texts.notes)
    if kind == "image":
        spec = _only(inputs, description)
        image = open_images(spec, options.image, normalizes=normalizes)
        return _Source(
            description,
            lambda: ((str(file), {spec.name: image(file)}) for file in files),
            lambda: len(files),
            image.notes,
        )
    return _Source(
        description,
        lambda: chain.from_iterable(_stored(file, inputs) for file in files),
        lambda: sum(_stored_count(file, inputs) for file in files),
    )


def _files(folder: Path) -> list[Path]:
    """The files below `folder` by relative path, but for hidden ones (`._a.jpg` of macOS)."""
    found = {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
    shown = [key for key in found if not any(part.startswith(".") for part in key.parts)]
    return [found[key] for key in sorted(shown, key=lambda key: key.as_posix())]


def _stored(path: Path, inputs: Sequence[InputSpec]) -> Iterator[Sample]:
    with _mapped(path, inputs) as arrays:
        count, rows = _split(arrays, inputs)
        for index in range(count):
            where = f"{path} (sample {index})" if count > 1 else str(path)
            yield where, _row(arrays, index, rows)


def _stored_count(path: Path, inputs: Sequence[InputSpec]) -> int:
    with _mapped(path, inputs) as arrays:
        return _split(arrays, inputs)[0]


@contextmanager
def _mapped(path: Path, inputs: Sequence[InputSpec]) -> Iterator[Feed]:
    """The arrays of a file by name, mapped from disk: those of a `.npz` are unpacked there first."""
    load = partial(np.lib.format.open_memmap, mode="r")
    try:
        if path.suffix.lower() == ".npy":
            yield {_only(inputs, str(path)).name: load(path)}
            return
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            zipfile.ZipFile(path) as archive,
        ):
            arrays: Feed = {}
            for index, name in enumerate(archive.namelist()):
                copy = Path(folder, str(index))
                with archive.open(name) as member, copy.open("wb") as file:
                    shutil.copyfileobj(member, file)
                arrays[name.removesuffix(".npy")] = load(copy)
            yield arrays
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} is no array file that can be read ({error}): save numbers or strings"
            " with np.save or np.savez, without pickled objects."
        ) from error


def _split(arrays: Feed, inputs: Sequence[InputSpec]) -> tuple[int, Shapes]:
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


def _row(arrays: Feed, index: int, rows: Shapes) -> Feed:
    """Copies of the arrays, or of their parts at `index`, with the shapes of `rows`."""
    return {
        name: np.array(array if array.shape == rows[name] else array[index]).reshape(rows[name])
        for name, array in arrays.items()
    }


def _call(source: str) -> object:
    """What the user's module:function returns; the current folder can be imported from."""
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
            f"{source}: module {module_name!r} has no function {name!r}: name one that returns"
            f" an iterable of feeds.{nearest(name, vars(module))}"
        )
    try:
        return function()
    except Exception as error:
        raise DataError(
            f"{source}: the function raised {type(error).__name__}: {error}; correct it."
        ) from error


def _from_python(
    source: object, label: str, inputs: Sequence[InputSpec], samples: int | None
) -> _Source:
    """Lists are read in place; all else is spooled, as it may be one-shot or shuffled."""
    if isinstance(source, np.ndarray):
        source = {_only(inputs, label).name: source}
    if isinstance(source, Mapping):
        arrays = {name: np.asarray(value) for name, value in source.items()}
        count, rows = _split(arrays, inputs)
        source = [_row(arrays, index, rows) for index in range(count)]
    if isinstance(source, (list, tuple)):
        feeds = list(source)
        return _Source(
            f"{len(feeds)} feeds of {label}",
            lambda: ((f"sample {index} of {label}", feed) for index, feed in enumerate(feeds)),
            lambda: len(feeds),
        )
    if not hasattr(source, "get_next") and not hasattr(source, "__iter__"):
        raise DataError(
            f"{label} is no calibration data: give a path, an iterable of feeds (dicts of arrays"
            " by input name), or a reader with get_next()."
        )
    spool = _Spool(_pull(source, label), inputs, samples)
    return _Source(label, spool.samples, spool.count)


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
        self, samples: Iterator[Sample], inputs: Sequence[InputSpec], limit: int | None
    ) -> None:
        self._pending = islice(samples, limit)
        self._inputs = tuple(inputs)
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
                names = self._keep(check_feed(feed, self._inputs, where))
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
                f"Samples cannot be kept in {self._folder} ({error}): free space there,"
                " or set TMPDIR to another folder."
            ) from error
        return list(feed)
