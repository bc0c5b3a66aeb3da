"""CIFAR-10 and CIFAR-100 as torchvision downloads them."""

import io
import pickle
from pathlib import Path

import numpy as np

from utils.errors import UserError

CIFAR_FOLDERS = ("cifar-100-python", "cifar-10-batches-py")
PIXELS = 3 * 32 * 32

Labelled = tuple[np.ndarray, np.ndarray]  # uint8 [N, 32, 32, 3], int64 [N]


class _ArraysOnly(pickle.Unpickler):
    """Reads what these files hold (dictionaries, lists, strings, NumPy arrays) and nothing that could run code."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "scalar"})

    def find_class(self, module: str, name: str):
        if (module.split(".")[0] == "numpy" and name in self.ALLOWED) or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_cifar(root: Path) -> tuple[tuple[str, ...], Labelled, Labelled]:
    """Class names, training images and test images of the CIFAR files under ``root``.

    Raises:
        UserError: if a file is missing, damaged or not what CIFAR's files are.
    """
    if (root / "cifar-100-python").is_dir():
        folder, label_key, names_key = root / "cifar-100-python", "fine_labels", "fine_label_names"
        train, test, meta = [folder / "train"], folder / "test", folder / "meta"
    else:
        folder, label_key, names_key = root / "cifar-10-batches-py", "labels", "label_names"
        train = [folder / f"data_batch_{i}" for i in range(1, 6)]
        test, meta = folder / "test_batch", folder / "batches.meta"
    classes = tuple(_read(meta, names_key)[names_key])
    parts = [_images(path, label_key, len(classes)) for path in (*train, test)]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    return classes, (pixels, labels), parts[-1]


def _read(path: Path, *keys: str) -> dict:
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        return {key: content[key] for key in keys}
    except FileNotFoundError:
        raise UserError(f"CIFAR file {path} is missing: download it again with --download") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"CIFAR file {path} cannot be read ({error}): download it again with --download") from error


def _images(path: Path, label_key: str, classes: int) -> Labelled:
    content = _read(path, "data", label_key)
    pixels, labels = np.asarray(content["data"]), np.asarray(content[label_key], dtype=np.int64)
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS) or not len(labels):
        raise UserError(f"CIFAR file {path} holds {pixels.dtype} {pixels.shape}, not images of {PIXELS} bytes each")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"CIFAR file {path} has a label outside of the {classes} classes of its meta file")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def download_cifar(root: Path) -> None:
    """Fetch CIFAR-100 (or CIFAR-10, where the folder's name says so) into ``root`` through torchvision, if missing."""
    # Imported here: torchvision is slow to import, and only downloading needs it.
    from torchvision.datasets import CIFAR10, CIFAR100

    name = root.resolve().name.lower().replace("-", "").replace("_", "")
    source = CIFAR10 if "cifar10" in name and "cifar100" not in name else CIFAR100
    try:
        source(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{source.__name__} could not be downloaded to {root} ({error}): fetch it by hand") from error
