"""Image files as calibration data: decoding, and preprocessing guessed from the model's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qcompile.errors import DataError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

    from qcompile.calib.feeds import InputSpec

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # red, green, blue on 0..1, as in torchvision
IMAGENET_STD = (0.229, 0.224, 0.225)
MARGIN = 256 / 224  # how much larger than the crop an image is resized, as in torchvision
STEP, LONGEST = 32, 960  # of sides that the model leaves open: the usual stride and a bound

Layout = Literal["nchw", "nhwc"]
Color = Literal["rgb", "bgr", "gray"]
Dim = int | str | None


@dataclass(frozen=True)
class ImageOptions:
    """How images become the model's input; a field of None is guessed from that input.

    `size` is (height, width). `resize` is the short side before the crop; it grows where the image
    would not cover the crop. `crop` "none" stretches to `size`. Values are
    `(pixel * scale - mean) / std`, with one number or one for each channel, in the model's order.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    crop: Literal["center", "none"] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    layout: Layout | None = None
    color: Color | None = None


@dataclass(frozen=True)
class Values:
    """The map from pixels 0..255 to what the model wants."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Preprocess:
    """From an image file to the model's input; `notes` says what was guessed.

    A side of `size` that is None follows the image. `values` of None keeps the pixels as uint8.
    """

    size: tuple[int | None, int | None]
    resize: int | None
    crop: bool
    values: Values | None
    layout: Layout
    color: Color
    batched: bool
    notes: tuple[str, ...]

    def __call__(self, path: Path) -> NDArray[Any]:
        """The image as a new array, float32 or uint8, (1, C, H, W) or as the layout says.

        Raises:
            DataError: the file cannot be read as an image.
        """
        image = self._resized(_decode(path, "L" if self.color == "gray" else "RGB"))
        pixels: NDArray[Any] = np.asarray(image)
        pixels = pixels.reshape((*pixels.shape[:2], -1))  # (height, width, channels)
        if self.color == "bgr":
            pixels = pixels[..., ::-1]
        if self.layout == "nchw":
            pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        if self.values is not None:
            mean, std = (np.asarray(v, np.float32) for v in (self.values.mean, self.values.std))
            if self.layout == "nchw":
                mean, std = mean.reshape(-1, 1, 1), std.reshape(-1, 1, 1)
            pixels = pixels * np.float32(self.values.scale)
            pixels -= mean
            pixels /= std
        return np.ascontiguousarray(pixels[None] if self.batched else pixels)

    def _resized(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        if height is not None and width is not None:
            return self._cropped(image, height, width)
        if height is not None:
            ratio = height / image.height
        elif width is not None:
            ratio = width / image.width
        elif self.resize is not None:
            ratio = self.resize / min(image.size)
        else:
            ratio = min(1.0, LONGEST / max(image.size))
        return _resize(
            image, height or _step(image.height * ratio), width or _step(image.width * ratio)
        )

    def _cropped(self, image: Image.Image, height: int, width: int) -> Image.Image:
        if not self.crop:
            return _resize(image, height, width)
        cover = max(height / image.height, width / image.width)
        ratio = cover * MARGIN if self.resize is None else max(cover, self.resize / min(image.size))
        image = _resize(image, round(image.height * ratio), round(image.width * ratio))
        top, left = (image.height - height) // 2, (image.width - width) // 2
        return image.crop((left, top, left + width, top + height))


def open_images(spec: InputSpec, options: ImageOptions, *, normalizes: bool) -> Preprocess:
    """The preprocessing for this input: what `options` leave open is guessed and noted.

    With `normalizes` the graph itself scales pixels, so they are guessed to be wanted raw.

    Raises:
        RecipeError: an option contradicts the input or another option.
        DataError: the input does not look like an image.
    """
    notes: list[str] = []
    dims: tuple[Dim, ...] = (None,) * 4 if spec.shape is None else spec.shape
    if len(dims) not in {3, 4} or (len(dims) == 4 and isinstance(dims[0], int) and dims[0] != 1):
        raise DataError(
            f"input {spec.name!r} is {spec}, and an image fills [1, C, H, W], [1, H, W, C] or one"
            " of them without the batch: give .npz or .npy files instead."
        )
    layout, channels = _layout(spec, dims[-3:], options, notes)
    color = _color(spec, channels, options, notes)
    sides = dims[-2:] if layout == "nchw" else dims[-3:-1]
    size, crop = _size(sides, options, notes)
    count = 1 if color == "gray" else 3
    values = _values(spec, color, count, options, notes, normalizes=normalizes)
    batched = len(dims) == 4
    return Preprocess(size, options.resize, crop, values, layout, color, batched, tuple(notes))


def _layout(
    spec: InputSpec, dims: Sequence[Dim], options: ImageOptions, notes: list[str]
) -> tuple[Layout, int | None]:
    """Where the channels stand, and how many there are if the input says so."""
    at: dict[Layout, int | None] = {"nchw": _count(dims[0]), "nhwc": _count(dims[2])}
    fits = [layout for layout, count in at.items() if count in {1, 3}]
    fits += [layout for layout, count in at.items() if count is None]
    layout = options.layout or (fits[0] if fits else None)
    if layout is None or layout not in fits:
        raise DataError(
            f"input {spec.name!r} is {spec}, without 1 or 3 channels where"
            f" {layout or 'nchw or nhwc'} has them: give .npz or .npy files instead."
        )
    if options.layout is None and at[layout] is None:
        notes.append(
            f"layout {layout} guessed, as the input leaves its channels open: set --layout."
        )
    return layout, at[layout]


def _color(spec: InputSpec, channels: int | None, options: ImageOptions, notes: list[str]) -> Color:
    if options.color is None:
        if channels == 1:
            return "gray"
        notes.append("RGB order assumed: set --color bgr if the model was trained otherwise.")
        return "rgb"
    count = 1 if options.color == "gray" else 3
    if channels not in {None, count}:
        raise RecipeError(
            f"--color {options.color} gives {count} channels, and input {spec.name!r} is {spec}:"
            " choose another color."
        )
    return options.color


def _size(
    sides: Sequence[Dim], options: ImageOptions, notes: list[str]
) -> tuple[tuple[int | None, int | None], bool]:
    """(height, width), None where it follows the image, and whether to crop to it."""
    height, width = options.size or (_count(sides[0]), _count(sides[1]))
    if min(*(options.size or (1, 1)), options.resize or 1) < 1:
        raise RecipeError("--size and --resize count pixels: give 1 or more.")
    open_sides = (height is None) + (width is None)
    if options.resize is not None and (
        open_sides == 1 or (not open_sides and options.crop == "none")
    ):
        raise RecipeError(
            "--resize is the short side before a center crop, or of images whose two sides the"
            " input leaves open, and neither holds here: drop it."
        )
    if open_sides and options.crop == "center":
        raise RecipeError("--crop center needs a size, which the input leaves open: set --size.")
    if open_sides:
        bound = f", at most {LONGEST}" if open_sides == 2 and options.resize is None else ""
        notes.append(
            f"the sides that the input leaves open follow each image, in multiples of {STEP}{bound}:"
            " set --size if the model was trained otherwise."
        )
        return (height, width), False
    size = f"size {height}x{width}" + ("" if options.size else " from the input shape")
    if options.resize is None and options.crop is None:
        notes.append(
            f"{size}, cut from the center of images resized to 256/224 of it:"
            " set --crop none if the model sees whole images."
        )
    elif not options.size:
        notes.append(f"{size}.")
    return (height, width), options.crop != "none"


def _values(
    spec: InputSpec,
    color: Color,
    channels: int,
    options: ImageOptions,
    notes: list[str],
    *,
    normalizes: bool,
) -> Values | None:
    given = [name for name in ("mean", "std", "scale") if getattr(options, name) is not None]
    if not spec.dtype.name.startswith(("float", "bfloat")):
        if given:
            raise RecipeError(
                f"input {spec.name!r} is {spec.dtype} and takes raw pixels: drop --{given[0]}."
            )
        return None
    for name, numbers in (("mean", options.mean), ("std", options.std)):
        if numbers is not None and len(numbers) not in {1, channels}:
            raise RecipeError(f"--{name} has {len(numbers)} numbers: give 1 or {channels}.")
    if options.std is not None and not all(number > 0 for number in options.std):
        raise RecipeError(f"--std is {options.std}: give numbers above 0.")
    mean, std = options.mean or (0.0,), options.std or (1.0,)
    if given:
        scale = options.scale
        if scale is None:
            raw = max(*map(abs, mean), *std) > 1
            scale = 1.0 if raw else 1 / 255
            notes.append(f"pixels 0..{255 if raw else 1} guessed from --{given[0]}: set --scale.")
        return Values(scale, mean, std)
    if normalizes:
        notes.append("raw pixels 0..255, as the model normalizes them itself: set --scale if not.")
        return Values(1.0, mean, std)
    if color == "gray":
        notes.append(
            "pixels 0..1 guessed, without mean and std: set --mean and --std if the model was"
            " trained otherwise."
        )
        return Values(1 / 255, mean, std)
    notes.append(
        "mean and std of ImageNet guessed on pixels 0..1: set --mean and --std if the model was"
        " trained otherwise."
    )
    if color == "bgr":
        return Values(1 / 255, IMAGENET_MEAN[::-1], IMAGENET_STD[::-1])
    return Values(1 / 255, IMAGENET_MEAN, IMAGENET_STD)


def _decode(path: Path, mode: str) -> Image.Image:
    """The upright image in `mode`, of 8 bits."""
    from PIL import Image, ImageOps  # noqa: PLC0415 -- slow to import, rarely needed

    try:
        with Image.open(path) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits, which PIL would clip instead of scale
                deep = np.asarray(image).astype(np.int32)
                image = Image.fromarray((deep >> 8).clip(0, 255).astype(np.uint8))
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert(mode)
    except Exception as error:  # PIL's readers raise what they like on a damaged file
        raise DataError(f"{path} is no image that can be read ({error}): remove it.") from error


def _resize(image: Image.Image, height: int, width: int) -> Image.Image:
    from PIL import Image  # noqa: PLC0415 -- slow to import, rarely needed

    return image.resize((width, height), Image.Resampling.BILINEAR)


def _step(side: float) -> int:
    return max(1, round(side / STEP)) * STEP


def _count(dim: Dim) -> int | None:
    return dim if isinstance(dim, int) else None
