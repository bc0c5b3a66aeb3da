"""The cache of decoded images: used when nothing has changed, made anew when something has, never in the way."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shapes
from PIL import Image

from utils.data import cache, folder
from utils.data.cache import cache_files, content_key, read_cache, write_cache
from utils.data.folder import DataSet, load_data

PARTS = {"train": 4, "test": 2}
FILES = 3 * sum(PARTS.values())


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that have been decoded since."""
    seen: list[Path] = []
    original = folder.read_image
    monkeypatch.setattr(folder, "read_image", lambda path, size: (seen.append(path), original(path, size))[1])
    return seen


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return write_shapes(tmp_path / "data", PARTS)


def load(root: Path, size: int = 8) -> DataSet:
    return load_data(str(root), "png", size, 2)


def names(root: Path) -> list[str]:
    """Of the caches in the data folder, without their keys."""
    return sorted(path.name.rpartition("-")[0] for path in (root / ".decoded").iterdir())


def assert_same(a: DataSet, b: DataSet) -> None:
    for one, other in ((a.train, b.train), (a.test, b.test)):
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.labels, other.labels)


def test_the_second_start_does_not_decode(root: Path, decodes: list[Path]):
    first = load(root)
    assert len(decodes) == FILES
    decodes.clear()
    assert_same(load(root), first)
    assert decodes == []
    assert names(root) == ["test-png-8", "train-png-8"]


def test_each_size_has_its_own(root: Path, decodes: list[Path]):
    load(root), load(root, 16)
    decodes.clear()
    assert load(root).train.pixels.shape[2:] == (8, 8) and load(root, 16).train.pixels.shape[2:] == (16, 16)
    assert decodes == []


def add(folder: Path) -> None:
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "new.png")


def remove(folder: Path) -> None:
    (folder / "001.png").unlink()


def rename(folder: Path) -> None:
    (folder / "001.png").rename(folder / "zzz.png")


def change_content(folder: Path) -> None:
    """Another image of the same length under the same name: the time of change tells."""
    before = (folder / "001.png").stat()
    (folder / "001.png").write_bytes((folder / "002.png").read_bytes())
    os.utime(folder / "001.png", ns=(before.st_atime_ns, before.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [add, remove, rename, change_content])
def test_it_is_made_anew_when_a_file_changes(root: Path, decodes: list[Path], change):
    load(root)
    change(root / "train" / "middle")
    decodes.clear()
    changed = load(root)
    files = sorted((root / "train").glob("*/*.png"))
    assert sorted(decodes) == files, "the part that changed, and no other"
    expected = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)
    assert np.array_equal(changed.train.pixels.numpy(), expected)
    decodes.clear()
    load(root)
    assert decodes == []
    assert names(root) == ["test-png-8", "train-png-8"], "the old one is gone"


def test_the_old_one_of_another_size_or_part_stays(root: Path):
    load(root), load(root, 80)
    before = set((root / ".decoded").iterdir())
    add(root / "train" / "middle")
    load(root)
    after = set((root / ".decoded").iterdir())
    assert names(root) == ["test-png-8", "test-png-80", "train-png-8", "train-png-80"]
    assert [path.name.rpartition("-")[0] for path in before - after] == ["train-png-8"]


def with_shape(shape: tuple[int, ...], dtype: type = np.uint8) -> Callable[[bytes], bytes]:
    def written(_: bytes) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(shape, dtype))
        return buffer.getvalue()

    return written


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:100],
        lambda content: content[:10],
        lambda content: b"",
        lambda content: b"x" + content[1:],
        lambda content: content.replace(b"{'descr'", b"{'descr("),
        lambda content: content.replace(b"(12, 3, 8, 8)", b"(9" + 6 * b"0" + b",)  "),
        lambda content: bytes(len(content)),  # what a crash leaves of a file that was not synchronised
        lambda content: b"PK\x03\x04" + content[4:],  # how NumPy knows an archive of arrays
        lambda content: pickle.dumps(np.zeros((12, 3, 8, 8), np.uint8)),
        with_shape((11, 3, 8, 8)),
        with_shape((12, 3, 8, 8), np.float32),
    ],
    ids=[
        "half", "one byte less", "within header", "start of header", "empty", "magic", "header", "huge", "zeros",
        "archive", "pickle", "other shape", "other type",
    ],
)  # fmt: skip
def test_damage_is_noticed(root: Path, decodes: list[Path], damage):
    first = load(root)
    (file,) = (root / ".decoded").glob("train-png-8-*.npy")
    whole = file.read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    file.write_bytes(damaged)
    decodes.clear()
    assert_same(load(root), first)
    assert len(decodes) == 3 * PARTS["train"]
    assert file.read_bytes() == whole, "it is mended"


def test_a_copy_of_the_folder_keeps_its_cache(root: Path, decodes: list[Path], tmp_path: Path):
    """Paths in the key are relative: the same data is found under another mount point."""
    load(root)
    shutil.copytree(root, tmp_path / "elsewhere")  # with times of change
    decodes.clear()
    load(tmp_path / "elsewhere")
    assert decodes == []


def test_a_folder_that_cannot_be_written_has_its_cache_in_the_users(root: Path, decodes: list[Path], tmp_path: Path):
    (root / ".decoded").write_text("in the way: a file, where even root can make no folder")
    first = load(root)
    assert len(list((tmp_path / "user" / "decoded-images").glob("data-*/*.npy"))) == 2
    decodes.clear()
    assert_same(load(root), first)
    assert decodes == []


def test_where_nothing_can_be_written_nobody_is_bothered(root: Path, decodes: list[Path], tmp_path: Path, capfd):
    (root / ".decoded").write_text("")
    (tmp_path / "user").write_text("")
    assert_same(load(root), load(root))
    assert len(decodes) == 2 * FILES and capfd.readouterr() == ("", "")


def test_a_full_disk_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=10))
    load(root)
    assert not list(tmp_path.rglob("*.npy"))


def test_an_interrupted_write_leaves_the_old_file(root: Path, monkeypatch: pytest.MonkeyPatch):
    pixels = np.zeros((2, 3, 4, 4), np.uint8)
    files, others = (cache_files(root, "train-png-4", key)[:1] for key in ("a", "b"))
    write_cache(files, pixels)

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.os, "replace", interrupted)
    for interrupted_files in (files, others):
        with pytest.raises(KeyboardInterrupt):
            write_cache(interrupted_files, pixels + 1)
    assert np.array_equal(read_cache(files, (2, 3, 4, 4)), pixels)
    assert [path.name for path in files[0].parent.iterdir()] == [files[0].name], "no temporary file stays"


def test_the_key_depends_on_everything_that_decides_the_pixels(root: Path):
    files = sorted((root / "train").glob("*/*.png"))
    key = content_key(root / "train", files, 8)
    assert key == content_key(root / "train", files, 8) and len(key) == 32
    assert key != content_key(root / "train", files, 9) != content_key(root / "train", files[:-1], 9)
