"""What the tests of calibration data share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qcompile.calib.data import Data, DataOptions, Feed, InputSpec, open_data

if TYPE_CHECKING:
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
