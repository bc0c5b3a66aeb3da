"""Damaged and foreign checkpoints: each is refused in one sentence that names what is wrong."""

import copy
import io
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from networks import checkpoint_of

from models import build_network
from utils.errors import UserError
from utils.runs.checkpoint import FORMAT, Checkpoint, load_checkpoint, load_network
from utils.runs.contents import NEEDED


@pytest.fixture(scope="module")
def content() -> dict:
    """What stands in a small file that is accepted."""
    torch.manual_seed(0)
    network = build_network("resnet", depth=8, num_classes=3, width=4, gate="rnn", ranks={"blocks.0.conv2": (3, 2)})
    checkpoint = checkpoint_of(network, "pruned", 8)
    return {"format": FORMAT, **{f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}}


def saved(path: Path, content: dict) -> Path:
    torch.save(content, path)
    return path


def refused(folder: Path, content: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_network(saved(folder / "a.pt", content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((lambda c, f=f, k=k: c[f].pop(k), f"{f}.{k} is missing") for f, keys in NEEDED.items() for k in sorted(keys)),
        (lambda c: c["data"].update(image_size=0), ""),
        (lambda c: c["data"].update(image_size=[8]), ""),
        (lambda c: c["architecture"].update(members="two"), ""),
        (lambda c: c["architecture"].update(num_classes=[3]), ""),
        (lambda c: c["architecture"].update(num_classes=4), "classes has 3 different names for a network of 4 outputs"),
        *(
            (lambda c, names=names: c.update(classes=names), f"classes has {len(set(names))} .* of 3 outputs")
            for names in (["left", "middle"], ["left", "middle", "right", "up"], ["left", "left", "right"])
        ),
    ],
)
def test_a_value_that_no_stage_saves(tmp_path: Path, content: dict, change: Callable, message: str):
    changed = copy.deepcopy(content)
    change(changed)
    refused(tmp_path, changed, f"a.pt cannot be used, .*{message}")


WEIGHTS: dict[str, Callable[[torch.Tensor], object]] = {
    "text": lambda w: "weights",
    "None": lambda w: None,
    "sparse": lambda w: w.to_sparse(),
    "without values": lambda w: w.to("meta"),
    "of another shape": lambda w: w[:1],
    "not a number": lambda w: w * float("nan"),
}


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_a_weight_that_no_stage_saves(tmp_path: Path, content: dict, change: Callable):
    weights = {**content["weights"], "stem.0.weight": change(content["weights"]["stem.0.weight"])}
    refused(tmp_path, {**content, "weights": weights}, r"stem\.0\.weight")


def test_a_weight_more_or_less(tmp_path: Path, content: dict):
    weights = {name: w for name, w in content["weights"].items() if name != "stem.0.weight"}
    refused(tmp_path, {**content, "weights": weights}, r"cannot be made .*stem\.0\.weight")
    refused(tmp_path, {**content, "weights": {**content["weights"], "more": torch.zeros(1)}}, "cannot be made .*more")


LAYER = "blocks.1.conv1"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        *(({"depth": depth}, r"6n\+2") for depth in (2, 7, 9, 31, 33, -8)),
        *(({"depth": depth}, "TypeError") for depth in ("8", None)),
        *(({"width": width}, "") for width in (0, "4", 8)),
        ({"ranks": 3}, "'int' object"),
        ({"ranks": {"nowhere": [1, 1]}}, "the layer 'nowhere'"),
        ({"ranks": {"blocks.0.conv2": [3]}}, "expected 2, got 1"),
        ({"ranks": {"blocks.0.conv2": [3, 0]}}, "ranks are 3 and 0"),
        *(({"inner": inner}, "inner gives") for inner in ({"blocks.7": 3}, {"blocks.1": 0})),
        ({"inner": {"blocks.0": 2.5}}, ""),
        ({"depthwise": ["nowhere"]}, "'nowhere', which has no two equal ranks"),
        ({"depthwise": [LAYER], "ranks": {}}, "no two equal ranks"),
        *(({"depthwise": [LAYER], "ranks": {LAYER: [4, r]}}, "no two equal ranks") for r in (None, 5)),
        *(({"fixed_switches": {block: 0}}, "fixed_switches") for block in ("blocks.0", "blocks.7", "blocks.9")),
        *(({"fixed_switches": fixed}, "fixed_switches") for fixed in ({"blocks.1": 2}, {"stem": 1})),
        ({"gate": "none", "fixed_switches": {"blocks.1": 0}}, "fixed_switches"),
        *(({"gate": gate}, "gate .* is unknown") for gate in ("wooden", ["rnn"])),
        ({"network": "vgg"}, "'vgg' is unknown"),
        ({"network": None}, "TypeError"),
        ({"colour": "blue"}, "'colour'"),
    ],
    ids=str,
)
def test_an_architecture_that_is_no_network_or_another_one(tmp_path: Path, content: dict, change: dict, word: str):
    changed = {**content, "architecture": {**content["architecture"], **change}}
    refused(tmp_path, changed, f"the checkpoint's network cannot be made .*{word}")


def test_flipped_bits_are_found(tmp_path: Path, content: dict):
    path = saved(tmp_path / "a.pt", content)
    before = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = [part for part in archive.infolist() if part.file_size]
    assert len(parts) > 20
    for part in parts:
        length = int.from_bytes(before[part.header_offset + 28 : part.header_offset + 30], "little")
        start = part.header_offset + 30 + len(part.filename) + length  # behind its header
        flipped = bytearray(before)
        flipped[start + part.file_size // 2] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"a.pt cannot be read \(the checksum of .* is wrong\)"):
            load_checkpoint(path)
    path.write_bytes(before)
    load_checkpoint(path)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_file_that_would_grow_is_not_read(tmp_path: Path, content: dict, repeated: bool, monkeypatch):
    written = io.BytesIO()
    torch.save(content, written)
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(written) as before, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as after:
        for part in before.namelist():
            after.writestr(part, before.read(part), zipfile.ZIP_STORED if repeated else None)
        if repeated:
            after.filelist.extend(after.filelist * 9)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(UserError, match=r"cannot be read \(it is compressed|its parts overlap"):
        load_checkpoint(path)
