"""Batch norms apart from the rest of the network: which they are, and their statistics measured anew."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import ResNet, build_network
from models.decisions import DecisionRule
from utils import parallel
from utils.modes import mode_kept


def batch_norms(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, _BatchNorm)]


@torch.no_grad()
def reestimate_batch_norms(network: ResNet, batches: Iterable[tuple[Tensor, Tensor]], decide: DecisionRule) -> None:
    """Replace all running statistics by their averages over ``batches``, under the decisions of ``decide``.

    Skipped blocks are not run, so a block's norms see the images that its switch lets pass, as in evaluation.

    Args:
        batches: those of this process, where several deal out the batches; the averages are over all of them.
    """
    if parallel.processes() == 1:
        _reestimate(network, batches, decide)
        return
    # Norms that share their statistics would wait for processes that skip their block: plain ones do not.
    plain = build_network(**network.architecture).to(next(network.parameters()).device)
    plain.load_state_dict(network.state_dict())
    _reestimate(plain, batches, decide)
    network.load_state_dict(plain.state_dict())


def _reestimate(network: ResNet, batches: Iterable[tuple[Tensor, Tensor]], decide: DecisionRule) -> None:
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
            for norm in norms:
                _average_over_processes(norm)
            for norm, (mean, variance, batches_tracked) in zip(norms, before, strict=True):
                if norm.num_batches_tracked == 0:  # the norms of a block that no image takes keep what they had
                    norm.running_mean.copy_(mean)
                    norm.running_var.copy_(variance)
                    norm.num_batches_tracked.copy_(batches_tracked)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _average_over_processes(norm: _BatchNorm) -> None:
    """Averages of each process's batches to averages of all batches."""
    tracked = norm.num_batches_tracked.double()
    own = torch.cat([norm.running_mean.double() * tracked, norm.running_var.double() * tracked, tracked.view(1)])
    *sums, total = parallel.summed(own).split([norm.num_features, norm.num_features, 1])
    if parallel.processes() > 1 and total > 0:
        norm.running_mean.copy_(sums[0] / total)
        norm.running_var.copy_(sums[1] / total)
        norm.num_batches_tracked.copy_(total[0])
