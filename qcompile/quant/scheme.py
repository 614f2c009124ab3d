"""How numbers become integers: `QType`, `Scheme` and its spelling, `QParams`.

The layout of scales (shape (), (channels,) or one scale a block) is that of QuantizeLinear and
DequantizeLinear, opset 21. `qcompile.quant.granularity` holds the shapes, this module the rest.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from qcompile.errors import RecipeError, nearest
from qcompile.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy.typing as npt


@dataclass(frozen=True)
class QType:
    """An integer type of ONNX.

    Codes are always held one an element in arrays of `dtype`; `storage` is the numpy type that
    names the ONNX tensor (`ml_dtypes.int4` for int4), and `onnx_type` its TensorProto number.
    """

    name: str
    bits: int
    signed: bool
    dtype: np.dtype[Any] = field(repr=False)
    storage: np.dtype[Any] = field(repr=False)
    onnx_type: int = field(repr=False)

    @property
    def qmin(self) -> int:
        """The lowest code of the type, which QuantizeLinear saturates to."""
        return _code_range(self.bits, signed=self.signed)[0]

    @property
    def qmax(self) -> int:
        """The highest code of the type, which QuantizeLinear saturates to."""
        return _code_range(self.bits, signed=self.signed)[1]

    def __str__(self) -> str:
        return self.name


def _code_range(bits: int, *, signed: bool) -> tuple[int, int]:
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def _qtype(name: str, bits: int, carrier: type[Any], storage: type[Any], onnx_type: int) -> QType:
    signed = not name.startswith("u")
    return QType(name, bits, signed, np.dtype(carrier), np.dtype(storage), onnx_type)


INT8 = _qtype("int8", 8, np.int8, np.int8, 3)
UINT8 = _qtype("uint8", 8, np.uint8, np.uint8, 2)
INT16 = _qtype("int16", 16, np.int16, np.int16, 5)
UINT16 = _qtype("uint16", 16, np.uint16, np.uint16, 4)
INT32 = _qtype("int32", 32, np.int32, np.int32, 6)
INT4 = _qtype("int4", 4, np.int8, ml_dtypes.int4, 22)
UINT4 = _qtype("uint4", 4, np.uint8, ml_dtypes.uint4, 21)
INT2 = _qtype("int2", 2, np.int8, ml_dtypes.int2, 26)
UINT2 = _qtype("uint2", 2, np.uint8, ml_dtypes.uint2, 25)

QTYPES: Mapping[str, QType] = MappingProxyType(
    {q.name: q for q in (INT8, UINT8, INT16, UINT16, INT32, INT4, UINT4, INT2, UINT2)}
)

_SPELLING = re.compile(
    r"(?P<qtype>u?int[0-9]+)"
    r"\.(?:tensor|axis(?P<axis>0|[1-9][0-9]*)(?:/(?P<block>[1-9][0-9]*))?)"
    r"\.(?P<sym>sym|asym)"
    r"(?:\.(?P<bits>[1-9][0-9]*)bit)?"
    r"(?P<narrow>\.narrow)?"
)


@dataclass(frozen=True)
class Scheme:
    """How one tensor is quantized: the type, where scales differ, and which codes are used.

    * `symmetric`: the zero point is the middle code (0 if signed, 128 for uint8, 8 for uint4).
    * `bits`: codes come from a range of this many bits, less than the type's: 7 gives int8 -64..63,
      so that vpmaddubsw, which x86 without VNNI uses, adds two uint8 * int8 within int16.
    * `narrow`: the lowest code is not used, so that the range is symmetric: int8 -127..127.

    `bits` and `narrow` hold for codes computed here (weights). QuantizeLinear in a graph saturates
    to the whole range of the type and knows neither.

    Raises:
        ValueError: fields that contradict each other; the message says which.
    """

    qtype: QType
    granularity: Granularity
    _: KW_ONLY
    symmetric: bool
    bits: int | None = None
    narrow: bool = False

    def __post_init__(self) -> None:
        if self.bits is not None and not 2 <= self.bits < self.qtype.bits:
            raise ValueError(
                f"bits={self.bits} does not reduce {self.qtype}: "
                f"expected 2 or more, and less than {self.qtype.bits}"
            )
        if self.narrow and not self.symmetric:
            raise ValueError("a narrow range is one symmetric about the zero: use sym")
        if self.qtype == INT32 and not self.symmetric:
            # A difference of int32 codes wraps around in ORT 1.32 if the zero is not 0.
            raise ValueError("int32 has no zero point: use sym")

    @property
    def qmin(self) -> int:
        """The lowest code used."""
        lowest = _code_range(self.bits or self.qtype.bits, signed=self.qtype.signed)[0]
        return lowest + int(self.narrow)

    @property
    def qmax(self) -> int:
        """The highest code used."""
        return _code_range(self.bits or self.qtype.bits, signed=self.qtype.signed)[1]

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme; `qmax - middle` codes lie above it."""
        return 0 if self.qtype.signed else 1 << ((self.bits or self.qtype.bits) - 1)

    def __str__(self) -> str:
        text = f"{self.qtype}.{self.granularity}.{'sym' if self.symmetric else 'asym'}"
        if self.bits is not None:
            text += f".{self.bits}bit"
        return text + ".narrow" if self.narrow else text

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Return the scheme that `str` spells as `text`, exactly.

        >>> Scheme.parse("int4.axis0/32.sym").granularity
        PerBlock(axis=0, size=32)
        >>> Scheme.parse("int8.axis0.sym.7bit.narrow").qmin
        -63

        Raises:
            RecipeError: `text` spells no scheme; the message has the nearest spelling.
        """
        match = _SPELLING.fullmatch(text)
        if match is None or match["qtype"] not in QTYPES:
            raise RecipeError(
                f"{text!r} is no quantization scheme; expected one like 'uint8.tensor.asym', "
                f"'int8.axis0.sym', 'int4.axis0/32.sym' or 'int8.axis0.sym.7bit.narrow'."
                + nearest(text.lower(), _spellings(text))
            )
        try:
            return cls(
                QTYPES[match["qtype"]],
                _granularity(match["axis"], match["block"]),
                symmetric=match["sym"] == "sym",
                bits=int(match["bits"]) if match["bits"] else None,
                narrow=match["narrow"] is not None,
            )
        except ValueError as error:
            raise RecipeError(
                f"{text!r} is no quantization scheme: {error}." + nearest(text, _spellings(text))
            ) from error


def _granularity(axis: str | None, block: str | None) -> Granularity:
    if axis is None:
        return PerTensor()
    return PerAxis(int(axis)) if block is None else PerBlock(int(axis), int(block))


def _spellings(text: str) -> Iterator[str]:
    """Every valid spelling whose axis and block size are usual ones, or stand in `text`."""
    axes = [int(n) for n in re.findall(r"\.[a-z]+([0-9]{1,9})", text)]
    sizes = [int(n) for n in re.findall(r"/([0-9]{1,9})", text)]
    where = [None, *dict.fromkeys(str(axis) for axis in (*axes, 0, 1))]
    blocks = [None, *dict.fromkeys(str(size) for size in (*sizes, 32) if size)]
    for qtype, axis, block in itertools.product(QTYPES.values(), where, blocks):
        granularity = _granularity(axis, block)
        yield str(Scheme(qtype, granularity, symmetric=True))
        yield str(Scheme(qtype, granularity, symmetric=True, narrow=True))
        if qtype != INT32:
            yield str(Scheme(qtype, granularity, symmetric=False))
        if qtype.bits == 8:
            for symmetric in (True, False):
                yield str(Scheme(qtype, granularity, symmetric=symmetric, bits=7))


@dataclass(frozen=True, eq=False)
class QParams:
    """The scale and zero point of one tensor.

    `scale` is float32, `zero` has the codes' type, and both have one shape: () per tensor,
    (channels,) per axis, and for blocks that of the tensor with the axis counted in blocks. The
    arrays are kept, not copied.

    Raises:
        ValueError: another type or shape, a scale that is not finite and positive, a zero point
            outside the type, or one for int32 other than 0.
    """

    scale: npt.NDArray[np.float32]
    zero: npt.NDArray[Any]
    scheme: Scheme

    def __post_init__(self) -> None:
        qtype = self.scheme.qtype
        if self.scale.dtype != np.float32 or self.zero.dtype != qtype.dtype:
            raise ValueError(
                f"{self.scheme} needs a float32 scale and a {qtype.dtype} zero point, "
                f"not {self.scale.dtype} and {self.zero.dtype}"
            )
        if self.scale.shape != self.zero.shape:
            raise ValueError(f"scale {self.scale.shape} and zero {self.zero.shape} differ in shape")
        if not np.all((self.scale > 0) & np.isfinite(self.scale)):
            raise ValueError("a scale is not finite and positive")
        lo, hi = (0, 0) if qtype == INT32 else (qtype.qmin, qtype.qmax)
        if not np.all((self.zero >= lo) & (self.zero <= hi)):
            raise ValueError(f"a zero point of {qtype} lies outside {lo}..{hi}")
