"""Scale down the gates' logits, so that confident switches explore again; thresholded decisions do not change."""

import torch
from torch import Tensor

from models import ResNet, all_on
from utils.modes import evaluation_mode

LOGIT = 2.0  # mean size of a logit afterwards: a draw agrees with the threshold about seven times in eight


@torch.no_grad()
def rescale_gate_logits(network: ResNet, images: Tensor) -> None:
    """Scale the gates' last layers down until the mean size of their logits is at most ``LOGIT``.

    Supervised training leaves switches that run their blocks with probability near 1.  Sampling then never
    skips, and the policy gradient, which is proportional to p (1 - p), vanishes.  A positive factor keeps every logit's
    sign, so the thresholded decisions do not change.

    Args:
        images: normalised [N, 3, H, W], to measure the logits on.
    """
    with evaluation_mode(network):
        p = network(images, decide=all_on).probabilities[:, network.free_switches].double().clamp(1e-7, 1 - 1e-7)
    if not network.free_switches:
        return
    sizes = torch.logit(p).abs().mean(dim=0)  # of each switch that decides
    last = network.gate.last_layers
    for layer, size in zip(last, [sizes.mean()] if len(last) == 1 else sizes, strict=True):
        for parameter in layer.parameters():
            parameter.mul_(min(1.0, LOGIT / size.item()))
