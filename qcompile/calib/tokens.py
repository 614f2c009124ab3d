"""Text as calibration data, as the token inputs of a language model: one sample a line, or all lines cut into equal samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompile.errors import DataError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from qcompile.calib.feeds import InputSpec

IDS = "input_ids"
FILLED = (IDS, "attention_mask", "token_type_ids", "position_ids")
PADS = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")


@dataclass(frozen=True)
class Texts:
    """Each line of a text file that is not blank, or if `pack` each run of `limit` tokens, as feeds of batch 1.

    `length` is the number of tokens that the model fixes, None if any will do; `past` the shapes of
    the empty caches.
    """

    path: Path
    tokenizer: Tokenizer
    inputs: tuple[InputSpec, ...]
    length: int | None
    limit: int
    past: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]
    pack: bool = False

    def samples(self) -> Iterator[tuple[str, object]]:
        """Feeds with their places; ids int64 (1, tokens), other arrays to go with them.

        Raises:
            DataError: the file is not UTF-8, or a line has no tokens.
        """
        if self.pack:
            for where, ids in self._runs():
                yield where, self._feed(ids)
            return
        for number, text in _lines(self.path):
            where = f"{self.path} (line {number})"
            yield where, self._feed(self._encode(text, where)[: self.limit])

    def count(self) -> int:
        """Number of lines that are not blank, or of runs."""
        return sum(1 for _ in (self._runs() if self.pack else _lines(self.path)))

    def _runs(self) -> Iterator[tuple[str, list[int]]]:
        """Tokens of all lines, `limit` at a time; what is left at the end counts where there is nothing else."""
        waiting: list[int] = []
        first, some = 1, False
        for number, text in _lines(self.path):
            where = f"{self.path} (line {number})"
            first = first if waiting else number
            waiting += self._encode(text + "\n", where)
            while len(waiting) >= self.limit:
                yield f"{self.path} (lines {first} to {number})", waiting[: self.limit]
                waiting, first, some = waiting[self.limit :], number, True
        if waiting and not some:
            yield str(self.path), waiting

    def _encode(self, text: str, where: str) -> list[int]:
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=not self.pack).ids
        except Exception as error:  # the Rust side has no narrower class
            raise DataError(f"{where} cannot be tokenized ({error}): correct the line.") from error
        if not ids:
            raise DataError(f"{where} has no tokens: remove the line or give another tokenizer.")
        return ids

    def _feed(self, ids: list[int]) -> dict[str, NDArray[Any]]:
        length = self.length or len(ids)
        padding = length - len(ids)
        made: dict[str, NDArray[Any]] = {
            IDS: np.array([ids + [_pad(self.tokenizer)] * padding], np.int64),
            "attention_mask": np.array([[1] * len(ids) + [0] * padding], np.int64),
            "token_type_ids": np.zeros((1, length), np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None],
        }
        feed: dict[str, NDArray[Any]] = {}
        for spec in self.inputs:
            if spec.name in self.past:
                feed[spec.name] = np.zeros(self.past[spec.name], spec.dtype)
            elif spec.name == "attention_mask":  # some models take it as float
                feed[spec.name] = made[spec.name].astype(spec.dtype)
            else:
                feed[spec.name] = made[spec.name]
        return feed


def open_texts(
    path: Path,
    inputs: Sequence[InputSpec],
    tokenizer: Path | None,
    max_tokens: int,
    *,
    pack: bool = False,
) -> Texts:
    """The lines of `path` for the token inputs of the model; the lines are not read yet.

    With `pack` they are read as one text, without the tokens that a tokenizer adds to each.

    Raises:
        RecipeError: there is no tokenizer, or `max_tokens` is below 1.
        DataError: the tokenizer cannot be read, or the model has an input that text cannot fill.
    """
    if tokenizer is None:
        raise RecipeError(
            f"{path} is text, which needs a tokenizer: set --tokenizer tokenizer.json."
        )
    if max_tokens < 1:
        raise RecipeError(f"--max-tokens is {max_tokens}: give 1 or more.")
    past = {spec.name: shape for spec in inputs if (shape := _past(spec)) is not None}
    used = tuple(spec for spec in inputs if spec.required or spec.name in (*FILLED, *past))
    for spec in used:
        if spec.name not in past and spec.name not in FILLED:
            raise DataError(
                f"text cannot fill input {spec.name!r} ({spec}), only {', '.join(FILLED)} and a"
                " cache with one open dimension: give .npz files instead."
            )
    length = _length(used)
    limit = min(length or max_tokens, max_tokens)
    notes = [f"lines are cut to {limit} tokens: set --max-tokens to change that."]
    if pack:
        notes = [
            f"all lines are one text, in samples of {limit} tokens: set --max-tokens to change that."
        ]
    if length is not None:
        notes.append(f"lines are padded to the {length} tokens that the input shape fixes.")
    if past:
        notes.append(f"the {len(past)} cache inputs are empty, as at the start of a text.")
    encoder = _load(tokenizer, None if pack else limit)
    return Texts(path, encoder, used, length, limit, past, tuple(notes), pack)


def _past(spec: InputSpec) -> tuple[int, ...] | None:
    """The shape of an empty cache: batch 1, past 0; None if the input does not look like a cache."""
    dims = spec.shape
    if (
        "past" not in spec.name
        or dims is None
        or not spec.dtype.name.startswith(("float", "bfloat"))
    ):
        return None
    open_axes = [axis for axis, dim in enumerate(dims) if axis and not isinstance(dim, int)]
    named = [axis for axis in open_axes if "past" in str(dims[axis])]
    open_axes = named or open_axes
    if len(open_axes) != 1:
        return None
    return tuple(
        0 if axis in open_axes else dim if isinstance(dim, int) else 1
        for axis, dim in enumerate(dims)
    )


def _length(inputs: Sequence[InputSpec]) -> int | None:
    """The number of tokens that the shape of `input_ids` fixes."""
    for spec in inputs:
        if spec.name == IDS and spec.shape and isinstance(spec.shape[-1], int):
            return spec.shape[-1]
    return None


def _load(path: Path, limit: int | None) -> Tokenizer:
    from tokenizers import Tokenizer  # noqa: PLC0415 -- slow to import, rarely needed

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side has no narrower class
        raise DataError(
            f"{file} is no tokenizer that can be read ({error}): give a tokenizer.json."
        ) from error
    tokenizer.no_padding()  # the file may ask for both, for training
    if limit is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(limit)
    return tokenizer


def _pad(tokenizer: Tokenizer) -> int:
    found = (tokenizer.token_to_id(token) for token in PADS)
    return next((index for index in found if index is not None), 0)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if text := line.strip():
                    yield number, text
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is no text that can be read ({error}): save it as UTF-8."
        ) from error
