"""What a switch can know: regressions, prices and thresholds of the benchmark, and all of it on a tiny chain."""

import json
from pathlib import Path

import pytest
import torch
from networks import lively_network

from benchmarks import regressions, switch_knowledge
from benchmarks.regressions import convolutional, linear, multilayer
from benchmarks.switch_knowledge import per_flop, r_squared, threshold_for
from utils.flops import network_cost
from utils.runs.checkpoint import load_checkpoint


def test_regressions_explain_what_they_can_and_no_more():
    """A linear map and noise of known variance; a square, which only the multilayer one can follow."""
    torch.manual_seed(0)
    x, other = torch.randn(6000, 5), torch.randn(3000, 5)
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x @ weights + 2.0 * torch.randn(len(x)) + 7

    share = weights.square().sum().item() / (weights.square().sum().item() + 4.0)
    explained = r_squared(linear(x, noisy(x))(other)[:, None], noisy(other)[:, None]).item()
    assert explained == pytest.approx(share, abs=0.03)
    square = x[:, 0].square()
    assert abs(r_squared(linear(x, square)(other)[:, None], other[:, :1].square()).item()) < 0.05
    assert r_squared(multilayer(x, square)(other)[:, None], other[:, :1].square()).item() > 0.8


def test_a_regression_on_maps_sees_what_means_do_not():
    """Where something is in a map, not how much of it: the means over all positions are the same."""
    torch.manual_seed(0)
    size, images = 8, 4000
    maps, column = torch.zeros(images, 3, size, size), torch.randint(size, (images,))
    maps[torch.arange(images), :, torch.randint(size, (images,)), column] = 8
    y = (2 * (column - 3.5) / 7).square()  # by how far it is from the middle, mirrored or not
    model = convolutional(maps[:3500], y[:3500])
    assert r_squared(model(maps[3500:])[:, None], y[3500:, None]).item() > 0.5


def test_the_threshold_leaves_the_computation_that_is_asked_for():
    torch.manual_seed(0)
    network = lively_network("sp", "rnn")
    cost = network_cost(network, 8)
    prices = per_flop(torch.rand(50, len(network.deciding)), network, cost)
    dearest = max(cost.blocks) / (50 * cost.flops)
    for asked in (1.0, 0.8, 0.6):
        keep = prices > threshold_for(asked, prices, network, cost)
        left = cost.executed(keep.float()).mean().item() / cost.flops
        assert asked - 1e-9 <= left <= asked + dearest


def test_all_of_it_on_a_tiny_chain(chain: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (run,) = (path.parent for path in chain.glob("rl_pruned/*/*/*/best.pt"))
    checkpoint = run / "unsettled.pt" if (run / "unsettled.pt").exists() else run / "best.pt"
    given = ["--checkpoint", checkpoint, "--data_dir", shapes, "--computation", 0.9, "--out", tmp_path / "known"]
    monkeypatch.setattr("sys.argv", ["switch_knowledge", *map(str, given), "--num_workers", "0"])
    monkeypatch.setattr(regressions, "STEPS", 20)
    switch_knowledge.main()
    content = json.loads((tmp_path / "known.json").read_text())
    switches = len(load_checkpoint(checkpoint).network().deciding)
    assert {row["decider"] for row in content["rows"]} == set(switch_knowledge.DECIDERS)
    assert {name: len(own) for name, own in content["r_squared"].items()} == dict.fromkeys(
        ("linear", "multilayer", "convolutional"), switches
    )
    assert len(content["blocks"]) == switches
    assert all(0.5 <= row["computation"] <= 1 for row in content["rows"])
    assert (tmp_path / "known.md").read_text() == switch_knowledge.table(content)
