"""Checkpoints: what goes in comes out, a failing write costs nothing, no file runs code, damaged ones are refused."""

import os
import pickle
import resource
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call
from compare import assert_close
from conftest import MakesAFolder
from networks import (
    NORMALISATION,
    RANKS,
    SEPARABLE,
    checkpoint_file,
    checkpoint_of,
    edits_to,
    lively_network,
    small_network,
    varied_images,
)

from models import ResNet, build_network
from scripts import keep
from utils.data.augment import Normalisation
from utils.errors import UserError
from utils.runs.checkpoint import FORMAT, Checkpoint, load_checkpoint, load_network, plain_normalisation
from utils.runs.checkpoint import save_checkpoint as save


def trained(network: ResNet) -> Checkpoint:
    optimiser = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    network(torch.randn(4, 3, 8, 8)).logits.sum().backward()
    optimiser.step()
    training = {"optimiser": optimiser.state_dict(), "random": {"data": torch.Generator().get_state()}}
    more = {"training": training, "metrics": {"accuracy": 2 / 3, "computation": 0.9}, "source": "sp/best.pt", "seed": 5}
    more["normalisation"] = plain_normalisation(Normalisation((0.1, 0.2, 1 / 3), (0.4, 0.5, 0.6)))
    return checkpoint_of(network, "pruned", 8, progress={"step": 4, "fewest": float("inf")}, **more)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Checkpoint]:
    path, checkpoint = tmp_path / "best.pt", trained(lively_network("rl_pruned", "rnn"))
    save(path, checkpoint)
    return path, checkpoint


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("stage", "gate"), [("sp", "none"), ("pruned", "none"), ("sp", "rnn"), ("rl_pruned", "rnn")])
def test_the_network_comes_back_with_identical_logits(tmp_path: Path, stage: str, gate: str):
    network = lively_network(stage, gate)
    again = load_network(checkpoint_file(tmp_path / "best.pt", network))
    assert not again.training and again.architecture == network.architecture
    assert again.state_dict().keys() == network.state_dict().keys()
    images = NORMALISATION.apply(varied_images(32))
    with torch.no_grad():
        expected, result = network(images), again(images)
    for name, value in expected._asdict().items():
        assert torch.equal(value, getattr(result, name)), name
    if stage == "rl_pruned":
        assert 0 < expected.decisions.mean() < 1, "the switches must not all agree, or the test says little of them"


def test_everything_else_comes_back_too(written: tuple[Path, Checkpoint]):
    path, before = written
    after = load_checkpoint(path)
    assert_close(vars(after), {**vars(before), "weights": dict(before.weights)}, "checkpoint")
    assert after.normaliser() == Normalisation((0.1, 0.2, 1 / 3), (0.4, 0.5, 0.6))
    assert len(after.training["optimiser"]["state"]) > 10


def test_others_may_read_a_checkpoint(written: tuple[Path, Checkpoint]):
    assert written[0].stat().st_mode & 0o777 == 0o644


def test_a_full_disk_leaves_the_old_file(written: tuple[Path, Checkpoint]):
    path, checkpoint = written
    old = path.read_bytes()
    assert len(old) > 20_000
    with files_of_at_most(10_000), pytest.raises(UserError, match=f"checkpoint {path} cannot be written"):
        save(path, replace(checkpoint, seed=6))
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name], "no temporary file stays behind"


@pytest.mark.parametrize(("share", "noise"), [(0.0, 0), (0.25, 0), (0.5, 0), (0.999, 0), (0.5, 20_000), (0.0, 100)])
def test_a_truncated_or_overwritten_file_is_refused(written: tuple[Path, Checkpoint], share: float, noise: int):
    path, _ = written
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)] + np.random.default_rng(0).bytes(noise))
    with pytest.raises(UserError, match=f"checkpoint {path} cannot be read"):
        load_network(path)


def plain(checkpoint: Checkpoint) -> dict:
    return {"format": FORMAT, **{f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}}


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["weights"],
        lambda content: [content],
        lambda content: {**content, "format": "another-checkpoint-7"},
        lambda content: {k: v for k, v in content.items() if k != "format"},
        lambda content: {k: v for k, v in content.items() if k != "classes"},
        lambda content: {**content, "more": 1},
    ],
    ids=["weights only", "list", "other format", "no format", "key missing", "key of another version"],
)
def test_a_foreign_file_is_refused(tmp_path: Path, written: tuple[Path, Checkpoint], change):
    path = tmp_path / "foreign.pt"
    torch.save(plain(written[1]), path)
    load_checkpoint(path)
    torch.save(change(plain(written[1])), path)
    with pytest.raises(UserError, match=f"{path} is no checkpoint of this program"):
        load_checkpoint(path)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_file_that_carries_code_is_refused_and_does_not_run(tmp_path: Path, written, write, recwarn):
    victim, path = tmp_path / "victim", tmp_path / "hostile.pt"
    write({**plain(written[1]), "progress": {"step": MakesAFolder(victim)}}, path)
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert victim.exists(), "the test's own file must be able to do harm"
    victim.rmdir()

    recwarn.clear()
    with pytest.raises(UserError, match=f"checkpoint {path} cannot be read"):
        load_network(path)
    assert not victim.exists() and not recwarn.list


