"""Images from folders: what is read, how it is converted, how it is split and served."""

import io
import os
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shapes
from PIL import ExifTags, Image, features
from torchvision.datasets import ImageFolder
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


def test_a_file_belongs_by_its_ending_in_any_case(tmp_path: Path, capsys):
    for part in ("train", "test"):
        for i, name in enumerate(("a.png", "b.PNG", "c.Png", "d.jpg", "e.JPEG", "f.bmp", "g.webp")):
            write(tmp_path / part / "x" / name, Image.new("RGB", (8, 8), (10 * i, 0, 0)))
        (tmp_path / part / "x" / "notes.txt").write_text("no image")
        (tmp_path / part / "x" / "._a.png").write_text("what macOS leaves behind")
    counts = {kind: len(load_data(str(tmp_path), kind, 8, 1).train) for kind in ("png", "jpg", "jpeg", "bmp")}
    assert counts == {"png": 3, "jpg": 2, "jpeg": 2, "bmp": 1}
    assert len(load_data(str(tmp_path), "webp", 8, 1).test) == 1
    capsys.readouterr()
    assert len(load_data(str(tmp_path), "any", 8, 1).test) == 7
    assert capsys.readouterr().out == f"note: files in {tmp_path} that are not read: 2 .txt\n"


def test_what_is_not_read_is_named_in_a_line(tmp_path: Path, capsys):
    two_classes(tmp_path, "train", "val", "valid", "test", "extra")
    for name in ("1.jpg", "2.JPG", "notes", ".hidden.jpg", "deeper/3.jpg", ".deeper/4.jpg"):
        (tmp_path / "train" / "dog" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / "dog" / name).write_text("")
    (tmp_path / "test" / "stray.png").write_text("")
    load_data(str(tmp_path), "png", 8, 1)
    assert capsys.readouterr().out.splitlines() == [
        f"note: folders in {tmp_path} that are not read: extra, valid",
        f"note: files in {tmp_path} that are not read: 3 .jpg, 1 without an ending, 1 outside of class folders",
    ]
    load_data(str(two_classes(tmp_path / "plain", "train", "test")), "png", 8, 1)
    assert capsys.readouterr().out == ""


def test_files_are_those_of_torchvisions_image_folder_in_its_order(tmp_path: Path):
    two_classes(tmp_path, "train", "test")
    for i, name in enumerate(("b/2.jpg", "b/a/1.tif", "a.PNG", "b/0.tiff", "b-c/1.ppm", "z.jpeg", "c.pgm", "d.webp")):
        for label, folder in enumerate(("cat", "dog")):
            write(tmp_path / "train" / folder / name, Image.new("L" if "pgm" in name else "RGB", (8, 8), 9 * i + label))
    (tmp_path / "train" / "cat" / "linked").symlink_to(tmp_path / "test" / "cat")
    expected = ImageFolder(str(tmp_path / "train"))
    train = load_data(str(tmp_path), "any", 8, 1).train
    assert train.labels.tolist() == expected.targets and len(train) == 19
    for pixels, (image, _) in zip(train.pixels, expected, strict=True):
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))


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
        (Image.new("LA", (8, 8), (77, 0)), (255, 255, 255)),
        (Image.new("LA", (8, 8), (100, 51)), (224, 224, 224)),  # a fifth of 100, four of 255
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.new("RGB", (8, 8), (10, 20, 30)), (10, 20, 30)),
        (Image.new("RGBA", (8, 8), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (8, 8), (5, 55, 105, 204)), (55, 95, 135)),  # four fifths, and a fifth of 255
        (palette_image(None), (200, 100, 50)),
        (palette_image(0), (200, 100, 50)),
        (palette_image(1), (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 0, np.uint16)), (0, 0, 0)),
        (Image.fromarray(np.full((8, 8), 0x1234, np.uint16)), (0x12, 0x12, 0x12)),
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), (255, 255, 255)),
    ],
    ids=[
        "grey",
        "grey-clear",
        "grey-alpha",
        "bilevel",
        "rgb",
        "rgba-opaque",
        "rgba",
        "palette",
        "palette-other-clear",
        "palette-clear",
        "16-0",
        "16-mid",
        "16-max",
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, image: Image.Image, expected: tuple[int, int, int]):
    pixels = read_image(write(tmp_path / "image.png", image), 8)
    assert pixels.dtype == np.uint8 and pixels.shape == (8, 8, 3)
    assert (pixels == expected).all()


def test_a_grey_value_of_16_bits_may_be_transparent(tmp_path: Path):
    image = Image.fromarray(np.array([[0x1234, 0x1235]], np.uint16).repeat(8, 0).repeat(4, 1))
    path = tmp_path / "image.png"
    image.save(path, transparency=0x1234)
    assert read_image(path, 8)[0, ::4, 0].tolist() == [255, 0x12]


def test_12_bits_a_pixel_are_refused(tmp_path: Path):
    """Pillow shows them as 16 bits of which the upper four are zero."""
    values = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 96}  # tags of a TIFF, by number
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    path = tmp_path / "image.tif"
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8 + 96) + bytes(96) + struct.pack("<H", len(values)) + entries + bytes(4)
    )
    with pytest.raises(UserError, match="it has 12 bits per pixel: 8 or 16 are needed"):
        read_image(path, 8)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_a_pixel_are_refused(tmp_path: Path, mode: str):
    path = write(tmp_path / "image.tif", Image.new(mode, (8, 8), 100))
    with pytest.raises(UserError, match=f"image {path} cannot be read .it has 32 bits per pixel"):
        read_image(path, 8)


