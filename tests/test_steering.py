"""Budgets and alpha's steering."""

import math

import pytest
import torch

from gating.steering import INTEGRAL, LARGEST_ERROR, PROPORTIONAL, SMOOTHING, Budget, SteeredAlpha, next_setpoint

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
