"""Image files: decoding, guesses from the input, geometry and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qcompile.calib.data import Data, DataOptions, InputSpec, open_data
from qcompile.calib.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageOptions,
    Preprocess,
    open_images,
)
from qcompile.errors import DataError, RecipeError

if TYPE_CHECKING:
    from pathlib import Path

RED = (255, 0, 0)
Shape = tuple[int | str | None, ...] | None


def spec(shape: Shape, dtype: Any = np.float32) -> InputSpec:
    return InputSpec("x", np.dtype(dtype), shape)


def prepared(
    shape: Shape, dtype: Any = np.float32, *, normalizes: bool = False, **options: Any
) -> Preprocess:
    return open_images(spec(shape, dtype), ImageOptions(**options), normalizes=normalizes)


def saved(folder: Path, size: tuple[int, int], color: Any = RED, mode: str = "RGB") -> Path:
    """A PNG of one color; `size` is (height, width)."""
    path = folder / f"{size[0]}x{size[1]}.png"
    Image.new(mode, size[::-1], color).save(path)
    return path


def opened(path: Path, shape: Shape = (1, 3, 8, 8), dtype: Any = np.float32) -> Data:
    return open_data(path, [spec(shape, dtype)], DataOptions())


# ---- files


def test_folder_is_recursive_sorted_and_notes_its_guesses(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, level in [("b/1.png", 2), ("c.JPG", 3), ("a.bmp", 1), ("b/2.webp", 2.5)]:
        Image.new("RGB", (9, 9), (int(level * 50),) * 3).save(tmp_path / name)
    (tmp_path / "._a.bmp").write_bytes(b"left by macOS")
    (tmp_path / "labels.txt").write_text("1 2 3")
    data = opened(tmp_path, dtype=np.uint8)
    levels = [round(float(feed["x"].mean()) / 50, 1) for feed in data]
    assert levels == [1, 2, 2.5, 3]
    assert len(data) == 4
    assert data.description == f"4 image files of {tmp_path}"
    color, size = data.notes
    assert color == "RGB order assumed: set --color bgr if the model was trained otherwise."
    assert size == (
        "size 8x8 from the input shape, cut from the center of images resized to 256/224 of it:"
        " set --crop none if the model sees whole images."
    )
    assert len(list(opened(tmp_path / "c.JPG"))) == 1


def test_damaged_image_is_named(tmp_path: Path) -> None:
    saved(tmp_path, (30, 30))
    whole = (tmp_path / "30x30.png").read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        (tmp_path / "30x30.png").write_bytes(content)
        with pytest.raises(
            DataError, match=r"30x30\.png is no image that can be read \(.+\): remove it\."
        ):
            list(opened(tmp_path))


def test_images_need_one_input(tmp_path: Path) -> None:
    saved(tmp_path, (8, 8))
    inputs = [spec((1, 3, 8, 8)), InputSpec("y", np.dtype(np.float32), (1,))]
    with pytest.raises(
        DataError, match=r"^1 image file of .+ fits only a model with one required input, and this"
    ):
        open_data(tmp_path, inputs, DataOptions())
    inputs[1] = InputSpec("y", np.dtype(np.float32), (1,), required=False)
    assert [list(feed) for feed in open_data(tmp_path, inputs, DataOptions())] == [["x"]]


def test_exif_orientation_is_respected(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), RED)
    image.paste((0, 0, 255), (10, 0, 20, 10))  # blue on the right
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show it
    image.save(tmp_path / "a.png", exif=exif)
    (feed,) = opened(tmp_path, (1, 3, None, None), np.uint8)
    upright = prepared((1, None, None, 3), np.uint8)
    assert upright._resized(Image.new("RGB", (10, 20))).size == (32, 32)
    assert feed["x"][0, :, 4, 16].tolist() == list(RED)
    assert feed["x"][0, :, -4, 16].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("LA", (90, 10), (90, 90, 90)),
        ("RGBA", (10, 20, 30, 40), (10, 20, 30)),
        ("P", 0, None),
        ("I;16", 40_000, (156, 156, 156)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_modes_become_rgb_or_gray(
    mode: str, color: Any, expected: tuple[int, ...] | None, channels: int, tmp_path: Path
) -> None:
    image = Image.new(mode, (8, 8), color)
    if mode == "P":
        image.putpalette([10, 20, 30] * 256)
        image.save(tmp_path / "a.png", transparency=b"\x00\x80")
        expected = (10, 20, 30)
    else:
        image.save(tmp_path / "a.png")
    (feed,) = opened(tmp_path, (1, channels, 8, 8), np.uint8)
    assert feed["x"].shape == (1, channels, 8, 8)
    assert expected is not None
    gray = round(np.dot(expected, (0.299, 0.587, 0.114)))
    wanted = [gray] if channels == 1 else list(expected)
    assert np.abs(feed["x"][0, :, 4, 4].astype(int) - wanted).max() <= 1


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    (feed,) = opened(tmp_path, (1, 3, 8, 8), np.uint8)
    assert np.abs(feed["x"][0, :, 4, 4].astype(int) - RED).max() <= 3


# ---- layout, color and values


@pytest.mark.parametrize(
    ("shape", "result"),
    [
        ((1, 3, 8, 8), (1, 3, 8, 8)),
        (("N", 8, 8, 3), (1, 8, 8, 3)),
        ((1, 1, 8, 8), (1, 1, 8, 8)),
        ((None, 8, 8, 1), (1, 8, 8, 1)),
        ((3, 8, 8), (3, 8, 8)),
        ((8, 8, 1), (8, 8, 1)),
        ((1, None, 8, 8), (1, 3, 8, 8)),
        ((1, 8, 8, "C"), (1, 8, 8, 3)),
        ((1, 3, 8, 3), (1, 3, 8, 3)),
    ],
)
def test_layout_is_where_the_channels_stand(shape: Shape, result: Shape, tmp_path: Path) -> None:
    saved(tmp_path, (8, 8))
    (feed,) = opened(tmp_path, shape)
    assert feed["x"].shape == result
    assert feed["x"].dtype == np.float32
    assert feed["x"].flags.c_contiguous


def test_open_layout_is_noted_and_can_be_set() -> None:
    guess = "layout nchw guessed, as the input leaves its channels open: set --layout."
    for shape in (None, (None,) * 4, (1, "C", 8, 8)):
        assert guess in prepared(shape).notes
    assert prepared(None, layout="nhwc").layout == "nhwc"
    assert prepared((1, 3, 8, 3), layout="nhwc").layout == "nhwc"
    assert not any("layout" in note for note in prepared(None, layout="nchw").notes)
    assert prepared(None, color="gray").color == "gray"


@pytest.mark.parametrize("shape", [(1,), (), (1, 3), (1, 1, 3, 8, 8), (2, 3, 8, 8)])
def test_input_of_another_rank_or_batch(shape: Shape) -> None:
    with pytest.raises(
        DataError,
        match=r"^input 'x' is float32\[.*\], and an image fills \[1, C, H, W\], \[1, H, W, C\] or",
    ):
        prepared(shape)


def test_input_without_image_channels() -> None:
    with pytest.raises(
        DataError,
        match=r"float32\[1, 4, 8, 8\], without 1 or 3 channels where nchw or nhwc has them: give",
    ):
        prepared((1, 4, 8, 8))
    with pytest.raises(DataError, match=r"channels where nhwc has them"):
        prepared((1, 3, 8, 8), layout="nhwc")


def test_color_must_fit_the_channels() -> None:
    with pytest.raises(
        RecipeError,
        match=r"--color gray gives 1 channels, and input 'x' is float32\[1, 3, 8, 8\]: choose",
    ):
        prepared((1, 3, 8, 8), color="gray")
    with pytest.raises(RecipeError, match=r"--color bgr gives 3 channels"):
        prepared((1, 1, 8, 8), color="bgr")


PIXEL = (51, 102, 255)  # 0.2, 0.4, 1
IMAGENET = [(p / 255 - m) / s for p, m, s in zip(PIXEL, IMAGENET_MEAN, IMAGENET_STD, strict=True)]


@pytest.mark.parametrize(
    ("options", "expected", "note"),
    [
        ({}, IMAGENET, "mean and std of ImageNet guessed on pixels 0..1: set --mean"),
        ({"color": "rgb"}, IMAGENET, "mean and std of ImageNet"),
        ({"color": "bgr"}, IMAGENET[::-1], "mean and std of ImageNet"),
        ({"normalizes": True}, PIXEL, "raw pixels 0..255, as the model normalizes them itself"),
        ({"scale": 2.0}, [102, 204, 510], None),
        ({"scale": 1.0, "normalizes": True}, PIXEL, None),
        ({"mean": (0.5,)}, [-0.3, -0.1, 0.5], "pixels 0..1 guessed from --mean: set --scale."),
        ({"std": (0.5, 0.5, 0.1)}, [0.4, 0.8, 10], "pixels 0..1 guessed from --std"),
        ({"mean": (51, 0, 0)}, [0, 102, 255], "pixels 0..255 guessed from --mean: set --scale."),
        ({"std": (51.0,)}, [1, 2, 5], "pixels 0..255 guessed from --std"),
        ({"mean": (51.0,), "scale": 1.0}, [0, 51, 204], None),
        ({"mean": (0, 0, 1.0), "color": "bgr"}, [1, 0.4, -0.8], "pixels 0..1 guessed"),
    ],
)
def test_values_of_float_inputs(
    options: dict[str, Any], expected: list[float], note: str | None, tmp_path: Path
) -> None:
    convert = prepared((1, 3, 8, 8), **options)
    got = convert(saved(tmp_path, (8, 8), PIXEL))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0, :, 4, 4], expected, rtol=1e-5, atol=1e-6)
    found = [text for text in convert.notes if "mean" in text or "scale" in text]
    assert [text[: len(note)] for text in found] == [note] if note else not found


def test_values_of_gray_and_integer_inputs(tmp_path: Path) -> None:
    path = saved(tmp_path, (8, 8), (51, 51, 51))
    gray = prepared((1, 1, 8, 8))
    np.testing.assert_allclose(gray(path), np.full((1, 1, 8, 8), 0.2), rtol=1e-6)
    assert any(note.startswith("pixels 0..1 guessed, without mean and std") for note in gray.notes)
    for dtype in (np.uint8, np.int32):
        (feed,) = opened(tmp_path, (1, 3, 8, 8), dtype)
        np.testing.assert_array_equal(feed["x"], np.full((1, 3, 8, 8), 51, dtype), strict=True)
    (feed,) = opened(tmp_path, (1, 3, 8, 8), np.float16)
    assert feed["x"].dtype == np.float16


def test_wrong_values() -> None:
    with pytest.raises(RecipeError, match=r"input 'x' is uint8 and takes raw pixels: drop --std\."):
        prepared((1, 3, 8, 8), np.uint8, std=(1.0,))
    with pytest.raises(RecipeError, match=r"--mean has 2 numbers: give 1 or 3\."):
        prepared((1, 3, 8, 8), mean=(1.0, 2.0))
    with pytest.raises(RecipeError, match=r"--std has 3 numbers: give 1 or 1\."):
        prepared((1, 1, 8, 8), std=(1.0, 2.0, 3.0))
    with pytest.raises(RecipeError, match=r"--std is \(1\.0, 0\.0, 1\.0\): give numbers above 0"):
        prepared((1, 3, 8, 8), std=(1.0, 0.0, 1.0))


# ---- size


def resized(convert: Preprocess, height: int, width: int) -> tuple[int, int]:
    return convert._resized(Image.new("RGB", (width, height))).size[::-1]


def test_default_is_the_center_of_256_224(tmp_path: Path) -> None:
    """On a ramp of 480 columns: as torchvision's Resize(256) and CenterCrop(224)."""
    ramp = np.linspace(0, 255, 480).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[None, :, None], (320, 480, 3)).copy())
    image.save(tmp_path / "a.png")
    got = prepared((1, 3, 224, 224), np.uint8)(tmp_path / "a.png")
    expected = image.resize((384, 256), Image.Resampling.BILINEAR).crop((80, 16, 304, 240))
    np.testing.assert_array_equal(got[0], np.asarray(expected).transpose(2, 0, 1))


