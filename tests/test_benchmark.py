"""The inference benchmark and Torch-Pruning's networks at a tiny size."""

import json

import pytest
import torch
from commands import call, run_folder
from torch.nn import functional as F

from benchmarks import inference
from benchmarks.competitor import IMPORTANCES, Competitor, _gradients, torch_pruned
from models import build_network
from utils.data.images import evenly_spaced
from utils.flops import network_cost
from utils.runs.run import BEST


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("everywhere", [False, True])
def test_competitors_have_the_flops_asked_for_and_narrow_the_residual_stream(importance, everywhere):
    torch.manual_seed(0)
    network = build_network("resnet", depth=8, num_classes=3, width=16, gate="rnn").eval()
    whole = network_cost(network, 8).flops
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(3, (8,)))]
    smaller = torch_pruned(network, Competitor(importance, everywhere), 0.4 * whole, 8, batches)
    assert 0.9 * 0.4 * whole < network_cost(smaller, 8).flops <= 1.02 * 0.4 * whole
    assert smaller.switches == 0 and smaller.stem[0].out_channels == smaller.blocks[0].conv2.out_channels
    assert smaller.classifier.in_features < network.classifier.in_features
    assert smaller(batches[0][0]).logits.shape == (8, 3)


def test_hessian_importance_reads_squared_gradients_of_single_images():
    torch.manual_seed(0)
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
