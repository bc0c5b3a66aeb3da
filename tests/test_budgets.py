"""What the stages do where a budget cannot be kept: going back after a collapse, falling back, and refusing."""

import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import SCRIPTS, arguments, metrics, run_folder

import main_rl_prune
from deploy import speeds
from gating.steering import Budget, next_setpoint
from models import build_network
from training import evaluate as evaluation
from utils.data.folder import load_data
from utils.errors import UserError
from utils.flops import network_cost
from utils.runs.checkpoint import load_checkpoint, save_checkpoint
from utils.runs.predecessors import pruned_network
from utils.runs.run import BEST, LAST


def run(stage: str, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "SECONDS", 0.0)
    monkeypatch.setattr(sys, "argv", [SCRIPTS[stage], *given])
    importlib.import_module(SCRIPTS[stage].removesuffix(".py")).main()


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
    source = str(run_folder(chain, "sp") / BEST)  # within any budget
    given = arguments("rl_pruned", shapes, tmp_path, source)
    run("rl_pruned", [*given, "--epochs", "3", "--closing", "0", "--max_accuracy_drop", "0.1"], monkeypatch)

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


def test_stage_3_falls_back_to_the_network_of_an_iteration(chain: Path, shapes: Path, tmp_path: Path):
    """Stage 2 chose under a wider budget than stage 3 has: the smallest iteration within the narrow one counts."""
    results = tmp_path / "results"
    shutil.copytree(chain, results)
    folder = run_folder(results, "pruned")
    floor = 0.5
    accuracies = {BEST: 0.3, "iteration_01.pt": 0.8, "iteration_02.pt": 0.3}
    for name, accuracy in accuracies.items():
        checkpoint = load_checkpoint(folder / name)
        changed = replace(checkpoint, metrics={**checkpoint.metrics, "accuracy": accuracy},
                          original={**checkpoint.original, "accuracy": floor + 0.1})  # fmt: skip
        save_checkpoint(folder / name, changed)
    settings = SimpleNamespace(
        checkpoint="", result_dir=str(results), network="resnet", depth=8, resize=8, max_accuracy_drop=0.1, seed=3
    )
    data = load_data(str(shapes), "png", 8, 1)
    start, _ = pruned_network(settings, data)
    assert start.source == str((folder / "iteration_01.pt").relative_to(results))
    assert (start.stage, start.seed, start.progress) == ("rl_pruned", 3, {})
    settings.max_accuracy_drop = 0.4  # now the one that stage 2 chose is within the budget, too
    assert pruned_network(settings, data)[0].source == str((folder / BEST).relative_to(results))
    settings.max_accuracy_drop = -0.3
    with pytest.raises(UserError, match=r"no network of stage 2 is within -0\.3 of stage 1's accuracy"):
        pruned_network(settings, data)


def test_where_no_iteration_keeps_the_budget_the_unpruned_network_is_kept(chain, shapes, tmp_path, monkeypatch):
    content = torch.load(run_folder(chain, "sp") / BEST, weights_only=True)
    # Which no iteration of so small a network reaches.
    content["original"]["accuracy"] = content["metrics"]["accuracy"] = 1.0
    source = tmp_path / "sure.pt"
    torch.save(content, source)
    given = arguments("pruned", shapes, tmp_path, str(source))
    spoiled = [
        "prune_ratio=0.9",
        "prune_ratio_limit=0.9",
        "max_accuracy_drop=0",
        "lr=0.5",
        "epochs_start=1",
        "epochs_end=1",
        "max_iter=1",
    ]
    run(
        "pruned",
        [*given, *(f"--set={key}" for key in spoiled), "--set=reestimate_batch_norm=false", "--set=refit=false"],
        monkeypatch,
    )
    folder = run_folder(tmp_path, "pruned")
    best, unpruned = load_checkpoint(folder / BEST), load_checkpoint(source)
    assert best.stage == "pruned" and best.architecture == unpruned.architecture
    assert all(torch.equal(best.weights[name], weight) for name, weight in unpruned.weights.items())
    assert "no iteration met the budget" in (folder / "log.txt").read_text()
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["within_budget"] is False and record["compression"] == 0
    assert "[^budget]: no network met the budget" in (tmp_path / "results.md").read_text()


