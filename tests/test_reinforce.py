"""Stage 3's training: a policy that finds the easy images, baselines that agree, batch norms that do not drift."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gating import reinforce
from gating.objectives import policy_loss, returns, skip_rewards
from gating.reinforce import Reinforcement, closing_epoch, reinforce_epoch, thresholded_returns
from gating.steering import FixedAlpha
from gating.temperature import LOGIT, rescale_gate_logits
from models import ResNet, RoutedOutput, all_on, build_network, sampled, thresholded
from training.evaluate import Evaluator
from training.norms import batch_norms, freeze_batch_norms, reestimate_batch_norms
from training.optimisers import reinforcement_optimisers
from utils.data.augment import Normalisation
from utils.data.images import ImageSet


class EasyAndHard(nn.Module):
    """Two classes, two blocks: easy images are decided by the stem, hard ones only where the second block runs.

    An image is [N, 3, 1, 1]: the sign of its class, 1 where it is hard, noise.
    """

    def __init__(self):
        super().__init__()
        self.gate = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))
        for linear in self.gate:
            nn.init.zeros_(linear.weight)
            nn.init.constant_(linear.bias, 1.0)
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, images, decide=thresholded, skip=None):
        features = images[:, :, 0, 0]
        p = torch.stack([torch.sigmoid(linear(features)).squeeze(1) for linear in self.gate], dim=1)
        z = torch.stack([decide(column) for column in p.unbind(1)], dim=1)
        known = 1 - features[:, 1] * (1 - z[:, 1])
        margin = self.scale * features[:, 0] * known
        return RoutedOutput(torch.stack([-margin, margin], dim=1), p, z)


def easy_and_hard(n, generator):
    label = torch.randint(0, 2, (n,), generator=generator)
    hard = (torch.rand(n, generator=generator) < 0.5).float()
    noise = torch.randn(n, generator=generator)
    return torch.stack([2.0 * label - 1, hard, noise], dim=1)[:, :, None, None], label, hard


@pytest.mark.parametrize("published", [True, False])
def test_policy_finds_what_can_be_skipped(published):
    generator, network = torch.Generator().manual_seed(0), EasyAndHard()
    setup = replace(setup_of(network), draws=generator, rl_weight=1.0, published=published)
    for epoch in range(12):
        batches = [easy_and_hard(64, generator)[:2] for _ in range(40)]
        reinforce_epoch(setup, batches, fixed(0.003, 0.03), FixedAlpha(0.5), f"epoch {epoch}")
    images, labels, hard = easy_and_hard(2000, generator)
    with torch.no_grad():
        output = network(images)
    assert (output.logits.argmax(dim=1) == labels).all()  # no accuracy is lost: hard images keep their block
    skippable = torch.stack([torch.ones_like(hard), 1 - hard], dim=1)  # the first block never helps
    skipped = ((1 - output.decisions) * skippable).sum() / skippable.sum()
    assert skipped >= 0.95


def test_a_baseline_moves_no_mean_and_lowers_the_variance():
    """Gradients with and without a baseline over the same draws: their mean difference is zero within its error."""
    network = EasyAndHard().double()
    generator = torch.Generator().manual_seed(1)
    shares = torch.tensor([0.5, 0.5], dtype=torch.float64)
    setup = Reinforcement(network=network, optimisers=(), shares=shares, draws=generator)
    plain, judged = [], []
    for _ in range(600):
        x, y, _ = easy_and_hard(16, generator)
        hopeless = torch.rand(16, generator=generator) < 0.3  # wrong labels: a large loss whatever is decided
        x, y = x.double(), torch.where(hopeless, 1 - y, y)
        logits, p, z = network(x, decide=sampled(torch.rand(16, 2, generator=generator)))
        gained = returns(skip_rewards(z, shares, 0.5), F.cross_entropy(logits, y, reduction="none").detach(), 1.0)
        compared = thresholded_returns(setup, x, y, 0.5)
        for estimates, advantages in ((plain, gained), (judged, gained - compared)):
            gradient = torch.autograd.grad(policy_loss(p, z, advantages), network.gate.parameters(), retain_graph=True)
            estimates.append(torch.cat([g.flatten() for g in gradient]))
    plain, judged = torch.stack(plain), torch.stack(judged)
    difference = judged - plain
    assert (difference.mean(dim=0).abs() <= 4 * difference.std(dim=0) / 600**0.5).all()
    assert judged[200:].var(dim=0).sum() < 0.9 * plain[200:].var(dim=0).sum()


def fixed(*rates):
    """Learning rates that stay as they are."""
    return tuple(lambda _, rate=rate: rate for rate in rates)


def setup_of(network):
    """How most tests train two switches."""
    return Reinforcement(
        network=network, optimisers=reinforcement_optimisers(network, 0.9, 0.0), shares=torch.tensor([0.5, 0.5]),
        draws=torch.Generator().manual_seed(0), rl_weight=0.1,
    )  # fmt: skip


def small_network(gate="rnn"):
    torch.manual_seed(0)
    network = build_network("resnet", depth=8, num_classes=4, width=8, gate=gate)
    for _ in range(5):
        network(torch.randn(32, 3, 8, 8), decide=all_on)
    return network


def statistics(network):
    return torch.cat([torch.cat([n.running_mean, n.running_var]) for n in batch_norms(network)])


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norms_move_only_where_they_follow(frozen):
    network = small_network()
    before = statistics(network)
    batches = [(torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))) for _ in range(3)]
    setup = replace(setup_of(network), frozen_norms=frozen)
    reinforce_epoch(setup, batches, fixed(0.001, 0.01), FixedAlpha(0.1), "epoch")
    assert torch.equal(statistics(network), before) == frozen


@pytest.mark.parametrize("gate", ["rnn", "ff1"])
def test_softened_switches_doubt_and_decide_as_before(gate):
    network = small_network(gate).eval()
    last = [network.gate.decision] if gate == "rnn" else list(network.gate.decisions)
    with torch.no_grad():
        for layer in last:
            layer.weight.mul_(8)
            layer.bias.copy_(torch.tensor([6.0]))
    images = torch.randn(64, 3, 8, 8)
    before = network(images, decide=all_on).probabilities.detach()
    rescale_gate_logits(network, images)
    after = network(images, decide=all_on).probabilities.detach()
    assert torch.equal(after > 0.5, before > 0.5)
    assert torch.logit(before.double()).abs().mean() > 4
    assert torch.logit(after.double()).abs().mean().item() == pytest.approx(LOGIT, rel=1e-4)
    rescale_gate_logits(network, images)  # what doubts already is left alone
    torch.testing.assert_close(network(images, decide=all_on).probabilities.detach(), after, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gate", ["rnn", "ff1", "ff2"])
def test_accuracy_does_not_depend_on_the_batch_size(gate):
    network = small_network(gate)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (300, 3, 8, 8), generator=generator, dtype=torch.uint8)
    normalisation = Normalisation((0.5,) * 3, (0.29,) * 3)
    with torch.no_grad():  # switches that disagree: move the decision's bias to the middle of its inputs
        logits = torch.logit(network.eval()(normalisation.apply(images), decide=all_on).probabilities)
        layers = network.gate.last_layers
        for layer, own in zip(layers, logits.chunk(len(layers), dim=1), strict=True):
            layer.bias -= own.median(dim=0).values.mean()
    labels = torch.randint(0, 4, (300,), generator=generator)
    one, many = (Evaluator(ImageSet(images, labels), normalisation, 8, batch_size=size)(network) for size in (1, 256))
    assert 0.02 < many.decisions.mean() < 0.98
    assert one.accuracy == many.accuracy
    assert torch.equal(one.decisions, many.decisions)
    assert one.loss == pytest.approx(many.loss, rel=1e-5)


def test_the_network_learns_from_the_supervised_loss_that_is_given_and_the_gates_from_returns():
    network = small_network()
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    batches = [(torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))) for _ in range(3)]
    setup = replace(setup_of(network), loss_fn=lambda x, logits, labels: 0 * logits.sum())
    reinforce_epoch(setup, batches, fixed(0.001, 0.01), FixedAlpha(1.0), "epoch")
    moved = {name for name, weight in network.named_parameters() if not torch.equal(weight, before[name])}
    assert "gate.decision.bias" in moved
    assert "classifier.weight" not in moved and "blocks.2.conv2.weight" not in moved


def test_a_block_that_nobody_takes_decays_like_the_others():
    """As on a GPU, where it is computed and multiplied by zero."""
    network = small_network()
    torch.nn.init.constant_(network.gate.decision.bias, -50.0)
    before = network.blocks[2].conv1.weight.clone()
    batches = [(torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,)))]
    setup = replace(setup_of(network), optimisers=reinforcement_optimisers(network, 0.0, 0.5))
    reinforce_epoch(setup, batches, fixed(0.1, 1.0), FixedAlpha(1.0), "epoch")
    torch.testing.assert_close(network.blocks[2].conv1.weight, before * (1 - 0.1 * 0.5), rtol=1e-6, atol=0)


class Recorded(FixedAlpha):
    def observe(self, executed):
        self.seen = executed


def test_the_policy_learns_from_the_images_that_explore_and_alpha_sees_the_others(monkeypatch):
    """Half of a batch's returns and computation, written out."""
    network, alpha = EasyAndHard(), Recorded(0.5)
    x, y, _ = easy_and_hard(7, torch.Generator().manual_seed(2))
    with torch.no_grad():
        network.gate[0].weight.copy_(torch.tensor([[0.0, 3.0, 1.0]]))
        network.gate[0].bias.fill_(-1.0)
    shares = torch.tensor([0.3, 0.7])
    p = network(x, decide=all_on).probabilities
    drawn = torch.rand(7, 2, generator=torch.Generator().manual_seed(5))
    decisions = torch.where(torch.arange(7)[:, None] % 2 == 0, drawn < p, p > 0.5).float()
    columns = iter(decisions.unbind(1))
    logits = network(x, decide=lambda _: next(columns)).logits
    cross_entropy = F.cross_entropy(logits, y, reduction="none")
    gained = 0.5 * (1 - decisions) @ shares - cross_entropy
    log_likelihood = (decisions * p.log() + (1 - decisions) * (1 - p).log())[::2]
    following = torch.stack([gained[::2], 0.5 * 0.7 * (1 - decisions[::2, 1]) - cross_entropy[::2]], dim=1).detach()
    expected = torch.autograd.grad(-(following * log_likelihood).sum() / 4, network.gate.parameters())

    draws, optimisers = torch.Generator().manual_seed(5), reinforcement_optimisers(network, 0.0, 0.0)
    setup = replace(setup_of(network), optimisers=optimisers, shares=shares, draws=draws, rl_weight=1.0)
    monkeypatch.setattr(reinforce, "thresholded_returns", lambda *given: 0.0)
    means = reinforce_epoch(setup, [(x, y)], fixed(0.0, 0.0), alpha, "epoch")
    for parameter, gradient in zip(network.gate.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
    assert alpha.seen.item() == pytest.approx((decisions[1::2] @ shares).mean().item())
    assert means.total_return == pytest.approx(gained[::2].mean().item(), rel=1e-5)
    assert means.executed == pytest.approx((decisions[::2] @ shares).mean().item())
    assert means.loss == pytest.approx(cross_entropy.mean().item(), rel=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_closing_trains_the_network_on_the_paths_in_use_and_leaves_the_switches(frozen):
    """One step against the gradient of the cross-entropy under decisions that are written down."""
    network = small_network().train()
    x, y = torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))
    freeze_batch_norms(network if frozen else network.gate)
    with torch.no_grad():
        logits = torch.logit(copy.deepcopy(network)(x, decide=all_on).probabilities)
        network.gate.decision.bias -= logits.median()
        decisions = copy.deepcopy(network)(x, skip=False).decisions
    reference = copy.deepcopy(network)
    assert 0.2 < decisions.mean() < 0.8
    columns = iter(decisions.unbind(1))
    loss = F.cross_entropy(reference(x, decide=lambda _: next(columns), skip=False).logits, y)
    loss.backward()
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    setup = replace(setup_of(network), optimisers=reinforcement_optimisers(network, 0.0, 0.0), frozen_norms=frozen)
    means = closing_epoch(setup, [(x, y)], lambda share: 0.1, "epoch")
    assert means.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, weight in reference.named_parameters():
        expected = before[name] if name.startswith("gate.") else before[name] - 0.1 * weight.grad
        torch.testing.assert_close(network.get_parameter(name), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gate", ["rnn", "ff1"])
def test_closing_leaves_what_the_switches_compute_from_the_same_features(gate):
    """Their norms as well, whether or not those of the network follow the images and are measured again."""
    network = small_network(gate)
    features, other = torch.randn(16, 8, 8, 8).relu(), torch.randn(16, 3, 8, 8)

    def answer():
        with torch.no_grad():
            return network.eval().gate(0, features, None)[0]

    before, stem = answer(), network.stem[1].running_mean.clone()
    batches = [(torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))) for _ in range(3)]
    closing_epoch(replace(setup_of(network), frozen_norms=False), batches, lambda share: 0.1, "epoch")
    reestimate_batch_norms(network, [(other, None)], ResNet.__call__, network.gate)
    assert torch.equal(answer(), before)
    assert not torch.equal(network.stem[1].running_mean, stem)
    reestimate_batch_norms(network, [(other, None)], ResNet.__call__)
    assert not torch.equal(answer(), before)


