"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside ``path`` that takes its place when all is written: a reader sees the old or the new one.

    Raises:
        OSError: if it cannot be written; what stood at ``path`` is left as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # what a killed writer leaves, the next one overwrites
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON through a temporary file, so that a reader never sees half of it."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
