"""The training benchmark at a tiny size: every competitor is there, and numbers that follow from others do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import training
from deploy.timing import Timing


@pytest.mark.parametrize("data", ["made", "given"])
def test_command_measures_every_competitor(
    data: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    output = tmp_path / "training.json"
    settings = {"depth": 8, "width": 4, "resize": 8, "images": 32, "bs": 16, "num_workers": 0, "seconds": 0}
    flags = [f"--{name}={value}" for name, value in {**settings, "threads": 1, "output": output}.items()]
    before = sorted(path for path in shapes.rglob("*"))
    monkeypatch.setattr("sys.argv", ["training", *flags, *([f"--data_dir={shapes}"] if data == "given" else [])])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    training.main()
    assert sorted(path for path in shapes.rglob("*")) == before, "the data folder is left alone"
    content = json.loads(output.read_text())
    names = ["plain loop", "stage 1", "stage 1 without gates", "plain loop, half ranks", "stage 2, fine-tuning"]
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == [*names, "stage 3"]
    for row in rows.values():
        assert row["rate"] == pytest.approx(32 / row["timing"]["median"])
        assert 0 < row["lower_quartile"] <= row["rate"] <= row["upper_quartile"] and row["timing"]["rounds"] >= 5
        if row["against"]:
            assert row["ratio"] == pytest.approx(row["rate"] / rows[row["against"]]["rate"])
    assert rows["stage 3"]["flops"] == pytest.approx(rows["stage 2, fine-tuning"]["flops"] * 4 / 3)
    share = 1 - rows["stage 1"]["rate"] / rows["stage 1 without gates"]["rate"]
    assert content["gate_share"] == pytest.approx(share)
    assert set(content["first_batch"]) == {"ours", "plain loop"}
    assert content["machine"]["threads"] == 1 and content["peak_memory"] > 2**20
    assert content["machine"]["versions"].keys() == {"torch", "torchvision", "numpy", "pillow"}
    printed = capsys.readouterr().out
    assert printed.count("images a second") == 1 and all(f"| {name} |" in printed for name in rows)


def test_share_of_the_matrix_rate():
    timing = Timing(2.0, 1.9, 2.1, 5, 1)
    product = Timing(10 * 2 * training.MATRIX**3 / 1e12, 0, 0, 5, 1)  # of a card of 1 TFLOP/s
    found = {"a": training.Competitor(lambda: None, None, 3e9)}
    (row,) = training.table_rows(found, {"a": timing, training.MATRIX_RATE: product}, {"a": 5}, images=100)
    assert (row.rate, row.lower_quartile, row.upper_quartile) == pytest.approx((50, 100 / 2.1, 100 / 1.9))
    assert row.matrix_share == pytest.approx(50 * 3e9 / 1e12)
    assert np.isclose(training.matrix_rate({training.MATRIX_RATE: product}), 1e12)
