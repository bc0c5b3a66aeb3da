"""Modules of a user's own, imported as they would be in the user's project."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

PROGRAM = Path(__file__).resolve().parents[1]


@contextmanager
def user_module(place: str) -> Iterator[ModuleType]:
    """The module of a file, or of a dotted name; meanwhile its imports find what lies beside it.

    A file in a package, which is a folder with ``__init__.py``, is imported as a part of it.  What lies beside the file
    or its package is found first, also if this program has modules of the same name, such as ``utils``.

    Raises:
        Exception: of any kind, from the module's code.
    """
    if not place.endswith(".py"):
        yield importlib.import_module(place)
        return
    path = Path(place).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no such file in {Path.cwd()}" if not path.is_absolute() else "no such file")
    path = path.resolve()
    folder, name = path.parent, path.stem
    while (folder / "__init__.py").exists():
        folder, name = folder.parent, f"{folder.name}.{name}"
    with _found_first(folder):
        yield importlib.import_module(name)


@contextmanager
def _found_first(folder: Path) -> Iterator[None]:
    """Imports find the modules in ``folder``; afterwards those of the same names are as before."""
    names = {entry.stem for entry in folder.iterdir() if entry.suffix == ".py" or entry.is_dir()}

    def shadowed() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}

    others = {name: module for name, module in shadowed().items() if not _lies_in(module, folder)}
    path, sys.path[:] = list(sys.path), [str(folder), *sys.path]
    if names & {name.partition(".")[0] for name in others if _lies_in(others[name], PROGRAM)}:
        # A package of this program would be taken before a folder without ``__init__.py``.
        sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != PROGRAM]
    for name in others:
        del sys.modules[name]
        # Python remembers where a module's file was, and fails on a folder without ``__init__.py``, which has none.
        inspect._filesbymodname.pop(name, None)
    try:
        yield
    finally:
        sys.path[:] = path
        replaced = {name.partition(".")[0] for name in others}
        for name in [name for name in shadowed() if name.partition(".")[0] in replaced]:
            del sys.modules[name]
        sys.modules.update(others)


def _lies_in(module: ModuleType, folder: Path) -> bool:
    place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), None)
    return place is not None and Path(place).resolve().is_relative_to(folder)
