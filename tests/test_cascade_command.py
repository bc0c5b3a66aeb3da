"""``main_cascade.py`` on what the stages left: the choice, the row, the checkpoint, and what users get wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import call, run_folder, source_of
from networks import checkpoint_file
from test_cascade import CLASSES, members

import main_cascade
from deploy import export, predict
from models import Cascade
from utils.errors import UserError
from utils.runs.checkpoint import load_checkpoint, save_checkpoint


def cascade(data: Path, results: Path, *flags: object) -> None:
    place = ["--data_dir", data, "--result_dir", results]
    call(main_cascade, "--depth", 8, "--resize", 8, "--num_workers", 1, *place, *flags)


def test_a_cascade_of_what_the_stages_left(copied, shapes, tmp_path, capsys):
    cascade(shapes, copied, "--max_accuracy_drop", 0.9)
    said = capsys.readouterr().out
    assert "chosen:" in said and "| w/ Static Pruning and Cascade |" in said
    folder = run_folder(copied, "cascade")
    record = json.loads((folder / "record.json").read_text())
    best = load_checkpoint(folder / "best.pt")
    network = best.network()
    routing = json.loads((folder / "routing.json").read_text())
    assert record["accuracy"] == pytest.approx(routing["accuracy"], abs=1e-9)
    assert f"| w/ Static Pruning and Cascade | {record['accuracy']:.2%} |" in said
    assert record["stage"] == best.stage == "cascade" and len(network.members) in (2, 3)
    assert record["gflops_executed"] == pytest.approx(record["computation"] * record["gflops_all"])
    assert record["parameters"] == sum(p.numel() for p in network.parameters())
    assert record["latency_ms"] > 0 and (folder / "frontier.png").exists() and (folder / "routing.json").exists()
    answers_alike(capsys, shapes, folder / "best.pt", tmp_path / "exported")


def answers_alike(capsys, data: Path, checkpoint: Path, exported: Path) -> None:
    """The exported cascade, in float and int8, is checked against PyTorch; prediction says who answered."""
    given = ["--checkpoint", checkpoint, "--output", exported, "--data_dir", data, "--int8"]
    call(export, *given, "--num_workers", 1)
    assert "logits within" in capsys.readouterr().out
    assert json.loads((exported / "labels.json").read_text())["members"]
    image = next((data / "test").glob("*/*.png"))
    said = []
    for source in (["--checkpoint", checkpoint], ["--onnx", exported]):
        call(predict, *source, image)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and " answered" in said[0]


def test_what_users_get_wrong(copied, shapes, tmp_path):
    dense, static = (source_of(copied, stage) for stage in ("pruned", "rl_pruned"))
    with pytest.raises(UserError, match="a cascade needs two networks or more, and there are 1"):
        cascade(shapes, copied, "--networks", dense)
    with pytest.raises(UserError, match="out of reach: the cheapest cascade takes"):
        cascade(shapes, copied, "--target_flops", "0.0001")
    checkpoint = load_checkpoint(static)
    for data, message in (
        ({"split_seed": 3, "set_aside": torch.tensor([1, 2])}, "lacks 2 of the 2 images"),
        ({"image_size": 16}, "trained on images of 16 pixels, not 8"),
    ):
        other = tmp_path / "other.pt"
        save_checkpoint(other, replace(checkpoint, data={**checkpoint.data, **data}))
        with pytest.raises(UserError, match=message):
            cascade(shapes, copied, "--networks", dense, other)
    aside = checkpoint.data["set_aside"]
    save_checkpoint(other, replace(checkpoint, data={**checkpoint.data, "set_aside": aside[:-2]}))
    with pytest.raises(UserError, match="have set different validation images aside"):
        cascade(shapes, copied, "--networks", dense, other)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"thresholds": [0.5, 0.6]}, "2 networks and 2 thresholds"),
        ({"thresholds": [1.5]}, "architecture.thresholds is"),
        ({"answer": "first"}, "answer 'first' is unknown"),
        ({"members": []}, "members must have the same number of classes"),
    ],
)
def test_a_cascade_edited_by_hand(change: dict, message: str, tmp_path: Path):
    network = Cascade(members()[:2], (0.5,), "mean")
    architecture, classes = {**network.architecture, **change}, [str(i) for i in range(CLASSES)]
    path = checkpoint_file(tmp_path / "best.pt", network, "cascade", architecture=architecture, classes=classes)
    with pytest.raises(UserError, match=message):
        load_checkpoint(path)
