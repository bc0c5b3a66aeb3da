"""The shift of the switches' logits: what it costs, where the search for it ends, what it leaves behind."""

import json
from types import SimpleNamespace

import pytest
import torch
from commands import call, metrics, run_folder, source_of
from torch import nn

import main_rl_prune
from gating.operating_point import REACH, SEARCH, find_operating_point, gate_biases_restored, offset_to
from gating.steering import Budget
from models import build_network
from training.evaluate import Evaluation, Evaluator
from training.norms import placed
from utils.data.augment import Normalisation
from utils.data.batches import split_data
from utils.data.folder import load_data
from utils.data.images import ImageSet
from utils.flops import NetworkCost, network_cost
from utils.runs.checkpoint import load_checkpoint
from utils.runs.run import BEST

COST = NetworkCost(parameters=1, flops=100, blocks=(40, 30, 20), layers={})
FREE = [0, 1, 2]


def logits_of(images: int) -> torch.Tensor:
    return torch.randn(images, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


def computation_at(logits: torch.Tensor) -> float:
    return (COST.executed((logits > 0).double()) / COST.flops).mean().item()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.33, 0.61, 0.999, 1.0])
def test_an_offset_opens_as_much_as_fits_in_the_order_of_the_logits(share):
    logits = logits_of(50)
    offset = offset_to(share, torch.sigmoid(logits), COST, FREE)
    # Brute force: every number of open switches, the most certain ones first.
    reachable = [computation_at(logits - threshold) for threshold in [99.0, *logits.flatten().tolist(), -99.0]]
    fitting = [c for c in reachable if c <= share + 1e-12]
    assert computation_at(logits + offset) == pytest.approx(max(fitting, default=0.1), abs=1e-12)


def test_opening_everything_closes_nothing_even_where_probabilities_are_one():
    logits = torch.linspace(18, 40, 30, dtype=torch.float64).view(10, 3)
    assert offset_to(1.0, torch.sigmoid(logits).float(), COST, FREE) >= 0


def test_a_fixed_switch_has_no_logit():
    """One that is fixed to closed keeps its block's FLOPs out of reach, and moves no other switch."""
    logits = logits_of(50)
    logits[:, 1] = -40.0
    assert offset_to(1.0, torch.sigmoid(logits), COST, [0, 2]) < 10
    shift = offset_to(0.5, torch.sigmoid(logits), COST, [0, 2])
    assert computation_at(logits + shift) == pytest.approx(0.5, abs=0.01)


class Toy(nn.Module):
    """Switches whose logits are given but for one bias; its accuracy is a function of its computation."""

    def __init__(self, logits, accuracy):
        super().__init__()
        layer = nn.Linear(1, 1).double()
        nn.init.constant_(layer.bias, 0.7)
        self.gate = SimpleNamespace(last_layers=[layer])
        self.logits, self.accuracy, self.free_switches = logits, accuracy, FREE

    def evaluated(self, *_, **__) -> Evaluation:
        logits = self.logits + self.gate.last_layers[0].bias.detach()
        executed = COST.executed((logits > 0).double())
        accuracy = self.accuracy((executed.mean() / COST.flops).item())
        return Evaluation(0.0, accuracy, COST.flops, executed, (logits > 0).double(), None, torch.sigmoid(logits))


def sought(budget, accuracy) -> tuple[Toy, Evaluation, Evaluation]:
    toy = Toy(logits_of(2000), accuracy)
    at_half = toy.evaluated()
    return toy, at_half, find_operating_point(toy, toy.evaluated, budget, COST, at_half)


def test_the_least_computation_that_keeps_the_accuracy_is_found_from_both_sides():
    for needed in (0.56, 0.75):  # the threshold of one half executes 67%
        _, at_half, best = sought(Budget(0.9), lambda c, n=needed: 0.95 if c >= n else 0.8)
        assert at_half.computation == pytest.approx(0.67, abs=0.01)
        assert best.accuracy == 0.95
        width = REACH if needed < at_half.computation else 1 - at_half.computation
        assert needed <= best.computation <= needed + width / 2**SEARCH + 0.001


