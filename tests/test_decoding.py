"""Image files become pixels: modes, depths, orientation, size, and files that cannot be read."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_image, write_shapes
from PIL import ExifTags, Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from utils.data import memory
from utils.data.folder import load_data
from utils.data.images import read_image
from utils.errors import UserError


def palette_image(transparency: int | None) -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (8, 8), 77), (77, 77, 77)),
        (Image.new("LA", (8, 8), (77, 0)), (255, 255, 255)),
        (Image.new("LA", (8, 8), (100, 51)), (224, 224, 224)),  # a fifth of 100, four of 255
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.new("RGB", (8, 8), (10, 20, 30)), (10, 20, 30)),
        (Image.new("RGBA", (8, 8), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (8, 8), (5, 55, 105, 204)), (55, 95, 135)),  # four fifths, and a fifth of 255
        (palette_image(None), (200, 100, 50)),
        (palette_image(0), (200, 100, 50)),  # another colour is transparent
        (palette_image(1), (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 0, np.uint16)), (0, 0, 0)),
        (Image.fromarray(np.full((8, 8), 0x1234, np.uint16)), (0x12, 0x12, 0x12)),
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, image: Image.Image, expected: tuple[int, int, int]):
    pixels = read_image(write_image(tmp_path / "image.png", image), 8)
    assert pixels.dtype == np.uint8 and pixels.shape == (8, 8, 3)
    assert (pixels == expected).all()


def test_12_bits_a_pixel_are_refused(tmp_path: Path):
    """Pillow shows them as 16 bits of which the upper four are zero."""
    values = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 96}  # tags of a TIFF, by number
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    path = tmp_path / "image.tif"
    header = b"II*\0" + struct.pack("<I", 8 + 96)
    path.write_bytes(header + bytes(96) + struct.pack("<H", len(values)) + entries + bytes(4))
    with pytest.raises(UserError, match="it has 12 bits per pixel: 8 or 16 are needed"):
        read_image(path, 8)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_a_pixel_are_refused(tmp_path: Path, mode: str):
    path = write_image(tmp_path / "image.tif", Image.new(mode, (8, 8), 100))
    with pytest.raises(UserError, match=f"image {path} cannot be read .it has 32 bits per pixel"):
        read_image(path, 8)


def test_16_bits_that_pillow_gives_in_32_are_scaled(tmp_path: Path):
    path = tmp_path / "image.pgm"
    path.write_bytes(b"P5 8 8 65535 " + 64 * b"\x12\x34")
    assert (read_image(path, 8) == 0x12).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
def test_images_are_upright(tmp_path: Path, suffix: str, orientation: int):
    """Four quarters of one grey each, top left, top right, bottom left, bottom right, by the EXIF standard's table."""
    shown = {1: "0123", 2: "1032", 3: "3210", 4: "2301", 5: "0213", 6: "2031", 7: "3120", 8: "1302"}[orientation]
    greys = np.array([[0, 80], [160, 240]], np.uint8).repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(greys).convert("RGB").save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    quarters = read_image(path, 32)[8::16, 8::16, 0].reshape(4).astype(int)
    assert np.abs(quarters - [80 * int(digit) for digit in shown]).max() <= 3  # JPEG is not exact


def test_damaged_exif_data_do_not_hide_the_pixels(tmp_path: Path):
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path, exif=b"Exif\0\0no TIFF header here")
    assert (read_image(path, 8) == (1, 2, 3)).all()


def test_a_cmyk_jpeg_becomes_rgb(tmp_path: Path):
    pixels = read_image(write_image(tmp_path / "image.jpg", Image.new("CMYK", (8, 8), (255, 0, 255, 0))), 8)
    assert np.abs(pixels.astype(int) - (0, 255, 0)).max() <= 3  # JPEG is not exact


@pytest.mark.parametrize(("size", "sides"), [(8, [8, 8]), ("12x16", [12, 16])])
@pytest.mark.parametrize("shape", [(12, 20), (5, 8), (8, 8), (30, 20)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_images_are_resized_as_torchvision_does(tmp_path: Path, shape, mode: str, size: int | str, sides: list[int]):
    """Height stands before width."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)
    path = write_image(tmp_path / "image.png", image)
    expected = reference.resize(Image.open(path).convert("RGB"), sides, InterpolationMode.BILINEAR)
    assert np.array_equal(read_image(path, size), np.asarray(expected))


@pytest.mark.parametrize(("kind", "available"), [("png", 0.0), ("jpeg", float("inf")), ("webp", float("inf"))])
def test_a_truncated_image_is_named(tmp_path: Path, kind: str, available: float, monkeypatch: pytest.MonkeyPatch):
    """At once, or when its batch comes."""
    monkeypatch.setattr(memory, "available_memory", lambda: available)
    write_shapes(tmp_path, {"train": 3, "test": 3}, suffix=kind)
    broken = tmp_path / "train" / "middle" / f"001.{kind}"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=f"image {broken} cannot be read"):
        list(load_data(str(tmp_path), kind, 8, 2).train.batches(torch.arange(9).split(4)))


@pytest.mark.parametrize("error", [RuntimeError("bad"), EOFError()])
def test_whatever_a_decoder_raises_names_the_file(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch):
    def broken(path: Path) -> Image.Image:
        raise error

    monkeypatch.setattr(Image, "open", broken)
    found = str(error) or type(error).__name__
    with pytest.raises(UserError, match=f"image {tmp_path / 'a.png'} cannot be read .{found}"):
        read_image(tmp_path / "a.png", 8)
