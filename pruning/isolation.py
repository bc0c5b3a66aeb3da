"""Imports of this program's modules in a project that has modules of the same names."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[1]
ROOMS = ("models", "training", "utils")  # that ``pruning`` needs, and whose names are common


@contextmanager
def own_modules() -> Iterator[None]:
    """Import ``ROOMS`` from this program, also where a project has one of these names before it on Python's path.

    In such a project these names are afterwards the project's, so nothing else of this program can be imported there.
    """
    before = takewhile(lambda folder: folder != PROGRAM, [Path(entry).resolve() for entry in sys.path])
    places = [place for room in ROOMS for place in (f"{room}.py", f"{room}/*.py", f"{room}/*/*.py")]
    if not any(any(folder.glob(place)) for folder in before for place in places):
        yield
        return
    # Without this program: its packages would be taken before a project's folder without ``__init__.py``.
    others, path = _taken(), [entry for entry in sys.path if Path(entry).resolve() != PROGRAM]
    sys.path[:] = [str(PROGRAM), *path]
    try:
        yield
    finally:
        sys.path[:] = path
        _taken()
        sys.modules.update(others)


def _taken() -> dict:
    """The modules of these names, which are removed from Python's list."""
    names = [name for name in sys.modules if name.partition(".")[0] in ROOMS]
    for name in names:  # see ``models.user_code``
        inspect._filesbymodname.pop(name, None)
    return {name: sys.modules.pop(name) for name in names}
