"""Where results go: a file appears under its name only when it is whole, and what was begun and killed is swept away.

Results are made in a folder of their own beside their place, for a rename is atomic only within one file system. The
maker holds a lock on that folder, which the kernel drops when the process ends, however it ends: a folder without
one was left behind, and the next result that goes to the same place removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from qcompile.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PART = ".qcompile-part"  # how the folders of unfinished results end


def data_file(path: Path) -> Path:
    """Where the weights of the model at `path` stand if they are many."""
    return path.with_name(f"{path.name}.data")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path in a fresh folder beside `path`; what was written there becomes `path` at the end.

    A data file beside it, named by `data_file`, moves along: both are replaced, or neither is.

    Raises:
        OutputError: the folder is missing or cannot be written, the disk is full, or a file that is read meanwhile
            is gone.
    """
    folder, lock = None, None
    try:
        check_writable(path)
        _sweep(path.parent)
        folder, lock = _fresh(path)
        yield folder / path.name
        _publish(folder / path.name, path)
    except OSError as error:
        reason, other = error.strerror or str(error), error.filename
        if folder is not None and isinstance(other, str) and not _ours(Path(other), path, folder):
            reason += f": {other}"  # not the result, but what it is made of
        raise OutputError(f"{path} could not be written: {reason}.") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _ours(file: Path, path: Path, folder: Path) -> bool:
    return file.is_relative_to(folder) or file in (path, data_file(path))


def write_text(path: Path, text: str) -> None:
    """`path` holds the text, as UTF-8.

    Raises:
        OutputError: as `atomic`.
    """
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8")


def _fresh(path: Path) -> tuple[Path, int | None]:
    """A new folder beside `path`, and the lock on it."""
    while True:
        name = f".{path.name[:40]}."
        folder = Path(tempfile.mkdtemp(prefix=name, suffix=PART, dir=path.parent))
        lock = _locked(folder, wait=True)
        if folder.exists():  # else another process swept it away before it was locked
            return folder, lock
        if lock is not None:
            os.close(lock)


def _sweep(parent: Path) -> None:
    """Removes the folders whose makers are gone."""
    with contextlib.suppress(OSError):
        for folder in sorted(parent.glob(f".*{PART}")):
            lock = None if folder.is_symlink() else _locked(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _locked(folder: Path, *, wait: bool = False) -> int | None:
    """An open handle that locks the folder; None if another one does, or the file system knows no locks."""
    if sys.platform == "win32":
        return None
    import fcntl  # noqa: PLC0415 - Windows lacks it

    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle


def _publish(made: Path, path: Path) -> None:
    """The files move to their places; if one cannot, what stood there is there again.

    Of two files the old ones go first: at no moment does a model stand beside the data of another.
    """
    data, place = data_file(made), data_file(path)
    if not data.exists():
        made.replace(path)
        return
    kept = {path: made.with_name("old"), place: made.with_name("old.data")}
    lock = _locked(path.parent, wait=True)  # two pairs must not mix
    try:
        for stands, aside in kept.items():
            if stands.exists():
                stands.replace(aside)
        data.replace(place)
        made.replace(path)
    except BaseException:
        if not data.exists():
            place.unlink(missing_ok=True)
        for stands, aside in kept.items():
            with contextlib.suppress(OSError):
                if aside.exists():
                    aside.replace(stands)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def check_writable(path: Path) -> None:
    """Nothing, if a file can be created at `path`.

    Raises:
        OutputError: it cannot.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name a file with -o.")
    if path.exists() and not path.is_file():
        raise OutputError(
            f"{path} cannot be written: it is no ordinary file. Choose another with -o."
        )
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist: create it, or change -o.")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OutputError(
            f"{path} cannot be written: check permissions, or choose another with -o."
        )


def check_apart(place: Path, inputs: Mapping[str, Path | None]) -> None:
    """Nothing, if `place` is none of the files that are read; `inputs` are named for people.

    Raises:
        OutputError: writing it would destroy one of them.
    """
    for kind, path in inputs.items():
        if path is None or not path.exists() or not place.exists():
            continue
        if place.samefile(path):
            raise OutputError(f"{place} is {kind} itself: choose another file with -o.")
        if path.is_dir() and place.resolve().is_relative_to(path.resolve()):  # of samples
            raise OutputError(f"{place} is a file of {kind}: choose another file with -o.")
