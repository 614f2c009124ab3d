"""Each kind of source, the stacking rule, the checks of a feed, and their sentences."""

from __future__ import annotations

import gc
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile.calib.data import Data, DataOptions, Feed, InputSpec, check_feed, open_data
from qcompile.errors import DataError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

F32 = np.dtype(np.float32)
I64 = np.dtype(np.int64)
X = InputSpec("x", F32, ("N", 3))
IDS = InputSpec("ids", I64, ("N", "S"))


def spec(
    dtype: Any = np.float32, shape: tuple[int | str | None, ...] | None = None, **more: Any
) -> InputSpec:
    return InputSpec("x", np.dtype(dtype), shape, **more)


def opened(source: object, *inputs: InputSpec, samples: int | None = None) -> Data:
    return open_data(source, inputs or (X,), DataOptions(samples=samples))


def values(data: Data) -> list[list[Any]]:
    return [feed["x"].tolist() for feed in data]


def rows(count: int) -> NDArray[np.float32]:
    return np.arange(count * 3, dtype=np.float32).reshape(count, 3)


def assert_same(data: Data, expected: list[Feed]) -> None:
    """Two passes give the expected feeds, and the length agrees."""
    for _ in range(2):
        got = list(data)
        assert len(got) == len(data) == len(expected)
        for feed, want in zip(got, expected, strict=True):
            assert list(feed) == list(want)
            for name in want:
                np.testing.assert_array_equal(feed[name], want[name], strict=True)


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


# ---- stored arrays


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


# ---- Python objects


