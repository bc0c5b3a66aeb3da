"""Images from folders: what is read, how it is split and served; later stages keep to what a run set aside."""

import hashlib
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_image, write_shapes
from PIL import Image
from torchvision.datasets import ImageFolder

from utils.data.augment import Normalisation
from utils.data.batches import Splits, TrainingBatches, batch_ends, plain_batches, split_as_before, split_data
from utils.data.folder import DataSet, load_data
from utils.data.identity import digest, fingerprints, first_copies, stratified_split
from utils.data.images import ImageSet
from utils.errors import UserError

UNCHANGED = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def numbered(values: Sequence[int], labels: list[int] | None = None) -> ImageSet:
    """Images of one value each, which survives any crop and flip; the label of value v is v % 3."""
    pixels = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    return ImageSet(pixels, torch.tensor(labels or [value % 3 for value in values]))


def read(folder: Path, kind: str = "png", **given: str) -> DataSet:
    return load_data(str(folder), kind, 8, 1, **given)


def refused(folder: Path, message: str, **given: str) -> None:
    with pytest.raises(UserError, match=message):
        read(folder, **given)


def two_classes(root: Path, *parts: str) -> Path:
    for part in parts:
        for name in ("cat", "dog"):
            write_image(root / part / name / "0.png", Image.new("RGB", (8, 8), (1, 2, 3)))
    return root


def test_a_file_belongs_by_its_ending_in_any_case(tmp_path: Path):
    for part, kind in itertools.product(("train", "test"), "xy"):
        for i, name in enumerate(("a.png", "b.PNG", "c.Png", "d.jpg", "e.JPEG", "f.bmp", "g.webp")):
            write_image(tmp_path / part / kind / name, Image.new("RGB", (8, 8), (10 * i, 0, 0)))
        (tmp_path / part / kind / "notes.txt").write_text("no image")
        (tmp_path / part / kind / "._a.png").write_text("what macOS leaves behind")
    counts = {kind: len(read(tmp_path, kind).train) for kind in ("png", "jpg", "jpeg", "bmp")}
    assert counts == {"png": 6, "jpg": 4, "jpeg": 4, "bmp": 2}
    assert len(read(tmp_path, "webp").test) == 2
    data = read(tmp_path, "any")
    assert len(data.test) == 14 and data.notes == (f"files in {tmp_path} that are not read: 4 .txt",)


def test_one_class_is_refused(tmp_path: Path):
    write_image(tmp_path / "train" / "cat" / "0.png", Image.new("RGB", (8, 8)))
    refused(tmp_path, "train has one class, cat: a classifier needs two or more")


def test_copies_of_test_images_and_missing_validation_images_are_noted(tmp_path: Path):
    data = read(write_shapes(tmp_path, {"train": 4, "test": 2}))
    copied = data.train[torch.tensor([0, 5])]
    test = ImageSet(torch.cat([data.test.pixels, copied.pixels]), torch.cat([data.test.labels, copied.labels]))
    assert split_data(replace(data, test=test), 0.0, 0).notes == (
        "2 training images are copies of test images: the test accuracy is too optimistic",
    )
    assert split_data(data, 0.25, 0).notes == split_data(data, 0.0, 0).notes == ()
    assert split_data(data, 0.1, 0).notes == (
        "no class has enough images for val_fraction 0.1: there are no validation images",
    )


def test_what_is_not_read_is_named_in_a_line(tmp_path: Path):
    two_classes(tmp_path, "train", "val", "valid", "test", "extra")
    for name in ("1.jpg", "2.JPG", "notes", ".hidden.jpg", "deeper/3.jpg", ".deeper/4.jpg"):
        (tmp_path / "train" / "dog" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / "dog" / name).write_text("")
    (tmp_path / "test" / "stray.png").write_text("")
    data = read(tmp_path)
    assert data.notes == (
        f"folders in {tmp_path} that are not read: extra, valid",
        f"files in {tmp_path} that are not read: 3 .jpg, 1 without an ending, 1 outside of class folders",
    )
    assert read(two_classes(tmp_path / "plain", "train", "test")).notes == ()


