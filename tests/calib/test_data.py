"""Which source a path is, and how many samples of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from feeds import opened, rows

from qcompile.errors import DataError, RecipeError


def test_import_is_cheap() -> None:
    code = "import sys, qcompile.calib.data; print({'PIL', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "set()"


def test_folder_without_data_or_with_two_kinds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("labels")
    with pytest.raises(
        DataError, match=r"holds no calibration data: give a \.npz, \.npy, \.txt or image file, or"
    ):
        opened(tmp_path)
    np.savez(tmp_path / "a.npz", x=rows(1))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.PNG").touch()
    with pytest.raises(
        DataError, match=r" mixes 1 \.npz and 1 image files: keep one kind in a folder\."
    ):
        opened(tmp_path)
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=r"a\.csv holds no calibration data"):
        opened(tmp_path / "a.csv")


@pytest.mark.parametrize("path", ["missing", "missing.npz", r"C:\missing", "a:b:c"])
def test_missing_path(path: str) -> None:
    with pytest.raises(
        DataError,
        match=r"there is no calibration data at '.+': give a file or folder that exists, or module:",
    ):
        opened(path)


def test_missing_path_object_is_no_function() -> None:
    with pytest.raises(DataError, match=r"there is no calibration data at 'a:b'"):
        opened(Path("a:b"))


def test_samples_must_be_positive() -> None:
    with pytest.raises(RecipeError, match=r"--samples is 0: give 1 or more, or leave it out\."):
        opened([rows(1)], samples=0)


@pytest.mark.parametrize("source", [[], iter([]), rows(0), {"x": rows(0)}])
def test_empty_source(source: object) -> None:
    data = opened(source)
    assert len(data) == 0
    with pytest.raises(DataError, match=r": there is no sample in it, give at least one\."):
        list(data)
