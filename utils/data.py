"""Labelled images: found on disk, decoded once into memory, split, and served in batches.

A data folder is either image files (``train/`` and ``test/``, one folder a class) or the files that torchvision
downloads (``cifar-100-python`` or ``cifar-10-batches-py``).  Image files that are too many for the memory are decoded
batch by batch instead; the batches are the same.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils import memory, parallel
from utils.augment import Normalisation, colour_histogram, crop_and_flip, draw_crops, normalisation_of
from utils.cache import cache_files, content_key, read_cache, write_cache
from utils.cifar import CIFAR_FOLDERS, download_cifar, read_cifar
from utils.decoding import in_rgb, read_image
from utils.errors import UserError
from utils.images import FetchedSet, ImageFiles, Images, ImageSet

IMAGE_TYPES = {
    "png": (".png",),
    "jpg": (".jpg", ".jpeg"),
    "jpeg": (".jpg", ".jpeg"),
    "bmp": (".bmp",),
    "webp": (".webp",),
}


@dataclass(frozen=True)
class DataSet:
    """A data set as found on disk, before any split of the training images."""

    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images | None  # only where the data has validation images of its own
    test: Images


@dataclass(frozen=True)
class Splits:
    """What a stage works on.  ``chosen_on`` says which images its choices of epochs and budgets look at."""

    train: Images
    choose: Images
    test: Images
    chosen_on: str  # "validation", or "test" where no image was set aside

    @property
    def place(self) -> str:
        """Where the training images are, as a run says it."""
        place = f"images {self.train.place}"
        return place if parallel.processes() == 1 else f"{place}, {parallel.processes()} processes"

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

    Image files are decoded into memory, or taken from the cache that an earlier run has left (``utils.cache``).  Where
    all of them would take more than a third of the available memory (``utils.memory``) they are only listed, and
    decoded whenever a batch needs them.

    Raises:
        UserError: for anything that is missing, empty, unreadable or inconsistent.
    """
    with parallel.writer_first():  # the others find what it has downloaded and cached
        return _load(folder, image_type, size, workers, download)


def _load(folder: str, image_type: str, size: int, workers: int, download: bool) -> DataSet:
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
    found = {part: _files(path, classes, suffixes) for part, path in parts.items()}
    needed = sum(len(files) for files, _ in found.values()) * 3 * size * size
    limit = memory.HOST_SHARE * memory.available_memory() / parallel.processes_of_this_machine()
    if needed > limit:
        sets = {part: _streamed(*listed, size, workers) for part, listed in found.items()}
    else:
        caches = {part: cache_files(root, part, suffixes[0][1:], size) for part in parts}
        sets = {p: _decoded(parts[p], *listed, size, workers, caches[p]) for p, listed in found.items()}
    return DataSet(_name(root), tuple(classes), sets["train"], sets.get("val"), sets["test"])


def _name(root: Path) -> str:
    return root.resolve().name