def test_files_are_those_of_torchvisions_image_folder_in_its_order(tmp_path: Path):
    two_classes(tmp_path, "train", "test")
    generator = np.random.default_rng(0)
    for name in ("b/2.jpg", "b/a/1.tif", "a.PNG", "b/0.tiff", "b-c/1.ppm", "z.jpeg", "c.pgm", "d.webp"):
        for folder in ("cat", "dog"):
            image = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            write_image(tmp_path / "train" / folder / name, image.convert("L" if "pgm" in name else "RGB"))
    (tmp_path / "train" / "cat" / "linked").symlink_to(tmp_path / "test" / "cat")
    expected = ImageFolder(str(tmp_path / "train"))
    train = read(tmp_path, "any").train
    assert train.labels.tolist() == expected.targets and len(train) == 19
    for pixels, (image, _) in zip(train.pixels, expected, strict=True):
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_val_is_the_validation_set_beside_test_whatever_the_fraction_and_else_the_test_set(tmp_path, name, capsys):
    data = read(write_shapes(tmp_path / "three", {"train": 4, name: 3, "test": 2}))
    splits = split_data(data, 0.5, 0)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (12, 9, 6)
    assert torch.equal(splits.val.pixels, data.val.pixels) and not splits.val_is_test
    data = read(write_shapes(tmp_path / "two", {"train": 4, name: 3}))
    assert data.val is None and len(data.test) == 9 and not split_data(data, 0.25, 0).val_is_test
    assert capsys.readouterr().out == ""


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As for anybody but root, who may read all."""
    denied = two_classes(tmp_path, "train", "test") / "train" / "cat"
    scandir = os.scandir

    def refusing(path: str = "."):
        if Path(path) == denied:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    refused(tmp_path, f"data folder {tmp_path} cannot be read .*Permission denied.*train/cat")


def test_the_split_sets_the_exact_share_of_every_class_aside():
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 6 + [3])[torch.randperm(37, generator=torch.manual_seed(1))]
    for fraction, counts in ((0.1, [1, 2, 1, 0]), (0.5, [5, 10, 3, 0]), (0.99, [9, 19, 5, 0]), (0.0, [0, 0, 0, 0])):
        kept, aside = stratified_split(labels, fraction, seed=7)
        assert torch.bincount(labels[aside], minlength=4).tolist() == counts, fraction
        assert sorted(kept.tolist() + aside.tolist()) == list(range(37))


def test_the_split_depends_on_the_seed_alone():
    labels = torch.arange(400) % 4
    first, again, other = (stratified_split(labels, 0.25, seed)[1] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    # A random quarter shares about a quarter of its members with another one.
    assert 5 < len(set(first.tolist()) & set(other.tolist())) < 50


def test_one_image_is_too_few_to_train_on():
    with pytest.raises(UserError, match=r"leaves 1 training images .* but batch norms need two"):
        split_data(DataSet("numbers", ("a",), numbered([1]), None, numbered([1])), 0.0, 0)


@pytest.mark.parametrize(
    ("images", "batch_size", "ends"),
    [(10, 4, [4, 8, 10]), (8, 4, [4, 8]), (9, 4, [4, 9]), (5, 4, [5]), (3, 4, [3]), (3, 2, [3]), (5, 2, [2, 5])],
)
def test_no_training_batch_holds_a_single_image(images: int, batch_size: int, ends: list[int]):
    assert batch_ends(images, batch_size) == ends
    batches = TrainingBatches(numbered(range(1, images + 1)), batch_size, torch.manual_seed(0), UNCHANGED, True)
    assert np.cumsum([len(labels) for _, labels in batches]).tolist() == ends


def test_an_epoch_visits_every_image_once_under_its_label():
    generator = torch.Generator().manual_seed(5)
    orders = []
    for _ in range(2):
        epoch = list(TrainingBatches(numbered(range(1, 51)), 16, generator, UNCHANGED, flip=True))
        values = torch.cat([x.amax(dim=(1, 2, 3)) for x, _ in epoch]).mul(255).round().long()
        assert sorted(values.tolist()) == list(range(1, 51))
        assert torch.equal(torch.cat([y for _, y in epoch]), values % 3)
        orders.append(values.tolist())
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_plain_batches_keep_order_and_pixels():
    images = numbered(range(1, 11))
    batches = list(plain_batches(images, 4, UNCHANGED))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), images.pixels.float() / 255)
    assert torch.equal(torch.cat([y for _, y in batches]), images.labels)


def test_what_a_folder_lacks_is_named(tmp_path: Path):
    empty, no_classes, no_images = (tmp_path / name for name in ("empty", "no classes", "no images"))
    for folder in (empty, two_classes(no_classes, "train") / "test", two_classes(no_images, "train", "test")):
        folder.mkdir(exist_ok=True)
    (no_images / "train" / "dog" / "0.png").rename(no_images / "train" / "dog" / "0.gif")
    refused(tmp_path / "none", f"data folder {tmp_path / 'none'} does not exist")
    refused(empty, "holds nothing, but needs train/ and test/")
    refused(no_classes, f"{no_classes / 'test'} has no class folders")
    refused(no_images, f"class folder {no_images / 'train' / 'dog'} holds no .png file")


def test_a_tenth_of_train_alone_is_the_test_set(tmp_path: Path):
    """A tenth of each class and all copies of its images, the same in every run, whatever files are called."""
    write_shapes(tmp_path, {"train": 20})
    copied = tmp_path / "train" / "left" / "000.png"
    for i in range(3):
        shutil.copyfile(copied, copied.with_name(f"copy{i}.png"))
    first = read(tmp_path)
    (tmp_path / "train" / "right" / "000.png").rename(tmp_path / "train" / "right" / "zebra.png")
    assert digest(fingerprints(read(tmp_path).test)) == digest(fingerprints(first.test))
    assert f"{tmp_path} has no test/: {len(first.test)} of its training images" in first.notes[0]
    train, test = (set(fingerprints(part).tolist()) for part in (first.train, first.test))
    assert not train & test and len(first.train) + len(first.test) == 63
    assert torch.bincount(first.test.labels)[1:].tolist() == [2, 2] and len(test) == 6
    splits = split_data(first, 0.1, 0)
    assert not splits.val_is_test and len(splits.val) > 0 and splits.notes[0] == first.notes[0]
    for copy in sorted((tmp_path / "train" / "left").iterdir())[3:]:
        copy.unlink()
    assert "of its training images are held out as test images, but none of left" in read(tmp_path).notes[0]
    few = two_classes(tmp_path / "few", "train")
    refused(few, "has only train/, with fewer than ten images per class: add test/")


@pytest.mark.parametrize("parts", [{"train": 4, "test": 2}, {"train": 4, "val": 1, "test": 2}, {"train": 4, "val": 2}])
def test_validation_images_of_another_folder(tmp_path: Path, parts: dict[str, int]):
    write_shapes(tmp_path / "data", parts)
    aside = write_shapes(tmp_path / "aside", {"images": 3}, seed=1) / "images"
    data = read(tmp_path / "data", val_dir=str(aside))
    assert (len(data.train), len(data.val), len(data.test)) == (12, 9, 6)
    assert ("are not read: val" in " ".join(data.notes)) == (len(parts) == 3)
    splits = split_data(data, 0.5, 0)
    assert len(splits.train) == 12 and torch.equal(splits.val.pixels, data.val.pixels)


def test_validation_images_inside_of_the_data_folder_are_not_said_to_be_left_out(tmp_path: Path):
    data = write_shapes(tmp_path, {"train": 4, "test": 2, "dev": 3, "extra": 1})
    found = read(data, val_dir=str(data / "dev"))
    assert len(found.val) == 9 and found.notes == (f"folders in {data} that are not read: extra",)


def test_wrong_folders_of_validation_images(tmp_path: Path):
    root = write_shapes(tmp_path / "data", {"train": 4, "test": 2})
    refused(root, f"val_dir {tmp_path / 'none'} is not a folder", val_dir=str(tmp_path / "none"))
    others = str(two_classes(tmp_path, "val") / "val")
    refused(root, "classes differ between .*: cat, dog, left, middle, right are in only one of them", val_dir=others)


@pytest.mark.parametrize("part", ["test", "val"])
def test_classes_that_differ_are_named(tmp_path: Path, part: str):
    two_classes(tmp_path, "train", "val", "test")
    write_image(tmp_path / part / "eel" / "0.png", Image.new("RGB", (8, 8)))
    refused(tmp_path, f"classes differ between .*train and .*{part}: eel are in only one of them")


def data_of(
    train: list[int], test: list[int], val: list[int] | None = None, labels: list[int] | None = None
) -> DataSet:
    own = None if val is None else numbered(val)
    return DataSet("numbers", ("a", "b", "c"), numbered(train, labels), own, numbered(test))


def values(images: ImageSet) -> list[int]:
    return images.pixels[:, 0, 0, 0].tolist()


TRAIN, TEST = list(range(1, 41)), list(range(101, 111))


def first_split(**given) -> tuple[Splits, set[int]]:
    splits = split_data(data_of(TRAIN, TEST, **given), 0.25, 3)
    return splits, set(values(splits.val))


def test_a_fingerprint_is_that_of_the_pixels():
    images = ImageSet(torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
    expected = [hashlib.blake2b(p.numpy().tobytes(), digest_size=8).digest() for p in images.pixels]
    assert [int(f).to_bytes(8, "little", signed=True) for f in fingerprints(images)] == expected
    assert len(fingerprints(images[:0])) == 0


def test_first_copies():
    assert first_copies(torch.tensor([5, 7, 5, -1, 7, 5])).tolist() == [True, True, False, True, False, False]
    assert digest(torch.tensor([5, 7, 5])) == digest(torch.tensor([7, 5, 5])) != digest(torch.tensor([5, 7]))


def test_what_was_set_aside_stays_so_whatever_the_order_and_whatever_is_new():
    """A split by position and seed would train on some of them."""
    splits, aside = first_split()
    for train in (TRAIN[::-1], [*range(50, 90), *TRAIN], [*TRAIN[:20], 60, *TRAIN[20:]]):
        later = split_as_before(data_of(train, TEST), splits.identity)
        assert set(values(later.val)) == aside
        assert sorted(values(later.train)) == sorted(set(train) - aside)
        assert len(later.notes) == (len(train) > len(TRAIN))
        assert torch.equal(later.identity["set_aside"], splits.identity["set_aside"])


def test_those_that_vanished_are_counted_and_stay_set_aside_if_they_come_back():
    splits, aside = first_split()
    gone = sorted(aside)[:3]
    later = split_as_before(data_of([v for v in TRAIN if v not in gone], TEST), splits.identity)
    assert set(values(later.val)) == aside - set(gone)
    assert later.notes == (
        f"3 of {len(aside)} images that were set aside for validation are no longer in the data: {len(aside) - 3} are "
        f"left",
    )
    again = split_as_before(data_of(TRAIN, TEST), later.identity)
    assert set(values(again.val)) == aside and not set(values(again.train)) & aside


@pytest.mark.parametrize("labels", [None, [i % 3 for i in range(44)]], ids=["class by class", "of several classes"])
def test_copies_go_where_their_image_goes(labels):
    train = [*TRAIN, *TRAIN[:4]]
    for seed in range(5):
        splits = split_data(data_of(train, TEST, labels=labels), 0.25, seed)
        assert not set(values(splits.train)) & set(values(splits.val))
        assert sorted(values(splits.train) + values(splits.val)) == sorted(train)
        later = split_as_before(data_of(train[::-1], TEST, labels=labels and labels[::-1]), splits.identity)
        assert sorted(values(later.val)) == sorted(values(splits.val))


def test_a_copy_of_a_validation_image_among_new_ones_is_not_trained_on():
    splits, aside = first_split()
    copied = min(aside)
    later = split_as_before(data_of([*TRAIN, copied, copied], TEST), splits.identity)
    assert copied not in values(later.train) and values(later.val).count(copied) == 3


def test_other_data_is_refused():
    splits, _ = first_split()
    for data, why in (
        (data_of(list(range(41, 81)), TEST), r"lacks 10 of the 10 images .* set aside"),
        (data_of(TRAIN, TEST[1:]), "the test images of data numbers are not those"),
        (data_of(TRAIN, [*TEST[1:], 1]), "the test images of data numbers are not those"),
    ):
        with pytest.raises(UserError, match=why):
            split_as_before(data, splits.identity)


def test_a_resumed_run_takes_no_other_training_images():
    splits, aside = first_split()
    same = split_as_before(data_of(TRAIN[::-1], TEST), splits.identity, resumed=True)
    assert set(values(same.val)) == aside and same.notes == ()
    with pytest.raises(UserError, match=r"the training images of data numbers have changed .* without --resume"):
        split_as_before(data_of([*TRAIN, 50], TEST), splits.identity, resumed=True)
    with pytest.raises(UserError, match="the validation images of data numbers have changed"):
        split_as_before(data_of([v for v in TRAIN if v != min(aside)], TEST), splits.identity, resumed=True)


def test_images_of_a_val_folder_are_neither_trained_on_nor_taken_from_training():
    splits, aside = first_split(val=[201, 202, 203, 204])
    assert aside == {201, 202, 203, 204} and len(splits.train) == 40
    # One moved to train/, one removed, and one that was trained on moved to val/.
    later = split_as_before(data_of([*TRAIN[1:], 201], TEST, [203, 204, 1]), splits.identity)
    assert values(later.train) == TRAIN[1:] and values(later.val) == [203, 204]
    assert "2 of 4 images that were set aside" in later.notes[0]


def test_where_none_was_set_aside_none_is_later():
    splits = split_data(data_of(TRAIN, TEST), 0.0, 3)
    later = split_as_before(data_of(TRAIN, TEST, [201, 202]), splits.identity)
    assert splits.val_is_test and later.val_is_test and values(later.val) == TEST and values(later.train) == TRAIN


def test_renamed_files_are_known_in_memory_and_batch_by_batch(tmp_path: Path, shapes: Path, monkeypatch):
    data = tmp_path / "shapes"
    shutil.copytree(shapes, data, ignore=shutil.ignore_patterns(".decoded"))
    splits = split_data(read(data), 0.2, 0)
    for i, file in enumerate(sorted(data.glob("train/*/*.png"), reverse=True)):
        file.rename(file.with_name(f"{i * 7919 % 1000:03d}-new.png"))
    for available in (None, 0):
        if available is not None:
            monkeypatch.setattr("utils.data.memory.available_memory", lambda: 0)
        later = split_as_before(read(data), splits.identity, resumed=True)
        assert later.notes == () and type(later.train).__name__ == ("ImageSet" if available is None else "FetchedSet")
        assert set(fingerprints(later.val).tolist()) == set(fingerprints(splits.val).tolist())
