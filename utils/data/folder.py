"""Labelled images, found on disk and decoded once into memory.

A data folder is either image files (``train/`` and ``test/``, one folder per class) or, where it has no ``train/``, the
files that torchvision downloads (``cifar-100-python`` or ``cifar-10-batches-py``).  Where it has ``train/`` alone, a
tenth of it is the test set.  Image files that do not fit into memory are decoded batch by batch instead; the batches
are the same.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils import parallel
from utils.data import memory
from utils.data.cifar import CIFAR_FOLDERS, read_cifar
from utils.data.identity import fingerprints, first_copies, stratified_split
from utils.data.images import FetchedSet, ImageFiles, Images, ImageSet, in_rgb, with_progress
from utils.data.listing import check_classes, find_classes, find_files, find_parts, notes_on
from utils.errors import UserError
from utils.sizes import Size, height_width

TEST_SHARE = 0.1  # of the training images, where a folder has no others
BATCH = 64  # images that are decoded at once


@dataclass(frozen=True)
class DataSet:
    """A data set as found on disk, before any split of the training images."""

    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images | None  # only where the data has validation images of its own
    test: Images
    notes: tuple[str, ...] = ()  # on what was not read

    @cached_property
    def fingerprints(self) -> dict[str, Tensor]:
        """The fingerprints of the images of each part, int64 [N]; images outside of memory are decoded for this.

        Several processes share the work, so all of them have to call this.
        """
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {part: fingerprints(images) for part, images in parts.items() if images is not None}


def load_data(
    folder: str, image_type: str, size: Size, workers: int, download: bool = False, val_dir: str = ""
) -> DataSet:
    """Read a data set.

    Args:
        folder: the data folder.
        image_type: one of ``IMAGE_TYPES``; ignored for CIFAR's own files.
        size: of the resized images, see ``utils.sizes``.
        workers: threads that decode.
        download: fetch CIFAR-100 or CIFAR-10 (by the folder's name) through torchvision if the folder has no images.
        val_dir: folder of validation images, one folder per class, instead of those in the data folder; empty: none.

    Image files are decoded into memory.  If all would take more than a third of the available memory
    (``utils.data.memory``), they are only listed, and decoded when a batch needs them.  ``DataSet.notes`` names
    the files and folders that are not read.

    Raises:
        UserError: for anything that is missing, empty, unreadable or inconsistent.
    """
    root = Path(folder).expanduser()
    try:
        return _load(root, image_type, size, workers, download, Path(val_dir).expanduser() if val_dir else None)
    except OSError as error:
        raise UserError(
            f"data folder {root} cannot be read ({error}): fix permissions or choose another folder"
        ) from None


def _load(root: Path, image_type: str, size: Size, workers: int, download: bool, val: Path | None) -> DataSet:
    if val is not None and not val.is_dir():
        raise UserError(f"val_dir {val} is not a folder: name one with a folder of images for each class, or none")
    name = root.resolve().name
    cifar = [folder for folder in CIFAR_FOLDERS.values() if (root / folder).is_dir()]
    parts, others = find_parts(root)
    if "train" not in parts and (cifar or (download and not parts)):
        with parallel.main_process_first():  # the other processes find its download
            classes, train, test = read_cifar(root, download)
        train, test = (ImageSet(_resized(pixels, size), torch.from_numpy(labels)) for pixels, labels in (train, test))
        aside, left_out = None, Counter()
        if val is not None:
            check_classes(val, list(classes), root)
            aside = _in_memory(val, _streamed(*find_files(val, list(classes), image_type, left_out), size, workers))
        return DataSet(name, classes, train, aside, test, tuple(notes_on(val, [], left_out)))
    if not root.is_dir():
        raise UserError(
            f"data folder {root} {'is a file' if root.exists() else 'does not exist'}: name one with --data_dir (in "
            f"stage 2 --set data_dir=FOLDER), or let stage 1 fetch CIFAR with --download"
        )
    if "train" not in parts:
        found = ", ".join(sorted(p.name for p in root.iterdir())[:6]) or "nothing"
        raise UserError(
            f"data folder {root} holds {found}, but needs train/ and test/ with one folder per class, or one of "
            f"{', '.join(CIFAR_FOLDERS.values())} (--download fetches those)"
        )
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    if val is not None:
        others += [parts["val"].name] if "val" in parts else []
        others = [name for name in others if (root / name).resolve() != val.resolve()]
        parts["val"] = val
    classes = find_classes(parts)
    left_out: Counter[str] = Counter()
    sets: dict[str, Images] = {
        part: _streamed(*find_files(path, classes, image_type, left_out), size, workers) for part, path in parts.items()
    }
    needed = sum(map(len, sets.values())) * 3 * math.prod(height_width(size))
    if needed <= memory.HOST_SHARE * memory.available_memory() / parallel.local_world_size():
        sets = {part: _in_memory(parts[part], images) for part, images in sets.items()}
    notes = [f"data folder {root} already has images: --download does nothing"] if download else []
    if "test" not in sets:
        sets["train"], sets["test"] = _held_out(root, sets["train"])
        tested = set(sets["test"].labels.tolist())
        untested = ", ".join(name for label, name in enumerate(classes) if label not in tested)
        held_out = f"{len(sets['test'])} of its training images are held out as test images"
        notes.append(f"{root} has no test/: {held_out}{f', but none of {untested}' if untested else ''}")
    notes += notes_on(root, others, left_out)
    return DataSet(name, tuple(classes), sets["train"], sets.get("val"), sets["test"], tuple(notes))


def _held_out(root: Path, images: Images) -> tuple[Images, Images]:
    """Training and test images of a folder that has training images only: the same ones whatever files are called.

    Copies of a test image are test images, too.
    """
    prints = fingerprints(images)
    candidates = first_copies(prints).nonzero().squeeze(1)
    candidates = candidates[prints[candidates].argsort()]
    _, aside = stratified_split(images.labels[candidates], TEST_SHARE, seed=0)
    if not len(aside):
        raise UserError(f"data folder {root} has only train/, with fewer than ten images per class: add test/")
    held = torch.isin(prints, prints[candidates[aside]])
    return images[(~held).nonzero().squeeze(1)], images[held.nonzero().squeeze(1)]


def _streamed(files: list[Path], labels: Tensor, size: Size, workers: int) -> FetchedSet:
    return FetchedSet(ImageFiles(files, size, workers), torch.arange(len(files)), labels, torch.device("cpu"))


def _in_memory(folder: Path, images: FetchedSet) -> ImageSet:
    """The images, decoded now."""
    pixels = torch.empty((len(images), 3, *height_width(images.source.size)), dtype=torch.uint8)
    groups = torch.arange(len(images)).split(BATCH)
    decoded = with_progress(images.batches(groups), f"reading {folder}", groups)
    for part, batch in zip(pixels.split(BATCH), decoded, strict=True):
        part.copy_(batch)
    return ImageSet(pixels, images.labels)


def _resized(pixels: np.ndarray, size: Size) -> Tensor:
    if pixels.shape[1:3] != height_width(size):
        pixels = np.stack([np.asarray(in_rgb(Image.fromarray(image), size)) for image in pixels])
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