def test_16_bits_that_pillow_gives_in_32_are_scaled(tmp_path: Path):
    path = tmp_path / "image.pgm"
    path.write_bytes(b"P5 8 8 65535 " + 64 * b"\x12\x34")
    assert (read_image(path, 8) == 0x12).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
def test_images_are_upright(tmp_path: Path, suffix: str, orientation: int):
    """Four quarters of one grey each, top left, top right, bottom left, bottom right, by the EXIF standard's table."""
    shown = {1: "0123", 2: "1032", 3: "3210", 4: "2301", 5: "0213", 6: "2031", 7: "3120", 8: "1302"}[orientation]
    greys = np.array([[0, 80], [160, 240]], np.uint8).repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(greys).convert("RGB").save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    quarters = read_image(path, 32)[8::16, 8::16, 0].reshape(4).astype(int)
    assert np.abs(quarters - [80 * int(digit) for digit in shown]).max() <= 3  # JPEG is not exact


def test_damaged_exif_data_do_not_hide_the_pixels(tmp_path: Path):
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path, exif=b"Exif\0\0no TIFF header here")
    assert (read_image(path, 8) == (1, 2, 3)).all()


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


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_valid_is_another_name_of_val(tmp_path: Path, name: str, capsys):
    write_shapes(tmp_path / "three", {"train": 4, name: 3, "test": 2})
    data = load_data(str(tmp_path / "three"), "png", 8, 1)
    assert (len(data.train), len(data.val), len(data.test)) == (12, 9, 6)
    write_shapes(tmp_path / "two", {"train": 4, name: 3})
    data = load_data(str(tmp_path / "two"), "png", 8, 1)
    assert data.val is None and len(data.test) == 9
    assert capsys.readouterr().out == ""


def test_names_are_one_class_however_unicode_composes_them(tmp_path: Path):
    composed, decomposed = (unicodedata.normalize(form, "Gänse") for form in ("NFC", "NFD"))
    for i, (part, name) in enumerate((("train", composed), ("train", decomposed), ("train", "x"), ("test", "x"))):
        write(tmp_path / part / name / "0.png", Image.new("RGB", (8, 8), (i, i, i)))
    write(tmp_path / "test" / decomposed / "0.png", Image.new("RGB", (8, 8)))
    if len(os.listdir(tmp_path / "train")) < 3:
        pytest.skip("this file system composes names itself")
    data = load_data(str(tmp_path), "png", 8, 1)
    assert data.classes == (composed, "x") and data.train.labels.tolist() == [0, 0, 1]
    assert sorted(data.train.pixels[:2, 0, 0, 0].tolist()) == [0, 1] and data.test.labels.tolist() == [0, 1]


def test_names_that_are_not_utf8(tmp_path: Path):
    name = os.fsdecode(b"caf\xe9")
    root = two_classes(tmp_path / name, "train", "test")
    write(tmp_path / "data" / "train" / "cat" / f"{name}.png", Image.new("RGB", (8, 8)))
    two_classes(tmp_path / "data", "train", "test")
    assert len(load_data(str(tmp_path / "data"), "png", 8, 1).train) == 3, "names of files need not be UTF-8"
    (tmp_path / "data" / "train" / "cat").rename(tmp_path / "data" / "train" / name)
    for folder in (root, tmp_path / "data"):
        with pytest.raises(UserError, match=r"caf\\udce9' is not UTF-8: rename it"):
            load_data(str(folder), "png", 8, 1)


@pytest.mark.parametrize("denied", [".", "train", "train/cat", "train/cat/deeper"])
def test_a_folder_without_permission(tmp_path: Path, denied: str, monkeypatch: pytest.MonkeyPatch):
    """As for anybody but root, who may read all."""
    two_classes(tmp_path, "train", "test")
    (tmp_path / "train" / "cat" / "deeper").mkdir()
    for module, name in ((os, "scandir"), (os, "listdir")):
        original = getattr(module, name)

        def refusing(path: str = ".", original=original):
            if Path(path) == tmp_path / denied:
                raise PermissionError(13, "Permission denied", str(path))
            return original(path)

        monkeypatch.setattr(module, name, refusing)
    with pytest.raises(UserError, match=f"data folder {tmp_path} cannot be read .*Permission denied.*{denied[1:]}"):
        load_data(str(tmp_path), "png", 8, 1)


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


@pytest.mark.parametrize("error", [RuntimeError("bad"), EOFError(), KeyError(3), MemoryError(), ZeroDivisionError("x")])
def test_whatever_a_decoder_raises_names_the_file(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch):
    def broken(path: Path) -> Image.Image:
        raise error

    monkeypatch.setattr(Image, "open", broken)
    found = str(error) or type(error).__name__
    with pytest.raises(UserError, match=f"image {tmp_path / 'a.png'} cannot be read .{found}"):
        read_image(tmp_path / "a.png", 8)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_a_broken_avif(tmp_path: Path):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 10, 10)).save(buffer, "AVIF")
    content = buffer.getvalue()
    start = content.index(b"mdat") + 4
    (tmp_path / "a.avif").write_bytes(content[:start] + bytes(len(content) - start))
    with pytest.raises(UserError, match=f"image {tmp_path / 'a.avif'} cannot be read"):
        read_image(tmp_path / "a.avif", 8)
