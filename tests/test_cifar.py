"""The files that torchvision downloads, imitated in small: published by the checksums that a test gives torchvision."""

import hashlib
import os
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import MakesAFolder, write_image, write_shapes
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, cifar

from utils.data.folder import load_data
from utils.errors import UserError

# Of each file its images and the first label; the labels go up from there.
FILES = {
    CIFAR100: {"train": (12, 93), "test": (5, 40)},
    CIFAR10: {"test_batch": (3, 1)} | {f"data_batch_{i}": (4, i) for i in range(1, 6)},
}
CLASSES = {CIFAR100: [f"class {i}" for i in range(100)], CIFAR10: [f"c{i}" for i in range(10)]}


def pixels_of(name: str) -> np.ndarray:
    """uint8 [N, 3, 32, 32] of a file."""
    n, first = next(files[name] for files in FILES.values() if name in files)
    return np.random.default_rng(first).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def labels_of(source: type[CIFAR10], name: str) -> list[int]:
    n, first = FILES[source][name]
    return [(first + i) % len(CLASSES[source]) for i in range(n)]


def contents(source: type[CIFAR10]) -> dict[str, bytes]:
    label_key = "fine_labels" if source is CIFAR100 else "labels"
    found = {
        name: {"data": pixels_of(name).reshape(-1, 3072), label_key: labels_of(source, name), "coarse_labels": [0] * n}
        for name, (n, _) in FILES[source].items()
    }
    found[source.meta["filename"]] = {source.meta["key"]: CLASSES[source], "coarse_label_names": ["all"]}
    return {name: pickle.dumps(content) for name, content in found.items()}


def write(root: Path, source: type[CIFAR10]) -> Path:
    """The files under ``root``; returns their folder."""
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    for name, content in contents(source).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision take our files for those that were published."""
    for source in FILES:
        md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents(source).items()}
        for files in ("train_list", "test_list"):
            monkeypatch.setattr(source, files, [[name, md5[name]] for name, _ in getattr(source, files)])
        monkeypatch.setattr(source, "meta", source.meta | {"md5": md5[source.meta["filename"]]})


def refusal(root: Path, download: bool = False) -> str:
    with pytest.raises(UserError) as refused:
        load_data(str(root), "png", 32, 1, download)
    message = str(refused.value)
    assert "\n" not in message and ". " not in message, "one sentence"
    return message


@pytest.mark.parametrize("source", FILES)
def test_pixels_labels_and_classes_are_those_of_the_files(tmp_path: Path, published: None, source: type[CIFAR10]):
    write(tmp_path, source)
    data = load_data(str(tmp_path), "png", 32, 1)
    assert list(data.classes) == CLASSES[source] and data.val is None
    for images, files in ((data.train, source.train_list), (data.test, source.test_list)):
        names = [name for name, _ in files]
        assert np.array_equal(images.pixels.numpy(), np.concatenate([pixels_of(name) for name in names]))
        assert images.labels.tolist() == [label for name in names for label in labels_of(source, name)]
        assert images.pixels.dtype == torch.uint8 and images.labels.dtype == torch.int64


def test_validation_images_of_a_folder(tmp_path: Path, published: None):
    write(tmp_path, CIFAR10)
    for name in CLASSES[CIFAR10]:
        write_image(tmp_path / "aside" / name / "0.png", Image.new("RGB", (32, 32), (9, 9, 9)))
    val = load_data(str(tmp_path), "png", 32, 1, val_dir=str(tmp_path / "aside")).val
    assert val.labels.tolist() == list(range(len(CLASSES[CIFAR10]))) and (val.pixels == 9).all()


def test_images_are_brought_to_the_size_asked_for(tmp_path: Path, published: None):
    write(tmp_path, CIFAR10)
    image = Image.fromarray(pixels_of("data_batch_1")[3].transpose(1, 2, 0))
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(load_data(str(tmp_path), "png", 16, 1).train.pixels[3].numpy(), expected)


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("source", "name", "damage"),
    [(CIFAR100, "train", one_bit), (CIFAR100, "meta", Path.unlink), (CIFAR10, "data_batch_3", half)],
)
def test_a_folder_with_a_damaged_or_missing_file_is_refused(tmp_path, published, source, name, damage):
    folder = write(tmp_path, source)
    damage(folder / name)
    assert f"{folder} lacks a file of {source.__name__} or has one that was changed" in refusal(tmp_path)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, published: None):
    victim = tmp_path / "victim"
    hostile = pickle.dumps({"data": MakesAFolder(victim), "fine_labels": [0], "fine_label_names": []})
    pickle.loads(hostile)
    victim.rmdir()  # the test's own pickle is able to do harm
    folder = write(tmp_path, CIFAR100)
    (folder / "train").write_bytes(hostile)
    assert f"{folder} lacks a file" in refusal(tmp_path)
    assert not victim.exists()


@pytest.fixture
def downloads(published: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that torchvision has fetched and unpacked since."""
    fetched: list[str] = []

    def fetch(url: str, root: str | Path, **_: str) -> None:
        fetched.append(url)
        source = CIFAR100 if url == CIFAR100.url else CIFAR10
        for name, content in contents(source).items():
            (Path(root) / source.base_folder).mkdir(parents=True, exist_ok=True)
            (Path(root) / source.base_folder / name).write_bytes(content)

    monkeypatch.setattr(cifar, "download_and_extract_archive", fetch)
    return fetched


