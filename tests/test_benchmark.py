"""The inference benchmark at a tiny size: every competitor is there and brought to the FLOPs it should have."""

import json

import pytest
import torch
from test_export import checkpoint_file
from torch.nn import functional as F

from benchmarks import inference
from benchmarks.competitor import IMPORTANCES, Competitor, _gradients, torch_pruned
from benchmarks.networks import with_random_weights
from gating.fixing import with_fixed_switches
from models import all_on, build_network
from utils.data.images import evenly_spaced
from utils.flops import network_cost


def test_rounded_channels_are_multiples_and_cost_what_was_asked_for():
    subject = with_random_weights(depth=8, width=32, image_size=8, kept=0.4, skipped=0.3)
    target = network_cost(subject.static, 8).flops
    pruned = torch_pruned(subject.dense, Competitor("magnitude", everywhere=False, round_to=8), target, 8, [])
    assert network_cost(pruned, 8).flops == pytest.approx(target, rel=0.1)
    assert all(m.out_channels % 8 == 0 for m in pruned.modules() if isinstance(m, torch.nn.Conv2d))
    assert pruned(torch.zeros(2, 3, 8, 8)).logits.shape == (2, 100)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("everywhere", [False, True])
def test_competitors_have_the_flops_asked_for_and_narrow_the_residual_stream(importance, everywhere):
    torch.manual_seed(0)
    network = build_network("resnet", depth=8, num_classes=3, width=16, gate="rnn").eval()
    whole = network_cost(network, 8).flops
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(3, (8,)))]
    smaller = torch_pruned(network, Competitor(importance, everywhere), 0.4 * whole, 8, batches)
    assert 0.9 * 0.4 * whole < network_cost(smaller, 8).flops <= 1.02 * 0.4 * whole
    assert smaller.switches == 0 and smaller.stem[0].out_channels == smaller.blocks[0].conv2.out_channels
    assert smaller.classifier.in_features < network.classifier.in_features
    assert smaller(batches[0][0]).logits.shape == (8, 3)


def test_hessian_importance_reads_squared_gradients_of_single_images():
    torch.manual_seed(0)
    plain = build_network("resnet", depth=8, num_classes=3, width=2, gate="none").eval()
    x, y = torch.randn(5, 3, 8, 8), torch.randint(3, (5,))
    found = _gradients(plain, "Hessian", [(x[:3], y[:3]), (x[3:], y[3:])])
    expected = 0
    for image, label in zip(x, y, strict=True):
        loss = F.cross_entropy(plain(image[None]).logits, label[None])
        expected = expected + torch.autograd.grad(loss, plain.blocks[0].conv1.weight)[0].square() / 5
    names = [name for name, _ in plain.named_parameters()]
    torch.testing.assert_close(found[names.index("blocks.0.conv1.weight")], expected)


@pytest.mark.parametrize("skipped", [0.3, 0.6])
def test_random_switches_close_as_often_as_asked_each_for_some_images(skipped):
    subject = with_random_weights(depth=20, width=8, image_size=8, kept=0.4, skipped=skipped)
    with torch.no_grad():
        closed = 1 - subject.dynamic(subject.normalisation.apply(subject.pixels)).decisions.mean(dim=0)
    assert closed.mean().item() == pytest.approx(skipped, abs=0.1)
    assert ((closed > 0.02) & (closed < 0.98)).float().mean() > 0.5


def test_command_measures_every_competitor(tmp_path, monkeypatch, capsys):
    output = tmp_path / "inference.json"
    settings = {"ranks": 0.4, "depth": 8, "width": 8, "resize": 8, "seconds": 0, "threads": 1, "output": output}
    monkeypatch.setattr("sys.argv", ["inference", *(f"--{name}={value}" for name, value in settings.items())])
    monkeypatch.setattr(inference, "SINGLE_IMAGES", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    inference.main()
    content = json.loads(output.read_text())
    # Four networks in four runtimes, and the switched one against itself in two, at three batch sizes.
    assert len(content["rows"]) == (4 * 4 + 2) * 3
    printed = capsys.readouterr().out.splitlines()
    assert len([text for text in printed if text.startswith("| cpu")]) == 54
    summary = [text for text in printed if text.startswith(("| PyTorch", "| ONNX Runtime"))]
    assert len(summary) == 4 * 4 and all(text.count("/s (") == 2 and text.count(" ms (") == 1 for text in summary)
    for row in content["rows"]:
        assert row["kept"] == pytest.approx(row["speedup"] / row["flop_ratio"])
        timing = row["timing"]
        assert 0 < timing["lower_quartile"] <= timing["median"] <= timing["upper_quartile"] and timing["rounds"] >= 5
    assert torch.__version__.startswith(content["machine"]["versions"]["torch"])


def test_trained_networks_are_compared_with_their_accuracies_without_stage_three(tmp_path, monkeypatch, capsys, shapes):
    torch.manual_seed(0)
    files = {
        name: checkpoint_file(tmp_path / f"{name}.pt", build_network("resnet", depth=8, num_classes=3, width=8, **form),
                              ["left", "middle", "right"], stage, 8)
        for name, stage, form in (
            ("dense", "sp", {}), ("static", "pruned", {"ranks": {"blocks.2.conv2": (8, 8)}}),
        )
    }  # fmt: skip
    settings = {**files, "data_dir": shapes, "seconds": 0, "threads": 1, "output": tmp_path / "inference.json"}
    monkeypatch.setattr("sys.argv", ["inference", *(f"--{name}={value}" for name, value in settings.items())])
    monkeypatch.setattr(inference, "SINGLE_IMAGES", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    inference.main()
    content = json.loads((tmp_path / "inference.json").read_text())
    assert len(content["rows"]) == 3 * 4 * 3  # networks, runtimes, batch sizes
    accuracies = content["accuracies"]
    for network in ("dense", "static"):
        # Four runtimes of one network on 30 images: the float ones agree.
        found = [accuracies[f"{runtime}: {network}"] for runtime in ("PyTorch", "PyTorch, folded", "ONNX Runtime")]
        assert found == [pytest.approx(found[0], abs=1 / 30)] * 3 and f"ONNX Runtime, int8: {network}" in accuracies
    rows = [text for text in capsys.readouterr().out.splitlines() if text.startswith(("| PyTorch", "| ONNX Runtime"))]
    assert len(rows) == 4 * 3 and sum("| – |" in text for text in rows) == 4, "Torch-Pruning's is not fine-tuned"


def test_every_block_is_what_is_left_of_the_network():
    """Against which a switched network's speed is judged: blocks that have left are run by neither."""
    subject = with_random_weights(depth=14, width=8, image_size=8, kept=0.5, skipped=0.3)
    fixed = with_fixed_switches(subject.dynamic, {0: 0, 1: 1})
    items = inference.items_of(subject.pixels, 32)
    cost = network_cost(fixed, 8)
    assert inference.executed_flops(fixed, subject, items, all_on) == pytest.approx(cost.flops - cost.blocks[0])
    assert inference.executed_flops(fixed, subject, items) < cost.flops - cost.blocks[0]


def test_timed_images_are_spread_over_all():
    assert evenly_spaced(9, 3).tolist() == [0, 4, 8]
    assert evenly_spaced(3, 5).tolist() == [0, 0, 1, 1, 2]
    assert evenly_spaced(50000, 50000).tolist() == list(range(50000))
