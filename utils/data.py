"""Labelled images: found on disk, decoded once into memory, split, and served in batches.

A data folder is either image files (``train/`` and ``test/``, one folder a class) or the files that torchvision
downloads (``cifar-100-python`` or ``cifar-10-batches-py``).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils.augment import Normalisation, augmented
from utils.cifar import CIFAR_FOLDERS, download_cifar, read_cifar
from utils.errors import UserError

IMAGE_TYPES = {
    "png": (".png",),
    "jpg": (".jpg", ".jpeg"),
    "jpeg": (".jpg", ".jpeg"),
    "bmp": (".bmp",),
    "webp": (".webp",),
}


@dataclass(frozen=True)
class ImageSet:
    """N labelled images in memory."""

    pixels: Tensor  # uint8 [N, 3, H, W]
    labels: Tensor  # int64 [N]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "ImageSet":
        return ImageSet(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> "ImageSet":
        return ImageSet(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class DataSet:
    """A data set as found on disk, before any split of the training images."""

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    val: ImageSet | None  # only where the data has validation images of its own
    test: ImageSet


@dataclass(frozen=True)
class Splits:
    """What a stage works on.  ``chosen_on`` says which images its choices of epochs and budgets look at."""

    train: ImageSet
    choose: ImageSet
    test: ImageSet
    chosen_on: str  # "validation", or "test" where no image was set aside

    def to(self, device: torch.device) -> "Splits":
        return Splits(self.train.to(device), self.choose.to(device), self.test.to(device), self.chosen_on)


def load_data(folder: str, image_type: str, size: int, workers: int, download: bool = False) -> DataSet:
    """Read a data set.

    Args:
        folder: the data folder.
        image_type: one of ``IMAGE_TYPES``; ignored for CIFAR's own files.
        size: height and width that every image is brought to.
        workers: threads that decode.
        download: fetch CIFAR-100 or CIFAR-10 (by the folder's name) through torchvision if it is not there.

    Raises:
        UserError: for anything that is missing, empty, unreadable or inconsistent.
    """
    root = Path(folder).expanduser()
    if download:
        download_cifar(root)
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist: point --data_dir (data_dir in config.json) at one")
    if any((root / name).is_dir() for name in CIFAR_FOLDERS):
        classes, train, test = read_cifar(root)
        train, test = (ImageSet(_resized(pixels, size), torch.from_numpy(labels)) for pixels, labels in (train, test))
        return DataSet(_name(root), classes, train, None, test)
    parts = {part: root / part for part in ("train", "val", "test") if (root / part).is_dir()}
    if "train" not in parts or len(parts) == 1:
        found = ", ".join(sorted(p.name for p in root.iterdir())[:6]) or "nothing"
        raise UserError(
            f"data folder {root} holds {found}, but needs train/ and test/ with one folder a class, or one of "
            f"{', '.join(CIFAR_FOLDERS)} (--download fetches those)"
        )
    if "test" not in parts:
        parts["test"] = parts.pop("val")
    classes = _class_names(parts["train"])
    for part in parts.values():
        others = _class_names(part)
        if others != classes:
            odd = sorted(set(classes) ^ set(others))
            raise UserError(f"classes differ between {parts['train']} and {part}: {', '.join(odd[:5])} in one only")
    suffixes = IMAGE_TYPES[image_type.lower()]
    sets = {part: _read_folder(path, classes, suffixes, size, workers) for part, path in parts.items()}
    return DataSet(_name(root), tuple(classes), sets["train"], sets.get("val"), sets["test"])


def _name(root: Path) -> str:
    return root.resolve().name


def _class_names(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UserError(f"data folder {folder} has no class folders: it needs one folder of images for each class")
    return names


def _read_folder(folder: Path, classes: list[str], suffixes: tuple[str, ...], size: int, workers: int) -> ImageSet:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(
            p for p in (folder / name).iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")
        )
        if not found:
            raise UserError(
                f"class folder {folder / name} holds no {' or '.join(suffixes)} file: add images or change --img_type"
            )
        files += found
        labels += [label] * len(found)
    pixels = np.empty((len(files), size, size, 3), dtype=np.uint8)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        decoded = pool.map(lambda path: read_image(path, size), files)
        try:
            bar = tqdm(decoded, f"reading {folder}", len(files), leave=False, disable=None, unit="image")
            for i, image in enumerate(bar):
                pixels[i] = image
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return ImageSet(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


def read_image(path: Path, size: int) -> np.ndarray:
    """The image as uint8 [size, size, 3] in RGB.

    Raises:
        UserError: if the file cannot be decoded to its end.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return np.asarray(_rgb(image, size))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be read ({error}): replace or remove it") from error


def _rgb(image: Image.Image, size: int) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: converting would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert("RGB")
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


def _resized(pixels: np.ndarray, size: int) -> Tensor:
    if pixels.shape[1] != size:
        pixels = np.stack([np.asarray(_rgb(Image.fromarray(image), size)) for image in pixels])
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the kept and of the set-aside images, the same share of every class, at least one kept of each.

    Args:
        labels: int64 [N].
        fraction: share to set aside, in [0, 1).
        seed: the same seed gives the same split.
    """
    generator = torch.Generator().manual_seed(seed)
    kept, aside = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(round(fraction * len(members)), len(members) - 1)
        aside.append(members[:count])
        kept.append(members[count:])
    return torch.cat(kept).sort().values, torch.cat(aside).sort().values


def split_data(data: DataSet, val_fraction: float, seed: int) -> Splits:
    """Set validation images aside: the data's own, else a seeded, stratified share of the training images.

    Raises:
        UserError: if fewer than two images are left to train on.
    """
    splits = _split(data, val_fraction, seed)
    if len(splits.train) < 2:
        raise UserError(
            f"data {data.name} leaves {len(splits.train)} image to train on: batch norms need two, add more"
        )
    return splits


def _split(data: DataSet, val_fraction: float, seed: int) -> Splits:
    if data.val is not None:
        return Splits(data.train, data.val, data.test, "validation")
    kept, aside = stratified_split(data.train.labels, val_fraction, seed)
    if len(aside) == 0:
        return Splits(data.train, data.test, data.test, "test")
    return Splits(data.train[kept], data.train[aside], data.test, "validation")


def batch_ends(images: int, batch_size: int) -> list[int]:
    """Where each training batch of an epoch ends; a single image that is left over joins the batch before it.

    In training mode a batch norm over vectors, such as the gates have, cannot work on one image.
    """
    ends = [*range(batch_size, images, batch_size), images]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1:
        del ends[-2]
    return ends


def training_batches(
    images: ImageSet, batch_size: int, generator: torch.Generator, normalisation: Normalisation, flip: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented batches: images [B, 3, H, W] in float32, normalised, and labels [B].

    Every random number comes from ``generator`` (a CPU generator), so that its state resumes the sequence.
    """
    order = torch.randperm(len(images), generator=generator)
    for members in order.tensor_split(batch_ends(len(images), batch_size)[:-1]):
        batch = images[members.to(images.labels.device)]
        yield normalisation.apply(augmented(batch.pixels, generator, flip)), batch.labels


def plain_batches(images: ImageSet, batch_size: int, normalisation: Normalisation) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in their order, normalised and not augmented, with their labels."""
    for start in range(0, len(images), batch_size):
        yield normalisation.apply(images.pixels[start : start + batch_size]), images.labels[start : start + batch_size]
