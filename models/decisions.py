"""Decision rules: how the probability that a block runs becomes a decision to run it.

A rule is a function from probabilities to decisions, both of shape [N] (one entry an image, one call a switch).  It is
an argument of the network's forward pass, so that one network serves every stage.
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
    return (probabilities > 0.5).to(probabilities.dtype)


def straight_through(probabilities: Tensor) -> Tensor:
    """Thresholded in the forward pass; in the backward pass the gradient of the probability itself.

    Source: SkipNet (arXiv:1711.09485), section 3.3, the supervised warm-up.
    """
    return thresholded(probabilities) + (probabilities - probabilities.detach())


def sampled(draws: Tensor | torch.Generator | None = None) -> DecisionRule:
    """Rule that draws each decision from Bernoulli(probability).

    Source: SkipNet (arXiv:1711.09485), section 3.2, the stochastic policy.

    Args:
        draws: numbers [N, K] drawn uniformly from [0, 1) before, a column for each of the K switches, for one forward
            pass; or a generator to draw from.
    """
    if isinstance(draws, Tensor):
        columns = iter(draws.unbind(1))
        return lambda probabilities: (next(columns) < probabilities.detach()).to(probabilities.dtype)

    def draw(probabilities: Tensor) -> Tensor:
        # Where training has diverged a probability may be nan, which bernoulli dies of before the loss can be checked.
        return torch.bernoulli(probabilities.detach().nan_to_num(0.0), generator=draws)

    return draw


def sampled_straight_through(draws: Tensor | torch.Generator | None = None, exploration: float = 0.0) -> DecisionRule:
    """Rule that draws each decision, as ``sampled``, and passes the gradient of the probability on.

    Source: the straight-through estimator of stochastic neurons (arXiv:1308.3432), section 4.

    Args:
        exploration: share of the decisions to run a block that are changed into skipping it.
    """
    draw = sampled(draws)

    def decide(probabilities: Tensor) -> Tensor:
        return draw(probabilities * (1 - exploration)) + (probabilities - probabilities.detach())

    return decide


def by_image(marked: Tensor, rule: DecisionRule, other: DecisionRule) -> DecisionRule:
    """Rule that applies ``rule`` to the marked images and ``other`` to the rest.

    Args:
        marked: boolean [N].
    """

    def decide(probabilities: Tensor) -> Tensor:
        return torch.where(marked, rule(probabilities), other(probabilities))

    return decide
