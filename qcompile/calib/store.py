"""Statistics on disk: an `.npz` of plain arrays, which `numpy.load` reads without pickle, and a JSON text in it.

Arrays of the same kind of all tensors are stored end to end; `statistics.json` tells how they are cut. The
same statistics give the same bytes.
"""

from __future__ import annotations

import dataclasses
import io as streams
import json
import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompile.calib.histogram import SIGN, Histogram, Window
from qcompile.calib.statistics import SUFFIX, Key, Shard, Statistics
from qcompile.calib.stats import Channels, Extremes, TensorStats
from qcompile.errors import DataError, brief
from qcompile.graph.publish import atomic
from qcompile.run.session import Feed

FORMAT = 1
_TEXT = "statistics.json"
_KINDS = {
    "lows": "f4", "highs": "f4", "bins": "i8", "sums": "f8", "squares": "f8", "channel_lows": "f4",
    "channel_highs": "f4", "gram": "f8",
}  # fmt: skip
_INFLATED, _RATIO = 256 << 20, 100  # what a file may unpack to: bytes, and times its own size
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of every member: the clock must not be in the bytes
_UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError, zipfile.BadZipFile,
    zlib.error, tokenize.TokenError, SyntaxError, NotImplementedError, RuntimeError, OverflowError, MemoryError, RecursionError,
)  # fmt: skip


def save(found: Statistics, path: Path) -> None:
    """`path` holds the statistics; it is replaced only when whole.

    Raises:
        OutputError: it cannot be written.
    """
    cut = _Cut({kind: [] for kind in _KINDS})
    tensors = [cut.tensor(name, stats) for name, stats in found.tensors.items()]
    feeds = {"held": _named("held", found.held), "few": _named("few", found.few)}
    text = {
        "format": FORMAT,
        "key": dataclasses.asdict(found.key),
        "samples": found.samples, "skipped": found.skipped, "shared": found.shared, "unobserved": dict(found.unobserved),
        "forced": list(found.forced), "tensors": tensors,
        **{kind: [[[n, m, str(a.dtype)] for n, m, a in feed] for feed in listed] for kind, listed in feeds.items()},
    }  # fmt: skip
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _write(archive, _TEXT, json.dumps(text, indent=1, allow_nan=False).encode(), packed=True)
        for kind, parts in cut.arrays.items():
            whole = np.concatenate([np.zeros(0, _KINDS[kind]), *parts], dtype=_KINDS[kind])
            _write(archive, f"{kind}.npy", _npy(whole), packed=True)
        for listed in feeds.values():
            for feed in listed:
                for _, member, array in feed:
                    _write(archive, f"{member}.npy", _npy(array), packed=False)


