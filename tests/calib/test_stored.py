"""Stored arrays: files, the stacking rule, what is damaged."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from feeds import F32, I64, IDS, X, assert_same, opened, rows, spec

from qcompile.calib.data import DataOptions, Feed, InputSpec, check_feed, open_data
from qcompile.errors import DataError


def test_npz_folder_is_sorted_and_each_file_is_a_feed(tmp_path: Path) -> None:
    for name, value in [("b", 2), ("a", 1), ("c", 3)]:
        np.savez(tmp_path / f"{name}.npz", x=np.full((1, 3), value, np.float32))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.npz").write_text("not data")
    data = opened(tmp_path)
    assert_same(data, [{"x": np.full((1, 3), value, np.float32)} for value in (1, 2, 3)])
    assert data.description == f"3 .npz files of {tmp_path}"
    assert data.notes == ()
    first = open_data(str(tmp_path), (X,), DataOptions(samples=2))
    assert len(first) == len(list(first)) == 2
    assert first.description.endswith(", at most 2 samples")


def test_npy_file_and_folder(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(1))
    np.save(tmp_path / "b.npy", rows(2))
    assert_same(opened(tmp_path / "b.npy"), [{"x": rows(2)[:1]}, {"x": rows(2)[1:]}])
    assert len(opened(tmp_path)) == 3


STACKS = [
    # input shapes, array shapes, shapes in each sample (None: one feed)
    pytest.param([(3,)], [(5, 3)], [(3,)], id="one more dimension"),
    pytest.param([(1, 3)], [(5, 1, 3)], [(1, 3)], id="one more dimension, batch 1"),
    pytest.param([(8, 3)], [(5, 8, 3)], [(8, 3)], id="one more dimension, batch 8"),
    pytest.param([(1, 3), ()], [(5, 1, 3), (5,)], [(1, 3), ()], id="with a scalar"),
    pytest.param([("N", 3)], [(5, 3)], [(1, 3)], id="dynamic batch"),
    pytest.param([(None, 3)], [(5, 3)], [(1, 3)], id="nameless batch"),
    pytest.param([(-1, 3)], [(5, 3)], [(1, 3)], id="negative batch"),
    pytest.param([(1, 3)], [(5, 3)], [(1, 3)], id="batch 1"),
    pytest.param([("N", 3), ("N",)], [(5, 3), (5,)], [(1, 3), (1,)], id="with lengths"),
    pytest.param([("N", 3)], [(5, 3)], [(1, 3)], id="Fortran order"),
    pytest.param([(5, 3)], [(5, 3)], None, id="static batch"),
    pytest.param([("N",)], [(5,)], None, id="one dimension, perhaps a signal"),
    pytest.param([("N", 3), ("S", 3)], [(5, 3), (5, 3)], None, id="leading names differ"),
    pytest.param([("N", 3), ("M", 3)], [(5, 3), (4, 3)], None, id="leading lengths differ"),
    pytest.param([("N", 3), ()], [(5, 3), ()], None, id="a scalar beside a batch"),
    pytest.param([None], [(5, 3)], None, id="unknown rank"),
]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(("inputs", "shapes", "parts"), STACKS)
def test_stacking_rule(
    inputs: list[Any], shapes: list[Any], parts: list[Any] | None, stored: bool, tmp_path: Path
) -> None:
    specs = [InputSpec(f"x{i}", F32, shape) for i, shape in enumerate(inputs)]
    arrays: dict[str, Any] = {
        s.name: np.array(np.random.default_rng(0).normal(size=shape), np.float32, order="F")
        for s, shape in zip(specs, shapes, strict=True)
    }
    np.savez(tmp_path / "a.npz", **arrays)
    expected: list[Feed] = [arrays]
    if parts is not None:
        expected = [
            {n: a[i].reshape(part) for (n, a), part in zip(arrays.items(), parts, strict=True)}
            for i in range(5)
        ]
    assert_same(opened(tmp_path / "a.npz" if stored else arrays, *specs), expected)


def test_compressed_strings_and_names_with_slashes(tmp_path: Path) -> None:
    name = InputSpec("a/../b", np.dtype(object), ("N",))
    strings: dict[str, Any] = {"a/../b": np.array(["one", "two"])}
    np.savez_compressed(tmp_path / "a.npz", **strings)
    (feed,) = opened(tmp_path / "a.npz", name)
    assert feed["a/../b"].dtype == object
    assert feed["a/../b"].tolist() == ["one", "two"]


def test_narrow_floats_keep_their_type_through_a_file(tmp_path: Path) -> None:
    x = np.array([[1, 2, 0.5]], ml_dtypes.bfloat16)
    np.savez(tmp_path / "a.npz", x=x)
    assert_same(opened(tmp_path / "a.npz", spec(ml_dtypes.bfloat16, (1, 3))), [{"x": x}])
    assert_same(opened(iter([x]), spec(ml_dtypes.bfloat16, (1, 3))), [{"x": x}])
    other = {"x": np.ones(3, ml_dtypes.float8_e5m2)}
    got = check_feed(other, [spec(ml_dtypes.float8_e4m3fn)], "a")
    assert got["x"].astype(float).tolist() == [1, 1, 1]


def test_stored_sample_names_its_file_and_index(tmp_path: Path) -> None:
    x = rows(3)
    x[2, 1] = np.nan
    np.save(tmp_path / "a.npy", x)
    with pytest.raises(
        DataError,
        match=r"a\.npy \(sample 2\): 'x' holds NaN or infinity, first at \[0, 1\]: correct the",
    ):
        list(opened(tmp_path / "a.npy"))


def damaged(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "pickled":
        np.savez(buffer, x=np.array([{"a": 1}], dtype=object))
        return buffer.getvalue()
    if kind == "no array":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("x.npy", b"")
        return buffer.getvalue()
    np.savez(buffer, x=rows(50))
    whole = buffer.getvalue()
    return whole[:200] if kind == "cut" else whole[:300] + b"????" + whole[304:]


@pytest.mark.parametrize("kind", ["pickled", "no array", "cut", "flipped"])
def test_unreadable_npz(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(damaged(kind))
    data = opened(tmp_path / "a.npz")
    sentence = (
        r"a\.npz is no array file that can be read \(.+\): save numbers or strings with np\.save"
        r" or np\.savez, without pickled objects\."
    )
    with pytest.raises(DataError, match=sentence):
        list(data)
    with pytest.raises(DataError, match=sentence):
        len(data)


def test_unreadable_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(50))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:300])
    with pytest.raises(DataError, match=r"a\.npy is no array file that can be read"):
        list(opened(tmp_path / "a.npy"))
    np.save(tmp_path / "a.npy", np.array([None]))
    with pytest.raises(DataError, match=r"without pickled objects"):
        list(opened(tmp_path / "a.npy"))


def test_npy_needs_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(2))
    with pytest.raises(
        DataError,
        match=r"a\.npy fits only a model with one required input, and this one has x, ids: give"
        r" arrays by input name, in \.npz files or dicts\.",
    ):
        list(opened(tmp_path / "a.npy", X, IDS))
    optional = InputSpec("ids", I64, ("N", "S"), required=False)
    assert len(list(opened(tmp_path / "a.npy", X, optional))) == 2
    with pytest.raises(DataError, match=r"this one has none"):
        check_feed(rows(1), [], "sample 0")