def test_reestimated_statistics_weigh_images_and_not_batches():
    """A block that one image of the first batch takes, and all sixteen of the second."""
    network = small_network().eval()
    batches = [torch.randn(16, 3, 8, 8) for _ in range(2)]
    taken = [torch.zeros(16).index_fill(0, torch.tensor([5]), 1.0), torch.ones(16)]
    asked = iter([decision for one in taken for decision in (one, torch.zeros(16))])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    seen = []
    handle = network.blocks[1].bn1.register_forward_pre_hook(lambda norm, inputs: seen.append(inputs[0].double()))
    run = partial(ResNet.__call__, decide=lambda p: next(asked))
    reestimate_batch_norms(network, [(x, None) for x in batches], run)
    handle.remove()
    assert [len(x) for x in seen] == [1, 16]
    norm = network.blocks[1].bn1
    mean = (seen[0].mean((0, 2, 3)) + 16 * seen[1].mean((0, 2, 3))) / 17
    variance = (seen[0].var((0, 2, 3)) + 16 * seen[1].var((0, 2, 3))) / 17
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)
    assert norm.momentum == 0.1 and not network.training
    for key, value in network.state_dict().items():
        assert torch.equal(before[key], value) or key.endswith(("mean", "var", "tracked")), key


def test_network_and_gates_have_rates_of_their_own():
    network = small_network()
    optimisers = reinforcement_optimisers(network, 0.9, 0.0)
    batches = [(torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))) for _ in range(4)]
    rates = (lambda share: 1e-3 * (1 - share), lambda share: 1e-2 * (1 - share))
    reinforce_epoch(replace(setup_of(network), optimisers=optimisers), batches, rates, FixedAlpha(1.0), "epoch")
    assert [group["lr"] for o in optimisers for group in o.param_groups] == pytest.approx([0.25e-3, 0.25e-2])
    assert {id(p) for p in optimisers[1].param_groups[0]["params"]} == {id(p) for p in network.gate.parameters()}
