"""Slabs give what the whole weight gives, and its error."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.algo.rtn import rtn, search
from qcompile.errors import ModelError
from qcompile.graph.chain import Stored
from qcompile.solve import slabs
from qcompile.solve.slabs import Scheme, contiguous, mapped, round_stored, squares


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Executor]:
    """Two threads, and slabs of a few rows."""
    monkeypatch.setattr(slabs, "SLAB", 200)
    monkeypatch.setattr(slabs, "_ROWS", 3)
    with ThreadPoolExecutor(2) as made:
        yield made


def stored(values: np.ndarray, *casts: ir.DataType) -> Stored:
    tensor = ir.Tensor(values, name="w")
    root = ir.Value(name="w", const_value=tensor)
    return Stored(root, tensor, (), casts, values.shape)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("better", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (8, 0), (4, 32)])
def test_slabs_are_the_whole(
    pool: Executor, kind: type, bits: int, block: int, *, turned: bool, better: bool
) -> None:
    values: np.ndarray = random(37, 40).astype(kind)
    weight = stored(values.T).transposed(1, 0) if turned else stored(values)
    for symmetric in (True, False):
        made = round_stored(weight, Scheme(bits, block, symmetric, better), pool)
        whole = (search if better else rtn)(
            values, bits=bits, block=block, symmetric=symmetric,
            scales="float16" if kind is np.float16 else "float32",
        )  # fmt: skip
        for name in ("codes", "scale", "zero"):
            np.testing.assert_array_equal(getattr(made.blocked, name), getattr(whole, name))
        W = values.astype(np.float64)
        off = np.linalg.norm(whole.dequantize() - W) / np.linalg.norm(W)
        assert made.error == pytest.approx(off, rel=1e-5)


def test_casts_are_those_of_the_reader(pool: Executor) -> None:
    weight = stored(random(8, 32), ir.DataType.BFLOAT16, ir.DataType.FLOAT)
    made = round_stored(weight, Scheme(8, 0, symmetric=True, search=False), pool)
    whole = rtn(weight.read(), bits=8, block=0, symmetric=True)
    np.testing.assert_array_equal(made.blocked.codes, whole.codes)
    np.testing.assert_array_equal(contiguous(weight, weight.moved()), weight.read())


def test_zeros_have_no_error(pool: Executor) -> None:
    made = round_stored(stored(np.zeros((8, 32), np.float32)), Scheme(4, 16, True, False), pool)
    assert made.error == 0
    np.testing.assert_array_equal(made.blocked.dequantize(), 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_where_a_weight_is_no_number(pool: Executor, bad: float) -> None:
    values = random(20, 32)
    values[17, 5] = bad
    with pytest.raises(ModelError, match=f"'w' is {bad} at output 17, input 5: no scale fits it"):
        round_stored(stored(values), Scheme(4, 16, True, False), pool)


@given(exponent=st.integers(-40, 30), depth=st.sampled_from([16, 40, 48]), seed=st.integers(0, 9))
def test_sums_of_squares(exponent: int, depth: int, seed: int) -> None:
    W = random(5, depth, seed=seed) * np.float32(10.0**exponent)
    made = rtn(W, bits=4, block=16, symmetric=False)
    wide = W.astype(np.float64)
    off, whole = squares(W, made)
    exact = np.square(made.dequantize().astype(np.float32) - W, dtype=np.float64).sum()
    assert whole == pytest.approx(np.square(wide).sum(), rel=1e-5)
    assert off == pytest.approx(exact, rel=1e-4)


def test_a_file_is_mapped_only_meanwhile(tmp_path: Path, pool: Executor) -> None:
    values = random(20, 32)
    (tmp_path / "w").write_bytes(b"x" * 12 + values.tobytes())
    tensor = ir.ExternalTensor(
        "w", 12, values.nbytes, ir.DataType.FLOAT, shape=ir.Shape([20, 32]), name="w", base_dir=str(tmp_path)
    )  # fmt: skip
    weight = Stored(ir.Value(name="w", const_value=tensor), tensor, (), (), (20, 32))
    for _ in range(2):
        made = round_stored(weight, Scheme(8, 0, True, False), pool)
        assert tensor.raw is None
        np.testing.assert_array_equal(
            made.blocked.codes, rtn(values, bits=8, block=0, symmetric=True).codes
        )


def test_a_file_that_somebody_reads_stays_mapped(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(bytes(64))
    tensor = ir.ExternalTensor(
        "w", 0, 64, ir.DataType.FLOAT, shape=ir.Shape([16]), name="w", base_dir=str(tmp_path)
    )  # fmt: skip
    view: Any = None
    with mapped(tensor):
        view = tensor.numpy()
    assert view.sum() == 0
    del view
    with mapped(tensor):
        assert tensor.numpy().sum() == 0
