"""Budgets and alpha's steering."""

import pytest

from gating.steering import Budget, steered_alpha


def test_accuracy_budget_prefers_fewest_flops_within():
    budget = Budget(floor=0.90)
    epochs = {"a": (0.95, 0.9), "b": (0.91, 0.5), "c": (0.899, 0.1), "d": (0.90, 0.6)}
    assert max(epochs, key=lambda name: budget.score(*epochs[name])) == "b"
    only_bad = {"a": (0.80, 0.2), "b": (0.85, 0.9)}
    assert max(only_bad, key=lambda name: budget.score(*only_bad[name])) == "b"
    assert budget.push(0.90, 1.0) and not budget.push(0.8999, 0.1)


def test_steering_allows_for_noise_and_choosing_does_not():
    budget = Budget(floor=0.90, noise=0.01)
    assert budget.push(0.8901, 1.0) and not budget.push(0.8899, 1.0)
    assert not budget.score(0.8999, 0.1)[0]
    assert budget.overshot(0.8699, drop=0.02) and not budget.overshot(0.8701, drop=0.02)


def test_computation_target_prefers_accuracy_within():
    budget = Budget(floor=0.0, target_computation=0.6)
    epochs = {"a": (0.95, 0.7), "b": (0.91, 0.60), "c": (0.90, 0.3)}
    assert max(epochs, key=lambda name: budget.score(*epochs[name])) == "b"
    assert budget.push(0.1, 0.61) and not budget.push(0.99, 0.6)


def test_alpha_rises_within_the_budget_and_falls_faster_outside():
    assert steered_alpha(1.0, True, epochs=100) == pytest.approx(1.3)
    assert steered_alpha(1.0, False, epochs=100) == pytest.approx(1 / 1.69)
    assert steered_alpha(1.0, True, epochs=100, retreats=1) == pytest.approx(1.3**0.5)
    alpha = 0.1
    for _ in range(10):
        alpha = steered_alpha(alpha, True, epochs=10)
    assert alpha == pytest.approx(100, rel=1e-9)  # a thousandfold in a short run
