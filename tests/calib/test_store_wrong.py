"""Files of statistics that say what cannot be."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statistic import tiny

from qcompile.calib import store
from qcompile.calib.histogram import Histogram, Window
from qcompile.errors import DataError


def window(start: int, *counts: int) -> Histogram:
    return Histogram(0, Window(start, np.array(counts, np.int64)), Window())


@pytest.mark.parametrize(
    "wrong",
    [{"low": float("nan")}, {"low": 3.0}, {"histogram": window(-40000, 1)}, {"histogram": window(32767, 1, 1)},
     {"histogram": window(16000, -1)}],
)  # fmt: skip
def test_impossible_numbers(
    wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tiny()
    tensors = {"t": dataclasses.replace(found.tensors["t"], **wrong)}
    true_dumps = store.json.dumps
    monkeypatch.setattr(store.json, "dumps", lambda text, **_: true_dumps(text))  # NaN as well
    store.save(dataclasses.replace(found, tensors=tensors), tmp_path / "x.stats")
    with pytest.raises(DataError, match="is no statistics file, or is damaged"):
        store.load(tmp_path / "x.stats")


def test_a_small_file_that_unpacks_to_much(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.stats", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("statistics.json", b" " * (300 << 20))
    with pytest.raises(DataError, match="bytes unpacked are more than statistics take"):
        store.load(tmp_path / "x.stats")
