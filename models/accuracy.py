"""The true top-1 accuracy of a digits model on the held-out images.

Run as `python models/accuracy.py MODEL.onnx [MODEL2.onnx ...] [--json]`. Needs numpy and
onnxruntime only. The model's input name picks the preprocessing, so a quantized model is
measured exactly like the float one it came from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

HERE = Path(__file__).resolve().parent
EVAL = HERE / "digits_eval.npz"


def enlarge(images: Pixels, side: int) -> Floats:
    """The 8x8 images of codes 0..16, bilinearly enlarged (half-pixel centres, edges held).

    Returns: (n, side, side) float32 in [-1, 1], newly allocated. Every step is exact in
    float32 for side 32 and 64, so all machines get the same bits.
    """
    at = np.clip((np.arange(side) + 0.5) * (8 / side) - 0.5, 0, 7)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(8))).astype(np.float32)  # (side, 8)
    values = images.astype(np.float32) / np.float32(8) - np.float32(1)
    return np.asarray(weights @ values @ weights.T, dtype=np.float32)


def as_image(images: Pixels) -> Floats:
    """The CNN's input: (n, 1, 64, 64) float32, newly allocated."""
    return enlarge(images, 64)[:, None]


def as_patches(images: Pixels) -> Floats:
    """The transformer's input: 8x8 patches of 4x4 pixels, (n, 64, 16) float32, newly allocated."""
    grid = enlarge(images, 32).reshape(-1, 8, 4, 8, 4)  # (n, row, y, column, x)
    return np.ascontiguousarray(grid.transpose(0, 1, 3, 2, 4).reshape(-1, 64, 16))


PREPARE = {"image": as_image, "patches": as_patches}


def accuracy(path: str | Path) -> tuple[float, int]:
    """The share of evaluation images whose largest logit is the label's, and their number.

    Images go in one at a time: a model with a fixed batch of 1 works, and one that chooses
    scales at run time sees what it would see in use.

    Raises:
        ValueError: The model's input is not one of the digits models'.
    """
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    if len(names) != 1 or names[0] not in PREPARE:
        raise ValueError(f"{path}: inputs {names}; expected one, named one of {sorted(PREPARE)}")
    with np.load(EVAL) as stored:
        labels, images = stored["labels"], stored["images"]
    feeds = PREPARE[names[0]](images)
    right = 0
    for feed, label in zip(feeds, labels, strict=True):
        logits = session.run(None, {names[0]: feed[None]})[0]
        right += int(np.argmax(logits[0]) == label)
    return right / len(labels), len(labels)


def main() -> None:
    """One line a model on stdout, or one JSON object: {path: {"top1": share, "n": count}}."""
    parser = argparse.ArgumentParser(description="Top-1 accuracy on the held-out digits.")
    parser.add_argument("models", nargs="+", metavar="MODEL.onnx")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    results = {path: accuracy(path) for path in arguments.models}
    if arguments.json:
        print(json.dumps({path: {"top1": top1, "n": n} for path, (top1, n) in results.items()}))
        return
    for path, (top1, n) in results.items():
        print(f"{path}  top-1 {100 * top1:.2f} %  ({round(top1 * n)} of n = {n})")


if __name__ == "__main__":
    main()
