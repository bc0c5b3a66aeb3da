"""Hostile checkpoints: each is refused in one sentence that names what is wrong, before anything large is built."""

import copy
import io
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from networks import checkpoint_of

from models import ResNet, build_network
from utils.errors import UserError
from utils.runs import contents
from utils.runs.checkpoint import FORMAT, Checkpoint, load_checkpoint, load_network

NAN, INFINITY = float("nan"), float("inf")
HUGE = 10**10


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
        load_checkpoint(saved(folder / "a.pt", content))


def test_architectures_of_older_versions_are_accepted(tmp_path: Path, content: dict):
    content = copy.deepcopy(content)
    for key in ("inner", "depthwise", "fixed_switches"):
        del content["architecture"][key]
    content["data"]["more"] = "of a later version"
    assert isinstance(load_network(saved(tmp_path / "a.pt", content)), ResNet)


PLAIN = [
    *(("data", "image_size", value) for value in (0, -8, "8", 8.5, 20000, True, 2**70, None)),
    *(("data", "split_seed", value) for value in (-1, 0.5, 2**32)),
    *(("data", "val_fraction", value) for value in (NAN, -0.1, 1.5, "0.1")),
    *(("data", "flip", value) for value in (1, "yes")),
    ("data", "name", 3),
    *(("normalisation", "std", value) for value in ([0.4, 0.0, 0.6], [0.4, -1.0, 0.6], [INFINITY] * 3, [0.4], 0.4)),
    *(("normalisation", "mean", value) for value in ([NAN, 0.2, 0.3], [], "0.1", [[0.1], [0.2], [0.3]], [10**400] * 3)),
    *(("metrics", "accuracy", value) for value in (NAN, "high", 2.0, None)),
    *(("metrics", "computation", value) for value in (INFINITY, -1.0)),
    *(("original", "parameters", value) for value in (0, NAN, "6146")),
    *(("original", "flops", value) for value in (0, -1)),
    ("original", "accuracy", NAN),
    ("progress", "step", "four"),
    *(("architecture", "depth", value) for value in ("8", 8.0, True, -8)),
    *(("architecture", "width", value) for value in (0, -4, "4", 4.0)),
    ("architecture", "ranks", 3),
    *(("architecture", "ranks", {"blocks.0.conv2": value}) for value in (3, [3], [3, 0], [3, -2], [3, "2"], [3, 2, 1])),
    ("architecture", "inner", {"blocks.0": 2.5}),
    ("architecture", "depthwise", [["blocks.0.conv2"]]),
    ("architecture", "fixed_switches", {"blocks.1": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "key", "value"), PLAIN)
def test_a_plain_value_that_no_stage_saves(tmp_path: Path, content: dict, field: str, key: str, value: object):
    changed = {**content, field: {**content[field], key: value}}
    refused(tmp_path, changed, rf"cannot be used, {field}\.{key} is .*, but must be .*: use another one")


@pytest.mark.parametrize(
    ("field", "value"), [("stage", "sq"), ("seed", -1), ("seed", True), ("classes", ["left", "middle", 3])]
)
def test_a_field_that_no_stage_saves(tmp_path: Path, content: dict, field: str, value: object):
    refused(tmp_path, {**content, field: value}, f"a.pt (cannot be used, {field} is .*, but must be |is no checkpoint)")


@pytest.mark.parametrize("field", ["data", "normalisation", "metrics", "original", "architecture"])
def test_a_missing_key(tmp_path: Path, content: dict, field: str):
    for key in contents.RESNET if field == "architecture" else contents.RULES[field]:
        if not key.endswith("?"):
            changed = {**content, field: {k: v for k, v in content[field].items() if k != key}}
            refused(tmp_path, changed, f"{field}.{key} is missing")


IDENTITY = {"set_aside": torch.arange(5), "train": "3f", "val": "a0", "test": "77"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("set_aside", value) for value in ([1, 2], torch.zeros(3), torch.zeros(1).long().expand(HUGE), None)),
        ("train", 3),
        ("val", None),
    ],
)
def test_what_identifies_the_images(tmp_path: Path, content: dict, key: str, value: object):
    accepted = {**content, "data": {**content["data"], **IDENTITY}}
    load_checkpoint(saved(tmp_path / "a.pt", accepted))
    accepted["data"][key] = value
    refused(tmp_path, accepted, rf"cannot be used, data\.{key} is .*, but must be ")


