"""Small data folders, written once a session."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import SCRIPTS, arguments, run
from PIL import Image

from deploy import speeds

# A shell that starts the tests in the background has SIGINT ignored, nohup SIGHUP; the commands that they start would
# inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)  # the networks are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def seeded_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test draws is the same in every run and order of the tests; speeds are measured as shortly as can be."""
    torch.manual_seed(0)
    monkeypatch.setattr(speeds, "SECONDS", 0.0)


def write_shapes(root: Path, parts: dict[str, int], size: int = 8, seed: int = 0, suffix: str = "png") -> Path:
    """Three classes that a small network tells apart: a bright bar on the left, in the middle or on the right."""
    generator = np.random.default_rng(seed)
    for part, count in parts.items():
        for label, name in enumerate(("left", "middle", "right")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 90, (size, size, 3), dtype=np.uint8)
                column = 1 + label * (size // 3)
                pixels[:, column : column + 2] += 150
                Image.fromarray(pixels).save(folder / f"{i:03d}.{suffix}")
    return root


def write_image(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


class MakesAFolder:
    """Pickles to a call of ``os.mkdir``: what opens it carelessly makes the folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 40 training and 10 test images per class."""
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", {"train": 40, "test": 10})


@pytest.fixture(scope="session")
def chain(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder that the three stages have filled, each a process of its own and never interrupted."""
    results = tmp_path_factory.mktemp("chain") / "results"
    for stage in SCRIPTS:
        done = run(stage, arguments(stage, shapes, results))
        assert done.stderr == "", "nothing but errors belongs on stderr where it is no terminal"
    return results


@pytest.fixture
def copied(chain: Path, tmp_path: Path) -> Path:
    """A copy of that folder to write to."""
    return shutil.copytree(chain, tmp_path / "copied")
