"""Batch norms apart from the rest of the network: which they are, and their statistics measured anew."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models import ResNet
from models.decisions import DecisionRule
from utils.modes import mode_kept


def batch_norms(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


@torch.no_grad()
def reestimate_batch_norms(network: ResNet, batches: Iterable[tuple[Tensor, Tensor]], decide: DecisionRule) -> None:
    """Replace all running statistics by their averages over ``batches``, under the decisions of ``decide``.

    Skipped blocks are not run, so a block's norms see the images that its switch lets pass, as in evaluation.
    """
    norms = batch_norms(network)
    momenta = [norm.momentum for norm in norms]
    before = [(n.running_mean.clone(), n.running_var.clone(), n.num_batches_tracked.clone()) for n in norms]
    try:
        with mode_kept(network, training=False):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain average over all batches
                norm.train()
            for x, _ in batches:
                if len(x) > 1:  # one image has no variance
                    network(x, decide=decide, skip=True)
            for norm, (mean, variance, batches_tracked) in zip(norms, before, strict=True):
                if norm.num_batches_tracked == 0:  # the norms of a block that no image takes keep what they had
                    norm.running_mean.copy_(mean)
                    norm.running_var.copy_(variance)
                    norm.num_batches_tracked.copy_(batches_tracked)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
