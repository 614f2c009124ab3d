"""Large models, from file to file: what comes out is what the pass makes in memory."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from large_models import SMALL, edited, llama
from make_llama import Kind, Shape, make_llama

from passes.lower_nbits import LowerNbits
from passes.name_nodes import NameNodes
from qcompile import stream
from qcompile.algo.rtn import rtn, search
from qcompile.errors import ModelError, OutputError, PassError, RecipeError
from qcompile.graph import io, wire
from qcompile.graph.linear import find_linears
from qcompile.resident import anonymous_bytes
from qcompile.run.session import Session
from qcompile.solve import slabs
from qcompile.step import Outcome, run_pass
from qcompile.stream import StreamSettings, quantize_large

IDS = {"ids": np.arange(6).reshape(2, 3) % SMALL.vocab}


def in_memory(path: Path, settings: StreamSettings, output: Path) -> None:
    """The slow, obvious version: whole weights, rounded one after the other, and the pass."""
    model = io.load(path)
    run_pass(NameNodes(), model)
    made: dict[object, Any] = {}
    weights = {}
    for item in find_linears(model):
        assert item.reason is None
        assert item.weight is not None
        if item.weight.key not in made:
            made[item.weight.key] = (search if settings.search else rtn)(
                item.read(), bits=settings.bits, block=settings.block, symmetric=settings.symmetric,
                scales="float16" if item.weight.dtype == ir.DataType.FLOAT16 else "float32",
            )  # fmt: skip
        weights[item.name] = made[item.weight.key]
    run_pass(LowerNbits(weights, "nbits", settings.accuracy_level), model)
    io.save(model, output)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("files", [0, 1, 3])
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 0), (4, 0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_result_is_that_in_memory(
    tmp_path: Path,
    files: int,
    bits: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    symmetric: bool,
) -> None:
    monkeypatch.setattr(wire, "LEAST", 256)
    path = llama(tmp_path / "m.onnx", files=files)
    settings = StreamSettings(bits, block, symmetric)
    report = quantize_large(path, tmp_path / "out.onnx", settings)
    in_memory(path, settings, tmp_path / "same.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "same.onnx").read_bytes()
    assert len(report.quantized) == len(report.weights) == 2 * 7 + 2
    assert report.before == sum(
        file.stat().st_size for file in tmp_path.iterdir() if file.name.startswith("m.onnx")
    )
    assert report.after == (tmp_path / "out.onnx").stat().st_size
    assert len(report.checks) == 8


def test_the_result_with_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "EXTERNAL_BYTES", 1000)
    path = llama(tmp_path / "m.onnx", files=2)
    settings = StreamSettings(search=True)
    report = quantize_large(path, tmp_path / "out.onnx", settings)
    (tmp_path / "other").mkdir()
    in_memory(path, settings, tmp_path / "other" / "out.onnx")
    for name in ("out.onnx", "out.onnx.data"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert report.after == sum(
        (tmp_path / f"out.onnx{end}").stat().st_size for end in ("", ".data")
    )
    assert Session(tmp_path / "out.onnx").run(IDS)[0].shape == (2, 3, SMALL.vocab)


@pytest.mark.parametrize(
    ("kind", "cast", "scale"),
    [("float16", False, np.float16), ("float16", True, np.float32), ("bfloat16", True, np.float32)],
)
def test_narrow_weights(tmp_path: Path, kind: Kind, scale: type, *, cast: bool) -> None:
    path, settings = llama(tmp_path / "m.onnx", kind=kind, cast=cast), StreamSettings()
    quantize_large(path, tmp_path / "out.onnx", settings)
    in_memory(path, settings, tmp_path / "same.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "same.onnx").read_bytes()
    made = io.load(tmp_path / "out.onnx")
    node = next(node for node in made.graph if node.op_type == "MatMulNBits")
    held = node.inputs[2]
    assert held is not None
    assert held.const_value is not None
    assert held.const_value.numpy().dtype == scale
    assert np.isfinite(Session(tmp_path / "out.onnx").run(IDS)[0].astype(np.float32)).all()


def test_activations_of_bfloat16_stay(tmp_path: Path) -> None:
    path = llama(tmp_path / "m.onnx", kind="bfloat16")
    with pytest.raises(
        ModelError, match="no weight to round: /embed/Gather: its weight is BFLOAT16"
    ):
        quantize_large(path, tmp_path / "out.onnx")
    assert "out.onnx" not in names(tmp_path)


def test_errors_are_those_of_the_weights(tmp_path: Path) -> None:
    path = llama(tmp_path / "m.onnx")
    report = quantize_large(path, tmp_path / "out.onnx")
    for item, line in zip(find_linears(io.load(path)), report.weights, strict=True):
        W = item.read().astype(np.float64)
        off = rtn(item.read(), bits=4, block=32, symmetric=True).dequantize() - W
        assert line.error == pytest.approx(np.linalg.norm(off) / np.linalg.norm(W), rel=1e-5)
        assert line.nodes == (item.name,)
        assert line.shape == item.shape
        assert line.before == W.size * 4
        assert line.after == W.size // 2 + W.size // 32 * 4
    for check in report.checks:
        assert check.output == pytest.approx(check.weight, rel=0.3)


def test_a_head_that_is_the_table(tmp_path: Path) -> None:
    path = llama(tmp_path / "m.onnx")
    model = onnx.load(path, load_external_data=False)
    model.graph.node[-1].input[1] = "turned"
    model.graph.node.insert(0, onnx.helper.make_node("Transpose", ["embed"], ["turned"], "t"))
    del model.graph.initializer[-2]  # the head; the norm is last
    onnx.save(model, path)
    settings = StreamSettings()
    report = quantize_large(path, tmp_path / "out.onnx", settings)
    in_memory(path, settings, tmp_path / "same.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "same.onnx").read_bytes()
    assert report.weights[0].nodes == ("/embed/Gather", "/head/MatMul")
    assert Session(tmp_path / "out.onnx").run(IDS)[0].shape == (2, 3, SMALL.vocab)


@pytest.mark.parametrize("name", ["a b%20c", "ä/ß?#&=.onnx", "x" * 200, "q'\"\\n"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a %41 ö"
    folder.mkdir()
    path = llama(folder / f"{name.replace('/', '-')[:60]}.onnx", files=2)
    edited(path, embed=name, **{"layers.0.q": f"{name}\tq"})
    out = folder / f"out {name.replace('/', '-')[:60]}.onnx"
    report = quantize_large(path, out)
    assert [line.name for line in report.weights[:2]] == [name, f"{name}\tq"]
    assert Session(out).run(IDS)[0].shape == (2, 3, SMALL.vocab)


def test_a_model_that_is_a_link(tmp_path: Path) -> None:
    for folder in ("blobs", "snapshot"):
        (tmp_path / folder).mkdir()
    held = llama(tmp_path / "blobs" / "123abc", files=0)
    path = tmp_path / "snapshot" / "m.onnx"
    path.symlink_to(held)
    report = quantize_large(path, tmp_path / "out.onnx")
    assert report.before == held.stat().st_size
    with pytest.raises(OutputError, match="is the model itself"):
        quantize_large(path, held)


def test_patterns(tmp_path: Path) -> None:
    path = llama(tmp_path / "m.onnx")
    settings = StreamSettings(
        keep_float=("*/layers.1.*", "re:embed"), bits_for=(("*down*", 8), ("/head/MatMul", 8))
    )
    report = quantize_large(path, tmp_path / "out.onnx", settings)
    lines = {line.name: line for line in report.weights}
    assert {line.bits for name, line in lines.items() if name.startswith("layers.1")} == {None}
    assert lines["embed"].reason == "kept float by 're:embed'"
    assert (lines["embed"].before, lines["embed"].error) == (lines["embed"].after, None)
    assert [lines[f"layers.0.{part}"].bits for part in ("q", "up", "down")] == [4, 4, 8]
    assert lines["head"].bits == 8
    stored = io.load(tmp_path / "out.onnx").graph.initializers
    assert "embed" in stored
    assert "layers.0.q" not in stored


def test_tables_that_stay(tmp_path: Path) -> None:
    report = quantize_large(
        llama(tmp_path / "m.onnx"), tmp_path / "out.onnx", StreamSettings(tables=False)
    )
    assert report.weights[0].reason == "tables stay float"


def test_a_float_weight_that_is_read_counts_twice(tmp_path: Path) -> None:
    path = llama(tmp_path / "m.onnx")
    model = onnx.load(path, load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("Exp", ["layers.0.q"], ["more"], "more"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("more", 1, [64, 64]))
    onnx.save(model, path)
    line = quantize_large(path, tmp_path / "out.onnx").weights[1]
    assert line.after == 64 * 64 * 4 + 64 * 64 // 2 + 64 * 2 * 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"bits": 3}, "weights of 3 bits: large models are stored in 4 or 8"),
        ({"bits_for": (("x", 16),)}, "weights of 16 bits"),
        ({"block": 24}, "blocks of 24 weights: give 16, 32, 64, 128 or 256, or 0 for a row"),
        ({"block": 512}, "blocks of 512 weights"),
        ({"threads": 0}, "0 threads and 8 checks: give at least 1 and 0"),
    ],
)
def test_settings_that_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        StreamSettings(**words)


def refused(
    path: Path, settings: StreamSettings | None = None, error: type[Exception] = ModelError
) -> str:
    """The sentence with which it ends; what stood at the output stands there still, and nothing else."""
    output = path.with_name("out.onnx")
    output.write_bytes(b"old")
    before = names(path.parent)
    with pytest.raises(error) as caught:
        quantize_large(path, output, settings)
    assert output.read_bytes() == b"old"
    assert names(path.parent) == before
    return str(caught.value)


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_weight_that_is_no_number(
    tmp_path: Path, bad: float, monkeypatch: pytest.MonkeyPatch, *, external: bool
) -> None:
    if external:
        monkeypatch.setattr(io, "EXTERNAL_BYTES", 1000)
    path = llama(tmp_path / "m.onnx", files=1)
    entry = onnx.load(path, load_external_data=False).graph.initializer[-2]  # the head, (64, 80)
    start = next(int(e.value) for e in entry.external_data if e.key == "offset")
    values = np.memmap(tmp_path / "m.onnx.0", np.float32, "r+", start, (64, 80))
    values[7, 61] = bad
    values.flush()
    assert refused(path) == (
        f"the weight 'head' is {bad} at output 61, input 7: no scale fits it; repair the model."
    )


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    path = llama(tmp_path / "m.onnx")
    assert "of --keep-float" in refused(path, StreamSettings(keep_float=("nope",)), RecipeError)
    assert "of --bits-for" in refused(path, StreamSettings(bits_for=(("nope", 8),)), RecipeError)


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = llama(tmp_path / "m.onnx")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wire, "LEAST", 256)
    monkeypatch.setattr(ir.Tensor, "tofile", full)
    for size in (1, 1_000_000_000):
        monkeypatch.setattr(io, "EXTERNAL_BYTES", size)
        assert "No space left on device" in refused(path, None, OutputError)


def test_an_output_that_is_a_file_of_the_model(tmp_path: Path) -> None:
    path = llama(tmp_path / "m.onnx")
    data = (tmp_path / "m.onnx.0").read_bytes()
    with pytest.raises(OutputError, match="is the model itself"):
        quantize_large(path, path)
    with pytest.raises(OutputError, match="is a data file of the model itself"):
        quantize_large(path, tmp_path / "m.onnx.0")
    (tmp_path / "m.onnx.0").rename(tmp_path / "o.onnx.data")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for item in tensor.external_data:
            item.value = "o.onnx.data" if item.key == "location" else item.value
    onnx.save(model, path)
    with pytest.raises(OutputError, match="is a data file of the model itself"):
        quantize_large(path, tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx.data").read_bytes() == data


def test_a_result_that_is_off_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = llama(tmp_path / "m.onnx")
    true = slabs.round_stored

    def wrong(*given: Any) -> Any:
        made = true(*given)
        return dataclasses.replace(
            made, blocked=dataclasses.replace(made.blocked, codes=made.blocked.codes ^ np.uint8(1))
        )

    monkeypatch.setattr(stream, "round_stored", wrong)
    assert "these should agree" in refused(path, None, PassError)


def test_a_node_that_the_pass_leaves_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama(tmp_path / "m.onnx")
    true = LowerNbits.apply

    def leaves(self: LowerNbits, model: ir.Model) -> Outcome:
        made = true(self, model)
        return dataclasses.replace(made, skipped={next(iter(self.weights)): "of a reason"})

    monkeypatch.setattr(LowerNbits, "apply", leaves)
    assert refused(path, None, PassError).endswith("was to be rounded: of a reason.")


def test_a_result_that_is_no_model_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama(tmp_path / "m.onnx")
    monkeypatch.setattr(io, "check_file", lambda _: "a node reads nothing")
    assert refused(path, None, PassError) == "the result is not valid: a node reads nothing."


_CHILD = """
import json, sys
from pathlib import Path
from qcompile.stream import StreamSettings, quantize_large
report = quantize_large(Path(sys.argv[1]), Path(sys.argv[2]), StreamSettings(4, 32))
print(json.dumps([report.growth, report.before, report.after]))
"""


@pytest.mark.skipif(anonymous_bytes() is None, reason="this system does not tell anonymous memory")
@pytest.mark.parametrize("files", [0, 2])
def test_anonymous_memory_does_not_follow_the_model(tmp_path: Path, files: int) -> None:
    path = tmp_path / "m.onnx"
    make_llama(path, Shape(5, 1024, 2816, 8000), random=True, files=files)
    words = [sys.executable, "-c", _CHILD, str(path), str(tmp_path / "out.onnx")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    growth, before, after = json.loads(done.stdout)
    assert before > 300e6
    assert after < before / 6
    assert growth < 100e6
