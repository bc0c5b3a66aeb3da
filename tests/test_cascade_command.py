"""``main_cascade.py`` on what the stages left: the choice, the row, the checkpoint, and what users get wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run_folder
from test_cascade import CLASSES, members

import main_cascade
from deploy import export, predict
from models import Cascade
from utils.errors import UserError
from utils.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


def cascade(monkeypatch, data: Path, results: Path, *flags: str) -> None:
    given = [
        "--depth",
        "8",
        "--resize",
        "8",
        "--num_workers",
        "1",
        "--data_dir",
        str(data),
        "--result_dir",
        str(results),
    ]
    monkeypatch.setattr("sys.argv", ["main_cascade.py", *given, *flags])
    main_cascade.main()


def test_a_cascade_of_what_the_stages_left(chain, shapes, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    shutil.copytree(chain, results)
    cascade(monkeypatch, shapes, results, "--max_accuracy_drop", "0.9")
    said = capsys.readouterr().out
    assert "chosen:" in said and "| w/ Static Pruning and Cascade |" in said
    folder = run_folder(results, "cascade")
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
    answers_alike(monkeypatch, capsys, shapes, folder / "best.pt", tmp_path / "exported")


def answers_alike(monkeypatch, capsys, data: Path, checkpoint: Path, exported: Path) -> None:
    """The exported cascade, in float and int8, is checked against PyTorch; prediction says who answered."""
    given = ["--checkpoint", str(checkpoint), "--output", str(exported), "--data_dir", str(data), "--int8"]
    monkeypatch.setattr("sys.argv", ["export.py", *given, "--num_workers", "1"])
    export.main()
    assert "logits within" in capsys.readouterr().out
    assert json.loads((exported / "labels.json").read_text())["members"]
    image = str(next((data / "test").glob("*/*.png")))
    said = []
    for source in (["--checkpoint", str(checkpoint)], ["--onnx", str(exported)]):
        monkeypatch.setattr("sys.argv", ["predict.py", *source, image])
        predict.main()
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and " answered" in said[0]


def test_what_users_get_wrong(chain, shapes, tmp_path, monkeypatch):
    results = tmp_path / "results"
    shutil.copytree(chain, results)
    dense = str(next(results.glob("sp/*/*/*/best.pt")))
    static = str(next(results.glob("pruned/*/*/*/best.pt")))
    with pytest.raises(UserError, match="a cascade needs two networks or more, and there are 1"):
        cascade(monkeypatch, shapes, results, "--networks", dense)
    with pytest.raises(UserError, match="out of reach: the cheapest cascade takes"):
        cascade(monkeypatch, shapes, results, "--target_flops", "0.0001")
    checkpoint = load_checkpoint(static)
    for data, message in (
        ({"split_seed": 3, "set_aside": torch.tensor([1, 2])}, "lacks 2 of the 2 images"),
        ({"image_size": 16}, "trained on images of 16 pixels, not 8"),
    ):
        other = tmp_path / "other.pt"
        save_checkpoint(other, replace(checkpoint, data={**checkpoint.data, **data}))
        with pytest.raises(UserError, match=message):
            cascade(monkeypatch, shapes, results, "--networks", dense, str(other))
    aside = checkpoint.data["set_aside"]
    save_checkpoint(other, replace(checkpoint, data={**checkpoint.data, "set_aside": aside[:-2]}))
    with pytest.raises(UserError, match="have set different validation images aside"):
        cascade(monkeypatch, shapes, results, "--networks", dense, str(other))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"thresholds": [0.5, 0.6]}, "2 networks and 2 thresholds"),
        ({"thresholds": [1.5]}, "architecture.thresholds is"),
        ({"answer": "first"}, "answer 'first' is unknown"),
        ({"members": []}, "classes where one number belongs"),
    ],
)
def test_a_cascade_edited_by_hand(change: dict, message: str, tmp_path: Path):
    network = Cascade(members()[:2], (0.5,), "mean")
    checkpoint = Checkpoint(
        stage="cascade",
        architecture={**network.architecture, **change},
        weights=network.state_dict(),
        normalisation=main_cascade.PLAIN,
        classes=[str(i) for i in range(CLASSES)],
        data={"name": "shapes", "image_size": 16, "flip": True, "val_fraction": 0.1, "split_seed": 0},
        metrics={"accuracy": 0.5, "computation": 0.5},
        original={"accuracy": 0.5, "parameters": 1, "flops": 1},
        seed=0,
    )
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "best.pt")
