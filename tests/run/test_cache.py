"""The store of measurements: what it keeps, and what it puts up with."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import qcompile.run.cache
from qcompile.run.cache import FORMAT, Cache, cache_folder, open_cache


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "times.json"


@pytest.mark.parametrize("word", ["", " ", "off", "OFF"])
def test_turned_off(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", word)
    assert cache_folder() is None
    assert open_cache(1).path is None


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("QCOMPILE_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "qcompile"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / "home" / ".cache" / "qcompile"
    monkeypatch.setattr("sys.platform", "win32")
    assert cache_folder() == tmp_path / "local" / "qcompile"


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("no home")

    for name in ("QCOMPILE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert cache_folder() is None


def test_kept(path: Path) -> None:
    cache = Cache(path, "m")
    assert cache.get("a") is None
    cache.add({"a": (1.5, 2.0)})
    assert cache.get("a") == (1.5, 2.0)
    assert Cache(path, "m").get("a") == (1.5, 2.0)
    assert [p.name for p in path.parent.iterdir()] == ["times.json"]


def test_nothing_to_keep_makes_no_file(path: Path) -> None:
    Cache(path, "m").add({})
    assert not path.parent.exists()


def test_off_remembers_within_the_process_only() -> None:
    cache = Cache(None, "m")
    cache.add({"a": (1.0,)})
    assert cache.get("a") == (1.0,)
    assert Cache(None, "m").get("a") is None


def test_two_processes_lose_nothing(path: Path) -> None:
    """Both read the empty file first; of one signature the last writer's numbers stay."""
    first, second = Cache(path, "m"), Cache(path, "m")
    first.add({"a": (1.0,), "both": (1.0,)})
    second.add({"b": (2.0,), "both": (2.0,)})
    first.add({"c": (3.0,)})
    known = Cache(path, "m")
    assert {key: known.get(key) for key in ("a", "b", "c", "both")} == {
        "a": (1.0,), "b": (2.0,), "c": (3.0,), "both": (2.0,),
    }  # fmt: skip
    assert first.get("b") == (2.0,)


def _file(**other: object) -> bytes:
    table = {"format": FORMAT, "machine": "m", "times": {"old": [1.0]}}
    return json.dumps(table | other).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, _file(format=FORMAT + 1), _file(format=None),
        _file(machine="another"), _file(times=[1]), _file(times=None), _file()[:-5],
    ],
    ids=range(12),
)  # fmt: skip
def test_a_broken_or_foreign_file_is_replaced(content: bytes, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    cache = Cache(path, "m")
    assert cache.get("old") is None
    cache.add({"a": (1.0,)})
    table = json.loads(path.read_text("utf-8"))
    assert table == {"format": FORMAT, "machine": "m", "times": {"a": [1.0]}}


def test_the_file_that_is_not_broken(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(_file())
    assert Cache(path, "m").get("old") == (1.0,)


@pytest.mark.parametrize("row", ["NaN", "Infinity", "-1", "true", '"1"', "null", "[1]"])
def test_what_is_no_time_is_ignored(row: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_text(
        f'{{"format": {FORMAT}, "machine": "m", "times": {{"bad": [1, {row}], "good": [2]}}}}'
    )
    cache = Cache(path, "m")
    assert cache.get("bad") is None
    assert cache.get("good") == (2.0,)


def test_a_folder_in_place_of_the_file(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.mkdir(parents=True)
    with caplog.at_level(logging.INFO):
        cache = Cache(path, "m")
        cache.add({"a": (1.0,)})
    assert cache.get("a") == (1.0,)
    assert "not kept" in caplog.text
    assert [p.name for p in path.parent.iterdir()] == ["times.json"]


def test_a_folder_that_cannot_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("mine")
    with caplog.at_level(logging.INFO):
        cache = Cache(tmp_path / "file" / "times.json", "m")
        cache.add({"a": (1.0,)})
    assert cache.get("a") == (1.0,)
    assert "not kept" in caplog.text
    assert (tmp_path / "file").read_text() == "mine"


def test_a_write_that_fails_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(*_: object) -> None:
        raise PermissionError(13, "in use")

    Cache(path, "m").add({"a": (1.0,)})
    monkeypatch.setattr("os.replace", replace)
    Cache(path, "m").add({"b": (2.0,)})
    assert [p.name for p in path.parent.iterdir()] == ["times.json"]
    assert Cache(path, "m").get("a") == (1.0,)
    assert Cache(path, "m").get("b") is None


def test_the_oldest_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qcompile.run.cache, "_MOST", 2)
    for name in "abc":
        Cache(path, "m").add({name: (1.0,)})
    known = Cache(path, "m")
    assert [known.get(name) for name in "abc"] == [None, (1.0,), (1.0,)]


def test_one_file_for_each_kind_of_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [open_cache(1).path, open_cache(2).path]
    for name, other in (
        ("version", lambda: "0.0"), ("_cpu", lambda: "another"), ("cpu_flags", lambda: frozenset({"sse"})), ("FORMAT", 99),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(qcompile.run.cache, name, other)
            paths.append(open_cache(1).path)
    assert len(set(paths)) == 6
    assert open_cache(1).path == paths[0]