class Reader:
    """As onnxruntime's CalibrationDataReader, which is an iterator too."""

    def __init__(self, feeds: list[Any]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> Any:
        return next(self.feeds, None)

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Any:
        raise AssertionError


class Rewindable(Reader):
    def __init__(self, feeds: list[Any]) -> None:
        super().__init__(feeds)
        self.all = feeds

    def rewind(self) -> None:
        self.feeds = iter(self.all)


class Shuffled:
    """Iterable again, but each time in another order."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        self.passes += 1
        return iter([rows(1) + self.passes, rows(1) - self.passes])


def test_iterables_and_readers_can_be_iterated_again() -> None:
    feeds: list[Feed] = [{"x": rows(2)}, {"x": rows(1)}]
    used = Rewindable(feeds)
    used.get_next()
    for source in (feeds, tuple(feeds), iter(feeds), Reader(feeds), used):
        assert_same(opened(source), feeds)
    assert_same(opened(Reader([rows(1)])), [{"x": rows(1)}])
    assert_same(opened(Shuffled()), [{"x": rows(1) + 1}, {"x": rows(1) - 1}])
    assert opened(feeds).description == "2 feeds of the Python list"


def test_spool_serves_two_passes_at_once_and_is_removed() -> None:
    name = InputSpec("a/b", np.dtype(object), ("N",))
    feeds: list[Feed] = [
        {"x": rows(1), "a/b": np.array(["a", "bc"], object)},
        {"x": rows(2), "a/b": np.array([], object)},
    ]
    data = opened(iter(feeds), X, name)
    first, second = iter(data), iter(data)
    assert next(first)["a/b"].tolist() == ["a", "bc"]
    assert next(second)["x"].tolist() == next(iter(data))["x"].tolist()
    assert next(first)["a/b"].dtype == object
    assert_same(data, feeds)
    folder = data._source.samples.__self__._folder  # type: ignore[attr-defined]
    assert len(list(folder.iterdir())) == 2
    del data, first, second
    gc.collect()
    assert not folder.exists()


def test_endless_generator_is_read_only_as_far_as_asked() -> None:
    made = 0

    def endless() -> Iterator[Feed]:
        nonlocal made
        while True:
            made += 1
            yield {"x": rows(1)}

    data = opened(endless(), samples=3)
    next(iter(data))
    assert made == 1
    assert len(data) == 3
    assert len(list(data)) == 3
    assert made == 3


def test_failed_iterable_fails_again() -> None:
    def broken() -> Iterator[Feed]:
        yield {"x": rows(1)}
        raise KeyError("lost")

    data = opened(broken())
    for _ in range(2):
        with pytest.raises(
            DataError,
            match=r"the Python generator raised KeyError at sample 1: 'lost'; correct it\.",
        ):
            list(data)

    data = opened(iter([{"x": rows(1)}, {"x": rows(1) + np.inf}, {"x": rows(1)}]))
    for _ in range(2):
        with pytest.raises(DataError, match=r"sample 1 of the Python list_iterator: 'x' holds NaN"):
            len(data)


def test_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(
        DataError,
        match=r"samples cannot be kept in .+ \(.*No space left on device\): free space there, or set"
        r" TMPDIR",
    ):
        list(opened(iter([rows(1)])))


def test_object_that_is_no_source() -> None:
    with pytest.raises(
        DataError,
        match=r"the Python int is no calibration data: give a path, an iterable of feeds \(dicts of",
    ):
        opened(3)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_calib_data.py").write_text(
        "import numpy as np\n"
        "def feeds():\n"
        "    for i in range(2):\n"
        "        yield {'x': np.full((1, 3), i, np.float32)}\n"
        "def broken():\n"
        "    raise ValueError('no such disk')\n"
        "def nothing():\n"
        "    pass\n"
    )
    yield "my_calib_data"
    sys.modules.pop("my_calib_data", None)


def test_module_function(module: str) -> None:
    path = list(sys.path)
    assert values(opened(f"{module}:feeds")) == [[[0, 0, 0]], [[1, 1, 1]]]
    assert sys.path == path
    assert opened(f"{module}:feeds").description == f"{module}:feeds"


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("my_calib_dat:feeds", r" cannot be imported \(ModuleNotFoundError: .+\): name one as in"),
        ("my_calib_data:feed", r" an iterable of feeds\. Did you mean 'feeds'\?"),
        ("my_calib_data:np", r"module 'my_calib_data' has no function 'np': name one that returns"),
        ("my_calib_data:broken", r"the function raised ValueError: no such disk; correct it\."),
        ("my_calib_data:nothing", r"my_calib_data:nothing is no calibration data"),
    ],
)
def test_wrong_module_function(module: str, function: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        opened(function)


# ---- checks of one feed


def test_feed_has_the_order_and_types_of_the_inputs() -> None:
    optional = InputSpec("o", F32, None, required=False)
    feed = check_feed(
        {"ids": np.array([[1]], np.int32), "x": [[1.0, 2.0, 3.0]]}, [X, IDS, optional], ""
    )
    assert list(feed) == ["x", "ids"]
    assert (feed["x"].dtype, feed["ids"].dtype) == (F32, I64)
    assert list(check_feed({"o": 1.0}, [optional], "")) == ["o"]


@pytest.mark.parametrize(
    ("feed", "sentence"),
    [
        (
            {"X1": rows(1), "ids": [[1]]},
            r"^here has an array 'X1', which is no input of the model \(x, ids\): rename or drop it\.$",
        ),
        ({"idx": [[1]]}, r"drop it\. Did you mean 'ids'\?"),
        ({0: [[1]]}, r"has an array 0, which"),
        ({}, r"^here lacks the required input x, ids: add the array\."),
        ((rows(1), 7), r"^here is a tuple: give a dict of arrays by input name, without labels\."),
        ([1, 2], r"^here is a list: give a dict"),
        (None, r"^here is a NoneType: give a dict"),
        (
            rows(1),
            r"^here fits only a model with one required input, and this one has x, ids: give",
        ),
    ],
)
def test_feed_names(feed: object, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        check_feed(feed, [X, IDS], "here")


class Stubborn:
    def __array__(self, *_: object, **__: object) -> NDArray[Any]:
        raise RuntimeError("it is on the GPU")


@pytest.mark.parametrize(
    ("value", "wanted", "sentence"),
    [
        (Stubborn(), X, r"^here: 'x' is no array \(it is on the GPU\): give a NumPy array\."),
        ([[1, 2], [3]], X, r"is no array \(.+\): give a NumPy array\."),
        (
            np.zeros(3, F32),
            X,
            r"has shape \[3\], the model wants float32\[N, 3\]: add the leading \(batch\) dim",
        ),
        (np.zeros((1, 1, 1, 3), F32), X, r"has shape \[1, 1, 1, 3\], .+: reshape it\."),
        (
            np.zeros((1, 4), F32),
            spec(shape=(None, 3)),
            r"has shape \[1, 4\], the model wants float32\[\?, 3\]: keep to the fixed dimensions\.",
        ),
        (np.zeros((2, 3), F32), spec(shape=(1, 3)), r"has shape \[2, 3\]"),
        (np.zeros(3, I64), spec(), r"holds int64, the model wants float32\[\.\.\.\]: convert the"),
        (np.zeros(3), spec(np.int32), r"holds float64, the model wants int32"),
        (np.array(["a"]), spec(), r"holds <U1, the model wants float32"),
        (np.zeros(3), spec(object), r"holds float64, the model wants string\[\.\.\.\]"),
        (np.array(["a", 1], object), spec(object), r"holds object, the model wants string"),
        (np.zeros(3, complex), spec(), r"holds complex128"),
        (np.array([0, np.nan]), spec(), r"holds NaN or infinity, first at \[1\]: correct the"),
        (np.array(-np.inf), spec(), r"holds NaN or infinity, first at \[\]"),
        (
            np.array([1e6, -1]),
            spec(np.float16),
            r"holds values from -1\.0 to 1000000\.0, which float16 cannot hold: scale or correct",
        ),
        (np.array([300, -1]), spec(np.uint8), r"from -1 to 300, which uint8 cannot hold"),
        (np.array([-1], np.int8), spec(np.uint8), r"from -1 to -1, which uint8 cannot hold"),
        (np.array([2]), spec(bool), r"from 2 to 2, which bool cannot hold"),
        (np.array([2**64 - 1], np.uint64), spec(np.int64), r"which int64 cannot hold"),
        (np.array([9]), spec(ml_dtypes.int4), r"from 9 to 9, which int4 cannot hold"),
    ],
)
def test_wrong_value(value: object, wanted: InputSpec, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        check_feed({"x": value}, [wanted], "here")


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.ones((2, 3)), np.float32),
        (np.ones((2, 3)), np.float16),
        (np.ones((2, 3), ">f4"), np.float32),
        (np.ones((2, 3)), ml_dtypes.bfloat16),
        (np.ones((2, 3), np.float16), np.float64),
        (np.ones((2, 3), np.int64), np.int32),
        (np.ones((2, 3), bool), np.int64),
        (np.ones((2, 3), np.uint8), bool),
        (np.ones((2, 3), np.int8), ml_dtypes.int4),
        (np.ones((2, 0)), np.float32),
        (np.ones((2, 0), np.int64), np.uint8),
        (np.float64(3), np.float32),
        (7, np.int64),
        (np.asfortranarray(np.ones((2, 3), np.float32)), np.float32),
    ],
)
def test_lossless_kinds_are_cast(value: Any, dtype: Any) -> None:
    got = check_feed({"x": value}, [spec(dtype)], "here")["x"]
    assert got.dtype == dtype
    assert got.flags.c_contiguous
    assert got.shape == np.shape(value)
    np.testing.assert_array_equal(got.astype(float), np.asarray(value).astype(float))


@given(
    hnp.arrays(
        st.sampled_from([np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64]),
        hnp.array_shapes(max_dims=2, max_side=3),
    ),
    st.sampled_from([np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64]),
)
def test_integers_are_cast_or_refused(array: NDArray[Any], dtype: Any) -> None:
    limits = np.iinfo(dtype)
    fits = all(limits.min <= int(value) <= limits.max for value in array.flat)
    try:
        got = check_feed({"x": array}, [spec(dtype)], "here")["x"]
    except DataError:
        assert not fits
    else:
        assert fits
        assert [int(v) for v in got.flat] == [int(v) for v in array.flat]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_shape_is_accepted_where_every_fixed_dimension_agrees(
    shape: list[int], data: st.DataObject
) -> None:
    dims = data.draw(
        st.tuples(*(st.sampled_from([size, size + 1, "N", None]) for size in shape)), "dims"
    )
    fits = all(dim in (size, "N", None) for dim, size in zip(dims, shape, strict=True))
    if fits:
        check_feed({"x": np.zeros(shape)}, [spec(shape=dims)], "here")
        return
    with pytest.raises(DataError, match=re.escape(str(shape))):
        check_feed({"x": np.zeros(shape)}, [spec(shape=dims)], "here")


@given(st.integers(0, 4), st.integers(1, 3))
def test_stacked_samples_join_to_the_array(count: int, width: int) -> None:
    x = np.arange(count * width, dtype=np.float32).reshape(count, width)
    data = opened({"x": x}, spec(shape=("N", width)))
    assert len(data) == count
    if count:
        np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in data]), x)


def test_input_spec_is_shown_as_in_the_sentences() -> None:
    assert str(spec(np.int64, (1, "N", None, "", -1))) == "int64[1, N, ?, ?, ?]"
    assert str(spec(object, ())) == "string[]"
