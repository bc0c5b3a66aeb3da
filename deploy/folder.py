"""Files that are replaced together: after an export that was killed all are old or all are new."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

WRITING, READY = ".export.writing", ".export.ready"


def write_together(folder: Path, contents: Mapping[str, bytes], outdated: Iterable[str]) -> None:
    """Put files into ``folder``, replacing those of the same names, and remove those named ``outdated``.

    All are written to a subfolder first.  When it is complete it is renamed, and from then on the files count as
    written: if the moves are interrupted, ``finish`` completes them.

    Raises:
        OSError: if they cannot be written; those that stood there are left as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finish(folder)
    writing = folder / WRITING
    if writing.exists():  # of an export that was killed
        shutil.rmtree(writing)
    try:
        writing.mkdir()
        for name, content in [*contents.items(), *((name, b"") for name in outdated)]:
            with (writing / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        writing.rename(folder / READY)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    finish(folder)


def finish(folder: Path) -> None:
    """Complete an interrupted ``write_together``; empty files stand for files to remove."""
    if not (folder / READY).is_dir():
        return
    for path in (folder / READY).iterdir():
        if path.stat().st_size:
            path.replace(folder / path.name)
        else:
            (folder / path.name).unlink(missing_ok=True)
            path.unlink()
    (folder / READY).rmdir()
