"""Batch norms with statistics of the whole batch, if several processes share it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from models import ResNet, build_network
from models.decisions import DecisionRule
from utils import parallel
from utils.modes import evaluation_mode


class SharedBatchNorm(_BatchNorm):
    """A batch norm that in training mode normalises with mean and variance over the images of all processes."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # of vectors as of images

    def forward(self, x: Tensor) -> Tensor:
        """[N, C] or [N, C, H, W]; N may differ between processes."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if x.is_cuda and not torch.compiler.is_compiling():  # a compiler does not know the kernels, but writes its own
            self._count()
            running = (self.running_mean, self.running_var, self.momentum)
            return _NormalisedOnGpu.apply(x, self.weight, self.bias, *running, self.eps)
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        y, mean, variance, count = _Normalised.apply(precise, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self._count()
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = variance * count / (count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return y.to(x.dtype)

    def _count(self) -> None:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1


class _Normalised(Function):
    """Batch norm over all processes, with the mean, variance and number of values that it found.

    Source: batch norm (arXiv:1502.03167), section 3; every sum over the batch is one over the processes as well.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        axes, shape = _axes(x)
        count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
        total = parallel.all_reduced(torch.cat([x.double().sum(axes), count]))
        mean, count = total[:-1] / total[-1], total[-1]
        centred = x - mean.to(x).view(shape)
        variance = parallel.all_reduced(centred.double().square().sum(axes)) / count
        scale = (variance + eps).rsqrt().to(x)
        normalised = centred * scale.view(shape)
        ctx.save_for_backward(normalised, weight, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return (normalised * weight.view(shape) + bias.view(shape)), mean, variance, count

    @staticmethod
    def backward(ctx, g: Tensor, *_):
        normalised, weight, scale, count = ctx.saved_tensors
        axes, shape = _axes(g)
        # The parameters' gradients are this process's share: they are summed over the processes with all others.
        grad_bias, grad_weight = g.double().sum(axes), (g * normalised).double().sum(axes)
        means = (parallel.all_reduced(torch.stack([grad_bias, grad_weight])) / count).to(g)
        centred = g - means[0].view(shape) - normalised * means[1].view(shape)
        return centred * (weight * scale).view(shape), grad_weight.to(weight), grad_bias.to(weight), None


class _NormalisedOnGpu(Function):
    """``_Normalised`` with the running statistics' update, in the kernels of PyTorch's ``SyncBatchNorm``.

    PyTorch's function makes a GPU wait three times to find processes without images, which do not occur here.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float,
        eps: float,
    ):  # fmt: skip
        x, channels = _dense(x), x.shape[1]
        mean, deviation = torch.batch_norm_stats(x, eps)  # deviation: its inverse, here and below
        own = torch.cat([mean, deviation, mean.new_full((1,), x.numel() / channels)])
        means, deviations, counts = parallel.all_gathered(own).split([channels, channels, 1], dim=1)
        counts = counts.flatten()
        mean, deviation = torch.batch_norm_gather_stats_with_counts(
            x, means, deviations, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, deviation, counts.int())
        return torch.batch_norm_elemt(x, weight, bias, mean, deviation, eps)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight, mean, deviation, counts = ctx.saved_tensors
        g = _dense(g)
        *sums, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            g, x, mean, deviation, weight, True, True, True
        )
        sums = parallel.all_reduced(torch.stack(sums)).unbind()
        return (
            torch.batch_norm_backward_elemt(g, x, mean, deviation, weight, *sums, counts),
            grad_weight,
            grad_bias,
            *[None] * 4,
        )


def _dense(x: Tensor) -> Tensor:
    """In one of the two layouts that the kernels take."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _axes(x: Tensor) -> tuple[list[int], list[int]]:
    """The axes that a channel is summed over, and the shape of a value for each channel."""
    return [i for i in range(x.dim()) if i != 1], [1, -1] + [1] * (x.dim() - 2)


def with_shared_norms(network: nn.Module) -> nn.Module:
    """The network with its batch norms replaced by shared ones that have the same parameters, buffers and names."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, _shared(child))
    return network


def _shared(norm: _BatchNorm) -> SharedBatchNorm:
    shared = SharedBatchNorm(norm.num_features, norm.eps, norm.momentum)
    shared.weight, shared.bias = norm.weight, norm.bias
    shared.running_mean, shared.running_var = norm.running_mean, norm.running_var
    shared.num_batches_tracked = norm.num_batches_tracked
    return shared.train(norm.training)


def batch_norms(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, _BatchNorm)]


@torch.no_grad()
def reestimate_batch_norms(
    network: ResNet, batches: Iterable[tuple[Tensor, Tensor]], decide: DecisionRule, gates: bool = True
) -> None:
    """Replace all running statistics by their averages over ``batches``, under the decisions of ``decide``.

    Skipped blocks are not run, so a block's norms see only the images for which it runs, as in evaluation, and weigh a
    batch by their number.

    Args:
        batches: of this process; the averages are over those of all processes.
        gates: also those of the gates, which changes their decisions.
    """
    if parallel.world_size() == 1:
        _reestimate(network, batches, decide, gates)
        return
    # Norms that share their statistics would wait for processes that skip their block: plain ones do not.
    plain = build_network(**network.architecture).to(next(network.parameters()).device)
    plain.load_state_dict(network.state_dict())
    _reestimate(plain, batches, decide, gates)
    network.load_state_dict(plain.state_dict())


def _reestimate(network: ResNet, batches: Iterable[tuple[Tensor, Tensor]], decide: DecisionRule, gates: bool) -> None:
    spared = set() if gates or network.gate is None else set(batch_norms(network.gate))
    norms = [norm for norm in batch_norms(network) if norm not in spared]
    momenta = [norm.momentum for norm in norms]
    before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    images = dict.fromkeys(norms, 0)

    def weigh(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        images[norm] += len(inputs[0])
        norm.momentum = len(inputs[0]) / images[norm]  # so that the running average is that of all images

    handles = [norm.register_forward_pre_hook(weigh) for norm in norms]
    try:
        with evaluation_mode(network):
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
            for x, _ in batches:
                if len(x) > 1:  # one image has no variance
                    network(x, decide=decide, skip=True)
            for norm, buffers in zip(norms, before, strict=True):
                if _average_over_processes(norm, images[norm]) == 0:  # a block that no image runs keeps its statistics
                    for buffer, own in zip(norm.buffers(), buffers, strict=True):
                        buffer.copy_(own)
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _average_over_processes(norm: _BatchNorm, images: int) -> int:
    """Turn averages over each process's images into averages over all images; returns the number of all images."""
    if parallel.world_size() == 1:
        return images
    own = torch.cat([norm.running_mean, norm.running_var]).double() * images
    counts = norm.num_batches_tracked.new_tensor([images, norm.num_batches_tracked]).double()
    total = parallel.all_reduced(torch.cat([own, counts]))
    if total[-2] > 0:
        averages = (total[:-2] / total[-2]).split(norm.num_features)
        for buffer, average in zip(norm.buffers(), (*averages, total[-1]), strict=True):
            buffer.copy_(average)
    return int(total[-2])


BATCH_NORM_MODES = ("frozen", "reestimate")


def freeze_batch_norms(network: nn.Module) -> None:
    """Batch norms use their running statistics and leave them as they are, until the next ``network.train()``."""
    for norm in batch_norms(network):
        norm.eval()


def placed(network: ResNet, device: torch.device) -> ResNet:
    """The network on ``device`` with channels last: tensor cores read that layout, and CPUs train 1.2x faster in it.

    Where several processes train it, its batch norms share their statistics.
    """
    network = network.to(device, memory_format=torch.channels_last)
    return network if parallel.world_size() == 1 else with_shared_norms(network)
