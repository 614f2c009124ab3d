"""Sources in Python: iterables, readers, functions of modules."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from feeds import X, assert_same, opened, rows, values

from qcompile.calib.data import Feed, InputSpec
from qcompile.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


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
