"""What broke when the tool was tried with nothing but its README at hand."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from networks import from_text, linear_net, save

from qcompile.errors import NotFiniteError
from qcompile.graph import io
from qcompile.quant.affine import LEAST_WEIGHT, too_small
from qcompile.report import sized
from qcompile.verify.kernels import Kernels, Verdict

if TYPE_CHECKING:
    from conftest import Desk

HEAD = "g (float[N,256] x) => (float[N,256] y)"


def matrix(scale: float = 1.0, seed: int = 0) -> np.ndarray:
    made: np.ndarray = (np.random.default_rng(seed).normal(size=(256, 256)) * 0.06 * scale).astype(
        np.float32
    )
    return made


def inputs(count: int = 64) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, 256)).astype(np.float32)


@pytest.mark.parametrize(
    "words", [(), ("--recipe", "int4"), ("plan",), ("calibrate", "--data", "x.npz")]
)
def test_weights_beside_the_model_are_not_written_over(desk: Desk, words: tuple[str, ...]) -> None:
    save(linear_net(), desk / "big.onnx", data="w.bin")
    np.savez(desk / "x.npz", x=inputs())
    before = hashlib.sha256((desk / "w.bin").read_bytes()).digest()
    command = words[:1] if words[:1] in (("plan",), ("calibrate",)) else ()
    said = desk.refused(*command, "big.onnx", *words[len(command) :], "-o", "w.bin")
    assert said == "w.bin is the external data of the model itself: choose another file with -o."
    assert hashlib.sha256((desk / "w.bin").read_bytes()).digest() == before
    assert desk.run("big.onnx", "-o", "new.bin", "--no-timing").code in (0, 4)


def test_a_module_is_not_written_over(desk: Desk) -> None:
    (desk / "mine.py").write_text("")
    said = desk.refused("m.onnx", "--data", "d.npz", "-o", "mine.py")
    assert said.startswith("mine.py is named as text, and ONNX models are not")


@pytest.mark.parametrize("recipe", ["int8", "int8-weights", "int4"])
@pytest.mark.parametrize("scale", [1e-18, 1e-30, 1e-41])
def test_weights_too_small_for_codes_stay_float(desk: Desk, scale: float, recipe: str) -> None:
    text = f"{HEAD} {{ [a] h = MatMul(x, w0) [b] y = MatMul(h, w1) }}"
    save(from_text(text, w0=matrix(), w1=matrix(scale, 1)), desk / "m.onnx")
    np.savez(desk / "d.npz", x=inputs())
    done = desk.run(
        "m.onnx", "--data", "d.npz", "--recipe", recipe, "--no-timing", "--json", "-o", "r.onnx"
    )
    table = json.loads(done.out)
    kept = {row["node"]: row["why"] for row in table["kept_float"]}
    assert kept["b"].startswith("its weights are at most ")
    assert kept["b"].endswith("too small for scales of 8 bits")
    assert table["exit_code"] in (0, 4)  # small as it is, it may be no faster
    assert table["outputs"][0]["slices"][0]["sqnr_db"] > (15 if recipe == "int4" else 30)


def test_the_least_weights_that_have_codes() -> None:
    assert too_small(np.float32([0, 0])) == ""
    assert too_small(np.float32([0, LEAST_WEIGHT])) == ""
    assert too_small(np.float32([0, -LEAST_WEIGHT / 2])) != ""
    assert too_small(np.zeros((0, 3), np.float32)) == ""


def test_a_result_that_has_nothing_of_the_model_is_no_success(desk: Desk) -> None:
    save(from_text(f"{HEAD} {{ y = MatMul(x, w) }}", w=matrix(1, 1)), desk / "a.onnx")
    save(from_text(f"{HEAD} {{ y = MatMul(x, w) }}", w=matrix(1, 2)), desk / "b.onnx")
    np.savez(desk / "x.npz", x=inputs())
    done = desk.run("verify", "a.onnx", "b.onnx", "--data", "x.npz")
    assert done.code == 3
    assert "output 'y' has nothing of the float model's: -3." in done.out


def nan_model(desk: Desk) -> None:
    """The root of sample 7 is NaN."""
    save(from_text(f"{HEAD} {{ s = Sqrt(x) [m] y = MatMul(s, w) }}", w=matrix()), desk / "m.onnx")
    x = np.random.default_rng(0).random((40, 256)).astype(np.float32)
    x[7, 9] = -1
    np.savez(desk / "d.npz", x=x)


FEW_BITS: list[tuple[str, ...]] = [
    ("int4",), ("int8-weights", "--block", "32", "--bits-per-weight", "7"), ("int4", "--algorithm", "awq"),
    ("int4", "--bits-per-weight", "4.5"),
]  # fmt: skip


@pytest.mark.parametrize("words", FEW_BITS)
def test_a_bad_sample_is_named_or_left_out(desk: Desk, words: tuple[str, ...]) -> None:
    nan_model(desk)
    command = ("m.onnx", "--data", "d.npz", "--no-timing", "-o", "r.onnx", "--recipe", *words)
    assert desk.refused(*command) == (
        "tensor 's' is NaN at index [0, 9] for sample 7 of the calibration data: the float model itself fails there."
        " Mend or remove that sample, or leave such samples out with --skip-bad."
    )
    done = desk.run(*command, "--skip-bad")
    assert done.code in (0, 4), done
    assert "1 bad sample was left out: tensor 's' is NaN at index [0, 9] for sample 7" in done.out


def test_moments_that_no_sample_explains_are_told(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What passes from quantized parts may be NaN where the float model makes none."""

    def nan(*_: Any, **__: Any) -> Any:
        raise NotFiniteError(
            "the second moment of the input holds NaN or infinities: calibrate again."
        )

    save(linear_net(), desk / "m.onnx")
    np.savez(desk / "d.npz", x=inputs())
    monkeypatch.setattr("qcompile.fewbits.sequential.solve_blocks", nan)
    said = desk.refused("m.onnx", "--data", "d.npz", "--recipe", "int4", "-o", "r.onnx")
    assert said.startswith("the second moment of the input holds NaN")


