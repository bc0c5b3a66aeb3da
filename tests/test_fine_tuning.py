"""What recovers accuracy after surgery: batch norms measured again, and distillation."""

import pytest
import torch
from networks import small_network
from torch.nn import functional as F

from pruning.changes import eigenvalues_picture, layer_ranks, ranks_picture
from pruning.eigenbasis import Eigenbasis
from training.distillation import TEMPERATURE, distillation_loss, distillation_loss_fn
from training.supervised import Supervision, supervised_epoch


def test_distillation_weighs_two_losses_and_vanishes_where_predictions_agree():
    logits, teacher, labels = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
    without = distillation_loss(logits, teacher, labels, 0.0).item()
    assert without == pytest.approx(F.cross_entropy(logits, labels).item())
    assert distillation_loss(logits, logits, labels, 1.0).item() == pytest.approx(0.0, abs=1e-6)
    p, q = ((t / TEMPERATURE).softmax(1) for t in (teacher, logits))
    kl = (p * (p / q).log()).sum(1).mean() * TEMPERATURE**2
    half = 0.5 * F.cross_entropy(logits, labels) + 0.5 * kl
    assert distillation_loss(logits, teacher, labels, 0.5).item() == pytest.approx(half.item(), rel=1e-5)


def test_a_distilled_epoch_brings_predictions_together():
    teacher, network = small_network("none").eval(), small_network("none")
    for parameter in network.parameters():
        parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter))
    x, y = torch.randn(32, 3, 8, 8), torch.randint(3, (32,))
    optimiser = torch.optim.SGD(network.parameters(), 0.05)
    loss_fn, losses = distillation_loss_fn(teacher, weight=1.0), []

    def recorded(*given: torch.Tensor) -> torch.Tensor:
        losses.append(loss_fn(*given))
        return losses[-1]

    draws = torch.Generator().manual_seed(0)
    training = Supervision(network=network, optimiser=optimiser, draws=draws, loss_fn=recorded)
    for _ in range(7):
        supervised_epoch(training, [(x, y)] * 4, lambda _: 0.05, "test")
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


def test_the_loss_of_an_epoch_is_the_cross_entropy_whatever_is_minimised():
    network, x, y = small_network("none"), torch.randn(8, 3, 8, 8), torch.randint(3, (8,))
    with torch.no_grad():
        expected = F.cross_entropy(network.train()(x).logits, y).item()
    training = Supervision(
        network=network, optimiser=torch.optim.SGD(network.parameters(), 0.0), draws=torch.Generator(),
        loss_fn=distillation_loss_fn(small_network("none"), weight=1.0),
    )  # fmt: skip
    assert supervised_epoch(training, [(x, y)], lambda _: 0.0, "test").loss == pytest.approx(expected, rel=1e-5)


def test_the_picture_of_ranks_is_drawn(tmp_path):
    network = small_network()
    ranks = layer_ranks(network)
    assert ranks["blocks.1.conv1"] == (4, 8) and "blocks.1.shortcut.0" not in ranks
    ranks_picture([("stage 1", ranks), ("iteration 1", {n: (1, 2) for n in ranks})]).savefig(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_eigenvalues_has_a_box_a_layer():
    """Medians and whiskers of values that are known, zero among them."""
    identity = torch.eye(5)
    d_a, d_g = torch.tensor([0, 1e-3, 1e-2, 1e-1, 1e2]), torch.tensor([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    bases = {name: Eigenbasis(identity, identity, d_a, d_g) for name in ("stem.0", "blocks.0.conv1")}
    axes = eigenvalues_picture(bases).axes
    for axis, (least, median, largest) in zip(axes, ((-20, -2, 2), (-5, -3, -1)), strict=True):
        medians = [line for line in axis.lines if list(line.get_ydata()) == pytest.approx([median, median], abs=1e-5)]
        assert len(medians) == 2
        ends = [y for line in axis.lines for y in line.get_ydata()]
        assert (min(ends), max(ends)) == (pytest.approx(least, abs=1e-5), pytest.approx(largest, abs=1e-5))
