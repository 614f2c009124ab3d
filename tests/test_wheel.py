"""The wheel: what is in it, built without a network."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qcompile.version import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of a wheel built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"qcompile_onnx-{__version__}-py3-none-any.whl"
    return zipfile.ZipFile(wheel).namelist()


def test_top_level(names: list[str]) -> None:
    info = f"qcompile_onnx-{__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"qcompile", "passes", info}
    assert f"{info}/entry_points.txt" in names


def test_everything_is_inside(names: list[str]) -> None:
    here = {
        str(path.relative_to(ROOT))
        for top in ("qcompile", "passes")
        for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".toml", ".typed")
    }
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == here
    assert "qcompile/targets/ort-cpu-x64-vnni.toml" in inside
