"""Feeds: one sample's arrays by input name, checked against what the model takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import DataError, nearest

Feed = dict[str, NDArray[Any]]
Sample = tuple[str, object]  # where it stands, for messages, and the feed as it was given


@dataclass(frozen=True)
class InputSpec:
    """One input of the model, read from the graph.

    `dtype` is object for strings. In `shape` a name or None is a dynamic dimension, and a negative
    number becomes None; a `shape` of None has unknown rank. Not `required`: an initializer is its
    default.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None
    required: bool = True

    def __post_init__(self) -> None:
        if self.shape is not None:
            dims = (None if isinstance(dim, int) and dim < 0 else dim for dim in self.shape)
            object.__setattr__(self, "shape", tuple(dims))

    def __str__(self) -> str:
        dims = ("...",) if self.shape is None else self.shape
        shown = ", ".join("?" if dim in (None, "") else str(dim) for dim in dims)
        return f"{'string' if self.dtype == object else self.dtype}[{shown}]"


@dataclass(frozen=True)
class Source:
    """Samples not yet checked: `samples()` starts a pass, always over the same ones.

    `manner` tells how they are made of what is stored, where that can be done in several ways.
    """

    description: str
    samples: Callable[[], Iterator[Sample]]
    count: Callable[[], int]
    notes: tuple[str, ...] = ()
    manner: str = ""


def check_feed(
    feed: object, inputs: Sequence[InputSpec], where: str, *, finite: bool = True
) -> Feed:
    """`feed` as arrays of the inputs' dtypes, in the order of the inputs.

    An array without a name goes to the only required input. Arrays may share memory with `feed`. NaN and infinities
    are let through unless `finite`.

    Raises:
        DataError: a name, shape, type or value does not fit; the sentence begins with `where`.
    """
    if not isinstance(feed, Mapping):
        if not hasattr(feed, "__array__"):
            raise DataError(
                f"{where} is a {type(feed).__name__}: give a dict of arrays by input name,"
                " without labels."
            )
        feed = {only_input(inputs, where).name: feed}
    names = [spec.name for spec in inputs]
    for name in feed:
        if name not in names:
            raise DataError(
                f"{where} has an array {name!r}, which is no input of the model"
                f" ({', '.join(names)}): rename or drop it.{nearest(str(name), names)}"
            )
    missing = [spec.name for spec in inputs if spec.required and spec.name not in feed]
    if missing:
        raise DataError(f"{where} lacks the required input {', '.join(missing)}: add the array.")
    given = [spec for spec in inputs if spec.name in feed]
    return {
        spec.name: _fit(feed[spec.name], spec, f"{where}: {spec.name!r}", finite=finite)
        for spec in given
    }


def _fit(value: object, spec: InputSpec, place: str, *, finite: bool) -> NDArray[Any]:
    """`value` as an array of the input's dtype."""
    try:
        array: NDArray[Any] = np.asarray(value)
    except Exception as error:  # the owner of the value, torch or a list, raises what it likes
        raise DataError(f"{place} is no array ({error}): give a NumPy array.") from error
    if array.dtype == f"V{spec.dtype.itemsize}" and spec.dtype.kind == "V":
        array = array.view(spec.dtype)  # .npy files forget the names of bfloat16 and its like
    wanted = array.shape if spec.shape is None else spec.shape
    got = f"{place} has shape {list(array.shape)}, the model wants {spec}"
    if array.ndim != len(wanted):
        lead = array.ndim + 1 == len(wanted)
        raise DataError(f"{got}: {'add the leading (batch) dimension' if lead else 'reshape it'}.")
    pairs = zip(wanted, array.shape, strict=True)
    if any(isinstance(want, int) and want != dim for want, dim in pairs):
        raise DataError(f"{got}: keep to the fixed dimensions.")
    kind = _kind(array.dtype)
    if array.dtype == object and not all(isinstance(item, str) for item in array.flat):
        kind = "mixed objects"
    if kind != _kind(spec.dtype):
        raise DataError(f"{place} holds {array.dtype}, the model wants {spec}: convert the array.")
    if finite and kind == "float" and not np.isfinite(array).all():
        first = np.argwhere(~np.isfinite(array))[0].tolist()
        raise DataError(f"{place} holds NaN or infinity, first at {first}: correct the sample.")
    with np.errstate(over="ignore"):
        result: NDArray[Any] = np.asarray(array, dtype=spec.dtype, order="C")
    held = np.isfinite(result) | ~np.isfinite(array) if kind == "float" else result == array
    if not held.all():
        low, high = array.min(), array.max()
        raise DataError(
            f"{place} holds values from {low} to {high}, which {spec.dtype} cannot hold:"
            " scale or correct them."
        )
    return result


def _kind(dtype: np.dtype[Any]) -> str:
    """Float, int or string, whatever the width; any other type by its own name."""
    kinds = {"float": ("float", "bfloat"), "int": ("int", "uint", "bool")}
    kinds["string"] = ("str", "object")
    return next((kind for kind, names in kinds.items() if dtype.name.startswith(names)), dtype.name)


def only_input(inputs: Sequence[InputSpec], where: str) -> InputSpec:
    """The one input that an array without a name goes to."""
    wanted = [spec for spec in inputs if spec.required] or list(inputs)
    if len(wanted) != 1:
        raise DataError(
            f"{where} fits only a model with one required input, and this one has"
            f" {', '.join(spec.name for spec in wanted) or 'none'}:"
            " give arrays by input name, in .npz files or dicts."
        )
    return wanted[0]
