"""The three stages on a simulated GPU, as a user runs them: every tensor where CUDA would have it."""

from pathlib import Path

import pytest
import torch
from commands import SCRIPTS, arguments, call_stage, interrupted_at, metrics, run_folder, source_of
from simulated_gpu import simulated

from utils.data import memory

SHORT = {
    "sp": ["--epochs", "2"],
    "pruned": ["--set=max_iter=1", "--set=epochs_start=2", "--set=epochs_end=2"],
    "rl_pruned": ["--epochs", "2"],
}
# What each stage is given besides, and where its images are: every kind of gate, of decomposition, of batch-norm mode
# and of recipe is there once.
CHAINS = {
    "in the GPU's memory": {},
    "in main memory": {
        "sp": ["--gate", "ff1"],
        "pruned": ["--set=decomposition=truncate", "--set=objective=parameters", "--set=correct_eigenvalues=false"],
        "rl_pruned": ["--batch_norm", "reestimate"],
    },
    "decoded batch by batch": {
        "sp": ["--gate", "ff2"],
        "pruned": ["--set=decomposition=depthwise", "--set=fisher_type=empirical", "--set=target_flops=0.8"],
        "rl_pruned": ["--recipe", "published"],
    },
}


@pytest.mark.parametrize("place", CHAINS)
def test_a_chain(place: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From training to the report, exported networks and all; the first line says what was used."""
    if place == "decoded batch by batch":
        monkeypatch.setattr(memory, "available_memory", lambda: 1000.0)
    with simulated(free_memory=2**30 if place == "in the GPU's memory" else 0):
        for stage in SCRIPTS:
            call_stage(stage, [*arguments(stage, shapes, tmp_path), *SHORT[stage], *CHAINS[place].get(stage, [])])
            folder = run_folder(tmp_path, stage)
            first = (folder / "log.txt").read_text().splitlines()[0]
            assert f"on cuda (simulated) in bf16 (Fisher and report in full float32), images {place}: " in first
            best = torch.load(folder / "best.pt", weights_only=True)
            assert all(type(weight) is torch.Tensor for weight in best["weights"].values()), "anyone can load it"
    assert (tmp_path / "results.md").read_text().count("| w/") == 3


def test_a_network_without_gates(shapes: Path, tmp_path: Path):
    with simulated():
        for stage, more in (("sp", ["--gate", "none"]), ("pruned", ["--set=criterion=magnitude"])):
            call_stage(stage, [*arguments(stage, shapes, tmp_path), *SHORT[stage], *more])


@pytest.mark.parametrize(
    ("stage", "first", "second"),
    [
        ("sp", "gpu", "gpu"),
        ("sp", "cpu", "gpu"),
        ("pruned", "gpu", "cpu"),
        ("rl_pruned", "gpu", "cpu"),
        ("rl_pruned", "cpu", "gpu"),
    ],
)
def test_a_run_goes_on_on_any_kind_of_device(stage, first, second, chain, shapes, tmp_path, monkeypatch):
    """Interrupted in its last epoch; the second device makes this epoch again and ends the run."""
    given = [*arguments(stage, shapes, tmp_path, source_of(chain, stage)), *SHORT[stage]]
    last = 3 if stage == "pruned" else 2

    def run_on(device: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        if device == "gpu":
            with simulated():
                call_stage(stage, given)
        else:
            call_stage(stage, given)

    with interrupted_at(last):
        run_on(first)
    given.append("--resume")
    run_on(second)
    folder = run_folder(tmp_path, stage)
    assert [line["step"] for line in metrics(folder)] == list(range(1, last + 1))
    lines = [line.split(" ", 2)[2] for line in (folder / "log.txt").read_text().splitlines() if f"{folder} on " in line]
    where = {"gpu": "on cuda (simulated) in bf16 (Fisher and report in full float32)", "cpu": "on cpu in full float32"}
    assert all(f"{folder} {where[device]}," in line for line, device in zip(lines, (first, second), strict=True))
