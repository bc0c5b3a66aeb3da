"""Returns, policy gradient and alpha's steering against examples that are written out or enumerated."""

import itertools
import math

import pytest
import torch
from torch import nn

from gating.objectives import entropy, policy_loss, returns, skip_rewards


def test_returns_written_out():
    # Two images, three switches.  Image 1 skips the second block, image 2 the first and the third.
    decisions = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    cross_entropy = torch.tensor([0.7, 2.0], dtype=torch.float64)
    rewards = skip_rewards(decisions, shares, alpha=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[0, 0.03, 0], [0.05, 0, 0.02]], dtype=torch.float64))
    expected = {
        1.0: [[-0.67, -0.67, -0.70], [-1.93, -1.98, -1.98]],
        # from the last: -0.63; 0.03 - 0.567 = -0.537; -0.4833 | 0.02 - 1.8 = -1.78; -1.602; 0.05 - 1.4418 = -1.3918
        0.9: [[-0.4833, -0.537, -0.63], [-1.3918, -1.602, -1.78]],
        0.0: [[0.0, 0.03, 0.0], [0.05, 0.0, 0.02]],
    }
    for gamma, values in expected.items():
        found = returns(rewards, cross_entropy, gamma)
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), rtol=0, atol=1e-12)


def test_policy_gradient_written_out():
    # d/dp of -R log p is -R/p where the block ran and R/(1-p) where it was skipped; the mean is over two images.
    p = torch.tensor([[0.8, 0.6], [0.5, 0.9]], dtype=torch.float64, requires_grad=True)
    decisions = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    advantages = torch.tensor([[2.0, -1.0], [0.5, 3.0]], dtype=torch.float64)
    loss = policy_loss(p, decisions, advantages)
    by_hand = -(2 * math.log(0.8) - math.log(0.4) + 0.5 * math.log(0.5) + 3 * math.log(0.9)) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)
    loss.backward()
    expected = torch.tensor([[-2 / 0.8, -1 / 0.4], [-0.5 / 0.5, -3 / 0.9]], dtype=torch.float64) / 2
    torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=0)


class ThreeSwitches(nn.Module):
    """Three Bernoulli switches in a row, each seeing the decisions before it, and a loss that depends on all three."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))

    def probability(self, switch, before):
        padded = torch.cat([before, before.new_zeros(len(before), 3 - before.shape[1])], dim=1)
        return torch.sigmoid(self.weight[switch, 0] + padded @ self.weight[switch, 1:])

    @staticmethod
    def cross_entropy(a):
        return 0.3 + 0.5 * (1 - a[:, 0]) * (1 - a[:, 1]) + 0.8 * (1 - a[:, 2]) * a[:, 0] + 0.1 * a[:, 1]

    def follow(self, paths):
        """Probabilities [N, 3] along given decisions [N, 3]."""
        return torch.stack([self.probability(switch, paths[:, :switch]) for switch in range(3)], dim=1)

    def sample(self, n, generator):
        """Drawn decisions [n, 3] and their probabilities."""
        a = torch.zeros(n, 0, dtype=torch.float64)
        for switch in range(3):
            p = self.probability(switch, a).detach()
            a = torch.cat([a, torch.bernoulli(p, generator=generator)[:, None]], dim=1)
        return self.follow(a), a


SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
ALPHA = 0.9


def exact_gradient(net):
    """Gradient of minus the expected return of the first switch (gamma = 1), over all eight paths."""
    a = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
    p = net.follow(a)
    likelihood = torch.where(a > 0, p, 1 - p).prod(dim=1)
    total = returns(skip_rewards(a, SHARES, ALPHA), net.cross_entropy(a), 1.0)[:, 0]
    return torch.autograd.grad(-(likelihood * total).sum(), net.weight)[0]


def greedy_returns_of(net, n):
    a = torch.zeros(1, 0, dtype=torch.float64)
    for switch in range(3):
        a = torch.cat([a, (net.probability(switch, a) > 0.5).double()[:, None]], dim=1)
    return returns(skip_rewards(a, SHARES, ALPHA), net.cross_entropy(a), 1.0).expand(n, 3)


@pytest.mark.parametrize("greedy", [True, False])
def test_policy_gradient_agrees_with_enumeration(greedy):
    net = ThreeSwitches()
    exact = exact_gradient(net)
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(2000):
        p, a = net.sample(32, generator)
        gained = returns(skip_rewards(a, SHARES, ALPHA), net.cross_entropy(a), 1.0)
        loss = policy_loss(p, a, gained - greedy_returns_of(net, 32).detach() if greedy else gained)
        estimates.append(torch.autograd.grad(loss, net.weight)[0])
    estimates = torch.stack(estimates)
    error = (estimates.mean(dim=0) - exact).abs()
    standard_error = estimates.std(dim=0) / len(estimates) ** 0.5
    assert (error <= 3 * standard_error + 1e-12).float().mean() >= 0.99  # 12 entries: all, but for one in 370 each
    assert (error <= 4.5 * standard_error + 1e-12).all()
    assert exact.abs().max() > 0.01  # the gradient that was met is not nothing


def test_images_of_other_processes_count_in_the_mean():
    p, a, advantages = torch.tensor([[0.8, 0.5]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 1.0]])
    expected = -(2 * math.log(0.8) + math.log(0.5)) / 4
    assert policy_loss(p, a, advantages, images=4).item() == pytest.approx(expected, rel=1e-6)
    assert policy_loss(p[:0], a[:0], advantages[:0], images=4).item() == 0


def test_entropy_in_closed_form():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.5]], dtype=torch.float64)
    h = lambda q: -(q * math.log(q) + (1 - q) * math.log(1 - q))  # noqa: E731
    assert entropy(p).item() == pytest.approx((2 * h(0.5) + h(0.9) + h(0.5)) / 2, rel=1e-12)
    assert math.isfinite(entropy(torch.tensor([[0.0, 1.0]])).item())
