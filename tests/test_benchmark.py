"""The benchmarks at a tiny size, Torch-Pruning's networks, and what the tables say."""

import json

import pytest
import torch
from commands import call, run_folder
from torch import nn
from torch.nn import functional as F

from benchmarks import architectures, inference, torchvision_models, training
from benchmarks.competitor import IMPORTANCES, _gradients, torch_pruned
from benchmarks.torchvision_models import table
from deploy.timing import Timing
from models import build_network
from utils.data.images import evenly_spaced
from utils.errors import UserError
from utils.flops import network_cost
from utils.runs.run import BEST


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_competitors_have_the_flops_asked_for_and_narrow_the_residual_stream(importance):
    network = build_network("resnet", depth=8, num_classes=3, width=16, gate="rnn").eval()
    whole = network_cost(network, 8).flops
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(3, (8,)))]
    smaller = torch_pruned(network, importance, 0.4 * whole, 8, batches)
    assert 0.9 * 0.4 * whole < network_cost(smaller, 8).flops <= 1.02 * 0.4 * whole
    assert smaller.switches == 0 and smaller.stem[0].out_channels == smaller.blocks[0].conv2.out_channels
    assert smaller.classifier.in_features < network.classifier.in_features
    assert smaller(batches[0][0]).logits.shape == (8, 3)


def test_hessian_importance_reads_squared_gradients_of_single_images():
    plain = build_network("resnet", depth=8, num_classes=3, width=2, gate="none").eval()
    x, y = torch.randn(5, 3, 8, 8), torch.randint(3, (5,))
    found = _gradients(plain, "Hessian", [(x[:3], y[:3]), (x[3:], y[3:])])
    expected = 0
    for image, label in zip(x, y, strict=True):
        loss = F.cross_entropy(plain(image[None]).logits, label[None])
        expected = expected + torch.autograd.grad(loss, plain.blocks[0].conv1.weight)[0].square() / 5
    names = [name for name, _ in plain.named_parameters()]
    torch.testing.assert_close(found[names.index("blocks.0.conv1.weight")], expected)


def test_command_measures_networks_with_and_without_switches_in_turns(chain, shapes, tmp_path, monkeypatch, capsys):
    files = [str(run_folder(chain, stage) / BEST) for stage in ("sp", "pruned", "rl_pruned")]
    given = [*files, "--data_dir", str(shapes), "--int8", "--seconds", "0", "--output", str(tmp_path / "times.json")]
    monkeypatch.setattr(inference, "BATCHES", (1, 4))
    monkeypatch.setattr(inference, "TIMED_IMAGES", 4)
    call(inference, *given)
    rows = json.loads((tmp_path / "times.json").read_text())["rows"]
    assert [(row["precision"], row["network"]) for row in rows] == [
        (precision, name) for precision in ("float32", "int8") for name in files
    ]
    records = json.loads((chain / "results.json").read_text())
    for row, record in zip(rows, records, strict=False):
        assert row["accuracy"] == pytest.approx(record["accuracy"], abs=1e-9)
        assert min(row["milliseconds"].values()) > 0 and list(row["milliseconds"]) == ["1", "4"]
    for row, record in zip(rows[:2], records, strict=False):
        assert row["gflops"] == pytest.approx(record["gflops"], rel=1e-9)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 6


def test_the_table_says_how_much_of_the_saving_is_kept():
    rows = [inference.Row("float32", "a", 0.9, 0.4, {"1": 8.0}), inference.Row("float32", "b", 0.8, 0.1, {"1": 2.5})]
    assert inference.table(rows).splitlines()[-1] == "| float32 | b | 80.00% | 0.1000 | 4.00x | 2.5 ms, 3.20x (0.80) |"


def test_timed_images_are_spread_over_all():
    assert evenly_spaced(9, 3).tolist() == [0, 4, 8]
    assert evenly_spaced(3, 5).tolist() == [0, 0, 1, 1, 2]
    assert evenly_spaced(50000, 50000).tolist() == list(range(50000))


@pytest.mark.parametrize("data", ["made", "given"])
def test_command_measures_every_competitor(data, shapes, monkeypatch, capsys):
    settings = {"depth": 8, "width": 4, "resize": 8, "images": 32, "bs": 16, "num_workers": 0, "seconds": 0}
    flags = [f"--{name}={value}" for name, value in {**settings, "threads": 1}.items()]
    before = sorted(path for path in shapes.rglob("*"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    call(training, *flags, *([f"--data_dir={shapes}"] if data == "given" else []))
    assert sorted(path for path in shapes.rglob("*")) == before, "the data folder is left alone"
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in (training.PLAIN, "stage 1 without gates", *training.AGAINST))


def test_the_table_follows_from_the_times():
    seconds = {"plain loop": 2.0, "stage 1": 1.0, "stage 1 without gates": 0.75}
    timings = {name: Timing(t, t / 2, 2 * t) for name, t in seconds.items()}
    lines = training.table(timings, images=100).splitlines()
    assert lines[3] == "| stage 1 | 100 (50 to 200) | plain loop | 2.00x |"
    assert lines[-1] == "The gates take 25.0% of stage 1's step."


def row(name: str, left: int, **more):
    return {
        "network": name, "size": 64, "flops": 1000, "smaller_flops": left, "parameters": 200, "smaller_parameters": 50,
        "bytes": 30, "step_bytes": 20, "seconds": 1.4, **more,
    }  # fmt: skip


def test_table_counts_networks_within_two_percent_of_the_budget_and_exported_ones():
    rows = [row("low", 686, deviation=1e-6), row("lower", 685, not_exported="it has branches"), row("above", 715)]
    first, *_, lower, above, last = table(rows, 0.7).split("\n")
    assert first == "3 networks to 70% of their FLOPs: 1 within 2% of the target, 1 exported."
    assert lower == "| lower | 64 | 0.000 | 68.5% | 25.0% | no | 1.5 | 1 |"
    assert above.startswith("| above | 64 | 0.000 | 71.5%") and last == ""


def test_a_network_that_torchvision_does_not_have_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(UserError, match="torchvision has no resnet19: see"):
        call(torchvision_models, "--only", "resnet18", "resnet19", "--out", tmp_path / "found")
    assert not list(tmp_path.iterdir())


def test_another_network_is_trained_compressed_and_fine_tuned_once(shapes, tmp_path, monkeypatch):
    layers = (nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    monkeypatch.setattr(architectures, "vgg", lambda: nn.Sequential(*layers, nn.Linear(16, 10)))
    flags = {
        "epochs": 1,
        "fine_tuning": 1,
        "images": 32,
        "networks": "vgg",
        "data_dir": shapes,
        "out": tmp_path / "found",
    }
    for _ in range(2):
        call(architectures, *(f"--{name}={value}" for name, value in flags.items()))
    (line,) = (tmp_path / "found.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert 0.4 < found["flops"][1] / found["flops"][0] <= 0.5
    assert all(0 <= found[key] <= 1 for key in ("accuracy", "compressed", "fine_tuned", "control"))


def test_the_table_of_other_networks_has_shares_of_what_there_was():
    found = {"accuracy": 0.9, "compressed": 0.85, "fine_tuned": 0.895, "control": 0.905}
    found |= {"network": "vgg", "flops": [2_000_000, 999_000], "parameters": [1000, 400]}
    last = architectures.table([found]).splitlines()[-1]
    assert last == "| vgg | 2.0 | 90.00% | 50.0% | 40.0% | 85.00% | 89.50% | 90.50% |"
