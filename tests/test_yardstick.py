"""The yardstick: networks of others as ours, and cascades chosen on one half and measured on the other."""

import pytest
import torch

from benchmarks.rival import imported
from benchmarks.yardstick import crossed, draw, split_halves, tables
from examples.cifar_resnet import CifarResNet
from gating.cascade_search import Candidate, Predictions


def test_a_network_of_others_is_the_same_as_ours(tmp_path):
    network = CifarResNet(2).eval()
    for name, value in network.named_buffers():
        if name.endswith("running_mean"):
            value.normal_()
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "net.th")
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(imported(tmp_path / "net.th", 14, 10)(x).logits, network(x), rtol=0, atol=1e-5)


def singles():
    given = {"function": "small", "given": True, "share": 1.0, "parameters": 10, "milliseconds": {"1": 1.0}}
    return [{**given, "name": "small", "accuracy": 0.6, "gflops": 1.0},
            {**given, "name": "large", "function": "large", "accuracy": 0.8, "gflops": 3.0,
             "milliseconds": {"1": 2.0}}]  # fmt: skip


@pytest.mark.parametrize("answer", ["last", "mean"])
def test_what_is_chosen_on_one_half_is_measured_on_the_other(answer):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (60,), generator=generator)
    p = [torch.randn(60, 3, generator=generator).softmax(1) for _ in range(2)]
    predictions = [Predictions(one, torch.full((60,), cost).double()) for one, cost in zip(p, (1e9, 3e9), strict=True)]
    halves = split_halves(60)
    chosen = [Candidate((0, 1), (threshold,), answer, 0.5, 1.0) for threshold in (0.5, 0.7)]
    right, spent = [], []
    for half, threshold in ((halves[1], 0.5), (halves[0], 0.7)):
        for i in half.tolist():
            answered, cost = p[0][i], 1.0
            if answered.max() < threshold:
                answered, cost = p[1][i] if answer == "last" else p[0][i] + p[1][i], 4.0
            right.append(answered.argmax() == labels[i])
            spent.append(cost)
    found = crossed(chosen, predictions, labels, halves, singles())
    assert found["accuracy"] == pytest.approx(sum(right).item() / 60, abs=1e-12)
    assert found["gflops"] == pytest.approx(sum(spent) / 60, abs=1e-12)
    assert found["chosen"][0]["members"] == ["small", "large"]
    assert crossed([chosen[0], None], predictions, labels, halves, singles()) is None


def test_tables_and_picture():
    row = {
        "accuracy": 0.79,
        "gflops": 1.5,
        "milliseconds": {"1": 1.25},
        "chosen": 2 * [{"members": ["small", "large"], "answer": "mean"}],
    }
    found = {"reference": "large", "networks": singles(), "budgets": [{"drop": 0.01, **row}],
             "curve": [{"share": 0.5, **row}]}  # fmt: skip
    text = "\n".join(tables(found))
    assert "| small | 60.00% | 1.000 | 3.0x | 2.0x | 10 |" in text
    assert "| 1.0 | 79.00% | 1.500 | 2.0x | 1.6x | small, large |" in text
    assert "| 50.0% | 79.00% | 1.500 | 2.0x | 1.6x | small, large |" in text
    labels = [line.get_label() for line in draw(found).axes[0].lines]
    assert "cascades of these" in labels and "published" in labels
