"""The inference benchmark at a tiny size: every competitor is there and brought to the FLOPs it should have."""

import json

import pytest
import torch

from benchmarks import inference
from benchmarks.networks import channel_pruned, with_random_weights
from utils.flops import network_cost


def test_channel_pruned_network_has_the_flops_asked_for():
    subject = with_random_weights(depth=8, width=16, image_size=8, kept=0.4, skipped=0.3)
    target = network_cost(subject.static, 8).flops
    pruned = channel_pruned(subject.dense, target, 8)
    assert network_cost(pruned, 8).flops == pytest.approx(target, rel=0.1)
    assert pruned(torch.zeros(2, 3, 8, 8)).logits.shape == (2, 100)


def test_random_switches_close_as_often_as_asked():
    subject = with_random_weights(depth=20, width=8, image_size=8, kept=0.4, skipped=0.4)
    with torch.no_grad():
        closed = 1 - subject.dynamic(subject.normalisation.apply(subject.pixels)).decisions.mean()
    assert closed.item() == pytest.approx(0.4, abs=0.2)


def test_command_measures_every_competitor(tmp_path, monkeypatch, capsys):
    output = tmp_path / "inference.json"
    settings = {"ranks": 0.4, "depth": 8, "width": 8, "resize": 8, "seconds": 0, "threads": 1, "output": output}
    monkeypatch.setattr("sys.argv", ["inference", *(f"--{name}={value}" for name, value in settings.items())])
    monkeypatch.setattr(inference, "SINGLE_IMAGES", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    inference.main()
    content = json.loads(output.read_text())
    # Four networks and the routed one, in two runtimes, at three batch sizes.
    assert len(content["rows"]) == 5 * 2 * 3
    assert len([text for text in capsys.readouterr().out.splitlines() if text.startswith("| cpu")]) == 30
    for row in content["rows"]:
        assert row["kept"] == pytest.approx(row["speedup"] / row["flop_ratio"])
        timing = row["timing"]
        assert 0 < timing["lower_quartile"] <= timing["median"] <= timing["upper_quartile"] and timing["rounds"] >= 5
    assert content["machine"]["threads"] == 1 and torch.__version__.startswith(content["machine"]["versions"]["torch"])
