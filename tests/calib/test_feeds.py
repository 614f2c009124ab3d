"""The checks of one feed, and their sentences."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from feeds import F32, I64, IDS, X, opened, rows, spec
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile.calib.data import InputSpec, check_feed
from qcompile.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def test_feed_has_the_order_and_types_of_the_inputs() -> None:
    optional = InputSpec("o", F32, None, required=False)
    feed = check_feed(
        {"ids": np.array([[1]], np.int32), "x": [[1.0, 2.0, 3.0]]}, [X, IDS, optional], ""
    )
    assert list(feed) == ["x", "ids"]
    assert (feed["x"].dtype, feed["ids"].dtype) == (F32, I64)
    assert list(check_feed({"o": 1.0}, [optional], "")) == ["o"]


@pytest.mark.parametrize(
    ("feed", "sentence"),
    [
        (
            {"X1": rows(1), "ids": [[1]]},
            r"^here has an array 'X1', which is no input of the model \(x, ids\): rename or drop it\.$",
        ),
        ({"idx": [[1]]}, r"drop it\. Did you mean 'ids'\?"),
        ({0: [[1]]}, r"has an array 0, which"),
        ({}, r"^here lacks the required input x, ids: add the array\."),
        ((rows(1), 7), r"^here is a tuple: give a dict of arrays by input name, without labels\."),
        ([1, 2], r"^here is a list: give a dict"),
        (None, r"^here is a NoneType: give a dict"),
        (
            rows(1),
            r"^here fits only a model with one required input, and this one has x, ids: give",
        ),
    ],
)
def test_feed_names(feed: object, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        check_feed(feed, [X, IDS], "here")


class Stubborn:
    def __array__(self, *_: object, **__: object) -> NDArray[Any]:
        raise RuntimeError("it is on the GPU")


@pytest.mark.parametrize(
    ("value", "wanted", "sentence"),
    [
        (Stubborn(), X, r"^here: 'x' is no array \(it is on the GPU\): give a NumPy array\."),
        ([[1, 2], [3]], X, r"is no array \(.+\): give a NumPy array\."),
        (
            np.zeros(3, F32),
            X,
            r"has shape \[3\], the model wants float32\[N, 3\]: add the leading \(batch\) dim",
        ),
        (np.zeros((1, 1, 1, 3), F32), X, r"has shape \[1, 1, 1, 3\], .+: reshape it\."),
        (
            np.zeros((1, 4), F32),
            spec(shape=(None, 3)),
            r"has shape \[1, 4\], the model wants float32\[\?, 3\]: keep to the fixed dimensions\.",
        ),
        (np.zeros((2, 3), F32), spec(shape=(1, 3)), r"has shape \[2, 3\]"),
        (np.zeros(3, I64), spec(), r"holds int64, the model wants float32\[\.\.\.\]: convert the"),
        (np.zeros(3), spec(np.int32), r"holds float64, the model wants int32"),
        (np.array(["a"]), spec(), r"holds <U1, the model wants float32"),
        (np.zeros(3), spec(object), r"holds float64, the model wants string\[\.\.\.\]"),
        (np.array(["a", 1], object), spec(object), r"holds object, the model wants string"),
        (np.zeros(3, complex), spec(), r"holds complex128"),
        (np.array([0, np.nan]), spec(), r"holds NaN or infinity, first at \[1\]: correct the"),
        (np.array(-np.inf), spec(), r"holds NaN or infinity, first at \[\]"),
        (
            np.array([1e6, -1]),
            spec(np.float16),
            r"holds values from -1\.0 to 1000000\.0, which float16 cannot hold: scale or correct",
        ),
        (np.array([300, -1]), spec(np.uint8), r"from -1 to 300, which uint8 cannot hold"),
        (np.array([-1], np.int8), spec(np.uint8), r"from -1 to -1, which uint8 cannot hold"),
        (np.array([2]), spec(bool), r"from 2 to 2, which bool cannot hold"),
        (np.array([2**64 - 1], np.uint64), spec(np.int64), r"which int64 cannot hold"),
        (np.array([9]), spec(ml_dtypes.int4), r"from 9 to 9, which int4 cannot hold"),
    ],
)
def test_wrong_value(value: object, wanted: InputSpec, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        check_feed({"x": value}, [wanted], "here")


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.ones((2, 3)), np.float32),
        (np.ones((2, 3)), np.float16),
        (np.ones((2, 3), ">f4"), np.float32),
        (np.ones((2, 3)), ml_dtypes.bfloat16),
        (np.ones((2, 3), np.float16), np.float64),
        (np.ones((2, 3), np.int64), np.int32),
        (np.ones((2, 3), bool), np.int64),
        (np.ones((2, 3), np.uint8), bool),
        (np.ones((2, 3), np.int8), ml_dtypes.int4),
        (np.ones((2, 0)), np.float32),
        (np.ones((2, 0), np.int64), np.uint8),
        (np.float64(3), np.float32),
        (7, np.int64),
        (np.asfortranarray(np.ones((2, 3), np.float32)), np.float32),
    ],
)
def test_lossless_kinds_are_cast(value: Any, dtype: Any) -> None:
    got = check_feed({"x": value}, [spec(dtype)], "here")["x"]
    assert got.dtype == dtype
    assert got.flags.c_contiguous
    assert got.shape == np.shape(value)
    np.testing.assert_array_equal(got.astype(float), np.asarray(value).astype(float))


@given(
    hnp.arrays(
        st.sampled_from([np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64]),
        hnp.array_shapes(max_dims=2, max_side=3),
    ),
    st.sampled_from([np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64]),
)
def test_integers_are_cast_or_refused(array: NDArray[Any], dtype: Any) -> None:
    limits = np.iinfo(dtype)
    fits = all(limits.min <= int(value) <= limits.max for value in array.flat)
    try:
        got = check_feed({"x": array}, [spec(dtype)], "here")["x"]
    except DataError:
        assert not fits
    else:
        assert fits
        assert [int(v) for v in got.flat] == [int(v) for v in array.flat]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_shape_is_accepted_where_every_fixed_dimension_agrees(
    shape: list[int], data: st.DataObject
) -> None:
    dims = data.draw(
        st.tuples(*(st.sampled_from([size, size + 1, "N", None]) for size in shape)), "dims"
    )
    fits = all(dim in (size, "N", None) for dim, size in zip(dims, shape, strict=True))
    if fits:
        check_feed({"x": np.zeros(shape)}, [spec(shape=dims)], "here")
        return
    with pytest.raises(DataError, match=re.escape(str(shape))):
        check_feed({"x": np.zeros(shape)}, [spec(shape=dims)], "here")


@given(st.integers(0, 4), st.integers(1, 3))
def test_stacked_samples_join_to_the_array(count: int, width: int) -> None:
    x = np.arange(count * width, dtype=np.float32).reshape(count, width)
    data = opened({"x": x}, spec(shape=("N", width)))
    assert len(data) == count
    if count:
        np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in data]), x)


def test_input_spec_is_shown_as_in_the_sentences() -> None:
    assert str(spec(np.int64, (1, "N", None, "", -1))) == "int64[1, N, ?, ?, ?]"
    assert str(spec(object, ())) == "string[]"
