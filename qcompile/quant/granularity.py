"""Where the scales of a tensor differ: not at all, along an axis, or by blocks of an axis.

Each class answers the same questions, so that nobody else looks at shapes of scales.
Worked example for a tensor of shape (4, 6), rows in memory order:

    granularity     spelled     shape of scale     element (i, j) has scale
    PerTensor()     tensor      ()                 scale
    PerAxis(0)      axis0       (4,)               scale[i]
    PerBlock(1, 4)  axis1/4     (4, 2)             scale[i, j // 4]; the last block has 2 elements

Source: QuantizeLinear, opset 21 (attributes axis and block_size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class PerTensor:
    """One scale for the tensor."""

    def __str__(self) -> str:
        return "tensor"

    def params_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG002 - interface
        """Return the shape of the scale of a tensor of `shape`: ()."""
        return ()

    def params_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:  # noqa: ARG002
        """Return which scales the part `index` of a tensor uses: all, the one."""
        return ()

    def spread(self, params: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:  # noqa: ARG002
        """Return `params` so that it broadcasts against a part of `shape`; a view."""
        return params

    def reduce(self, ufunc: np.ufunc, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return `ufunc` (minimum, maximum, add) folded over each group and 0, one a scale."""
        return np.asarray(ufunc.reduce(x, axis=None, initial=0))


@dataclass(frozen=True)
class PerAxis:
    """One scale for each index of `axis`."""

    axis: int

    def __post_init__(self) -> None:
        _check_axis(self.axis)

    def __str__(self) -> str:
        return f"axis{self.axis}"

    def params_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scale of a tensor of `shape`: (shape[axis],).

        Raises:
            ValueError: the tensor has no such axis.
        """
        _check_rank(self.axis, shape)
        return (shape[self.axis],)

    def params_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Return which scales the part `index` of a tensor uses."""
        return (index[self.axis],)

    def spread(self, params: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return `params` so that it broadcasts against a part of `shape`; a view."""
        # (channels,) -> (1, ..., channels, ..., 1)
        return params.reshape([-1 if d == self.axis else 1 for d in range(len(shape))])

    def reduce(self, ufunc: np.ufunc, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return `ufunc` (minimum, maximum, add) folded over each group and 0, one a scale."""
        others = tuple(d for d in range(x.ndim) if d != self.axis)
        return np.asarray(ufunc.reduce(x, axis=others, initial=0))


@dataclass(frozen=True)
class PerBlock:
    """One scale for each run of `size` elements along `axis`; the last run may be shorter."""

    axis: int
    size: int

    def __post_init__(self) -> None:
        _check_axis(self.axis)
        if self.size < 1:
            raise ValueError(f"block size {self.size} is not positive")

    def __str__(self) -> str:
        return f"axis{self.axis}/{self.size}"

    def params_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scale of a tensor of `shape`: `axis` counted in blocks.

        Raises:
            ValueError: the tensor has no such axis.
        """
        _check_rank(self.axis, shape)
        return (*shape[: self.axis], -(-shape[self.axis] // self.size), *shape[self.axis + 1 :])

    def params_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Return which scales the part `index` of a tensor uses; it starts with a block."""
        along = index[self.axis]
        blocks = slice(along.start // self.size, -(-along.stop // self.size))
        return (*index[: self.axis], blocks, *index[self.axis + 1 :])

    def spread(self, params: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return `params` repeated to `shape`; a copy."""
        along = (*(slice(None),) * self.axis, slice(shape[self.axis]))
        return np.repeat(params, self.size, axis=self.axis)[along]

    def reduce(self, ufunc: np.ufunc, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return `ufunc` (minimum, maximum, add) folded over each group and 0, one a scale."""
        # Two plain reductions; ufunc.reduceat along axis 0 took 20 times as long (4096 x 4096).
        before, after = x.shape[: self.axis], x.shape[self.axis + 1 :]
        count = x.shape[self.axis] // self.size
        whole, rest = np.split(x, [count * self.size], axis=self.axis)
        # (before, count * size, after) -> (before, count, size, after): a view
        folded = ufunc.reduce(
            whole.reshape(*before, count, self.size, *after), axis=self.axis + 1, initial=0
        )
        if not rest.shape[self.axis]:
            return np.asarray(folded)
        last = ufunc.reduce(rest, axis=self.axis, initial=0, keepdims=True)
        return np.concatenate([folded, last], axis=self.axis)


Granularity = PerTensor | PerAxis | PerBlock


def _check_axis(axis: int) -> None:
    if axis < 0:
        raise ValueError(f"axis {axis} is negative: count from the front")


def _check_rank(axis: int, shape: tuple[int, ...]) -> None:
    if axis >= len(shape):
        raise ValueError(f"a tensor of shape {shape} has no axis {axis}")
