"""Generated large models: valid, of the sizes they say, and of no size on disk where they are zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from make_llama import SIZES, Kind, Shape, make_chain, make_llama
from onnx import numpy_helper

from qcompile.run.session import Session

SMALL = Shape(layers=2, width=64, inner=96, vocab=80)


def test_the_sizes() -> None:
    assert 6.7e9 < SIZES["7B"].params < 6.8e9
    assert 1e9 < SIZES["1B"].params < 1.3e9
    assert SMALL.params == 2 * 80 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96)


@pytest.mark.parametrize("files", [0, 1, 3])
@pytest.mark.parametrize(
    ("kind", "cast"),
    [("float32", False), ("float16", False), ("float16", True), ("bfloat16", True)],
)
def test_it_is_valid_and_runs(tmp_path: Path, files: int, kind: Kind, *, cast: bool) -> None:
    path = tmp_path / "m.onnx"
    size = make_llama(path, SMALL, random=True, files=files, kind=kind, cast=cast)
    assert size == SMALL.params * (4 if kind == "float32" else 2)
    onnx.checker.check_model(str(path))
    assert len(list(tmp_path.iterdir())) == 1 + files
    found = Session(path).run({"ids": np.array([[1, 5, 79]])})[0]
    assert found.shape == (1, 3, 80)
    assert found.std() > 0
    names = {tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert names == {*SMALL.matrices, "norm"}


def test_random_weights_differ_and_come_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_llama(tmp_path / name, SMALL, random=True)
    first, second = (
        [numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / name).graph.initializer]
        for name in ("a", "b")
    )
    for one, same in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, same)
    assert abs(float(np.corrcoef(first[1].ravel(), first[2].ravel())[0, 1])) < 0.1


def test_zeros_take_no_room(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    size = make_llama(path, Shape(2, 512, 1024, 4000))
    data = (tmp_path / "m.onnx.0").stat()
    assert data.st_size >= size > 20e6
    if hasattr(data, "st_blocks"):
        assert data.st_blocks * 512 < size / 10


def test_a_chain(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert make_chain(path, 3, 32) == 3 * 32 * 32 * 4
    onnx.checker.check_model(str(path))
    assert Session(path).run({"x": np.ones((2, 32), np.float32)})[0].shape == (2, 32)