def test_crop_none_shows_the_whole_image(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), RED)
    image.paste((0, 0, 255), (20, 0, 40, 20))
    image.save(tmp_path / "a.png")
    convert = prepared((1, 8, 8, 3), np.uint8, crop="none")
    got = convert(tmp_path / "a.png")
    assert got[0, 4, 0].tolist() == list(RED)
    assert got[0, 4, 7].tolist() == [0, 0, 255]
    assert "size 8x8 from the input shape." in convert.notes


@pytest.mark.parametrize(
    ("shape", "options", "image", "result"),
    [
        ((1, 3, None, None), {}, (100, 200), (96, 192)),
        ((1, 3, None, None), {}, (5, 5), (32, 32)),
        ((1, 3, None, None), {}, (2000, 1000), (960, 480)),
        ((1, 3, None, None), {}, (959, 20000), (32, 960)),
        ((1, 3, None, None), {"resize": 1280}, (100, 200), (1280, 2560)),
        ((1, 3, None, None), {"crop": "none"}, (100, 200), (96, 192)),
        ((1, 3, 48, None), {}, (24, 100), (48, 192)),
        ((1, 3, None, 64), {}, (64, 128), (32, 64)),
        ((1, 3, None, None), {"size": (50, 60)}, (100, 200), (50, 60)),
        ((1, 3, 50, 60), {"resize": 10}, (100, 200), (50, 60)),
        ((1, 3, 50, 60), {"resize": 300}, (100, 200), (50, 60)),
    ],
)
def test_sizes(
    shape: Shape, options: dict[str, Any], image: tuple[int, int], result: tuple[int, int]
) -> None:
    assert resized(prepared(shape, **options), *image) == result


