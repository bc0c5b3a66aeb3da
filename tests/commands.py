"""The three scripts as a user runs them, at the smallest size: shared by the tests of commands and of resuming."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
from forks import ENVIRONMENT, Forked

from deploy import predict
from utils.runs.run import BEST, Run, stage_folder

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


def call(command: ModuleType, *given: object) -> None:
    """Run a command in this process."""
    with mock.patch.object(sys, "argv", ["command", *map(str, given)]):
        command.main()


def call_stage(stage: str, given: list) -> None:
    call(importlib.import_module(SCRIPTS[stage].removesuffix(".py")), *given)


def answer_of_both(capsys: pytest.CaptureFixture, checkpoint: Path, exported: Path, image: Path, *flags: str) -> str:
    """What ``predict`` says of an image, the same by a checkpoint, with the flags, and by its export."""
    said = []
    for source in (["--checkpoint", checkpoint, *flags], ["--onnx", exported]):
        capsys.readouterr()
        call(predict, *source, image)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    return said[0]


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Lose patience when the step has been recorded, before its checkpoint is saved."""
    record = Run.record

    def interrupted(self: Run, at: int, *args, **kwargs) -> None:
        record(self, at, *args, **kwargs)
        if at == step:
            raise KeyboardInterrupt

    with mock.patch.object(Run, "record", interrupted), pytest.raises(KeyboardInterrupt):
        yield


START = "import sys\nfrom pathlib import Path\npath = Path(sys.argv[1])\n"


@contextmanager
def holding(code: str, path: Path) -> Iterator[None]:
    """Meanwhile another process has run the code, with ``path``, and is still there; it is killed in the end."""
    code = f"{START}{code}\nprint('there', flush=True)\nsys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, env=ENVIRONMENT, **pipes) as holder:
        try:
            assert holder.stdout.readline() == "there\n"
            yield
        finally:
            holder.kill()


def run_folder(results: Path, stage: str) -> Path:
    """The folder of the only run of a stage."""
    (folder,) = stage_folder(results, stage, "shapes", "resnet", 8).iterdir()
    return folder


def source_of(results: Path, stage: str) -> str:
    """The network that a stage starts from: the best one of the stage before."""
    before = {"sp": "", "pruned": "sp", "rl_pruned": "pruned"}[stage]
    return str(run_folder(results, before) / BEST) if before else ""


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
