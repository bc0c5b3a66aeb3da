"""Image files to pixels."""

from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import UserError


def read_image(path: Path, size: int) -> np.ndarray:
    """The image as uint8 [size, size, 3] in RGB.

    Raises:
        UserError: if the file cannot be decoded to its end.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return np.asarray(in_rgb(image, size))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be read ({error}): replace or remove it") from error


def in_rgb(image: Image.Image, size: int) -> Image.Image:
    """The image in 8-bit RGB, ``size`` pixels high and wide."""
    if image.mode.startswith("I"):  # 16 bits a pixel: converting would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert("RGB")
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)