def test_size_notes() -> None:
    start = "the sides that the input leaves open follow each image, in multiples of 32"
    assert any(n.startswith(start + ", at most 960: set --size") for n in prepared(None).notes)
    for convert in (prepared((1, 3, 48, "W")), prepared((1, 3, "H", "W"), resize=64)):
        assert any(n.startswith(start + ": set --size") for n in convert.notes)
    sized = prepared(None, size=(8, 9))
    assert any(n.startswith("size 8x9, cut from the center") for n in sized.notes)
    assert not any("size" in n for n in prepared(None, size=(8, 9), crop="center").notes)


@pytest.mark.parametrize(
    ("shape", "options", "sentence"),
    [
        (None, {"size": (0, 8)}, r"--size and --resize count pixels: give 1 or more\."),
        (None, {"resize": -1}, r"--size and --resize count pixels"),
        ((1, 3, 8, 8), {"resize": 9, "crop": "none"}, r"--resize is the short side .+: drop it\."),
        ((1, 3, 8, None), {"resize": 9}, r"neither holds here: drop it\."),
        ((1, 3, 8, None), {"crop": "center"}, r"--crop center needs a size, which .+: set --size"),
    ],
)
def test_wrong_sizes(shape: Shape, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        prepared(shape, **options)


SIDE = st.integers(1, 400)


@given(st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE), st.none() | SIDE)
def test_a_fixed_size_is_always_met(
    size: tuple[int, int], image: tuple[int, int], resize: int | None
) -> None:
    convert = prepared((1, 3, *size), resize=resize)
    growth = max(size[0] / image[0], size[1] / image[1], (resize or 0) / min(image))
    if max(image) * growth < 4000:  # keep the test small
        assert resized(convert, *image) == size


@given(SIDE, SIDE)
def test_an_open_size_keeps_to_the_step(high: int, wide: int) -> None:
    sides = resized(prepared(None), high, wide)
    assert all(side % 32 == 0 and 32 <= side <= 960 for side in sides)
    assert all(abs(a - b) <= 32 for a, b in zip(sides, (high, wide), strict=True))
