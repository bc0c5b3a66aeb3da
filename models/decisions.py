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


def sampled(draws: Tensor | torch.Generator | None = None) -> DecisionRule:
    """Rule that draws each decision from Bernoulli(probability).

    Source: SkipNet (arXiv:1711.09485), section 3.2, the stochastic policy.

    Args:
        draws: numbers [N, K] drawn uniformly from [0, 1) before, a column for each of the K switches, for one forward
            pass; or a generator to draw from.
    """
    if isinstance(draws, Tensor):
        columns = iter(draws.unbind(1))
        return lambda p: (next(columns) < p.detach()).to(p.dtype)

    def draw(probabilities: Tensor) -> Tensor:
        # A nan probability (training has diverged) would raise in bernoulli, before the loss can be checked.
        return torch.bernoulli(probabilities.detach().nan_to_num(0.0), generator=draws)

    return draw


def straight_through(rule: DecisionRule = thresholded, learning: Tensor | None = None) -> DecisionRule:
    """The decisions of ``rule``; in the backward pass the gradient of the probability itself.

    Source: SkipNet (arXiv:1711.09485), section 3.3, for thresholded decisions, the supervised warm-up; the
    straight-through estimator of stochastic neurons (arXiv:1308.3432), section 4, for drawn ones.

    Args:
        learning: [N], 1 for images whose probabilities have a gradient and 0 for the others; all have one by default.
    """

    def decide(probabilities: Tensor) -> Tensor:
        zero = probabilities - probabilities.detach()  # with the gradient of the probabilities
        return rule(probabilities.detach()) + (zero if learning is None else learning * zero)

    return decide
