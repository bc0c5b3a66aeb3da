"""The three scripts as a user runs them, at the smallest size: shared by the tests of commands and of resuming."""

import json
import subprocess
from pathlib import Path

from forks import Forked

from utils.runs.run import stage_folder

ROOT = Path(__file__).parents[1]
SCRIPTS = {"sp": "main_sp.py", "pruned": "main_prune.py", "rl_pruned": "main_rl_prune.py"}
EPOCHS = {"sp": 5, "rl_pruned": 4}
FINE_TUNING = {"iterations": 2, "epochs": 2}


def arguments(stage: str, data: Path, results: Path, source: str = "") -> list[str]:
    """The command line of a stage, that of ``SCRIPTS[stage]``; ``source`` is the checkpoint it starts from."""
    if stage == "pruned":
        settings = {
            "depth": 8, "width": 4, "resize": 8, "data_dir": data, "result_dir": results, "checkpoint": source,
            "batch_size": 32, "num_workers": 1, "max_iter": FINE_TUNING["iterations"], "max_accuracy_drop": 0.9,
            "epochs_start": FINE_TUNING["epochs"], "epochs_end": FINE_TUNING["epochs"], "prune_ratio": 0.3,
        }  # fmt: skip
        return ["--config_path", str(ROOT / "config.json"), *(f"--set={k}={v}" for k, v in settings.items())]
    shared = ["--depth", "8", "--resize", "8", "--bs", "32", "--num_workers", "1", "--epochs", str(EPOCHS[stage])]
    shared += ["--data_dir", str(data), "--result_dir", str(results)]
    if stage == "sp":
        return [*shared, "--width", "4", "--lr", "0.1", "--val_fraction", "0.2", "--no_flip"]
    # A reward this large makes the switches close within a few epochs, so that something is skipped.
    return [*shared, "--lr", "0.01", "--alpha", "20", "--max_accuracy_drop", "0.9", "--checkpoint", source]


def run(stage: str, given: list[str], code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a stage in a process of its own; it must end with the exit code."""
    done = Forked(ROOT / SCRIPTS[stage], given).finished(timeout=240)
    assert done.returncode == code, done.stderr
    return done


def run_folder(results: Path, stage: str) -> Path:
    """The folder of the only run of a stage."""
    (folder,) = stage_folder(results, stage, "shapes", "resnet", 8).iterdir()
    return folder


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
