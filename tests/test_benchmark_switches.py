"""The benchmarks of stage 3 at a tiny size."""

import json
from pathlib import Path

import pytest

from benchmarks import gradient_variance, switches


def stage_one(chain: Path) -> Path:
    (path,) = chain.glob("sp/*/*/*/best.pt")
    return path


def test_stage_three_is_run_once_for_each_variant_and_seed(chain, shapes, tmp_path, monkeypatch, capsys):
    settings = [
        *("--checkpoint", str(stage_one(chain)), "--data_dir", str(shapes), "--epochs", "2", "--bs", "16"),
        *("--seeds", "1", "--variants", "steered, norms frozen", "fixed alpha, norms follow"),
        *("--out", str(tmp_path / "switches")),
    ]
    monkeypatch.setattr("sys.argv", ["switches", *settings])
    switches.main()
    content = json.loads((tmp_path / "switches.json").read_text())
    assert list(content["results"]) == ["steered, norms frozen", "fixed alpha, norms follow"]
    for (run,) in content["results"].values():
        assert len(run["accuracies"]) == len(run["computations"]) == 2
        assert 0 <= run["test_accuracy"] <= 1 and 0 < run["computation"] <= 1
    assert capsys.readouterr().out.count("| 1 |") == 2
    assert (tmp_path / "switches.png").stat().st_size > 0
    monkeypatch.setattr(switches.subprocess, "run", lambda command: pytest.fail("nothing is left to run"))
    switches.main()


def test_every_baseline_has_its_variance(chain, shapes, monkeypatch, capsys):
    settings = ["--checkpoint", str(stage_one(chain)), "--data_dir", str(shapes), "--batches", "6", "--bs", "16"]
    monkeypatch.setattr("sys.argv", ["gradient_variance", *settings])
    gradient_variance.main()
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["greedy", "batch", "none"]
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in rows)
