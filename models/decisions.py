"""Decision rules: how the probability that a block runs becomes a decision to run it.

A rule is a function from probabilities to decisions, both of shape [N] (one entry per image, one call per switch).  It
is an argument of the network's forward pass, so that one network serves every stage.
"""

from collections.abc import Callable

import torch
from torch import Tensor

DecisionRule = Callable[[Tensor], Tensor]


def all_on(probabilities: Tensor) -> Tensor:
    """Every block runs on every image."""
    return torch.ones_like(probabilities)


def thresholded(probabilities: Tensor) -> Tensor:
    """A block runs where its probability exceeds one half.  This is the rule of evaluation and deployment."""
    return (probabilities.detach() > 0.5).to(probabilities.dtype)


def sampled(draws: Tensor) -> DecisionRule:
    """Rule that draws each decision from Bernoulli(probability).

    Source: SkipNet (arXiv:1711.09485), section 3.2, the stochastic policy.

    Args:
        draws: numbers [N, K] drawn uniformly from [0, 1), a column for each of the K switches, for one forward pass.
    """
    columns = iter(draws.unbind(1))
    return lambda p: (next(columns) < p.detach()).to(p.dtype)


def straight_through(rule: DecisionRule, learning: Tensor) -> DecisionRule:
    """The decisions of ``rule``; in the backward pass the gradient of the probability itself.

    Source: SkipNet (arXiv:1711.09485), section 3.3, for thresholded decisions, the supervised warm-up; the
    straight-through estimator of stochastic neurons (arXiv:1308.3432), section 4, for drawn ones.

    Args:
        learning: [N], 1 for images whose probabilities have a gradient and 0 for the others.
    """

    def decide(probabilities: Tensor) -> Tensor:
        zero = probabilities - probabilities.detach()  # with the gradient of the probabilities
        return rule(probabilities.detach()) + learning * zero

    return decide
