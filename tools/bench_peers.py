"""Quantizes one model with a tool other than ours; `bench.py` runs it, each time in a fresh process.

    python bench_peers.py RECIPE MODEL.onnx CALIBRATION_DIR OUT.onnx

Prints one JSON object with a note on what was done. It imports nothing of qcompile, since another
interpreter may run it.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Feed = dict[str, np.ndarray[Any, Any]]


def load(file: Path) -> Feed:
    """One calibration feed."""
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}


class Reader:
    """The calibration data reader that ORT's tool asks for: one feed at a time, then None."""

    def __init__(self, folder: Path) -> None:
        self._files = iter(sorted(folder.glob("*.npz")))

    def get_next(self) -> Feed | None:
        """The next feed."""
        file = next(self._files, None)
        return None if file is None else load(file)

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Feed:
        feed = self.get_next()
        if feed is None:
            raise StopIteration
        return feed


def _reader(folder: Path) -> Any:
    """A `Reader` that is an instance of ORT's own class, as `quantize_static` demands."""
    quantization = importlib.import_module("onnxruntime.quantization")
    return type("OrtReader", (Reader, quantization.CalibrationDataReader), {})(folder)


def static_default(model: Path, data: Path, out: Path) -> str:
    """What `quantize_static` does when it is told nothing."""
    quantization = importlib.import_module("onnxruntime.quantization")
    quantization.quantize_static(str(model), str(out), _reader(data))
    return "quantize_static, defaults: S8S8, per tensor, QDQ"


def static_best(model: Path, data: Path, out: Path) -> str:
    """ORT's advice for x86: pre-process, then U8S8, per channel."""
    with tempfile.TemporaryDirectory() as folder:
        return static_best_raw(_preprocessed(model, Path(folder)), data, out) + ", pre-processed"


def static_best_raw(model: Path, data: Path, out: Path) -> str:
    """U8S8, per channel, of the model as it is."""
    return _static(model, data, out, per_channel=True)


def static_best_tensor(model: Path, data: Path, out: Path) -> str:
    """U8S8, per tensor: what is left where the model's opset knows no scales per channel."""
    return _static(model, data, out, per_channel=False)


def _static(model: Path, data: Path, out: Path, *, per_channel: bool) -> str:
    quantization = importlib.import_module("onnxruntime.quantization")
    quantization.quantize_static(
        str(model), str(out), _reader(data), per_channel=per_channel,
        quant_format=quantization.QuantFormat.QDQ,
        calibrate_method=quantization.CalibrationMethod.MinMax,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
    return f"quantize_static, U8S8, per {'channel' if per_channel else 'tensor'}, QDQ, min-max"


def dynamic_default(model: Path, data: Path, out: Path) -> str:
    """What `quantize_dynamic` does when it is told nothing."""
    del data
    quantization = importlib.import_module("onnxruntime.quantization")
    quantization.quantize_dynamic(str(model), str(out))
    return "quantize_dynamic, defaults: QInt8, per tensor"


def dynamic_best(model: Path, data: Path, out: Path) -> str:
    """Per-channel weights, of the pre-processed model."""
    with tempfile.TemporaryDirectory() as folder:
        return dynamic_best_raw(_preprocessed(model, Path(folder)), data, out) + ", pre-processed"


def dynamic_best_raw(model: Path, data: Path, out: Path) -> str:
    """Per-channel weights, of the model as it is."""
    del data
    quantization = importlib.import_module("onnxruntime.quantization")
    quantization.quantize_dynamic(
        str(model), str(out), per_channel=True, weight_type=quantization.QuantType.QInt8
    )
    return "quantize_dynamic, QInt8, per channel"


def _preprocessed(model: Path, folder: Path) -> Path:
    """The model that ORT's own preparation makes of it."""
    out = folder / "preprocessed.onnx"
    importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process(
        str(model), str(out)
    )
    return out


def nncf_default(model: Path, data: Path, out: Path) -> str:
    """What `nncf.quantize` does when it is told nothing."""
    return _nncf(model, data, out, transformer=False)


def nncf_transformer(model: Path, data: Path, out: Path) -> str:
    """`nncf.quantize` for transformers: with SmoothQuant."""
    return _nncf(model, data, out, transformer=True)


def _nncf(model: Path, data: Path, out: Path, *, transformer: bool) -> str:
    nncf, onnx = importlib.import_module("nncf"), importlib.import_module("onnx")
    dataset = nncf.Dataset(sorted(data.glob("*.npz")), load)
    options = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    onnx.save(nncf.quantize(onnx.load(model), dataset, **options), out)
    return "nncf.quantize" + (", model_type=TRANSFORMER" if transformer else "")


RECIPES: dict[str, Callable[[Path, Path, Path], str]] = {
    "static-default": static_default, "static-best": static_best, "static-best-raw": static_best_raw,
    "static-best-tensor": static_best_tensor,
    "dynamic-default": dynamic_default, "dynamic-best": dynamic_best, "dynamic-best-raw": dynamic_best_raw,
    "nncf": nncf_default, "nncf-transformer": nncf_transformer,
}  # fmt: skip


if __name__ == "__main__":
    note = RECIPES[sys.argv[1]](*map(Path, sys.argv[2:5]))
    print(json.dumps({"note": note}))
