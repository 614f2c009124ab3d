"""Calibration data: every accepted source becomes one ordered, re-iterable `Data` of checked feeds."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from qcompile.calib.feeds import Feed, InputSpec, Source, check_feed, only_input
from qcompile.calib.images import SUFFIXES, ImageOptions, open_images
from qcompile.calib.spool import call_function, from_python
from qcompile.calib.stored import stored_count, stored_samples
from qcompile.calib.tokens import open_texts
from qcompile.errors import DataError, RecipeError

__all__ = ["Data", "DataOptions", "Feed", "ImageOptions", "InputSpec", "check_feed", "open_data"]

KINDS = {".npz": ".npz", ".npy": ".npy", ".txt": "text"} | dict.fromkeys(SUFFIXES, "image")


@dataclass(frozen=True)
class DataOptions:
    """How to read a source: the first `samples` of it (None: all), images and text so.

    With `pack`, a text is not read line by line: all lines together are cut into samples of `max_tokens`.
    """

    samples: int | None = None
    image: ImageOptions = field(default_factory=ImageOptions)
    tokenizer: Path | None = None
    max_tokens: int = 128
    pack: bool = False


class Data:
    """Checked samples: the same ones, in the same order, at each iteration, one in memory at a time.

    `description` says in one line where they are from, `notes` what was guessed, a sentence each.
    """

    def __init__(
        self,
        source: Source,
        inputs: Sequence[InputSpec],
        samples: int | None,
        *,
        finite: bool = True,
    ) -> None:
        limit = "" if samples is None else f", at most {samples} samples"
        self.description = source.description + limit
        self.notes = source.notes
        self._source = source
        self.manner = source.manner
        self._inputs = tuple(inputs)
        self._samples, self._finite = samples, finite

    def __iter__(self) -> Iterator[Feed]:
        """Each feed in the order of the inputs and with their dtypes; arrays may be read-only.

        Raises:
            DataError: a sample cannot be read or does not fit the model, or there is none.
        """
        empty = True
        for where, feed in islice(self._source.samples(), self._samples):
            empty = False
            yield check_feed(feed, self._inputs, where, finite=self._finite)
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
    finite: bool = True,
) -> Data:
    """`source` as samples for a model with these inputs; the samples are checked when iterated.

    With `normalizes` the graph itself scales pixels, so the guess is that it wants them raw. Unless `finite`, NaN
    and infinities are no error here.

    Raises:
        RecipeError: an option is wrong or has no meaning for this model.
        DataError: there is no such source, or it cannot feed these inputs.
    """
    if options.samples is not None and not 1 <= options.samples <= sys.maxsize:
        raise RecipeError(f"--samples is {options.samples}: give 1 or more, or leave it out.")
    if not isinstance(source, (str, Path)):
        label = f"the Python {type(source).__name__}"
        found = from_python(source, label, inputs, options.samples, finite=finite)
    elif Path(source).exists():
        found = _from_path(Path(source), inputs, options, normalizes=normalizes)
    elif isinstance(source, str) and source.partition(":")[2].isidentifier():  # not C:\data
        found = from_python(call_function(source), source, inputs, options.samples, finite=finite)
    else:
        raise DataError(
            f"there is no calibration data at {str(source)!r}: give a file or folder that exists,"
            " or module:function."
        )
    return Data(found, inputs, options.samples, finite=finite)


def _from_path(
    path: Path, inputs: Sequence[InputSpec], options: DataOptions, *, normalizes: bool
) -> Source:
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
        texts = open_texts(path, inputs, options.tokenizer, options.max_tokens, pack=options.pack)
        return Source(str(path), texts.samples, texts.count, texts.notes)
    if kind == "image":
        spec = only_input(inputs, description)
        image = open_images(spec, options.image, normalizes=normalizes)
        return Source(
            description,
            lambda: ((str(file), {spec.name: image(file)}) for file in files),
            lambda: len(files),
            image.notes,
            str(dataclasses.replace(image, notes=())),
        )
    return Source(
        description,
        lambda: chain.from_iterable(stored_samples(file, inputs) for file in files),
        lambda: sum(stored_count(file, inputs) for file in files),
    )


def _files(folder: Path) -> list[Path]:
    """The files below `folder` by relative path, but for hidden ones (`._a.jpg` of macOS)."""
    found = {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
    shown = [key for key in found if not any(part.startswith(".") for part in key.parts)]
    return [found[key] for key in sorted(shown, key=lambda key: key.as_posix())]
