"""Sets of labelled images: in the memory of the device that uses them, or fetched batch by batch.

Both kinds have the same interface: ``len``, ``labels``, subsets by index or slice, ``pixels`` and ``batches``.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from utils import parallel
from utils.data.memory import fits_on
from utils.errors import UserError
from utils.sizes import Size, height_width

BITS_PER_SAMPLE = 258  # tag of a TIFF
SIXTEEN_BITS_AS_I = ("PNG", "PPM")  # formats whose 16-bit images Pillow may give 32 bits per pixel
AHEAD = 3  # batches that are fetched while one is trained on


def evenly_spaced(images: int, count: int) -> Tensor:
    """Indices [count] of some of ``images``: spread over all, since the first ones of a folder are all of one class.

    If there are fewer, some occur twice.
    """
    return torch.linspace(0, images - 1, count).long()


@dataclass(frozen=True)
class ImageSet:
    """N labelled images in the memory of one device."""

    pixels: Tensor  # uint8 [N, 3, H, W]
    labels: Tensor  # int64 [N]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "ImageSet":
        return ImageSet(self.pixels[index], self.labels[index])

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.pixels.device

    @property
    def place(self) -> str:
        return "in memory" if self.device.type == "cpu" else "in the GPU's memory"

    def batches(self, groups: Sequence[Tensor]) -> Iterator[Tensor]:
        """The pixels of each group of indices, int64 on the CPU."""
        if not groups:
            return
        index = torch.cat(list(groups)).to(self.device)  # all at once: a GPU waits for each transfer
        for group in index.split([len(group) for group in groups]):
            yield self.pixels[group]

    def to(self, device: torch.device) -> "Images":
        """The images on ``device``, or fetched for it batch by batch if they do not fit into its free memory."""
        if self.device.type == device.type:
            return self
        if fits_on(device, self.pixels.numel()):
            return ImageSet(self.pixels.to(device), self.labels.to(device))
        return FetchedSet(HostPixels(self.pixels), torch.arange(len(self)), self.labels, device)


@dataclass(frozen=True)
class HostPixels:
    """Images in main memory, where they do not fit into that of the GPU."""

    pixels: Tensor
    workers = AHEAD
    place = "in main memory"

    def start(self, pool: Executor, members: Tensor) -> Callable[[], Tensor]:
        return pool.submit(self.pixels.__getitem__, members).result


@dataclass(frozen=True)
class ImageFiles:
    """Images in files, where they do not fit into memory at all."""

    paths: Sequence[Path]  # of all images
    size: Size  # of the resized images
    workers: int
    place = "decoded batch by batch"

    def start(self, pool: Executor, members: Tensor) -> Callable[[], Tensor]:
        waiting = [pool.submit(read_image, self.paths[i], self.size) for i in members.tolist()]

        def arrived() -> Tensor:
            pixels = np.empty((len(waiting), 3, *height_width(self.size)), dtype=np.uint8)
            for i, future in enumerate(waiting):
                pixels[i] = future.result().transpose(2, 0, 1)
            return torch.from_numpy(pixels)

        return arrived


@dataclass(frozen=True)
class FetchedSet:
    """N labelled images that threads fetch, a few batches ahead, for the device that needs them.

    They are copied to a GPU from pinned memory, so that it does not wait.
    """

    source: HostPixels | ImageFiles
    members: Tensor  # int64 [N], indices into the source
    labels: Tensor  # int64 [N] on the CPU
    device: torch.device

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "FetchedSet":
        return replace(self, members=self.members[index], labels=self.labels[index])

    @property
    def place(self) -> str:
        return self.source.place

    @property
    def pixels(self) -> Tensor:
        """uint8 [N, 3, H, W] on the device; only for small subsets."""
        return next(self.batches([torch.arange(len(self))]))

    def batches(self, groups: Sequence[Tensor]) -> Iterator[Tensor]:
        """The pixels of each group of indices, int64 on the CPU.

        Raises:
            UserError: for a file that cannot be read.
        """
        waiting: deque[Callable[[], Tensor]] = deque()
        with ThreadPoolExecutor(max(1, self.source.workers)) as pool:
            try:
                for group in groups:
                    waiting.append(self.source.start(pool, self.members[group]))
                    if len(waiting) > AHEAD:
                        yield self._arrived(waiting.popleft())
                while waiting:
                    yield self._arrived(waiting.popleft())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _arrived(self, fetched: Callable[[], Tensor]) -> Tensor:
        pixels = fetched()
        return (pixels.pin_memory() if self.device.type == "cuda" else pixels).to(self.device, non_blocking=True)

    def to(self, device: torch.device) -> "FetchedSet":
        return replace(self, device=device)


Images = ImageSet | FetchedSet


def with_progress(batches: Iterator[Tensor], title: str, groups: Sequence[Tensor]) -> Iterator[Tensor]:
    """The batches of these groups, with a bar: to decode all images may take an hour."""
    return tqdm(batches, title, len(groups), leave=False, disable=parallel.hide_progress_bar())


def read_image(path: str | Path, size: Size) -> np.ndarray:
    """The image as uint8 [H, W, 3] of this size in RGB, upright as its EXIF orientation says, transparency over white.

    Raises:
        UserError: if the file cannot be decoded to its end, or has pixels whose white is not known.
    """
    try:
        with Image.open(path) as image:
            image.load()
            with suppress(Exception):  # damaged EXIF data have no orientation; the pixels may still be fine
                ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(in_rgb(image, size))
    except Exception as error:  # decoders raise many kinds of errors
        found = str(error) or type(error).__name__
        raise UserError(
            f"image {path} cannot be read ({found}): give another path, or replace or remove the file"
        ) from error


def in_rgb(image: Image.Image, size: Size) -> Image.Image:
    """The image in 8-bit RGB and of this size; what is transparent shows white.

    Raises:
        ValueError: for 32 bits per pixel, integers or floats: files do not say which value is white.
    """
    if getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE) == (12,):  # which Pillow shows as 16, the upper four zero
        raise ValueError("it has 12 bits per pixel: 8 or 16 are needed")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS_AS_I):
        # ``convert`` would clip at 255 instead of taking the upper 8 of 16 bits.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits per pixel, and nothing says which value is white: 8 or 16 bits are needed")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    height, width = height_width(size)
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)
