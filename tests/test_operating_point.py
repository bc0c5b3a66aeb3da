"""The shift of the switches' logits: what it costs, where the search for it ends, what it leaves behind."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gating import operating_point
from gating.operating_point import REACH, SEARCH, offset_to, seek_operating_point, shifts_undone
from gating.steering import Budget
from models import build_network
from utils.augment import Normalisation
from utils.data import ImageSet
from utils.evaluate import Evaluation, evaluate
from utils.flops import NetworkCost, network_cost

COST = NetworkCost(parameters=1, flops=100, blocks=(40, 30, 20), layers={})


def logits_of(images: int) -> torch.Tensor:
    return torch.randn(images, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


def computation_at(logits: torch.Tensor) -> float:
    return (COST.executed((logits > 0).double()) / COST.flops).mean().item()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.33, 0.61, 0.999, 1.0])
def test_an_offset_opens_as_much_as_fits_in_the_order_of_the_logits(share):
    logits = logits_of(50)
    offset = offset_to(share, torch.sigmoid(logits), COST)
    # Brute force: every number of open switches, the most certain ones first.
    reachable = [computation_at(logits - threshold) for threshold in [99.0, *logits.flatten().tolist(), -99.0]]
    fitting = [c for c in reachable if c <= share + 1e-12]
    assert computation_at(logits + offset) == pytest.approx(max(fitting, default=0.1), abs=1e-12)


class Toy(nn.Module):
    """Switches whose logits are given but for one bias; its accuracy is a function of its computation."""

    def __init__(self, logits, accuracy):
        super().__init__()
        layer = nn.Linear(1, 1).double()
        nn.init.constant_(layer.bias, 0.7)
        self.gate = SimpleNamespace(last_layers=[layer])
        self.logits, self.accuracy = logits, accuracy

    def evaluated(self, *_) -> Evaluation:
        logits = self.logits + self.gate.last_layers[0].bias.detach()
        executed = COST.executed((logits > 0).double())
        accuracy = self.accuracy((executed.mean() / COST.flops).item())
        return Evaluation(0.0, accuracy, COST.flops, executed, (logits > 0).double(), torch.sigmoid(logits))


def sought(monkeypatch, budget, accuracy) -> tuple[Toy, Evaluation, Evaluation]:
    toy = Toy(logits_of(2000), accuracy)
    monkeypatch.setattr(operating_point, "evaluate", toy.evaluated)
    found = toy.evaluated()
    return toy, found, seek_operating_point(toy, None, None, budget, COST, found)


def test_the_least_computation_that_keeps_the_accuracy_is_found_from_both_sides(monkeypatch):
    for needed in (0.56, 0.75):  # the threshold of one half executes 67 %
        _, found, best = sought(monkeypatch, Budget(0.9), lambda c, n=needed: 0.95 if c >= n else 0.8)
        assert found.computation == pytest.approx(0.67, abs=0.01)
        assert best.accuracy == 0.95
        width = REACH if needed < found.computation else 1 - found.computation
        assert needed <= best.computation <= needed + width / 2**SEARCH + 0.001


@pytest.mark.parametrize("target", [0.4, 0.8])
def test_a_target_is_met_from_both_sides(monkeypatch, target):
    _, _, best = sought(monkeypatch, Budget(0.0, target_computation=target), lambda c: c)
    assert target - 0.02 <= best.computation <= target + 0.005


def test_an_accuracy_that_nothing_keeps_leaves_the_best_there_is(monkeypatch):
    _, _, best = sought(monkeypatch, Budget(0.9), lambda c: 0.5 + 0.3 * c)
    assert best.computation > 0.98


@pytest.mark.parametrize("gate", ["rnn", "ff2"])
def test_the_network_stands_where_it_was_evaluated_and_goes_back(gate):
    torch.manual_seed(0)
    network = build_network("resnet", depth=8, num_classes=4, width=8, gate=gate).eval()
    pixels = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8)
    images, normalisation = ImageSet(pixels, torch.randint(0, 4, (200,))), Normalisation((0.5,) * 3, (0.29,) * 3)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    found, cost = evaluate(network, images, normalisation), network_cost(network, 8)
    assert found.computation == 1
    with shifts_undone(network):
        best = seek_operating_point(network, images, normalisation, Budget(0.0, 0.8), cost, found)
        assert 0.8 - REACH < best.computation <= 0.805
        again = evaluate(network, images, normalisation)
        assert again.accuracy == best.accuracy and torch.equal(again.decisions, best.decisions)
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
