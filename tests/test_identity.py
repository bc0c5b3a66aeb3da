"""Which images a run set aside: later stages keep to them, whatever becomes of the files, or stop with a sentence."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from utils.data.batches import Splits, split_as_before, split_data
from utils.data.folder import DataSet, load_data
from utils.data.identity import digest, fingerprints, first_copies, stratified_split
from utils.data.images import ImageSet
from utils.errors import UserError


def numbered(values: list[int], labels: list[int] | None = None) -> ImageSet:
    """Images that are told apart by the value of all their pixels."""
    pixels = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    return ImageSet(pixels, torch.tensor(labels if labels is not None else [value % 3 for value in values]))


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


def test_without_copies_the_split_is_stratified_over_all_images():
    data = data_of(TRAIN, TEST)
    kept, aside = stratified_split(data.train.labels, 0.25, 3)
    splits = split_data(data, 0.25, 3)
    assert torch.equal(splits.train.pixels, data.train[kept].pixels)
    assert torch.equal(splits.val.pixels, data.train[aside].pixels)


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
    splits = split_data(load_data(str(data), "png", 8, 1), 0.2, 0)
    for i, file in enumerate(sorted(data.glob("train/*/*.png"), reverse=True)):
        file.rename(file.with_name(f"{i * 7919 % 1000:03d}-new.png"))
    for available in (None, 0):
        if available is not None:
            monkeypatch.setattr("utils.data.memory.available_memory", lambda: 0)
        later = split_as_before(load_data(str(data), "png", 8, 1), splits.identity, resumed=True)
        assert later.notes == () and type(later.train).__name__ == ("ImageSet" if available is None else "FetchedSet")
        assert set(fingerprints(later.val).tolist()) == set(fingerprints(splits.val).tolist())
