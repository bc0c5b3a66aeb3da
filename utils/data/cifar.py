"""CIFAR-10 and CIFAR-100, which torchvision downloads, checks and reads."""

from http.client import HTTPException
from pathlib import Path

import numpy as np

from utils.errors import UserError

CIFAR_FOLDERS = {"CIFAR100": "cifar-100-python", "CIFAR10": "cifar-10-batches-py"}  # by torchvision's data set

Labelled = tuple[np.ndarray, np.ndarray]  # uint8 [N, 32, 32, 3], int64 [N]


def read_cifar(root: Path, download: bool) -> tuple[tuple[str, ...], Labelled, Labelled]:
    """Class names, training images and test images of the CIFAR files under ``root``.

    torchvision compares each file with its published checksum before it unpickles it: damaged or malicious files are
    refused.

    Args:
        download: fetch what is missing or damaged: of CIFAR-100, or of CIFAR-10 where ``root`` holds that or its name
            says so.

    Raises:
        UserError: if a file is missing, is not the published one, or cannot be read or downloaded.
    """
    from torchvision import datasets  # imported here: it is slow, and image files do not need it

    name = _data_set(root)
    try:
        train, test = (getattr(datasets, name)(root, part, download=download) for part in (True, False))
    except RuntimeError:  # its message is for programmers, and names no file
        raise UserError(
            f"{root / CIFAR_FOLDERS[name]} lacks a file of {name} or has one that was changed: delete "
            f"its files and download them again with --download"
        ) from None
    except (OSError, HTTPException) as error:
        raise UserError(
            f"{name} could not be read from {root} or downloaded to it ({error}): try again, or put its files there by "
            f"hand"
        ) from error
    return tuple(train.classes), *((part.data, np.asarray(part.targets, np.int64)) for part in (train, test))


def _data_set(root: Path) -> str:
    for name, folder in CIFAR_FOLDERS.items():
        if (root / folder).is_dir():
            return name
    name = root.resolve().name.lower().replace("-", "").replace("_", "")
    return "CIFAR10" if "cifar10" in name and "cifar100" not in name else "CIFAR100"
