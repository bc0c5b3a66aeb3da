"""Checkpoints: what goes in comes out, a failing write costs nothing, no file runs code, damaged ones are refused."""

import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from commands import call
from compare import assert_close
from conftest import MakesAFolder
from networks import (
    NORMALISATION,
    checkpoint_file,
    checkpoint_of,
    edits_to,
    lively_network,
    small_network,
    varied_images,
)

from models import ResNet
from scripts import keep
from utils.data.augment import Normalisation
from utils.errors import UserError
from utils.runs.checkpoint import FORMAT, Checkpoint, load_checkpoint, load_network
from utils.runs.checkpoint import save_checkpoint as save


def trained(network: ResNet) -> Checkpoint:
    optimiser = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    network(torch.randn(4, 3, 8, 8)).logits.sum().backward()
    optimiser.step()
    training = {"optimiser": optimiser.state_dict(), "random": {"data": torch.Generator().get_state()}}
    more = {"training": training, "metrics": {"accuracy": 2 / 3, "computation": 0.9}, "source": "sp/best.pt", "seed": 5}
    more["normalisation"] = asdict(Normalisation((0.1, 0.2, 1 / 3), (0.4, 0.5, 0.6)))
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


def test_a_full_disk_leaves_the_old_file(written: tuple[Path, Checkpoint]):
    path, checkpoint = written
    old = path.read_bytes()
    assert len(old) > 20_000
    with files_of_at_most(10_000), pytest.raises(UserError, match=f"checkpoint {path} cannot be written"):
        save(path, replace(checkpoint, seed=6))
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name], "no temporary file stays behind"


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_refused(written: tuple[Path, Checkpoint], share: float):
    path, _ = written
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=f"checkpoint {path} cannot be read"):
        load_network(path)


def plain(checkpoint: Checkpoint) -> dict:
    return {"format": FORMAT, **{f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}}


@pytest.mark.parametrize(
    "change", [lambda content: content["weights"], lambda content: [content], lambda content: {**content, "format": 7}]
)
def test_a_foreign_file_is_refused(tmp_path: Path, written: tuple[Path, Checkpoint], change):
    path = tmp_path / "foreign.pt"
    torch.save(change(plain(written[1])), path)
    with pytest.raises(UserError, match=f"{path} is no checkpoint of this program"):
        load_checkpoint(path)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_file_that_carries_code_is_refused_and_does_not_run(tmp_path: Path, written, write):
    victim, path = tmp_path / "victim", tmp_path / "hostile.pt"
    write({**plain(written[1]), "progress": {"step": MakesAFolder(victim)}}, path)
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert victim.exists(), "the test's own file must be able to do harm"
    victim.rmdir()
    with pytest.raises(UserError, match=f"checkpoint {path} cannot be read"):
        load_network(path)
    assert not victim.exists()


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


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"depth": 9}, r"6n\+2"),
        ({"width": 8}, "size mismatch"),
        ({"edits": edits_to({"nowhere": [1, 1]})}, "the layer 'nowhere'"),
        ({"gate": "wooden"}, "gate .* is unknown"),
        ({"colour": "blue"}, "'colour'"),
    ],
    ids=str,
)
def test_an_architecture_that_is_no_network_or_another_one(tmp_path: Path, change: dict, word: str):
    checkpoint = checkpoint_of(small_network(), "pruned", 8)
    save(tmp_path / "a.pt", replace(checkpoint, architecture={**checkpoint.architecture, **change}))
    with pytest.raises(UserError, match=f"the checkpoint's network cannot be built .*{word}"):
        load_network(tmp_path / "a.pt")