def test_where_nothing_can_be_pruned_the_network_is_within_its_budget(
    chain: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = run_folder(chain, "sp") / BEST
    given = arguments("pruned", shapes, tmp_path, str(source))
    run("pruned", [*given, "--set=decomposition=truncate", "--set=prune_ratio_limit=0"], monkeypatch)
    folder = run_folder(tmp_path, "pruned")
    assert "nothing was pruned; kept the network of stage 1" in (folder / "log.txt").read_text()
    best, unpruned = load_checkpoint(folder / BEST), load_checkpoint(source)
    assert all(torch.equal(best.weights[name], weight) for name, weight in unpruned.weights.items())
    assert best.progress["iteration"] == 0
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["within_budget"] is True and record["compression"] == 0


def test_the_iterations_are_not_measured_on_the_test_images(chain, shapes, tmp_path, monkeypatch):
    """Only the report looks at those: of the network that was chosen, with its switches and with every block."""
    measured, evaluate = [], evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: (measured.append(len(a[1])), evaluate(*a, **k))[1])
    run("pruned", arguments("pruned", shapes, tmp_path, str(run_folder(chain, "sp") / BEST)), monkeypatch)
    assert set(measured[:-2]) == {24} and measured[-2:] == [30, 30]
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert [p["measured_on"] for p in record["points"]] == ["validation", "validation"]


def test_targets_out_of_reach_are_refused_before_anything_is_measured(chain, shapes, tmp_path, monkeypatch):
    given = arguments("pruned", shapes, tmp_path, str(run_folder(chain, "sp") / BEST))
    with pytest.raises(UserError, match=r"target_flops asks for .* FLOPs, but .* can leave no fewer than"):
        run("pruned", [*given, "--set=target_flops=0.01"], monkeypatch)
    given = arguments("rl_pruned", shapes, tmp_path, str(run_folder(chain, "pruned") / BEST))
    with pytest.raises(UserError, match=r"--target_computation 0\.01 is out of reach: with every switch off"):
        run("rl_pruned", [*given, "--target_computation", "0.01"], monkeypatch)
    assert not list(tmp_path.iterdir())


def test_what_is_left_with_every_switch_closed_is_within_reach():
    cost = network_cost(build_network("resnet", depth=8, num_classes=3, width=4), 8)
    Budget(0.0, 1 - cost.skippable + 1e-9).check(cost)
    with pytest.raises(UserError, match="out of reach"):
        Budget(0.0, 1 - cost.skippable - 1e-9).check(cost)


@pytest.mark.parametrize("stage", ["pruned", "rl_pruned"])
def test_a_checkpoint_that_is_not_finite_is_refused(stage, chain, shapes, tmp_path, monkeypatch):
    source = run_folder(chain, {"pruned": "sp", "rl_pruned": "pruned"}[stage]) / BEST
    content = torch.load(source, weights_only=True)
    content["weights"]["stem.0.weight"][0, 0] = float("nan")
    torch.save(content, tmp_path / "nan.pt")
    with pytest.raises(
        UserError, match=r"nan\.pt cannot be used, the weight .* is not finite \(its training diverged\)"
    ):
        run(stage, arguments(stage, shapes, tmp_path / "results", str(tmp_path / "nan.pt")), monkeypatch)


@pytest.mark.parametrize("damaged", ["another version", "another shape"])
def test_an_interrupted_run_is_resumed_by_the_version_that_started_it(damaged, chain, shapes, tmp_path, monkeypatch):
    results = tmp_path / "results"
    shutil.copytree(chain, results)
    path = run_folder(results, "sp") / LAST
    content = torch.load(path, weights_only=True)
    if damaged == "another version":
        content["training"] = {"something": {}}
    else:
        content["training"]["optimiser"]["state"][0]["momentum_buffer"] = torch.zeros(1, 2)
    torch.save(content, path)
    with pytest.raises(UserError, match=r"cannot be resumed .* it was saved by another version"):
        run("sp", [*arguments("sp", shapes, results), "--resume"], monkeypatch)