def test_names_are_printed_as_they_are(desk: Desk) -> None:
    model = from_text(f"{HEAD} {{ [a] y = MatMul(x, w) }}", w=matrix())
    model.graph.node[0].name = "enc:a:/q"
    model.graph.node[0].output[0] = model.graph.output[0].name = "out:fire:"
    save(model, desk / "m.onnx")
    done = desk.run("m.onnx", "-o", "x:a:.onnx", "--no-timing")
    assert "wrote x:a:.onnx" in done.out
    assert "out:fire:" in done.out
    assert "enc:a:/q" in desk.run("plan", "m.onnx").out


def test_what_grows_is_said_to_grow() -> None:
    assert sized(4, 1) == "4.00x smaller"
    assert sized(1, 1.25, 1) == "1.25x larger"
    assert sized(100, 104, 1) == "1.04x larger"
    assert sized(1, 1.001) == "1.00x smaller"
    assert sized(0, 0) == "1.00x smaller"


def test_a_model_without_integer_kernels_is_no_success(desk: Desk) -> None:
    """All of it is constant: ORT folds what was quantized."""
    model = from_text("g () => (float[256,256] y) { y = MatMul(w, w) }", w=matrix())
    onnx.checker.check_model(model)
    save(model, desk / "m.onnx")
    done = desk.run("m.onnx", "--no-timing", "-o", "r.onnx", "--format", "qdq")
    assert done.code == 4
    assert done.out.startswith(
        "NOT a success: no integer kernel is left in the graph that ORT optimized."
    )


def test_a_pattern_is_named_by_its_option(desk: Desk) -> None:
    said = desk.refused("m.onnx", "--recipe", "int4", "--bits-for", "nosuch=8")
    assert said.startswith("the pattern 'nosuch' of --bits-for matches no node.")


def test_a_lookup_of_codes_counts_as_integer() -> None:
    rows = Verdict("e", "Gather", "weight", "integer", "Gather", "8-bit rows")
    merged = Verdict("p", "MatMul", "dynamic", "integer", "merged", "part of another node")
    assert Kernels((rows,), 0, 0, 0, {}).runs
    assert Kernels((merged,), 1, 0, 0, {}).runs
    assert not Kernels((merged,), 0, 0, 0, {}).runs


def test_weights_beside_are_not_written_over_by_those_of_the_result(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(linear_net(), desk / "bar.onnx", data="foo.onnx.data")
    before = (desk / "foo.onnx.data").read_bytes()
    assert "foo.onnx.data is the external data of the model itself" in desk.refused(
        "bar.onnx", "-o", "foo.onnx"
    )
    assert (desk / "foo.onnx.data").read_bytes() == before


@pytest.mark.parametrize("bad", [[9], [1, 9], [0]])
@pytest.mark.parametrize("algorithm", ["auto", "rtn"])
def test_bad_samples_of_either_part_are_left_out(
    desk: Desk, bad: list[int], algorithm: str
) -> None:
    nan_model(desk)
    x = np.random.default_rng(0).random((10, 256)).astype(np.float32)
    x[bad, 9] = -1
    np.savez(desk / "d.npz", x=x)
    words = (
        "m.onnx",
        "--data",
        "d.npz",
        "--recipe",
        "int4",
        "--algorithm",
        algorithm,
        "--no-timing",
        "-o",
        "r.onnx",
    )
    done = desk.run(*words, "--skip-bad")
    assert done.code in (0, 4), done
    assert done.out.count("left out: tensor 's' is NaN at index [0, 9]") == 1 + (bad == [1, 9])


def test_no_good_sample_is_left(desk: Desk) -> None:
    nan_model(desk)
    x = np.random.default_rng(0).random((10, 256)).astype(np.float32)
    np.savez(desk / "d.npz", x=-x)
    words = ("m.onnx", "--data", "d.npz", "--recipe", "int4", "-o", "r.onnx", "--skip-bad")
    assert "every other sample is bad as well" in desk.refused(*words)
    x[[4, 9]] *= -1  # those that judge
    np.savez(desk / "d.npz", x=x)
    assert desk.refused(*words) == "every held-out sample is bad: give more samples with --data."


def test_random_outputs_are_no_loss(desk: Desk) -> None:
    text = "g (float[N,256] x) => (float[N,256] y, float[N,256] z) { y = MatMul(x, w) z = RandomNormalLike(y) }"
    save(from_text(text, w=matrix()), desk / "m.onnx")
    np.savez(desk / "d.npz", x=inputs())
    assert desk.run("m.onnx", "--data", "d.npz", "--no-timing", "-o", "r.onnx").code in (0, 4)


def test_constants_beside_the_model_are_its_data_too(desk: Desk) -> None:
    model = from_text(f"{HEAD} {{ w = Constant<value = float[2] {{1, 2}}>() y = Neg(x) }}")
    stored = model.graph.node[0].attribute[0].t
    stored.CopyFrom(onnx.numpy_helper.from_array(matrix(), "w"))
    onnx.external_data_helper.set_external_data(stored, "c.bin", 0, matrix().nbytes)
    stored.ClearField("raw_data")
    (desk / "c.bin").write_bytes(matrix().tobytes())
    (desk / "m.onnx").write_bytes(model.SerializeToString())
    assert {path.name for path in io.external_files(io.load(desk / "m.onnx"))} == {"c.bin"}
