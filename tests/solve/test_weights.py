import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from lowering import constant, eager
from rewrites import parse, random_feed

from qcompile.graph.edit import array
from qcompile.plan.make import Request, find_candidates, make_plan
from qcompile.plan.plan import Form
from qcompile.prepare import prepare
from qcompile.quant.affine import dequantize
from qcompile.quant.scheme import QParams, Scheme
from qcompile.run.probe import probe
from qcompile.solve.weights import InputMoments, Weight, can_saturate, gemm_bias, solve_weights

Array = npt.NDArray[np.float32]


def solved(
    text: str, *, scale: float = 0.01, moments: dict[str, InputMoments] | None = None,
    saturating: bool = False, search: bool = False, given: dict[str, np.ndarray] | None = None,
    **patched: np.ndarray,
) -> dict[str, Weight]:  # fmt: skip
    model = parse(text)
    for name, values in patched.items():
        model.graph.initializers[name].const_value = ir.tensor(values)
    model, _ = prepare(model)
    chip = eager()
    facts = probe(model, random_feed(model, given=given))
    found = find_candidates(model, chip, facts)
    static = dict.fromkeys(found, Form.STATIC)
    plan = make_plan(model, chip, facts, Request(forms=static), found)
    inputs = QParams(
        np.array(scale, np.float32), np.array(128, np.uint8), Scheme.parse("uint8.tensor.asym")
    )
    params = {str(v.name): inputs for node in model.graph for v in node.inputs if v is not None}
    return solve_weights(plan, found, params, moments or {}, saturating=saturating, search=search)


def conv(*shape: int, bias: bool = False) -> str:
    out, cin, *kernel = shape
    size = ",".join(["4"] * len(kernel))
    b = f", {constant('b', out)}" if bias else ""
    return f"g (float[1,{cin},{size}] x) => (float[N] y) <{constant('k', *shape)}{b}> {{ [n] y = Conv(x, k{', b' if bias else ''}) }}"


@pytest.mark.parametrize("search", [False, True])
def test_a_scale_for_each_output_channel(search: bool) -> None:
    k = np.random.default_rng(0).standard_normal((3, 2, 2, 2)).astype(np.float32)
    k[1] *= 100
    weight = solved(conv(3, 2, 2, 2), search=search, k=k)["n"]
    assert weight.codes.dtype == np.int8
    assert weight.params.scale.shape == (3,)
    assert not weight.params.zero.any()
    assert weight.bias is None
    full = np.abs(k).max(axis=(1, 2, 3)) / 127
    if search:
        assert (weight.params.scale <= full * 1.0001).all()
    else:
        np.testing.assert_allclose(weight.params.scale, full, rtol=1e-6)
        assert np.abs(dequantize(weight.codes, weight.params) - k).max() <= full.max() / 2 * 1.01
    assert (
        float(np.square(dequantize(weight.codes, weight.params) - k).mean())
        < float(np.square(k).mean()) * 1e-4
    )


def test_a_bias_stays_as_it_is_without_moments() -> None:
    weight = solved(conv(3, 2, 2, 2, bias=True), b=np.array([1, -2, 3], np.float32))["n"]
    assert weight.bias is not None
    assert weight.bias.dtype == np.float32
    assert weight.bias.tolist() == [1, -2, 3]


def test_a_bias_is_corrected_by_what_the_weights_are_off_by() -> None:
    mean = np.array([5.0, -3.0])
    text = conv(3, 2, 2, 2, bias=True)
    plain = solved(text)["n"]
    model, _ = prepare(parse(text))
    k, b = array(model.graph.initializers["k"]), array(model.graph.initializers["b"])
    assert k is not None
    assert b is not None
    off = dequantize(plain.codes, plain.params) - k
    wanted = b - np.einsum("oikl,i->o", off.astype(np.float64), mean)
    corrected = solved(text, moments={"x": InputMoments(mean)})["n"]
    assert corrected.bias is not None
    np.testing.assert_allclose(corrected.bias, wanted, rtol=1e-5)
    assert np.array_equal(corrected.codes, plain.codes)


def test_a_bias_is_corrected_by_what_the_input_is_off_by() -> None:
    text = conv(3, 2, 2, 2)
    plain = solved(text)["n"]
    back = dequantize(plain.codes, plain.params).astype(np.float64)
    error = np.array([0.5, -0.25])
    corrected = solved(text, moments={"x": InputMoments(np.zeros(2), error)})["n"]
    assert corrected.bias is not None
    np.testing.assert_allclose(corrected.bias, -np.einsum("oikl,i->o", back, error), rtol=1e-5)


def test_moments_of_another_tensor_change_nothing() -> None:
    assert solved(conv(3, 2, 1, 1), moments={"z": InputMoments(np.ones(2))})["n"].bias is None


def test_a_bias_of_a_channel_of_tiny_weights_fits_int32() -> None:
    k = np.full((2, 1, 1, 1), 1e-9, np.float32)
    k[1] = 1.0
    weight = solved(conv(2, 1, 1, 1, bias=True), k=k, b=np.array([100, 100], np.float32))["n"]
    assert weight.bias is not None
    codes = weight.bias.astype(np.float64) / (0.01 * weight.params.scale)
    assert np.abs(codes).max() <= 2**30 * 1.001
    assert weight.params.scale[1] == pytest.approx(1 / 127)
    assert weight.codes[:, 0, 0, 0].tolist() == [0, 127]