def _class_names(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UserError(f"data folder {folder} has no class folders: it needs one folder of images for each class")
    return names


def _files(folder: Path, classes: list[str], suffixes: tuple[str, ...]) -> tuple[list[Path], Tensor]:
    """The image files in the order of their names, class by class, and their labels, int64 [N]."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = folder / name
        found = sorted(p for p in os.listdir(inside) if p.lower().endswith(suffixes) and not p.startswith("."))
        if not found:
            raise UserError(
                f"class folder {inside} holds no {' or '.join(suffixes)} file: add images or change --img_type"
            )
        files += [inside / p for p in found]
        labels += [label] * len(found)
    return files, torch.tensor(labels)


def _streamed(files: list[Path], labels: Tensor, size: int, workers: int) -> FetchedSet:
    paths = np.empty(len(files), dtype=object)
    paths[:] = files
    return FetchedSet(ImageFiles(paths, size, workers), torch.arange(len(files)), labels, torch.device("cpu"))


def _decoded(folder: Path, files: list[Path], labels: Tensor, size: int, workers: int, caches: list[Path]) -> ImageSet:
    key = content_key(folder, files, size)
    pixels = read_cache(caches, key, len(files), size)
    if pixels is None:
        pixels = _decode(folder, files, size, workers)
        write_cache(caches, key, pixels)
    return ImageSet(torch.from_numpy(pixels), labels)


def _decode(folder: Path, files: list[Path], size: int, workers: int) -> np.ndarray:
    """uint8 [N, 3, size, size]."""
    pixels = np.empty((len(files), 3, size, size), dtype=np.uint8)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        decoded = pool.map(lambda path: read_image(path, size), files)
        try:
            bar = tqdm(decoded, f"reading {folder}", len(files), leave=False, disable=parallel.no_bar(), unit="image")
            for i, image in enumerate(bar):
                pixels[i] = image.transpose(2, 0, 1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return pixels


def _resized(pixels: np.ndarray, size: int) -> Tensor:
    if pixels.shape[1] != size:
        pixels = np.stack([np.asarray(in_rgb(Image.fromarray(image), size)) for image in pixels])
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

    In training mode a batch norm over vectors, such as the gates have, cannot work on one image.  Nor can a process on
    none: with more than two processes, fewer images than processes that are left over join the batch before them, too.
    """
    least = max(2, parallel.processes())
    ends = [*range(batch_size, images, batch_size), images]
    if len(ends) > 1 and ends[-1] - ends[-2] < least:
        del ends[-2]
    return ends


def check_batches(images: int, batch_size: int) -> None:
    """Refuse batches that do not go round.

    Raises:
        UserError: if a batch has fewer images than there are processes.
    """
    if min(images, batch_size) < parallel.processes():
        raise UserError(
            f"{parallel.processes()} processes cannot share batches of {min(images, batch_size)} images: start fewer "
            f"processes or choose larger batches"
        )


def training_normalisation(images: Images, batch_size: int = 1024) -> Normalisation:
    """Mean and standard deviation of all images, each process counting its part of them."""
    own = torch.arange(len(images))[parallel.own_slice(len(images))]
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for batch in images.batches(own.split(batch_size)):
        counts += colour_histogram(batch.pixels).cpu()
    return normalisation_of(parallel.summed(counts))


def training_batches(
    images: Images,
    batch_size: int,
    generator: torch.Generator,
    normalisation: Normalisation,
    flip: bool,
    whole: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented batches: images [B, 3, H, W] in float32, normalised, and labels [B].

    Where several processes share the batches, each gets the images of its part (``utils.parallel.part``), and the
    labels of the whole batch.

    Every random number comes from ``generator`` (a CPU generator), so that its state resumes the sequence.  All are
    drawn when the epoch begins, and for whole batches, whatever part of them this process gets.

    Args:
        whole: give this process the images of the whole batch.
    """
    part = (lambda tensor: tensor) if whole else parallel.part
    order = torch.randperm(len(images), generator=generator)
    groups = order.tensor_split(batch_ends(len(images), batch_size)[:-1])
    crops = [draw_crops(len(group), generator, flip) for group in groups]
    own = [part(group) for group in groups]
    # What an epoch needs on a GPU goes there at once, since the GPU is waited for each time.
    labels = images.labels.to(images.device)[order.to(images.device)].split([len(group) for group in groups])
    own_crops = torch.cat([part(crop) for crop in crops]).to(images.device).split([len(group) for group in own])
    normalise = normalisation.on(images.device)
    for batch, crop, whole_labels in zip(images.batches(own), own_crops, labels, strict=True):
        yield normalise(crop_and_flip(batch.pixels, *crop.unbind(1))), whole_labels


def plain_batches(
    images: Images, batch_size: int, normalisation: Normalisation, every: int = 1, first: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in their order, normalised and not augmented, with their labels.

    Args:
        every, first: give each ``every``-th batch only, beginning with the batch of index ``first``.
    """
    groups = torch.arange(len(images)).split(batch_size)[first::every]
    normalise = normalisation.on(images.device)
    for batch in images.batches(groups):
        yield normalise(batch.pixels), batch.labels


def dealt_batches(images: Images, batch_size: int, normalisation: Normalisation) -> Iterator[tuple[Tensor, Tensor]]:
    """``plain_batches`` dealt out to the processes, whole batches in turn."""
    return plain_batches(images, batch_size, normalisation, parallel.processes(), parallel.rank())


def shared_batches(images: Images, batch_size: int, normalisation: Normalisation) -> Iterator[tuple[Tensor, Tensor]]:
    """``plain_batches`` shared as ``training_batches`` are: images of this process's part, labels of the whole."""
    groups = torch.arange(len(images)).split(batch_size)
    normalise = normalisation.on(images.device)
    for group, batch in zip(groups, images.batches([parallel.part(group) for group in groups]), strict=True):
        yield normalise(batch.pixels), images.labels[group.to(images.labels.device)].to(images.device)
