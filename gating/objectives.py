"""The reinforcement objective of the switches: rewards, returns and the policy-gradient loss, as pure functions.

N images, K switches.  Source: SkipNet (arXiv:1711.09485), section 3.2, equations (3) to (6).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def skip_rewards(decisions: Tensor, shares: Tensor, alpha: float | Tensor) -> Tensor:
    """Reward of each decision: alpha times the block's share of the FLOPs that can be skipped, where it is skipped.

    Args:
        decisions: [N, K], 1 where the block runs.
        shares: [K], sums to 1, so that skipping every block earns ``alpha`` nats.

    Returns:
        [N, K].
    """
    return alpha * (1 - decisions) * shares


def returns(rewards: Tensor, cross_entropy: Tensor, gamma: float) -> Tensor:
    """Discounted returns of each decision, R_i = r_i + gamma R_(i+1), with R_(K+1) = -cross-entropy.

    Args:
        rewards: [N, K].
        cross_entropy: [N], of each image, in nats.

    Returns:
        [N, K].
    """
    following = -cross_entropy
    result = []
    for reward in rewards.flip(1).unbind(1):
        following = reward + gamma * following
        result.append(following)
    return torch.stack(result[::-1], dim=1)


def policy_loss(probabilities: Tensor, decisions: Tensor, advantages: Tensor, images: int | None = None) -> Tensor:
    """Minus the mean over images of sum_i advantage_i log pi(a_i), a scalar whose gradient is REINFORCE's estimate.

    The mean over the batch (SkipNet's code sums) makes ``rl_weight`` independent of the batch size: it is the weight
    of the policy's term beside a mean cross-entropy.

    Args:
        probabilities: [N, K], that each block runs.
        decisions: [N, K], drawn from them.
        advantages: [N, K], returns less a baseline; no gradient flows through them.
        images: that the mean is over; N unless several processes share the batch, one of which may have none.
    """
    # A nan probability (training has diverged) would raise here, before the loss can be checked.
    minus_log_likelihood = F.binary_cross_entropy(probabilities.nan_to_num(0.5), decisions, reduction="none")
    return (advantages.detach() * minus_log_likelihood).sum() / (len(decisions) if images is None else images)


def entropy(probabilities: Tensor) -> Tensor:
    """Mean over images of the summed entropy of their K decisions, in nats; [N, K] -> scalar.

    Policy gradients vanish with p (1 - p): confident switches no longer react to alpha.
    """
    p = probabilities.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log()).sum(dim=1).mean()
