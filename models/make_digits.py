"""Trains the digits models and writes them and their data beside this file.

Run as `python models/make_digits.py [--threads 2]`; needs torch, onnx and scikit-learn (see
README.md). Seeded: the same machine, thread count and versions give the same bytes. The
number of epochs is fixed in advance and no step looks at the evaluation split.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import torch
from accuracy import EVAL, HERE, Floats, Pixels, accuracy, as_image, as_patches
from digits_nets import DigitsCNN, DigitsTransformer
from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from pathlib import Path

SEED = 20240607
EVALUATE = 500
CALIBRATE = 128
OPSET = 17


class Split(NamedTuple):
    """Disjoint evaluation and training images; calibration is the head of training."""

    train: Pixels
    train_labels: npt.NDArray[np.int64]
    evaluate: Pixels
    evaluate_labels: npt.NDArray[np.int64]

    @property
    def calibrate(self) -> Pixels:
        """The first CALIBRATE training images: seen in training, never in evaluation."""
        return self.train[:CALIBRATE]


def split() -> Split:
    """scikit-learn's 1797 digits in a seeded order: the first EVALUATE are held out."""
    digits = load_digits()
    images = digits.images.astype(np.uint8)
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(SEED).permutation(len(images))
    held, rest = order[:EVALUATE], order[EVALUATE:]
    return Split(images[rest], labels[rest], images[held], labels[held])


def jitter(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Each (1, side, side) image turned, scaled and moved a little; new paper is -1."""
    n = len(images)
    angle = rng.uniform(-0.2, 0.2, n)
    scale = rng.uniform(0.9, 1.1, n)
    move = rng.uniform(-0.12, 0.12, (n, 2))
    rows = [
        np.stack([np.cos(angle) * scale, -np.sin(angle) * scale, move[:, 0]], axis=1),
        np.stack([np.sin(angle) * scale, np.cos(angle) * scale, move[:, 1]], axis=1),
    ]
    theta = torch.from_numpy(np.stack(rows, axis=1).astype(np.float32))  # (n, 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1


def to_patches(images: Tensor) -> Tensor:
    """(n, 1, 32, 32) -> (n, 64, 16), the layout of `as_patches`."""
    return functional.unfold(images, kernel_size=4, stride=4).transpose(1, 2)


def train(
    net: nn.Module,
    images: Tensor,
    labels: npt.NDArray[np.int64],
    *,
    epochs: int,
    peak: float,
    patches: bool = False,
) -> nn.Module:
    """The net after `epochs` of AdamW with a warmed-up cosine rate, in evaluation mode.

    images: (n, 1, side, side) float32, left alone.
    """
    rng = np.random.default_rng(SEED)
    target = torch.from_numpy(labels)
    batch = 32
    steps = epochs * (len(labels) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=peak, weight_decay=0.02)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / (0.1 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    # torch's stub of Module.to lacks memory_format; this layout has the faster convolutions.
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
    net.train()
    began = time.perf_counter()
    for epoch in range(epochs):
        order = torch.from_numpy(rng.permutation(len(labels)))
        total = 0.0
        for start in range(0, len(labels) - batch + 1, batch):
            some = order[start : start + batch]
            inputs = jitter(images[some], rng)
            logits = net(to_patches(inputs) if patches else inputs)
            loss = functional.cross_entropy(logits, target[some], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * batch
        seconds = time.perf_counter() - began
        print(f"epoch {epoch + 1:2}/{epochs}  loss {total / len(labels):.4f}  {seconds:.0f} s")
    return net.eval()


def export(net: nn.Module, name: str, example: Floats, path: Path) -> None:
    """`path` holds the net as ONNX: input `name` and output `logits`, batch axis `N`."""
    with warnings.catch_warnings():
        # The TorchScript exporter is deprecated; the new one writes this machine's paths and
        # stack traces into the file, and leaves BatchNorm folding to a later optimizer.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.from_numpy(example[:2]),),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=[name],
            output_names=["logits"],
            dynamic_axes={name: {0: "N"}, "logits": {0: "N"}},
        )
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    onnx.checker.check_model(model, full_check=True)
    model.graph.name = path.stem
    onnx.save(model, path)


def main() -> None:
    """Writes two models, their calibration feeds and the evaluation data; prints the accuracy."""
    parser = argparse.ArgumentParser(description="Rebuilds the digits models and data.")
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    torch.use_deterministic_algorithms(mode=True)
    data = split()
    np.savez_compressed(EVAL, labels=data.evaluate_labels.astype(np.uint8), images=data.evaluate)

    large = torch.from_numpy(as_image(data.train))
    torch.manual_seed(SEED)
    cnn = train(DigitsCNN(), large, data.train_labels, epochs=12, peak=3e-3)
    feeds = as_image(data.calibrate)
    export(cnn, "image", feeds, HERE / "digits_cnn.onnx")
    np.savez_compressed(HERE / "digits_cnn.calib.npz", image=feeds)

    small = functional.avg_pool2d(large, 2)
    torch.manual_seed(SEED)
    transformer = train(
        DigitsTransformer(), small, data.train_labels, epochs=50, peak=1e-3, patches=True
    )
    feeds = as_patches(data.calibrate)
    export(transformer, "patches", feeds, HERE / "digits_transformer.onnx")
    np.savez_compressed(HERE / "digits_transformer.calib.npz", patches=feeds)

    for name in ("digits_cnn.onnx", "digits_transformer.onnx"):
        top1, n = accuracy(HERE / name)
        print(f"{name}  top-1 {100 * top1:.2f} %  (n = {n})")


if __name__ == "__main__":
    main()
