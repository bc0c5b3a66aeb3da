"""What kernels that exist on GPUs only compute, for the simulated one: of an LSTM's cell and of shared batch norms.

Batch norms as in PyTorch's ``aten/src/ATen/native/cuda/Normalization.cuh``; ``invstd`` is 1 / sqrt(variance + eps).
"""

import torch
from torch import Tensor


def lstm_cell(igates: Tensor, hgates: Tensor, c: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    """The next h and c [N, H], from the products of both inputs with their weights [N, 4H]."""
    i, f, g, o = (igates + b_ih + hgates + b_hh).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _sums(x: Tensor) -> tuple[list[int], list[int]]:
    """The axes that a channel is summed over, and the shape of a value for each channel."""
    return [i for i in range(x.dim()) if i != 1], [1, -1] + [1] * (x.dim() - 2)


def _stats(x, eps):
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    axes, _ = _sums(values)
    return values.mean(axes), (values.var(axes, correction=0) + eps).rsqrt()


def _gather_stats(x, mean, invstd, running_mean, running_var, momentum, eps, counts):
    kind, n = mean.dtype, counts.double().view(-1, 1)
    mean, invstd, total = mean.double(), invstd.double(), n.sum()
    whole = (mean * n).sum(0) / total
    variance = (((invstd**-2 - eps) + (mean - whole) ** 2) * n).sum(0) / total
    running_mean.lerp_(whole.to(running_mean.dtype), momentum)
    running_var.lerp_((variance * total / (total - 1)).to(running_var.dtype), momentum)
    return whole.to(kind), (variance + eps).rsqrt().to(kind)


def _elemt(x, weight, bias, mean, invstd, eps):
    _, shape = _sums(x)
    y = (x - mean.view(shape)) * invstd.view(shape)
    return (y * weight.view(shape) + bias.view(shape)).to(x.dtype)


def _backward_reduce(g, x, mean, invstd, weight, *_):
    axes, shape = _sums(x)
    g = g.to(mean.dtype)
    sum_dy, sum_dy_xmu = g.sum(axes), (g * (x - mean.view(shape))).sum(axes)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def _backward_elemt(g, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
    assert counts.dtype == torch.int32
    _, shape = _sums(x)
    total, inv = counts.sum().to(mean.dtype), invstd.view(shape)
    centred = (x - mean.view(shape)) * inv**2 * (sum_dy_xmu / total).view(shape)
    return ((g - (sum_dy / total).view(shape) - centred) * inv * weight.view(shape)).to(g.dtype)


KERNELS = {
    "batch_norm_stats": _stats,
    "batch_norm_gather_stats_with_counts": _gather_stats,
    "batch_norm_elemt": _elemt,
    "batch_norm_backward_reduce": _backward_reduce,
    "batch_norm_backward_elemt": _backward_elemt,
}
