"""The benchmarks of stage 3 at a tiny size."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim import SGD, Adam

from benchmarks import gradient_variance, stage3_parts
from benchmarks.common import load_trained
from benchmarks.stage3_parts import ALL, PARTS, PUBLISHED, VARIANTS, without
from gating.reinforce import reinforce_epoch
from gating.steering import Budget, FixedAlpha, SteeredAlpha
from gating.temperature import LOGIT
from models import all_on
from training.evaluate import evaluate
from training.norms import batch_norms
from utils.device import Randomness
from utils.flops import network_cost


def stage_one(chain: Path) -> Path:
    (path,) = chain.glob("sp/*/*/*/best.pt")
    return path


@pytest.fixture
def trained(chain, shapes):
    given = {"checkpoint": str(stage_one(chain)), "data_dir": str(shapes), "img_type": "png", "num_workers": 1}
    return load_trained(argparse.Namespace(**given))


class Observed:
    """What reached an epoch of training, and the network as the first one found it."""

    def __init__(self, trained, recipe, monkeypatch, drop=0.9):
        self.controllers, self.searched = [], 0
        args = argparse.Namespace(epochs=2, lr=0.01, bs=16, alpha=0.1, max_accuracy_drop=drop)
        network, splits = trained.network(), trained.splits
        self.cost = network_cost(network, trained.image_size)
        before = [torch.cat([norm.running_mean, norm.running_var]) for norm in batch_norms(network)]
        start = trained.evaluated(network, splits.val)

        def epoch(setup, batches, learning_rates, alpha, title):
            if not self.controllers:
                self.setup, self.rates = setup, [rate(0.0) for rate in learning_rates]
                p = evaluate(network, splits.train, trained.normalisation, self.cost, all_on).probabilities
                self.logit = torch.logit(p.double()).abs().mean().item()
            self.controllers.append(alpha)
            self.means = reinforce_epoch(setup, batches, learning_rates, alpha, title)
            self.moved = not torch.equal(torch.cat(before), torch.cat(self._statistics(network)))
            return self.means

        search = stage3_parts.find_operating_point

        def counted(*given):
            self.searched += 1
            return search(*given)

        with monkeypatch.context() as patch:
            patch.setattr(stage3_parts, "reinforce_epoch", epoch)
            patch.setattr(stage3_parts, "find_operating_point", counted)
            budget = Budget(start.accuracy - drop, drop=drop)
            self.best, self.epochs = stage3_parts.train(
                args, trained, network, start, recipe, budget, self.cost, 0, torch.float32
            )

    @staticmethod
    def _statistics(network):
        return [torch.cat([norm.running_mean, norm.running_var]) for norm in batch_norms(network)]


def test_the_published_recipe_has_none_of_the_additions(trained, monkeypatch):
    seen = Observed(trained, PUBLISHED, monkeypatch)
    (optimiser,) = seen.setup.optimisers
    assert type(optimiser) is SGD and seen.rates == [0.01]
    gates = {id(p) for p in seen.setup.network.gate.parameters()}
    assert gates < {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert seen.setup.loss_fn is None and seen.setup.baseline == "none"
    assert seen.means.advantage_deviation == pytest.approx(seen.means.return_deviation, abs=1e-9)
    assert seen.moved and seen.setup.all_explore and seen.searched == 0
    assert all(type(alpha) is FixedAlpha and alpha.value() == 0.1 for alpha in seen.controllers)


def test_all_additions_are_the_script_s_own_recipe(trained, monkeypatch):
    seen = Observed(trained, ALL, monkeypatch)
    assert [type(optimiser) for optimiser in seen.setup.optimisers] == [SGD, Adam] and seen.rates == [0.01, 0.01]
    assert not seen.moved and not seen.setup.all_explore and seen.searched == 2
    assert all(type(alpha) is SteeredAlpha for alpha in seen.controllers)
    assert seen.setup.loss_fn is not None and seen.setup.baseline == "greedy"
    assert seen.logit <= LOGIT * 1.1  # measured on other images than the rescaling


def test_softening_is_what_changes_the_logits(trained, monkeypatch):
    weights = trained.checkpoint.weights
    sure = {name: 8 * weights[name] for name in ("gate.decision.weight", "gate.decision.bias")}
    surer = replace(trained, checkpoint=replace(trained.checkpoint, weights={**weights, **sure}))
    sharp, soft = (Observed(surer, replace(PUBLISHED, rescaled=rescaled), monkeypatch) for rescaled in (False, True))
    assert soft.logit <= LOGIT * 1.1 < 2 * LOGIT < sharp.logit


def test_each_part_is_added_to_the_published_recipe_and_taken_from_all():
    assert without({}) == ALL
    for name, part in PARTS.items():
        added, taken = VARIANTS[f"published + {name}"], VARIANTS[f"all without {name}"]
        assert added != PUBLISHED and taken != ALL
        assert replace(added, **{key: getattr(PUBLISHED, key) for key in part}) == PUBLISHED
        assert replace(taken, **part) == ALL
    assert len(VARIANTS) == 2 * (len(PARTS) + 2) and len(set(VARIANTS.values())) == len(VARIANTS)


def test_all_images_draw_where_all_explore(trained):
    """Shares of skipped FLOPs that only drawn decisions reach: at a probability of one half they are half of them."""
    network, images = trained.network(), trained.splits.train
    for layer in network.gate.last_layers:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, 1e-3)  # thresholded, everything runs
    cost, randomness = network_cost(network, trained.image_size), Randomness(0, trained.device)
    batch = trained.normalisation.apply(images[:96].pixels), images[:96].labels
    drawn = {}

    def forward(x, rule, numbers, skip):
        output = network(x, decide=rule(*numbers), skip=skip)
        if torch.is_grad_enabled():
            drawn["images"] = (output.decisions < 1).any(dim=1)
        return output

    for everyone in (False, True):
        recipe = replace(PUBLISHED, all_explore=everyone, batch_norm="frozen")
        setup = stage3_parts.reinforcement(recipe, trained, network, cost, randomness, torch.float32)
        setup = replace(setup, forward=None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gating.reinforce.training_forward", lambda network: forward)
            means = reinforce_epoch(setup, [batch], [lambda share: 0.0], alpha := Watched(0.1), "epoch")
        assert drawn["images"][::2].any() and drawn["images"][1::2].any() == everyone
        assert means.executed == pytest.approx(0.5, abs=0.15)
        assert alpha.seen.item() == pytest.approx(1.0)  # in both the thresholded decisions are what alpha sees


class Watched(FixedAlpha):
    def observe(self, executed):
        self.seen = executed


def test_the_search_goes_on_until_nothing_cheaper_is_within_the_budget(trained):
    """With a budget that everything keeps, only the blocks without a switch are left."""
    network = trained.network()
    cost = network_cost(network, trained.image_size)
    found = stage3_parts.within_budget(trained, network, Budget(0.0), cost, torch.float32)
    assert found.computation == pytest.approx(1 - cost.skippable, abs=0.02)


def test_every_variant_has_its_row_and_every_part_its_comparison(chain, shapes, tmp_path, monkeypatch, capsys):
    variants = ["published", "all", "published + greedy baseline", "all without greedy baseline"]
    settings = [
        *("--checkpoint", str(stage_one(chain)), "--data_dir", str(shapes), "--epochs", "2", "--bs", "16"),
        *("--seeds", "2", "--train_images", "48", "--out", str(tmp_path / "parts"), "--variants", *variants),
    ]
    monkeypatch.setattr("sys.argv", ["stage3_parts", *settings])
    stage3_parts.main()
    content = json.loads((tmp_path / "parts.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert [(line["seed"], line["variant"]) for line in lines] == [(seed, v) for seed in range(2) for v in variants]
    assert list(content["rows"]) == variants
    for variant, row in content["rows"].items():
        computations = [line["alike"]["computation"] for line in lines if line["variant"] == variant]
        assert row["seeds"] == 2
        assert row["alike"]["saved"]["mean"] == pytest.approx(100 - 50 * sum(computations))
    alone, last = content["parts"]["greedy baseline"]
    saved = {variant: row["alike"]["saved"]["mean"] for variant, row in content["rows"].items()}
    assert alone["saved"]["mean"] == pytest.approx(saved["published + greedy baseline"] - saved["published"])
    assert last["saved"]["mean"] == pytest.approx(saved["all"] - saved["all without greedy baseline"])
    assert content["parts"]["distillation"] == [None, None]
    assert (tmp_path / "parts.md").read_text().count("| 2 |") >= 4
    assert capsys.readouterr().out.count("| greedy baseline | ") == 1
    monkeypatch.setattr(stage3_parts, "measure", lambda *given: pytest.fail("nothing is left to run"))
    stage3_parts.main()


def test_every_baseline_has_its_variance(chain, shapes, monkeypatch, capsys):
    settings = ["--checkpoint", str(stage_one(chain)), "--data_dir", str(shapes), "--batches", "6", "--bs", "16"]
    monkeypatch.setattr("sys.argv", ["gradient_variance", *settings])
    gradient_variance.main()
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["greedy", "batch", "none"]
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in rows)