def is_statistics(path: Path) -> bool:
    """Whether a file looks like one of statistics, damaged or not."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _TEXT in archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError):
        return path.suffix == SUFFIX


def load(path: Path) -> Statistics:
    """The statistics in a file.

    Raises:
        DataError: it does not exist, is no such file, is damaged or of another format.
    """
    if not path.is_file():
        raise DataError(f"there are no statistics at {path}: make them with `qcompile calibrate`.")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if size > max(_INFLATED, _RATIO * path.stat().st_size):
                raise ValueError(f"{size} bytes unpacked are more than statistics take")
            text = json.loads(archive.read(_TEXT))
            if text["format"] != FORMAT:
                raise DataError(
                    f"{path} has format {text['format']}, and this version of qcompile reads {FORMAT}: "
                    "gather the statistics anew."
                )
            arrays = {kind: _array(archive, kind) for kind in _KINDS}
            if any(a.dtype != _KINDS[kind] or a.ndim != 1 for kind, a in arrays.items()):
                raise ValueError("an array is of another type")
            feeds: dict[str, list[Feed]] = {
                kind: [
                    {n: _typed(_array(archive, m), d) for n, m, d in feed} for feed in text[kind]
                ]
                for kind in ("held", "few")
            }
        return _statistics(text, arrays, feeds)
    except _UNREADABLE as error:
        raise DataError(
            f"{path} is no statistics file, or is damaged ({type(error).__name__}: {brief(error)}): make it anew "
            "with `qcompile calibrate`."
        ) from error


def _statistics(
    text: dict[str, Any], arrays: Mapping[str, npt.NDArray[Any]], feeds: Mapping[str, list[Feed]]
) -> Statistics:
    rest = _Rest(dict.fromkeys(arrays, 0), arrays)
    tensors = {row["name"]: rest.tensor(row) for row in text["tensors"]}
    if any(rest.places[kind] != array.size for kind, array in arrays.items()):
        raise ValueError("an array is longer than its parts")
    key = text["key"]
    return Statistics(
        key=Key(key["model"], key["title"], tuple(Shard(**shard) for shard in key["shards"]), dict(key["versions"])),
        tensors=tensors, samples=int(text["samples"]), skipped=int(text["skipped"]), shared=bool(text["shared"]),
        unobserved=dict(text["unobserved"]), held=feeds["held"], few=feeds["few"],
        forced=tuple(text["forced"]),
    )  # fmt: skip


@dataclasses.dataclass
class _Cut:
    """Cuts tensors into rows of JSON and arrays."""

    arrays: dict[str, list[npt.NDArray[Any]]]

    def tensor(self, name: str, stats: TensorStats) -> dict[str, Any]:
        """The row of a tensor; its arrays are appended."""
        seen = stats.extremes
        self._keep(lows=seen.lows, highs=seen.highs)
        row: dict[str, Any] = {
            "name": name, "count": stats.count, "low": stats.low, "high": stats.high,
            "infinite": stats.infinite, "samples": seen.samples, "kept": int(seen.lows.size),
            "low_sum": seen.low_sum, "high_sum": seen.high_sum,
        }  # fmt: skip
        if stats.histogram is not None:
            sides = (stats.histogram.positive, stats.histogram.negative)
            self._keep(bins=np.concatenate([side.counts for side in sides]))
            row["zeros"] = stats.histogram.zeros
            row["windows"] = [[side.start, int(side.counts.size)] for side in sides]
        if stats.channels is not None:
            mine = stats.channels
            self._keep(
                sums=mine.sums,
                squares=mine.squares,
                channel_lows=mine.lows,
                channel_highs=mine.highs,
            )
            row["channels"] = [int(mine.sums.size), mine.axis, mine.count, mine.square_count]
        if stats.gram is not None:
            self._keep(gram=stats.gram.reshape(-1))
            row["gram"] = [int(stats.gram.shape[0]), stats.rows]
        return row

    def _keep(self, **arrays: npt.NDArray[Any]) -> None:
        for kind, array in arrays.items():
            self.arrays[kind].append(array)


@dataclasses.dataclass
class _Rest:
    """Puts tensors together again, one after the other."""

    places: dict[str, int]
    arrays: Mapping[str, npt.NDArray[Any]]

    def tensor(self, row: Mapping[str, Any]) -> TensorStats:
        """The statistics of the next tensor."""
        kept = row["kept"]
        seen = Extremes(
            int(row["samples"]), float(row["low_sum"]), float(row["high_sum"]),
            self._take("lows", kept), self._take("highs", kept),
        )  # fmt: skip
        if not (
            math.isfinite(row["low"]) and math.isfinite(row["high"]) and row["low"] <= row["high"]
        ):
            raise ValueError(f"tensor {row['name']!r} has no range")
        made = TensorStats(
            int(row["count"]), float(row["low"]), float(row["high"]), seen, int(row["infinite"])
        )
        if "windows" in row:
            sides = [Window(int(start), self._take("bins", size)) for start, size in row["windows"]]
            if any(
                w.start < 0 or w.start + w.counts.size > SIGN or (w.counts < 0).any() for w in sides
            ):
                raise ValueError(f"tensor {row['name']!r} has an impossible histogram")
            made.histogram = Histogram(int(row["zeros"]), *sides)
        if "channels" in row:
            width, axis, count, square_count = map(int, row["channels"])
            made.channels = Channels(
                axis, count, self._take("sums", width), self._take("channel_lows", width),
                self._take("channel_highs", width), square_count, self._take("squares", width),
            )  # fmt: skip
        if "gram" in row:
            width, made.rows = map(int, row["gram"])
            made.gram = self._take("gram", width * width).reshape(width, width)
        return made

    def _take(self, kind: str, size: int) -> npt.NDArray[Any]:
        place = self.places[kind]
        part = self.arrays[kind][place : place + size]
        if size < 0 or part.size != size:
            raise ValueError(f"{kind} is too short")
        self.places[kind] = place + size
        return part.copy()


def _named(kind: str, feeds: Sequence[Feed]) -> list[list[tuple[str, str, npt.NDArray[Any]]]]:
    """(input, member of the archive, array) of each feed's arrays."""
    return [
        [
            (name, f"{kind}/{i}/{j}", np.asarray(array))
            for j, (name, array) in enumerate(feed.items())
        ]
        for i, feed in enumerate(feeds)
    ]


def _npy(array: npt.NDArray[Any]) -> bytes:
    stream = streams.BytesIO()
    plain = array.astype(np.str_) if array.dtype == object else array
    if plain.dtype.kind == "V":  # bfloat16 and its like: .npy does not know their names
        plain = plain.view(f"u{plain.dtype.itemsize}")
    np.lib.format.write_array(
        stream, np.ascontiguousarray(plain).reshape(plain.shape), allow_pickle=False
    )
    return stream.getvalue()


def _typed(array: npt.NDArray[Any], kind: str) -> npt.NDArray[Any]:
    """An array of a feed as it was before `_npy`."""
    if kind == "object":
        return array.astype(object)
    if array.dtype == kind:
        return array
    return array.view(np.dtype(getattr(ml_dtypes, kind)))


def _write(archive: zipfile.ZipFile, name: str, data: bytes, *, packed: bool) -> None:
    member = zipfile.ZipInfo(name, _EPOCH)
    member.external_attr = 0o644 << 16
    how = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    archive.writestr(member, data, how, compresslevel=1)


def _array(archive: zipfile.ZipFile, member: str) -> npt.NDArray[Any]:
    stream = streams.BytesIO(archive.read(f"{member}.npy"))  # all of it: its checksum first
    array: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    if stream.read(1):
        raise ValueError(f"{member} has more bytes than its array")
    return array
