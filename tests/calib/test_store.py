"""Statistics on disk: nothing is lost, the bytes are the same each time, and damage is one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from qcompile.calib import store
from qcompile.calib.histogram import Histogram, Window
from qcompile.calib.statistics import Key, Shard, Statistics
from qcompile.calib.stats import Channels, Extremes, TensorStats
from qcompile.errors import DataError, OutputError

finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**62)
names = st.text(max_size=8)
BFLOAT = np.dtype(ml_dtypes.bfloat16)
# The first bytes of one array of this: its header is read long before its checksum.
LARGE = np.arange(2048, dtype=np.float32)


def numbers(dtype: Any, size: int) -> st.SearchStrategy[Any]:
    """Arrays of finite numbers, of so many."""
    kind = np.dtype(dtype)
    if kind.kind == "i":
        return npst.arrays(kind, size, elements=st.integers(0, 2**62))
    elements = st.floats(width=8 * kind.itemsize, allow_nan=False, allow_infinity=False)  # type: ignore[call-overload]
    return npst.arrays(kind, size, elements=elements)


@st.composite
def extremes(draw: st.DrawFn) -> Extremes:
    kept = draw(st.integers(0, 4))
    lows, highs = draw(numbers("f4", kept)), draw(numbers("f4", kept))
    return Extremes(draw(counts), draw(finite), draw(finite), lows, highs)


@st.composite
def windows(draw: st.DrawFn) -> Window:
    return Window(
        draw(st.integers(0, 32000)), draw(st.integers(0, 5).flatmap(lambda n: numbers("i8", n)))
    )


@st.composite
def channels(draw: st.DrawFn) -> Channels:
    size = draw(st.integers(0, 4))
    sums, squares, lows, highs = (draw(numbers(kind, size)) for kind in ("f8", "f8", "f4", "f4"))
    return Channels(
        draw(st.integers(-4, 4)), draw(counts), sums, lows, highs, draw(counts), squares
    )


grams = st.integers(0, 3).flatmap(lambda n: numbers("f8", n * n).map(lambda a: a.reshape(n, n)))
histograms = st.builds(Histogram, counts, windows(), windows())


@st.composite
def tensors(draw: st.DrawFn) -> TensorStats:
    """Of any kind: nothing seen, no histogram, no channels, infinities."""
    low, high = sorted((draw(finite), draw(finite)))
    made = TensorStats(draw(counts), low, high, draw(extremes()), draw(counts))
    made.histogram = draw(st.none() | histograms)
    made.channels = draw(st.none() | channels())
    made.gram = draw(st.none() | grams)
    made.rows = draw(counts) if made.gram is not None else 0
    return made


shapes = npst.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=3)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)
plain_arrays = st.sampled_from(["f2", "f4", "f8", ">f4", "i1", "u2", "i8", "?"]).flatmap(
    lambda kind: npst.arrays(kind, shapes)
)
halves = npst.arrays("u2", shapes).map(lambda a: a.view(BFLOAT))
strings = npst.arrays(object, shapes, elements=texts)
feeds = st.dictionaries(names, plain_arrays | halves | strings, max_size=3)
shards = st.builds(Shard, names, names, counts)
keys = st.builds(
    Key, names, names, st.lists(shards, max_size=3).map(tuple), st.dictionaries(names, names)
)
statistics = st.builds(
    Statistics, keys, st.dictionaries(names, tensors(), max_size=4), counts, counts,
    st.dictionaries(names, names, max_size=2), st.lists(feeds, max_size=2), st.lists(feeds, max_size=2),
    st.lists(names, max_size=2).map(tuple),
)  # fmt: skip


def plain(value: Any) -> Any:
    """Something that compares by value, with the types, shapes and bits of arrays."""
    if dataclasses.is_dataclass(value):
        fields = [(f.name, plain(getattr(value, f.name))) for f in dataclasses.fields(value)]
        return (type(value).__name__, *fields)
    if isinstance(value, np.ndarray):
        held = value.tolist() if value.dtype == object else value.tobytes()
        return (str(value.dtype), value.shape, held)
    if isinstance(value, dict):
        return [(key, plain(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return (type(value), value)


def some(**more: Any) -> Statistics:
    """Small statistics with one of everything."""
    made = TensorStats(
        5, -1.5, 2.0, Extremes(2, -2.0, 3.0, np.array([-1.5, -0.5], "f4"), np.array([1, 2], "f4")), 1,
        Histogram(256, Window(16000, np.array([256, 512], "i8")), Window(16001, np.array([256], "i8"))),
        Channels(-1, 2, np.array([1.0, 2.0]), np.zeros(2, "f4"), np.ones(2, "f4"), 2, np.ones(2)),
        np.eye(2), 3,
    )  # fmt: skip
    given = {"samples": 2, "held": [{"x": np.arange(4, dtype="f4")}], "few": [{"x": LARGE}]}
    key = Key(
        "a" * 64, "m.onnx", (Shard("2 feeds", "b" * 64, 2),), {"qcompile": "1", "onnxruntime": "2"}
    )
    return Statistics(key, {"t": made, "empty": TensorStats()}, **(given | more))


def stored(found: Statistics) -> bytes:
    """The bytes of its file."""
    with tempfile.TemporaryDirectory() as folder:
        store.save(found, Path(folder) / "x.stats")
        return (Path(folder) / "x.stats").read_bytes()


def reread(data: bytes) -> Statistics:
    """What a file of these bytes holds."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.stats").write_bytes(data)
        return store.load(Path(folder) / "x.stats")