@pytest.mark.parametrize(
    ("budget", "accuracy", "low", "high"),
    [
        (Budget(0.0, target_computation=0.4), lambda c: c, 0.38, 0.405),
        (Budget(0.0, target_computation=0.8), lambda c: c, 0.78, 0.805),
        (Budget(0.9), lambda c: 0.95 if c > 0.9999 else 0.8, 1.0, 1.0),
        (Budget(0.9), lambda c: 0.5 + 0.3 * c, 0.98, 1.0),
    ],
    ids=["target below", "target above", "no skipping is borne", "nothing keeps the accuracy"],
)
def test_a_target_is_met_from_both_sides_and_a_floor_opens_the_network(budget, accuracy, low, high):
    _, _, best = sought(budget, accuracy)
    assert low <= best.computation <= high and best.accuracy == accuracy(best.computation)


@pytest.mark.parametrize("gate", ["rnn", "ff2"])
def test_the_network_stands_where_it_was_evaluated_and_goes_back(gate):
    network = build_network("resnet", depth=8, num_classes=4, width=8, gate=gate).eval()
    pixels = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8)
    images, normalisation = ImageSet(pixels, torch.randint(0, 4, (200,))), Normalisation((0.5,) * 3, (0.29,) * 3)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    evaluated, cost = Evaluator(images, normalisation, 8), network_cost(network, 8)
    at_half = evaluated(network)
    assert at_half.computation == 1
    with gate_biases_restored(network):
        best = find_operating_point(network, evaluated, Budget(0.0, 0.8), cost, at_half)
        assert 0.8 - REACH < best.computation <= 0.805
        again = evaluated(network)
        assert again.accuracy == best.accuracy and torch.equal(again.decisions, best.decisions)
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())


def test_a_run_keeps_the_shift_in_its_best_network(chain, shapes):
    folder = run_folder(chain, "rl_pruned")
    best = load_checkpoint(folder / BEST)
    data = load_data(str(shapes), "png", best.data["image_size"], 0)
    images = split_data(data, best.data["val_fraction"], best.data["split_seed"]).val
    evaluated = Evaluator(images, best.normaliser(), best.data["image_size"])
    chosen = evaluated(placed(best.network(), torch.device("cpu")))
    found = {"accuracy": chosen.accuracy, "computation": chosen.computation}
    assert found == pytest.approx({name: best.metrics[name] for name in found})
    line = metrics(folder)[-1]
    shifted = (line["Overview/accuracy_val"], line["Overview/computation_percentage"] / 100)
    own = (line["Policy/accuracy"], line["Policy/computation_percentage"] / 100)
    assert shifted[0] >= own[0] or shifted[1] < own[1]


@pytest.mark.parametrize("flag", ["--recipe=published", "--target_computation=0.7"])
def test_the_published_recipe_has_no_operating_point_and_a_target_is_met(flag, chain, shapes, tmp_path):
    place = ["--checkpoint", source_of(chain, "pruned"), "--data_dir", shapes, "--result_dir", tmp_path]
    numbers = ["--depth", 8, "--epochs", 2, "--bs", 16, "--resize", 8, "--num_workers", 0]
    call(main_rl_prune, *place, *numbers, flag)
    lines = metrics(run_folder(tmp_path, "rl_pruned"))
    for line in (line for line in lines if "Policy/accuracy" in line):
        own, chosen = line["Policy/computation_percentage"], line["Overview/computation_percentage"]
        if flag == "--recipe=published":
            assert own == chosen and "Policy/setpoint_computation_percentage" not in line
        else:
            assert chosen <= 70.5
    record = json.loads((tmp_path / "results.json").read_text())[-1]
    assert record["within_budget"] or flag == "--recipe=published"
