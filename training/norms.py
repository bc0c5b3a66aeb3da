"""Batch norms whose statistics are those of a whole batch that several processes share."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import ResNet
from utils import parallel
from utils.modes import evaluation_mode, hooked, layer_input


class SharedBatchNorm(_BatchNorm):
    """A batch norm that in training mode normalises with mean and variance over the images of all processes.

    Not ``torch.nn.SyncBatchNorm``, which refuses tensors on the CPU.  Gradients flow through its sums.
    Source: batch norm (arXiv:1502.03167), section 3.
    """

    alone = False  # whether it looks at this process's images only

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # of vectors as of images

    def forward(self, x: Tensor) -> Tensor:
        """[N, C] or [N, C, ...]; N may differ between processes."""
        if self.alone or (not self.training and self.running_mean is not None):
            return super().forward(x)
        axes, shape = [i for i in range(x.dim()) if i != 1], [1, -1] + [1] * (x.dim() - 2)
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        count = parallel.all_reduced(precise.new_full((1,), x.numel() / x.shape[1]))
        mean = parallel.Summed.apply(precise.sum(axes)) / count
        centred = precise - mean.view(shape)
        variance = parallel.Summed.apply(centred.square().sum(axes)) / count
        if self.running_mean is not None:
            self._follow(mean.detach(), (variance * count / (count - 1)).detach())
        scale = (variance + self.eps).rsqrt()
        if not self.affine:
            return (centred * scale.view(shape)).to(x.dtype)
        return (centred * (scale * self.weight).view(shape) + self.bias.view(shape)).to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        # Without a momentum the statistics are the means over all batches so far.
        share = 1 / self.num_batches_tracked.to(mean) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def with_shared_norms(network: nn.Module) -> nn.Module:
    """The network with its batch norms replaced by shared ones that have the same parameters, buffers and names."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                setattr(parent, name, _shared(child))
    return network


def _shared(norm: _BatchNorm) -> SharedBatchNorm:
    shared = SharedBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    shared.weight, shared.bias = norm.weight, norm.bias
    shared.running_mean, shared.running_var = norm.running_mean, norm.running_var
    shared.num_batches_tracked = norm.num_batches_tracked
    return shared.train(norm.training)


def batch_norms(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, _BatchNorm)]


@torch.no_grad()
def reestimate_batch_norms(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Any]],
    forward: Callable[[nn.Module, Tensor], Any],
    spared: nn.Module | None = None,
) -> None:
    """Replace all running statistics by their averages over ``batches``.

    Where blocks are skipped, a block's norms see the images for which the block runs, as in evaluation, and weigh a
    batch by how many these are.

    Args:
        batches: whole ones; of several processes each takes all of them.
        forward: runs the network.
        spared: a part whose norms stay as they are.
    """
    left = set() if spared is None else set(batch_norms(spared))
    norms = [norm for norm in batch_norms(network) if norm not in left]
    momenta = [norm.momentum for norm in norms]
    images = dict.fromkeys(norms, 0)

    def weigh(norm: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen = len(layer_input(args, kwargs))
        images[norm] += seen
        norm.momentum = seen / images[norm]  # so that the running average is that of all images

    try:
        with (
            hooked(norm.register_forward_pre_hook(weigh, with_kwargs=True) for norm in norms),
            evaluation_mode(network),
        ):
            for norm in norms:
                norm.train()
                if isinstance(norm, SharedBatchNorm):
                    norm.alone = True
            for x, _ in batches:
                if len(x) > 1:  # one image has no variance
                    forward(network, x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if isinstance(norm, SharedBatchNorm):
                norm.alone = False
    parallel.broadcast_weights(network)


BATCH_NORM_MODES = ("frozen", "reestimate")


def freeze_batch_norms(network: nn.Module) -> None:
    """Batch norms use their running statistics and leave them as they are, until the next ``network.train()``."""
    for norm in batch_norms(network):
        norm.eval()


def placed(network: ResNet, device: torch.device) -> ResNet:
    """The network on ``device`` with channels last: tensor cores read that layout, and CPUs train 1.2x faster in it.

    Where several processes train it, its batch norms share their statistics.
    """
    network = network.to(device)
    if all(p.dim() <= 4 for p in network.parameters()):  # there is another layout for volumes
        network = network.to(memory_format=torch.channels_last)
    return network if parallel.world_size() == 1 else with_shared_norms(network)
