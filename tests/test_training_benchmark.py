"""The training benchmark at a tiny size: every competitor is there, and the table follows from their times."""

import pytest
import torch
from commands import call

from benchmarks import training
from deploy.timing import Timing


@pytest.mark.parametrize("data", ["made", "given"])
def test_command_measures_every_competitor(data, shapes, monkeypatch, capsys):
    settings = {"depth": 8, "width": 4, "resize": 8, "images": 32, "bs": 16, "num_workers": 0, "seconds": 0}
    flags = [f"--{name}={value}" for name, value in {**settings, "threads": 1}.items()]
    before = sorted(path for path in shapes.rglob("*"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    call(training, *flags, *([f"--data_dir={shapes}"] if data == "given" else []))
    assert sorted(path for path in shapes.rglob("*")) == before, "the data folder is left alone"
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in (training.PLAIN, "stage 1 without gates", *training.AGAINST))


def test_the_table_follows_from_the_times():
    seconds = {"plain loop": 2.0, "stage 1": 1.0, "stage 1 without gates": 0.75}
    timings = {name: Timing(t, t / 2, 2 * t, 5, 1) for name, t in seconds.items()}
    lines = training.table(timings, images=100).splitlines()
    assert lines[3] == "| stage 1 | 100 (50 to 200) | plain loop | 2.00x |"
    assert lines[-1] == "The gates take 25.0% of stage 1's step."
