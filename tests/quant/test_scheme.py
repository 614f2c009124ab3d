"""Types, schemes and their spelling, and parameters."""

from __future__ import annotations

import doctest

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcompile.errors import RecipeError
from qcompile.quant import scheme as scheme_module
from qcompile.quant.granularity import PerAxis, PerBlock, PerTensor
from qcompile.quant.scheme import INT8, INT32, QTYPES, UINT4, UINT8, QParams, QType, Scheme


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    qtype = draw(st.sampled_from(list(QTYPES.values())))
    axes = st.integers(0, 10**6)
    granularity = draw(
        st.one_of(
            st.just(PerTensor()),
            axes.map(PerAxis),
            st.builds(PerBlock, axes, st.integers(1, 10**6)),
        )
    )
    symmetric = qtype == INT32 or draw(st.booleans())
    fewer = st.integers(2, qtype.bits - 1) if qtype.bits > 2 else st.nothing()
    return Scheme(
        qtype,
        granularity,
        symmetric=symmetric,
        bits=draw(st.none() | fewer),
        narrow=symmetric and draw(st.booleans()),
    )


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=str)
def test_types_are_those_of_onnx(qtype: QType) -> None:
    assert qtype.onnx_type == onnx.TensorProto.DataType.Value(qtype.name.upper())
    assert onnx.helper.tensor_dtype_to_np_dtype(qtype.onnx_type) == qtype.storage
    codes = np.array([qtype.qmin, qtype.qmax], qtype.dtype)
    np.testing.assert_array_equal(codes.astype(qtype.storage).astype(qtype.dtype), codes)
    assert qtype.qmax - qtype.qmin == 2**qtype.bits - 1


@settings(database=None, deadline=None, derandomize=True)
@given(schemes())
def test_parse_is_the_inverse_of_str(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme


@settings(database=None, deadline=None, derandomize=True, max_examples=30)
@given(schemes(), st.integers(0, 40), st.sampled_from("0123456789.abimnrstxy/- ٣"))
@example(Scheme(INT8, PerAxis(0), symmetric=True), 9, "0")
def test_what_parse_accepts_str_gives_back(scheme: Scheme, at: int, extra: str) -> None:
    text = str(scheme)[:at] + extra + str(scheme)[at:]
    try:
        parsed = Scheme.parse(text)
    except RecipeError:
        return
    assert str(parsed) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uint8.tensor.asym", Scheme(UINT8, PerTensor(), symmetric=False)),
        ("int8.axis0.sym", Scheme(INT8, PerAxis(0), symmetric=True)),
        ("int8.axis0.sym.7bit", Scheme(INT8, PerAxis(0), symmetric=True, bits=7)),
        ("int8.axis1.sym.narrow", Scheme(INT8, PerAxis(1), symmetric=True, narrow=True)),
        ("uint4.axis0/32.asym", Scheme(UINT4, PerBlock(0, 32), symmetric=False)),
    ],
)
def test_parse(text: str, expected: Scheme) -> None:
    assert Scheme.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("int8.axis0.symmetric", "int8.axis0.sym"),
        ("int8.axi0.sym", "int8.axis0.sym"),
        ("INT8.axis0.sym", "int8.axis0.sym"),
        ("int9.tensor.sym", "int8.tensor.sym"),
        ("int4.axis3/64.symm", "int4.axis3/64.sym"),
        ("int8.axis0/0.sym", "int8.axis0.sym"),
        ("int8.axis0.sym.8bit", "int8.axis0.sym.7bit"),
        ("uint8.tensor.asym.narrow", "uint8.tensor.sym.narrow"),
        ("int32.tensor.asym", "int32.tensor.sym"),
    ],
)
def test_a_wrong_spelling_is_answered_with_the_nearest(text: str, meant: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Scheme.parse(text)
    assert repr(text) in str(caught.value)
    assert str(caught.value).endswith(f" Did you mean {meant!r}?")


@pytest.mark.parametrize("text", ["", "float", "int8", "int8.tensor.sym\n", "int8.axis-1.sym"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(RecipeError, match="is no quantization scheme"):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "qmin", "middle", "qmax"),
    [
        ("int8.tensor.asym", -128, 0, 127),
        ("int8.tensor.sym.narrow", -127, 0, 127),
        ("int8.tensor.sym.7bit", -64, 0, 63),
        ("int8.tensor.sym.7bit.narrow", -63, 0, 63),
        ("uint8.tensor.sym", 0, 128, 255),
        ("uint8.tensor.sym.narrow", 1, 128, 255),
        ("uint8.tensor.asym.7bit", 0, 64, 127),
        ("uint4.tensor.sym", 0, 8, 15),
        ("int2.tensor.sym", -2, 0, 1),
        ("int32.tensor.sym", -(2**31), 0, 2**31 - 1),
    ],
)
def test_codes_of_a_scheme(text: str, qmin: int, middle: int, qmax: int) -> None:
    scheme = Scheme.parse(text)
    assert (scheme.qmin, scheme.middle, scheme.qmax) == (qmin, middle, qmax)


def test_a_scheme_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="bits=8 does not reduce int8"):
        Scheme(INT8, PerTensor(), symmetric=True, bits=8)
    with pytest.raises(ValueError, match="bits=1 does not reduce int8"):
        Scheme(INT8, PerTensor(), symmetric=True, bits=1)
    with pytest.raises(ValueError, match="narrow"):
        Scheme(INT8, PerTensor(), symmetric=False, narrow=True)
    with pytest.raises(ValueError, match="int32 has no zero point"):
        Scheme(INT32, PerTensor(), symmetric=False)


@pytest.mark.parametrize(
    ("scheme", "scale", "zero", "message"),
    [
        ("int8.tensor.sym", np.float64(1), np.int8(0), "float32 scale"),
        ("int8.tensor.sym", np.float32(1), np.uint8(0), "int8 zero point"),
        ("int8.axis0.sym", np.ones(2, np.float32), np.zeros(3, np.int8), "differ in shape"),
        ("int8.tensor.sym", np.float32(0), np.int8(0), "not finite and positive"),
        ("int8.tensor.sym", np.float32("nan"), np.int8(0), "not finite and positive"),
        ("int8.tensor.sym", np.float32("inf"), np.int8(0), "not finite and positive"),
        ("int4.tensor.asym", np.float32(1), np.int8(8), "outside -8..7"),
        ("int32.tensor.sym", np.float32(1), np.int32(1), "outside 0..0"),
    ],
)
def test_wrong_parameters_are_refused(
    scheme: str, scale: np.generic, zero: np.generic, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        QParams(np.asarray(scale), np.asarray(zero), Scheme.parse(scheme))


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(scheme_module).failed == 0