@pytest.mark.parametrize(
    ("name", "source"), [("CIFAR-10", CIFAR10), ("cifar_10_jpeg", CIFAR10), ("cifar_100", CIFAR100), ("x", CIFAR100)]
)
def test_what_is_missing_is_downloaded_by_the_folders_name_once(tmp_path, downloads, name, source):
    for _ in range(2):
        data = load_data(str(tmp_path / name), "png", 32, 1, download=True)
        assert list(data.classes) == CLASSES[source] and data.name == name
    assert downloads == [source.url]


@pytest.mark.parametrize("damage", [one_bit, Path.unlink])
def test_what_is_damaged_is_downloaded_again_whatever_the_folders_name(tmp_path: Path, downloads: list[str], damage):
    damage(write(tmp_path / "data", CIFAR10) / "data_batch_2")
    assert len(load_data(str(tmp_path / "data"), "png", 32, 1, download=True).train) == 20
    assert downloads == [CIFAR10.url]


@pytest.mark.parametrize("error", [URLError("no route to host"), OSError(28, "No space left on device")])
def test_a_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)
    message = refusal(tmp_path / "cifar_100", download=True)
    assert message.startswith(f"CIFAR100 could not be read from {tmp_path / 'cifar_100'} or downloaded to it (")
    assert str(error) in message


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val"), ("train", "val", "test")])
def test_nothing_is_downloaded_beside_images_of_ones_own(tmp_path: Path, downloads: list[str], parts, capsys):
    write_shapes(tmp_path / "cifar_100", dict.fromkeys(parts, 2))
    data = load_data(str(tmp_path / "cifar_100"), "png", 8, 1, download=True)
    assert data.classes == ("left", "middle", "right") and downloads == []
    assert sorted(os.listdir(tmp_path / "cifar_100")) == sorted(parts)
    assert "already has images: --download does nothing" in data.notes[0]


def test_files_of_cifar_beside_images_of_ones_own_are_named_and_not_read(tmp_path: Path, published: None):
    write(tmp_path, CIFAR100)
    write_shapes(tmp_path, {"train": 2, "test": 2})
    data = load_data(str(tmp_path), "png", 8, 1)
    assert data.classes == ("left", "middle", "right")
    assert data.notes == (f"folders in {tmp_path} that are not read: cifar-100-python",)