DATA = stored(some())


# ---- nothing is lost


@settings(max_examples=30)
@given(found=statistics)
def test_round_trip(found: Statistics) -> None:
    data = stored(found)
    again = reread(data)
    assert plain(again) == plain(found)
    assert stored(again) == data


@pytest.mark.parametrize(
    "array",
    [
        np.array(3, "f2"), np.array([1, -2], BFLOAT), np.array(1, BFLOAT), np.array("é", object),
        np.array(["a", "", "größe"], object), np.array([], object), np.zeros((0, 3), "f4"), np.array(["ab", "c"]),
        np.array([np.nan, np.inf, -0.0], "f4"), np.array([1], ">i8"), np.array([1], ml_dtypes.int4),
        np.array([0.5], ml_dtypes.float8_e4m3fn), np.array(True),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)  # fmt: skip
def test_feeds_keep_type_shape_and_bits(array: Any) -> None:
    again = reread(stored(some(held=[{"x": array}, {"x": array, "y": np.ones(1)}])))
    assert plain(again.held) == plain([{"x": array}, {"x": array, "y": np.ones(1)}])


def test_transposed_arrays() -> None:
    array = np.arange(6, dtype="f4").reshape(2, 3).T
    (feed,) = reread(stored(some(held=[{"x": array}]))).held
    np.testing.assert_array_equal(feed["x"], array, strict=True)


def test_arrays_of_what_was_loaded_can_be_added_to() -> None:
    first, second = reread(DATA), reread(DATA)
    first.tensors["t"].add(second.tensors["t"])
    assert first.tensors["t"].count == 10
    assert plain(second) == plain(some())


# ---- the file


def test_the_same_statistics_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert stored(some()) == DATA
    assert stored(some(samples=3)) != DATA


def test_numpy_and_json_read_it_without_pickle(tmp_path: Path) -> None:
    store.save(some(held=[{"s": np.array(["a"], object)}]), tmp_path / "x.stats")
    with np.load(tmp_path / "x.stats", allow_pickle=False) as archive:
        arrays = {n: archive[n] for n in archive.files if n != "statistics.json"}
    assert {"lows", "bins", "sums", "gram", "held/0/0", "few/0/0"} <= set(arrays)
    assert all(array.dtype != object for array in arrays.values())
    assert arrays["lows"].tolist() == [-1.5, -0.5]
    assert arrays["held/0/0"].tolist() == ["a"]
    with zipfile.ZipFile(tmp_path / "x.stats") as archive:
        text = json.loads(archive.read("statistics.json"))
    assert text["format"] == store.FORMAT
    assert [row["name"] for row in text["tensors"]] == ["t", "empty"]
    assert text["key"]["shards"] == [
        {"description": "2 feeds", "digest": "b" * 64, "samples": 2, "manner": ""},
    ]


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "x.stats"
    path.write_text("old")
    store.save(some(), path)
    assert path.read_bytes() == DATA
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.stats"
    store.save(some(), path)
    with pytest.raises((TypeError, ValueError)):
        store.save(some(held=[{"x": np.array([{}, 1], dtype="O,f4")}]), path)
    assert path.read_bytes() == DATA
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match=r"the folder .* does not exist"):
        store.save(some(), tmp_path / "none" / "x.stats")


# ---- damage


def refused(data: bytes) -> bool:
    """Whether a file is refused in a sentence; if it is not, it holds what was saved."""
    try:
        found = reread(data)
    except DataError as error:
        return str(error).endswith(".") and "x.stats" in str(error)
    assert plain(found) == plain(some())
    return False


@pytest.mark.parametrize("step", [0, 1, 2])
def test_truncated(step: int) -> None:
    lengths = {*range(step, len(DATA), 67), *range(len(DATA) - 90 + step, len(DATA), 3)}
    assert all(refused(DATA[:length]) for length in lengths)
    assert all(refused(DATA[length:]) for length in list(lengths)[1::4] if length > 3)


