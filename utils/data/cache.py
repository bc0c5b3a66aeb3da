"""Decoded images on disk, so that the next run does not decode them again.

One NumPy array for each part of a data folder, image type and size.  Its file's name ends with a key, a digest of what
it was made from: where anything has changed since, no file has that name, and the images are decoded anew.  So they are
where the file is damaged.  Where nothing can be written there is no cache, and nobody is bothered with it.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL

from utils.files import atomic_write


def content_key(folder: Path, files: Sequence[Path], size: int) -> str:
    """Digest of the files' paths below ``folder``, lengths and times of change, of ``size`` and of Pillow's version."""
    digest = hashlib.sha256(f"{size} {PIL.__version__}\n".encode())
    below = len(str(folder)) + 1
    for path in map(str, files):
        try:
            found = os.stat(path)
            state = f"{found.st_size} {found.st_mtime_ns}"
        except OSError:  # whoever reads it will say so
            state = "missing"
        digest.update(os.fsencode(f"{path[below:]}\0{state}\n"))
    return digest.hexdigest()[:32]


def cache_files(root: Path, name: str, key: str) -> list[Path]:
    """Where a cache may lie: in the data folder, or in the user's own cache, by the data folder's path.

    Args:
        name: says part, image type and size; a folder keeps one file of a name, the newest.
    """
    file = f"{name}-{key}.npy"
    files = [root / ".decoded" / file]
    try:
        own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return files
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return [*files, own / "decoded-images" / f"{root.resolve().name}-{digest}" / file]


def read_cache(files: Sequence[Path], shape: tuple[int, int, int, int]) -> np.ndarray | None:
    """The pixels, uint8 [N, 3, size, size] of this shape, from the first of ``files`` that is there and whole."""
    for path in files:
        try:
            pixels = np.load(path)
            if pixels.dtype == np.uint8 and pixels.shape == shape:
                return pixels
        except Exception:  # missing, or damaged, which NumPy may notice anywhere
            continue
    return None


def write_cache(files: Sequence[Path], pixels: np.ndarray) -> None:
    """Write ``pixels``, uint8 [N, 3, size, size], to the first of ``files`` that can be written, if there is one."""
    for path in files:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < 2 * pixels.nbytes:
                continue  # a disk must not be filled for convenience
            with atomic_write(path) as file:
                np.save(file, pixels)
        except OSError:
            continue
        _remove_older(path)
        return


def _remove_older(path: Path) -> None:
    """Remove the files beside ``path`` that have its name but another key."""
    name, _, _ = path.name.rpartition("-")
    for other in path.parent.glob(f"{name}-*.npy"):
        if other != path:
            with suppress(OSError):
                other.unlink()
