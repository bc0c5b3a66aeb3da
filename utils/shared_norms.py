"""Batch norms whose statistics are those of a whole batch that several processes share.

On GPUs these are PyTorch's ``SyncBatchNorm``, which works on no CPU; ``SharedBatchNorm`` does the same there.
"""

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from utils import parallel


class SharedBatchNorm(_BatchNorm):
    """A batch norm that in training mode normalises with mean and variance over the images of all processes."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # of vectors as of images

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """[N, C] or [N, C, H, W]; N may differ between processes."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        y, mean, variance, count = _Normalised.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = variance * count / (count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return y


class _Normalised(Function):
    """Batch norm over all processes, with the mean, variance and number of values that it found.

    Source: batch norm (arXiv:1502.03167), section 3; every sum over the batch is one over the processes as well.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        axes, shape = _axes(x)
        count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
        total = parallel.summed(torch.cat([x.double().sum(axes), count]))
        mean, count = total[:-1] / total[-1], total[-1]
        centred = x - mean.to(x).view(shape)
        variance = parallel.summed(centred.double().square().sum(axes)) / count
        scale = (variance + eps).rsqrt().to(x)
        normalised = centred * scale.view(shape)
        ctx.save_for_backward(normalised, weight, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return normalised * weight.view(shape) + bias.view(shape), mean, variance, count

    @staticmethod
    def backward(ctx, g: Tensor, *_):
        normalised, weight, scale, count = ctx.saved_tensors
        axes, shape = _axes(g)
        # The parameters' gradients are this process's share: they are summed with all others.
        grad_bias, grad_weight = g.double().sum(axes), (g * normalised).double().sum(axes)
        means = (parallel.summed(torch.stack([grad_bias, grad_weight])) / count).to(g)
        centred = g - means[0].view(shape) - normalised * means[1].view(shape)
        return centred * (weight * scale).view(shape), grad_weight.to(weight), grad_bias.to(weight), None


def _axes(x: Tensor) -> tuple[list[int], list[int]]:
    """The axes that a channel is summed over, and the shape of a value for each channel."""
    return [i for i in range(x.dim()) if i != 1], [1, -1] + [1] * (x.dim() - 2)


def with_shared_norms(network: nn.Module) -> nn.Module:
    """The network with its batch norms replaced by shared ones that have the same parameters, buffers and names."""
    if next(network.parameters()).device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
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