def test_a_kept_checkpoint_has_half_the_size_and_the_same_network_within_bf16(tmp_path: Path):
    before = trained(lively_network("pruned", "none"))
    save(tmp_path / "best.pt", before)
    call(keep, tmp_path / "best.pt", tmp_path / "kept.pt")
    content = torch.load(tmp_path / "kept.pt", weights_only=True)
    assert {w.dtype for w in content["weights"].values() if w.is_floating_point()} == {torch.bfloat16}
    kept = load_checkpoint(tmp_path / "kept.pt")
    assert kept.training == {} and kept.metrics == before.metrics
    for name, weight in kept.network().state_dict().items():
        torch.testing.assert_close(weight, before.weights[name], rtol=2**-8, atol=0)


@pytest.fixture(scope="module")
def content() -> dict:
    """What stands in a small file that is accepted."""
    return plain(checkpoint_of(small_network(edits=edits_to({"blocks.0.conv2": (3, 2)})), "pruned", 8))


def saved(path: Path, content: dict) -> Path:
    torch.save(content, path)
    return path


def refused(folder: Path, content: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_network(saved(folder / "a.pt", content))


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, content: dict):
    spoiled = content["weights"]["stem.0.weight"] * float("nan")
    message = r"a.pt cannot be used, the weight 'stem\.0\.weight' is not finite"
    refused(tmp_path, {**content, "weights": {**content["weights"], "stem.0.weight": spoiled}}, message)


def test_a_weight_more_or_less(tmp_path: Path, content: dict):
    weights = {name: w for name, w in content["weights"].items() if name != "stem.0.weight"}
    refused(tmp_path, {**content, "weights": weights}, r"cannot be built .*stem\.0\.weight")
    refused(tmp_path, {**content, "weights": {**content["weights"], "more": torch.zeros(1)}}, "cannot be built .*more")


LAYER = "blocks.1.conv1"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        *(({"depth": depth}, r"6n\+2") for depth in (2, 7, 9, 31, 33, -8)),
        *(({"depth": depth}, "TypeError") for depth in ("8", None)),
        *(({"width": width}, "") for width in (0, "4", 8)),
        ({"edits": 3}, "not int"),
        ({"edits": [{"name": "stem.0"}]}, "KeyError"),
        ({"edits": edits_to({"nowhere": [1, 1]})}, "the layer 'nowhere'"),
        ({"edits": edits_to({LAYER: [3]})}, "expected 2, got 1"),
        ({"edits": edits_to({LAYER: [3, 0]})}, "ranks are 3 and 0"),
        *(({"inner": inner}, "inner gives") for inner in ({"blocks.7": 3}, {"blocks.1": 0})),
        ({"inner": {"blocks.0": 2.5}}, ""),
        *(({"edits": edits_to({LAYER: [4, r]}, [LAYER])}, "has two equal ranks") for r in (None, 5)),
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
    refused(tmp_path, changed, f"the checkpoint's network cannot be built .*{word}")


def test_architectures_of_earlier_versions_build_the_same_network():
    expected = lively_network("pruned", "rnn")
    architecture = {k: v for k, v in expected.architecture.items() if k != "edits"}
    network = build_network(**architecture, ranks=RANKS, depthwise=SEPARABLE)
    assert network.state_dict().keys() == expected.state_dict().keys()
    network.load_state_dict(expected.state_dict())
    assert network.architecture == expected.architecture


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("data", {}, "KeyError: 'image_size'"),
        ("data", {"image_size": "wide"}, "ValueError: resize is 'wide'"),
        ("normalisation", {"mean": [0, 0, 0]}, "KeyError: 'std'"),
        ("normalisation", {"mean": [0, 0, 0], "std": [1, 0, 1]}, r"std is \[1, 0, 1\]"),
        ("weights", [], "AttributeError"),
        ("weights", {"stem.0.weight": "heavy"}, "weights are no tensors"),
        ("classes", ["a"], "1 classes for 3 outputs"),
    ],
    ids=str,
)
def test_entries_that_do_not_fit(tmp_path: Path, content: dict, entry: str, value: object, message: str):
    refused(tmp_path, {**content, entry: value}, f"a.pt has entries that do not fit .*{message}")


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
