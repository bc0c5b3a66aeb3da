"""Stage 2 from a checkpoint to a budget, by its command."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from commands import ROOT
from forks import Forked

from models import build_network
from utils.flops import network_cost
from utils.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


@pytest.fixture
def trained(tmp_path) -> Path:
    torch.manual_seed(0)
    network = build_network("resnet", depth=8, num_classes=3, width=8, gate="rnn")
    cost = network_cost(network, 8)
    checkpoint = Checkpoint(
        stage="sp",
        architecture=network.architecture,
        weights=network.state_dict(),
        normalisation={"mean": [0.3] * 3, "std": [0.3] * 3},
        classes=["left", "middle", "right"],
        data={"name": "shapes", "image_size": 8, "flip": False, "val_fraction": 0.2, "split_seed": 0},
        metrics={"accuracy": 0.3, "computation": 1.0},
        original={"accuracy": 0.3, "parameters": cost.parameters, "flops": cost.flops},
        seed=0,
    )
    save_checkpoint(tmp_path / "trained.pt", checkpoint)
    return tmp_path / "trained.pt"


def prune(trained: Path, data: Path, *settings: str) -> subprocess.CompletedProcess:
    given = [
        *("depth=8", "width=8", "resize=8", f"data_dir={data}", f"checkpoint={trained}", "num_workers=0"),
        *(f"result_dir={trained.parent}/results", "batch_size=32", "epochs_start=1", "epochs_end=1", "max_iter=2"),
        *("max_accuracy_drop=1", *settings),
    ]
    options = [part for setting in given for part in ("--set", setting)]
    return Forked(ROOT / "main_prune.py", ["--config_path", str(ROOT / "config.json"), *options]).finished(timeout=240)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("flops", ["objective=flops", "decomposition=tucker", "distill=0.5"]),
        ("parameters", ["criterion=kron_obs", "reestimate_batch_norm=false", "prune_ratio_limit=0.95", "round_to=1"]),
    ],
)
def test_the_last_iteration_lands_on_the_target(trained, shapes, kind, settings):
    done = prune(trained, shapes, f"target_{kind}=0.5", *settings)
    assert done.returncode == 0, done.stderr
    (run,) = (trained.parent / "results" / "pruned").glob("*/*/*")
    whole = network_cost(load_checkpoint(trained).network(), 8)
    costs = [network_cost(load_checkpoint(run / f"iteration_0{i}.pt").network(), 8) for i in (1, 2)]
    shares = [getattr(cost, kind) / getattr(whole, kind) for cost in costs]
    assert 0.98 * 0.5**0.5 <= shares[0] <= 0.5**0.5
    assert 0.98 * 0.5 <= shares[1] <= 0.5
    assert (run / "ranks.png").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    pruned = [line for line in lines if "Pruning/measured_rise" in line]
    assert len(pruned) == 2 and all("Pruning/predicted_rise" in line for line in pruned)


def test_a_target_out_of_reach_is_one_sentence(trained, shapes):
    done = prune(trained, shapes, "target_flops=0.01")
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: target_flops asks for") and "raise the target" in error