@pytest.mark.parametrize("classes", [["left", "middle"], ["left", "middle", "right", "up"], ["left", "left", "right"]])
def test_as_many_names_as_outputs(tmp_path: Path, content: dict, classes: list[str]):
    refused(tmp_path, {**content, "classes": classes}, r"classes has \d different names for 3 outputs")


WEIGHTS: dict[str, Callable[[torch.Tensor], object]] = {
    "text": lambda w: "weights",
    "None": lambda w: None,
    "sparse": lambda w: w.to_sparse(),
    "expanded": lambda w: w[:1, :1, :1, :1].clone().expand(w.shape),
    "expanded to more": lambda w: torch.zeros(1).expand(HUGE),
    "strided": lambda w: torch.zeros(4).as_strided(w.shape, (1, 0, 0, 0)),
    "without values": lambda w: w.to("meta"),
    "of another shape": lambda w: w[:1],
    "integer": lambda w: w.int(),
    "complex": lambda w: w.to(torch.complex64),
    "double": lambda w: w.double(),
    "quantised": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "not a number": lambda w: w * NAN,
}


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_a_weight_that_no_stage_saves(tmp_path: Path, content: dict, change: Callable):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = {**content["weights"], "stem.0.weight": change(content["weights"]["stem.0.weight"])}
        refused(tmp_path, {**content, "weights": weights}, r"a.pt cannot be used, .*weight")


def test_every_weight_needs_values_of_its_own(tmp_path: Path, content: dict):
    """Thousands of names for the same values would take thousands of times the file's memory."""
    shared = torch.zeros(max(w.numel() for w in content["weights"].values()))
    weights = {
        name: shared[: w.numel()].view(w.shape) if w.numel() > 1 else w for name, w in content["weights"].items()
    }
    refused(tmp_path, {**content, "weights": weights}, "the weights show more values than the file holds")


@pytest.mark.parametrize("key", ["stem.0.weight", "stem.1.num_batches_tracked"])
def test_a_weight_more_or_less(tmp_path: Path, content: dict, key: str):
    weights = {name: w for name, w in content["weights"].items() if name != key}
    for changed in (weights, {**content["weights"], "more": torch.zeros(1)}, {**content["weights"], 3: torch.zeros(1)}):
        message = r"weights do not fit the architecture: .* is in one of them only"
        refused(tmp_path, {**content, "weights": changed}, message)


@pytest.mark.parametrize(
    "change",
    [
        *({"depth": depth} for depth in (60_000_008, 1202)),
        *({"width": width} for width in (1500, 10**9, 2**70)),
        {"num_classes": 10**9},
        *({"ranks": ranks} for ranks in ({"blocks.0.conv2": [HUGE, HUGE]}, {"nowhere": [1, 1]})),
        {"inner": {"blocks.0": HUGE}},
        {"depthwise": ["nowhere"]},
        {"fixed_switches": {"blocks.7": 0}},
        *({"gate": gate} for gate in ("wooden", ["rnn"])),
        *({"network": network} for network in ("vgg", None)),
        {"colour": "blue"},
    ],
    ids=str,
)
def test_an_architecture_is_compared_before_it_is_built(tmp_path: Path, content: dict, change: dict, monkeypatch):
    built = []
    monkeypatch.setattr(torch.Tensor, "normal_", lambda w, *_: built.append(w.numel()) or w)
    changed = {**content, "architecture": {**content["architecture"], **change}}
    if "num_classes" in change:
        changed["classes"] = list(range(3))
    refused(tmp_path, changed, r"not fit the architecture|classes is")
    assert not built


def test_a_skeleton_takes_no_memory():
    weights = contents.skeleton(build_network("resnet", depth=8, num_classes=3).architecture | {"width": 4096})
    assert all(w.is_meta for w in weights.state_dict().values())


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
