"""Baselines: what a return is compared with, so that a decision is judged by what it changes.

A baseline that does not depend on the decision it judges leaves the expected policy gradient as it is and lowers its
variance (Williams 1992, "Simple statistical gradient-following algorithms", section 4).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from gating.objectives import batch_baseline, returns, skip_rewards
from models import ResNet
from training.forward import Forward, training_forward
from training.supervised import as_used
from utils import parallel
from utils.modes import evaluation_mode

BASELINES = ("greedy", "batch", "none")


def baseline(kind: str, gained: Tensor, greedy_returns: Callable[[], Tensor], images: int | None = None) -> Tensor:
    """Baselines [N, K] for the returns ``gained`` [N, K].

    Args:
        kind: ``none`` zero; ``batch`` the mean return of the other images at the same switch; ``greedy`` the return
            that the same image earns under thresholded decisions (self-critical training, arXiv:1612.00563, section
            3.2), at the price of one more forward pass.
        greedy_returns: makes these returns, called only where needed.
        images: of the whole batch, where several processes share it.
    """
    if kind == "none":
        return torch.zeros_like(gained)
    if kind == "greedy":
        return greedy_returns()
    return batch_baseline(gained, parallel.all_reduced(gained.sum(dim=0)), len(gained) if images is None else images)


@torch.no_grad()
def thresholded_returns(
    network: ResNet,
    x: Tensor,
    y: Tensor,
    shares: Tensor,
    alpha: float | Tensor,
    gamma: float,
    skip: bool,
    forward: Forward | None = None,
) -> Tensor:
    """Returns [N, K] that thresholded decisions earn on normalised images ``x`` with labels ``y``, in evaluation.

    Args:
        skip: as in the network's forward pass.
        forward: that forward pass, from ``training.forward.training_forward``; plain by default.
    """
    forward = training_forward(network) if forward is None else forward
    with evaluation_mode(network):
        output = forward(x, as_used, torch.empty(0), skip)
    cross_entropy = F.cross_entropy(output.logits, y, reduction="none")
    return returns(skip_rewards(output.decisions, shares, alpha), cross_entropy, gamma)
