"""Files that are written whole or not at all."""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside ``path`` that takes its place when all is written: a reader sees the old or the new one.

    Raises:
        OSError: if it cannot be written; what stood at ``path`` is left as it was.
    """
    descriptor, temporary = _temporary_beside(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
            with suppress(OSError):  # file systems without permissions refuse it
                os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner may read
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _temporary_beside(path: Path) -> tuple[int, str]:
    """A new file, locked while it is open, so that ``remove_leftovers`` sees whether its writer is alive."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # else it was taken for a leftover before it was locked
            return descriptor, name
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; those that are being written stay."""
    for path in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def append(path: Path, content: bytes) -> None:
    """Append ``content`` whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            os.truncate(path, end)
            raise


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON through a temporary file, so that a reader never sees half of it."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
