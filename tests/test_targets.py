"""Target files: the ones that ship, one's own, and what is wrong in one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qcompile.errors import RecipeError
from qcompile.targets import schema
from qcompile.targets.schema import Cost, Target, detect, load_target, target_names

BASE = "extends = 'ort-cpu-x64-vnni'\n"


def test_names() -> None:
    assert target_names() == ["ort-cpu-arm64", "ort-cpu-x64-avx2", "ort-cpu-x64-vnni"]


@pytest.mark.parametrize("name", target_names())
def test_what_ships(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.title
    assert target.weight.startswith("int8.axis0.sym")
    assert len({(row.type, row.variant) for row in target.op}) == len(target.op)
    assert not {row.type for row in target.op} & set(target.refused)
    assert all(kernel for row in target.op for kernel in row.kernels)
    assert (target.saturating, target.activation[0]) == (
        name.endswith("avx2"),
        "i" if "arm" in name else "u",
    )


def test_rows() -> None:
    target = load_target("ort-cpu-x64-vnni")
    assert target.row("Fancy") is None
    general, depthwise = target.row("Conv"), target.row("Conv", "depthwise")
    assert general is not None
    assert depthwise is not None
    assert (general.variant, depthwise.variant) == ("", "depthwise")
    assert target.row("Conv", "none such") == general


def test_cost() -> None:
    assert Cost(mac=20.0, elem=0.5, input=0.25).ns(1000, 10, 8) == 20 + 5 + 2


def _machine(monkeypatch: pytest.MonkeyPatch, name: str, flags: set[str]) -> None:
    monkeypatch.setattr("platform.machine", lambda: name)
    monkeypatch.setattr(schema, "cpu_flags", lambda: frozenset(flags))


@pytest.mark.parametrize(
    ("machine", "flags", "name"),
    [
        ("x86_64", {"avx2", "avx512_vnni"}, "ort-cpu-x64-vnni"),
        ("x86_64", {"avx2", "avx_vnni"}, "ort-cpu-x64-vnni"),
        ("AMD64", {"avx2"}, "ort-cpu-x64-avx2"),
        ("aarch64", set(), "ort-cpu-arm64"),
        ("arm64", {"asimddp"}, "ort-cpu-arm64"),
    ],
)
def test_auto(monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str], name: str) -> None:
    _machine(monkeypatch, machine, flags)
    assert detect().name == load_target("auto").name == name
    assert load_target(name).fits_here()
    assert not load_target("ort-cpu-arm64" if "x64" in name else "ort-cpu-x64-avx2").fits_here()


def test_auto_on_a_machine_that_none_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, "riscv64", set())
    with pytest.raises(
        RecipeError, match=r"no target fits this machine \(riscv64\): choose one with --target"
    ):
        load_target("auto")


def loaded(folder: Path, text: str) -> Target:
    (folder / "t.toml").write_text(text)
    return load_target(str(folder / "t.toml"))


def test_own_file(tmp_path: Path) -> None:
    mine = loaded(tmp_path, BASE + "name = 'mine'\nrefused = {Conv = 'I do not like it'}")
    base = load_target("ort-cpu-x64-vnni")
    assert mine.name == "mine"
    assert mine.refused == {"Conv": "I do not like it"}
    assert (mine.op, mine.boundary) == (base.op, base.boundary)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 'x'", "lacks the key 'title'."),
        ("name = [", "is not valid TOML: "),
        ("extends = 'ort-cpu'", "extends 'ort-cpu', which is no target that ships with qcompile. Did you mean 'ort-cpu-"),
        ("extends = 3", "extends 3, which is no target"),
        (BASE + "naem = 'x'", "unknown key 'naem'. Did you mean 'name'?"),
        (BASE + "machine = 3", "'machine' is 3, expected a table."),
        (BASE + "machine = {arch = ['a']}", "lacks the key 'machine.flags'."),
        (BASE + "machine = {arch = 'a', flags = []}", "'machine.arch' is 'a', expected a list."),
        (BASE + "saturating = 'no'", "'saturating' is 'no', expected true or false."),
        (BASE + "weight = 'int8.axis.sym'", "'int8.axis.sym' is no quantization scheme"),
        (BASE + "op = [3]", "'op[0]' is 3, expected a table."),
        (BASE + "op = [{type = 'Conv', kernel = 'K'}]", "lacks the key 'op[0].role'."),
        (BASE + "op = [{type = 'Conv', kernel = 'K', role = 'con'}]", "'op[0].role' is 'con', not one of conv, "),
        (BASE + "op = [{type = 'C', kernel = 'K', role = 'conv', int8 = {mak = 1}}]", "unknown key 'op[0].int8.mak'. Did you mean 'mac'?"),
        (BASE + "op = [{type = 'C', kernel = 'K', role = 'conv', int8 = {mac = 'a'}}]", "'op[0].int8.mac' is 'a', expected a number."),
        (BASE + "refused = 3", "'refused' is 3, expected a table."),
        (BASE + "op = [{type = 'C', kernel = 'K', role = 'conv', int8 = {mac = 1" + "0" * 400 + "}}]", "which is too large."),
        (BASE + "refused = {Conv = 1}", "'refused.Conv' is 1, expected text."),
    ],
)  # fmt: skip
def test_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as found:
        loaded(tmp_path, text)
    assert str(found.value).startswith(f"target {tmp_path}/t.toml")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "t.toml").mkdir()
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_target(str(tmp_path / "t.toml"))
    with pytest.raises(
        RecipeError, match=r"no target 'ort-cpu-avx2'\. Did you mean 'ort-cpu-x64-avx2'\?"
    ):
        load_target("ort-cpu-avx2")
    with pytest.raises(RecipeError, match=r"no target '.*none\.toml'"):
        load_target(str(tmp_path / "none.toml"))


def test_flags_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def flags(text: str | None) -> frozenset[str]:
        def read(_: Path, __: str) -> str:
            if text is None:
                raise FileNotFoundError
            return text

        schema.cpu_flags.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", read)
            return schema.cpu_flags()

    try:
        assert flags("processor: 0\nflags\t\t: fpu avx2 avx_vnni\nflags : b\n") == {
            "fpu",
            "avx2",
            "avx_vnni",
        }
        assert flags("Features : asimd asimddp\n") == {"asimd", "asimddp"}
        assert flags("processor: 0\n") == frozenset()
        assert flags(None) == {"avx2"}
    finally:
        schema.cpu_flags.cache_clear()


@pytest.mark.parametrize(
    ("flags", "name", "block"),
    [({"avx512_vnni", "avx512f", "avx2"}, "ort-cpu-x64-vnni", 16), ({"avx_vnni", "avx2"}, "ort-cpu-x64-vnni", 8),
     ({"avx512_vnni", "avx512f", "avx2"}, "ort-cpu-x64-avx2", 8), (set(), "ort-cpu-x64-vnni", 16), (set(), "ort-cpu-x64-avx2", 8),
     ({"avx2"}, "ort-cpu-arm64", 1)],
)  # fmt: skip
def test_a_block_of_channels(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], name: str, block: int
) -> None:
    """Of this machine, where it is of that kind; else of the kind."""
    monkeypatch.setattr("qcompile.targets.schema.cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr("qcompile.targets.schema.platform.machine", lambda: "x86_64")
    assert load_target(name).channel_block == block
