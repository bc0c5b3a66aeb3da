"""What the stages do about a budget: landing on it, going back after a collapse, falling back, and refusing."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import arguments, call_stage, metrics, run_folder, source_of
from compare import assert_close
from networks import checkpoint_file, checkpoint_of, small_network

import main_prune
import main_rl_prune
from gating.steering import Budget, next_setpoint
from models import build_network
from training.evaluate import Evaluator
from utils.data.batches import split_data
from utils.data.folder import load_data
from utils.errors import UserError
from utils.flops import network_cost
from utils.runs.checkpoint import Checkpoint, load_checkpoint
from utils.runs.run import BEST, LAST


def test_after_a_collapse_stage_3_goes_on_from_its_best_network(chain, shapes, tmp_path, monkeypatch):
    """The second epoch is told that it has lost all accuracy; the third starts from the best network and its place."""
    find, train = main_rl_prune.find_operating_point, main_rl_prune.reinforce_epoch
    started_from, momenta = [], []

    def found(*given):
        at = find(*given)
        return replace(at, accuracy=0.0) if len(started_from) == 2 else at

    def trained(setup, *given):
        started_from.append({name: weight.clone() for name, weight in setup.network.state_dict().items()})
        momenta.append([len(optimiser.state) for optimiser in setup.optimisers])
        best = tmp_path.glob("rl_pruned/*/*/*/best.pt")
        kept.append(load_checkpoint(next(best)))
        return train(setup, *given)

    kept = []
    monkeypatch.setattr(main_rl_prune, "find_operating_point", found)
    monkeypatch.setattr(main_rl_prune, "reinforce_epoch", trained)
    source = source_of(chain, "pruned")  # within any budget
    given = arguments("rl_pruned", shapes, tmp_path, source)
    call_stage("rl_pruned", [*given, "--epochs", "3", "--closing", "0", "--max_accuracy_drop", "0.1"])

    best = kept[2]
    assert best.progress["best"][0], "there is a network within the budget to go back to"
    assert all(torch.equal(started_from[2][name], weight) for name, weight in best.weights.items())
    assert momenta[2] == [0, 0] != momenta[1], "momentum would lead there again"
    lines = [line for line in metrics(run_folder(tmp_path, "rl_pruned")) if "Policy/return" in line]
    budget = Budget(best.original["accuracy"] - 0.1, drop=0.1)
    start = load_checkpoint(source).metrics["computation"]
    setpoint = next_setpoint(budget, best.metrics["accuracy"], best.metrics["computation"], start, 3, 3)
    assert setpoint < 1
    assert lines[2]["Policy/setpoint_computation_percentage"] == pytest.approx(100 * setpoint, rel=1e-12)
    assert "back to the best network" in (run_folder(tmp_path, "rl_pruned") / "log.txt").read_text()


def unpruned(results: Path, source: Path) -> tuple[Checkpoint, dict, str]:
    """The checkpoint of a run of stage 2, which has the weights of the one it started from, its record and its log."""
    folder = run_folder(results, "pruned")
    best, start = load_checkpoint(folder / BEST), load_checkpoint(source)
    assert best.stage == "pruned" and best.architecture == start.architecture
    assert_close(dict(best.weights), dict(start.weights), "weights")
    (record,) = json.loads((results / "results.json").read_text())
    assert record["compression"] == 0
    return best, record, (folder / "log.txt").read_text()


def test_where_no_iteration_keeps_the_budget_the_unpruned_network_is_kept(chain, shapes, tmp_path):
    content = torch.load(run_folder(chain, "sp") / BEST, weights_only=True)
    # Which no iteration of so small a network reaches.
    content["original"]["accuracy"] = content["metrics"]["accuracy"] = 1.0
    source = tmp_path / "sure.pt"
    torch.save(content, source)
    given = arguments("pruned", shapes, tmp_path, str(source))
    spoiled = ["prune_ratio=0.9", "prune_ratio_limit=0.9", "max_accuracy_drop=0", "lr=0.5", "epochs_start=1"]
    spoiled += ["epochs_end=1", "max_iter=1", "reestimate_batch_norm=false", "refit=false"]
    call_stage("pruned", [*given, *(f"--set={key}" for key in spoiled)])
    _, record, log = unpruned(tmp_path, source)
    assert "no iteration met the budget" in log and record["within_budget"] is False
    assert "[^budget]: no network met the budget" in (tmp_path / "results.md").read_text()


def test_where_nothing_can_be_pruned_the_network_is_within_its_budget(chain: Path, shapes: Path, tmp_path: Path):
    source = source_of(chain, "pruned")
    given = arguments("pruned", shapes, tmp_path, source)
    call_stage("pruned", [*given, "--set=decomposition=truncate", "--set=prune_ratio_limit=0"])
    best, record, log = unpruned(tmp_path, source)
    assert "nothing was pruned, so the unpruned network is kept" in log and record["within_budget"] is True
    assert best.progress["iteration"] == 0


def test_the_iterations_are_not_measured_on_the_test_images(chain, shapes, tmp_path, monkeypatch):
    """Only the report looks at those: of the network that was chosen, with its switches and with every block."""
    measured, call = [], Evaluator.__call__
    monkeypatch.setattr(Evaluator, "__call__", lambda self, *a: (measured.append(len(self.images)), call(self, *a))[1])
    call_stage("pruned", arguments("pruned", shapes, tmp_path, source_of(chain, "pruned")))
    assert set(measured[:-2]) == {24} and measured[-2:] == [30, 30]
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert [p["measured_on"] for p in record["points"]] == ["validation", "validation"]


def test_targets_out_of_reach_are_refused_before_anything_is_measured(chain, shapes, tmp_path):
    given = arguments("pruned", shapes, tmp_path, source_of(chain, "pruned"))
    with pytest.raises(UserError, match=r"target_flops asks for .* FLOPs, but .* can leave no fewer than"):
        call_stage("pruned", [*given, "--set=target_flops=0.01"])
    given = arguments("rl_pruned", shapes, tmp_path, source_of(chain, "rl_pruned"))
    with pytest.raises(UserError, match=r"--target_computation 0\.01 is out of reach: with every switch off"):
        call_stage("rl_pruned", [*given, "--target_computation", "0.01"])
    assert not list(tmp_path.iterdir())


def test_what_is_left_with_every_switch_closed_is_within_reach():
    cost = network_cost(build_network("resnet", depth=8, num_classes=3, width=4), 8)
    Budget(0.0, 1 - cost.skippable + 1e-9).check(cost)
    with pytest.raises(UserError, match="out of reach"):
        Budget(0.0, 1 - cost.skippable - 1e-9).check(cost)


def test_an_interrupted_run_is_resumed_by_the_version_that_started_it(copied, shapes):
    path = run_folder(copied, "sp") / LAST
    content = torch.load(path, weights_only=True)
    content["training"] = {"something": {}}
    torch.save(content, path)
    with pytest.raises(UserError, match=r"cannot be resumed .* it was saved by another version"):
        call_stage("sp", [*arguments("sp", shapes, copied), "--resume"])


@pytest.fixture
def trained(tmp_path, shapes) -> Path:
    network = build_network("resnet", depth=8, num_classes=3, width=8, gate="rnn")
    cost = network_cost(network, 8)
    original = {"accuracy": 0.3, "parameters": cost.parameters, "flops": cost.flops}
    classes = ["left", "middle", "right"]
    data = {"name": "shapes", "image_size": 8, "flip": True, "val_fraction": 0.1, "split_seed": 0}
    data |= split_data(load_data(shapes, "png", 8, 1), 0.1, 0).identity
    return checkpoint_file(tmp_path / "trained.pt", network, "sp", 8, original=original, classes=classes, data=data)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("flops", ["objective=flops", "decomposition=tucker", "distill=0.5", "round_to=2"]),
        ("parameters", ["criterion=kron_obs", "reestimate_batch_norm=false", "prune_ratio_limit=0.95", "round_to=1"]),
    ],
)
def test_the_last_iteration_lands_on_the_target(trained, shapes, tmp_path, kind, settings):
    settings = [f"target_{kind}=0.5", "width=8", "epochs_start=1", "epochs_end=1", "max_accuracy_drop=1", *settings]
    given = arguments("pruned", shapes, tmp_path / "results", str(trained))
    call_stage("pruned", [*given, *(f"--set={setting}" for setting in settings)])
    run = run_folder(tmp_path / "results", "pruned")
    whole = network_cost(load_checkpoint(trained).network(), 8)
    costs = [network_cost(load_checkpoint(run / f"iteration_0{i}.pt").network(), 8) for i in (1, 2)]
    shares = [getattr(cost, kind) / getattr(whole, kind) for cost in costs]
    assert 0.98 * 0.5**0.5 <= shares[0] <= 0.5**0.5
    assert 0.98 * 0.5 <= shares[1] <= 0.5
    assert (run / "ranks.png").exists()
    pruned = [line for line in metrics(run) if "Pruning/measured_rise" in line]
    assert len(pruned) == 2 and all("Pruning/predicted_rise" in line for line in pruned)


@pytest.mark.parametrize(
    ("accuracy", "said"), [(0.7, "nothing was pruned, so"), (0.5, "below the budget before pruning")]
)
def test_a_network_below_the_budget_before_pruning_is_not_within_it(accuracy: float, said: str):
    lines = []
    unpruned = checkpoint_of(small_network(), "sp", metrics={"accuracy": 0.7})
    start = replace(unpruned, stage="pruned", metrics={"accuracy": accuracy})
    run = SimpleNamespace(say=lines.append)
    best, within = main_prune.smallest_within_budget(run, start, unpruned, [], floor=0.6)
    assert within == (accuracy > 0.6) and best.metrics == unpruned.metrics and said in lines[-1]
