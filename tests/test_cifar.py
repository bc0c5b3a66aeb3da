"""The files that torchvision downloads, imitated in small: as Python 2 wrote them and as Python 3 would."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar
from PIL import Image

from utils.data.cifar import read_cifar
from utils.data.folder import load_data
from utils.errors import UserError

Dump = Callable[[object], bytes]


class _Python2Pickler(pickle._Pickler):
    """Writes text and bytes as the byte strings of Python 2, which the real files are full of."""

    def save_string(self, value: str | bytes) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}  # noqa: RUF012


def python2(content: object) -> bytes:
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def python3(content: object) -> bytes:
    return pickle.dumps(content)


def images_of(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


def write_cifar100(root: Path, dump: Dump = python3) -> Path:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    names = [f"class {i}" for i in range(100)]
    (folder / "meta").write_bytes(dump({"fine_label_names": names, "coarse_label_names": ["all"]}))
    for part, n in (("train", 12), ("test", 5)):
        content = {"data": images_of(n, n), "fine_labels": [(7 * i) % 100 for i in range(n)], "coarse_labels": [0] * n}
        (folder / part).write_bytes(dump({**content, "filenames": [f"{i}.png" for i in range(n)]}))
    return root


def write_cifar10(root: Path, dump: Dump = python3) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(dump({"label_names": [f"c{i}" for i in range(10)], "num_vis": 3072}))
    for number, name in enumerate(["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]):
        content = {"data": images_of(4, number), "labels": [(number + i) % 10 for i in range(4)], "batch_label": name}
        (folder / name).write_bytes(dump(content))
    return root


@pytest.mark.parametrize("dump", [python2, python3])
@pytest.mark.parametrize(
    ("write", "source"),
    [(write_cifar100, torchvision.datasets.CIFAR100), (write_cifar10, torchvision.datasets.CIFAR10)],
)
def test_reads_what_torchvision_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write, source, dump: Dump):
    root = write(tmp_path / "cifar", dump)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)  # ours have other checksums
    data = load_data(str(root), "png", 32, 1)
    for images, train in ((data.train, True), (data.test, False)):
        expected = source(str(root), train=train)
        assert list(data.classes) == expected.classes
        assert images.labels.tolist() == list(expected.targets)
        assert np.array_equal(images.pixels.numpy(), expected.data.transpose(0, 3, 1, 2))
        assert images.pixels.dtype == torch.uint8 and images.labels.dtype == torch.int64


def test_images_are_brought_to_the_size_asked_for(tmp_path: Path):
    root = write_cifar10(tmp_path / "cifar")
    _, (pixels, _), _ = read_cifar(root)
    expected = np.asarray(Image.fromarray(pixels[3]).resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(load_data(str(root), "png", 16, 1).train.pixels[3].numpy(), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["meta", "train", "test"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, share: float):
    path = write_cifar100(tmp_path) / "cifar-100-python" / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=f"CIFAR file {path} cannot be read"):
        read_cifar(tmp_path)


@pytest.mark.parametrize("name", ["batches.meta", "data_batch_3", "test_batch"])
def test_a_missing_file_is_named(tmp_path: Path, name: str):
    path = write_cifar10(tmp_path) / "cifar-10-batches-py" / name
    path.unlink()
    with pytest.raises(UserError, match=f"CIFAR file {path} is missing"):
        read_cifar(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": images_of(3, 0), "fine_labels": [0, 1]}, "not images of 3072 bytes each"),
        ({"data": images_of(3, 0)[:, :100], "fine_labels": [0, 1, 2]}, "not images of 3072 bytes each"),
        ({"data": images_of(3, 0).astype(float), "fine_labels": [0, 1, 2]}, "not images of 3072 bytes each"),
        ({"data": images_of(3, 0), "fine_labels": [0, 1, 100]}, "label outside of the 100 classes"),
        ({"data": images_of(3, 0), "fine_labels": [0, 1, -1]}, "label outside of the 100 classes"),
        ({"data": images_of(3, 0)}, "cannot be read"),
    ],
    ids=["fewer labels", "narrow", "floats", "large label", "negative label", "no labels"],
)
def test_contents_that_are_not_cifars(tmp_path: Path, content: dict, message: str):
    (write_cifar100(tmp_path) / "cifar-100-python" / "train").write_bytes(python3(content))
    with pytest.raises(UserError, match=message):
        read_cifar(tmp_path)


class _Call:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("gadget", ["os", "builtins", "numpy"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, gadget: str, protocol: int):
    victim = tmp_path / "victim.npy"
    call = {
        "os": _Call(os.mkdir, str(victim)),
        "builtins": _Call(exec, f"open({str(victim)!r}, 'w')"),
        "numpy": _Call(np.save, str(victim), [1]),  # of NumPy itself only what arrays are made of may be called
    }[gadget]
    hostile = pickle.dumps({"data": call, "fine_labels": [0]}, protocol=protocol)
    pickle.loads(hostile)
    assert victim.exists(), "the test's own pickle must be able to do harm"
    victim.rmdir() if victim.is_dir() else victim.unlink()

    path = write_cifar100(tmp_path / "data") / "cifar-100-python" / "train"
    path.write_bytes(hostile)
    with pytest.raises(UserError, match=f"CIFAR file {path} cannot be read .*it asks for"):
        read_cifar(tmp_path / "data")
    assert not victim.exists()
