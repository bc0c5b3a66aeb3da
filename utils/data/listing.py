"""The content of a data folder: its parts, their classes, their image files, and what is not read."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError

JPEG = (".jpg", ".jpeg", ".jfif")
IMAGE_TYPES = {
    "png": (".png",),
    "jpg": JPEG,
    "jpeg": JPEG,
    "bmp": (".bmp",),
    "webp": (".webp",),
    # What torchvision's ImageFolder reads, and what else Pillow decodes without help.
    "any": (
        ".png", *JPEG, ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".avif", ".jp2", ".tga"
    ),
}  # fmt: skip
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # by a folder's name


def find_parts(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folders with training, validation and test images, and the names of all other folders, hidden ones aside."""
    folders = sorted(p.name for p in root.iterdir() if _is_folder(p)) if root.is_dir() else []
    parts: dict[str, Path] = {}
    for folder, part in PARTS.items():
        if folder in folders and part not in parts:
            parts[part] = root / folder
    return parts, [folder for folder in folders if root / folder not in parts.values()]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def notes_on(root: Path, others: list[str], left_out: Counter[str]) -> list[str]:
    """A line on the folders that are not read, and one on the files, if there are any."""
    notes = []
    if others:
        notes.append(f"folders in {root} that are not read: {', '.join(others)}")
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common())
        notes.append(f"files in {root} that are not read: {kinds}")
    return notes


def find_classes(parts: dict[str, Path]) -> list[str]:
    """The class names, which all parts have in common.

    Raises:
        UserError: if there is one only, or the parts differ.
    """
    train = _class_names(parts["train"])
    if len(train) < 2:
        raise UserError(f"data folder {parts['train']} has one class, {train[0]}: a classifier needs two or more")
    for path in parts.values():
        check_classes(path, train, parts["train"])
    return train


def check_classes(part: Path, classes: list[str], place: Path) -> None:
    """Refuse a part whose classes are not those of ``place``.

    Raises:
        UserError: names some that are in one of them only.
    """
    odd = sorted(set(classes) ^ set(_class_names(part)))
    if odd:
        raise UserError(f"classes differ between {place} and {part}: {', '.join(odd[:5])} are in only one of them")


def _class_names(part: Path) -> list[str]:
    names = sorted(path.name for path in part.iterdir() if _is_folder(path))
    if not names:
        raise UserError(f"data folder {part} has no class folders: it needs one folder of images for each class")
    return names


def find_files(part: Path, classes: list[str], image_type: str, left_out: Counter[str]) -> tuple[list[Path], Tensor]:
    """The image files, class by class in the order of torchvision's ``ImageFolder``, and their labels, int64 [N].

    ``ImageFolder`` itself would silently skip unknown files and unreadable folders.

    Args:
        left_out: counts the files of other kinds.
    """
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = list(_images_below(part / name, image_type, left_out))
        if not found:
            suffixes = IMAGE_TYPES[image_type]
            kind = "image" if image_type == "any" else " or ".join(suffixes)
            raise UserError(f"class folder {part / name} holds no {kind} file: add images or change --img_type")
        files += found
        labels += [label] * len(found)
    outside = sum(path.is_file() and not path.name.startswith(".") for path in part.iterdir())
    left_out.update({"outside of class folders": outside} if outside else {})
    return files, torch.tensor(labels)


def _images_below(folder: Path, image_type: str, left_out: Counter[str]) -> Iterator[Path]:
    """The image files in a folder and its subfolders, links followed and hidden ones aside."""

    def refused(error: OSError) -> None:
        raise error

    for inside, _, names in sorted(os.walk(folder, onerror=refused, followlinks=True)):
        if any(part.startswith(".") for part in Path(inside).relative_to(folder).parts):
            continue
        for name in sorted(names):
            if name.startswith("."):
                continue
            if name.lower().endswith(IMAGE_TYPES[image_type]):
                yield Path(inside, name)
            else:
                left_out[os.path.splitext(name)[1].lower() or "without an ending"] += 1