def test_linear_weights_are_stored_as_they_are_multiplied() -> None:
    w = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)
    text = f"g (float[5,6] x, float[5,4] z) => (float[5,4] y, float[5,6] v) <{constant('w', 4, 6)}> {{ [g] y = Gemm<transB = 1, alpha = -0.5>(x, w) [m] v = MatMul(z, w) }}"
    weights = solved(text, w=w)
    assert weights["g"].codes.shape == (6, 4)
    assert weights["m"].codes.shape == (4, 6)
    assert weights["g"].params.scale.shape == (4,)
    assert weights["m"].params.scale.shape == (6,)
    for found, wanted in ((weights["g"], -0.5 * w.T), (weights["m"], w)):
        assert (
            np.abs(dequantize(found.codes, found.params) - wanted).max()
            <= found.params.scale.max() * 0.51
        )


@pytest.mark.parametrize(
    ("attributes", "bias", "wanted"),
    [
        ("", "float[3] b = {1, 2, 3}", [1, 2, 3]),
        ("<beta = 2.0>", "float[1,3] b = {1, 2, 3}", [2, 4, 6]),
        ("<beta = 2.0>", "float b = {1.5}", [3, 3, 3]),
        ("", "float[1] b = {1.5}", [1.5, 1.5, 1.5]),
        ("", "float[1,1] b = {1.5}", [1.5, 1.5, 1.5]),
        ("<beta = 0.0>", "float[3] b = {1, 2, 3}", None),
        ("", "float[3,1] b = {1, 2, 3}", None),
        ("", "float[3,3] b = {1, 2, 3, 4, 5, 6, 7, 8, 9}", None),
        ("", "", None),
    ],
)
def test_the_bias_of_a_gemm(attributes: str, bias: str, wanted: list[float] | None) -> None:
    text = f"g (float[3,2] x) => (float[3,3] y) <{constant('w', 2, 3)}{', ' + bias if bias else ''}> {{ y = Gemm{attributes}(x, w{', b' if bias else ''}) }}"
    found = gemm_bias(parse(text).graph[0], 3)
    assert (None if found is None else found.tolist()) == wanted


def test_the_bias_of_a_matmul_is_none() -> None:
    text = f"g (float[3,2] x) => (float[3,3] y) <{constant('w', 2, 3)}> {{ y = MatMul(x, w) }}"
    assert gemm_bias(parse(text).graph[0], 3) is None


def test_rows_of_a_table_have_scales_of_their_own() -> None:
    rows = np.random.default_rng(2).standard_normal((5, 8)).astype(np.float32)
    rows[2] *= 1000
    text = f"g (int64[2] i) => (float[2,8] y) <{constant('e', 5, 8)}> {{ [look] y = Gather(e, i) }}"
    weight = solved(text, e=rows, given={"i": np.array([1, 4])})["look"]
    assert weight.params.scale.shape == (5,)
    error = np.abs(dequantize(weight.codes, weight.params) - rows).max(axis=1)
    assert (error <= weight.params.scale * 0.51).all()


def slow_can_saturate(codes: np.ndarray) -> bool:
    """Every pair of neighbours, channels and last axis, counted out."""
    wide = codes.astype(int)
    if wide.ndim == 2:  # (K, N): along K
        rows = [list(wide[:, n]) for n in range(wide.shape[1])]
    else:
        rows = [list(wide[o].reshape(-1)) for o in range(wide.shape[0])]
        rows += [list(np.moveaxis(wide[o], 0, -1).reshape(-1)) for o in range(wide.shape[0])]
    sums = [255 * (r[i] + r[i + 1]) for r in rows for i in range(0, len(r) - 1, 2)]
    return any(abs(s) > 32767 for s in sums)


@pytest.mark.parametrize(
    "shape", [(4, 6), (3, 2), (2, 3, 2), (2, 4, 1, 1), (2, 2, 3, 3), (1, 1), (1, 1, 1)]
)
def test_saturation_is_found(shape: tuple[int, ...]) -> None:
    seen = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        reach = [64, 65, 70, 127][seed % 4]
        codes = rng.integers(-reach, reach + 1, shape).astype(np.int8)
        assert can_saturate(codes) == slow_can_saturate(codes)
        seen.add(can_saturate(codes))
    assert seen == ({False, True} if np.prod(shape) > 1 else {False})


@pytest.mark.parametrize(("pair", "wanted"), [((64, 64), False), ((64, 65), True), ((-64, -64), False), ((-64, -65), True), ((127, -127), False), ((127, 1), False), ((127, 2), True)])  # fmt: skip
def test_the_edge_of_16_bits(pair: tuple[int, int], wanted: bool) -> None:
    assert can_saturate(np.array([[pair[0]], [pair[1]]], np.int8)) is wanted


@pytest.mark.parametrize("search", [False, True])
def test_weights_that_would_saturate_have_7_bits(search: bool) -> None:
    k = np.ones((2, 2, 1, 1), np.float32)
    k[1, 1] = -1.0
    text = conv(2, 2, 1, 1)
    assert np.abs(solved(text, k=k, search=search)["n"].codes).max() > 100
    narrow = solved(text, k=k, saturating=True, search=search)["n"]
    assert np.abs(narrow.codes).max() <= 64
    assert not can_saturate(narrow.codes)
    np.testing.assert_allclose(dequantize(narrow.codes, narrow.params), k, rtol=0.02)


def test_weights_that_cannot_saturate_keep_8_bits() -> None:
    k = np.ones((2, 2, 1, 1), np.float32)
    k[:, 1] = 0.001
    assert solved(conv(2, 2, 1, 1), k=k, saturating=True)["n"].codes.max() == 127
