"""Decoded images on disk, so that the next run does not decode them again.

One file for each part of a data folder, image type and size.  It begins with a key, a digest of what it was made from;
a file with another key, of another length or with a wrong checksum counts as missing and is made anew.  Where nothing
can be written there is no cache, and nobody is bothered with it.
"""

import hashlib
import os
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL

from utils.files import atomic_write

HEADER = struct.Struct("<16s32sQII")  # magic, key, number of images, their size, checksum of their pixels
MAGIC = b"decoded-images-1"


def content_key(folder: Path, files: Sequence[Path], size: int) -> bytes:
    """Digest of the files' paths below ``folder``, lengths and times of change, of ``size`` and of Pillow's version."""
    digest = hashlib.sha256(f"{size} {PIL.__version__}\n".encode())
    below = len(str(folder)) + 1
    for path in map(str, files):
        try:
            found = os.stat(path)
            state = f"{found.st_size} {found.st_mtime_ns}"
        except OSError:  # whoever reads it will say so
            state = "missing"
        digest.update(f"{path[below:]}\0{state}\n".encode("utf-8", "surrogateescape"))
    return digest.digest()


def cache_files(root: Path, part: str, image_type: str, size: int) -> list[Path]:
    """Where the cache of a part may lie: in the data folder, or in the user's own cache, by the data folder's path."""
    name = f"{part}-{image_type}-{size}.images"
    files = [root / ".decoded" / name]
    try:
        own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return files
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return [*files, own / "decoded-images" / f"{root.resolve().name}-{digest}" / name]


def read_cache(files: Sequence[Path], key: bytes, count: int, size: int) -> np.ndarray | None:
    """The pixels, uint8 [count, 3, size, size], from the first of ``files`` that is whole and has this key."""
    for path in files:
        try:
            pixels = _read(path, key, count, size)
        except OSError:
            continue
        if pixels is not None:
            return pixels
    return None


def _read(path: Path, key: bytes, count: int, size: int) -> np.ndarray | None:
    length = count * 3 * size * size
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size or os.fstat(file.fileno()).st_size != HEADER.size + length:
            return None
        *expected, checksum = HEADER.unpack(header)
        if expected != [MAGIC, key, count, size]:
            return None
        pixels = np.fromfile(file, np.uint8, length)
    if len(pixels) != length or zlib.crc32(pixels) != checksum:
        return None
    return pixels.reshape(count, 3, size, size)


def write_cache(files: Sequence[Path], key: bytes, pixels: np.ndarray) -> None:
    """Write ``pixels``, uint8 [N, 3, size, size], to the first of ``files`` that can be written, if there is one."""
    header = HEADER.pack(MAGIC, key, len(pixels), pixels.shape[-1], zlib.crc32(pixels))
    for path in files:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < 2 * pixels.nbytes:
                continue  # a disk must not be filled for convenience
            with atomic_write(path) as file:
                file.write(header)
                file.write(pixels.data)
            return
        except OSError:
            continue