def test_a_flipped_byte() -> None:
    """Anywhere: it is found, or hit what is not read."""
    random_ = random.Random(0)  # the same bytes each time
    places = random_.sample(range(len(DATA)), 300)
    found = [
        refused(DATA[:i] + bytes([DATA[i] ^ random_.randrange(1, 256)]) + DATA[i + 1 :])
        for i in places
    ]
    assert sum(found) > 0.8 * len(found)


def test_a_flipped_byte_in_the_header_of_a_large_feed() -> None:
    start = DATA.index(b"\x93NUMPY", DATA.index(b"few/0/0.npy"))
    assert all(
        refused(DATA[:i] + new + DATA[i + 1 :])
        for i in range(start, start + 76)
        for new in (b"\0", b"'", b"(", b",", b"9", b"\\", b"\n")
        if DATA[i : i + 1] != new
    )


def rewritten(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with another JSON text, whose checksum is right."""
    stream = BytesIO()
    with zipfile.ZipFile(BytesIO(DATA)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "statistics.json":
                text = json.loads(data)
                data = json.dumps(change(text) or text).encode()
            new.writestr(name, data)
    return stream.getvalue()


def test_the_text_alone_rewritten_is_fine() -> None:
    assert not refused(rewritten(lambda text: text))


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no format": lambda t: t.pop("format"),
    "no tensors": lambda t: t.pop("tensors"),
    "fewer tensors": lambda t: t["tensors"].pop(0) and None,
    "a tensor twice": lambda t: t["tensors"].append(t["tensors"][0]),
    "more kept": lambda t: t["tensors"][0].update(kept=99),
    "fewer kept": lambda t: t["tensors"][0].update(kept=1),
    "negative": lambda t: t["tensors"][0].update(kept=-1),
    "words": lambda t: t["tensors"][0].update(kept="two"),
    "infinite": lambda t: t["tensors"][0].update(count=float("inf")),
    "a large X'X": lambda t: t["tensors"][0].update(gram=[10**30, 1]),
    "another kind": lambda t: t["few"][0][0].__setitem__(2, "float99"),
    "another size": lambda t: t["few"][0][0].__setitem__(2, "complex256"),
    "no such array": lambda t: t["few"][0][0].__setitem__(1, "few/9/9"),
    "odd shard": lambda t: t["key"]["shards"][0].update(color="red"),
    "a list": lambda t: [t],
    "null": lambda t: t.update(key=None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_text_that_does_not_fit(change: str) -> None:
    assert refused(rewritten(CHANGES[change]))


def test_another_format() -> None:
    with pytest.raises(DataError, match=r"has format 99, and this version of qcompile reads 1: g"):
        reread(rewritten(lambda text: text.update(format=99)))


def test_what_is_no_such_file(tmp_path: Path) -> None:
    for data in (
        b"",
        b"hello\n",
        b"PK\x03\x04",
        b"PK\x05\x06" + bytes(18),
        b"\x93NUMPY",
        bytes(999),
    ):
        assert refused(data)
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    assert refused((tmp_path / "a.npz").read_bytes())
    with pytest.raises(DataError, match=r"a.stats: make them with `qcompile calibrate`"):
        store.load(tmp_path / "a.stats")
    with pytest.raises(DataError, match="there are no statistics at"):
        store.load(tmp_path)


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from qcompile.calib import store
path = Path(sys.argv[1])
two = [store.load(Path(name)) for name in sys.argv[2:]]
for turn in range(25):
    ready, write = os.pipe()
    child = os.fork()
    while not child:
        for found in two:
            store.save(found, path)
            os.write(write, b".")
    os.read(ready, 1)
    time.sleep(random.Random(turn).uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    os.close(ready), os.close(write)
    path.with_suffix(f".{turn}").write_bytes(path.read_bytes())
"""


def test_killed_while_it_saves(tmp_path: Path) -> None:
    """Under the final name there is always the old or the new file, whole."""
    two = [some(), some(samples=3, few=[{"x": LARGE[::-1].copy()}] * 3)]
    sources = [tmp_path / "first", tmp_path / "second"]
    for found, source in zip(two, sources, strict=True):
        store.save(found, source)
    words = [sys.executable, "-c", KILLS, tmp_path / "x.stats", *sources]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(words, env=env, timeout=60, check=True)
    whole = [source.read_bytes() for source in sources]
    left = [(tmp_path / f"x.{turn}").read_bytes() for turn in range(25)]
    assert set(left) == set(whole)
    for data in set(left):
        assert plain(reread(data)) == plain(two[whole.index(data)])
