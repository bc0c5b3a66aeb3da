"""Images from folders: what is read, how it is converted, how it is split and served."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shapes
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from utils.data.augment import Normalisation
from utils.data.batches import TrainingBatches, batch_ends, plain_batches, split_data, stratified_split
from utils.data.folder import DataSet, load_data
from utils.data.images import ImageSet, read_image
from utils.errors import UserError

UNCHANGED = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def numbered(images: int, size: int = 8) -> ImageSet:
    """Images of one value each, 1, 2, 3, ..., which survive any crop and flip; the label of value v is v % 3."""
    values = torch.arange(1, images + 1)
    return ImageSet(values.to(torch.uint8)[:, None, None, None].expand(-1, 3, size, size).contiguous(), values % 3)


def write(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def two_classes(root: Path, *parts: str) -> Path:
    for part in parts:
        for name in ("cat", "dog"):
            write(root / part / name / "0.png", Image.new("RGB", (8, 8), (1, 2, 3)))
    return root


def test_reads_pixels_and_labels_in_the_order_of_the_names(shapes: Path):
    data = load_data(str(shapes), "png", 8, 2)
    assert (data.name, data.classes, data.val) == ("shapes", ("left", "middle", "right"), None)
    for part, images in (("train", data.train), ("test", data.test)):
        files = sorted((shapes / part).glob("*/*.png"))
        expected = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)
        assert np.array_equal(images.pixels.numpy(), expected)
        assert images.labels.tolist() == [data.classes.index(file.parent.name) for file in files]


def test_a_file_belongs_by_its_ending_in_any_case(tmp_path: Path):
    for part in ("train", "test"):
        for i, name in enumerate(("a.png", "b.PNG", "c.Png", "d.jpg", "e.JPEG", "f.bmp", "g.webp")):
            write(tmp_path / part / "x" / name, Image.new("RGB", (8, 8), (10 * i, 0, 0)))
        (tmp_path / part / "x" / "notes.txt").write_text("no image")
        (tmp_path / part / "x" / "._a.png").write_text("what macOS leaves behind")
    counts = {kind: len(load_data(str(tmp_path), kind, 8, 1).train) for kind in ("png", "jpg", "jpeg", "bmp")}
    assert counts == {"png": 3, "jpg": 2, "jpeg": 2, "bmp": 1}
    assert len(load_data(str(tmp_path), "webp", 8, 1).test) == 1


def palette_image(transparency: int | None) -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (8, 8), 77), (77, 77, 77)),
        (Image.new("LA", (8, 8), (77, 9)), (77, 77, 77)),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.new("RGB", (8, 8), (10, 20, 30)), (10, 20, 30)),
        (Image.new("RGBA", (8, 8), (10, 20, 30, 128)), (10, 20, 30)),
        (palette_image(None), (200, 100, 50)),
        (palette_image(0), (200, 100, 50)),
        (Image.fromarray(np.full((8, 8), 0, np.uint16)), (0, 0, 0)),
        (Image.fromarray(np.full((8, 8), 0x1234, np.uint16)), (0x12, 0x12, 0x12)),
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), (255, 255, 255)),
    ],
    ids=["grey", "grey-alpha", "bilevel", "rgb", "rgba", "palette", "palette-transparent", "16-0", "16-mid", "16-max"],
)
def test_every_mode_becomes_rgb(tmp_path: Path, image: Image.Image, expected: tuple[int, int, int]):
    pixels = read_image(write(tmp_path / "image.png", image), 8)
    assert pixels.dtype == np.uint8 and pixels.shape == (8, 8, 3)
    assert (pixels == expected).all()


def test_a_cmyk_jpeg_becomes_rgb(tmp_path: Path):
    pixels = read_image(write(tmp_path / "image.jpg", Image.new("CMYK", (8, 8), (255, 0, 255, 0))), 8)
    assert np.abs(pixels.astype(int) - (0, 255, 0)).max() <= 3  # JPEG is not exact


@pytest.mark.parametrize("shape", [(12, 20), (5, 8), (8, 8)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_images_are_resized_as_torchvision_does(tmp_path: Path, shape: tuple[int, int], mode: str):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)
    path = write(tmp_path / "image.png", image)
    expected = reference.resize(Image.open(path).convert("RGB"), [8, 8], InterpolationMode.BILINEAR)
    assert np.array_equal(read_image(path, 8), np.asarray(expected))


def test_val_beside_train_alone_is_the_test_set(tmp_path: Path):
    write_shapes(tmp_path, {"train": 4, "val": 2})
    data = load_data(str(tmp_path), "png", 8, 1)
    assert data.val is None and len(data.test) == 6
    assert not split_data(data, 0.25, 0).val_is_test


def test_val_beside_test_is_the_validation_set_whatever_the_fraction(tmp_path: Path):
    write_shapes(tmp_path, {"train": 4, "val": 3, "test": 2})
    data = load_data(str(tmp_path), "png", 8, 1)
    splits = split_data(data, 0.5, 0)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (12, 9, 6)
    assert torch.equal(splits.val.pixels, data.val.pixels)
    assert not splits.val_is_test


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


def test_without_validation_images_choices_look_at_the_test_images():
    data = DataSet("numbers", ("a", "b", "c"), numbered(9), None, numbered(3))
    splits = split_data(data, 0.0, 0)
    assert splits.val_is_test and len(splits.train) == 9
    assert torch.equal(splits.val.pixels, data.test.pixels)


def test_one_image_is_too_few_to_train_on():
    with pytest.raises(UserError, match="leaves 1 image to train on"):
        split_data(DataSet("numbers", ("a",), numbered(1), None, numbered(1)), 0.0, 0)


@pytest.mark.parametrize(
    ("images", "batch_size", "ends"),
    [(10, 4, [4, 8, 10]), (8, 4, [4, 8]), (9, 4, [4, 9]), (5, 4, [5]), (3, 4, [3]), (3, 2, [3]), (5, 2, [2, 5])],
)
def test_no_training_batch_holds_a_single_image(images: int, batch_size: int, ends: list[int]):
    assert batch_ends(images, batch_size) == ends
    batches = TrainingBatches(numbered(images), batch_size, torch.manual_seed(0), UNCHANGED, True)
    assert np.cumsum([len(labels) for _, labels in batches]).tolist() == ends


def test_an_epoch_visits_every_image_once_under_its_label():
    generator = torch.Generator().manual_seed(5)
    orders = []
    for _ in range(2):
        epoch = list(TrainingBatches(numbered(50), 16, generator, UNCHANGED, flip=True))
        values = torch.cat([x.amax(dim=(1, 2, 3)) for x, _ in epoch]).mul(255).round().long()
        assert sorted(values.tolist()) == list(range(1, 51))
        assert torch.equal(torch.cat([y for _, y in epoch]), values % 3)
        orders.append(values.tolist())
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_the_state_of_the_generator_resumes_the_batches():
    generator = torch.Generator().manual_seed(5)
    list(TrainingBatches(numbered(20), 8, generator, UNCHANGED, flip=True))
    state = generator.get_state()
    expected = [x for x, _ in TrainingBatches(numbered(20), 8, generator, UNCHANGED, flip=True)]
    resumed = torch.Generator()
    resumed.set_state(state)
    again = [x for x, _ in TrainingBatches(numbered(20), 8, resumed, UNCHANGED, flip=True)]
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_plain_batches_keep_order_and_pixels():
    images = numbered(10)
    batches = list(plain_batches(images, 4, UNCHANGED))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), images.pixels.float() / 255)
    assert torch.equal(torch.cat([y for _, y in batches]), images.labels)


def test_a_missing_folder(tmp_path: Path):
    with pytest.raises(UserError, match=f"data folder {tmp_path / 'none'} does not exist"):
        load_data(str(tmp_path / "none"), "png", 8, 1)


def test_an_empty_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"holds nothing, but needs train/ and test/"):
        load_data(str(tmp_path), "png", 8, 1)


def test_a_folder_without_test_images(tmp_path: Path):
    with pytest.raises(UserError, match=r"holds train, but needs train/ and test/"):
        load_data(str(two_classes(tmp_path, "train")), "png", 8, 1)


def test_a_part_without_classes(tmp_path: Path):
    two_classes(tmp_path, "train")
    (tmp_path / "test").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path / 'test'} has no class folders"):
        load_data(str(tmp_path), "png", 8, 1)


def test_a_class_folder_without_images(tmp_path: Path):
    two_classes(tmp_path, "train", "test")
    (tmp_path / "train" / "dog" / "0.png").rename(tmp_path / "train" / "dog" / "0.gif")
    with pytest.raises(UserError, match=f"class folder {tmp_path / 'train' / 'dog'} holds no .png file"):
        load_data(str(tmp_path), "png", 8, 1)


@pytest.mark.parametrize("part", ["test", "val"])
def test_classes_that_differ_are_named(tmp_path: Path, part: str):
    two_classes(tmp_path, "train", "val", "test")
    write(tmp_path / part / "eel" / "0.png", Image.new("RGB", (8, 8)))
    with pytest.raises(UserError, match=f"classes differ between .*train and .*{part}: eel in one only"):
        load_data(str(tmp_path), "png", 8, 1)


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "webp"])
def test_a_truncated_image_is_named(tmp_path: Path, kind: str):
    write_shapes(tmp_path, {"train": 3, "test": 3}, suffix=kind)
    broken = tmp_path / "train" / "middle" / f"001.{kind}"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=f"image {broken} cannot be read"):
        load_data(str(tmp_path), kind, 8, 2)


def test_a_file_that_is_no_image_is_named(tmp_path: Path):
    two_classes(tmp_path, "train", "test")
    (tmp_path / "test" / "cat" / "1.png").write_text("hello")
    with pytest.raises(UserError, match=f"image {tmp_path / 'test' / 'cat' / '1.png'} cannot be read"):
        load_data(str(tmp_path), "png", 8, 1)
