"""Returns, policy gradient, budgets and alpha's steering against examples that are written out or enumerated."""

import itertools
import math

import pytest
import torch
from torch import nn

from gating.objectives import entropy, policy_loss, returns, skip_rewards
from gating.steering import INTEGRAL, LARGEST_ERROR, PROPORTIONAL, SMOOTHING, Budget, SteeredAlpha, next_setpoint


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


CPU = torch.device("cpu")


FLOOR, TARGET = Budget(floor=0.90), Budget(floor=0.0, target_computation=0.6)


@pytest.mark.parametrize(
    ("budget", "epochs", "chosen"),
    [
        (FLOOR, {"a": (0.95, 0.9), "b": (0.91, 0.5), "c": (0.899, 0.1), "d": (0.90, 0.6)}, "b"),
        (FLOOR, {"a": (0.80, 0.2), "b": (0.85, 0.9)}, "b"),
        (TARGET, {"a": (0.95, 0.7), "b": (0.91, 0.60), "c": (0.90, 0.3)}, "b"),
        # Of equal computation the better accuracy, and the other way round.
        (FLOOR, {"a": (0.910, 0.848), "b": (0.930, 0.849), "c": (0.950, 0.90)}, "b"),
        (TARGET, {"a": (0.910, 0.60), "b": (0.910, 0.55)}, "b"),
    ],
)
def test_the_fewest_flops_above_a_floor_and_the_best_accuracy_within_a_target(budget, epochs, chosen):
    assert max(epochs, key=lambda name: budget.score(*epochs[name])) == chosen


def test_what_meets_a_budget():
    assert FLOOR.met(0.90, 1.0) and not FLOOR.met(0.8999, 0.1)
    assert TARGET.met(0.1, 0.605) and not TARGET.met(0.99, 0.606)


def test_far_below_the_floor_is_lost():
    assert Budget(0.9, drop=0.03).lost(0.8699) and not Budget(0.9, drop=0.03).lost(0.8701)
    assert Budget(0.9).lost(0.8799) and not Budget(0.9).lost(0.8801)
    assert not Budget(0.9, target_computation=0.5).lost(0.1)


def test_the_aim_is_a_stride_below_what_the_accuracy_bears():
    budget = Budget(floor=0.90)
    assert next_setpoint(budget, 0.95, 0.8, start=1.0, epoch=1, epochs=30) == pytest.approx(0.76)
    assert next_setpoint(budget, 0.90, 0.05, start=1.0, epoch=9, epochs=6) == 0.0
    assert next_setpoint(budget, 0.95, 0.8, start=1.0, epoch=1, epochs=200) == pytest.approx(0.78)
    # No operating point keeps the accuracy.
    assert next_setpoint(budget, 0.89, 0.8, start=1.0, epoch=5, epochs=30) == 1.0


def test_a_target_is_approached_in_a_straight_line_until_half_time():
    budget = Budget(floor=0.0, target_computation=0.6)
    aims = [next_setpoint(budget, 0.1, 0.99, 0.9, epoch, 8) for epoch in range(1, 9)]
    assert aims == pytest.approx([0.825, 0.75, 0.675, 0.6, 0.6, 0.6, 0.6, 0.6])
    assert next_setpoint(budget, 0.9, 1.0, 1.0, 1, epochs=1) == 0.6


def test_alpha_follows_its_recurrence_written_out():
    alpha = SteeredAlpha(2.0, now=1.0, end=0.5, steps=10, device=CPU)
    log_alpha, smooth = math.log(2.0), 1.0
    for step in range(1, 15):
        executed = 1.0 if step < 8 else 0.2
        smooth = SMOOTHING * smooth + (1 - SMOOTHING) * executed
        error = smooth - (1.0 - 0.5 * min(1.0, step / 10))
        log_alpha += INTEGRAL * max(-LARGEST_ERROR, min(LARGEST_ERROR, error))
        alpha.observe(torch.tensor(executed))
        assert alpha.value().item() == pytest.approx(math.exp(log_alpha + PROPORTIONAL * error), rel=1e-5)
    assert alpha.final == pytest.approx(math.exp(log_alpha))


@pytest.mark.parametrize("start_alpha", [0.01, 1.0, 30.0])
def test_alpha_leads_switches_that_answer_slowly_to_the_computation_asked_for(start_alpha):
    """A thousand images skip where alpha exceeds a price of their own; their logits move a little every step."""
    generator = torch.Generator().manual_seed(0)
    prices = torch.rand(1000, generator=generator) * 2
    logits = torch.full((1000,), 2.0)
    alpha = SteeredAlpha(start_alpha, now=1.0, end=0.6, steps=400, device=CPU)
    path = []
    for _ in range(1500):
        logits = (logits + 0.02 * torch.sign(prices - alpha.value())).clamp(-2, 2)
        executed = (logits > 0).float().mean()
        alpha.observe(executed)
        path.append(executed.item())
    assert path[-1] == pytest.approx(0.6, abs=0.03)
    assert sum(path[-500:]) / 500 == pytest.approx(0.6, abs=0.02)
